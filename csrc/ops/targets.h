// Class numbers as the losses take them.
#pragma once
#include "ops/common.h"

namespace bmf {

// Position of the first target that is neither a class nor ignore_index; -1 if there is none.
int64_t find_bad_target(const Tensor& target, int64_t classes, int64_t ignore_index);

// As a kernel needs them, whoever called the operator: every target a class or ignore_index.
inline void check_targets(const Tensor& target, int64_t classes, int64_t ignore_index, const char* op) {
  STD_TORCH_CHECK(find_bad_target(target, classes, ignore_index) < 0, op, ": target out of range");
}

// How many targets are not ignored; `target` is contiguous.
int64_t count_used(const Tensor& target, int64_t ignore_index);

}  // namespace bmf
