#include "ops/common.h"

#include <sys/mman.h>

#include <vector>

namespace bmf {

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "sigmoid") return Activation::sigmoid;
  if (name == "tanh") return Activation::tanh;
  if (name == "relu2") return Activation::relu2;
  STD_TORCH_CHECK(false, "unknown activation '", name, "'");
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  Tensor t = torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes >= 4 * kHugePage) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + bytes) & ~(kHugePage - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure changes nothing
  }
  return t;
}

}  // namespace bmf

// The library and its namespace; every operator file adds its own schema as a fragment.
STABLE_TORCH_LIBRARY(bigmodel_fast, library) { (void)library; }
