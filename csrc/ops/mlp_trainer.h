// mlp_trainer's kernels on torch's threads, for csrc/mlp_trainer_module.cpp, which knows nothing of torch.
#pragma once
#include "cpu/mlp_trainer.h"

namespace bmf {

BMF_API void mlp_train_on_torch_threads(const MlpTrainArgs& args);
BMF_API void mlp_input_on_torch_threads(const MlpInputArgs& args);

}  // namespace bmf
