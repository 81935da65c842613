// layer_norm: y = (s - mean) rstd w + b with s = x + residual; the equations and arguments are in norm.h.
#pragma once
#include "cpu/norm.h"

BMF_DECLARE_KERNEL(layer_norm_forward, NormForwardArgs)
BMF_DECLARE_KERNEL(layer_norm_backward, NormBackwardArgs)
