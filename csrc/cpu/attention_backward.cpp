// A thread takes one key head, or a run of its key blocks where heads are few, and goes through the query heads that
// share it: blocks of keys meet blocks of queries.
//
//   S = Q K^T and dP = dO V^T, panel by panel and strip by strip, so that both stay in the first-level cache until
//   P = 2^(S - top) / sum and dS = P (dP - delta) are made of them, each written once as the operand of a product to
//   come: dV += P^T dO,  dK += dS^T Q,  dQ += dS K
//
// K^T and V^T are packed once for all queries. Floats need no other packing: Q, dO and K are read where they lie, by
// rows for S and dP and as panels for the sums over rows, and P^T and dS^T are P and dS read with strides exchanged.
// Pairs of bf16 run along k: there the panels are packed, and dS is written twice.
//
// All sums are float. dQ of a head that is divided among threads is summed per part, and the parts in order, so a
// gradient is the same bits from run to run; of dQ they depend on how many parts the number of threads asks for.
#include "core/schedule.h"
#include "cpu/attention_few.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_softmax.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kKeys = 128, kQueries = 192, kStrip = 48;  // a block of keys, of queries, a strip of queries
static_assert(kKeys == kDropoutGroup && kQueries % kStrip == 0);

template <class Mode, class T>
class AttentionBackward {
  using Element = typename Mode::Element;
  static constexpr int64_t kSize = sizeof(Element), kPerUnit = Mode::kPerUnit;
  static constexpr int64_t kQueryUnits = kQueries / kPerUnit;

 public:
  AttentionBackward(const AttentionArgs& args, const Threads& threads)
      : args_(args),
        threads_(threads),
        group_(args.heads / args.key_heads),
        dim_(args.head_dim),
        head_units_(units_of<Mode>(args.head_dim)),
        head_panels_(ceil_div(args.head_dim, kPanel)),
        sum_stride_(ceil_div(args.head_dim, kLanes) * kLanes) {
    for (int64_t i = 0; i < args.sequence_count; ++i) {
      const AttentionSequence& s = args.sequences[i];
      query_blocks_ = larger(query_blocks_, ceil_div(s.queries, kQueries));
      key_blocks_ = larger(key_blocks_, ceil_div(s.keys, kKeys));
    }
    Layout block;  // of queries, packed
    q_rows_at_ = block.add(kQueries * copied_row_bytes<Mode>(dim_));
    g_rows_at_ = block.add(kQueries * copied_row_bytes<Mode>(dim_));
    q_panels_at_ = block.add(panels_bytes<Mode>(kQueries, dim_));
    g_panels_at_ = block.add(panels_bytes<Mode>(kQueries, dim_));
    stats_at_ = block.add(kQueries * 3 * 4);
    block_bytes_ = block.bytes();
    Layout layout;  // of a thread
    blocks_at_ = layout.add(block_bytes_ * query_blocks_);
    list_at_ = layout.add(sizeof(Block) * query_blocks_);
    sums_at_ = layout.add(key_blocks_ * 2 * sum_stride_ * kKeys * 4);
    k_columns_at_ = layout.add(kKeys * head_units_ * 4);
    v_columns_at_ = layout.add(kKeys * head_units_ * 4);
    k_rows_at_ = layout.add(kKeys * copied_row_bytes<Mode>(dim_));
    k_panels_at_ = layout.add(panels_bytes<Mode>(kKeys, dim_));
    scores_at_ = layout.add(kStrip * kPanel * 4);
    dp_at_ = layout.add(kStrip * kPanel * 4);
    slopes_at_ = layout.add(kStrip * kPanel * 4);
    p_at_ = layout.add(kQueryUnits * kUnitStride * 4);
    ds_at_ = layout.add(kQueryUnits * kUnitStride * 4);
    ds_rows_at_ = kPerUnit == 1 ? ds_at_ : layout.add(kQueries * kRowStride * kSize);
    keep_at_ = layout.add(kQueries * 8 * sizeof(uint16_t));
    thread_bytes_ = layout.bytes();
  }

  // Tasks are runs of key blocks of one key head, or of all key heads that add to the same gradient of the bias.
  void run() const {
    const int64_t heads = args_.sequence_count * args_.key_heads;
    const bool shared_heads = args_.bias.grad && args_.bias.grad_head_stride == 0;
    const bool shared_batch = args_.bias.grad && args_.bias.grad_batch_stride == 0;
    const bool shared_keys = args_.bias.grad && args_.bias.grad_key_stride == 0;
    int64_t total = 0;
    const Scratch plan((key_blocks_ * 2 + 1) * sizeof(int64_t) * heads);
    int64_t* work = plan.at<int64_t>(0);         // [heads][key_blocks_]
    int64_t* cuts = work + heads * key_blocks_;  // [heads][key_blocks_ + 1]
    for (int64_t i = 0; i < heads * key_blocks_; ++i) {
      const int64_t head = i / key_blocks_;
      work[i] = head % args_.key_heads == 0 ? block_work(head, i % key_blocks_) : work[i - key_blocks_];
      total += work[i];
    }
    int64_t most = 0;
    for (int64_t i = 0; i < heads; ++i) most = larger(most, sum_of(work + i * key_blocks_, key_blocks_));
    int64_t parts = 1;
    if (threads_.count > 1 && most > total / (threads_.count * kTasksPerThread) && !shared_keys)
      parts = smaller(key_blocks_, ceil_div(kPartsPerThread * threads_.count * most, larger(total, 1)));
    for (int64_t i = 0; i < heads; ++i)
      cut_evenly(work + i * key_blocks_, key_blocks_, parts, cuts + i * (key_blocks_ + 1));

    const int64_t batches_at_once = shared_batch ? args_.sequence_count : 1;
    const int64_t heads_at_once = shared_heads ? args_.key_heads : 1;
    const int64_t sets = heads / (batches_at_once * heads_at_once), head_sets = args_.key_heads / heads_at_once;
    const int64_t dq_bytes = (query_blocks_ * kQueries * sum_stride_ * 4 + 63) / 64 * 64;
    const Scratch scratch(thread_bytes_ * threads_.count);
    const Scratch dq(dq_bytes * (parts > 1 ? parts * args_.sequence_count * args_.heads : threads_.count));
    const Scratch tasks(sets * parts * 2 * sizeof(int64_t));
    int64_t *task_work = tasks.at<int64_t>(0), *order = task_work + sets * parts;

    auto for_heads = [&](int64_t set, const auto& f) {
      for (int64_t b = 0; b < batches_at_once; ++b)
        for (int64_t h = 0; h < heads_at_once; ++h)
          f((set / head_sets * batches_at_once + b) * args_.key_heads + set % head_sets * heads_at_once + h);
    };
    for (int64_t t = 0; t < sets * parts; ++t) {
      task_work[t] = 0;
      for_heads(t / parts, [&](int64_t head) {
        const int64_t* cut = cuts + head * (key_blocks_ + 1) + t % parts;
        task_work[t] += sum_of(work + head * key_blocks_ + cut[0], cut[1] - cut[0]);
      });
    }
    order_by_work(task_work, sets * parts, order);
    parallel_tasks(threads_, sets * parts, [&](int64_t t, int thread) {
      const int64_t part = order[t] % parts, after = t + threads_.count;
      const int64_t next = parts == 1 && sets == heads && after < sets ? order[after] : kNoHead;
      for_heads(order[t] / parts, [&](int64_t head) {
        const int64_t* cut = cuts + head * (key_blocks_ + 1) + part;
        char* mine = scratch.at<char>(thread_bytes_ * thread);
        auto dq_of = [&](int64_t member) {
          const int64_t index = (head * group_ + member) * parts + part;
          return dq.at<float>(dq_bytes * (parts > 1 ? index : thread));
        };
        key_head(head, cut[0], cut[1], parts == 1, mine, dq_of, next);
      });
    });
    if (parts == 1) return;
    parallel_tasks(threads_, args_.sequence_count * args_.heads * query_blocks_, [&](int64_t task, int) {
      const int64_t index = task / query_blocks_, block = task % query_blocks_, head = index / group_;
      if (block * kQueries >= sequence(head).queries) return;
      add_parts(head, index % group_, block, parts, cuts + head * (key_blocks_ + 1),
                dq.at<float>(dq_bytes * parts * index), dq_bytes / 4);
    });
  }

 private:
  // Of P and dS, [query units][kUnitStride] and [queries][kRowStride]: rows a power of two apart share cache sets.
  static constexpr int64_t kUnitStride = kKeys + 64 / 4, kRowStride = kKeys + 64 / kSize;
  // Whether the sum is part of the exponent: one rounding more of it, which is lost in what bf16 rounds off.
  static constexpr bool kFoldsSum = kSize == 2;
  static constexpr int64_t kPartsPerThread = 3;  // enough for equal parts to even out, few enough to be summed

  struct Block {  // of queries
    UnitView q_rows, g_rows;
    HeadPanels q_panels, g_panels;
    const float *top, *inverse_sum, *delta;
  };
  struct RowRange {
    int64_t begin, end;
  };

  static int64_t sum_of(const int64_t* x, int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
  }
  const AttentionSequence& sequence(int64_t key_head) const { return args_.sequences[key_head / args_.key_heads]; }
  int columns(int64_t panel) const { return static_cast<int>(smaller(kPanel, dim_ - panel * kPanel)); }

  // Queries of [row, row + rows) that see any of the keys [key, key + keys).
  RowRange queries_of(const AttentionSequence& s, int64_t row, int64_t rows, int64_t key, int64_t keys) const {
    const int64_t begin = clamp(key - args_.right - s.shift, row, row + rows);
    return {begin, clamp(smaller(key + keys, s.keys) + args_.left - s.shift, begin, row + rows)};
  }

  int64_t block_work(int64_t key_head, int64_t block) const {
    const AttentionSequence& s = sequence(key_head);
    const int64_t key = block * kKeys;
    if (key >= s.keys) return 0;
    const RowRange rows = queries_of(s, 0, s.queries, key, kKeys);
    return (rows.end - rows.begin) * smaller(kKeys, s.keys - key) + 1;
  }

  // Key blocks [first, last) of one key head. dq_of(member): where dQ of a query head is summed.
  template <class DqOf>
  void key_head(int64_t key_head, int64_t first, int64_t last, bool all_keys, char* mine, const DqOf& dq_of,
                int64_t next) const {
    const AttentionSequence& s = sequence(key_head);
    const int64_t key = first * kKeys, keys = larger(smaller(last * kKeys, s.keys) - key, 0);
    float *dv = reinterpret_cast<float*>(mine + sums_at_), *dk = dv + keys * sum_stride_;  // [keys][sum_stride_] each
    __builtin_memset(dv, 0, keys * 2 * sum_stride_ * 4);
    const RowRange rows = keys > 0 ? queries_of(s, 0, s.queries, key, keys) : RowRange{0, 0};
    const int64_t begin = rows.begin / kQueries, end = ceil_div(rows.end, kQueries);
    Block* blocks = reinterpret_cast<Block*>(mine + list_at_);
    for (int64_t member = 0; member < group_; ++member) {
      const int64_t head = key_head % args_.key_heads * group_ + member;
      float* dq = dq_of(member);
      if (begin < end)
        __builtin_memset(dq + begin * kQueries * sum_stride_, 0,
                         (smaller(end * kQueries, s.queries) - begin * kQueries) * sum_stride_ * 4);
      for (int64_t b = begin; b < end; ++b) blocks[b] = pack_queries(s, head, b, mine + blocks_at_ + b * block_bytes_);
      for (int64_t k = first; k < last && k * kKeys < s.keys; ++k) {
        const RowRange seeing = queries_of(s, 0, s.queries, k * kKeys, kKeys);
        if (seeing.begin == seeing.end) continue;
        const HeadPanels k_panels = pack_keys(s, key_head % args_.key_heads, k, mine);
        const int64_t at = (k * kKeys - key) * sum_stride_;
        for (int64_t b = seeing.begin / kQueries; b < ceil_div(seeing.end, kQueries); ++b)
          tile(s, key_head / args_.key_heads, head, b, k, blocks[b], k_panels, mine, dv + at, dk + at,
               dq + b * kQueries * sum_stride_, k == first ? next : kNoHead, member);
      }
      if (!all_keys) continue;
      for (int64_t row = 0; row < s.queries; ++row) {  // those that see no key get zeros
        const bool summed = row >= begin * kQueries && row < end * kQueries;
        write_row(rows_of<T>(args_.grad_query, s, s.query_first + row, head), args_.scale,
                  [&](int64_t c) { return summed ? load(dq + row * sum_stride_ + c) : Vec{}; });
      }
    }
    const float kept = args_.dropout > 0 ? 1.0f / (1.0f - args_.dropout) : 1.0f;
    for (int64_t k = 0; k < keys; ++k) {
      const int64_t head = key_head % args_.key_heads, row = s.key_first + key + k;
      write_row(rows_of<T>(args_.grad_value, s, row, head), kept,
                [&](int64_t c) { return load(dv + k * sum_stride_ + c); });
      write_row(rows_of<T>(args_.grad_key, s, row, head), args_.scale,
                [&](int64_t c) { return load(dk + k * sum_stride_ + c); });
    }
  }

  // `to`: block_bytes_ for what is not read in place.
  Block pack_queries(const AttentionSequence& s, int64_t head, int64_t block, char* to) const {
    const int64_t first = block * kQueries, rows = smaller(kQueries, s.queries - first);
    auto rows_at = [&](const AttentionOperand& from, int64_t at) {
      return units_of_rows<Mode>(rows_of<const T>(from, s, s.query_first + first, head), from.row_stride, rows, dim_,
                                 to + at);
    };
    auto panels_at = [&](const UnitView& of, int64_t at) {
      return panels_of_rows<Mode>(of, rows, dim_, reinterpret_cast<float*>(to + at));
    };
    const UnitView q = rows_at(args_.query, q_rows_at_), g = rows_at(args_.grad_out, g_rows_at_);
    float *top = reinterpret_cast<float*>(to + stats_at_), *inverse_sum = top + kQueries, *delta = top + 2 * kQueries;
    const RowStats* from = args_.stats + (s.batch * args_.heads + head) * args_.stats_rows + s.query_first + first;
    for (int64_t r = 0; r < smaller(rows + 1, kQueries); ++r) {  // softmax takes two at a time
      const RowStats stats = r < rows ? from[r] : RowStats{kInfinity, 0};
      top[r] = kFoldsSum && stats.inverse_sum > 0 ? stats.top - __builtin_log2f(stats.inverse_sum) : stats.top;
      inverse_sum[r] = stats.inverse_sum;
      delta[r] = 0;
      if (r >= rows) continue;
      const T* out = rows_of<const T>(args_.out, s, s.query_first + first + r, head);
      const T* grad = rows_of<const T>(args_.grad_out, s, s.query_first + first + r, head);
      Vec total{};
      for_lanes(dim_, [&](int64_t c, int lanes) {
        total = fma(load_lanes(out + c, lanes), load_lanes(grad + c, lanes), total);
      });
      delta[r] = sum(total);
    }
    return {q, g, panels_at(q, q_panels_at_), panels_at(g, g_panels_at_), top, inverse_sum, delta};
  }

  // Packs the columns of K and V; returns the panels of K.
  HeadPanels pack_keys(const AttentionSequence& s, int64_t head, int64_t block, char* mine) const {
    const int64_t first = block * kKeys, count = smaller(kKeys, s.keys - first);
    auto pack = [&](const AttentionOperand& from, int64_t at) {
      const T* data = rows_of<const T>(from, s, s.key_first + first, head);
      for (int64_t p = 0; p < count; p += kPanel)
        pack_panel<Mode>(MatrixView<T>{data, 1, from.row_stride}, dim_, p, static_cast<int>(smaller(kPanel, count - p)),
                         reinterpret_cast<float*>(mine + at) + p * head_units_);
    };
    pack(args_.key, k_columns_at_);
    pack(args_.value, v_columns_at_);
    const T* keys = rows_of<const T>(args_.key, s, s.key_first + first, head);
    return panels_of_rows<Mode>(units_of_rows<Mode>(keys, args_.key.row_stride, count, dim_, mine + k_rows_at_), count,
                                dim_, reinterpret_cast<float*>(mine + k_panels_at_));
  }

  // One block of queries with one block of keys.
  void tile(const AttentionSequence& s, int64_t sequence, int64_t head, int64_t query_block, int64_t key_block,
            const Block& q, const HeadPanels& k_panels, char* mine, float* dv, float* dk, float* dq, int64_t next,
            int64_t member) const {
    const int64_t row = query_block * kQueries, rows = smaller(kQueries, s.queries - row);
    const int64_t key = key_block * kKeys, keys = smaller(kKeys, s.keys - key);
    auto* keep = reinterpret_cast<uint16_t (*)[8]>(mine + keep_at_);
    if (args_.dropout > 0)
      for (int64_t r = 0; r < rows; ++r) dropout_row(args_, sequence, head, row + r, key_block, keep[r]);

    const float *p = reinterpret_cast<float*>(mine + p_at_), *ds = reinterpret_cast<float*>(mine + ds_at_);
    for (int64_t c = 0; c < keys; c += kPanel) {
      const RowRange seeing = queries_of(s, row, rows, key + c, kPanel);
      if (seeing.begin == seeing.end) continue;
      // Whole groups of kRows, which is even: those that dQ is multiplied in.
      const int64_t begin = (seeing.begin - row) / kRows * kRows;
      const int64_t end = smaller(ceil_div(seeing.end - row, kRows) * kRows, rows);
      const Panel panel{s, head, row, end, key + c, q, keep, c == 0 ? next : kNoHead, member};
      with_bool(modifies(args_), [&](auto modified) {
        with_bool(args_.dropout > 0, [&](auto dropout) {
          for (int64_t r = begin; r < end; r += kStrip)
            strip<decltype(modified)::value, decltype(dropout)::value>(panel, r, smaller(kStrip, end - r), c, mine);
        });
      });
      auto query_units = [&](int64_t k, int64_t n) {
        const RowRange of = queries_of(s, row, rows, key + c + k, n);
        return of.begin < of.end ? KeyRange{(of.begin - row) / kPerUnit, units_of<Mode>(of.end - row)} : KeyRange{0, 0};
      };
      for_runs(smaller(kPanel, keys - c), query_units, [&](int64_t k, int64_t n, KeyRange of) {
        auto add = [&](const float* weights, const HeadPanels& panels, float* sums) {
          for (int64_t i = 0; i < head_panels_; ++i)
            multiply_panel<Mode, true>({weights + of.begin * kUnitStride + c + k, 4, kUnitStride * 4},
                                       panels.at(i, of.begin), of.end - of.begin, n, columns(i),
                                       sums + (c + k) * sum_stride_ + i * kPanel, sum_stride_);
        };
        add(p, q.g_panels, dv);
        add(ds, q.q_panels, dk);
      });
    }

    const Element* ds_rows = reinterpret_cast<const Element*>(mine + ds_rows_at_);
    auto key_units = [&](int64_t r, int64_t n) {
      const KeyRange of = keys_of(args_, s, row + r, n);
      const int64_t begin = clamp(of.begin - key, 0, kKeys), end = clamp(of.end - key, 0, kKeys);
      return begin < end ? KeyRange{begin / kPerUnit, units_of<Mode>(end)} : KeyRange{0, 0};
    };
    for_runs(rows, key_units, [&](int64_t r, int64_t n, KeyRange of) {
      for (int64_t i = 0; i < head_panels_; ++i)
        multiply_panel<Mode, true>({ds_rows + r * kRowStride + of.begin * kPerUnit, kRowStride * kSize},
                                   k_panels.at(i, of.begin), of.end - of.begin, n, columns(i),
                                   dq + r * sum_stride_ + i * kPanel, sum_stride_);
    });
  }

  struct Panel {  // kPanel keys from `key`, and the queries of a block, of which rows below `end` take part
    const AttentionSequence& s;
    int64_t head, row, end, key;
    const Block& q;
    const uint16_t (*keep)[8];
    int64_t next, member;  // a key head to prefetch, and which of its queries
  };

  // Rows [first, first + count) of a panel, which stands at column `column` of its block of keys.
  template <bool kModified, bool kDropout>
  void strip(const Panel& panel, int64_t first, int64_t count, int64_t column, char* mine) const {
    const AttentionSequence& s = panel.s;
    const Block& q = panel.q;
    float *scores = reinterpret_cast<float*>(mine + scores_at_), *dp = reinterpret_cast<float*>(mine + dp_at_);
    float* slopes = kModified && args_.softcap != 0 ? reinterpret_cast<float*>(mine + slopes_at_) : nullptr;
    float *p_units = reinterpret_cast<float*>(mine + p_at_), *ds_units = reinterpret_cast<float*>(mine + ds_at_);
    Element* ds_rows = reinterpret_cast<Element*>(mine + ds_rows_at_);
    auto multiply = [&](const UnitView& rows, int64_t columns_at, float* out) {
      multiply_scores<Mode>(args_, s, panel.row + first, count, rows.from(first),
                            reinterpret_cast<const float*>(mine + columns_at) + column * head_units_, head_units_,
                            panel.key, out, kPanel);
    };
    multiply(q.q_rows, k_columns_at_, scores);
    multiply(q.g_rows, v_columns_at_, dp);

    const float factor = logit_factor(args_), kept = 1.0f / (1.0f - args_.dropout);
    const int64_t columns_here = smaller(kPanel, s.keys - panel.key);
    for (int64_t r = 0; r < count; r += 2) {
      KeyRange own[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t row = panel.row + first + r + i;
        if (panel.next != kNoHead) prefetch(panel.next, panel.member, row);
        own[i] = first + r + i < panel.end ? keys_of(args_, s, row) : KeyRange{0, 0};
        own[i] = {clamp(own[i].begin - panel.key, 0, kPanel), clamp(own[i].end - panel.key, 0, kPanel)};
        if (kModified && !own[i].empty())
          modify_scores(args_, s, panel.head, row, {own[i].begin + panel.key, own[i].end + panel.key}, panel.key,
                        scores + (r + i) * kPanel, slopes ? slopes + (r + i) * kPanel : nullptr);
      }
      // As far as a product reads these rows: a group of kRows, of queries or of keys, sees so many keys more.
      const int64_t low = smaller(own[0].begin, own[1].begin) - kRows, high = larger(own[0].end, own[1].end) + kRows;
      for (int64_t c = larger(low, 0) / kLanes * kLanes; c < smaller(high, columns_here); c += kLanes) {
        Vec p[2], ds[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t at = first + r + i, place = (r + i) * kPanel + c;
          p[i] = exp2<kExpTerms<Element>>(fma(load(scores + place), broadcast(factor), broadcast(-q.top[at])));
          if constexpr (!kFoldsSum) p[i] *= q.inverse_sum[at];
          p[i] = within(p[i], c, own[i], 0);
          Vec grad = load(dp + place);
          Vec weight = p[i];
          if constexpr (kDropout) {
            grad = keep_at(grad * kept, panel.keep[at], column + c);
            weight = keep_at(weight, panel.keep[at], column + c);
          }
          ds[i] = within(p[i] * (grad - q.delta[at]), c, own[i], 0);
          p[i] = weight;
          if constexpr (kModified) {
            if (args_.bias.grad) add_bias_gradient(panel, at, c, own[i], ds[i]);
            if (slopes) ds[i] = within(ds[i] * load(slopes + place), c, own[i], 0);
          }
          if (at < panel.end) store(ds_rows + at * kRowStride + column + c, ds[i]);
        }
        store_units(p_units + (first + r) / kPerUnit * kUnitStride + column + c, p);
        if constexpr (kPerUnit == 2) store_units(ds_units + (first + r) / 2 * kUnitStride + column + c, ds);
      }
    }
  }

  // Of two neighbouring queries.
  static void store_units(float* to, const Vec (&rows)[2]) {
    if constexpr (kPerUnit == 2) return store_row_pair<Mode>(to, rows[0], rows[1]);
    store(to, rows[0]);
    store(to + kUnitStride, rows[1]);
  }

  void prefetch(int64_t key_head, int64_t member, int64_t row) const {
    const AttentionSequence& s = sequence(key_head);
    const int64_t of_keys = key_head % args_.key_heads, head = of_keys * group_ + member;
    if (row < s.queries) {
      prefetch_row<T>(args_.query, s, s.query_first + row, head, dim_);
      prefetch_row<T>(args_.grad_out, s, s.query_first + row, head, dim_);
      prefetch_row<T>(args_.out, s, s.query_first + row, head, dim_);
    }
    if (member > 0 || row >= s.keys) return;
    prefetch_row<T>(args_.key, s, s.key_first + row, of_keys, dim_);
    prefetch_row<T>(args_.value, s, s.key_first + row, of_keys, dim_);
  }

  void add_bias_gradient(const Panel& panel, int64_t row, int64_t column, KeyRange own, Vec ds) const {
    const AttentionBias& bias = args_.bias;
    float* at = bias.grad + panel.s.batch * bias.grad_batch_stride + panel.head * bias.grad_head_stride +
                (panel.row + row) * bias.grad_row_stride;
    const int64_t begin = own.begin > column ? own.begin - column : 0, end = smaller(own.end - column, kLanes);
    if (bias.grad_key_stride == 0) {
      if (begin < end) *at += sum(ds);  // lanes outside are zero
      return;
    }
    at += panel.key + column;
    if (begin == 0 && end == kLanes) return store(at, load(at) + ds);
    for (int64_t i = begin; i < end; ++i) at[i] += ds[i];
  }

  // One row of a gradient: sums(c), times a factor.
  template <class Sums>
  void write_row(T* to, float factor, const Sums& sums) const {
    for_lanes(dim_, [&](int64_t c, int lanes) { store_lanes(to + c, sums(c) * factor, lanes); });
  }

  void add_parts(int64_t key_head, int64_t member, int64_t block, int64_t parts, const int64_t* cuts, const float* dq,
                 int64_t part_stride) const {
    const AttentionSequence& s = sequence(key_head);
    const int64_t head = key_head % args_.key_heads * group_ + member;
    const int64_t last = smaller((block + 1) * kQueries, s.queries);
    const Scratch list(parts * sizeof(int64_t));
    int64_t *summed = list.at<int64_t>(0), count = 0;  // the parts that have sums for this block
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t key = cuts[part] * kKeys, keys = smaller(cuts[part + 1] * kKeys, s.keys) - key;
      if (keys <= 0) continue;
      const RowRange rows = queries_of(s, 0, s.queries, key, keys);
      if (rows.begin / kQueries <= block && block < ceil_div(rows.end, kQueries)) summed[count++] = part;
    }
    for (int64_t row = block * kQueries; row < last; ++row)
      write_row(rows_of<T>(args_.grad_query, s, s.query_first + row, head), args_.scale, [&](int64_t c) {
        Vec total{};
        for (int64_t i = 0; i < count; ++i) total += load(dq + summed[i] * part_stride + row * sum_stride_ + c);
        return total;
      });
  }

  const AttentionArgs& args_;
  const Threads& threads_;
  const int64_t group_, dim_, head_units_, head_panels_, sum_stride_;  // sum_stride_: floats between rows of sums
  int64_t query_blocks_ = 0, key_blocks_ = 0;
  int64_t q_rows_at_, g_rows_at_, q_panels_at_, g_panels_at_, stats_at_, block_bytes_;
  int64_t blocks_at_, list_at_, sums_at_, k_columns_at_, v_columns_at_, k_rows_at_, k_panels_at_, scores_at_, dp_at_,
      slopes_at_, p_at_, ds_at_, ds_rows_at_, keep_at_, thread_bytes_;
};

}  // namespace

void attention_backward(const AttentionArgs& args, const Threads& threads) {
  if (args.sequence_count == 0 || args.heads == 0) return;
  if (takes_few(args) && args.bias.grad == nullptr) return attend_few_backward(args, threads);
  if (args.dtype == Dtype::float32)
    AttentionBackward<FloatMode, float>(args, threads).run();
  else
    AttentionBackward<Bf16Mode, bf16>(args, threads).run();
}

}  // namespace bmf::BMF_ISA
