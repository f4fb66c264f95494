"""exp2 of the CPU kernels over its whole range, for every instruction set that this processor has."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# As in cmake/cpu_kernels.cmake: the flags and the register width in bytes.
INSTRUCTION_SETS = {"baseline": ([], 16), "avx2": (["-march=x86-64-v3"], 32), "avx512": (["-march=x86-64-v4"], 64)}
SOURCE = """
#include "cpu/simd.h"
using namespace longlora::cpu::isa;
// The largest error in ulp of 2^x over floats of these bits, `step` apart, and where it is.
extern "C" double largest_error(uint32_t begin, uint32_t end, uint32_t step, float* where) {
  double largest = 0;
  for (uint64_t bits = begin; bits < end; bits += uint64_t(step) * kLanes<float>) {
    Vector<float> x;
    for (int i = 0; i < kLanes<float>; ++i) {
      const uint32_t lane = uint32_t(bits + uint64_t(step) * i < end ? bits + uint64_t(step) * i : begin);
      std::memcpy(reinterpret_cast<char*>(&x) + 4 * i, &lane, 4);
    }
    const Vector<float> y = longlora::cpu::isa::exp2(x);
    for (int i = 0; i < kLanes<float>; ++i) {
      const double exact = std::exp2(double(x[i]));
      const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
      const double error = std::fabs(y[i] - exact) / ulp;
      if (!(error <= largest)) largest = error, *where = x[i];
    }
  }
  return largest;
}
extern "C" float one(float x) { return longlora::cpu::isa::exp2(Vector<float>{} + x)[0]; }
"""


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags, width = INSTRUCTION_SETS[request.param]
    features = Path("/proc/cpuinfo").read_text()
    if {"avx2": "avx2", "avx512": "avx512vl"}.get(request.param, "") not in features:
        pytest.skip(f"this processor has no {request.param}")
    built = tmp_path_factory.mktemp("exp2") / "exp2.so"
    command = ["g++", "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-Wno-psabi", "-shared", "-fPIC", f"-I{CSRC}", *flags]
    command += ["-DLONGLORA_ISA=isa", f"-DLONGLORA_VECTOR_BYTES={width}"]
    subprocess.run([*command, "-x", "c++", "-", "-o", str(built)], input=SOURCE, text=True, check=True)
    loaded = ctypes.CDLL(str(built))
    loaded.largest_error.restype = ctypes.c_double
    loaded.largest_error.argtypes = [ctypes.c_uint32] * 3 + [ctypes.POINTER(ctypes.c_float)]
    loaded.one.restype, loaded.one.argtypes = ctypes.c_float, [ctypes.c_float]
    return loaded


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


@pytest.mark.parametrize(
    "nearest, step", [(0.0, 1009), pytest.param(2.0**-13, 1, marks=pytest.mark.full)], ids=["sample", "every"]
)
def test_within_two_ulp(library: ctypes.CDLL, nearest: float, step: int) -> None:
    """Floats from -126 up to 0, where results are normal, and a little above 0, where the rounding of a difference may
    put one. Nearer to 0 than 2^-13 a result is 1 + x ln 2, rounded once, but for 2^-27: of these nine in ten a sample
    is enough."""
    where = ctypes.c_float()
    for begin, end in ((bits(-nearest), bits(-126.0) + 1), (bits(nearest), bits(2.0**-10))):
        assert library.largest_error(begin, end, step, where) <= 2, where.value


def test_out_of_range(library: ctypes.CDLL) -> None:
    assert library.one(0.0) == 1 and library.one(-0.0) == 1
    assert library.one(-float("inf")) == 0 and library.one(-1e30) == 0 and library.one(-151.0) == 0
    assert np.isnan(library.one(float("nan")))
    for x in np.linspace(-150, -126.001, 1000, dtype=np.float32):  # subnormal, or 0
        assert 0 <= library.one(x) <= 1.01 * 2 ** float(x) + 2**-149
