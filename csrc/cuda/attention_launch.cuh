// Runs attention's kernels on a GPU, and says in one line what went wrong if something did.
#pragma once
#include <cuda.h>  // types only: the driver's one function is asked for when it is needed
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "cuda/attention_hopper_launch.h"

namespace bmf::cuda {

#if defined(BMF_CUDA_90A)
constexpr bool kBuilt90a = true;
#else
constexpr bool kBuilt90a = false;
#endif

// Launches kernel after kernel until one cannot be.
class Launcher {
 public:
  Launcher(const char* op, const AttentionArgs& args, void* stream)
      : op_(op), args_(args), stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Kernel>
  void operator()(Kernel kernel, const Grid& grid) {
    (*this)(kernel, grid, args_);
  }
  template <class Kernel, class Args>
  void operator()(Kernel kernel, const Grid& grid, const Args& args) {
    constexpr int64_t kMostX = 0x7fffffff, kMostY = 65535;
    if (status_ != cudaSuccess || grid.x == 0 || grid.y == 0) return;
    if (grid.x > kMostX || grid.y > kMostY) {
      status_ = cudaErrorInvalidConfiguration;
      return;
    }
    status_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (status_ != cudaSuccess) return;
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    kernel<<<blocks, grid.threads, static_cast<size_t>(grid.shared_bytes), stream_>>>(args);
    status_ = cudaGetLastError();
  }

  // Those of this device, if it and this build have what sm_90a has.
  int processors() const {
    int device, major, minor, count;
    if (!kBuilt90a || cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
      return 0;
    return major == 9 && minor == 0 ? count : 0;
  }

  bool encode(TensorMap& map, const Boxes& t) const {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const auto encode = [] {
      void* function = nullptr;
      cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
      constexpr unsigned kSince = 12000;
      if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince, cudaEnableDefault, &found) !=
          cudaSuccess)
        cudaGetLastError();
      return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
    }();
    const auto number = [](int64_t n) { return static_cast<cuuint64_t>(n); };
    const cuuint64_t sizes[4] = {number(t.columns), number(t.rows), number(t.heads), number(t.batches)};
    const cuuint64_t strides[3] = {number(t.row_bytes), number(t.head_bytes), number(t.batch_bytes)};
    const cuuint32_t box[4] = {kPanel, static_cast<cuuint32_t>(t.box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
    CUtensorMap made;
    static_assert(sizeof made == sizeof map);
    if (encode == nullptr ||
        encode(&made,
               args_.dtype == Half::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
      return false;
    std::memcpy(&map, &made, sizeof map);
    return true;
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

// attention_hopper.cu: whether Hopper's kernels have taken the call.
bool attention_forward_hopper(const AttentionArgs& args, Launcher& launcher);
bool attention_backward_hopper(const AttentionArgs& args, Launcher& launcher);

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
