// What every operator file needs: the stable-ABI headers, torch's threads as bmf::Threads, tensor checks and
// allocation.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <optional>
#include <string>

#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's thread pool, at torch.get_num_threads() threads. Inside a parallel region everything runs on the caller.
inline Threads torch_threads() {
  auto launch = [](int count, void (*body)(int, void*), void* arg) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i), arg);
    });
  };
  return Threads{static_cast<int>(torch::stable::get_num_threads()), launch};
}

// The kernels' own dtypes. Anything else must have gone to the reference before an operator is called.
inline Dtype kernel_dtype(const Tensor& t, const char* op, const char* name) {
  if (t.scalar_type() == ScalarType::Float) return Dtype::float32;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, op, ": ", name, " must be float32 or bfloat16");
  return Dtype::bfloat16;
}

inline void check_contiguous(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

// For kernels that take any strides but for the last dimension, whose elements must lie side by side.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(-1) == 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

template <class T>
inline T* optional_data(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// y = dropout(y) + residual, of a residual [rows, width] with contiguous rows and one int64 seed.
Finish finish_of(const std::optional<Tensor>& residual, const std::optional<Tensor>& seed, double p, const char* op);
// The output's dtype: x's, or float32 if the residual is.
inline ScalarType finished_dtype(const Tensor& x, const std::optional<Tensor>& residual) {
  return residual && residual->scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type();
}

// dx [rows, width], and a residual of its dtype and shape.
InputGradient input_gradient(const Tensor& dx, bool wanted, const std::optional<Tensor>& residual, const char* op);

Activation parse_activation(const std::string& name);  // throws for an unknown name

// A tensor seen as rows of its last dimension. Leading dimensions are folded into one; where the strides allow no such
// view, `held` is a contiguous copy.
struct RowTensor {
  Tensor held;
  Rows rows;
  int64_t count, width;
};
RowTensor row_tensor(const Tensor& t, const char* op, const char* name);

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// As torch.empty for float and bfloat16, but a large tensor's memory comes from the pool of scratch memory and goes
// back there: the gradient of a large embedding is then not paid for in page faults at every step.
Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& like);

}  // namespace bmf
