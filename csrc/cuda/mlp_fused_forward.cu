#include "cuda/mlp_fused.cuh"

namespace bmf::cuda {

const char* mlp_fused_forward(const MlpFusedArgs& args, void* stream) {
  FusedLauncher launcher("mlp_fused", args, stream);
  const char* why = nullptr;
  with_network(args, [&]<class T, int kWidth>() {
    why = run_fused_forward<T, kWidth>(args, launcher.shared_bytes(), launcher);
  });
  return launcher.result(why);
}

}  // namespace bmf::cuda
