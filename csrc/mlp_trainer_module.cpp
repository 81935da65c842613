// bigmodel_fast._C.mlp_train and mlp_input: the trainer's kernels, which work on plain memory.
// bigmodel_fast/train/mlp.py checks what it hands over (shapes, dtypes, labels, pointers that stay alive), and is all
// that calls this.
#include "mlp_trainer_module.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "ops/mlp_trainer.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // of the first element of a contiguous array; 0: none

template <class T>
T* pointer(Address at) {
  return reinterpret_cast<T*>(at);
}

bmf::UpdateRule parse_rule(const std::string& name) {
  if (name == "none") return bmf::UpdateRule::none;
  if (name == "sgd") return bmf::UpdateRule::sgd;
  if (name == "adam") return bmf::UpdateRule::adam;
  throw std::invalid_argument("unknown rule " + name);
}

// One training call's arguments and the arrays they point to; fields are set by name from Python.
struct Job {
  bmf::MlpTrainArgs args{};
  bmf::Augmentation augmentation{};
  std::vector<bmf::MlpLayer> layers;

  void set_data(Address x, bool bytes, int64_t features, Address scale, Address shift, Address labels, Address targets,
                Address order, int64_t count, int64_t batch) {
    args.x = pointer<const void>(x);
    args.bytes = bytes;
    args.features = features;
    args.scale = pointer<const float>(scale);
    args.shift = pointer<const float>(shift);
    args.labels = pointer<const int64_t>(labels);
    args.targets = pointer<const float>(targets);
    args.order = pointer<const int64_t>(order);
    args.count = count;
    args.batch = batch;
  }

  void set_augmentation(int64_t channels, int64_t height, int64_t width, float shift, float rotate, float scale,
                        float elastic, float fill) {
    augmentation = {channels, height, width, shift, rotate, scale, elastic, fill};
    args.augmentation = &augmentation;
  }

  void set_random(uint64_t seed, uint64_t first_step) {
    args.seed = seed;
    args.first_step = first_step;
  }

  void add_layer(int64_t in, int64_t out, bmf::Activation activation, float dropout) {
    layers.push_back({in, out, {}, {}, activation, dropout});
  }

  void set_parameter(size_t layer, bool bias, Address p, const std::string& rule, Address m, Address v, bool nesterov,
                     bool decoupled, bool fresh, int64_t group, int64_t steps) {
    (bias ? layers.at(layer).bias : layers.at(layer).weight) = {pointer<float>(p),
                                                                pointer<float>(m),
                                                                pointer<float>(v),
                                                                parse_rule(rule),
                                                                nesterov,
                                                                decoupled,
                                                                fresh,
                                                                group,
                                                                steps};
  }

  std::tuple<std::vector<double>, std::vector<int64_t>> train(const std::string& loss, bool bfloat16,
                                                              const std::vector<std::vector<double>>& options) {
    const int64_t steps = (args.count + args.batch - 1) / args.batch;
    std::vector<double> losses(steps);
    std::vector<int64_t> correct(steps);
    std::vector<bmf::GroupOptions> groups;
    for (const auto& o : options) groups.push_back({o.at(0), o.at(1), o.at(2), o.at(3), o.at(4)});
    if (steps == 0 || groups.size() % steps != 0) throw std::invalid_argument("options are not those of each step");
    args.layers = layers.data();
    args.layer_count = static_cast<int64_t>(layers.size());
    args.loss = loss == "mse" ? bmf::MlpLoss::mse : bmf::MlpLoss::cross_entropy;
    args.bfloat16 = bfloat16;
    args.options = groups.data();
    args.groups = static_cast<int64_t>(groups.size()) / steps;
    args.losses = losses.data();
    args.correct = args.loss == bmf::MlpLoss::cross_entropy ? correct.data() : nullptr;
    {
      const py::gil_scoped_release released;
      bmf::mlp_train_on_torch_threads(args);
    }
    return {losses, correct};
  }

  void input(Address out) {
    const py::gil_scoped_release released;
    bmf::mlp_input_on_torch_threads({&args, pointer<float>(out)});
  }
};

}  // namespace

void bind_mlp_trainer(py::module_& m) {
  py::enum_<bmf::Activation>(m, "Activation")
      .value("none", bmf::Activation::none)
      .value("relu", bmf::Activation::relu)
      .value("gelu", bmf::Activation::gelu)
      .value("gelu_tanh", bmf::Activation::gelu_tanh)
      .value("silu", bmf::Activation::silu)
      .value("sigmoid", bmf::Activation::sigmoid)
      .value("tanh", bmf::Activation::tanh)
      .value("relu2", bmf::Activation::relu2);
  py::class_<Job>(m, "MlpJob", "What mlp_trainer.h's MlpTrainArgs hold; addresses are data_ptr()s, 0 for none.")
      .def(py::init<>())
      .def("set_data", &Job::set_data)
      .def("set_augmentation", &Job::set_augmentation)
      .def("set_random", &Job::set_random)
      .def("add_layer", &Job::add_layer)
      .def("set_parameter", &Job::set_parameter)
      .def("train", &Job::train, "Runs the steps; returns the loss of each, and how many of its samples were right.")
      .def("input", &Job::input, "Writes the samples as the network would see them, float32.");
}
