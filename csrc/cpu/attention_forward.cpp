// A block of queries meets the keys in blocks of kKeyBlock, in strips of kStripRows queries whose scores stay in the
// first-level cache between the product that makes them and the softmax. Maximum and sum are kept per query and the
// output is scaled when the maximum rises (Milakov and Gimelshein 2018).
//
// Keys are packed once per key head as B operands: K^T in panels of keys, V in panels of its columns. Where heads are
// many, a thread packs and computes a whole head; where they are few, all are packed first and blocks of queries are
// handed out, the longest first. Either way a query's sums are the same bits.
#include "core/schedule.h"
#include "cpu/attention_few.h"
#include "cpu/attention_softmax.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kQueryBlock = 96, kStripRows = 24;

template <class Mode, class T>
class AttentionForward {
  using Element = typename Mode::Element;
  static constexpr int64_t kSize = sizeof(Element);

 public:
  AttentionForward(const AttentionArgs& args, const Threads& threads)
      : args_(args),
        threads_(threads),
        group_(args.heads / args.key_heads),
        head_units_(units_of<Mode>(args.head_dim)),
        head_panels_(ceil_div(args.head_dim, kPanel)),
        block_units_(kKeyBlock / Mode::kPerUnit),
        q_stride_((head_units_ + 4) * 4) {
    Layout layout;
    q_at_ = layout.add(kQueryBlock * q_stride_);
    scores_at_ = layout.add(kStripRows * kKeyBlock * 4);
    weights_at_ = kSize == 4 ? scores_at_ : layout.add(kStripRows * kKeyBlock * kSize);
    out_at_ = layout.add(kQueryBlock * head_panels_ * kPanel * 4);
    stats_at_ = layout.add(kQueryBlock * 2 * 4);
    thread_bytes_ = layout.bytes();
    for (int64_t i = 0; i < args.sequence_count; ++i) most_keys_ = larger(most_keys_, args.sequences[i].keys);
    packed_bytes_ =
        ceil_div(most_keys_, kKeyBlock) * kKeyBlock * (head_units_ * 4 + head_panels_ * kPanel * 4 / Mode::kPerUnit);
  }

  void run() const {
    const int64_t heads = args_.sequence_count * args_.key_heads;
    const Scratch plan(heads * 2 * sizeof(int64_t));
    int64_t *work = plan.at<int64_t>(0), *order = work + heads, total = 0, most = 0;
    for (int64_t i = 0; i < heads; ++i) {
      const AttentionSequence& s = sequence(i);
      work[i] = i % args_.key_heads == 0 ? pairs_of(args_, s, 0, s.queries) + 1 : work[i - 1];
      total += work[i];
      most = larger(most, work[i]);
    }
    if (threads_.count > 1 && most > total / (threads_.count * kTasksPerThread)) return run_blocks(heads);
    order_by_work(work, heads, order);
    const Scratch scratch((thread_bytes_ + packed_bytes_) * threads_.count);
    parallel_tasks(threads_, heads, [&](int64_t task, int thread) {
      const int64_t head = order[task];
      const int64_t next = task + threads_.count < heads ? order[task + threads_.count] : kNoHead;
      char* mine = scratch.at<char>((thread_bytes_ + packed_bytes_) * thread);
      float* packed = reinterpret_cast<float*>(mine + thread_bytes_);
      for (int64_t b = 0; b < ceil_div(sequence(head).keys, kKeyBlock); ++b) pack(head, b, packed);
      for (int64_t h = 0; h < group_; ++h)
        for (int64_t row = 0; row < sequence(head).queries; row += kQueryBlock) block(head, h, row, packed, mine, next);
    });
  }

 private:
  const AttentionSequence& sequence(int64_t head) const { return args_.sequences[head / args_.key_heads]; }

  void run_blocks(int64_t heads) const {
    const int64_t key_blocks = ceil_div(most_keys_, kKeyBlock);
    const Scratch packed(packed_bytes_ * heads), scratch(thread_bytes_ * threads_.count);
    auto packed_head = [&](int64_t head) { return packed.at<float>(packed_bytes_ * head); };
    parallel_tasks(threads_, heads * key_blocks, [&](int64_t task, int) {
      const int64_t head = task / key_blocks, b = task % key_blocks;
      if (b * kKeyBlock < sequence(head).keys) pack(head, b, packed_head(head));
    });
    int64_t count = 0;
    for (int64_t i = 0; i < heads; ++i) count += group_ * ceil_div(sequence(i).queries, kQueryBlock);
    struct Task {
      int64_t head, member, row;
    };
    const Scratch plan(count * (sizeof(Task) + 2 * sizeof(int64_t)));
    Task* tasks = plan.at<Task>(0);
    int64_t *work = reinterpret_cast<int64_t*>(tasks + count), *order = work + count, at = 0;
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t row = 0; row < sequence(i).queries; row += kQueryBlock) {
        const AttentionSequence& s = sequence(i);
        const int64_t pairs = pairs_of(args_, s, row, smaller(kQueryBlock, s.queries - row));
        for (int64_t member = 0; member < group_; ++member) {
          work[at] = pairs;
          tasks[at++] = {i, member, row};
        }
      }
    order_by_work(work, count, order);
    parallel_tasks(threads_, count, [&](int64_t task, int thread) {
      const Task& t = tasks[order[task]];
      block(t.head, t.member, t.row, packed_head(t.head), scratch.at<char>(thread_bytes_ * thread), kNoHead);
    });
  }

  float* key_panel(float* packed, int64_t key) const { return packed + key * head_units_; }
  float* value_panel(float* packed, int64_t key_block, int64_t panel) const {
    float* values = packed + ceil_div(most_keys_, kKeyBlock) * kKeyBlock * head_units_;
    return values + (key_block * head_panels_ + panel) * block_units_ * kPanel;
  }

  void pack(int64_t head, int64_t key_block, float* packed) const {
    const AttentionSequence& s = sequence(head);
    const int64_t key_head = head % args_.key_heads, key = key_block * kKeyBlock;
    const int64_t count = smaller(kKeyBlock, s.keys - key);
    const T* k = rows_of<const T>(args_.key, s, s.key_first + key, key_head);
    const T* v = rows_of<const T>(args_.value, s, s.key_first + key, key_head);
    for (int64_t p = 0; p < count; p += kPanel)
      pack_panel<Mode>(MatrixView<T>{k, 1, args_.key.row_stride}, args_.head_dim, p,
                       static_cast<int>(smaller(kPanel, count - p)), key_panel(packed, key + p));
    for (int64_t p = 0; p < head_panels_; ++p)
      pack_panel<Mode>(MatrixView<T>{v, args_.value.row_stride, 1}, count, p * kPanel, columns(p),
                       value_panel(packed, key_block, p));
  }

  int columns(int64_t panel) const { return static_cast<int>(smaller(kPanel, args_.head_dim - panel * kPanel)); }

  // Queries [row, row + kQueryBlock) of one head, as far as there are so many.
  void block(int64_t key_head, int64_t member, int64_t row, float* packed, char* mine, int64_t next) const {
    const AttentionSequence& s = sequence(key_head);
    const int64_t head = key_head % args_.key_heads * group_ + member, rows = smaller(kQueryBlock, s.queries - row);
    const int64_t out_stride = head_panels_ * kPanel;
    char* q = mine + q_at_;
    float *out = reinterpret_cast<float*>(mine + out_at_), *top = reinterpret_cast<float*>(mine + stats_at_);
    float* total = top + kQueryBlock;
    const T* from = rows_of<const T>(args_.query, s, s.query_first + row, head);
    pack_rows<Mode>(MatrixView<T>{from, args_.query.row_stride, 1}, args_.head_dim, 0, static_cast<int>(rows),
                    reinterpret_cast<float*>(q), q_stride_ / 4);
    __builtin_memset(out, 0, rows * out_stride * 4);
    for (int64_t r = 0; r < rows; ++r) top[r] = -kInfinity, total[r] = 0;

    const KeyRange seen = keys_of(args_, s, row, rows);
    const int64_t first_block = seen.begin / kKeyBlock * kKeyBlock;
    for (int64_t key = first_block; key < seen.end; key += kKeyBlock)
      for (int64_t r = 0; r < rows; r += kStripRows) {
        const Strip strip{s,   key_head / args_.key_heads,          head,  row + r, smaller(kStripRows, rows - r),
                          key, key == first_block ? next : kNoHead, member};
        const KeyRange keys = keys_of(args_, s, strip.row, strip.rows);
        if (keys.begin >= key + kKeyBlock || keys.end <= key || keys.empty()) continue;
        with_bool(args_.dropout > 0, [&](auto dropout) {
          attend<decltype(dropout)::value>(strip, q + r * q_stride_, packed, mine, out + r * out_stride, top + r,
                                           total + r);
        });
      }

    T* to = rows_of<T>(args_.out, s, s.query_first + row, head);
    RowStats* stats = args_.stats + (s.batch * args_.heads + head) * args_.stats_rows + s.query_first + row;
    finish_rows(args_, rows, out, out_stride, top, total, to, args_.out.row_stride, stats);
  }

  void prefetch(int64_t key_head, int64_t member, int64_t row) const {
    const AttentionSequence& s = sequence(key_head);
    const int64_t of_keys = key_head % args_.key_heads, dim = args_.head_dim;
    if (row < s.queries) prefetch_row<T>(args_.query, s, s.query_first + row, of_keys * group_ + member, dim);
    if (member > 0 || row >= s.keys) return;
    prefetch_row<T>(args_.key, s, s.key_first + row, of_keys, dim);
    prefetch_row<T>(args_.value, s, s.key_first + row, of_keys, dim);
  }

  struct Strip {
    const AttentionSequence& s;
    int64_t sequence, head, row, rows, key;  // `rows` queries from `row`, and kKeyBlock keys from `key`
    int64_t next, member;                    // a key head to prefetch, and which of its queries
  };

  template <bool kDropout>
  void attend(const Strip& strip, const char* q, float* packed, char* mine, float* out, float* top,
              float* total) const {
    const AttentionSequence& s = strip.s;
    float* scores = reinterpret_cast<float*>(mine + scores_at_);
    Element* weights = reinterpret_cast<Element*>(mine + weights_at_);
    const KeyRange keys = keys_of(args_, s, strip.row, strip.rows);
    const int64_t last = smaller(keys.end - strip.key, kKeyBlock), out_stride = head_panels_ * kPanel;
    for (int64_t p = (keys.begin > strip.key ? keys.begin - strip.key : 0) / kPanel * kPanel; p < last; p += kPanel)
      multiply_scores<Mode>(args_, s, strip.row, strip.rows, {q, q_stride_}, key_panel(packed, strip.key + p),
                            head_units_, strip.key + p, scores + p, kKeyBlock);

    auto seen = [&](int64_t r, int64_t n) {
      const KeyRange of = keys_of(args_, s, strip.row + r, n);
      return KeyRange{clamp(of.begin - strip.key, 0, kKeyBlock), clamp(of.end - strip.key, 0, kKeyBlock)};
    };
    const Softmax softmax{args_, strip.sequence, strip.head, logit_factor(args_)};
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int64_t first = r / kRows * kRows;
      const KeyRange written = seen(first, smaller(kRows, strip.rows - first)), own = seen(r, 1);
      if (strip.next != kNoHead) prefetch(strip.next, strip.member, strip.row + r);
      float* score = scores + r * kKeyBlock;
      if (modifies(args_) && !own.empty())
        modify_scores(args_, s, strip.head, strip.row + r, {own.begin + strip.key, own.end + strip.key}, strip.key,
                      score, nullptr);
      const float scale = softmax.template row<kDropout>(strip.row + r, strip.key, own, written, score,
                                                         weights + r * kKeyBlock, top[r], total[r]);
      if (scale != 1.0f) {
        float* o = out + r * out_stride;
        for (int64_t c = 0; c < args_.head_dim; c += kLanes) store(o + c, load(o + c) * scale);
      }
    }

    auto units = [&](int64_t r, int64_t n) {
      const KeyRange of = seen(r, n);
      return of.empty() ? KeyRange{0, 0} : KeyRange{of.begin / Mode::kPerUnit, units_of<Mode>(of.end)};
    };
    for_runs(strip.rows, units, [&](int64_t r, int64_t n, KeyRange of) {
      for (int64_t p = 0; p < head_panels_; ++p)
        multiply_panel<Mode, true>({weights + r * kKeyBlock + of.begin * Mode::kPerUnit, kKeyBlock * kSize},
                                   {value_panel(packed, strip.key / kKeyBlock, p) + of.begin * kPanel},
                                   of.end - of.begin, n, columns(p), out + r * out_stride + p * kPanel, out_stride);
    });
  }

  const AttentionArgs& args_;
  const Threads& threads_;
  const int64_t group_, head_units_, head_panels_, block_units_, q_stride_;  // q_stride_ in bytes
  int64_t q_at_, scores_at_, weights_at_, out_at_, stats_at_, thread_bytes_, packed_bytes_, most_keys_ = 0;
};

}  // namespace

void attention_forward(const AttentionArgs& args, const Threads& threads) {
  if (args.sequence_count == 0 || args.heads == 0) return;
  if (takes_few(args)) return attend_few(args, threads);
  if (args.dtype == Dtype::float32)
    AttentionForward<FloatMode, float>(args, threads).run();
  else
    AttentionForward<Bf16Mode, bf16>(args, threads).run();
}

}  // namespace bmf::BMF_ISA
