#include "cpu/layer_norm.h"

namespace bmf::BMF_ISA {

void layer_norm_forward(const NormForwardArgs& args, const Threads& threads) { norm_forward<true>(args, threads); }
void layer_norm_backward(const NormBackwardArgs& args, const Threads& threads) { norm_backward<true>(args, threads); }

}  // namespace bmf::BMF_ISA
