// attention for a handful of queries (decoding): keys and values are read once, as they lie in memory, without packing.
#pragma once
#include "cpu/attention.h"

namespace bmf::BMF_ISA {

bool takes_few(const AttentionArgs& args);
void attend_few(const AttentionArgs& args, const Threads& threads);
void attend_few_backward(const AttentionArgs& args, const Threads& threads);  // but for a gradient of the bias

}  // namespace bmf::BMF_ISA
