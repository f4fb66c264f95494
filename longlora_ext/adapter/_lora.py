"""What an adapter folder changes, weight by weight, without the model that it is for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from longlora_ext._errors import naming
from longlora_ext.adapter._checkpoint import Checkpoint
from longlora_ext.adapter._load import weights_of_adapter
from longlora_ext.adapter._record import FACTORS, check_tensors

PREFIX = "base_model.model."  # of a weight's name in a file of PEFT
_A, _B = FACTORS

# Fields of LoraConfig that say nothing of how weights add up, or that are seen to here. Any other one, also one that a
# later PEFT brings, must be as PEFT has it by default.
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "ensure_weight_tying", "runtime_config",
}  # fmt: skip
#: Values of init_lora_weights. The others, such as PiSSA, change the base model's weights as well.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


class NeedsWholeModel(Exception):
    """Why an adapter cannot be merged weight by weight."""


class LoraWeights:
    """LoRA's factors, and the weights that were trained in place of the base model's, by the base model's names.

    Attributes:
        config: The adapter's, a `peft.LoraConfig`.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        with naming(str(folder / "adapter_config.json")):
            self.config: Any = PeftConfig.from_pretrained(str(folder))
        if other := obstacle(self.config):
            raise NeedsWholeModel(f"the adapter has {other}")
        file = weights_of_adapter(folder)
        self._about = f"{file} as adapter_config.json describes it"
        with naming(self._about):
            self._weights = Checkpoint([file])
        check_tensors(self._weights, record, file)
        with naming(self._about):
            names = {name.removeprefix(PREFIX): name for name in self._weights}
            self._factors = {
                name.removesuffix(_A) + ".weight": (names[name], names[name.removesuffix(_A) + _B])
                for name in names
                if name.endswith(_A)
            }
            self._replaced = {name: stored for name, stored in names.items() if ".lora_" not in name}
        for name in names:
            if ".lora_" in name and not name.endswith((_A, _B)):
                raise NeedsWholeModel(f"the adapter has {name}")
        with naming(self._about):
            self._scales = {name: self._check(name) for name in self._factors}

    def _check(self, name: str) -> float:
        """What the product of its two factors is multiplied by, if they are what the config says."""
        if not check_target_module_exists(self.config, name.removesuffix(".weight")):
            raise ValueError(f"there are factors for {name}, which its target_modules do not name")
        a, b = (self._weights.get(stored) for stored in self._factors[name])
        rank = self._of(name, self.config.rank_pattern, self.config.r)
        if a.ndim != 2 or a.shape[0] != rank or b.shape[1:] != (rank,):
            raise ValueError(f"the factors for {name} have size {list(a.shape)} and {list(b.shape)}, not rank {rank}")
        alpha = self._of(name, self.config.alpha_pattern, self.config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    @staticmethod
    def _of(name: str, pattern: dict[str, int], default: int) -> int:
        return pattern.get(get_pattern_key(list(pattern), name.removesuffix(".weight")), default)

    @property
    def changed(self) -> set[str]:
        """The names of the weights that are others after merging."""
        return set(self._factors) | set(self._replaced)

    def ties(self, names: set[str]) -> bool:
        """Whether the weights of these names were trained as one."""
        return bool(getattr(self.config, "ensure_weight_tying", False)) and names <= set(self._replaced)

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight after merging, in fp32, of one that is `weight` in the base model."""
        if name in self._replaced:
            new = self._weights.get(self._replaced[name])
        else:
            a, b = (self._weights.get(stored).float() for stored in self._factors[name])
            new = self._scales[name] * (b @ a)
        if new.shape != weight.shape:
            raise ValueError(
                f"cannot load {self._about}: {name} has size {list(new.shape)} there and {list(weight.shape)} in the "
                "base model"
            )
        return new if name in self._replaced else new.add_(weight)


def obstacle(config: Any) -> str | None:
    """What of an adapter is more than a change of single weights."""
    if type(config) is not LoraConfig:
        return f"the type {config.peft_type}"
    if config.init_lora_weights not in PLAIN_STARTS:
        return f"init_lora_weights={config.init_lora_weights!r}"
    plain = LoraConfig()
    names = [field.name for field in dataclasses.fields(plain) if field.name not in _UNDERSTOOD]
    # What is empty is as if it were not there: PEFT writes target_parameters=[] for a mixture of experts.
    other = next((name for name in names if (getattr(config, name) or None) != (getattr(plain, name) or None)), None)
    return other and f"{other}={getattr(config, other)!r}"
