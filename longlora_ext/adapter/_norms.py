"""The normalisations of a model, found by what they are, and the names by which PEFT finds them again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from longlora_ext.adapter._precision import whole_shape

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def norms_of(model: nn.Module) -> list[str]:
    """The full names of a model's norms, those that have weights: OLMo's LayerNorm has none.

    Raises:
        ValueError: Something that looks like a norm is more than one, so that it cannot be trained as such.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if found and name.startswith(f"{found[-1]}."):  # a part of that one
            continue
        own = dict(module.named_parameters(recurse=False))
        if own and _is_norm(name, module):
            found.append(name)
        elif strange := [part for part, weight in own.items() if _is_of_norm(part, weight, module)]:
            raise ValueError(
                f"{name}.{strange[0]} looks like the weight of a norm, but {type(module).__name__} is more than that: "
                "pass modules_to_save=[...] with the names of the modules to train in full"
            )
    return found


def _is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module with weights is a norm: its class says so (Cohere's has a vector for each head), or it has
    vectors alone, and says so by its name or has one that is called weight."""
    own, weights = dict(module.named_parameters(recurse=False)), dict(module.named_parameters())
    if own.keys() != weights.keys():
        return False  # it has weighty parts
    if isinstance(module, _NORMS) or "norm" in type(module).__name__.lower():
        return True
    vectors = all(_is_vector(weight) for weight in own.values())
    return vectors and ("norm" in name.rpartition(".")[2].lower() or _is_of_norm("weight", own.get("weight"), module))


def _is_of_norm(part: str, weight: nn.Parameter | None, module: nn.Module) -> bool:
    """Whether a parameter looks like that of a norm. The weights of other layers are matrices, but a PReLU's."""
    is_vector = weight is not None and _is_vector(weight) and not isinstance(module, nn.PReLU)
    return is_vector and ("norm" in part.lower() or part == "weight")


def _is_vector(weight: nn.Parameter) -> bool:
    """Whether it has one dimension, also where ZeRO-3 has cut it up."""
    return len(whole_shape(weight)) == 1


def names_for_peft(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """The shortest names by which PEFT finds those modules and no others.

    It takes every module whose full name ends with one.

    Args:
        model: The model that the modules are in.
        wanted: Their full names.

    Raises:
        ValueError: PEFT cannot tell one of them from another module.
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
