// Runs the fused MLP's kernels on the current GPU, and says in one line what went wrong if something did.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>

#include "cuda/mlp_fused_launch.h"

namespace bmf::cuda {

// Launches kernel after kernel until one cannot be.
class FusedLauncher {
 public:
  FusedLauncher(const char* op, const MlpFusedArgs& args, void* stream)
      : op_(op), args_(args), stream_(static_cast<cudaStream_t>(stream)) {
    int device = 0;
    status_ = cudaGetDevice(&device);
    if (status_ == cudaSuccess)
      status_ = cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status_ == cudaSuccess) status_ = cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device);
  }

  int shared_bytes() const { return shared_bytes_; }
  int processors() const { return processors_; }

  template <class Kernel>
  int resident(Kernel kernel, int threads, int shared_bytes) {
    int blocks = 0;
    if (allow(kernel, shared_bytes))
      status_ =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes));
    return (blocks > 0 ? blocks : 1) * processors_;
  }
  template <class Kernel>
  void operator()(Kernel kernel, const FusedGrid& grid, const MlpFusedArgs& args) {
    if (grid.x == 0 || !allow(kernel, grid.shared_bytes)) return;
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    kernel<<<blocks, grid.threads, static_cast<size_t>(grid.shared_bytes), stream_>>>(args);
    status_ = cudaGetLastError();
  }

  // What mlp_fused_forward and the others return; `why`, or what CUDA says.
  const char* result(const char* why) const {
    if (status_ != cudaSuccess) {
      cudaGetLastError();  // the error is reported here, and not by whoever calls CUDA next
      why = cudaGetErrorString(status_);
    }
    if (why == nullptr) return nullptr;
    thread_local char line[512];
    const MlpFusedArgs& a = args_;
    std::snprintf(line, sizeof line,
                  "%s: %s, for x [%lld, %d], %d hidden layers of %d and %d outputs, of %s in CUDA C++", op_, why,
                  static_cast<long long>(a.rows), a.inputs, a.hidden, a.width, a.outputs,
                  a.dtype == Half::bfloat16 ? "bfloat16" : "float16");
    return line;
  }

 private:
  template <class Kernel>
  bool allow(Kernel kernel, int shared_bytes) {
    if (status_ == cudaSuccess)
      status_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    return status_ == cudaSuccess;
  }

  const char* op_;
  const MlpFusedArgs& args_;
  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
  int shared_bytes_ = 0, processors_ = 0;
};

}  // namespace bmf::cuda
