// bigmodel_fast::rotary_fwd, whose `inverse` makes it its own backward.
#include "cpu/rotary.h"

#include <tuple>

#include "ops/common.h"

namespace bmf {
namespace {

constexpr auto kOp = "rotary";

RotaryOperand operand(const Tensor& t, const Tensor& out, const char* name) {
  return {t.data_ptr(), out.data_ptr(), t.size(1), t.stride(0), t.stride(1), t.stride(2), kernel_dtype(t, kOp, name)};
}

RotaryTable table(const Tensor& t) {
  const bool batched = t.dim() == 3;
  return {t.data_ptr(), batched && t.size(0) > 1 ? t.stride(0) : 0, t.stride(batched ? 1 : 0)};
}

std::tuple<Tensor, Tensor> rotary_fwd(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                      bool inverse) {
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key);
  const Tensor c = with_contiguous_rows(cos), s = with_contiguous_rows(sin);
  const auto output = [](const Tensor& t) {
    return empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.scalar_type(), t);
  };
  const Tensor q_out = output(q), k_out = output(k);
  RotaryArgs args{};
  args.batch = q.size(0);
  args.sequence = q.size(2);
  args.half = q.size(3) / 2;
  args.query = operand(q, q_out, "query");
  args.key = operand(k, k_out, "key");
  args.cos = table(c);
  args.sin = table(s);
  args.table_dtype = kernel_dtype(c, kOp, "cos");
  STD_TORCH_CHECK(s.scalar_type() == c.scalar_type(), "rotary: cos and sin differ in dtype");
  args.inverse = inverse;
  rotary(args, torch_threads());
  return {torch::stable::transpose(q_out, 1, 2), torch::stable::transpose(k_out, 1, 2)};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def("rotary_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor query, Tensor key)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) { m.impl("rotary_fwd", TORCH_BOX(&bmf::rotary_fwd)); }
