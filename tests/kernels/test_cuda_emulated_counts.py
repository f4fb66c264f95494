"""The emulated CUDA kernels do no product, load or copy more than needed."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import resources
import simt_build
import simt_kernels
from emulated import DTYPES, Config
from longlora_ext.reference import s2attn_mask
from op_checks import Problem


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Config], dict[str, int]]:
    """The tile of a direction, from tile_config.h itself."""
    fields = {"forward": ["rows", "keys", "warps"]}
    fields["backward"] = [*fields["forward"], "score_warps", "dkv_warps", "dq_warps"]
    program = tmp_path_factory.mktemp("tiles") / "tiles.cpp"
    prints = "".join(
        f'std::printf("%d ", longlora::cuda::{direction}_tile(head_dim, kib).{name});'
        for direction, names in fields.items()
        for name in names
    )
    program.write_text(
        f'#include <cstdio>\n#include <cstdlib>\n#include "{simt_build.CUDA}/tile_config.h"\n'
        "int main(int, char** arguments) {\n"
        f"const int head_dim = std::atoi(arguments[1]), kib = std::atoi(arguments[2]); {prints} }}\n"
    )
    binary = program.with_suffix("")
    simt_build.run([*simt_build.CXX, "-std=c++17", program, "-o", binary])

    def tile(direction: str, config: Config) -> dict[str, int]:
        command = [binary, str(config.head_dim), str(config.kib)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        names = [(way, name) for way, of_way in fields.items() for name in of_way]
        values = {name: int(value) for (way, name), value in zip(names, printed, strict=True) if way == direction}
        return values | {"threads": 32 * values["warps"]}

    return tile


def visible_tiles(problem: Problem, doc_start: Tensor | None, rows: int, keys: int) -> int:
    """Tiles of scores, of all heads, in which some row sees some key other than its sink."""
    total = 0
    for head in range(problem.heads):
        shifted = head >= problem.heads // 2
        pattern: dict[str, Any] = {"window": problem.window, "seqlen_k": problem.tokens}
        mask = s2attn_mask(problem.seqlen, problem.group_size, shifted, doc_start, **pattern)  # without the sink
        mask = mask.expand(problem.batch, problem.seqlen, problem.tokens).float()
        total += int(torch.nn.functional.max_pool2d(mask, (rows, keys), ceil_mode=True).sum())
    return total


def seen_tiles(problem: Problem, doc_start: Tensor | None, keys: int) -> int:
    """Tiles of keys, of the one KV head, of which some row of some head sees a key."""
    masks = [
        s2attn_mask(problem.seqlen, problem.group_size, shifted, doc_start, seqlen_k=problem.tokens)
        for shifted in (False, True)
    ]
    seen = (masks[0] | masks[1]).any(dim=-2).expand(problem.batch, problem.tokens).float()
    return int(torch.nn.functional.max_pool1d(seen, keys, ceil_mode=True).sum())


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    "pattern",
    [{}, {"sink": True, "window": 129}, {"sink": True, "seqlen_k": 777}, {"seqlen_k": 650}],
    ids=["groups", "window", "last", "last, whose unshifted groups begin first"],
)
def test_no_instruction_more_than_needed(
    module: ModuleType,
    config: Config,
    tiles: Callable[[str, Config], dict[str, int]],
    documents: bool,
    pattern: dict[str, Any],
) -> None:
    """Products, matrix loads and copies are those of the tiles that hold something, counted as for the machine code.

    The sink adds to none of them.
    """
    # Without documents one row of a batch is as the other.
    shape = {"batch": 1 + documents, "seqlen": 450, "heads": 2, "kv_heads": 1, "group_size": 300, **pattern}
    problem = Problem(**shape, documents=documents, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    options: dict[str, Any] = {"sink": problem.sink, "window": problem.window}
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()
    head_dim = config.head_dim

    def counted() -> Counter[str]:
        counters = module.counters()
        return Counter(HMMA=counters["mma"], LDSM=counters["ldmatrix"], LDGSTS=counters["cp_async"])

    def times(n: int, counts: Counter[str]) -> Counter[str]:
        return Counter({kind: n * count for kind, count in counts.items()})

    def tiles_of(length: int) -> int:
        return -(-problem.seqlen // length) * problem.batch

    tile = tiles("forward", config)
    rows, keys, warps, threads = tile["rows"], tile["keys"], tile["warps"], tile["threads"]
    step = resources.product(rows, keys, head_dim, warps, warps)
    step += resources.product(rows, head_dim, keys, warps, warps, a_in_registers=True)
    step += resources.load(2 * keys, head_dim, threads)
    expected = times(visible_tiles(problem, doc_start, rows, keys), step)
    expected += times(tiles_of(rows) * problem.heads, resources.load(rows, head_dim, threads))
    module.configure()
    out, lse = simt_kernels.forward(module, q, k, v, problem.group_size, doc_start, **options)
    assert counted() == times(warps, expected)

    tile = tiles("backward", config)
    rows, keys, warps, threads = tile["rows"], tile["keys"], tile["warps"], tile["threads"]
    scores = times(2, resources.product(rows, keys, head_dim, warps, tile["score_warps"]))
    dkv = times(2, resources.product(keys, head_dim, rows, warps, tile["dkv_warps"]))
    dq = resources.product(rows, head_dim, keys, warps, tile["dq_warps"])
    load_rows, load_keys = resources.load(2 * rows, head_dim, threads), resources.load(2 * keys, head_dim, threads)
    steps = visible_tiles(problem, doc_start, rows, keys)
    by_keys = times(steps, scores + dkv + load_rows) + times(seen_tiles(problem, doc_start, keys), load_keys)
    by_rows = times(steps, scores + dq + load_keys) + times(tiles_of(rows) * problem.heads, load_rows)
    statistics = Counter(LDGSTS=2 * rows // 32)  # lse and delta of a tile of rows, by as many warps as it takes
    by_keys, by_rows = times(warps, by_keys), times(warps, by_rows)
    by_keys += times(steps, statistics)
    by_rows += times(tiles_of(rows) * problem.heads, statistics)
    for deterministic, expected in ((False, by_keys + times(warps * steps, dq)), (True, by_keys + by_rows)):
        module.configure()
        options["deterministic"] = deterministic
        simt_kernels.backward(module, out, q, k, v, out, lse, problem.group_size, doc_start, **options)
        assert counted() == expected
