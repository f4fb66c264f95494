"""The day that a chat template prints: that of a run's first call, so that it has the same samples on every other."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from app.inputs.template import prints_date
from app.runs.checkpoints import read_marker

#: What the setting is called that holds it, among those that the losses depend on.
SETTING = "template_date"


def template_date(
    tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None, manifest: dict[str, Any] | None
) -> date | None:
    """The day for a run's conversations, None where the template prints none. Collective.

    Args:
        tokenizer: With the chat template.
        checkpoint: What the run goes on from.
        manifest: That of the run that is to be done again.

    Raises:
        ValueError: What was recorded is no day.
    """
    if not prints_date(tokenizer):
        return None
    marked = read_marker(checkpoint, "settings")["settings"] if checkpoint else {}
    recorded = marked.get(SETTING) or (manifest or {"settings": {}})["settings"].get(SETTING)
    if recorded is not None:
        try:
            return date.fromisoformat(recorded)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the run was recorded with {SETTING} {recorded!r}, which is no day") from error
    return broadcast_object_list([date.today()])[0]  # midnight comes to no two processes at the same time
