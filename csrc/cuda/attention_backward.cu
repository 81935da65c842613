#include "cuda/attention_launch.cuh"

namespace bmf::cuda {

const char* attention_backward(const AttentionArgs& args, void* stream) {
  return launch_with_dtype("attention's backward", args, stream, [&]<class T>(Launcher& launcher) {
    run_terms<T>(args, launcher);
    if (!attention_backward_hopper(args, launcher)) run_backward<T>(args, launcher);
  });
}

}  // namespace bmf::cuda
