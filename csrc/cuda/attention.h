// attention on NVIDIA GPUs in CUDA C++, of bfloat16 and float16: the equations of cpu/attention.h.
//
// query [B, H, S_q, D], key and value [B, H_kv, S_k, D] with any strides but the last, D at most 256; H / H_kv
// neighbouring heads share a key head. Packed sequences, [tokens, H, D], are a batch of one. Query i stands at key
// position i + keys - queries of its sequence; what it sees is an interval around that.
#pragma once
#include <cstdint>

#include "cuda/half.h"

namespace bmf::cuda {

enum class BiasKind : int32_t { none, float32, bfloat16, float16, boolean };  // boolean: true where a key may be seen

struct Operand {
  void* data;
  int64_t batch_stride, head_stride, row_stride;  // in elements
  bool vectors;                                   // rows begin at multiples of 16 bytes: see with_vectors
};

// int32, or int64 if `wide`; null where absent.
struct Integers {
  const void* data;
  bool wide;
};

struct Bias {
  BiasKind kind;
  const void* data;
  int64_t batch_stride, head_stride, row_stride, key_stride;  // 0 where it is the same for all
  float* grad;                                                // contiguous, of the sizes below; or null
  bool same_batch, same_head, same_row, same_key;             // grad has size 1 there, and sums over all
};

// What backward reads of a query's softmax: with logits to base 2, weight = 2^(logit - lse). +inf: no key.
struct RowStats {
  float lse, any;  // any: 1, or 0 for a query without keys
};
struct RowTerms {  // backward's workspace, made of out and its gradient
  float lse, delta;
};

struct AttentionArgs {
  Half dtype;
  int32_t heads, group, head_dim;     // group: heads that share a key head
  int32_t batches, sequences;         // sequences: batches, or how many are packed in the only one
  int32_t queries, keys;              // rows of a batch
  Integers key_lengths;               // how many keys each batch has; those behind are never seen
  Integers query_starts, key_starts;  // of packed sequences, one more than there are
  Operand query, key, value, out;
  RowStats* stats;       // of row r: stats[(batch H + head) queries + r]
  float scale, softcap;  // softcap 0: none
  int32_t left, right;   // a query at position p sees keys p - left to p + right; at most kFar
  const float* alibi;    // slopes [H], or null
  int64_t alibi_batch_stride;
  Bias bias;
  float dropout;        // rate, in [0, 1)
  const int64_t* seed;  // on the GPU
  // backward only
  Operand grad_out, grad_query, grad_key, grad_value;
  RowTerms* terms;    // of row r: terms[(batch H + head) term_rows + r]
  int32_t term_rows;  // queries, up to a multiple of kTermRows: tiles of that many are read whole
};

constexpr int32_t kFar = 1 << 29;  // no sequence is longer
constexpr int32_t kMostDim = 256;
constexpr int32_t kTermRows = 64;

// Launch on `stream` (a cudaStream_t) of the current device, and wait for nothing. Null, or what is wrong: a line that
// begins with the operator's name and gives its shapes, valid until this thread's next call.
const char* attention_forward(const AttentionArgs& args, void* stream);
const char* attention_backward(const AttentionArgs& args, void* stream);

inline Operand with_vectors(Operand t) {
  const int64_t strides = t.batch_stride | t.head_stride | t.row_stride;
  t.vectors = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && strides % 8 == 0;
  return t;
}

}  // namespace bmf::cuda
