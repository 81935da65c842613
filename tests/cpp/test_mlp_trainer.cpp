// mlp_train: the gradients that its updates tell of, the rules, and the samples it reads.
#include "cpu/mlp_trainer.h"

#include "activations.h"
#include "testing.h"

using namespace testing;
using bmf::MlpLoss, bmf::UpdateRule;

namespace {

struct Case {
  int64_t m, k, f, n;  // samples in a batch, and the sizes of two layers
  Activation kind;
  MlpLoss loss;
  bool bfloat16;
};

// A two-layer network, its data, and the arguments of a step on them. The first sample of the data is not used.
struct Network {
  Case c;
  Array w1, b1, w2, b2, targets;
  std::vector<uint8_t> x;
  std::vector<float> scale, shift;
  std::vector<int64_t> labels, order;
  std::vector<bmf::GroupOptions> options{{1, 0, 0, 0, 0}};
  bmf::MlpLayer layers[2];
  double loss = 0;
  int64_t correct = 0;
  bmf::MlpTrainArgs args{};

  explicit Network(const Case& of)
      : c(of),
        w1(Array::normal(Dtype::float32, c.f * c.k, 0.3f)),
        b1(Array::normal(Dtype::float32, c.f)),
        w2(Array::normal(Dtype::float32, c.n * c.f, 0.3f)),
        b2(Array::normal(Dtype::float32, c.n)),
        targets(Array::normal(Dtype::float32, (c.m + 1) * c.n)),
        x((c.m + 1) * c.k),
        scale(c.k),
        shift(c.k),
        labels(c.m + 1),
        order(c.m) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint8_t>(i * 97 % 251);
    for (int64_t i = 0; i < c.k; ++i) {
      scale[i] = 1 / 128.0f + static_cast<float>(i) * 1e-5f;
      shift[i] = -1;
    }
    for (int64_t i = 0; i <= c.m; ++i) labels[i] = i * 7 % c.n;
    for (int64_t i = 0; i < c.m; ++i) order[i] = c.m - i;
    layers[0] = {c.k, c.f, tensor(w1), tensor(b1), c.kind, 0};
    layers[1] = {c.f, c.n, tensor(w2), tensor(b2), Activation::none, 0};
    args.layers = layers;
    args.layer_count = 2;
    args.loss = c.loss;
    args.bfloat16 = c.bfloat16;
    args.x = x.data();
    args.bytes = true;
    args.features = c.k;
    args.scale = scale.data();
    args.shift = shift.data();
    args.labels = labels.data();
    args.targets = targets.floats();
    args.order = order.data();
    args.count = args.batch = c.m;
    args.options = options.data();
    args.groups = 1;
    args.losses = &loss;
    args.correct = &correct;
  }

  static bmf::TrainedTensor tensor(const Array& a) {
    return {a.floats(), nullptr, nullptr, UpdateRule::sgd, false, false, false, 0, 0};
  }
};

// p less the gradient.
Exact stepped(const Array& p, const Exact& gradient) {
  Exact out(p, gradient.rows, gradient.cols);
  for (size_t i = 0; i < out.value.size(); ++i) out.add(i, -gradient.value[i], gradient.scale[i]);
  return out;
}

// The gradient of the mean loss with regard to y, and the loss.
Exact loss_gradient(const Network& of, const Exact& y, double* loss) {
  const Case& c = of.c;
  Exact g(c.m, c.n);
  *loss = 0;
  for (int64_t r = 0; r < c.m; ++r) {
    const int64_t sample = of.order[r];
    if (c.loss == MlpLoss::mse) {
      for (int64_t j = 0; j < c.n; ++j) {
        const double t = of.targets[sample * c.n + j], d = y.value[r * c.n + j] - t, each = 2.0 / (c.m * c.n);
        *loss += d * d / (c.m * c.n);
        g.add(r * c.n + j, each * d, each * (y.scale[r * c.n + j] + std::abs(t)));
      }
      continue;
    }
    double sum = 0, largest = 0;
    for (int64_t j = 0; j < c.n; ++j) {
      sum += std::exp(y.value[r * c.n + j]);
      largest = std::max(largest, y.scale[r * c.n + j]);
    }
    *loss += (std::log(sum) - y.value[r * c.n + of.labels[sample]]) / c.m;
    for (int64_t j = 0; j < c.n; ++j) {
      const double share = std::exp(y.value[r * c.n + j]) / sum, own = of.labels[sample] == j;
      g.add(r * c.n + j, (share - own) / c.m, (share * (1 + 2 * largest) + own) / c.m);
    }
  }
  return g;
}

// With sgd at rate 1 the parameters move by their gradients.
void check_gradients(const Threads& threads, const Case& c) {
  Network net(c);
  const Array w1 = net.w1.copy(), b1 = net.b1.copy(), w2 = net.w2.copy(), b2 = net.b2.copy();
  bmf::mlp_train(net.args, threads);

  Exact x(c.m, c.k);
  for (int64_t i = 0; i < c.m * c.k; ++i) {
    const double stored = net.x[net.order[i / c.k] * c.k + i % c.k];
    x.add(i, stored * net.scale[i % c.k] - 1, stored * net.scale[i % c.k] + 1);
  }
  const Exact pre = with_row(product(x, transposed(Exact(w1, c.f, c.k))), b1);
  const Exact hidden = mapped(pre, kSteepest, [&](double v) { return activate(c.kind, v); });
  // Slopes change by at most twice what their argument does (gelu's by 0.8, relu2's by 2).
  const Exact slopes = mapped(pre, 2, [&](double v) { return activation_slope(c.kind, v); });
  const Exact y = with_row(product(hidden, transposed(Exact(w2, c.n, c.f))), b2);
  double loss;
  const Exact g2 = loss_gradient(net, y, &loss);
  const Exact g1 = scaled(product(g2, Exact(w2, c.n, c.f)), slopes);
  const Dtype computed = c.bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  CHECK_CLOSE(net.w2, stepped(w2, product(transposed(g2), hidden)), computed);
  CHECK_CLOSE(net.b2, stepped(b2, column_sums(g2)), computed);
  CHECK_CLOSE(net.w1, stepped(w1, product(transposed(g1), x)), computed);
  CHECK_CLOSE(net.b1, stepped(b1, column_sums(g1)), computed);
  double largest = 1;
  for (const double s : y.scale) largest = std::max(largest, s);
  CHECK(std::abs(net.loss - loss) <= 8 * epsilon(computed) * largest * (1 + std::abs(loss)));
  CHECK(net.correct >= 0 && net.correct <= c.m);
}

// Adam's and sgd's updates beside their formulas in double; states are given, so that nothing is near 0 / 0.
void check_rules(const Threads& threads) {
  const Case c{9, 5, 8, 3, Activation::tanh, MlpLoss::mse, false};
  Network plain(c);
  const Array before = plain.w1.copy(), w2 = plain.w2.copy(), b1 = plain.b1.copy(), b2 = plain.b2.copy();
  bmf::mlp_train(plain.args, threads);
  const Array m0 = Array::normal(Dtype::float32, c.f * c.k), v0 = Array::normal(Dtype::float32, c.f * c.k);
  struct Rule {
    bool adam, nesterov, decoupled;
    double decay;
  };
  for (const Rule& rule : {Rule{true, false, true, 0.1}, Rule{true, false, false, 0.1}, Rule{false, false, false, 0.1},
                           Rule{false, true, false, 0.0}}) {
    Network net(c);
    net.targets = plain.targets.copy();
    net.args.targets = net.targets.floats();
    net.w1 = before.copy(), net.w2 = w2.copy(), net.b1 = b1.copy(), net.b2 = b2.copy();
    Array m = m0.copy(), v = v0.copy();
    for (int64_t i = 0; i < v.count(); ++i) v.set(i, static_cast<float>(1 + std::abs(v0[i])));
    const Array v_before = v.copy();
    const UpdateRule kind = rule.adam ? UpdateRule::adam : UpdateRule::sgd;
    net.layers[0] = {c.k, c.f, Network::tensor(net.w1), Network::tensor(net.b1), c.kind, 0};
    net.layers[1] = {c.f, c.n, Network::tensor(net.w2), Network::tensor(net.b2), Activation::none, 0};
    net.layers[0].weight = {net.w1.floats(), m.floats(), v.floats(), kind, rule.nesterov, rule.decoupled, false, 0, 4};
    net.args.layers = net.layers;
    const bmf::GroupOptions o{0.1, rule.decay, 0.9, rule.adam ? 0.95 : 0.3, 1e-3};
    net.args.options = &o;
    bmf::mlp_train(net.args, threads);
    Exact p(c.f, c.k), first(c.f, c.k), second(c.f, c.k);
    for (int64_t i = 0; i < c.f * c.k; ++i) {
      double g = before[i] - plain.w1[i] + (rule.decoupled ? 0 : o.weight_decay * before[i]);
      const double size = std::abs(before[i]) + std::abs(g);
      if (rule.adam) {
        const double mean = o.first * m0[i] + (1 - o.first) * g,
                     square = o.second * v_before[i] + (1 - o.second) * g * g;
        const double kept = before[i] * (rule.decoupled ? 1 - o.lr * o.weight_decay : 1);
        const double root = std::sqrt(square / (1 - std::pow(o.second, 5))) + o.eps;
        first.add(i, mean, std::abs(m0[i]) + size);
        second.add(i, square, square + size * size);
        p.add(i, kept - o.lr * mean / (1 - std::pow(o.first, 5)) / root, 1 + size + std::abs(m0[i]));
      } else {
        const double kept = o.first * m0[i] + (1 - o.second) * g;
        first.add(i, kept, std::abs(m0[i]) + size);
        p.add(i, before[i] - o.lr * (rule.nesterov ? g + o.first * kept : kept), size + std::abs(m0[i]));
      }
    }
    CHECK_CLOSE(net.w1, p, Dtype::float32);
    CHECK_CLOSE(m, first, Dtype::float32);
    if (rule.adam) CHECK_CLOSE(v, second, Dtype::float32);
  }
}

// Several batches, the last one smaller, with dropout and distortions: the same bits for any number of threads.
void check_epochs(const Threads& threads) {
  const bmf::Augmentation augmentation{2, 5, 7, 1.5f, 20, 0.2f, 1, 3};
  std::vector<std::vector<float>> found;
  static_assert(2 * 5 * 7 == 70);
  for (const Threads& each : {testing::threads(1), threads}) {
    Network net({100, 70, 33, 4, Activation::gelu, MlpLoss::cross_entropy, true});
    for (int64_t i = 0; i < net.w1.count(); ++i) net.w1.set(i, std::sin(static_cast<float>(i)) * 0.2f);
    for (int64_t i = 0; i < net.w2.count(); ++i) net.w2.set(i, std::cos(static_cast<float>(i)) * 0.2f);
    for (int64_t i = 0; i < net.b1.count(); ++i) net.b1.set(i, 0.1f);
    for (int64_t i = 0; i < net.b2.count(); ++i) net.b2.set(i, 0.1f);
    net.layers[0].dropout = 0.3f;
    net.args.augmentation = &augmentation;
    net.args.batch = 37;
    const std::vector<bmf::GroupOptions> options(3, {0.1, 0, 0, 0, 0});
    net.args.options = options.data();
    double losses[3];
    int64_t correct[3];
    net.args.losses = losses;
    net.args.correct = correct;
    bmf::mlp_train(net.args, each);
    for (const double loss : losses) CHECK(loss > 0 && loss < 10);
    found.emplace_back(net.w1.floats(), net.w1.floats() + net.w1.count());

    std::vector<float> seen(net.args.count * 70);
    bmf::mlp_input({&net.args, seen.data()}, each);
    for (const float v : seen) CHECK(v >= -1 && v <= 251 / 128.0f);
  }
  CHECK(found[0] == found[1]);
}

}  // namespace

int main() {
  constexpr int64_t kShapes[][4] = {{1, 1, 1, 1}, {5, 3, 7, 2}, {70, 33, 50, 10}, {131, 17, 97, 3}};
  for_each_isa([&](const Threads& threads) {
    for (const auto& [m, k, f, n] : kShapes)
      for (const Activation kind : {Activation::gelu, Activation::tanh})
        for (const MlpLoss loss : {MlpLoss::cross_entropy, MlpLoss::mse})
          for (const bool bfloat16 : {false, true}) check_gradients(threads, {m, k, f, n, kind, loss, bfloat16});
    check_rules(threads);
    check_epochs(threads);
  });
  return result();
}
