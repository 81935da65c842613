// rms_norm: y = s rstd w with s = x + residual; the equations and arguments are in norm.h.
#pragma once
#include "cpu/norm.h"

BMF_DECLARE_KERNEL(rms_norm_forward, NormForwardArgs)
BMF_DECLARE_KERNEL(rms_norm_backward, NormBackwardArgs)
