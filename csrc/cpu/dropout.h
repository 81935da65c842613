// dropout: y = x / (1 - p) where an element is kept and 0 elsewhere, plus a residual if there is one. What is kept
// depends on the seed and the element's row and column alone (core/philox.h), so the same call on the gradient is its
// backward.
//
// x, y and residual [rows, width] with contiguous rows. Reads and writes each element once.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct DropoutArgs {
  int64_t rows, width;
  Rows x, y;
  Finish finish;  // y's dtype must be that of y
};

}  // namespace bmf

BMF_DECLARE_KERNEL(dropout, DropoutArgs)
