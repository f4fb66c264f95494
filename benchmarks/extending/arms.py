"""The arms of the experiment: what is done to the model, in order of what an answer is worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from longlora_ext import extend_config

#: A group of S2-Attn is this share of the context, as in the paper.
GROUP = 1 / 4


@dataclass(frozen=True)
class Arm:
    """What is done to the model.

    Attributes:
        says: What it is, in words.
        rope_type: How RoPE is scaled; None: not at all.
        trained: Whether it is trained, or only scaled.
        pattern: What `extend_config` is told of the attention in training, `window` as a share of the context.
        dense: Dense attention in all steps.
        dense_steps: The share of the last steps that is dense.
        row_share: Tokens of a training row as a share of the context.
        drawn_alone: Rows shorter than the context are drawn one by one, not as the parts of a row that others train on.
    """

    says: str
    rope_type: str | None = "yarn"
    trained: bool = True
    pattern: dict[str, Any] = field(default_factory=dict)
    dense: bool = False
    dense_steps: float = 0.0
    row_share: float = 1.0
    drawn_alone: bool = False

    def config(self, base: PreTrainedConfig, context: int) -> PreTrainedConfig:
        """The config to build the model with."""
        if self.rope_type is None:
            return base
        pattern = dict(self.pattern)
        if "window" in pattern:  # alone: one group of the whole context, shifted or not
            pattern |= {"window": int(pattern["window"] * context), "group_size": 2 * context}
        config = extend_config(base, context, rope_type=self.rope_type, **({"group_ratio": GROUP} | pattern))
        if self.dense:
            config.s2attn_mode = "dense"
        return config


ARMS: dict[str, Arm] = {
    "base": Arm("the model as it is", rope_type=None, trained=False),
    "linear": Arm("linear scaling alone", rope_type="linear", trained=False),
    "yarn": Arm("YaRN alone", trained=False),
    "ntk": Arm("a larger theta alone (ntk)", rope_type="ntk", trained=False),
    "s2-sink": Arm("S2-Attn and the first token", pattern={"sink": True}),
    "dense": Arm("dense attention", dense=True),
    "s2": Arm("S2-Attn without the first token", pattern={}),
    "window8-sink": Arm("window of N/8 and the first token", pattern={"window": 1 / 8, "sink": True}),
    "s2-sink-dense-steps": Arm(
        "S2-Attn and the first token, the last tenth of the steps dense", pattern={"sink": True}, dense_steps=0.1
    ),
    "window16-sink-dense-steps": Arm(
        "window of N/16 and the first token, the last tenth of the steps dense",
        pattern={"window": 1 / 16, "sink": True},
        dense_steps=0.1,
    ),
    "s2-sink-dense-layers": Arm(
        "S2-Attn and the first token, the last three layers dense", pattern={"sink": True, "dense_layers": 3}
    ),
    "short": Arm("dense attention in rows of N/8 tokens", dense=True, row_share=1 / 8),
    "short-drawn-alone": Arm(
        "dense attention in rows of N/8 tokens, each drawn by itself", dense=True, row_share=1 / 8, drawn_alone=True
    ),
    "s2-ntk-sink": Arm("S2-Attn and the first token, a larger theta (ntk)", "ntk", pattern={"sink": True}),
    "s2-linear": Arm("S2-Attn and linear scaling, the paper's both", "linear", pattern={}),
}
