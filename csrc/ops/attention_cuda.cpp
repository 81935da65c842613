// bigmodel_fast::attention_fwd_cuda and attention_bwd_cuda: what attention_fwd and attention_bwd are for CUDA tensors
// where BMF_BACKEND=native asks for it. The last argument is the current stream: bigmodel_fast/ops/_cuda.py calls them.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cuda/attention.h"
#include "ops/common.h"

namespace bmf::cuda {
namespace {

constexpr auto kOp = "attention";

using Optional = std::optional<Tensor>;
using torch::stable::new_empty;

Operand operand(const Tensor& t) {  // [B, H, S, D], or [tokens, H, D] as a batch of one
  if (t.dim() == 3) return with_vectors({t.data_ptr(), 0, t.stride(1), t.stride(0), false});
  return with_vectors({t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), false});
}

// As t in shape, in memory [B, S, H, D]: what follows reshapes heads into a row.
Tensor empty_heads(const Tensor& t) {
  if (t.dim() == 3) return new_empty(t, {t.size(0), t.size(1), t.size(2)});
  return torch::stable::transpose(new_empty(t, {t.size(0), t.size(2), t.size(1), t.size(3)}), 1, 2);
}

int32_t size_of(int64_t n) {
  STD_TORCH_CHECK(n <= kFar, kOp, ": no size may exceed 2^29 in CUDA C++, got ", n);
  return static_cast<int32_t>(n);
}

Integers integers(const Optional& t) {
  if (!t) return {nullptr, false};
  check_contiguous(*t, kOp, "a tensor of lengths");
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Long};
}

BiasKind bias_kind(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Bool: return BiasKind::boolean;
    case ScalarType::Float: return BiasKind::float32;
    case ScalarType::BFloat16: return BiasKind::bfloat16;
    case ScalarType::Half: return BiasKind::float16;
    default: STD_TORCH_CHECK(false, kOp, ": attn_mask must be bool, float32, bfloat16 or float16 in CUDA C++");
  }
  return BiasKind::none;
}

// What both passes are given. Tensors are held while the arguments point into them.
struct Call {
  Tensor query, key, value;
  AttentionArgs args{};

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& alibi_slopes,
       const Optional& key_lengths, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, const Optional& seed,
       double scale, double softcap, int64_t left, int64_t right, double dropout)
      : query(with_contiguous_rows(q)), key(with_contiguous_rows(k)), value(with_contiguous_rows(v)) {
    const bool packed = q.dim() == 3;
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, kOp,
                    ": query must be bfloat16 or float16 in CUDA C++");
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kOp,
                    ": query, key and value differ in dtype");
    STD_TORCH_CHECK(!packed || (cu_seqlens_q && cu_seqlens_k), kOp, ": packed sequences need cu_seqlens");
    args.dtype = q.scalar_type() == ScalarType::BFloat16 ? Half::bfloat16 : Half::float16;
    args.heads = size_of(q.size(1));
    args.group = size_of(q.size(1) / std::max<int64_t>(1, k.size(1)));
    args.head_dim = size_of(q.size(-1));
    args.batches = packed ? 1 : size_of(q.size(0));
    args.sequences = packed ? size_of(cu_seqlens_q->numel() - 1) : args.batches;
    args.queries = size_of(q.size(packed ? 0 : 2));
    args.keys = size_of(k.size(packed ? 0 : 2));
    args.key_lengths = integers(key_lengths);
    args.query_starts = integers(cu_seqlens_q);
    args.key_starts = integers(cu_seqlens_k);
    args.query = operand(query);
    args.key = operand(key);
    args.value = operand(value);
    args.scale = static_cast<float>(scale);
    args.softcap = static_cast<float>(softcap);
    args.left = static_cast<int32_t>(std::min<int64_t>(left, kFar));
    args.right = static_cast<int32_t>(std::min<int64_t>(right, kFar));
    args.alibi = optional_data<const float>(alibi_slopes);
    args.alibi_batch_stride = alibi_slopes && alibi_slopes->dim() == 2 ? q.size(1) : 0;
    if (bias) {  // [B, H, S_q, S_k] by expansion
      args.bias.kind = bias_kind(*bias);
      args.bias.data = bias->const_data_ptr();
      args.bias.batch_stride = bias->stride(0);
      args.bias.head_stride = bias->stride(1);
      args.bias.row_stride = bias->stride(2);
      args.bias.key_stride = bias->stride(3);
    }
    args.dropout = static_cast<float>(dropout);
    args.seed = optional_data<const int64_t>(seed);
  }

  // Two floats a query.
  Tensor new_stats() const {
    if (query.dim() == 3) return new_empty(query, {query.size(1), query.size(0), 2}, ScalarType::Float);
    return new_empty(query, {query.size(0), query.size(1), query.size(2), 2}, ScalarType::Float);
  }
};

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const Optional& bias, const Optional& alibi_slopes,
                                         const Optional& key_lengths, const Optional& cu_seqlens_q,
                                         const Optional& cu_seqlens_k, const Optional& seed, double scale,
                                         double softcap, int64_t left, int64_t right, double dropout, int64_t stream) {
  Call call(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, scale, softcap, left,
            right, dropout);
  Tensor out = empty_heads(query), stats = call.new_stats();
  call.args.out = operand(out);
  call.args.stats = static_cast<RowStats*>(stats.mutable_data_ptr());
  check_launch(attention_forward(call.args, reinterpret_cast<void*>(stream)));
  return {out, stats};
}

// `packed` and `bias_shape` as in attention_bwd (attention.cpp).
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& stats, const Optional& bias, const Optional& alibi_slopes, const Optional& key_lengths,
    const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, const Optional& seed, double scale, double softcap,
    int64_t left, int64_t right, double dropout, std::vector<int64_t> bias_shape, bool packed, int64_t stream) {
  Call call(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, scale, softcap, left,
            right, dropout);
  AttentionArgs& args = call.args;
  const Tensor grad = with_contiguous_rows(grad_out), result = with_contiguous_rows(out);
  const int64_t heads = query.size(1), key_heads = key.size(1);
  args.term_rows = (args.queries + kTermRows - 1) / kTermRows * kTermRows;
  Tensor terms = new_empty(query, {args.batches, heads, args.term_rows, 2}, ScalarType::Float);
  args.out = operand(result);
  args.stats = static_cast<RowStats*>(stats.data_ptr());
  args.grad_out = operand(grad);
  args.terms = static_cast<RowTerms*>(terms.mutable_data_ptr());
  Tensor grad_query, grad_key, grad_value;
  if (packed) {
    grad_query = new_empty(query, {query.size(0), query.size(2), heads + 2 * key_heads, query.size(3)});
    grad_key = new_empty(query, {0});
    grad_value = new_empty(query, {0});
    const Tensor by_head = torch::stable::transpose(grad_query, 1, 2);
    Tensor all = by_head;
    args.grad_query = operand(by_head);
    args.grad_key = operand(torch::stable::narrow(all, 1, heads, key_heads));
    args.grad_value = operand(torch::stable::narrow(all, 1, heads + key_heads, key_heads));
  } else {
    grad_query = empty_heads(query);
    grad_key = empty_heads(key);
    grad_value = empty_heads(value);
    args.grad_query = operand(grad_query);
    args.grad_key = operand(grad_key);
    args.grad_value = operand(grad_value);
  }
  Tensor grad_bias = new_empty(query, bias_shape.empty() ? std::vector<int64_t>{0} : bias_shape, ScalarType::Float);
  if (!bias_shape.empty()) {
    const auto same = [&](int d) { return bias_shape[static_cast<size_t>(d)] == 1 && bias->size(d) != 1; };
    args.bias.grad = static_cast<float*>(grad_bias.mutable_data_ptr());
    args.bias.same_batch = same(0);
    args.bias.same_head = same(1);
    args.bias.same_row = same(2);
    args.bias.same_key = same(3);
  }
  check_launch(attention_backward(args, reinterpret_cast<void*>(stream)));
  return {grad_query, grad_key, grad_value, grad_bias};
}

}  // namespace
}  // namespace bmf::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "attention_fwd_cuda(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, Tensor? "
      "key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, float scale, float softcap, int left, "
      "int right, float dropout, int stream) -> (Tensor out, Tensor stats)");
  m.def(
      "attention_bwd_cuda(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor stats, Tensor? "
      "bias, Tensor? alibi_slopes, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, "
      "float scale, float softcap, int left, int right, float dropout, int[] bias_shape, bool packed, int stream) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CUDA, m) {
  m.impl("attention_fwd_cuda", TORCH_BOX(&bmf::cuda::attention_fwd));
  m.impl("attention_bwd_cuda", TORCH_BOX(&bmf::cuda::attention_bwd));
}
