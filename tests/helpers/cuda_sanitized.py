"""Run the emulated kernels of fp16 and head dim 64 in a process under a sanitizer: `cuda_sanitized.py MODULE`.

Each array is allocated by itself, and no larger than the kernels may use. Without torch, whose own threads a sanitizer
would have to follow.
"""

import sys
from pathlib import Path

import numpy as np

import simt_build

# Several tiles in every direction, ragged, some begun before the first token; but few blocks, for ThreadSanitizer to
# follow each of their threads.
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
    for seed, doc_start in enumerate((None, position // 70 * 70, garbage)):
        q, k, v, dout = (random(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
        out, dq, dk, dv = (np.full_like(x, np.nan) for x in (q, q, k, v))
        lse, delta = (nan(BATCH * HEADS * SEQLEN) for _ in range(2))
        problem = module.Problem(
            batch=BATCH,
            seqlen=SEQLEN,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            group_size=GROUP_SIZE,
            first_shifted_head=1,
            scale=HEAD_DIM**-0.5,
            doc_start=0 if doc_start is None else doc_start.ctypes.data,
        )
        module.configure(seed)
        module.forward(problem, False, *map(view, (q, k, v, out)), lse.ctypes.data)
        for deterministic in (False, True):
            floats = module.dq_scratch_floats(problem, deterministic)
            scratch = nan(floats)
            views = map(view, (dout, q, k, v, out, dq, dk, dv))
            pointers = (lse.ctypes.data, delta.ctypes.data, scratch.ctypes.data if floats else 0)
            module.backward(problem, False, deterministic, *views, *pointers)
            assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


if __name__ == "__main__":
    main()
