"""Run the toy module once in a process under a sanitizer: `simt_sanitized.py MODULE NAME ARGUMENT BLOCKS`.

NAME is a probe of simt_toy.cpp, or "gemm". Without torch, whose own threads a sanitizer would have to follow.
"""

import sys
from pathlib import Path

import numpy as np

import simt_build


def main() -> None:
    module_path, name, argument, blocks = sys.argv[1:]
    toy = simt_build.load(Path(module_path))
    if name == "gemm":
        rows, columns, depth = shape = (150, 128, 192)
        generator = np.random.default_rng(0)
        a = generator.standard_normal((rows, depth)).astype(np.float16)
        b = generator.standard_normal((depth, columns)).astype(np.float16)
        c, row_sums = np.zeros((rows, columns), np.float16), np.zeros(rows, np.float32)
        toy.configure(int(argument))
        toy.gemm(False, True, *(array.ctypes.data for array in (a, b, c, row_sums)), *shape)
        np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32), rtol=1e-3, atol=3e-2)
    else:
        out = np.zeros(1024, np.float32)
        toy.probe(name, out.ctypes.data, int(argument), int(blocks))


if __name__ == "__main__":
    main()
