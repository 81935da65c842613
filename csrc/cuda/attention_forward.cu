#include "cuda/attention_launch.cuh"

namespace bmf::cuda {

const char* attention_forward(const AttentionArgs& args, void* stream) {
  return launch_with_dtype("attention", args, stream, [&]<class T>(Launcher& launcher) {
    if (!attention_forward_hopper(args, launcher)) run_forward<T>(args, launcher);
  });
}

}  // namespace bmf::cuda
