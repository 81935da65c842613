// mlp and gated_mlp of csrc/cuda against plain loops in double: their products through a cuBLASLt that computes on the
// host and checks its descriptors (fake_cublaslt.h), their own passes on an emulated GPU.
#include "cuda_emulator.h"
// The emulator comes first.
#include "cuda/mlp_launch.h"
#include "fake_cublaslt.h"
#include "testing.h"

using namespace testing;
using bmf::cuda::Matrix, bmf::cuda::MlpArgs, bmf::cuda::PointwiseArgs, bmf::cuda::Product;
namespace lt = bmf::cuda::lt;

namespace {

struct Case {
  const char* name;
  int64_t rows, inputs, hidden, outputs;
  Activation activation = Activation::gelu_tanh;
  bool gated = false, biases = true, wide = false;  // wide: gradients of weights in float32
  bool dx = true, dw1 = true, dw2 = true;
  int64_t gap = 0;                               // unused elements behind each row of x and of the weights
  std::vector<int> forward = {}, backward = {};  // the epilogues of the products, in their order
};

template <class T>
constexpr lt::DataType kType = std::is_same_v<T, bmf::bf16> ? lt::kBFloat16 : lt::kFloat16;

// Rows of numbers, `gap` unused ones between them; NaN where nobody has written. The memory ends with the last number.
class Numbers {
 public:
  Numbers(lt::DataType type, int64_t rows, int64_t columns, int64_t gap = 0, float scale = 0)
      : type_(type), rows_(rows), columns_(columns), stride_(columns + gap) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> draw(0, 1);
    const auto bytes = static_cast<size_t>(extent(rows, columns, stride_) * fake_lt::bytes_of(type));
    memory_.reset(static_cast<unsigned char*>(::operator new(bytes, kAlignment)));
    std::memset(memory_.get(), 0xff, bytes);
    for (int64_t i = 0; scale != 0 && i < rows * columns; ++i)
      fake_lt::write(type, memory_.get(), place(i), scale * draw(generator));
  }
  void* data() const { return memory_.get(); }
  Matrix matrix() const { return {data(), type_, rows_, columns_, stride_}; }
  double operator[](int64_t i) const { return fake_lt::read(type_, memory_.get(), place(i)); }
  int64_t count() const { return rows_ * columns_; }
  // Without an error, or as large as its numbers are.
  Exact exact(bool certain = false) const {
    Exact out(rows_, columns_);
    for (int64_t i = 0; i < count(); ++i) out.add(i, (*this)[i], certain ? 0 : std::abs((*this)[i]));
    return out;
  }

 private:
  static constexpr std::align_val_t kAlignment{16};
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete(p, kAlignment); }
  };
  int64_t place(int64_t i) const { return i / columns_ * stride_ + i % columns_; }
  lt::DataType type_;
  int64_t rows_, columns_, stride_;
  std::unique_ptr<unsigned char[], Free> memory_;
};

template <class T>
class Test {
 public:
  static constexpr double kEpsilon = std::is_same_v<T, bmf::bf16> ? 0x1p-7 : 0x1p-10;

  explicit Test(const Case& c)
      : c_(c),
        x_(kType<T>, c.rows, c.inputs, c.gap, 1),
        w1_(kType<T>, c.hidden, c.inputs, c.gap, 0.4f),
        wu_(kType<T>, c.hidden, c.inputs, c.gap, 0.4f),
        w2_(kType<T>, c.outputs, c.hidden, c.gap, 0.4f),
        b1_(kType<T>, 1, c.hidden, 0, 0.5f),
        b2_(kType<T>, 1, c.outputs, 0, 0.5f),
        dy_(kType<T>, c.rows, c.outputs, 0, 1) {
    context = std::string(kType<T> == lt::kBFloat16 ? "bfloat16, " : "float16, ") + c.name;
  }

  void run(emulator::Order order) {
    order_ = order;
    MlpArgs args{};
    args.dtype = kType<T> == lt::kBFloat16 ? bmf::cuda::Half::bfloat16 : bmf::cuda::Half::float16;
    args.activation = c_.activation;
    args.rows = c_.rows;
    args.inputs = c_.inputs;
    args.hidden = c_.hidden;
    args.outputs = c_.outputs;
    args.x = x_.matrix();
    args.w1 = w1_.matrix();
    args.w2 = w2_.matrix();
    if (c_.gated) args.wu = wu_.matrix();
    args.b1 = c_.biases ? b1_.data() : nullptr;
    args.b2 = c_.biases ? b2_.data() : nullptr;

    // As the operator does: forward with nothing kept, then with what backward needs.
    const Numbers z = inner(), u = inner(), y(kType<T>, c_.rows, c_.outputs), again(kType<T>, c_.rows, c_.outputs);
    args.u = c_.gated ? u.data() : nullptr;
    const Numbers h = inner();
    args.h = h.data();
    args.y = again.data();
    CHECK(launched(args, false));
    args.z = z.data();
    args.h = args.fused_relu() ? z.data() : h.data();
    args.y = y.data();
    fake_lt::epilogues.clear();
    CHECK(launched(args, false));
    CHECK(fake_lt::epilogues == c_.forward);
    for (int64_t i = 0; i < y.count(); ++i) CHECK(y[i] == again[i]);
    check_forward(y);

    const lt::DataType wide = c_.wide ? lt::kFloat32 : kType<T>;
    const Numbers dx(kType<T>, c_.rows, c_.inputs), dw1(wide, c_.hidden, c_.inputs), dwu(wide, c_.hidden, c_.inputs),
        dw2(wide, c_.outputs, c_.hidden), db1(args.fused_gelu() ? kType<T> : wide, 1, c_.hidden),
        db2(wide, 1, c_.outputs), dz = inner(), du = inner(), remade = inner();
    args.h = remade.data();
    args.dy = dy_.data();
    args.dz = dz.data();
    args.du = du.data();
    args.gradient = wide;
    args.dx = c_.dx ? dx.data() : nullptr;
    args.dw1 = c_.dw1 ? dw1.data() : nullptr;
    args.dwu = c_.dw1 && c_.gated ? dwu.data() : nullptr;
    args.dw2 = c_.dw2 ? dw2.data() : nullptr;
    args.db1 = c_.dw1 && c_.biases ? db1.data() : nullptr;
    args.db2 = c_.dw2 && c_.biases ? db2.data() : nullptr;
    fake_lt::epilogues.clear();
    CHECK(launched(args, true));
    CHECK(fake_lt::epilogues == c_.backward);
    CHECK(fake_lt::living == 0);
    check_backward(z, u, dx, dw1, dwu, dw2, db1, db2);
  }

 private:
  Numbers inner() const { return {kType<T>, c_.rows, c_.hidden}; }

  bool launched(const MlpArgs& args, bool backward) const {
    const auto multiply = [](const Product& p) {
      int handle;
      return bmf::cuda::LtCall(fake_lt::kApi).run(&handle, p, {&handle, sizeof handle}, nullptr) == 0;
    };
    const auto pointwise = [&](const PointwiseArgs& a) {
      const auto blocks = static_cast<int>(bmf::cuda::PointwiseShape::blocks(a.count));
      bmf::cuda::with_pointwise(a, [&](auto kernel) {
        emulator::launch({blocks}, bmf::cuda::PointwiseShape::kThreads, 0, order_, [&] { kernel(a); });
      });
      return true;
    };
    return backward ? run_mlp_backward(args, multiply, pointwise) : run_mlp_forward(args, multiply, pointwise);
  }

  Exact with_bias(Exact a, const Numbers& bias) const {
    for (int64_t i = 0; c_.biases && i < a.rows * a.cols; ++i) a.add(i, bias[i % a.cols]);
    return a;
  }
  Exact activated(const Exact& z) const {
    double most = 0;
    for (const double v : z.value) most = std::max(most, std::abs(v));
    const double steepest = c_.activation == Activation::relu2 ? 2 * most : kSteepest;
    return mapped(z, steepest, [&](double v) { return activate(c_.activation, v); });
  }
  void check_forward(const Numbers& y) const {
    Exact h = activated(with_bias(product(x_.exact(), transposed(w1_.exact())), b1_));
    if (c_.gated) h = scaled(h, product(x_.exact(), transposed(wu_.exact())));
    check("y", y, with_bias(product(h, transposed(w2_.exact())), b2_));
  }
  // From what forward has kept: near zero, relu's slope is another in one than in the other.
  void check_backward(const Numbers& z, const Numbers& u, const Numbers& dx, const Numbers& dw1, const Numbers& dwu,
                      const Numbers& dw2, const Numbers& db1, const Numbers& db2) const {
    const Exact dy = dy_.exact(), gate = z.exact(true);
    const Exact act = mapped(gate, 0, [&](double v) { return activate(c_.activation, v); });
    const Exact slope = mapped(gate, 0, [&](double v) { return activation_slope(c_.activation, v); });
    const Exact h = c_.gated ? scaled(act, u.exact()) : act, dh = product(dy, w2_.exact());
    const Exact dz = scaled(c_.gated ? scaled(dh, u.exact()) : dh, slope), du = scaled(dh, act);
    if (c_.dw2) check("dw2", dw2, product(transposed(dy), h));
    if (c_.dw2 && c_.biases) check("db2", db2, column_sums(dy));
    if (c_.dw1) check("dw1", dw1, product(transposed(dz), x_.exact()));
    if (c_.dw1 && c_.biases) check("db1", db1, column_sums(dz));
    if (c_.dw1 && c_.gated) check("dwu", dwu, product(transposed(du), x_.exact()));
    if (!c_.dx) return;
    Exact exact = product(dz, w1_.exact());
    const Exact more = product(du, wu_.exact());
    for (int64_t i = 0; c_.gated && i < dx.count(); ++i)
      exact.add(i, more.value[static_cast<size_t>(i)], more.scale[static_cast<size_t>(i)]);
    check("dx", dx, exact);
  }

  // Operands are exact; what is computed from them is rounded to T once each.
  static void check(const char* what, const Numbers& found, const Exact& exact) {
    for (int64_t i = 0; i < found.count(); ++i) {
      const auto at = static_cast<size_t>(i);
      const double error = std::abs(found[i] - exact.value[at]), limit = 2 * kEpsilon * exact.scale[at] + 1e-5;
      if (error <= limit) continue;
      char message[256];
      std::snprintf(message, sizeof message, "%s [%lld]: %.6g, expected %.6g; error %.3g exceeds %.3g", what,
                    static_cast<long long>(i), found[i], exact.value[at], error, limit);
      return fail(__FILE__, __LINE__, message);
    }
  }

  Case c_;
  Numbers x_, w1_, wu_, w2_, b1_, b2_, dy_;
  emulator::Order order_ = emulator::Order::random;
};

const Case kCases[] = {
    // gelu, of tanh: bias and gelu that saves its argument, bias; gelu' with sums, sums for db2, dw1, dx.
    {.name = "gelu_tanh",
     .rows = 21,
     .inputs = 16,
     .hidden = 40,
     .outputs = 24,
     .forward = {164, 4},
     .backward = {208, 512, 1, 1}},
    {.name = "gelu_tanh, float32 weights",
     .rows = 300,
     .inputs = 24,
     .hidden = 16,
     .outputs = 8,
     .wide = true,
     .gap = 8,
     .forward = {164, 4},
     .backward = {208, 512, 1, 1}},
    {.name = "gelu_tanh without biases",
     .rows = 9,
     .inputs = 8,
     .hidden = 16,
     .outputs = 5,
     .biases = false,
     .forward = {160, 1},
     .backward = {192, 1, 1, 1}},
    {.name = "gelu_tanh of odd sizes",
     .rows = 9,
     .inputs = 7,
     .hidden = 13,
     .outputs = 5,
     .gap = 3,
     .forward = {4, 4},
     .backward = {1, 512, 512, 1}},
    {.name = "gelu_tanh, no dx and no dw2",
     .rows = 9,
     .inputs = 8,
     .hidden = 16,
     .outputs = 8,
     .dx = false,
     .dw2 = false,
     .forward = {164, 4},
     .backward = {208, 1}},
    {.name = "relu",
     .rows = 20,
     .inputs = 16,
     .hidden = 24,
     .outputs = 8,
     .activation = Activation::relu,
     .wide = true,
     .forward = {6, 4},
     .backward = {1, 512, 512, 1}},
    {.name = "gelu",
     .rows = 30,
     .inputs = 16,
     .hidden = 100,
     .outputs = 8,
     .activation = Activation::gelu,
     .forward = {4, 4},
     .backward = {1, 512, 512, 1}},
    {.name = "relu2, dw2 alone",
     .rows = 20,
     .inputs = 16,
     .hidden = 24,
     .outputs = 8,
     .activation = Activation::relu2,
     .dx = false,
     .dw1 = false,
     .forward = {4, 4},
     .backward = {512}},
    {.name = "sigmoid",
     .rows = 5,
     .inputs = 6,
     .hidden = 11,
     .outputs = 3,
     .activation = Activation::sigmoid,
     .dw2 = false,
     .forward = {4, 4},
     .backward = {1, 512, 1}},
    {.name = "gated",
     .rows = 30,
     .inputs = 16,
     .hidden = 72,
     .outputs = 8,
     .activation = Activation::silu,
     .gated = true,
     .biases = false,
     .forward = {1, 1, 1},
     .backward = {1, 1, 1, 1, 1, 1}},
    {.name = "gated, gelu_tanh, odd sizes",
     .rows = 11,
     .inputs = 5,
     .hidden = 19,
     .outputs = 3,
     .gated = true,
     .biases = false,
     .wide = true,
     .gap = 1,
     .forward = {1, 1, 1},
     .backward = {1, 1, 1, 1, 1, 1}},
};

}  // namespace

int main() {
  int i = 0;
  for (const Case& c : kCases) {
    const auto order = static_cast<emulator::Order>(i % 3);
    i++ % 2 == 0 ? Test<bmf::bf16>(c).run(order) : Test<bmf::cuda::f16>(c).run(order);
  }
  return result();
}
