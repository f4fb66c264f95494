"""The life of a run: its folder, the checkpoint that it goes on from, its settings and its manifest.

run = Run.open(...)        the folder is found and locked, the checkpoint read, the settings known so far compared
run.settle(...)            settings that the text brings; those of the run before must be the same
run.begin(manifest)        leftovers go, run.json is written: from here on the folder is that of this run
run.record_outcome(...)    at the end: run.json says how it ended, and lies with what was made
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.runs.checkpoints import read_marker, remove_incomplete
from app.runs.json_files import write_json
from app.runs.launch import say
from app.runs.run_folder import RUN_FILE, differences, find_checkpoint, take_folder
from longlora_ext._folders import remove_abandoned
from longlora_ext._processes import on_first_process
from longlora_ext.adapter._load import MADE_BASE

#: What the runs of earlier versions did that had no name for it yet: all settings since 0.1.0, and its rows.
NOT_NAMED = {"rows": "packed", "sink": False, "window": None, "dense_layers": None}


@dataclass
class Run:
    """A run of `finetune_llama.py`. Every process has one, and all are alike.

    Attributes:
        folder: What it writes to. It is locked until the first process ends.
        checkpoint: The folder of the checkpoint that it goes on from, or None.
        marker: What was written into that checkpoint: `step`, `settings`, `perplexity`.
        repeats: The manifest of a run that is to be done again, or None.
        settings: All that its losses depend on, as far as it is known.
        manifest: What its run.json says, once it has begun.
    """

    folder: Path
    checkpoint: Path | None = None
    marker: dict[str, Any] = field(default_factory=dict)
    repeats: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        output_dir: str | None,
        resume_from: str | None,
        default_name: str,
        settings: dict[str, Any],
        repeats: dict[str, Any] | None = None,
    ) -> Run:
        """Find the folder and where the run starts from, and keep other runs out. Collective.

        Args:
            output_dir: The folder to write to. Default: one below `finetuned/`.
            resume_from: None, `latest`, or the folder of a checkpoint.
            default_name: What to call the folder by default; a number is added where that exists.
            settings: What the losses depend on, as far as it is known.
            repeats: The manifest of a run that is to be done again.

        Raises:
            ValueError: The folder holds something already and the run does not resume, or it cannot resume from
                there; another run writes to it; it cannot be made; or the run before had other settings.
        """

        def find() -> tuple[Path, Path | None, dict[str, Any]]:
            folder = take_folder(output_dir, resume_from, default_name)
            checkpoint = find_checkpoint(folder, resume_from) if resume_from else None
            return folder, checkpoint, read_marker(checkpoint, "settings", "step") if checkpoint else {}

        run = cls(*on_first_process(find), repeats)
        run.settle(settings)
        return run

    @property
    def step(self) -> int:
        """The steps that are done already."""
        return self.marker.get("step", 0)

    def recorded(self, setting: str) -> Any:
        """What a setting was in the run that this one goes on with or does again; None if there is none."""
        earlier = (self.marker.get("settings", {}), self.repeats["settings"] if self.repeats else {})
        return next((settings[setting] for settings in earlier if setting in settings), None)

    def settle(self, settings: dict[str, Any]) -> None:
        """Add settings, and compare them with those of the run that this one goes on with or does again. Collective.

        Raises:
            ValueError: They differ.
        """

        def compare() -> None:
            recorded = self.marker.get("settings", {})
            if recorded and (others := differences({**NOT_NAMED, **recorded}, settings)):
                raise ValueError(f"{self.checkpoint} belongs to another run: {'; '.join(others)}")
            if self.repeats and (others := differences({**NOT_NAMED, **self.repeats["settings"]}, settings)):
                raise ValueError(
                    f"this is not the run that --from_manifest names: {'; '.join(others)}. It was: "
                    f"{self.repeats['command']}"
                )

        on_first_process(compare)
        self.settings |= settings

    def check_steps(self, steps: int) -> None:
        """Raise `ValueError` if the checkpoint has more steps behind it than the run is to have."""
        if self.step > steps:
            raise ValueError(
                f"{self.checkpoint} is of step {self.step:,}, and this run is to have {steps:,}: give more steps, or "
                "resume from an earlier checkpoint"
            )

    def begin(self, manifest: dict[str, Any]) -> None:
        """Make the folder that of this run. Collective.

        Args:
            manifest: What to write into its `run.json`.
        """
        self.manifest = manifest

        def write() -> None:
            remove_abandoned(self.folder)
            for name in remove_incomplete(self.folder):
                say(f"removed {name}: the run was stopped while it wrote it")
            if self.checkpoint is None and (made := self.folder / MADE_BASE).exists():
                shutil.rmtree(made)  # of an attempt whose model may have been another
            write_json(self.folder / RUN_FILE, manifest)

        on_first_process(write)

    def record_outcome(self, result: Path, outcome: dict[str, Any]) -> None:
        """Note in the manifest how the run ended, and put a copy into what it made. On one process."""
        self.manifest = {**self.manifest, "outcome": outcome}
        write_json(self.folder / RUN_FILE, self.manifest)
        shutil.copy(self.folder / RUN_FILE, result / RUN_FILE)
