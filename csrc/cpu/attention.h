// attention: out = softmax(logits) V for every query, with logits over the keys it may see
//
//   logit = cap(scale q . k) + bias - slope |position of q - position of k|,   cap(x) = softcap tanh(x / softcap)
//
// (Vaswani et al. 2017; computed block by block without holding all logits, Dao 2023). A query that sees no key gives
// zeros. With p = softmax(logits), keep the dropout choices over (1 - rate), and delta = sum(dout * out) per query:
//
//   dV = (p keep)^T dout,  dlogits = p (keep dout V^T - delta),  dQ = scale cap' dlogits K,  dK = scale cap' dlogits^T
//   Q
//
// query [B, H, S_q, D], key and value [B, H_kv, S_k, D] with any strides but the last; H is a multiple of H_kv, and H /
// H_kv neighbouring heads share a key head. Packed sequences, [tokens, H, D], are a batch of one with a table of
// sequences.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

// Queries and keys that attend to each other. Query i stands at key position i + shift.
struct AttentionSequence {
  int64_t batch, query_first, key_first;  // which batch; first row of query and of key
  int64_t queries, keys, shift;
};

struct AttentionOperand {
  void* data;
  int64_t batch_stride, head_stride, row_stride;  // in elements
};

// What forward leaves of a query's softmax: with logits to base 2, weight = 2^(logit - top) inverse_sum.
struct RowStats {
  float top, inverse_sum;  // +inf and 0 for a query without keys
};

enum class BiasKind : int32_t { none, float32, bfloat16, boolean };  // boolean: true where a key may be seen

struct AttentionBias {
  BiasKind kind;
  const void* data;
  int64_t batch_stride, head_stride, row_stride, key_stride;  // 0 where it is the same for all
  float* grad;                                                // backward: d bias as a contiguous tensor, or null
  int64_t grad_batch_stride, grad_head_stride, grad_row_stride, grad_key_stride;
};

struct AttentionArgs {
  Dtype dtype;
  int64_t heads, key_heads, head_dim;
  const AttentionSequence* sequences;
  int64_t sequence_count;
  AttentionOperand query, key, value, out;
  RowStats* stats;       // of row r: stats[(batch H + head) stats_rows + r]
  int64_t stats_rows;    // rows of query in a batch
  float scale, softcap;  // softcap 0: none
  int64_t left, right;   // a query at position p sees keys p - left to p + right
  const float* alibi;    // slopes [H], or null
  int64_t alibi_batch_stride;
  AttentionBias bias;
  float dropout;  // rate, in [0, 1)
  uint64_t seed;
  // backward only
  AttentionOperand grad_out, grad_query, grad_key, grad_value;  // gradients: in the inputs' dtype
};

}  // namespace bmf

BMF_DECLARE_KERNEL(attention_forward, AttentionArgs)
BMF_DECLARE_KERNEL(attention_backward, AttentionArgs)
