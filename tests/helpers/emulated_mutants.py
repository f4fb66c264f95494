"""Mistakes in the CUDA kernels that the tests of the emulated kernels must find, each with the case that does."""

from __future__ import annotations

from cuda_mutants import Mutant

# The forward's tiles have more rows than keys, the backward's more keys than rows.
CONFIG = "fp16-128-163"

# Of the cases that find a mistake the shortest, without the kernel's name.
A_TOKEN = "test_shapes[a token-atomic]"
A_TOKEN_DQ = "test_shapes[a token-deterministic]"
PAIRS = "test_shapes[groups of two-atomic]"
PAIRS_DQ = "test_shapes[groups of two-deterministic]"
NO_SCORES = "test_shapes[no scores-atomic]"
NO_SCORES_DQ = "test_shapes[no scores-deterministic]"
BEYOND = "test_shapes[group beyond the end-atomic]"
PAST_GROUP = "test_shapes[a row past a group-atomic]"
GQA = "test_shapes[GQA, mixed-atomic]"
GQA_DQ = "test_shapes[GQA, mixed-deterministic]"
DOCUMENTS = "test_documents[20-atomic]"
LONG_GROUPS = "test_documents[600-atomic]"
COUNTS = "test_no_instruction_more_than_needed[groups-documents]"
COUNTS_WINDOW = "test_no_instruction_more_than_needed[window-whole]"
COUNTS_LAST = "test_no_instruction_more_than_needed[last, whose unshifted groups begin first-documents]"
COUNTS_LAST_WHOLE = "test_no_instruction_more_than_needed[last, whose unshifted groups begin first-whole]"
A_KEY = "test_patterns[a key-whole-atomic]"
A_KEY_PACKED = "test_patterns[a key-packed-atomic]"
LAST_QUERY = "test_patterns[last query-whole-deterministic]"
LAST_QUERY_PACKED = "test_patterns[last query-packed-atomic]"
SINKS = "test_patterns[sink, scale, batch-whole-atomic]"
SINKS_PACKED = "test_patterns[sink, scale, batch-packed-atomic]"
SINKS_OF_HEADS = "test_patterns[window within groups-whole-atomic]"
LAST_QUERIES = "test_patterns[last queries, window-packed-atomic]"
BEGAN = "test_documents_that_began_before_the_keys[-200-400]"
GUARDS = "test_nothing_beside_the_tensors"
LSE = "test_log_sum_exp"
DLSE = "test_gradient_of_log_sum_exp[atomic]"
LARGE = "test_large_scores_stay_exact[sink]"
FAR_BATCH = "test_offsets_beyond_32_bits[batch]"
FAR_ROWS = "test_offsets_beyond_32_bits[rows]"

# Of the sources.
KV_HEAD = "head / (problem.heads / problem.kv_heads)"
STATISTICS = "shared.statistics + i * Statistics::kSize"
BATCH, ROWS = "batch * view.batch_stride", "first_row * view.row_stride"
TILE = "cute::max(key - visible().offset, 0) / kRows"
SCORE, BELOW = "get<1>(where(m, n)) - j", "(get<0>(where(m, n)) - i)"
ROW, COLUMN = "get<0>(where(0, m, k))", "get<1>(where(0, m, k))"

MUTANTS = {
    # who sees whom
    "shift": Mutant("groups.h", "group_size / 2", "group_size / 2 + 1", NO_SCORES, "{} : 0;\n  const Int group ="),
    "window": Mutant("groups.h", "i - window + 1", "i - window", A_KEY, "? group : {};"),
    "keys before the first": Mutant("groups.h", "first > 0 ? first : 0", "first", BEGAN),
    "ends of the window": Mutant("groups.h", "j + window", "j + window + 1", COUNTS_WINDOW, "? group : {};"),
    "sink counted twice": Mutant("groups.h", "doc_start < first_key", "doc_start <= first_key", SINKS),
    "groups from the row's start": Mutant(
        "groups.h", "i - doc_start + offset", "i + offset", DOCUMENTS, "group = ({})"
    ),
    "start of documents": Mutant("groups.h", "group > 0 ? group : 0", "group", DOCUMENTS),
    "ends of groups": Mutant("groups.h", "offset", "0", COUNTS_WINDOW, "+ 1) * group_size - {};"),
    "ends of groups from the row's start": Mutant(
        "groups.h", "i - doc_start + offset", "i + offset", DOCUMENTS, "return doc_start + (({})"
    ),
    "first shifted head": Mutant("cuda/mask.h", "head >= problem.first_shifted_head", "false", NO_SCORES),
    "documents of the batch": Mutant(
        "cuda/mask.h", "problem.doc_start + batch * problem.seqlen", "problem.doc_start", DOCUMENTS
    ),
    "doc_start unclamped": Mutant(
        "cuda/mask.h", "cute::max(+kFarthest, cute::min(doc_start[row], row + offset))", "doc_start[row]", GUARDS
    ),
    "left mask": Mutant("cuda/mask.h", f"{SCORE} < first", f"{SCORE} + 1 < first", NO_SCORES),
    "causal mask": Mutant("cuda/mask.h", f"{SCORE} - {BELOW} > own", f"{SCORE} - {BELOW} > own + 1", A_TOKEN),
    "causal mask of a thread's first row": Mutant(
        "cuda/mask.h", f"{SCORE} - {BELOW} > own", f"{SCORE} > own", NO_SCORES
    ),
    "causal mask of a warp's first row": Mutant("cuda/mask.h", "own_key + i - key - j", "own_key - key - j", NO_SCORES),
    "diagonal unmasked": Mutant("cuda/mask.h", "key + keys - 1 > own_key", "key > own_key", A_TOKEN),
    "another document's sink": Mutant("cuda/mask.h", "d", "0", A_KEY_PACKED, "sees_sink_of(row, d) ? {} : -1"),
    "left border unmasked": Mutant("cuda/mask.h", "key < highest", "key < lowest", NO_SCORES),
    # what the host asks for
    "shared memory not asked for": Mutant("cuda/device.h", "bytes <= kAlwaysAllowed", "true", A_TOKEN),
    # which tiles
    "tile without a block": Mutant("cuda/scheduler.h", "tiles_per_group / 2", "0", BEYOND, "? {} : 0)"),
    "last section": Mutant(
        "cuda/scheduler.h", "block >= schedule.in_sections * schedule.tiles_per_group", "false", PAST_GROUP
    ),
    "tile past the last": Mutant("cuda/scheduler.h", "turn.tile >= schedule.tiles", "false", COUNTS),
    "forward: first tile of keys": Mutant("cuda/mainloop_fwd.h", "rows.lowest", "(rows.lowest + kKeys)", A_TOKEN),
    "forward: keys that none sees": Mutant("cuda/mainloop_fwd.h", "rows.lowest", "0", COUNTS),
    "forward: last tile of keys": Mutant(
        "cuda/mainloop_fwd.h", "cute::min(rows.own_key + kRows, seqlen_k) - 1", "rows.own_key", NO_SCORES
    ),
    "backward: first tile of rows": Mutant("cuda/mainloop_bwd.h", TILE, f"{TILE} + 1", A_TOKEN),
    "backward: rows that see none": Mutant("cuda/mainloop_bwd.h", TILE, "0", COUNTS),
    "backward: keys before the rows": Mutant("cuda/mainloop_bwd.h", TILE, "key / kRows", LAST_QUERY_PACKED),
    "backward: last tile of rows": Mutant("cuda/mainloop_bwd.h", "row < last_end", "row + 1 < last_end", A_TOKEN),
    "backward: rows past the group": Mutant(
        "cuda/mainloop_bwd.h", "row < last_end", "row < visible().seqlen", COUNTS_WINDOW
    ),
    "backward: last document": Mutant(
        "cuda/mainloop_bwd.h", "visible().document(row) <= last_key", "visible().document(row) <= key", DOCUMENTS
    ),
    "backward: rows of later documents": Mutant(
        "cuda/mainloop_bwd.h", "visible().document(row) <= last_key", "true", COUNTS
    ),
    "forward: diagonal unmasked": Mutant("cuda/mainloop_fwd.h", "rows.masks_last(n * kKeys, kKeys)", "false", A_TOKEN),
    "forward: group's border unmasked": Mutant(
        "cuda/mainloop_fwd.h", "rows.masks_first(n * kKeys)", "false", NO_SCORES
    ),
    "forward: buffer of keys": Mutant("cuda/mainloop_fwd.h", "n % kKeyBuffers", "0", NO_SCORES),
    "forward: second tile of keys": Mutant(
        "cuda/mainloop_fwd.h", "last_tile > first_tile", "false", NO_SCORES, "kKeyBuffers == 2 && {}"
    ),
    "forward: tiles of keys before the first": Mutant(
        "cuda/mainloop_fwd.h", "n - kKeyBuffers >= first_tile", "n > first_tile", COUNTS
    ),
    "backward: first keys not there": Mutant(
        "cuda/mainloop_bwd.h", "masks_first", "false", NO_SCORES, "if ({}) first_keys"
    ),
    "backward: first keys of other rows": Mutant(
        "cuda/mainloop_bwd.h", "walk.tile * kRows", "0", NO_SCORES, "fill<kThreads>(walk.visible(), {}, thread)"
    ),
    "backward: first keys without a mask": Mutant(
        "cuda/mainloop_bwd.h", "masks_first", "false", NO_SCORES, "if ({}) mask_earlier_keys"
    ),
    "backward: diagonal unmasked": Mutant(
        "cuda/mainloop_bwd.h", "key + kKeys - 1 > own_key", "key > own_key", NO_SCORES
    ),
    "backward: group's border unmasked": Mutant("cuda/mainloop_bwd.h", "last_row >= first_end", "false", NO_SCORES),
    "backward: first row past the group unmasked": Mutant(
        "cuda/mainloop_bwd.h", "last_row >= first_end", "last_row > first_end", PAST_GROUP
    ),
    "backward: document's border unmasked": Mutant(
        "cuda/mainloop_bwd.h", "visible().document(last_row) > key", "false", LONG_GROUPS
    ),
    "dq: first tile of keys": Mutant("cuda/bwd_dq.h", "rows.lowest", "(rows.lowest + kKeys)", A_TOKEN_DQ),
    "dq: last tile of keys": Mutant(
        "cuda/bwd_dq.h", "cute::min(rows.own_key + kRows, seqlen_k) - 1", "rows.own_key - 1", PAIRS_DQ
    ),
    "dq: diagonal unmasked": Mutant("cuda/bwd_dq.h", "rows.masks_last(n * kKeys, kKeys)", "false", PAIRS_DQ),
    "dq: group's border unmasked": Mutant("cuda/bwd_dq.h", "rows.masks_first(n * kKeys)", "false", PAIRS_DQ),
    "stage": Mutant("cuda/mainloop_bwd.h", "index() ^ 1", "index()", A_TOKEN),
    # GQA
    "forward: KV head": Mutant("cuda/mainloop_fwd.h", KV_HEAD, "head % problem.kv_heads", GQA),
    "backward: KV head": Mutant("cuda/mainloop_bwd.h", "kv_head * heads_per_kv", "kv_head", GQA),
    "backward: heads without rows for the first keys": Mutant(
        "cuda/mainloop_bwd.h", "!sees()", "false", COUNTS_LAST, "if ({}) begin(first_shifted)"
    ),
    "backward: heads without rows for the last keys": Mutant(
        "cuda/mainloop_bwd.h", "sees()", "true", COUNTS_LAST, "last_head = {}"
    ),
    "backward: which heads are shifted": Mutant(
        "cuda/mainloop_bwd.h", "static_cast<int>(problem.first_shifted_head)", "first", COUNTS_LAST_WHOLE
    ),
    "backward: heads that share": Mutant("cuda/mainloop_bwd.h", "first + heads_per_kv", "first + 1", GQA),
    "dq: KV head": Mutant("cuda/bwd_dq.h", KV_HEAD, "head % problem.kv_heads", GQA_DQ),
    # sums
    "log-sum-exp for delta": Mutant("cuda/bwd_tiles.h", "thread < kRows", "true", A_TOKEN),
    "statistics of the other stage": Mutant("cuda/mainloop_bwd.h", STATISTICS, "shared.statistics", A_TOKEN),
    "maximum forgotten": Mutant("cuda/softmax.h", "maximum[m]", "-INFINITY", NO_SCORES, "float highest = {};"),
    "maximum of two lanes": Mutant("cuda/softmax.h", "shuffle_xor(x, 2)", "x", NO_SCORES, "fmaxf(x, {})"),
    "sum of two lanes": Mutant("cuda/softmax.h", "shuffle_xor(x, 2)", "x", A_TOKEN, "return x + {}"),
    "nothing seen yet": Mutant("cuda/softmax.h", "highest == -INFINITY", "false", NO_SCORES),
    "out not rescaled": Mutant("cuda/softmax.h", "out(m, n) *= shrink", "out(m, n)", PAIRS, "{};\n      maximum[m]"),
    "sum not rescaled": Mutant("cuda/softmax.h", "sum[m] *= shrink", "sum[m]", PAIRS),
    "scale 0": Mutant("cuda/softmax.h", "std::numeric_limits<float>::min()", "0.0f", NO_SCORES),
    "log-sum-exp": Mutant("cuda/softmax.h", "maximum[m] * scale_log2 * kLn2", "maximum[m] * scale_log2", LSE),
    "delta": Mutant("cuda/bwd_tiles.h", "dweights(m, n) - delta", "dweights(m, n)", A_TOKEN),
    "delta of four lanes": Mutant("cuda/softmax.h", "shuffle_xor(x, 4)", "0", A_TOKEN),
    "gradient of log-sum-exp": Mutant("cuda/bwd_pre_post.h", "params.dlse", "nullptr", DLSE, "if ({} && i"),
    # the sink
    "forward: no sink": Mutant("cuda/mainloop_fwd.h", "problem.sink", "false", LAST_QUERY),
    "forward: sink missing in the sum": Mutant("cuda/sink.h", "thread % 4 == 0", "false", LSE),
    "forward: sink in the sum four times": Mutant("cuda/sink.h", "thread % 4 == 0", "true", LSE),
    "forward: document without its sink": Mutant(
        "cuda/sink.h", "sees_sink(first_keys(i), document)", "document >= 0", LAST_QUERY_PACKED
    ),
    "forward: sink's key of another document": Mutant(
        "cuda/sink.h",
        "d",
        "0 * d",
        A_KEY_PACKED,
        "kv_head, cute::max({}, 0));\n    const Element* v = row_of<Element>(params.v",
    ),
    "forward: sink's value of another document": Mutant(
        "cuda/sink.h", "d", "0 * d", A_KEY_PACKED, "(params.v, batch, kv_head, cute::max({}, 0)"
    ),
    "forward: sink's KV head": Mutant(
        "cuda/sink.h", "head / (params.problem.heads / params.problem.kv_heads)", "0", SINKS_OF_HEADS
    ),
    "forward: sink's pieces": Mutant("cuda/sink.h", "column < columns", "true", GUARDS, "Piece(k[column], {})"),
    "forward: sink's maximum": Mutant("cuda/softmax.h", "fmaxf(maximum[m], score)", "maximum[m]", LARGE),
    "forward: out not rescaled to the sink": Mutant(
        "cuda/softmax.h", "out(m, n) *= shrink", "out(m, n)", A_KEY, "{};\n    maximum[m] = highest;\n    return"
    ),
    "forward: sum not rescaled to the sink": Mutant("cuda/softmax.h", "sum[m] * shrink", "sum[m]", A_KEY),
    "backward: weight of the sink": Mutant("cuda/bwd_pre_post.h", "lse_log2", "0", LAST_QUERY, "problem) - {})"),
    "backward: delta of the sink": Mutant("cuda/bwd_pre_post.h", "dweight - delta", "dweight", LAST_QUERY),
    "backward: sink of the batch": Mutant("cuda/rows.h", "batch * view.batch_stride", "0", SINKS),
    "backward: sink's key of another document": Mutant(
        "cuda/bwd_pre_post.h", "d", "0 * d", A_KEY_PACKED, "(params.k, batch, kv_head, cute::max({}, 0)"
    ),
    "backward: sink's value of another document": Mutant(
        "cuda/bwd_pre_post.h", "d", "0 * d", A_KEY_PACKED, "(params.v, batch, kv_head, cute::max({}, 0)"
    ),
    "backward: sink's KV head": Mutant("cuda/bwd_pre_post.h", KV_HEAD, "0", SINKS_OF_HEADS),
    "dq: sink missing": Mutant("cuda/sink.h", "d < 0", "true", LAST_QUERY, "if ({} || row + i"),
    "dq: sink's key of another document": Mutant(
        "cuda/sink.h", "d", "0 * d", A_KEY_PACKED, "row_of<Element>(params.k, batch, kv_head, {});"
    ),
    "dq: sink's KV head": Mutant("cuda/sink.h", KV_HEAD, "0", SINKS_OF_HEADS),
    "dq: no sink where deterministic": Mutant("cuda/bwd_dq.h", "problem.sink", "false", LAST_QUERY),
    "dk: sink missing": Mutant("cuda/sink_gradients.h", "end == 0", "true", LAST_QUERY),
    "dk: rows of the sink's own tile twice": Mutant(
        "cuda/bwd_pre_post.h", "d >= row + visible.offset", "false", A_KEY_PACKED
    ),
    "dk: sink's sums of two rows": Mutant(
        "cuda/bwd_pre_post.h", "shuffle_xor(of_values ? dk : dv, 16)", "0", LAST_QUERY
    ),
    "dk: sink's sums of other two rows": Mutant(
        "cuda/bwd_pre_post.h", "shuffle_xor(last_half ? half[x] : half[x + 4], 8)", "0", LAST_QUERY
    ),
    "dk: sink's sums of one warp": Mutant(
        "cuda/bwd_pre_post.h", "thread / 32", "0", LAST_QUERY_PACKED, "shared.parts[{}]"
    ),
    "dk: sink's sums not added up": Mutant(
        "cuda/sink_gradients.h", "sums[x] += values[x]", "sums[x] = values[x]", LAST_QUERY
    ),
    "dk: first tile twice": Mutant("cuda/sink_gradients.h", "own_row / kRows + 1", "own_row / kRows", A_KEY),
    "dk: last tile": Mutant("cuda/sink_gradients.h", "tile <= last_tile", "tile < last_tile", LAST_QUERY),
    "dk: sinks of one head": Mutant(
        "cuda/sink_gradients.h", "(kv_head + 1) * heads_per_kv", "kv_head * heads_per_kv + 1", LAST_QUERY
    ),
    "dk: sinks of the next heads": Mutant(
        "cuda/sink_gradients.h", "kv_head * heads_per_kv", "kv_head", LAST_QUERIES, "int head = {};"
    ),
    "dk: sink that only unshifted heads see": Mutant(
        "cuda/sink_gradients.h", "!last_head.sees_sink_of(end - 1, d)", "true", SINKS_PACKED
    ),
    "dk: rows of later documents": Mutant("cuda/sink_gradients.h", "visible.document(row) > d", "false", A_KEY_PACKED),
    "dk: rows that see it in their group": Mutant(
        "cuda/sink_gradients.h", "visible.sees_sink_of(row, d)", "true", A_KEY
    ),
    "dk: scale of the sink": Mutant("cuda/sink_gradients.h", "static_cast<float>(problem.scale)", "1.0f", LAST_QUERY),
    "scale of dk": Mutant(
        "cuda/mainloop_bwd.h", "scale_by(dk, static_cast<float>(problem.scale))", "void()", NO_SCORES
    ),
    "scale of dq by atomics": Mutant("cuda/bwd_pre_post.h", "static_cast<float>(problem.scale)", "1", NO_SCORES),
    "scale of dq": Mutant("cuda/bwd_dq.h", "scale_by(dq, static_cast<float>(problem.scale))", "void()", NO_SCORES_DQ),
    "dq's sums not begun": Mutant(
        "cuda/bwd_pre_post.h", "dq(i)", "dq_sums[i * kThreads]", A_TOKEN, "dq_sums[i * kThreads] = {}"
    ),
    # bounds
    "rows loaded": Mutant("cuda/copy.h", f"{ROW} < rows", f"{ROW} <= rows", GUARDS, "bool inside = {}"),
    "columns loaded": Mutant("cuda/copy.h", f"{COLUMN} < columns", f"{COLUMN} <= columns", GUARDS, "{};"),
    "rows stored": Mutant("cuda/copy.h", f"{ROW} < rows", f"{ROW} <= rows", GUARDS, "if ({}"),
    "columns stored": Mutant("cuda/copy.h", f"{COLUMN} < columns", f"{COLUMN} <= columns", GUARDS, "{})"),
    "log-sum-exp past the end": Mutant("cuda/mainloop_fwd.h", "i < rows", "i <= rows", GUARDS),
    "delta past the end": Mutant("cuda/bwd_pre_post.h", "i < rows", "true", GUARDS, "thread % 8 == 0 && {}"),
    "batch in 32 bits": Mutant("cuda/copy.h", BATCH, f"static_cast<int>({BATCH})", FAR_BATCH),
    "rows in 32 bits": Mutant("cuda/copy.h", ROWS, f"static_cast<int>({ROWS})", FAR_ROWS),
}
