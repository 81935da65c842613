// Runs attention's kernels on a GPU, and says in one line what went wrong if something did.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>

#include "cuda/attention_launch.h"

namespace bmf::cuda {

// Launches kernel after kernel until one cannot be.
class Launcher {
 public:
  Launcher(const char* op, const AttentionArgs& args, void* stream)
      : op_(op), args_(args), stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Kernel>
  void operator()(Kernel kernel, const Grid& grid) {
    constexpr int64_t kMostX = 0x7fffffff, kMostY = 65535;
    if (status_ != cudaSuccess || grid.x == 0 || grid.y == 0) return;
    if (grid.x > kMostX || grid.y > kMostY) {
      status_ = cudaErrorInvalidConfiguration;
      return;
    }
    status_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (status_ != cudaSuccess) return;
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    kernel<<<blocks, grid.threads, static_cast<size_t>(grid.shared_bytes), stream_>>>(args_);
    status_ = cudaGetLastError();
  }

  // What attention_forward and attention_backward return.
  const char* result() const {
    if (status_ == cudaSuccess) return nullptr;
    cudaGetLastError();  // the error is reported here, and not by whoever calls CUDA next
    return message(cudaGetErrorString(status_));
  }
  const char* message(const char* what) const {
    thread_local char line[512];
    const AttentionArgs& a = args_;
    std::snprintf(line, sizeof line,
                  "%s: %s, for query [%d, %d, %d, %d] and key [%d, %d, %d, %d] of %s in CUDA C++ ([batch, heads, rows, "
                  "head dimension])",
                  op_, what, a.batches, a.heads, a.queries, a.head_dim, a.batches, a.heads / a.group, a.keys,
                  a.head_dim, a.dtype == Half::bfloat16 ? "bfloat16" : "float16");
    return line;
  }

 private:
  const char* op_;
  const AttentionArgs& args_;
  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
};

// run.template operator()<T>(launcher) with the call's dtype, if its sizes are such as the kernels take.
template <class Run>
const char* launch_with_dtype(const char* op, const AttentionArgs& args, void* stream, const Run& run) {
  Launcher launcher(op, args, stream);
  if (args.head_dim < 1 || args.head_dim > kMostDim) return launcher.message("the head dimension must lie in [1, 256]");
  if (args.queries > kFar || args.keys > kFar) return launcher.message("sequences must have at most 2^29 rows");
  args.dtype == Half::bfloat16 ? run.template operator()<bf16>(launcher) : run.template operator()<f16>(launcher);
  return launcher.result();
}

}  // namespace bmf::cuda
