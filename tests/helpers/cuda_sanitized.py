"""Run the emulated kernels of fp16 and head dim 64 in a process under a sanitizer: `cuda_sanitized.py MODULE`.

Each array is allocated by itself, and no larger than the kernels may use. Without torch, whose own threads a sanitizer
would have to follow.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np

import simt_build

# Several tiles in every direction, ragged, some begun before the first token; but few blocks, for ThreadSanitizer to
# follow each of their threads. With a sink also a window, so that it has rows in its own tile and in later ones.
BATCH, SEQLEN, HEADS, KV_HEADS, GROUP_SIZE, HEAD_DIM = 1, 300, 2, 1, 256, 56


def main() -> None:
    module = simt_build.load(Path(sys.argv[1]))
    generator = np.random.default_rng(0)

    def random(heads: int) -> np.ndarray:
        return generator.standard_normal((BATCH, SEQLEN, heads, HEAD_DIM)).astype(np.float16)

    def nan(size: int) -> np.ndarray:
        return np.full(size, np.nan, np.float32)

    def view(array: np.ndarray) -> object:
        return module.TensorView(array.ctypes.data, *(stride // array.itemsize for stride in array.strides[:3]))

    position = np.arange(SEQLEN, dtype=np.int32)
    garbage = generator.integers(-(2**31), 2**31, SEQLEN, dtype=np.int32)
    cases = product((None, position // 130 * 130, garbage), (False, True))
    for seed, (doc_start, sink) in enumerate(cases):
        q, k, v, dout = (random(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
        out, dq, dk, dv = (np.full_like(x, np.nan) for x in (q, q, k, v))
        lse, dlse, delta, sink_weight, sink_ds = (nan(BATCH * HEADS * SEQLEN) for _ in range(5))
        dlse[:] = 1
        problem = module.Problem(
            batch=BATCH,
            seqlen=SEQLEN,
            seqlen_k=SEQLEN,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            group_size=GROUP_SIZE,
            first_shifted_head=1,
            window=25 if sink else SEQLEN,
            sink=sink,
            scale=HEAD_DIM**-0.5,
            doc_start=0 if doc_start is None else doc_start.ctypes.data,
        )
        module.configure(seed)
        module.forward(problem, False, *map(view, (q, k, v, out)), lse.ctypes.data)
        for deterministic in (False, True):
            scratch = nan(module.dq_scratch_floats(problem, deterministic)), nan(module.sink_sums_floats(problem))
            views = map(view, (dout, q, k, v, out, dq, dk, dv))
            arrays = (lse, dlse, delta, sink_weight, sink_ds, *scratch)
            pointers = [array.ctypes.data if array.size else 0 for array in arrays]
            module.backward(problem, False, deterministic, *views, *pointers)
            if not (sink and doc_start is garbage):  # whose sinks' rows are not where they are looked for
                assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


if __name__ == "__main__":
    main()
