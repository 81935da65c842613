// What forward and backward of attention share: which keys a query sees, products trimmed to them, and what is done to
// a score before its softmax.
#pragma once
#include "core/activation.h"
#include "core/gemm.h"
#include "core/philox.h"
#include "cpu/attention.h"

namespace bmf::BMF_ISA {

constexpr float kLog2e = 1.44269504088896341f, kInfinity = __builtin_inff();

// Offsets of a thread's buffers within its share of scratch memory.
class Layout {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += (bytes + 63) / 64 * 64;
    return at;
  }
  int64_t bytes() const { return (bytes_ + 4095) / 4096 * 4096; }

 private:
  int64_t bytes_ = 0;
};

template <class T>
BMF_INLINE T* rows_of(const AttentionOperand& t, const AttentionSequence& s, int64_t first, int64_t head) {
  return static_cast<T*>(t.data) + s.batch * t.batch_stride + head * t.head_stride + first * t.row_stride;
}

// Asks for one row of an operand in L2. A thread that goes through whole heads does so for the head it will probably
// have next, a row for each row it works on: heads are short runs far apart, which the hardware does not foresee.
template <class T>
BMF_INLINE void prefetch_row(const AttentionOperand& t, const AttentionSequence& s, int64_t row, int64_t head,
                             int64_t dim) {
  const char* at = reinterpret_cast<const char*>(rows_of<const T>(t, s, row, head));
  for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(at + byte, 0, 2);
}
constexpr int64_t kNoHead = -1;

struct KeyRange {
  int64_t begin, end;
  BMF_INLINE bool empty() const { return begin >= end; }
};

BMF_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The keys a query sees but for masks, and those that any of [row, row + rows) does: neither end falls as row grows.
BMF_INLINE KeyRange keys_of(const AttentionArgs& a, const AttentionSequence& s, int64_t row) {
  const int64_t at = row + s.shift, begin = clamp(at - a.left, 0, s.keys);
  return {begin, clamp(at + a.right + 1, begin, s.keys)};
}
BMF_INLINE KeyRange keys_of(const AttentionArgs& a, const AttentionSequence& s, int64_t row, int64_t rows) {
  return {keys_of(a, s, row).begin, keys_of(a, s, row + rows - 1).end};
}

// Pairs of queries and keys that see each other in [row, row + rows): the work of a task.
inline int64_t pairs_of(const AttentionArgs& a, const AttentionSequence& s, int64_t row, int64_t rows) {
  int64_t pairs = 0;
  for (int64_t r = row; r < row + rows; ++r) {
    const KeyRange keys = keys_of(a, s, r);
    pairs += keys.end - keys.begin;
  }
  return pairs;
}

// f(first, rows, range) for runs of whole groups of kRows rows of [row, row + rows) for which range(first row, rows of
// a group) is the same and not empty; `first` counts from `row`.
template <class Range, class F>
BMF_INLINE void for_runs(int64_t rows, const Range& range, const F& f) {
  for (int64_t r = 0; r < rows;) {
    const KeyRange here = range(r, smaller(kRows, rows - r));
    int64_t next = r + kRows;
    for (; next < rows; next += kRows) {
      const KeyRange then = range(next, smaller(kRows, rows - next));
      if (then.begin != here.begin || then.end != here.end) break;
    }
    if (!here.empty()) f(r, smaller(next, rows) - r, here);
    r = next;
  }
}

// Rows of a head, [count, dim], as the A operand of a product over dim: in place where memory has the form, and whole
// registers that a panel of them (below) would read; otherwise in `copy`, of count copied_row_bytes(dim).
template <class Mode>
int64_t copied_row_bytes(int64_t dim) {
  return ceil_div(units_of<Mode>(dim), kLanes) * kLanes * 4;
}
template <class Mode, class T>
UnitView units_of_rows(const T* data, int64_t row_stride, int64_t count, int64_t dim, void* copy) {
  constexpr int kWhole = Mode::kPerUnit == 1 ? kLanes : Mode::kPerUnit;
  if (std::is_same_v<T, typename Mode::Element> && dim % kWhole == 0)
    return {data, row_stride * static_cast<int64_t>(sizeof(T))};
  const int64_t stride = copied_row_bytes<Mode>(dim);
  pack_rows<Mode>(MatrixView<T>{data, row_stride, 1}, dim, 0, static_cast<int>(count), static_cast<float*>(copy),
                  stride / 4);
  return {copy, stride};
}

// The same rows as the B operand of a product over them, panel by panel of their columns. A unit of one number is a row
// of B as it lies in memory; pairs are interleaved in `copy`, panels_bytes long.
struct HeadPanels {
  const float* data;
  int64_t unit_stride, panel_stride;  // in floats
  PanelView at(int64_t panel, int64_t unit) const {
    return {data + panel * panel_stride + unit * unit_stride, unit_stride};
  }
};
template <class Mode>
int64_t panels_bytes(int64_t count, int64_t dim) {
  return Mode::kPerUnit == 1 ? 0 : units_of<Mode>(count) * ceil_div(dim, kPanel) * kPanel * 4;
}
template <class Mode>
HeadPanels panels_of_rows(const UnitView& rows, int64_t count, int64_t dim, float* copy) {
  using Element = typename Mode::Element;
  const auto* data = static_cast<const Element*>(rows.data);
  const int64_t row_stride = rows.row_stride / static_cast<int64_t>(sizeof(Element));
  if constexpr (Mode::kPerUnit == 1) {
    return {data, row_stride, kPanel};
  } else {
    const int64_t panel_stride = units_of<Mode>(count) * kPanel;
    for (int64_t col = 0; col < dim; col += kPanel)
      pack_panel<Mode>(MatrixView<Element>{data, row_stride, 1}, count, col,
                       static_cast<int>(smaller(kPanel, dim - col)), copy + col / kPanel * panel_stride);
    return {copy, kPanel, panel_stride};
  }
}

// out[r][kPanel] = a[r] times one packed panel of keys that starts at `key`, for r < rows, as far as the rows see it.
template <class Mode>
void multiply_scores(const AttentionArgs& args, const AttentionSequence& s, int64_t row, int64_t rows,
                     const UnitView& a, const float* panel, int64_t units, int64_t key, float* out,
                     int64_t out_stride) {
  auto columns = [&](int64_t r, int64_t n) {
    const KeyRange keys = keys_of(args, s, row + r, n);
    const int64_t end = smaller(keys.end - key, kPanel);
    return keys.begin < key + kPanel && end > 0 ? KeyRange{0, ceil_div(end, kLanes) * kLanes} : KeyRange{0, 0};
  };
  for_runs(rows, columns, [&](int64_t r, int64_t n, KeyRange keys) {
    multiply_panel<Mode, false>(a.from(r), {panel}, units, n, static_cast<int>(keys.end), out + r * out_stride,
                                out_stride);
  });
}

// Whether scores need more than a factor before their softmax.
BMF_INLINE bool modifies(const AttentionArgs& a) {
  return a.softcap != 0 || a.alibi != nullptr || a.bias.kind != BiasKind::none || !(a.scale > 0);
}
// What a score, modified or not, is multiplied by to be a logit to base 2.
BMF_INLINE float logit_factor(const AttentionArgs& a) { return modifies(a) ? 1.0f : a.scale * kLog2e; }

// `lanes` neighbouring elements of a bias, `stride` apart.
template <class T>
BMF_INLINE Vec load_bias(const T* p, int64_t stride, int lanes) {
  if (stride == 1) {
    if constexpr (!std::is_same_v<T, bool>) return load_lanes(p, lanes);
    if (lanes == kLanes) {
      VecB allowed;
      __builtin_memcpy(&allowed, p, sizeof allowed);
      return select(__builtin_convertvector(allowed, VecI) != 0, Vec{}, broadcast(-kInfinity));
    }
  }
  Vec v{};
  for (int i = 0; i < lanes; ++i) {
    if constexpr (std::is_same_v<T, bool>)
      v[i] = p[i * stride] ? 0.0f : -kInfinity;
    else
      v[i] = to_float(p[i * stride]);
  }
  return v;
}

// Scores of one query with keys [keys.begin, keys.end) become logits to base 2, in place; score and slope are of key
// `base`. slope (if given) gets the derivative of the softcap.
inline void modify_scores(const AttentionArgs& a, const AttentionSequence& s, int64_t head, int64_t row, KeyRange keys,
                          int64_t base, float* score, float* slope) {
  const float inverse = a.softcap != 0 ? 1.0f / a.softcap : 0;
  const float steepness = a.alibi ? a.alibi[s.batch * a.alibi_batch_stride + head] : 0;
  const int64_t bias_row = s.batch * a.bias.batch_stride + head * a.bias.head_stride + row * a.bias.row_stride;
  const Vec position = __builtin_convertvector(lane_index(), Vec);
  for_lanes(keys.end - keys.begin, [&](int64_t i, int lanes) {
    const int64_t key = keys.begin + i;
    Vec t = load_lanes(score + key - base, lanes) * a.scale;
    if (a.softcap != 0) {
      const Vec z = tanh(t * inverse);
      if (slope) store_lanes(slope + key - base, 1.0f - z * z, lanes);
      t = z * a.softcap;
    }
    if (a.bias.kind != BiasKind::none) {
      const int64_t at = bias_row + key * a.bias.key_stride;
      if (a.bias.kind == BiasKind::float32)
        t += load_bias(static_cast<const float*>(a.bias.data) + at, a.bias.key_stride, lanes);
      else if (a.bias.kind == BiasKind::bfloat16)
        t += load_bias(static_cast<const bf16*>(a.bias.data) + at, a.bias.key_stride, lanes);
      else
        t += load_bias(static_cast<const bool*>(a.bias.data) + at, a.bias.key_stride, lanes);
    }
    if (a.alibi) t -= abs(position + static_cast<float>(key - row - s.shift)) * steepness;
    store_lanes(score + key - base, t * kLog2e, lanes);
  });
}

// Lane i of the result is v's where begin <= first + i < end, and `rest` elsewhere.
BMF_INLINE Vec within(Vec v, int64_t first, KeyRange keys, float rest) {
  const int64_t skip = keys.begin - first, count = keys.end - first;
  if (skip <= 0 && count >= kLanes) return v;
  const VecI lane = lane_index();
  const int low = static_cast<int>(clamp(skip, 0, kLanes)), high = static_cast<int>(clamp(count, 0, kLanes));
  return select((lane >= low) & (lane < high), v, broadcast(rest));
}

// The choices of dropout for one query and one group of kDropoutGroup keys.
BMF_INLINE void dropout_row(const AttentionArgs& a, int64_t sequence, int64_t head, int64_t row, int64_t group,
                            uint16_t (&keep)[8]) {
  dropout_choices(a.seed, static_cast<uint32_t>(sequence * a.heads + head), static_cast<uint32_t>(row),
                  static_cast<uint32_t>(group), static_cast<uint32_t>(a.dropout * 65536.0f + 0.5f), keep);
}

}  // namespace bmf::BMF_ISA
