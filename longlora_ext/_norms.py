"""The normalisations of a model, found by what they are, and the names by which PEFT finds them again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def norms_of(model: nn.Module) -> list[str]:
    """
    The full names of a model's norms, those that have weights: OLMo's LayerNorm has none.

    Raises:
        `ValueError`: something that looks like a norm is more than one, so that it cannot be trained as such.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if found and name.startswith(f"{found[-1]}."):  # a part of that one
            continue
        own = dict(module.named_parameters(recurse=False))
        if own and _is_norm(name, module):
            found.append(name)
        elif strange := [parameter for parameter in own if "norm" in parameter.lower()]:
            raise ValueError(
                f"{name}.{strange[0]} looks like the weight of a norm, but {type(module).__name__} is more than that: "
                "pass modules_to_save=[...] with the names of the modules to train in full"
            )
    return found


def _is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module with weights is a norm: vectors alone, in a class or under a name that says so, or one that is
    called weight. Linear layers and embeddings have matrices, and a PReLU is an activation."""
    weights = dict(module.named_parameters())
    if isinstance(module, nn.PReLU) or any(weight.ndim != 1 for weight in weights.values()):
        return False
    said = "norm" in type(module).__name__.lower() or "norm" in name.rpartition(".")[2].lower()
    return isinstance(module, _NORMS) or said or "weight" in weights


def names_for_peft(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """
    The shortest names by which PEFT, which takes every module whose full name ends with one, finds those modules and no
    others.

    Args:
        model (`torch.nn.Module`):
            The model that the modules are in.
        wanted (`Iterable[str]`):
            Their full names.

    Raises:
        `ValueError`: PEFT cannot tell one of them from another module.
    """
    wanted = set(wanted)
    others = [name for name, _ in model.named_modules() if name and name not in wanted]
    found = set()
    for name in wanted:
        parts = name.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        ending = next((end for end in endings if not any(other.endswith(end) for other in others)), None)
        if ending is None:
            raise ValueError(f"PEFT cannot tell {name} from other modules whose names end likewise")
        found.add(ending)
    return sorted(found)
