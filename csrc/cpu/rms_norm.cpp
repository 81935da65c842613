#include "cpu/rms_norm.h"

namespace bmf::BMF_ISA {

void rms_norm_forward(const NormForwardArgs& args, const Threads& threads) { norm_forward<false>(args, threads); }
void rms_norm_backward(const NormBackwardArgs& args, const Threads& threads) { norm_backward<false>(args, threads); }

}  // namespace bmf::BMF_ISA
