// The module `simt_toy`: the toy GEMM, and probes that each do one thing right or wrong.
#include "simt_toy.h"

#include <map>
#include <string>

#include "../../csrc/simt/python.h"

namespace longlora::toy {
namespace {

struct ProbeParams {
  float* out;
  int argument;
};
constexpr int kProbeThreads = 64;
constexpr int kProbeBytes = 4096;

float load(const float* source) {
  float value;
  Move<float>::copy(*source, value);
  return value;
}
void store(float* target, float value) { Move<float>::copy(value, *target); }

void copy_own(const ProbeParams& params) {  // 16 bytes each
  CpAsync16::copy(reinterpret_cast<const uint128_t*>(params.out)[threadIdx.x], shared_memory<uint128_t>()[threadIdx.x],
                  true);
}

// The shuffles make these races come in one order, whatever the seed. They order no memory.
__global__ void read_neighbour(const ProbeParams params) {
  float* memory = shared_memory<float>();
  store(memory + threadIdx.x, threadIdx.x);
  params.argument ? sync_block() : void(shuffle_xor(0, 1));
  params.out[threadIdx.x] = load(memory + (threadIdx.x ^ 1));
}

__global__ void overwrite_read(const ProbeParams params) {
  float* memory = shared_memory<float>();
  store(memory + threadIdx.x, 1);
  sync_block();
  params.out[threadIdx.x] = load(memory + (threadIdx.x ^ 1));
  params.argument ? sync_block() : void(shuffle_xor(0, 1));
  store(memory + threadIdx.x, 2);
}

__global__ void write_same(const ProbeParams) { store(shared_memory<float>(), 1); }

__global__ void read_unwritten(const ProbeParams params) {
  params.out[threadIdx.x] = load(shared_memory<float>() + threadIdx.x);
}

__global__ void read_in_flight(const ProbeParams params) {
  copy_own(params);
  commit_copies();
  if (params.argument) wait_copies<0>();
  params.out[4 * threadIdx.x] = 1 + load(shared_memory<float>() + 4 * threadIdx.x);
}

__global__ void read_uncommitted(const ProbeParams params) {
  copy_own(params);
  wait_copies<0>();
  load(shared_memory<float>() + 4 * threadIdx.x);
}

__global__ void read_neighbours_copy(const ProbeParams params) {
  copy_own(params);
  commit_copies();
  wait_copies<0>();
  params.argument ? sync_block() : void(shuffle_xor(0, 1));
  load(shared_memory<float>() + 4 * (threadIdx.x ^ 1));
}

__global__ void write_in_flight(const ProbeParams params) {
  copy_own(params);
  store(shared_memory<float>() + 4 * threadIdx.x, 1);
}

__global__ void load_at(const ProbeParams params) { load(shared_memory<float>() + params.argument); }
__global__ void store_at(const ProbeParams params) { store(shared_memory<float>() + params.argument, 1); }
__global__ void copy_at(const ProbeParams params) {
  CpAsync16::copy(uint128_t(), shared_memory<uint128_t>()[params.argument], true);
}
__global__ void ldmatrix_at(const ProbeParams params) {
  uint32_t r[4];
  Ldmatrix4::copy(shared_memory<uint128_t>()[params.argument + threadIdx.x % 32], r[0], r[1], r[2], r[3]);
}
__global__ void misaligned(const ProbeParams) {
  uint64_t value;
  Move<uint64_t>::copy(*reinterpret_cast<const uint64_t*>(shared_memory<uint32_t>() + 1), value);
}

__global__ void barriers_differ(const ProbeParams params) {
  if (threadIdx.x < unsigned(params.argument))
    sync_block();
  else
    sync_block();
}

__global__ void some_return(const ProbeParams params) {
  if (threadIdx.x < unsigned(params.argument)) return;
  sync_block();
}

__global__ void half_a_warp(const ProbeParams params) {
  if (threadIdx.x % 32 < 16) params.out[threadIdx.x] = shuffle_xor(1, 1);
}

__global__ void shuffle(const ProbeParams params) {
  params.out[threadIdx.x] = shuffle_xor(threadIdx.x, params.argument);
}

__global__ void add(const ProbeParams params) { atomic_add(params.out, 1); }

// What the sanitizers are for: between blocks, and outside of an array.
__global__ void add_without_atomic(const ProbeParams params) {
  sync_block();
  if (threadIdx.x == 0) params.out[0] += 1;
  sync_block();
}
__global__ void read_global_at(const ProbeParams params) {
  if (threadIdx.x == 0) params.out[0] = params.out[params.argument];
}
__global__ void write_global_at(const ProbeParams params) {
  if (threadIdx.x == 0) params.out[params.argument] = 1;
}
__global__ void copy_global_at(const ProbeParams params) { copy_own({params.out + params.argument, 0}); }

__global__ void take_turns(const ProbeParams params) {
  const auto note = [&] { params.out[int(params.out[0] += 1)] = blockIdx.x * kProbeThreads + threadIdx.x; };
  note();
  shuffle_xor(0, 1);
  note();
}

template <typename T>
__global__ void load_strided(const ProbeParams params) {
  T value;
  Move<T>::copy(shared_memory<T>()[threadIdx.x % 32 * params.argument % (kProbeBytes / sizeof(T))], value);
}

using Launch = void (*)(dim3, int, int, void*, const ProbeParams&);
const std::map<std::string, Launch> kProbes = {
    {"read_neighbour", launch<&read_neighbour, ProbeParams>},
    {"overwrite_read", launch<&overwrite_read, ProbeParams>},
    {"write_same", launch<&write_same, ProbeParams>},
    {"read_unwritten", launch<&read_unwritten, ProbeParams>},
    {"read_in_flight", launch<&read_in_flight, ProbeParams>},
    {"read_uncommitted", launch<&read_uncommitted, ProbeParams>},
    {"read_neighbours_copy", launch<&read_neighbours_copy, ProbeParams>},
    {"write_in_flight", launch<&write_in_flight, ProbeParams>},
    {"load_at", launch<&load_at, ProbeParams>},
    {"store_at", launch<&store_at, ProbeParams>},
    {"copy_at", launch<&copy_at, ProbeParams>},
    {"ldmatrix_at", launch<&ldmatrix_at, ProbeParams>},
    {"misaligned", launch<&misaligned, ProbeParams>},
    {"barriers_differ", launch<&barriers_differ, ProbeParams>},
    {"some_return", launch<&some_return, ProbeParams>},
    {"half_a_warp", launch<&half_a_warp, ProbeParams>},
    {"shuffle", launch<&shuffle, ProbeParams>},
    {"add", launch<&add, ProbeParams>},
    {"add_without_atomic", launch<&add_without_atomic, ProbeParams>},
    {"read_global_at", launch<&read_global_at, ProbeParams>},
    {"write_global_at", launch<&write_global_at, ProbeParams>},
    {"copy_global_at", launch<&copy_global_at, ProbeParams>},
    {"take_turns", launch<&take_turns, ProbeParams>},
    {"load_strided_4", launch<&load_strided<uint32_t>, ProbeParams>},
    {"load_strided_8", launch<&load_strided<uint64_t>, ProbeParams>},
    {"load_strided_16", launch<&load_strided<uint128_t>, ProbeParams>},
};

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void run_gemm(bool bfloat16, bool swizzled, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t row_sums, int rows,
              int columns, int depth) {
  const Params params = {
      pointer<void>(a), pointer<void>(b), pointer<void>(c), pointer<float>(row_sums), rows, columns, depth};
  if (bfloat16)
    swizzled ? launch_gemm<bfloat16_t, true>(params) : launch_gemm<bfloat16_t, false>(params);
  else
    swizzled ? launch_gemm<half_t, true>(params) : launch_gemm<half_t, false>(params);
}

}  // namespace

PYBIND11_MODULE(simt_toy, module) {
  simt::bind_control(module);
  module.def("gemm", &run_gemm);
  module.def("probe", [](const std::string& name, uintptr_t out, int argument, int blocks) {
    kProbes.at(name)(blocks, kProbeThreads, kProbeBytes, nullptr, {pointer<float>(out), argument});
  });
  module.def("round_trip", [](bool bfloat16, float low, float high) {
    const float2 pair =
        bfloat16 ? unpack2<bfloat16_t>(pack2<bfloat16_t>(low, high)) : unpack2<half_t>(pack2<half_t>(low, high));
    return std::pair(pair.x, pair.y);
  });
}

}  // namespace longlora::toy
