// What csrc/ops/mlp_cuda.cpp and mlp_fused_cuda.cpp launch, on an emulated GPU with 227 KiB of shared memory for a
// block and three processors, and a cuBLASLt of the host: tests/kernels/test_cuda_operators.py links it in place of the
// launches.
#include "cuda_emulator.h"
// The emulator comes first.
#include "cuda/mlp_fused_launch.h"
#include "cuda/mlp_launch.h"
#include "fake_cublaslt.h"

namespace bmf::cuda {
namespace {

constexpr int kSharedBytes = 227 << 10, kProcessors = 3;
constexpr auto kOrder = emulator::Order::random;

template <class Run>
const char* run_mlp(const Workspace& workspace, const Run& run) {
  const auto multiply = [&](const Product& p) {
    return LtCall(fake_lt::kApi).run(nullptr, p, workspace, nullptr) == 0;
  };
  const auto pointwise = [](const PointwiseArgs& a) {
    with_pointwise(a, [&](auto kernel) {
      emulator::launch({static_cast<int>(PointwiseShape::blocks(a.count))}, PointwiseShape::kThreads, 0, kOrder,
                       [&] { kernel(a); });
    });
    return true;
  };
  return run(multiply, pointwise) ? nullptr : "a product failed";
}

struct Launch {
  template <class Kernel>
  int resident(Kernel, int, int) const {
    return kProcessors;
  }
  template <class Kernel>
  void operator()(Kernel kernel, const FusedGrid& grid, const MlpFusedArgs& args) const {
    emulator::launch({static_cast<int>(grid.x), static_cast<int>(grid.y)}, grid.threads, grid.shared_bytes, kOrder,
                     [&] { kernel(args); });
  }
};

}  // namespace

const char* mlp_forward(const MlpArgs& args, const Workspace& workspace, void*) {
  return run_mlp(workspace, [&](const auto& multiply, const auto& pointwise) {
    return run_mlp_forward(args, multiply, pointwise);
  });
}
const char* mlp_backward(const MlpArgs& args, const Workspace& workspace, void*) {
  return run_mlp(workspace, [&](const auto& multiply, const auto& pointwise) {
    return run_mlp_backward(args, multiply, pointwise);
  });
}
const char* mlp_fused_forward(const MlpFusedArgs& args, void*) {
  const char* why = nullptr;
  const Launch launch;
  with_network(args, [&]<class T, int kWidth>() { why = run_fused_forward<T, kWidth>(args, kSharedBytes, launch); });
  return why;
}
const char* plan_mlp_fused_backward(MlpFusedArgs& args) {
  const char* why = nullptr;
  with_network(args,
               [&]<class T, int kWidth>() { why = plan_fused_backward<kWidth>(args, kSharedBytes, kProcessors); });
  return why;
}
const char* mlp_fused_backward(const MlpFusedArgs& args, void*) {
  const Launch launch;
  with_network(args, [&]<class T, int kWidth>() { run_fused_backward<T, kWidth>(args, launch); });
  return nullptr;
}

}  // namespace bmf::cuda
