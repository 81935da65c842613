#include <cuda_runtime.h>

#include <cstdio>

#include "cuda/mlp_launch.h"

namespace bmf::cuda {
namespace {

// Launches step after step until one cannot be.
class MlpLauncher {
 public:
  MlpLauncher(const char* op, const MlpArgs& args, const Workspace& workspace, void* stream)
      : op_(op), args_(args), workspace_(workspace), stream_(stream), handle_(lt_handle()) {}

  bool multiply(const Product& product) {
    if (handle_ == nullptr) return fail("cuBLASLt is not there");
    if (product.out.rows == 0 || product.out.columns == 0) return true;
    const int status = LtCall(*lt_api()).run(handle_, product, workspace_, stream_);
    if (status == 0) return true;
    std::snprintf(what_, sizeof what_, "cuBLASLt's status %d for a product [%lld, %lld] with epilogue %d", status,
                  static_cast<long long>(product.out.rows), static_cast<long long>(product.out.columns),
                  static_cast<int>(product.epilogue));
    return false;
  }
  bool pointwise(const PointwiseArgs& args) {
    if (args.count == 0) return true;
    with_pointwise(args, [&](auto kernel) {
      const auto blocks = static_cast<unsigned>(PointwiseShape::blocks(args.count));
      kernel<<<blocks, PointwiseShape::kThreads, 0, static_cast<cudaStream_t>(stream_)>>>(args);
    });
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess || fail(cudaGetErrorString(status));
  }

  const char* result() const {
    if (what_[0] == 0) return nullptr;
    thread_local char line[512];
    const MlpArgs& a = args_;
    std::snprintf(line, sizeof line, "%s: %s, for x [%lld, %lld], %lld hidden and %lld outputs, of %s in CUDA C++", op_,
                  what_, static_cast<long long>(a.rows), static_cast<long long>(a.inputs),
                  static_cast<long long>(a.hidden), static_cast<long long>(a.outputs),
                  a.dtype == Half::bfloat16 ? "bfloat16" : "float16");
    return line;
  }

 private:
  bool fail(const char* what) {
    std::snprintf(what_, sizeof what_, "%s", what);
    return false;
  }

  const char* op_;
  const MlpArgs& args_;
  Workspace workspace_;
  void *stream_, *handle_;
  char what_[256] = {};
};

template <class Run>
const char* launch(const char* op, const MlpArgs& args, const Workspace& workspace, void* stream, const Run& run) {
  MlpLauncher launcher(op, args, workspace, stream);
  run([&](const Product& p) { return launcher.multiply(p); },
      [&](const PointwiseArgs& a) { return launcher.pointwise(a); });
  return launcher.result();
}

}  // namespace

const char* mlp_forward(const MlpArgs& args, const Workspace& workspace, void* stream) {
  return launch(args.gated() ? "gated_mlp" : "mlp", args, workspace, stream,
                [&](const auto& multiply, const auto& pointwise) { run_mlp_forward(args, multiply, pointwise); });
}

const char* mlp_backward(const MlpArgs& args, const Workspace& workspace, void* stream) {
  return launch(args.gated() ? "gated_mlp's backward" : "mlp's backward", args, workspace, stream,
                [&](const auto& multiply, const auto& pointwise) { run_mlp_backward(args, multiply, pointwise); });
}

}  // namespace bmf::cuda
