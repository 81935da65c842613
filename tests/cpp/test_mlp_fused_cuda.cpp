// The fused MLP's CUDA kernels, forward and backward, on an emulated GPU (cuda_emulator.h) against plain loops in
// double, with shared memory that holds all matrices and with less.
#include "cuda_emulator.h"
// The emulator comes first.
#include "activations.h"
#include "cuda/mlp_fused_launch.h"
#include "testing.h"

using namespace testing;
using bmf::cuda::MlpFusedArgs;

namespace {

struct Case {
  const char* name;
  int64_t rows;
  int inputs, outputs, hidden, width = 64;
  Activation activation = Activation::relu;
  int blocks = 2;
  int spare = 0;  // KiB of shared memory beyond the least
  bool biases = true, grad_x = true, grad_weights = true;
  int gap = 0, shift = 0;  // unused elements between the rows of x, and before the first
};
constexpr int kPlenty = 512;

template <class Shape>
int least_bytes() {
  return Shape::kTilesBytes + Shape::kFewestSlots * Shape::kSlotBytes;
}

struct Launch {
  emulator::Order order;
  int blocks;

  template <class Kernel>
  int resident(Kernel, int, int) const {
    return blocks;
  }
  template <class Kernel>
  void operator()(Kernel kernel, const bmf::cuda::FusedGrid& grid, const MlpFusedArgs& args) const {
    const emulator::Dim size{static_cast<int>(grid.x), static_cast<int>(grid.y)};
    emulator::launch(size, grid.threads, grid.shared_bytes, order, [&] { kernel(args); });
  }
};

template <class T>
class Halves {
 public:
  explicit Halves(int64_t count, float scale = 0) : count_(count), numbers_(new T[static_cast<size_t>(count)]) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> draw(0, 1);
    for (int64_t i = 0; i < count; ++i)
      numbers_[i].bits = scale == 0 ? 0xffff : bmf::cuda::rounded(scale * draw(generator), T{});
  }
  T* data() const { return numbers_.get(); }
  int64_t count() const { return count_; }
  double operator[](int64_t i) const { return bmf::cuda::to_float(numbers_[i]); }
  Exact exact(int64_t first, int64_t rows, int64_t columns, int64_t stride) const {
    Exact out(rows, columns);
    for (int64_t i = 0; i < rows * columns; ++i) out.add(i, (*this)[first + i / columns * stride + i % columns]);
    return out;
  }

 private:
  int64_t count_;
  std::unique_ptr<T[]> numbers_;
};

template <class T, int kWidth>
class Test {
 public:
  static constexpr double kEpsilon = std::is_same_v<T, bmf::bf16> ? 0x1p-7 : 0x1p-10;

  explicit Test(const Case& c)
      : c_(c),
        weights_(kWidth * (c.inputs + kWidth * (c.hidden - 1) + c.outputs),
                 1.2f / std::sqrt(static_cast<float>(kWidth))),
        x_(c.shift + extent(c.rows, c.inputs, c.inputs + c.gap), 1),
        grad_y_(c.rows * c.outputs, 1),
        biases_(Array::normal(Dtype::float32, c.hidden * kWidth + c.outputs, 0.5f)) {
    context = std::string(std::is_same_v<T, bmf::bf16> ? "bfloat16, " : "float16, ") + c.name;
  }

  void run(emulator::Order order) {
    Halves<T> y(c_.rows * c_.outputs), again(y.count()), pre(c_.hidden * c_.rows * kWidth);
    MlpFusedArgs args{};
    args.dtype = std::is_same_v<T, bmf::bf16> ? bmf::cuda::Half::bfloat16 : bmf::cuda::Half::float16;
    args.activation = c_.activation;
    args.rows = c_.rows;
    args.width = kWidth;
    args.inputs = c_.inputs;
    args.outputs = c_.outputs;
    args.hidden = c_.hidden;
    args.weights = weights_.data();
    args.biases = c_.biases ? biases_.floats() : nullptr;
    args.x = x_.data() + c_.shift;
    args.x_stride = c_.inputs + c_.gap;
    Launch launch{order, c_.blocks};
    using Forward = bmf::cuda::FusedForwardShape<kWidth>;
    const int forward_bytes = least_bytes<Forward>() + (c_.spare << 10);
    args.y = again.data();
    CHECK((bmf::cuda::run_fused_forward<T, kWidth>(args, forward_bytes, launch)) == nullptr);
    args.y = y.data();
    args.pre = pre.data();
    CHECK((bmf::cuda::run_fused_forward<T, kWidth>(args, forward_bytes, launch)) == nullptr);
    CHECK(std::memcmp(y.data(), again.data(), sizeof(T) * static_cast<size_t>(y.count())) == 0);
    check_forward(y, pre);

    Halves<T> grad_x(c_.rows * c_.inputs);
    Array grad_weights(Dtype::float32, weights_.count()), grad_biases(Dtype::float32, biases_.count());
    args.grad_y = grad_y_.data();
    args.grad_x = c_.grad_x ? grad_x.data() : nullptr;
    args.grad_weights = c_.grad_weights ? grad_weights.floats() : nullptr;
    args.grad_biases = c_.grad_weights && c_.biases ? grad_biases.floats() : nullptr;
    using Backward = bmf::cuda::FusedBackwardShape<kWidth>;
    CHECK(bmf::cuda::plan_fused_backward<kWidth>(args, least_bytes<Backward>() + (c_.spare << 10), c_.blocks) ==
          nullptr);
    const Array sums(Dtype::float32, args.sums_count);
    args.sums = sums.floats();
    bmf::cuda::run_fused_backward<T, kWidth>(args, launch);
    check_backward(pre, grad_x, grad_weights, grad_biases);
  }

 private:
  int64_t first_weight(int layer) const { return layer == 0 ? 0 : kWidth * (c_.inputs + kWidth * (layer - 1)); }
  int columns(int layer) const { return layer == 0 ? c_.inputs : kWidth; }
  int outputs(int layer) const { return layer == c_.hidden ? c_.outputs : kWidth; }
  Exact weight(int layer) const {
    return weights_.exact(first_weight(layer), outputs(layer), columns(layer), columns(layer));
  }
  Exact x() const { return x_.exact(c_.shift, c_.rows, c_.inputs, c_.inputs + c_.gap); }
  Exact saved(const Halves<T>& pre, int layer) const {  // without an error
    Exact z(c_.rows, kWidth);
    for (int64_t i = 0; i < c_.rows * kWidth; ++i) z.add(i, pre[layer * c_.rows * kWidth + i], 0);
    return z;
  }

  void check_forward(const Halves<T>& y, const Halves<T>& pre) const {
    Exact h = x();
    for (int layer = 0; layer <= c_.hidden; ++layer) {
      Exact z = product(h, transposed(weight(layer)));
      double most = 0;
      for (int64_t i = 0; i < z.rows * z.cols; ++i) {
        if (c_.biases) z.add(i, biases_[layer * kWidth + i % z.cols]);
        most = std::max(most, std::abs(z.value[i]));
      }
      const auto found = [&](int64_t i) { return layer < c_.hidden ? pre[layer * c_.rows * kWidth + i] : y[i]; };
      check(layer < c_.hidden ? "pre" : "y", found, z);
      const double steepest = c_.activation == Activation::relu2 ? 2 * most : kSteepest;
      h = mapped(z, steepest, [&](double v) { return activate(c_.activation, v); });
    }
  }

  // From the kernel's own z: where it is near zero, relu's slope is another in one than in the other.
  void check_backward(const Halves<T>& pre, const Halves<T>& grad_x, const Array& grad_weights,
                      const Array& grad_biases) const {
    Exact g = grad_y_.exact(0, c_.rows, c_.outputs, c_.outputs);
    for (int layer = c_.hidden; layer >= 0; --layer) {
      const Exact h =
          layer == 0 ? x() : mapped(saved(pre, layer - 1), 0, [&](double z) { return activate(c_.activation, z); });
      if (c_.grad_weights) {
        check(
            "grad_weights", [&](int64_t i) { return grad_weights[first_weight(layer) + i]; },
            product(transposed(g), h));
        if (c_.biases) check("grad_biases", [&](int64_t i) { return grad_biases[layer * kWidth + i]; }, column_sums(g));
      }
      g = product(g, weight(layer));
      if (layer > 0)
        g = scaled(g, mapped(saved(pre, layer - 1), 0, [&](double z) { return activation_slope(c_.activation, z); }));
    }
    if (c_.grad_x) check("grad_x", [&](int64_t i) { return grad_x[i]; }, g);
  }

  // Operands are exact; what is computed from them is rounded to T once each.
  template <class Found>
  static void check(const char* what, const Found& found, const Exact& exact) {
    for (int64_t i = 0; i < exact.rows * exact.cols; ++i) {
      const double actual = found(i), error = std::abs(actual - exact.value[i]);
      const double limit = 2 * kEpsilon * exact.scale[i] + 1e-5;
      if (error <= limit) continue;
      char message[256];
      std::snprintf(message, sizeof message, "%s [%lld, %lld]: %.6g, expected %.6g; error %.3g exceeds %.3g", what,
                    static_cast<long long>(i / exact.cols), static_cast<long long>(i % exact.cols), actual,
                    exact.value[i], error, limit);
      return fail(__FILE__, __LINE__, message);
    }
  }

  Case c_;
  Halves<T> weights_, x_, grad_y_;
  Array biases_;
};

const Case kCases[] = {
    {.name = "one row", .rows = 1, .inputs = 1, .outputs = 1, .hidden = 1},
    {.name = "several tiles of rows, one matrix too many", .rows = 400, .inputs = 16, .outputs = 16, .hidden = 2},
    {.name = "all in shared memory",
     .rows = 300,
     .inputs = 32,
     .outputs = 10,
     .hidden = 3,
     .activation = Activation::gelu,
     .spare = kPlenty},
    {.name = "some in shared memory, five layers",
     .rows = 270,
     .inputs = 8,
     .outputs = 64,
     .hidden = 5,
     .activation = Activation::silu,
     .spare = 80},
    {.name = "odd rows",
     .rows = 150,
     .inputs = 3,
     .outputs = 3,
     .hidden = 2,
     .activation = Activation::sigmoid,
     .gap = 2,
     .shift = 1},
    {.name = "input in parts",
     .rows = 140,
     .inputs = 150,
     .outputs = 5,
     .hidden = 1,
     .activation = Activation::tanh,
     .spare = 8,
     .gap = 2},
    {.name = "input in parts, all in shared memory",
     .rows = 400,
     .inputs = 130,
     .outputs = 24,
     .hidden = 2,
     .activation = Activation::gelu_tanh,
     .spare = kPlenty},
    {.name = "no biases", .rows = 129, .inputs = 64, .outputs = 17, .hidden = 2, .biases = false},
    {.name = "no gradient of x",
     .rows = 260,
     .inputs = 100,
     .outputs = 8,
     .hidden = 2,
     .activation = Activation::relu2,
     .spare = 8,
     .grad_x = false},
    {.name = "gradient of x only",
     .rows = 130,
     .inputs = 20,
     .outputs = 8,
     .hidden = 2,
     .spare = 40,
     .grad_weights = false},
    {.name = "more blocks than a warp sums up", .rows = 1400, .inputs = 8, .outputs = 8, .hidden = 1, .blocks = 10},
    {.name = "no rows", .rows = 0, .inputs = 8, .outputs = 8, .hidden = 1},
    {.name = "128 wide", .rows = 270, .inputs = 24, .outputs = 12, .hidden = 2, .width = 128},
    {.name = "128 wide, all in shared memory",
     .rows = 130,
     .inputs = 140,
     .outputs = 128,
     .hidden = 2,
     .width = 128,
     .activation = Activation::gelu,
     .spare = 200},
};

template <class T>
void run(const Case& c, emulator::Order order) {
  c.width == 64 ? Test<T, 64>(c).run(order) : Test<T, 128>(c).run(order);
}

void test_activations() {
  for (const Activation kind : kActivations)
    for (float x = -8; x <= 8; x += 0.0625f)
      bmf::cuda::with_activation(kind, [&]<Activation kKind>() {
        context = "activation " + std::to_string(static_cast<int>(kind)) + " of " + std::to_string(x);
        const auto [value, slope] = bmf::cuda::activate<kKind>(x);
        const double scale = 1e-6 * (1 + static_cast<double>(x) * x);
        CHECK(std::abs(value - activate(kind, x)) <= scale);
        if (x != 0) CHECK(std::abs(slope - activation_slope(kind, x)) <= scale);
      });
}

// First the matrices, then as many sums as there is still room for.
void test_shares_of_memory() {
  context = "shares of shared memory";
  using Forward = bmf::cuda::FusedForwardShape<128>;
  using Backward = bmf::cuda::FusedBackwardShape<128>;
  MlpFusedArgs args{};
  float number;
  args.rows = 1000, args.inputs = 130, args.outputs = 8, args.hidden = 3;  // two input tiles and three matrices
  const Launch launch{emulator::Order::first, 1};
  CHECK((bmf::cuda::run_fused_forward<bmf::bf16, 128>(args, least_bytes<Forward>() - 1, launch)) != nullptr);
  const auto planned = [&](int bytes, int slots, int kept) {
    return bmf::cuda::plan_fused_backward<128>(args, bytes, 5) == nullptr && args.slots == slots && args.kept == kept &&
           args.blocks == 5;
  };
  const int least = least_bytes<Backward>(), slot = Backward::kSlotBytes, sums = Backward::kSumsBytes;
  CHECK(bmf::cuda::plan_fused_backward<128>(args, least - 1, 5) != nullptr);
  CHECK(planned(least, 1, 0) && planned(least + slot, 2, 0));
  CHECK(planned(least + 9 * slot, 3, 0) && args.sums_count == 5 * 5 * sums / 4);  // nobody wants a gradient of weights
  args.grad_weights = &number;
  CHECK(planned(least + 2 * slot + sums - 1, 3, 0) && planned(least + 2 * slot + 2 * sums, 3, 2));
  args.grad_x = &number;
  CHECK(planned(least + 4 * slot + 9 * sums, 5, 5));
  args.rows = 1;
  CHECK(bmf::cuda::plan_fused_backward<128>(args, least, 5) == nullptr && args.blocks == 1);
}

}  // namespace

int main() {
  int i = 0;
  for (const Case& c : kCases) {
    const auto order = static_cast<emulator::Order>(i % 3);
    i++ % 3 == 1 ? run<bmf::cuda::f16>(c, order) : run<bmf::bf16>(c, order);
  }
  test_activations();
  test_shares_of_memory();
  return result();
}
