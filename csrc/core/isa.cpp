#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace bmf {
namespace {

constexpr const char* kNames[kIsaCount] = {"generic", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return Isa::generic;
}

Isa parse(const char* name, const char* source) {
  std::string supported;
  for (int i = 0; i < kIsaCount; ++i) {
    Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    if (std::strcmp(kNames[i], name) == 0) return isa;
    supported += (supported.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::invalid_argument(std::string(source) + ": '" + name + "' cannot be used on this machine; it has " +
                              supported);
}

Isa initial_isa() {
  const char* forced = std::getenv("BMF_CPU_ISA");
  return forced && *forced ? parse(forced, "BMF_CPU_ISA") : best_isa();
}

Isa& current() {
  static Isa isa = initial_isa();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return isa_supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vbmi");  // all that have the one but Cooper Lake
  }
  return false;
#else
  return isa == Isa::generic;
#endif
}

Isa active_isa() { return current(); }

void set_isa(const char* name) { current() = parse(name, "cpu_isa"); }

}  // namespace bmf
