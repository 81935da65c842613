#include "cpu/mlp_trainer.h"

#include "core/activation.h"
#include "core/philox.h"
#include "core/team.h"
#include "cpu/mlp_trainer_input.h"
#include "cpu/mlp_trainer_update.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kMostRows = 96, kLeastRows = 16;  // of a tile
constexpr int64_t kTasksPerThread = 8;
constexpr double kFlopWorthAThread = 4e6;  // of a step: some 40 us, beside half a us for each of its phases

BMF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Rows of a tile: as many as leave each thread a few of the ceil(n / rows) `others` tasks, and a share of the rows that
// begins with a tile.
int64_t tile_rows(int64_t n, int64_t others, int threads) {
  int64_t rows = smaller(kMostRows, round_up(ceil_div(n, threads), kLeastRows));
  while (threads > 1 && rows > kLeastRows && ceil_div(n, rows) * others < kTasksPerThread * threads)
    rows = round_up(rows / 2, kLeastRows);
  return rows;
}

// What a layer reads and leaves behind for one batch of `samples`. A panel is kPanel samples; [f, u]: units of Mode.
//   panels   [panel][f of in][kPanel]            the layer's input, B operand of forward
//   columns  [in / kPanel][u of samples][kPanel] the same, B operand of wgrad
//   slope    [panel][out][kPanel]                activation' times dropout
//   rows     [out][row_stride]                   gradient of z, samples side by side: A operand of wgrad
//   grads    [panel][f of out][kPanel]           the same, B operand of dgrad
struct LayerMemory {
  float *panels, *columns, *slope, *rows, *grads;
};

template <class Mode>
class Steps {
 public:
  using Element = typename Mode::Element;
  static constexpr bool kFast = Mode::kPerUnit == 2;

  Steps(const MlpTrainArgs& args, const Threads& threads)
      : args_(args),
        threads_(threads),
        last_(args.layer_count - 1),
        outputs_(args.layers[last_].out),
        most_panels_(ceil_div(args.batch, kPanel)),
        row_stride_(most_panels_ * kPanel / Mode::kPerUnit + 16),  // no power of two: rows would share cache sets
        team_count_(team_count()),
        memory_(place(nullptr)) {
    place(memory_.at<char>(0));
    for (int t = 0; args_.augmentation && t < team_count_; ++t) warp_of(t).prepare(*args_.augmentation);
  }

  void run() {
    with_team(threads_, team_count_, [&](Team& team) {
      const int64_t steps = ceil_div(args_.count, args_.batch);
      for (int64_t step = 0; step < steps; ++step) {
        first_ = step * args_.batch;
        m_ = smaller(args_.batch, args_.count - first_);
        panel_count_ = ceil_div(m_, kPanel);
        step_ = step;
        read_batch(team);
        for (int64_t l = 0; l <= last_; ++l) forward(team, l);
        loss(team);
        for (int64_t l = last_; l > 0; --l) dgrad(team, l);
        wgrad_and_update(team);
      }
    });
  }

 private:
  const MlpLayer& layer(int64_t l) const { return args_.layers[l]; }
  LayerMemory& at(int64_t l) const { return layers_.template at<LayerMemory>(0)[l]; }
  UpdateFactors* factors(int64_t l) const { return factors_.template at<UpdateFactors>(0) + 2 * l; }
  int samples_in(int64_t panel) const { return static_cast<int>(smaller(kPanel, m_ - panel * kPanel)); }
  bool has_slope(int64_t l) const {
    return l < last_ || layer(l).activation != Activation::none || layer(l).dropout > 0;
  }

  // Gives every array its place from `base` on; returns the bytes they take.
  size_t place(char* base) {
    size_t used = 0;
    auto take = [&](int64_t floats) {
      float* p = base ? reinterpret_cast<float*>(base + used) : nullptr;
      used += static_cast<size_t>(round_up(floats, 16)) * 4;
      return p;
    };
    const int64_t samples = most_panels_ * kPanel;
    int64_t most_units = 0;
    for (int64_t l = 0; l <= last_; ++l) {
      const int64_t in = layer(l).in, out = layer(l).out;
      at(l).panels = take(samples * units_of<Mode>(in));
      at(l).columns = take(ceil_div(in, kPanel) * samples / Mode::kPerUnit * kPanel);
      at(l).slope = take(has_slope(l) ? samples * out : 0);
      at(l).rows = take(out * row_stride_);
      at(l).grads = take(l > 0 ? samples * units_of<Mode>(out) : 0);
      most_units = larger(most_units, larger(units_of<Mode>(in), units_of<Mode>(out)));
    }
    outputs_at_ = take(samples * outputs_);
    const int64_t groups = samples / kLanes;
    group_losses_ = reinterpret_cast<double*>(take(2 * groups));
    group_correct_ = reinterpret_cast<int64_t*>(take(2 * groups));
    pack_stride_ = most_units + 16;
    row_floats_ = round_up(args_.features, 2 * kLanes) + kLanes;
    thread_floats_ = round_up(kMostRows * (kPanel + pack_stride_), 16) + round_up(kLanes * row_floats_, 16) +
                     round_up(WarpMemory::floats(args_.augmentation), 16);
    per_thread_ = take(thread_floats_ * team_count_);
    return used;
  }
  float* tile_of(int thread) const { return per_thread_ + thread * thread_floats_; }  // [kMostRows][kPanel]
  float* pack_of(int thread) const { return tile_of(thread) + kMostRows * kPanel; }   // [kMostRows][pack_stride_]
  float* rows_of(int thread) const {                                                  // [kLanes][row_floats_]
    return tile_of(thread) + round_up(kMostRows * (kPanel + pack_stride_), 16);
  }
  WarpMemory warp_of(int thread) const {
    return {args_.augmentation, rows_of(thread) + round_up(kLanes * row_floats_, 16)};
  }

  int team_count() const {
    double flop = 0;
    for (int64_t l = 0; l <= last_; ++l) flop += 6.0 * static_cast<double>(layer(l).in * layer(l).out * args_.batch);
    const double most = 1 + flop / kFlopWorthAThread;
    const int64_t count = most < Team::kMost ? static_cast<int64_t>(most) : int64_t{Team::kMost};
    return static_cast<int>(smaller(count, threads_.count));
  }

  // ---- forward ----

  void read_batch(Team& team) {
    const int64_t features = args_.features, groups = ceil_div(m_, kLanes);
    // A few samples are shared out by features, unless each image has to be distorted as a whole.
    int64_t chunk = features;
    if (!args_.augmentation && team.count() > 1 && groups < kTasksPerThread * team.count())
      chunk = round_up(ceil_div(features * groups, kTasksPerThread * team.count()), 4 * kPanel);
    const int64_t chunks = ceil_div(features, chunk);
    team.run(groups * chunks, [&](int64_t task, int thread) {
      float* rows = rows_of(thread);
      const WarpMemory warp = warp_of(thread);
      const int64_t first = task / chunks * kLanes, count = smaller(kLanes, m_ - first);
      const int64_t begin = task % chunks * chunk, end = smaller(begin + chunk, features);
      for (int64_t s = 0; s < kLanes; ++s) {
        float* row = rows + s * row_floats_;
        if (s < count)
          sample_row(args_, first_ + first + s, begin, end, row, warp);
        else
          for_lanes(end - begin, [&](int64_t i, int) { store(row + begin + i, Vec{}); });
        for (int64_t i = end; i < round_up(end, kLanes); ++i) row[i] = 0;  // whole registers are read below
      }
      for (int64_t f = begin; f < end; f += kLanes) {
        Vec square[kLanes];
        for (int s = 0; s < kLanes; ++s) square[s] = load(rows + s * row_floats_ + f);
        store_square(0, f, features - f, first, square);
      }
    });
  }

  // Samples [first, first + kLanes) of features [f, f + left) of a layer's input, one sample in each square[s].
  void store_square(int64_t l, int64_t f, int64_t left, int64_t first, Vec (&square)[kLanes]) const {
    const LayerMemory& to = at(l);
    const int64_t sample_units = most_panels_ * kPanel / Mode::kPerUnit;
    for (int s = 0; s < kLanes; s += 2)
      store_row_pair<Mode>(
          to.columns + (f / kPanel * sample_units + (first + s) / Mode::kPerUnit) * kPanel + f % kPanel, square[s],
          square[s + 1]);
    if (l > 0) return;  // the epilogue of the layer before has done the rest
    transpose_units(square);
    for (int i = 0; i < smaller(kLanes, left); i += 2)
      store_row_pair<Mode>(panel_place(to.panels, units_of<Mode>(layer(l).in), f + i, first), square[i],
                           i + 1 < left ? square[i + 1] : Vec{}, i + 1 < left);
  }

  // Where samples from `sample` on of the unit of `feature` stand in panels of `units`.
  static float* panel_place(float* panels, int64_t units, int64_t feature, int64_t sample) {
    return panels + (sample / kPanel * units + feature / Mode::kPerUnit) * kPanel + sample % kPanel;
  }

  // f(row, rows, panel, thread): tiles of n rows and a panel, in tasks that share what start(row, rows, thread) made.
  template <class Start, class F>
  void for_tiles(Team& team, int64_t n, const Start& start, const F& f) const {
    const int64_t rows = tile_rows(n, panel_count_, team.count()), blocks = ceil_div(n, rows);
    const int64_t chunks = smaller(panel_count_, larger(1, ceil_div(kTasksPerThread * team.count(), blocks)));
    team.run(blocks * chunks, [&](int64_t task, int thread) {
      const int64_t row = task / chunks * rows, here = smaller(rows, n - row), chunk = task % chunks;
      start(row, here, thread);
      for (int64_t p = panel_count_ * chunk / chunks; p < panel_count_ * (chunk + 1) / chunks; ++p)
        f(row, here, p, thread);
    });
  }

  // tile [rows][kPanel] = A [rows][units] B [units][cols], summed in sweeps.
  static void multiply(const void* a, int64_t a_stride, const float* b, int64_t units, int64_t rows, int cols,
                       float* tile) {
    const int64_t sweeps = ceil_div(units, kSweepUnits<Mode>);
    for (int64_t s = 0; s < sweeps; ++s) {
      const int64_t unit = units * s / sweeps, here = units * (s + 1) / sweeps - unit;
      const auto product = s == 0 ? multiply_panel<Mode, false> : multiply_panel<Mode, true>;
      product({static_cast<const char*>(a) + unit * 4, a_stride}, {b + unit * kPanel}, here, rows, cols, tile, kPanel);
    }
  }

  void forward(Team& team, int64_t l) {
    const MlpLayer& of = layer(l);
    const int64_t units = units_of<Mode>(of.in);
    const MatrixView<float> w{of.weight.p, of.in, 1};
    with_activation(of.activation, [&](auto kind) {
      for_tiles(
          team, of.out,
          [&](int64_t row, int64_t rows, int thread) {
            if constexpr (Mode::kPerUnit == 2)
              pack_rows<Mode>(w, of.in, row, static_cast<int>(rows), pack_of(thread), pack_stride_);
          },
          [&](int64_t row, int64_t rows, int64_t panel, int thread) {
            float* tile = tile_of(thread);
            const float* b = at(l).panels + panel * units * kPanel;
            if constexpr (Mode::kPerUnit == 2)
              multiply(pack_of(thread), pack_stride_ * 4, b, units, rows, samples_in(panel), tile);
            else
              multiply(w.at(row, 0), of.in * 4, b, units, rows, samples_in(panel), tile);
            finish_forward<decltype(kind)::value>(l, row, rows, panel, tile);
          });
    });
  }

  // Of the sums of z without bias, one tile: the next layer's input (or the outputs) and the slope.
  template <Activation kind>
  void finish_forward(int64_t l, int64_t row, int64_t rows, int64_t panel, float* tile) const {
    const MlpLayer& of = layer(l);
    const int cols = samples_in(panel);
    const int64_t out = of.out, sample = panel * kPanel;
    const Dropped dropped(*this, l);
    for (int64_t r = 0; r < rows; r += 2) {
      const bool second = r + 1 < rows;
      uint16_t keep[8];
      if (dropped.any) dropped.choose(row + r, sample, keep);
      for (int c = 0; c < cols; c += kLanes) {
        Vec y[2] = {};
        for (int i = 0; i < 1 + second; ++i) {
          const float bias = of.bias.p ? of.bias.p[row + r + i] : 0.0f;
          float* sums = tile + (r + i) * kPanel + c;
          ValueAndSlope made = activate_with_slope<kind, kFast>(load(sums) + bias);
          if (dropped.any) {
            made.value = dropped.apply(made.value, keep, i, sample + c);
            made.slope = dropped.apply(made.slope, keep, i, sample + c);
          }
          y[i] = made.value;
          store(sums, made.value);
          if (has_slope(l)) store(at(l).slope + (panel * out + row + r + i) * kPanel + c, made.slope);
          if (l == last_) store(outputs_at_ + (panel * out + row + r + i) * kPanel + c, made.value);
        }
        if (l < last_)
          store_row_pair<Mode>(panel_place(at(l + 1).panels, units_of<Mode>(out), row + r, sample + c), y[0], y[1],
                               second);
      }
    }
    if (l == last_) return;
    for (int64_t r = 0; r < rows; r += kLanes)
      for (int c = 0; c < cols; c += kLanes) {
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = r + i < rows ? load(tile + (r + i) * kPanel + c) : Vec{};
        transpose_units(square);
        store_square(l + 1, row + r, rows - r, sample + c, square);
      }
  }

  // Which of a layer's outputs dropout keeps; a row pair shares one counter, 64 samples each.
  struct Dropped {
    Dropped(const Steps& steps, int64_t l)
        : any(steps.layer(l).dropout > 0),
          seed(steps.args_.seed + (steps.args_.first_step + static_cast<uint64_t>(steps.step_)) * 0x9E3779B97F4A7C15u),
          which(static_cast<uint32_t>(l)),
          threshold(static_cast<uint32_t>(steps.layer(l).dropout * 65536.0f + 0.5f)),
          factor(1 / (1 - static_cast<float>(threshold) / 65536.0f)) {}
    void choose(int64_t row, int64_t sample, uint16_t (&keep)[8]) const {
      dropout_choices(seed, which, static_cast<uint32_t>(row / 2), static_cast<uint32_t>(sample / 64), threshold, keep);
    }
    Vec apply(Vec v, const uint16_t (&keep)[8], int i, int64_t sample) const {
      const int64_t at = sample % 64;
      return keep_lanes(v * factor, static_cast<uint32_t>(keep[4 * i + at / 16]) >> at % 16);
    }
    bool any;
    uint64_t seed;
    uint32_t which, threshold;
    float factor;
  };

  // ---- loss ----

  void loss(Team& team) {
    const int64_t groups = ceil_div(m_, kLanes);
    team.run(groups, [&](int64_t group, int) {
      const int64_t sample = group * kLanes, count = smaller(kLanes, m_ - sample);
      float* y = outputs_at_ + sample / kPanel * outputs_ * kPanel + sample % kPanel;
      const VecI valid = lane_numbers() < static_cast<int32_t>(count);
      group_correct_[group] = 0;
      group_losses_[group] =
          args_.loss == MlpLoss::mse ? squares(y, sample, count) : entropies(y, sample, count, group_correct_[group]);
      const double each = args_.loss == MlpLoss::mse ? 2.0 / static_cast<double>(m_ * outputs_) : 1.0 / m_;
      for (int64_t r = 0; r < outputs_; r += 2) {
        Vec g[2] = {};
        for (int i = 0; i < 2 && r + i < outputs_; ++i) {
          g[i] = load(y + (r + i) * kPanel) * static_cast<float>(each);
          if (has_slope(last_)) g[i] *= load(at(last_).slope + (y - outputs_at_) + (r + i) * kPanel);
          g[i] = select(valid, g[i], Vec{});
        }
        store_gradients(last_, r, sample, g[0], g[1], r + 1 < outputs_);
      }
    });
    double total = 0;
    int64_t correct = 0;
    for (int64_t i = 0; i < groups; ++i) {
      total += group_losses_[i];
      correct += group_correct_[i];
    }
    args_.losses[step_] = total / static_cast<double>(args_.loss == MlpLoss::mse ? m_ * outputs_ : m_);
    if (args_.correct) args_.correct[step_] = correct;
  }

  static VecI lane_numbers() {
    VecI v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
  }

  // y becomes y - target; the sum of its squares over `count` samples.
  double squares(float* y, int64_t sample, int64_t count) const {
    double total = 0;
    for (int64_t r = 0; r < outputs_; ++r)
      for (int64_t i = 0; i < count; ++i) {
        float& at = y[r * kPanel + i];
        at -= args_.targets[args_.order[first_ + sample + i] * outputs_ + r];
        total += static_cast<double>(at) * static_cast<double>(at);
      }
    return total;
  }

  // y becomes softmax(y) - [row is the label]; the sum of the losses of `count` samples.
  double entropies(float* y, int64_t sample, int64_t count, int64_t& correct) const {
    VecI label{}, best{};
    for (int64_t i = 0; i < count; ++i) label[i] = static_cast<int32_t>(args_.labels[args_.order[first_ + sample + i]]);
    Vec top = load(y), own{}, sum{};
    for (int64_t r = 0; r < outputs_; ++r) {
      const Vec v = load(y + r * kPanel);
      const VecI number = VecI{} + static_cast<int32_t>(r);
      own = select(label == number, v, own);
      best = v > top ? number : best;
      top = max(top, v);  // NaN stays NaN
    }
    for (int64_t r = 0; r < outputs_; ++r) {
      const Vec e = exp(load(y + r * kPanel) - top);
      store(y + r * kPanel, e);
      sum += e;
    }
    const Vec inverse = 1.0f / sum;
    for (int64_t r = 0; r < outputs_; ++r) {
      const VecI number = VecI{} + static_cast<int32_t>(r);
      const Vec share = load(y + r * kPanel) * inverse;
      store(y + r * kPanel, select(label == number, share - 1.0f, share));
    }
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      total += __builtin_log(static_cast<double>(sum[i])) + static_cast<double>(top[i]) - static_cast<double>(own[i]);
      correct += best[i] == label[i];
    }
    return total;
  }

  // ---- backward ----

  // Gradients of z for samples [sample, sample + kLanes) of two rows.
  void store_gradients(int64_t l, int64_t row, int64_t sample, Vec first, Vec second, bool has_second) const {
    const LayerMemory& to = at(l);
    Element* rows = reinterpret_cast<Element*>(to.rows + row * row_stride_) + sample;
    store(rows, first);
    if (has_second) store(rows + row_stride_ * Mode::kPerUnit, second);
    if (l > 0)
      store_row_pair<Mode>(panel_place(to.grads, units_of<Mode>(layer(l).out), row, sample), first, second, has_second);
  }

  // The gradient of layer l - 1's z: W^T g times its slope.
  void dgrad(Team& team, int64_t l) {
    const MlpLayer& of = layer(l);
    const int64_t units = units_of<Mode>(of.out);
    const MatrixView<float> w{of.weight.p, 1, of.in};
    for_tiles(
        team, of.in,
        [&](int64_t row, int64_t rows, int thread) {
          pack_rows<Mode>(w, of.out, row, static_cast<int>(rows), pack_of(thread), pack_stride_);
        },
        [&](int64_t row, int64_t rows, int64_t panel, int thread) {
          float* tile = tile_of(thread);
          const int cols = samples_in(panel);
          multiply(pack_of(thread), pack_stride_ * 4, at(l).grads + panel * units * kPanel, units, rows, cols, tile);
          const float* slope = at(l - 1).slope + (panel * of.in + row) * kPanel;
          for (int64_t r = 0; r < rows; r += 2)
            for (int c = 0; c < cols; c += kLanes) {
              const int64_t i = r * kPanel + c;
              const Vec first = load(tile + i) * load(slope + i);
              const Vec second = r + 1 < rows ? load(tile + i + kPanel) * load(slope + i + kPanel) : Vec{};
              store_gradients(l - 1, row + r, panel * kPanel + c, first, second, r + 1 < rows);
            }
        });
  }

  void wgrad_and_update(Team& team) {
    int64_t tasks = 0;
    for (int64_t l = 0; l <= last_; ++l) {
      const GroupOptions* options = args_.options + step_ * args_.groups;
      factors(l)[0] = update_factors(layer(l).weight, options[layer(l).weight.group], step_);
      factors(l)[1] = update_factors(layer(l).bias, options[layer(l).bias.group], step_);
      tasks += wgrad_tasks(l, team.count());
    }
    team.run(tasks, [&](int64_t task, int thread) {
      int64_t l = 0;
      for (; task >= wgrad_tasks(l, team.count()); ++l) task -= wgrad_tasks(l, team.count());
      const MlpLayer& of = layer(l);
      const int64_t panels = ceil_div(of.in, kPanel), rows = tile_rows(of.out, panels, team.count());
      const int64_t row = task / panels * rows, panel = task % panels, here = smaller(rows, of.out - row);
      if (panel == 0) update_bias(l, row, here, tile_of(thread));
      if (of.weight.rule != UpdateRule::none) update_weight(l, row, here, panel, tile_of(thread));
    });
  }
  int64_t wgrad_tasks(int64_t l, int threads) const {
    const int64_t panels = ceil_div(layer(l).in, kPanel);
    return ceil_div(layer(l).out, tile_rows(layer(l).out, panels, threads)) * panels;
  }

  // Rows of W, and the columns of one panel: their gradient is g x, over the batch.
  void update_weight(int64_t l, int64_t row, int64_t rows, int64_t panel, float* tile) const {
    const MlpLayer& of = layer(l);
    const int64_t sample_units = most_panels_ * kPanel / Mode::kPerUnit;
    const int cols = static_cast<int>(smaller(kPanel, of.in - panel * kPanel));
    for (int64_t r = 0; r < rows; ++r) prefetch(of.weight, (row + r) * of.in + panel * kPanel, cols);
    multiply(at(l).rows + row * row_stride_, row_stride_ * 4, at(l).columns + panel * sample_units * kPanel,
             units_of<Mode>(m_), rows, cols, tile);
    for (int64_t r = 0; r < rows; ++r)
      update(of.weight, factors(l)[0], (row + r) * of.in + panel * kPanel, tile + r * kPanel, cols);
  }

  void update_bias(int64_t l, int64_t row, int64_t rows, float* sums) const {
    const TrainedTensor& bias = layer(l).bias;
    if (!bias.p || bias.rule == UpdateRule::none) return;
    for (int64_t r = 0; r < rows; ++r) {
      const Element* g = reinterpret_cast<const Element*>(at(l).rows + (row + r) * row_stride_);
      Vec total[4] = {};
      for_lanes_by_four(m_, [&](int64_t i, int lanes, int k) { total[k] += load_lanes(g + i, lanes); });
      sums[r] = sum(total);
    }
    update(bias, factors(l)[1], row, sums, rows);
  }

  const MlpTrainArgs& args_;
  const Threads& threads_;
  const int64_t last_, outputs_, most_panels_, row_stride_;  // row_stride_: in units
  const int team_count_;
  float *outputs_at_ = nullptr, *per_thread_ = nullptr;  // outputs_at_: [panel][outputs][kPanel]
  double* group_losses_ = nullptr;
  int64_t* group_correct_ = nullptr;
  int64_t pack_stride_ = 0, row_floats_ = 0, thread_floats_ = 0;
  const Scratch layers_{static_cast<size_t>(args_.layer_count) * sizeof(LayerMemory)};
  const Scratch factors_{static_cast<size_t>(args_.layer_count) * 2 * sizeof(UpdateFactors)};
  const Scratch memory_;
  int64_t step_ = 0, first_ = 0, m_ = 0, panel_count_ = 0;  // of the batch at hand
};

}  // namespace

void mlp_train(const MlpTrainArgs& args, const Threads& threads) {
  if (args.bfloat16)
    Steps<Bf16Mode>(args, threads).run();
  else
    Steps<FloatMode>(args, threads).run();
}

void mlp_input(const MlpInputArgs& args, const Threads& threads) {
  const MlpTrainArgs& of = *args.of;
  parallel_ranges(threads, of.count, row_grain(of.features), [&](int64_t begin, int64_t end, int) {
    const Scratch scratch(static_cast<size_t>(WarpMemory::floats(of.augmentation)) * 4);
    const WarpMemory memory(of.augmentation, scratch.at<float>(0));
    if (of.augmentation) memory.prepare(*of.augmentation);
    for (int64_t i = begin; i < end; ++i) sample_row(of, i, 0, of.features, args.out + i * of.features, memory);
  });
}

}  // namespace bmf::BMF_ISA
