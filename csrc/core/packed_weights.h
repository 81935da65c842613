// Packed copies of weights that stay the same for a while.
//
// A matrix product converts and packs its weights at each call, which costs as much as the product of some fifty rows.
// Between hold_weights and release_weights of the memory a weight lies in, its packed forms are made once and found
// again. That the numbers do not change meanwhile is the caller's promise.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bmf {

// What is packed, and into which form.
struct PackedForm {
  struct Source {
    const void* data;
    int64_t row_stride, col_stride;
    bool operator==(const Source&) const = default;
  };
  Source first, second;  // of the second, data is null where there is only one
  int64_t k, n;
  const void* layout;  // an address that stands for dtype, packing and instruction set
  bool operator==(const PackedForm&) const = default;
};

// Holds may be nested; a weight stays held until each has been released. `data` is the first byte that was held.
__attribute__((visibility("default"))) void hold_weights(const void* data, size_t bytes);
__attribute__((visibility("default"))) void release_weights(const void* data);
__attribute__((visibility("default"))) size_t packed_weights_bytes();  // of all copies there are

bool weights_held(const void* data);  // whether this address lies in memory that is held

// One packed form, looked up, or allocated and then to be filled.
class PackedWeights {
 public:
  // data() is null where the sources are not held, or where another thread is filling this form.
  PackedWeights(const PackedForm& form, size_t bytes);
  void* data() const { return data_; }
  bool filled() const { return filled_; }
  void set_filled();  // by the one that found it empty

 private:
  void* data_ = nullptr;
  bool filled_ = false;
  void* entry_ = nullptr;
};

}  // namespace bmf
