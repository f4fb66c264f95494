"""The day that a chat template prints: that of a run's first call, so that it has the same samples on every other."""

from __future__ import annotations

from datetime import date

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from app.inputs.template import prints_date
from app.runs.run import Run

#: What the setting is called that holds it, among those that the losses depend on.
SETTING = "template_date"


def template_date(tokenizer: PreTrainedTokenizerBase, run: Run) -> date | None:
    """The day for a run's conversations, None where the template prints none. Collective.

    Args:
        tokenizer: With the chat template.
        run: It may go on with an earlier run, or do one again, which had a day.

    Raises:
        ValueError: What was recorded is no day.
    """
    if not prints_date(tokenizer):
        return None
    recorded = run.recorded(SETTING)
    if recorded is not None:
        try:
            return date.fromisoformat(recorded)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the run was recorded with {SETTING} {recorded!r}, which is no day") from error
    return broadcast_object_list([date.today()])[0]  # midnight comes to no two processes at the same time
