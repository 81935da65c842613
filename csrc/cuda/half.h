// The 16-bit dtypes of the CUDA kernels.
#pragma once
#include <cstdint>

namespace bmf::cuda {

enum class Half : int32_t { bfloat16, float16 };

}  // namespace bmf::cuda
