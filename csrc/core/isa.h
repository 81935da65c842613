// Which instruction set the CPU kernels use. Detected once; BMF_CPU_ISA or set_isa() force another that the machine
// has.
#pragma once

#define BMF_API __attribute__((visibility("default")))

namespace bmf {

enum class Isa : int { generic, avx2, avx512, avx512_bf16 };
inline constexpr int kIsaCount = 4;

BMF_API const char* isa_name(Isa isa);
BMF_API bool isa_supported(Isa isa);  // compiled in, and this machine has it
BMF_API Isa active_isa();             // throws std::invalid_argument once if BMF_CPU_ISA names one that cannot be used
BMF_API void set_isa(const char* name);  // throws std::invalid_argument for an unknown or unsupported name

}  // namespace bmf

// Declares `void name(const Args&, const Threads&)` for each instruction set and a dispatcher bmf::name in front of
// them.
#if defined(__x86_64__)
#define BMF_DECLARE_KERNEL(name, Args)                                \
  namespace bmf::generic {                                            \
  void name(const Args&, const Threads&);                             \
  }                                                                   \
  namespace bmf::avx2 {                                               \
  void name(const Args&, const Threads&);                             \
  }                                                                   \
  namespace bmf::avx512 {                                             \
  void name(const Args&, const Threads&);                             \
  }                                                                   \
  namespace bmf::avx512_bf16 {                                        \
  void name(const Args&, const Threads&);                             \
  }                                                                   \
  namespace bmf {                                                     \
  static inline void name(const Args& args, const Threads& threads) { \
    switch (active_isa()) {                                           \
      case Isa::avx512_bf16: return avx512_bf16::name(args, threads); \
      case Isa::avx512: return avx512::name(args, threads);           \
      case Isa::avx2: return avx2::name(args, threads);               \
      case Isa::generic: return generic::name(args, threads);         \
    }                                                                 \
  }                                                                   \
  }
#else
#define BMF_DECLARE_KERNEL(name, Args)                                                                \
  namespace bmf::generic {                                                                            \
  void name(const Args&, const Threads&);                                                             \
  }                                                                                                   \
  namespace bmf {                                                                                     \
  static inline void name(const Args& args, const Threads& threads) { generic::name(args, threads); } \
  }
#endif
