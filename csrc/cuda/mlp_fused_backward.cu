#include "cuda/mlp_fused.cuh"

namespace bmf::cuda {

const char* plan_mlp_fused_backward(MlpFusedArgs& args) {
  FusedLauncher launcher("mlp_fused's backward", args, nullptr);
  const char* why = nullptr;
  with_network(args, [&]<class T, int kWidth>() {
    why = plan_fused_backward<kWidth>(args, launcher.shared_bytes(), launcher.processors());
  });
  return launcher.result(why);
}

const char* mlp_fused_backward(const MlpFusedArgs& args, void* stream) {
  FusedLauncher launcher("mlp_fused's backward", args, stream);
  with_network(args, [&]<class T, int kWidth>() { run_fused_backward<T, kWidth>(args, launcher); });
  return launcher.result(nullptr);
}

}  // namespace bmf::cuda
