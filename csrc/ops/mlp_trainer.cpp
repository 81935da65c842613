#include "ops/mlp_trainer.h"

#include "ops/common.h"

namespace bmf {

void mlp_train_on_torch_threads(const MlpTrainArgs& args) { mlp_train(args, torch_threads()); }
void mlp_input_on_torch_threads(const MlpInputArgs& args) { mlp_input(args, torch_threads()); }

}  // namespace bmf
