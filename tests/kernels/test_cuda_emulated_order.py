"""Whatever the order in which blocks and warps of the emulated CUDA kernels run: the same bits, no barrier too many."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from emulated import DTYPES, TOKENS, Config, Run, starts_of
from op_checks import Problem, assert_same, outputs_and_grads


@pytest.mark.parametrize("sink", [False, True], ids=["dense", "sink"])
def test_deterministic_gives_the_same_bits(module: ModuleType, config: Config, sink: bool) -> None:
    """In whatever order the blocks run. Where dq is summed up by atomics, it alone differs, in its last bits."""
    problem = Problem(seqlen=TOKENS[config.head_dim], heads=2, kv_heads=1, head_dim=config.head_dim)
    q, k, v = (x.to(DTYPES[config.dtype]) for x in problem.tensors())
    k += 100  # which cancels out in dq, but for the rounding of its sums: that reaches the bits left by the dtype
    dout = torch.randn_like(q)

    def results(deterministic: bool, seed: int) -> tuple[Tensor, ...]:
        module.configure(seed)
        group_size = problem.seqlen * 3 // 4 if sink else problem.seqlen
        run = Run(module, group_size, None, {"first_shifted_head": 2, "sink": sink}, deterministic)
        return outputs_and_grads(run, q, k, v, dout)

    out, dq, dk, dv = results(True, 0)
    for seed in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(results(True, seed), (out, dq, dk, dv), strict=True))
    by_atomics = [results(False, seed) for seed in (0, 3)]
    for result in by_atomics:
        assert_same(result[1], dq)
        assert all(torch.equal(result[i], exact) for i, exact in ((0, out), (2, dk), (3, dv)))
    assert any(not torch.equal(result[1], by_atomics[0][1]) for result in by_atomics)


def test_each_site_is_needed(module: ModuleType, config: Config) -> None:
    """Without any one barrier, commit or wait the kernels are stopped or wrong, for one of a few seeds at least."""
    problem = Problem(seqlen=TOKENS[config.head_dim], heads=2, kv_heads=1, head_dim=config.head_dim)
    q, k, v = (x.to(DTYPES[config.dtype]) for x in problem.tensors())
    # A tile has 32 keys in one backward, and more in all others.
    first, group_size = (15, 20) if (config.head_dim, config.kib) == (256, 99) else (55, 100)
    dout, packed = torch.randn_like(q), starts_of([first, problem.seqlen - first])[None]
    inputs = (q, k, v, dout)
    few = tuple(x[:, :9].contiguous() for x in inputs)

    def results(run: Run, inputs: tuple[Tensor, ...], seed: int = 0, site: str | None = None) -> tuple[Tensor, ...]:
        module.configure(seed, site)
        return outputs_and_grads(run, *inputs)

    # Rows whose keys are one tile, groups with two sinks in a tile of keys, and dense attention: the shortest first.
    # With each what is right, and the sites that it comes to: to leave out another changes nothing.
    parts = []
    for deterministic in (False, True):
        dense = Run(module, problem.seqlen, None, {}, deterministic)
        sinks = Run(module, group_size, packed, {"sink": True}, deterministic)
        for run, of in ((dense, few), (sinks, inputs), (dense, inputs)):
            parts.append((run, of, results(run, of), module.sites()))
    sites = set().union(*(met for *_, met in parts))
    assert {site.split()[1] for site in sites} == {"sync_block", "commit_copies", "wait_copies"}

    def survives(site: str, seed: int) -> bool:
        try:
            for run, of, right, met in parts:
                if site in met:
                    for a, b in zip(results(run, of, seed, site), right, strict=True):
                        assert_same(a, b)
        except (RuntimeError, AssertionError):  # simt's Error, or wrong
            return False
        return True

    assert [site for site in sorted(sites) if all(survives(site, seed) for seed in range(4))] == []
