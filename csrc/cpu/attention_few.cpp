// All queries that share a key head meet its keys together, so that each key and value is read once. Keys are cut into
// parts for the threads, always of kPartKeys, and the parts' results are put together in order: the same bits for any
// number of threads.
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
  // Row r of a key head's queries is query r % queries of the group's member r / queries.
  int64_t head_of(int64_t key_head, int64_t row, int64_t queries) const {
    return key_head % args_.key_heads * group_ + row / queries;
  }

  void attend(int64_t key_head, int64_t part, char* mine, char* result) const {
    const AttentionSequence& s = args_.sequences[key_head / args_.key_heads];
    const int64_t rows = s.queries * group_;
    if (rows == 0) return;
    float *q = reinterpret_cast<float*>(mine + q_at_), *scores = reinterpret_cast<float*>(mine + scores_at_);
    float *out = reinterpret_cast<float*>(result + out_at_), *top = reinterpret_cast<float*>(result + stats_at_);
    float* total = top + rows_;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = rows_of<const T>(args_.query, s, s.query_first + r % s.queries, head_of(key_head, r, s.queries));
      for_lanes(args_.head_dim, [&](int64_t c, int lanes) { store(q + r * stride_ + c, load_lanes(from + c, lanes)); });
      top[r] = -kInfinity;
      total[r] = 0;
    }
    __builtin_memset(out, 0, rows * stride_ * 4);
    const KeyRange seen = keys_of(args_, s, 0, s.queries);
    const int64_t last = smaller(seen.end, (part + 1) * kPartKeys);
    for (int64_t key = part * kPartKeys; key < last; key += kKeyBlock) {
      const KeyRange block{clamp(seen.begin - key, 0, kKeyBlock), clamp(seen.end - key, 0, kKeyBlock)};
      if (block.empty()) continue;
      score(s, key_head, key, block, rows, q, scores);
      for (int64_t r = 0; r < rows; ++r) weigh(s, key_head, r, key, block, scores, out + r * stride_, top[r], total[r]);
      add_values(s, key_head, key, block, rows, scores, out);
    }
  }

  void score(const AttentionSequence& s, int64_t key_head, int64_t key, KeyRange block, int64_t rows, const float* q,
             float* scores) const {
    const T* keys = rows_of<const T>(args_.key, s, s.key_first + key, key_head % args_.key_heads);
    for_row_groups(rows, 0, [&](int64_t first, auto count) {
      for (int64_t j = block.begin; j < block.end; ++j) {
        Vec sums[count()] = {};
        for_lanes(args_.head_dim, [&](int64_t c, int lanes) {
          const Vec k = load_lanes(keys + j * args_.key.row_stride + c, lanes);
          for (int r = 0; r < count(); ++r) sums[r] = fma(load(q + (first + r) * stride_ + c), k, sums[r]);
        });
        for (int r = 0; r < count(); ++r) scores[(first + r) * kKeyBlock + j] = sum(sums[r]);
      }
    });
  }

  // Scores of one row become weights, in place; what there is of its output is scaled to go with them.
  void weigh(const AttentionSequence& s, int64_t key_head, int64_t row, int64_t key, KeyRange block, float* scores,
             float* out, float& top, float& total) const {
    const int64_t query = row % s.queries, head = head_of(key_head, row, s.queries);
    const KeyRange of = keys_of(args_, s, query);
    const KeyRange own{clamp(of.begin - key, 0, kKeyBlock), clamp(of.end - key, 0, kKeyBlock)};
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

  void add_values(const AttentionSequence& s, int64_t key_head, int64_t key, KeyRange block, int64_t rows,
                  const float* weights, float* out) const {
    constexpr int kVecs = 4;
    const T* values = rows_of<const T>(args_.value, s, s.key_first + key, key_head % args_.key_heads);
    for (int64_t col = 0; col < args_.head_dim; col += kVecs * kLanes) {
      const int vecs = static_cast<int>(smaller(kVecs, ceil_div(args_.head_dim - col, kLanes)));
      for_row_groups(rows, 0, [&](int64_t first, auto count) {
        Vec sums[count()][kVecs];
        for (int r = 0; r < count(); ++r)
          for (int v = 0; v < kVecs; ++v)
            sums[r][v] = v < vecs ? load(out + (first + r) * stride_ + col + v * kLanes) : Vec{};
        for (int64_t j = block.begin; j < block.end; ++j)
          for (int v = 0; v < vecs; ++v) {
            const int64_t at = col + v * kLanes;
            const Vec value = load_lanes(values + j * args_.value.row_stride + at,
                                         static_cast<int>(smaller(kLanes, args_.head_dim - at)));
            for (int r = 0; r < count(); ++r)
              sums[r][v] = fma(broadcast(weights[(first + r) * kKeyBlock + j]), value, sums[r][v]);
          }
        for (int r = 0; r < count(); ++r)
          for (int v = 0; v < vecs; ++v) store(out + (first + r) * stride_ + col + v * kLanes, sums[r][v]);
      });
    }
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
      const int64_t head = head_of(key_head, r, s.queries), row = s.query_first + r % s.queries;
      finish_rows(args_, 1, out, stride_, &top, &total, rows_of<T>(args_.out, s, row, head), 0,
                  args_.stats + (s.batch * args_.heads + head) * args_.stats_rows + row);
    }
  }

  const AttentionArgs& args_;
  const Threads& threads_;
  const int64_t group_, stride_;
  int64_t rows_ = 0, parts_, q_at_, scores_at_, thread_bytes_, out_at_, stats_at_, part_bytes_;
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

}  // namespace bmf::BMF_ISA
