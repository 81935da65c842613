// bigmodel_fast::attention_fwd and attention_bwd: schemas, allocation, the table of sequences, and the hand-over to the
// kernels.
#include "cpu/attention.h"

#include <tuple>
#include <vector>

#include "ops/common.h"

namespace bmf {
namespace {

constexpr auto kOp = "attention";

using Optional = std::optional<Tensor>;

// [B, H, S, D], or [tokens, H, D] as a batch of one.
AttentionOperand operand(const Tensor& t) {
  if (t.dim() == 3) return {t.data_ptr(), 0, t.stride(1), t.stride(0)};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// As t in shape, in memory [B, S, H, D]: what follows reshapes heads into a row.
Tensor empty_heads(const Tensor& t) {
  if (t.dim() == 3) return empty(t.sizes(), t.scalar_type(), t);
  return torch::stable::transpose(empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.scalar_type(), t), 1, 2);
}

int64_t integer(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.const_data_ptr())[i * t.stride(0)]
                                            : static_cast<const int64_t*>(t.const_data_ptr())[i * t.stride(0)];
}

std::vector<AttentionSequence> sequences(const Tensor& query, const Tensor& key, const Optional& key_lengths,
                                         const Optional& cu_seqlens_q, const Optional& cu_seqlens_k) {
  std::vector<AttentionSequence> all;
  if (query.dim() == 3) {
    STD_TORCH_CHECK(cu_seqlens_q && cu_seqlens_k, kOp, ": packed sequences need cu_seqlens");
    for (int64_t i = 0; i + 1 < cu_seqlens_q->numel(); ++i) {
      const int64_t q = integer(*cu_seqlens_q, i), k = integer(*cu_seqlens_k, i);
      const int64_t queries = integer(*cu_seqlens_q, i + 1) - q, keys = integer(*cu_seqlens_k, i + 1) - k;
      STD_TORCH_CHECK(
          q >= 0 && k >= 0 && queries >= 0 && keys >= 0 && q + queries <= query.size(0) && k + keys <= key.size(0), kOp,
          ": cu_seqlens must rise from 0 to the number of tokens");
      all.push_back({0, q, k, queries, keys, keys - queries});
    }
    return all;
  }
  const int64_t queries = query.size(2), keys = key.size(2);
  for (int64_t b = 0; b < query.size(0); ++b) {
    const int64_t present = key_lengths ? integer(*key_lengths, b) : keys;
    STD_TORCH_CHECK(present >= 0 && present <= keys, kOp, ": key_lengths must lie in [0, ", keys, "]");
    all.push_back({b, 0, 0, queries, present, keys - queries});
  }
  return all;
}

BiasKind bias_kind(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Bool) return BiasKind::boolean;
  return kernel_dtype(t, kOp, "attn_mask") == Dtype::float32 ? BiasKind::float32 : BiasKind::bfloat16;
}

// What both passes are given. Tensors are held while the arguments point into them.
struct Call {
  Tensor query, key, value;
  std::vector<AttentionSequence> table;
  AttentionArgs args{};

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& alibi_slopes,
       const Optional& key_lengths, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, const Optional& seed,
       double scale, double softcap, int64_t left, int64_t right, double dropout)
      : query(with_contiguous_rows(q)),
        key(with_contiguous_rows(k)),
        value(with_contiguous_rows(v)),
        table(sequences(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k)) {
    args.dtype = kernel_dtype(query, kOp, "query");
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kOp,
                    ": query, key and value differ in dtype");
    args.heads = q.size(1);
    args.key_heads = k.size(1);
    args.head_dim = q.size(-1);
    args.sequences = table.data();
    args.sequence_count = static_cast<int64_t>(table.size());
    args.query = operand(query);
    args.key = operand(key);
    args.value = operand(value);
    args.stats_rows = q.dim() == 3 ? q.size(0) : q.size(2);
    args.scale = static_cast<float>(scale);
    args.softcap = static_cast<float>(softcap);
    args.left = left;
    args.right = right;
    if (alibi_slopes) {
      args.alibi = static_cast<const float*>(alibi_slopes->const_data_ptr());
      args.alibi_batch_stride = alibi_slopes->dim() == 2 ? args.heads : 0;
    }
    if (bias) {  // [B, H, S_q, S_k] by expansion
      args.bias.kind = bias_kind(*bias);
      args.bias.data = bias->const_data_ptr();
      args.bias.batch_stride = bias->stride(0);
      args.bias.head_stride = bias->stride(1);
      args.bias.row_stride = bias->stride(2);
      args.bias.key_stride = bias->stride(3);
    }
    args.dropout = static_cast<float>(dropout);
    if (seed) args.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
};

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const Optional& bias, const Optional& alibi_slopes,
                                         const Optional& key_lengths, const Optional& cu_seqlens_q,
                                         const Optional& cu_seqlens_k, const Optional& seed, double scale,
                                         double softcap, int64_t left, int64_t right, double dropout) {
  Call call(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, scale, softcap, left,
            right, dropout);
  Tensor out = empty_heads(query);
  Tensor stats = query.dim() == 3 ? empty({query.size(1), query.size(0), 2}, ScalarType::Float, query)
                                  : empty({query.size(0), query.size(1), query.size(2), 2}, ScalarType::Float, query);
  call.args.out = operand(out);
  call.args.stats = static_cast<RowStats*>(stats.mutable_data_ptr());
  attention_forward(call.args, torch_threads());
  return {out, stats};
}

// Gradients of query, key and value, and of the bias if `bias_shape` is given: four sizes, 1 where it is the same for
// all. `packed`: the first three as one tensor, [B, S, H + 2 H_kv, D], in place of the first (their lengths are the
// same); that is the gradient of a projection that made all three, and needs no copy to become it.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                                                         const Tensor& value, const Tensor& out, const Tensor& stats,
                                                         const Optional& bias, const Optional& alibi_slopes,
                                                         const Optional& key_lengths, const Optional& cu_seqlens_q,
                                                         const Optional& cu_seqlens_k, const Optional& seed,
                                                         double scale, double softcap, int64_t left, int64_t right,
                                                         double dropout, std::vector<int64_t> bias_shape, bool packed) {
  Call call(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, scale, softcap, left,
            right, dropout);
  const Tensor grad = with_contiguous_rows(grad_out), result = with_contiguous_rows(out);
  const int64_t heads = query.size(1), key_heads = key.size(1);
  auto gradient_of = [&](const Tensor& t) { return packed ? empty({0}, t.scalar_type(), t) : empty_heads(t); };
  Tensor grad_query =
      packed ? empty({query.size(0), query.size(2), heads + 2 * key_heads, query.size(3)}, query.scalar_type(), query)
             : gradient_of(query);
  Tensor grad_key = gradient_of(key), grad_value = gradient_of(value);
  // Keys beyond a batch's length have no gradient, and nobody writes it.
  if (key_lengths) {
    if (packed) torch::stable::zero_(grad_query);
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
  }
  AttentionArgs& args = call.args;
  args.out = operand(result);
  args.stats = static_cast<RowStats*>(stats.data_ptr());
  args.grad_out = operand(grad);
  if (packed) {
    Tensor by_head = torch::stable::transpose(grad_query, 1, 2);
    args.grad_query = operand(by_head);
    args.grad_key = operand(torch::stable::narrow(by_head, 1, heads, key_heads));
    args.grad_value = operand(torch::stable::narrow(by_head, 1, heads + key_heads, key_heads));
  } else {
    args.grad_query = operand(grad_query);
    args.grad_key = operand(grad_key);
    args.grad_value = operand(grad_value);
  }
  Tensor bias_grad =
      bias_shape.empty() ? empty({0}, ScalarType::Float, query) : empty(bias_shape, ScalarType::Float, query);
  if (!bias_shape.empty()) {
    auto stride = [&](int64_t d) { return bias_shape[d] == 1 && bias->size(d) != 1 ? 0 : bias_grad.stride(d); };
    torch::stable::zero_(bias_grad);
    args.bias.grad = static_cast<float*>(bias_grad.mutable_data_ptr());
    args.bias.grad_batch_stride = stride(0);
    args.bias.grad_head_stride = stride(1);
    args.bias.grad_row_stride = stride(2);
    args.bias.grad_key_stride = stride(3);
  }
  attention_backward(args, torch_threads());
  return {grad_query, grad_key, grad_value, bias_grad};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, Tensor? key_lengths, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, float scale, float softcap, int left, int right, "
      "float dropout) -> (Tensor out, Tensor stats)");
  m.def(
      "attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor stats, Tensor? bias, "
      "Tensor? alibi_slopes, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, "
      "float scale, float softcap, int left, int right, float dropout, int[] bias_shape, "
      "bool packed) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&bmf::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&bmf::attention_bwd));
}
