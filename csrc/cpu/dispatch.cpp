#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(MNOPS_HAS_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(MNOPS_HAS_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mnops {

#ifdef MNOPS_HAS_NEON
namespace {

bool has_bf16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16, by number: older kernel headers do not name it
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value;
#else
  return false;
#endif
}

const InstructionSet& neon_bf16() {
  static const InstructionSet all = [] {
    InstructionSet isa = neon_kernels;
    isa.name = "neon_bf16", isa.bf16 = neon_bf16_kernels;
    return isa;
  }();
  return all;
}

}  // namespace
#endif

const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> all = {
      {&scalar_kernels, "scalar", true},
#if defined(__x86_64__)
      {
#ifdef MNOPS_HAS_AVX2
          &avx2_kernels,
#else
          nullptr,
#endif
          "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {
#ifdef MNOPS_HAS_AVX512
          &avx512_kernels,
#else
          nullptr,
#endif
          "avx512",
#ifdef MNOPS_EMULATE_AVX512
          true
#else
          __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
#endif
      },
#endif
#ifdef MNOPS_HAS_NEON
      {&neon_kernels, "neon", true},  // part of AArch64
      {&neon_bf16(), "neon_bf16", has_bf16()},
#endif
  };
  return all;
}

const InstructionSet& instruction_set(const std::string& name) {
  std::string known;
  for (const Capability& c : capabilities()) {
    known += std::string(known.empty() ? "" : ", ") + c.name;
    if (name != c.name) continue;
    if (!c.kernels) throw std::runtime_error("instruction set " + name + " was not built into mnops");
    if (!c.supported) throw std::runtime_error("this CPU does not have the instruction set " + name);
    return *c.kernels;
  }
  throw std::runtime_error("instruction set must be one of " + known + ", got " + name);
}

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = []() -> const InstructionSet& {
    if (const char* forced = std::getenv("MNOPS_CPU_CAPABILITY"); forced && *forced) return instruction_set(std::string(forced));
    const InstructionSet* best = &scalar_kernels;
    for (const Capability& c : capabilities())
      if (c.kernels && c.supported) best = c.kernels;
    return *best;
  }();
  return chosen;
}

}  // namespace mnops
