// The last thing that is done to an output in registers before it is stored: y = dropout(v) + residual.
#pragma once
#include "core/philox.h"

namespace bmf::BMF_ISA {

// Which columns of a row dropout keeps, and by what it scales them.
class Dropping {
 public:
  explicit Dropping(const Finish& finish)
      : scale(finish.dropout < 1 ? 1 / (1 - finish.dropout) : 0),
        seed_(finish.seed),
        threshold_(static_cast<uint32_t>(finish.dropout * 65536.0f + 0.5f)) {}

  BMF_INLINE void choose(int64_t row, int64_t group, uint16_t (&keep)[8]) const {
    dropout_choices(seed_, static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(row), static_cast<uint32_t>(group),
                    threshold_, keep);
  }

  const float scale;

 private:
  const uint64_t seed_;
  const uint32_t threshold_;
};

// Rows of y; v comes register by register, in ascending columns from a multiple of kLanes.
template <class Y>
class Finisher {
 public:
  Finisher(const Finish& finish, Y* y, int64_t y_stride)
      : finish_(finish), dropping_(finish), y_(y), y_stride_(y_stride) {}

  BMF_INLINE void store(int64_t row, int64_t col, int lanes, Vec v) {
    if (finish_.dropout > 0) {
      if (row != row_ || col / kDropoutGroup != group_) choose(row, col / kDropoutGroup);
      v = keep_at(v * dropping_.scale, keep_, col % kDropoutGroup);
    }
    if (finish_.residual.data)
      with_type(finish_.residual.dtype, [&](auto type) {
        const auto* residual = static_cast<const decltype(type)*>(finish_.residual.data);
        v += load_lanes(residual + row * finish_.residual.stride + col, lanes);
      });
    store_lanes(y_ + row * y_stride_ + col, v, lanes);
  }

 private:
  void choose(int64_t row, int64_t group) {
    row_ = row;
    group_ = group;
    dropping_.choose(row, group, keep_);
  }

  const Finish& finish_;
  const Dropping dropping_;
  Y* y_;
  int64_t y_stride_, row_ = -1, group_ = -1;
  uint16_t keep_[8];
};

}  // namespace bmf::BMF_ISA
