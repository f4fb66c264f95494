// Chooses among the instruction sets that kernels.cpp was compiled for.
#include <cstdlib>
#include <stdexcept>
#include <string>
#ifdef LONGLORA_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace longlora::cpu {

#define LONGLORA_DECLARE(isa)   \
  namespace isa {               \
  extern const Kernels kernels; \
  }
#ifdef LONGLORA_X86
LONGLORA_DECLARE(amx)
LONGLORA_DECLARE(avx512bf16)
LONGLORA_DECLARE(avx512)
LONGLORA_DECLARE(avx2)
#endif
LONGLORA_DECLARE(baseline)
#undef LONGLORA_DECLARE

namespace {

struct Choice {
  const char* name;
  bool supported;
  const Kernels* kernels;
};

#ifdef LONGLORA_X86
// Linux gives a process the tile registers when it asks for them (Documentation/arch/x86/xstate.rst). It refuses where
// it does not know them, or where a thread's signal stack is too small to save them.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Kernels& choose() {
#ifdef LONGLORA_X86
  // All that g++ may use for x86-64-v3 and -v4, for which the kernels are compiled. By those names it is asked from 12
  // on.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
                        __builtin_cpu_supports("movbe");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  const bool has_avx512bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const Choice choices[] = {
#ifdef LONGLORA_X86
      {"amx", has_avx512bf16 && __builtin_cpu_supports("amx-bf16") && may_use_tiles(), &amx::kernels},
      {"avx512bf16", has_avx512bf16, &avx512bf16::kernels},
      {"avx512", has_avx512, &avx512::kernels},
      {"avx2", has_avx2, &avx2::kernels},
#endif
      {"baseline", true, &baseline::kernels},
  };
  const char* wanted = std::getenv("LONGLORA_CPU_ISA");
  std::string supported;
  for (const Choice& choice : choices) {
    if (!choice.supported) continue;
    if (!wanted || std::string(wanted) == choice.name) return *choice.kernels;
    supported += std::string(supported.empty() ? "" : ", ") + choice.name;
  }
  throw std::runtime_error(std::string("s2attn: LONGLORA_CPU_ISA is '") + wanted +
                           "', but must be one of those that this processor and build support: " + supported);
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

}  // namespace longlora::cpu
