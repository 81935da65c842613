// All queries that share a key head meet its keys together, so that each key and value is read once, and in backward
// each of their gradients written once. Keys are cut into parts for the threads, always of kPartKeys, and the parts'
// results are put together in order: the same bits for any number of threads.
#include "cpu/attention_few.h"

#include "cpu/attention_softmax.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kFewQueries = 4, kPartKeys = 1024;
constexpr int kRowsAtOnce = 4;  // whose sums are in registers together

// f(first, count) for rows in groups of kRowsAtOnce; count is a constant within f.
template <int kCount = kRowsAtOnce, class F>
BMF_INLINE void for_row_groups(int64_t rows, int64_t first, const F& f) {
  for (; first + kCount <= rows; first += kCount) f(first, std::integral_constant<int, kCount>{});
  if constexpr (kCount > 1) for_row_groups<kCount - 1>(rows, first, f);
}

// Row r of a key head's queries is query r % queries of the group's member r / queries.
int64_t head_of(const AttentionArgs& args, int64_t key_head, int64_t row, int64_t queries) {
  return key_head % args.key_heads * (args.heads / args.key_heads) + row / queries;
}

// One row of an operand, [head_dim], as floats.
template <class T>
void load_row(const AttentionArgs& args, const AttentionOperand& from, const AttentionSequence& s, int64_t key_head,
              int64_t row, float* to) {
  const T* at = rows_of<const T>(from, s, s.query_first + row % s.queries, head_of(args, key_head, row, s.queries));
  for_lanes(args.head_dim, [&](int64_t c, int lanes) { store(to + c, load_lanes(at + c, lanes)); });
}

// out[r][j] = q[r] . keys[j] for the keys j of a block; rows of q are `stride` floats apart, of out kKeyBlock.
template <class T>
void multiply_keys(const T* keys, int64_t key_stride, int64_t dim, KeyRange block, int64_t rows, const float* q,
                   int64_t stride, float* out) {
  for_row_groups(rows, 0, [&](int64_t first, auto count) {
    for (int64_t j = block.begin; j < block.end; ++j) {
      Vec sums[count()] = {};
      for_lanes(dim, [&](int64_t c, int lanes) {
        const Vec k = load_lanes(keys + j * key_stride + c, lanes);
        for (int r = 0; r < count(); ++r) sums[r] = fma(load(q + (first + r) * stride + c), k, sums[r]);
      });
      for (int r = 0; r < count(); ++r) out[(first + r) * kKeyBlock + j] = sum(sums[r]);
    }
  });
}

// out[r] += sum over the keys j of a block of weights[r][j] values[j].
template <class T>
void add_values(const T* values, int64_t value_stride, int64_t dim, KeyRange block, int64_t rows, const float* weights,
                float* out, int64_t stride) {
  constexpr int kVecs = 4;
  for (int64_t col = 0; col < dim; col += kVecs * kLanes) {
    const int vecs = static_cast<int>(smaller(kVecs, ceil_div(dim - col, kLanes)));
    for_row_groups(rows, 0, [&](int64_t first, auto count) {
      Vec sums[count()][kVecs];
      for (int r = 0; r < count(); ++r)
        for (int v = 0; v < kVecs; ++v)
          sums[r][v] = v < vecs ? load(out + (first + r) * stride + col + v * kLanes) : Vec{};
      for (int64_t j = block.begin; j < block.end; ++j)
        for (int v = 0; v < vecs; ++v) {
          const int64_t at = col + v * kLanes;
          const Vec value = load_lanes(values + j * value_stride + at, static_cast<int>(smaller(kLanes, dim - at)));
          for (int r = 0; r < count(); ++r)
            sums[r][v] = fma(broadcast(weights[(first + r) * kKeyBlock + j]), value, sums[r][v]);
        }
      for (int r = 0; r < count(); ++r)
        for (int v = 0; v < vecs; ++v) store(out + (first + r) * stride + col + v * kLanes, sums[r][v]);
    });
  }
}

// The keys of [begin, end) that lie in the block which starts at `key`, counted from there.
KeyRange in_block(KeyRange keys, int64_t key) {
  return {clamp(keys.begin - key, 0, kKeyBlock), clamp(keys.end - key, 0, kKeyBlock)};
}

template <class T>
class FewQueries {
 public:
  FewQueries(const AttentionArgs& args, const Threads& threads)
      : args_(args),
        threads_(threads),
        group_(args.heads / args.key_heads),
        stride_(ceil_div(args.head_dim, kLanes) * kLanes) {
    int64_t most_keys = 0;
    for (int64_t i = 0; i < args.sequence_count; ++i) {
      const AttentionSequence& s = args.sequences[i];
      most_keys = larger(most_keys, s.keys);
      rows_ = larger(rows_, s.queries * group_);
    }
    parts_ = most_keys > 0 ? ceil_div(most_keys, kPartKeys) : 1;
    Layout scratch;
    q_at_ = scratch.add(rows_ * stride_ * 4);
    scores_at_ = scratch.add(rows_ * kKeyBlock * 4);
    thread_bytes_ = scratch.bytes();
    Layout part;
    out_at_ = part.add(rows_ * stride_ * 4);
    stats_at_ = part.add(rows_ * 2 * 4);
    part_bytes_ = part.bytes();
  }

  void run() const {
    const int64_t heads = args_.sequence_count * args_.key_heads;
    const Scratch scratch(thread_bytes_ * threads_.count), results(part_bytes_ * heads * parts_);
    parallel_tasks(threads_, heads * parts_, [&](int64_t task, int thread) {
      attend(task / parts_, task % parts_, scratch.at<char>(thread_bytes_ * thread),
             results.at<char>(part_bytes_ * task));
    });
    parallel_ranges(threads_, heads, row_grain(rows_ * stride_ * parts_), [&](int64_t begin, int64_t end, int) {
      for (int64_t head = begin; head < end; ++head) merge(head, results.at<char>(part_bytes_ * parts_ * head));
    });
  }

 private:
  void attend(int64_t key_head, int64_t part, char* mine, char* result) const {
    const AttentionSequence& s = args_.sequences[key_head / args_.key_heads];
    const int64_t rows = s.queries * group_;
    if (rows == 0) return;
    float *q = reinterpret_cast<float*>(mine + q_at_), *scores = reinterpret_cast<float*>(mine + scores_at_);
    float *out = reinterpret_cast<float*>(result + out_at_), *top = reinterpret_cast<float*>(result + stats_at_);
    float* total = top + rows_;
    for (int64_t r = 0; r < rows; ++r) {
      load_row<T>(args_, args_.query, s, key_head, r, q + r * stride_);
      top[r] = -kInfinity;
      total[r] = 0;
    }
    __builtin_memset(out, 0, rows * stride_ * 4);
    const KeyRange seen = keys_of(args_, s, 0, s.queries);
    const int64_t last = smaller(seen.end, (part + 1) * kPartKeys);
    for (int64_t key = part * kPartKeys; key < last; key += kKeyBlock) {
      const KeyRange block = in_block(seen, key);
      if (block.empty()) continue;
      const int64_t head = key_head % args_.key_heads;
      multiply_keys(rows_of<const T>(args_.key, s, s.key_first + key, head), args_.key.row_stride, args_.head_dim,
                    block, rows, q, stride_, scores);
      for (int64_t r = 0; r < rows; ++r) weigh(s, key_head, r, key, block, scores, out + r * stride_, top[r], total[r]);
      add_values(rows_of<const T>(args_.value, s, s.key_first + key, head), args_.value.row_stride, args_.head_dim,
                 block, rows, scores, out, stride_);
    }
  }

  // Scores of one row become weights, in place; what there is of its output is scaled to go with them.
  void weigh(const AttentionSequence& s, int64_t key_head, int64_t row, int64_t key, KeyRange block, float* scores,
             float* out, float& top, float& total) const {
    const int64_t query = row % s.queries, head = head_of(args_, key_head, row, s.queries);
    const KeyRange own = in_block(keys_of(args_, s, query), key);
    float* score = scores + row * kKeyBlock;
    if (modifies(args_) && !own.empty())
      modify_scores(args_, s, head, query, {own.begin + key, own.end + key}, key, score, nullptr);
    const Softmax softmax{args_, key_head / args_.key_heads, head, logit_factor(args_)};
    float scale = 1;
    with_bool(args_.dropout > 0, [&](auto dropout) {
      scale = softmax.template row<decltype(dropout)::value>(query, key, own, block, score, score, top, total);
    });
    for (int64_t c = 0; c < stride_; c += kLanes) store(out + c, load(out + c) * scale);
  }

  // The parts of one key head put together, in the first of them, and its rows finished.
  void merge(int64_t key_head, char* results) const {
    const AttentionSequence& s = args_.sequences[key_head / args_.key_heads];
    const float factor = logit_factor(args_);
    auto out_of = [&](int64_t part, int64_t r) {
      return reinterpret_cast<float*>(results + part * part_bytes_ + out_at_) + r * stride_;
    };
    auto stats_of = [&](int64_t part, int64_t r) {
      return reinterpret_cast<float*>(results + part * part_bytes_ + stats_at_) + r;
    };
    for (int64_t r = 0; r < s.queries * group_; ++r) {
      float top = -kInfinity, total = 0;
      for (int64_t part = 0; part < parts_; ++part) top = *stats_of(part, r) > top ? *stats_of(part, r) : top;
      float* out = out_of(0, r);
      for (int64_t part = 0; part < parts_; ++part) {
        const float own = *stats_of(part, r);
        const float scale = own == top ? 1.0f : exp2<6>(broadcast((own - top) * factor))[0];
        total += stats_of(part, r)[rows_] * scale;
        for (int64_t c = 0; c < stride_; c += kLanes) {
          const Vec sum = load(out_of(part, r) + c) * scale;
          store(out + c, part == 0 ? sum : load(out + c) + sum);
        }
      }
      const int64_t head = head_of(args_, key_head, r, s.queries), row = s.query_first + r % s.queries;
      finish_rows(args_, 1, out, stride_, &top, &total, rows_of<T>(args_.out, s, row, head), 0,
                  args_.stats + (s.batch * args_.heads + head) * args_.stats_rows + row);
    }
  }

  const AttentionArgs& args_;
  const Threads& threads_;
  const int64_t group_, stride_;
  int64_t rows_ = 0, parts_, q_at_, scores_at_, thread_bytes_, out_at_, stats_at_, part_bytes_;
};

template <class T>
class FewQueriesBackward {
 public:
  FewQueriesBackward(const AttentionArgs& args, const Threads& threads)
      : args_(args), threads_(threads), stride_(ceil_div(args.head_dim, kLanes) * kLanes) {
    for (int64_t i = 0; i < args.sequence_count; ++i) {
      const AttentionSequence& s = args.sequences[i];
      parts_ = larger(parts_, ceil_div(s.keys, kPartKeys));
      rows_ = larger(rows_, s.queries * args.heads / args.key_heads);
    }
    Layout scratch;
    q_at_ = scratch.add(rows_ * stride_ * 4);
    g_at_ = scratch.add(rows_ * stride_ * 4);
    delta_at_ = scratch.add(rows_ * 4);
    scores_at_ = scratch.add(rows_ * kKeyBlock * 4);
    dp_at_ = scratch.add(rows_ * kKeyBlock * 4);
    slopes_at_ = scratch.add(kKeyBlock * 4);
    thread_bytes_ = scratch.bytes();
  }

  void run() const {
    const int64_t heads = args_.sequence_count * args_.key_heads, dq_size = rows_ * stride_;
    const Scratch scratch(thread_bytes_ * threads_.count), dq(heads * parts_ * dq_size * 4);
    parallel_tasks(threads_, heads * parts_, [&](int64_t task, int thread) {
      differentiate(task / parts_, task % parts_, scratch.at<char>(thread_bytes_ * thread),
                    dq.at<float>(task * dq_size * 4));
    });
    parallel_ranges(threads_, heads, row_grain(dq_size * parts_), [&](int64_t begin, int64_t end, int) {
      for (int64_t head = begin; head < end; ++head) write_dq(head, dq.at<float>(head * parts_ * dq_size * 4));
    });
  }

 private:
  const AttentionSequence& sequence(int64_t key_head) const { return args_.sequences[key_head / args_.key_heads]; }

  void differentiate(int64_t key_head, int64_t part, char* mine, float* dq) const {
    const AttentionSequence& s = sequence(key_head);
    const int64_t rows = s.queries * args_.heads / args_.key_heads, head = key_head % args_.key_heads;
    const int64_t dim = args_.head_dim, last = smaller(s.keys, (part + 1) * kPartKeys);
    auto floats = [&](int64_t at) { return reinterpret_cast<float*>(mine + at); };
    float *q = floats(q_at_), *g = floats(g_at_), *delta = floats(delta_at_);
    float *scores = floats(scores_at_), *dp = floats(dp_at_);
    __builtin_memset(dq, 0, rows * stride_ * 4);
    for (int64_t r = 0; r < rows; ++r) {
      float* out = dq + r * stride_;  // for a moment
      load_row<T>(args_, args_.query, s, key_head, r, q + r * stride_);
      load_row<T>(args_, args_.grad_out, s, key_head, r, g + r * stride_);
      load_row<T>(args_, args_.out, s, key_head, r, out);
      Vec total{};
      for (int64_t c = 0; c < stride_; c += kLanes) {
        total = fma(load(out + c), load(g + r * stride_ + c), total);
        store(out + c, Vec{});
      }
      delta[r] = sum(total);
    }
    for (int64_t key = part * kPartKeys; key < last; key += kKeyBlock) {
      const KeyRange block{0, smaller(kKeyBlock, last - key)};
      const T *keys = rows_of<const T>(args_.key, s, s.key_first + key, head),
              *values = rows_of<const T>(args_.value, s, s.key_first + key, head);
      multiply_keys(keys, args_.key.row_stride, dim, block, rows, q, stride_, scores);
      multiply_keys(values, args_.value.row_stride, dim, block, rows, g, stride_, dp);
      for (int64_t r = 0; r < rows; ++r)
        with_bool(args_.dropout > 0, [&](auto dropout) {
          weigh<decltype(dropout)::value>(s, key_head, r, key, delta[r], scores + r * kKeyBlock, dp + r * kKeyBlock,
                                          floats(slopes_at_));
        });
      add_values(keys, args_.key.row_stride, dim, block, rows, dp, dq, stride_);
      const float kept = 1.0f / (1.0f - args_.dropout);
      write_products(rows_of<T>(args_.grad_value, s, s.key_first + key, head), args_.grad_value.row_stride, block.end,
                     rows, scores, g, kept);
      write_products(rows_of<T>(args_.grad_key, s, s.key_first + key, head), args_.grad_key.row_stride, block.end, rows,
                     dp, q, args_.scale);
    }
  }

  // In place: scores of one row become weights, dropped or not, and dP becomes dS; zero for keys that it does not see.
  template <bool kDropout>
  void weigh(const AttentionSequence& s, int64_t key_head, int64_t row, int64_t key, float delta, float* scores,
             float* dp, float* slopes) const {
    const int64_t query = row % s.queries, head = head_of(args_, key_head, row, s.queries);
    const KeyRange own = in_block(keys_of(args_, s, query), key);
    const bool capped = args_.softcap != 0;
    if (modifies(args_) && !own.empty())
      modify_scores(args_, s, head, query, {own.begin + key, own.end + key}, key, scores, capped ? slopes : nullptr);
    const RowStats stats = args_.stats[(s.batch * args_.heads + head) * args_.stats_rows + s.query_first + query];
    const float factor = logit_factor(args_), kept = 1.0f / (1.0f - args_.dropout);
    uint16_t keep[kKeyBlock / kDropoutGroup][8];
    if constexpr (kDropout)
      for (int64_t i = 0; i < kKeyBlock / kDropoutGroup; ++i)
        dropout_row(args_, key_head / args_.key_heads, head, query, key / kDropoutGroup + i, keep[i]);
    for (int64_t c = 0; c < kKeyBlock; c += kLanes) {
      Vec p = exp2<6>(fma(load(scores + c), broadcast(factor), broadcast(-stats.top))) * stats.inverse_sum;
      p = within(p, c, own, 0);
      Vec grad = load(dp + c), weight = p;
      if constexpr (kDropout) {
        grad = keep_at(grad * kept, keep[0], c);
        weight = keep_at(weight, keep[0], c);
      }
      Vec ds = p * (grad - delta);
      if (capped) ds *= load(slopes + c);
      store(scores + c, weight);
      store(dp + c, within(ds, c, own, 0));
    }
  }

  // to[j] = factor times the sum over rows r of weights[r][j] x[r].
  void write_products(T* to, int64_t to_stride, int64_t keys, int64_t rows, const float* weights, const float* x,
                      float factor) const {
    for (int64_t j = 0; j < keys; ++j)
      for_lanes(args_.head_dim, [&](int64_t c, int lanes) {
        Vec sum{};
        for (int64_t r = 0; r < rows; ++r)
          sum = fma(broadcast(weights[r * kKeyBlock + j]), load(x + r * stride_ + c), sum);
        store_lanes(to + j * to_stride + c, sum * factor, lanes);
      });
  }

  void write_dq(int64_t key_head, const float* dq) const {
    const AttentionSequence& s = sequence(key_head);
    for (int64_t r = 0; r < s.queries * args_.heads / args_.key_heads; ++r) {
      T* to = rows_of<T>(args_.grad_query, s, s.query_first + r % s.queries, head_of(args_, key_head, r, s.queries));
      for_lanes(args_.head_dim, [&](int64_t c, int lanes) {
        Vec total{};
        for (int64_t part = 0; part < parts_; ++part) total += load(dq + (part * rows_ + r) * stride_ + c);
        store_lanes(to + c, total * args_.scale, lanes);
      });
    }
  }

  const AttentionArgs& args_;
  const Threads& threads_;
  const int64_t stride_;
  int64_t rows_ = 0, parts_ = 1, q_at_, g_at_, delta_at_, scores_at_, dp_at_, slopes_at_, thread_bytes_;
};

}  // namespace

bool takes_few(const AttentionArgs& args) {
  for (int64_t i = 0; i < args.sequence_count; ++i)
    if (args.sequences[i].queries > kFewQueries) return false;
  return true;
}

void attend_few(const AttentionArgs& args, const Threads& threads) {
  with_type(args.dtype, [&](auto type) { FewQueries<decltype(type)>(args, threads).run(); });
}

void attend_few_backward(const AttentionArgs& args, const Threads& threads) {
  with_type(args.dtype, [&](auto type) { FewQueriesBackward<decltype(type)>(args, threads).run(); });
}

}  // namespace bmf::BMF_ISA
