"""The projections of a model's attention, found by where they are, and the names by which PEFT finds them again."""

from __future__ import annotations

from torch import nn

from longlora_ext.adapter._norms import names_for_peft

_USUAL = ("q_proj", "k_proj", "v_proj", "o_proj")


def projections_of(model: nn.Module) -> list[str]:
    """What LoRA goes on by default, as `target_modules` of PEFT.

    `q_proj`, `k_proj`, `v_proj` and `o_proj` where a model has them; otherwise all linear layers that are direct parts
    of its attention layers: the one projection that is all three (Phi-3, GPT-NeoX), those of latent keys and values
    (DeepSeek), or an output that is called otherwise (Phi, LFM2).

    Raises:
        ValueError: There are none such, or but one to an attention layer.
    """
    modules = dict(model.named_modules())
    last = {name.rpartition(".")[2] for name in modules}
    if last.issuperset(_USUAL):
        return list(_USUAL)
    found = {
        name: [f"{name}.{part}" for part, child in module.named_children() if type(child) is nn.Linear]
        for name, module in modules.items()
        if any(word in type(module).__name__ for word in ("Attention", "MLA"))
    }
    # What is around an attention layer may be called so as well, and have no projections.
    layers = [projections for projections in found.values() if projections]
    if not layers or min(map(len, layers)) < 2:
        there = [name for name in _USUAL if name in last]
        missing = [name for name in _USUAL if name not in last]
        raise ValueError(
            f"{type(model).__name__} has {', '.join(there) + ' but ' if there else ''}no {', '.join(missing)}: pass "
            "target_modules=[...] with the names of its attention projections"
        )
    return names_for_peft(model, [name for projections in layers for name in projections])
