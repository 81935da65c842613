#include "cuda/attention_launch.cuh"

namespace bmf::cuda {

bool attention_forward_hopper(const AttentionArgs& args, Launcher& launcher) {
  return args.dtype == Half::bfloat16 ? run_forward_hopper<bf16>(args, launcher)
                                      : run_forward_hopper<f16>(args, launcher);
}

bool attention_backward_hopper(const AttentionArgs& args, Launcher& launcher) {
  return args.dtype == Half::bfloat16 ? run_backward_hopper<bf16>(args, launcher)
                                      : run_backward_hopper<f16>(args, launcher);
}

}  // namespace bmf::cuda
