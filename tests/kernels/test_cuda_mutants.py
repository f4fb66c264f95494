"""Whether the tests of the emulated CUDA kernels can fail: each of these mistakes must be found by the one named.

Left-out barriers, commits and waits are the business of test_each_site_is_needed, which needs no other source.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cuda_mutants import Mutant, copy_sources, plant, run_tests

# The forward's tiles have more rows than keys, the backward's more keys than rows.
CONFIG = "fp16-128-163"

SHAPES, DOCUMENTS, COUNTS = "test_shapes", "test_documents", "test_no_instruction_more_than_needed"
GUARDS, LSE, GQA = "test_nothing_beside_the_tensors", "test_log_sum_exp", "GQA"
FAR, LARGE = "test_offsets_beyond_32_bits", "test_large_scores_stay_exact"
PATTERNS, BEGAN = "test_patterns", "test_documents_that_began_before_the_keys"
DLSE = "test_gradient_of_log_sum_exp"

# Of the sources.
KV_HEAD = "head / (problem.heads / problem.kv_heads)"
STATISTICS = "shared.statistics + i * Statistics::kSize"
BATCH, ROWS = "batch * view.batch_stride", "first_row * view.row_stride"
TILE = "cute::max(key - visible().offset, 0) / kRows"
SCORE, BELOW = "get<1>(where(m, n)) - j", "(get<0>(where(m, n)) - i)"
ROW, COLUMN = "get<0>(where(0, m, k))", "get<1>(where(0, m, k))"

MUTANTS = {
    # who sees whom
    "shift": Mutant("groups.h", "group_size / 2", "group_size / 2 + 1", SHAPES, "{} : 0;\n  const Int group ="),
    "window": Mutant("groups.h", "i - window + 1", "i - window", PATTERNS, "? group : {};"),
    "keys before the first": Mutant("groups.h", "first > 0 ? first : 0", "first", BEGAN),
    "ends of the window": Mutant("groups.h", "j + window", "j + window + 1", COUNTS, "? group : {};"),
    "sink counted twice": Mutant("groups.h", "doc_start < first_key", "doc_start <= first_key", PATTERNS),
    "groups from the row's start": Mutant(
        "groups.h", "i - doc_start + offset", "i + offset", DOCUMENTS, "group = ({})"
    ),
    "start of documents": Mutant("groups.h", "group > 0 ? group : 0", "group", DOCUMENTS),
    "ends of groups": Mutant("groups.h", "offset", "0", COUNTS, "+ 1) * group_size - {};"),
    "ends of groups from the row's start": Mutant(
        "groups.h", "i - doc_start + offset", "i + offset", DOCUMENTS, "return doc_start + (({})"
    ),
    "first shifted head": Mutant("cuda/mask.h", "head >= problem.first_shifted_head", "false", SHAPES),
    "documents of the batch": Mutant(
        "cuda/mask.h", "problem.doc_start + batch * problem.seqlen", "problem.doc_start", DOCUMENTS
    ),
    "doc_start unclamped": Mutant(
        "cuda/mask.h", "cute::max(+kFarthest, cute::min(doc_start[row], row + offset))", "doc_start[row]", GUARDS
    ),
    "left mask": Mutant("cuda/mask.h", f"{SCORE} < first", f"{SCORE} + 1 < first", SHAPES),
    "causal mask": Mutant("cuda/mask.h", f"{SCORE} - {BELOW} > own", f"{SCORE} - {BELOW} > own + 1", SHAPES),
    "causal mask of a thread's first row": Mutant("cuda/mask.h", f"{SCORE} - {BELOW} > own", f"{SCORE} > own", SHAPES),
    "causal mask of a warp's first row": Mutant("cuda/mask.h", "own_key + i - key - j", "own_key - key - j", SHAPES),
    "diagonal unmasked": Mutant("cuda/mask.h", "key + keys - 1 > own_key", "key > own_key", SHAPES),
    "another document's sink": Mutant("cuda/mask.h", "d", "0", PATTERNS, "sees_sink_of(row, d) ? {} : -1"),
    "left border unmasked": Mutant("cuda/mask.h", "key < highest", "key < lowest", SHAPES),
    # what the host asks for
    "shared memory not asked for": Mutant("cuda/device.h", "bytes <= kAlwaysAllowed", "true", SHAPES),
    # which tiles
    "tile without a block": Mutant("cuda/scheduler.h", "tiles_per_group / 2", "0", SHAPES, "? {} : 0)"),
    "last section": Mutant(
        "cuda/scheduler.h", "block >= schedule.in_sections * schedule.tiles_per_group", "false", SHAPES
    ),
    "tile past the last": Mutant("cuda/scheduler.h", "turn.tile >= schedule.tiles", "false", COUNTS),
    "forward: first tile of keys": Mutant("cuda/mainloop_fwd.h", "rows.lowest", "(rows.lowest + kKeys)", SHAPES),
    "forward: keys that none sees": Mutant("cuda/mainloop_fwd.h", "rows.lowest", "0", COUNTS),
    "forward: last tile of keys": Mutant(
        "cuda/mainloop_fwd.h", "cute::min(rows.own_key + kRows, seqlen_k) - 1", "rows.own_key", SHAPES
    ),
    "backward: first tile of rows": Mutant("cuda/mainloop_bwd.h", TILE, f"{TILE} + 1", SHAPES),
    "backward: rows that see none": Mutant("cuda/mainloop_bwd.h", TILE, "0", COUNTS),
    "backward: keys before the rows": Mutant("cuda/mainloop_bwd.h", TILE, "key / kRows", PATTERNS),
    "backward: last tile of rows": Mutant("cuda/mainloop_bwd.h", "row < last_end", "row + 1 < last_end", SHAPES),
    "backward: rows past the group": Mutant("cuda/mainloop_bwd.h", "row < last_end", "row < visible().seqlen", COUNTS),
    "backward: last document": Mutant(
        "cuda/mainloop_bwd.h", "visible().document(row) <= last_key", "visible().document(row) <= key", DOCUMENTS
    ),
    "backward: rows of later documents": Mutant(
        "cuda/mainloop_bwd.h", "visible().document(row) <= last_key", "true", COUNTS
    ),
    "forward: diagonal unmasked": Mutant("cuda/mainloop_fwd.h", "rows.masks_last(n * kKeys, kKeys)", "false", SHAPES),
    "forward: group's border unmasked": Mutant("cuda/mainloop_fwd.h", "rows.masks_first(n * kKeys)", "false", SHAPES),
    "forward: buffer of keys": Mutant("cuda/mainloop_fwd.h", "n % kKeyBuffers", "0", SHAPES),
    "forward: second tile of keys": Mutant(
        "cuda/mainloop_fwd.h", "last_tile > first_tile", "false", SHAPES, "kKeyBuffers == 2 && {}"
    ),
    "forward: tiles of keys before the first": Mutant(
        "cuda/mainloop_fwd.h", "n - kKeyBuffers >= first_tile", "n > first_tile", COUNTS
    ),
    "backward: first keys not there": Mutant(
        "cuda/mainloop_bwd.h", "masks_first", "false", SHAPES, "if ({}) first_keys"
    ),
    "backward: first keys of other rows": Mutant(
        "cuda/mainloop_bwd.h", "walk.tile * kRows", "0", SHAPES, "fill<kThreads>(walk.visible(), {}, thread)"
    ),
    "backward: first keys without a mask": Mutant(
        "cuda/mainloop_bwd.h", "masks_first", "false", SHAPES, "if ({}) mask_earlier_keys"
    ),
    "backward: diagonal unmasked": Mutant("cuda/mainloop_bwd.h", "key + kKeys - 1 > own_key", "key > own_key", SHAPES),
    "backward: group's border unmasked": Mutant("cuda/mainloop_bwd.h", "last_row >= first_end", "false", SHAPES),
    "backward: first row past the group unmasked": Mutant(
        "cuda/mainloop_bwd.h", "last_row >= first_end", "last_row > first_end", SHAPES
    ),
    "backward: document's border unmasked": Mutant(
        "cuda/mainloop_bwd.h", "visible().document(last_row) > key", "false", DOCUMENTS
    ),
    "dq: first tile of keys": Mutant("cuda/bwd_dq.h", "rows.lowest", "(rows.lowest + kKeys)", SHAPES),
    "dq: last tile of keys": Mutant(
        "cuda/bwd_dq.h", "cute::min(rows.own_key + kRows, seqlen_k) - 1", "rows.own_key - 1", SHAPES
    ),
    "dq: diagonal unmasked": Mutant("cuda/bwd_dq.h", "rows.masks_last(n * kKeys, kKeys)", "false", SHAPES),
    "dq: group's border unmasked": Mutant("cuda/bwd_dq.h", "rows.masks_first(n * kKeys)", "false", SHAPES),
    "stage": Mutant("cuda/mainloop_bwd.h", "index() ^ 1", "index()", SHAPES),
    # GQA
    "forward: KV head": Mutant("cuda/mainloop_fwd.h", KV_HEAD, "head % problem.kv_heads", GQA),
    "backward: KV head": Mutant("cuda/mainloop_bwd.h", "kv_head * heads_per_kv", "kv_head", GQA),
    "backward: heads without rows for the first keys": Mutant(
        "cuda/mainloop_bwd.h", "!sees()", "false", COUNTS, "if ({}) begin(first_shifted)"
    ),
    "backward: heads without rows for the last keys": Mutant(
        "cuda/mainloop_bwd.h", "sees()", "true", COUNTS, "last_head = {}"
    ),
    "backward: which heads are shifted": Mutant(
        "cuda/mainloop_bwd.h", "static_cast<int>(problem.first_shifted_head)", "first", COUNTS
    ),
    "backward: heads that share": Mutant("cuda/mainloop_bwd.h", "first + heads_per_kv", "first + 1", GQA),
    "dq: KV head": Mutant("cuda/bwd_dq.h", KV_HEAD, "head % problem.kv_heads", GQA),
    # sums
    "log-sum-exp for delta": Mutant("cuda/bwd_tiles.h", "thread < kRows", "true", SHAPES),
    "statistics of the other stage": Mutant("cuda/mainloop_bwd.h", STATISTICS, "shared.statistics", SHAPES),
    "maximum forgotten": Mutant("cuda/softmax.h", "maximum[m]", "-INFINITY", SHAPES, "float highest = {};"),
    "maximum of two lanes": Mutant("cuda/softmax.h", "shuffle_xor(x, 2)", "x", SHAPES, "fmaxf(x, {})"),
    "sum of two lanes": Mutant("cuda/softmax.h", "shuffle_xor(x, 2)", "x", SHAPES, "return x + {}"),
    "nothing seen yet": Mutant("cuda/softmax.h", "highest == -INFINITY", "false", SHAPES),
    "out not rescaled": Mutant("cuda/softmax.h", "out(m, n) *= shrink", "out(m, n)", SHAPES, "{};\n      maximum[m]"),
    "sum not rescaled": Mutant("cuda/softmax.h", "sum[m] *= shrink", "sum[m]", SHAPES),
    "scale 0": Mutant("cuda/softmax.h", "std::numeric_limits<float>::min()", "0.0f", SHAPES),
    "log-sum-exp": Mutant("cuda/softmax.h", "maximum[m] * scale_log2 * kLn2", "maximum[m] * scale_log2", LSE),
    "delta": Mutant("cuda/bwd_tiles.h", "dweights(m, n) - delta", "dweights(m, n)", SHAPES),
    "delta of four lanes": Mutant("cuda/softmax.h", "shuffle_xor(x, 4)", "0", SHAPES),
    "gradient of log-sum-exp": Mutant("cuda/bwd_pre_post.h", "params.dlse", "nullptr", DLSE, "if ({} && i"),
    # the sink
    "forward: no sink": Mutant("cuda/mainloop_fwd.h", "problem.sink", "false", PATTERNS),
    "forward: sink missing in the sum": Mutant("cuda/sink.h", "thread % 4 == 0", "false", LSE),
    "forward: sink in the sum four times": Mutant("cuda/sink.h", "thread % 4 == 0", "true", LSE),
    "forward: document without its sink": Mutant(
        "cuda/sink.h", "sees_sink(first_keys(i), document)", "document >= 0", PATTERNS
    ),
    "forward: sink's key of another document": Mutant(
        "cuda/sink.h",
        "d",
        "0 * d",
        PATTERNS,
        "kv_head, cute::max({}, 0));\n    const Element* v = row_of<Element>(params.v",
    ),
    "forward: sink's value of another document": Mutant(
        "cuda/sink.h", "d", "0 * d", PATTERNS, "(params.v, batch, kv_head, cute::max({}, 0)"
    ),
    "forward: sink's KV head": Mutant(
        "cuda/sink.h", "head / (params.problem.heads / params.problem.kv_heads)", "0", PATTERNS
    ),
    "forward: sink's pieces": Mutant("cuda/sink.h", "column < columns", "true", GUARDS, "Piece(k[column], {})"),
    "forward: sink's maximum": Mutant("cuda/softmax.h", "fmaxf(maximum[m], score)", "maximum[m]", LARGE),
    "forward: out not rescaled to the sink": Mutant(
        "cuda/softmax.h", "out(m, n) *= shrink", "out(m, n)", PATTERNS, "{};\n    maximum[m] = highest;\n    return"
    ),
    "forward: sum not rescaled to the sink": Mutant("cuda/softmax.h", "sum[m] * shrink", "sum[m]", PATTERNS),
    "backward: weight of the sink": Mutant("cuda/bwd_pre_post.h", "lse_log2", "0", PATTERNS, "problem) - {})"),
    "backward: delta of the sink": Mutant("cuda/bwd_pre_post.h", "dweight - delta", "dweight", PATTERNS),
    "backward: sink of the batch": Mutant("cuda/rows.h", "batch * view.batch_stride", "0", PATTERNS),
    "backward: sink's key of another document": Mutant(
        "cuda/bwd_pre_post.h", "d", "0 * d", PATTERNS, "(params.k, batch, kv_head, cute::max({}, 0)"
    ),
    "backward: sink's value of another document": Mutant(
        "cuda/bwd_pre_post.h", "d", "0 * d", PATTERNS, "(params.v, batch, kv_head, cute::max({}, 0)"
    ),
    "backward: sink's KV head": Mutant("cuda/bwd_pre_post.h", KV_HEAD, "0", PATTERNS),
    "dq: sink missing": Mutant("cuda/sink.h", "d < 0", "true", PATTERNS, "if ({} || row + i"),
    "dq: sink's key of another document": Mutant(
        "cuda/sink.h", "d", "0 * d", PATTERNS, "row_of<Element>(params.k, batch, kv_head, {});"
    ),
    "dq: sink's KV head": Mutant("cuda/sink.h", KV_HEAD, "0", PATTERNS),
    "dq: no sink where deterministic": Mutant("cuda/bwd_dq.h", "problem.sink", "false", PATTERNS),
    "dk: sink missing": Mutant("cuda/sink_gradients.h", "end == 0", "true", PATTERNS),
    "dk: rows of the sink's own tile twice": Mutant(
        "cuda/bwd_pre_post.h", "d >= row + visible.offset", "false", PATTERNS
    ),
    "dk: sink's sums of two rows": Mutant("cuda/bwd_pre_post.h", "shuffle_xor(of_values ? dk : dv, 16)", "0", PATTERNS),
    "dk: sink's sums of other two rows": Mutant(
        "cuda/bwd_pre_post.h", "shuffle_xor(last_half ? half[x] : half[x + 4], 8)", "0", PATTERNS
    ),
    "dk: sink's sums of one warp": Mutant("cuda/bwd_pre_post.h", "thread / 32", "0", PATTERNS, "shared.parts[{}]"),
    "dk: sink's sums not added up": Mutant(
        "cuda/sink_gradients.h", "sums[x] += values[x]", "sums[x] = values[x]", PATTERNS
    ),
    "dk: first tile twice": Mutant("cuda/sink_gradients.h", "own_row / kRows + 1", "own_row / kRows", PATTERNS),
    "dk: last tile": Mutant("cuda/sink_gradients.h", "tile <= last_tile", "tile < last_tile", PATTERNS),
    "dk: sinks of one head": Mutant(
        "cuda/sink_gradients.h", "(kv_head + 1) * heads_per_kv", "kv_head * heads_per_kv + 1", PATTERNS
    ),
    "dk: sinks of the next heads": Mutant(
        "cuda/sink_gradients.h", "kv_head * heads_per_kv", "kv_head", PATTERNS, "int head = {};"
    ),
    "dk: sink that only unshifted heads see": Mutant(
        "cuda/sink_gradients.h", "!last_head.sees_sink_of(end - 1, d)", "true", PATTERNS
    ),
    "dk: rows of later documents": Mutant("cuda/sink_gradients.h", "visible.document(row) > d", "false", PATTERNS),
    "dk: rows that see it in their group": Mutant(
        "cuda/sink_gradients.h", "visible.sees_sink_of(row, d)", "true", PATTERNS
    ),
    "dk: scale of the sink": Mutant("cuda/sink_gradients.h", "static_cast<float>(problem.scale)", "1.0f", PATTERNS),
    "scale of dk": Mutant("cuda/mainloop_bwd.h", "scale_by(dk, static_cast<float>(problem.scale))", "void()", SHAPES),
    "scale of dq by atomics": Mutant("cuda/bwd_pre_post.h", "static_cast<float>(problem.scale)", "1", SHAPES),
    "scale of dq": Mutant("cuda/bwd_dq.h", "scale_by(dq, static_cast<float>(problem.scale))", "void()", SHAPES),
    "dq's sums not begun": Mutant(
        "cuda/bwd_pre_post.h", "dq(i)", "dq_sums[i * kThreads]", SHAPES, "dq_sums[i * kThreads] = {}"
    ),
    # bounds
    "rows loaded": Mutant("cuda/copy.h", f"{ROW} < rows", f"{ROW} <= rows", GUARDS, "bool inside = {}"),
    "columns loaded": Mutant("cuda/copy.h", f"{COLUMN} < columns", f"{COLUMN} <= columns", GUARDS, "{};"),
    "rows stored": Mutant("cuda/copy.h", f"{ROW} < rows", f"{ROW} <= rows", GUARDS, "if ({}"),
    "columns stored": Mutant("cuda/copy.h", f"{COLUMN} < columns", f"{COLUMN} <= columns", GUARDS, "{})"),
    "log-sum-exp past the end": Mutant("cuda/mainloop_fwd.h", "i < rows", "i <= rows", GUARDS),
    "delta past the end": Mutant("cuda/bwd_pre_post.h", "i < rows", "true", GUARDS, "thread % 8 == 0 && {}"),
    "batch in 32 bits": Mutant("cuda/copy.h", BATCH, f"static_cast<int>({BATCH})", FAR),
    "rows in 32 bits": Mutant("cuda/copy.h", ROWS, f"static_cast<int>({ROWS})", FAR),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_sources(tmp_path_factory.mktemp("mutants") / "tree")
    plant(tree / "csrc", MUTANTS)
    return tree


def test_each_mutant_has_its_place_and_its_test(tree: Path) -> None:
    """Nothing is compiled: what a change of the sources or the tests has moved shows within seconds."""
    found = run_tests(tree, CONFIG, 0, "--collect-only").stdout
    for mutant in MUTANTS.values():
        test = rf"test_cuda_emulated_\w+.py::(?=.*{mutant.found_by}).*{CONFIG}"
        assert re.search(test, found), mutant.found_by + found


@pytest.mark.full
def test_no_mutant_no_failure(tree: Path) -> None:
    tests = {mutant.found_by for mutant in MUTANTS.values()}
    result = run_tests(tree, f"{CONFIG} and ({' or '.join(tests)})")
    assert result.returncode == 0, result.stdout


@pytest.mark.full
@pytest.mark.parametrize("number, name", list(enumerate(MUTANTS, 1)))
def test_mutants_are_found(tree: Path, number: int, name: str) -> None:
    test = MUTANTS[name].found_by
    result = run_tests(tree, f"{CONFIG} and {test}", number)
    failed = re.search(rf"FAILED tests/kernels/test_cuda_emulated_\w+.py::.*{test}", result.stdout)
    crashed = re.search(rf"Fatal Python error: [\s\S]* in {test}", result.stderr)
    assert failed or crashed, result.stdout + result.stderr


@pytest.mark.full
def test_other_swizzle_is_found(tmp_path: Path) -> None:
    """By its bank conflicts: results stay right."""
    tree = copy_sources(tmp_path / "tree")
    layouts = tree / "csrc" / "cuda" / "layouts.h"
    text = layouts.read_text()
    assert text.count("Swizzle<3, 3, 3>") == 1
    layouts.write_text(text.replace("Swizzle<3, 3, 3>", "Swizzle<2, 3, 3>"))
    result = run_tests(tree, f"{CONFIG} and {SHAPES}")
    assert "FAILED tests/kernels/test_cuda_emulated_numerics.py" in result.stdout
    assert "AssertionError: bank conflicts" in result.stdout, result.stdout
