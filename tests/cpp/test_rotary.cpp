// rotary in both directions, on heads as a projection leaves them, with a table for all examples or one for each.
#include "cpu/rotary.h"
#include "testing.h"

using namespace testing;

namespace {

struct Case {
  int64_t batch, sequence, query_heads, key_heads, half;
  Dtype dtype, table;
  bool inverse, shared_table;
};

void check(const Threads& threads, const Case& c) {
  const int64_t width = 2 * c.half, padded = width + 1;
  const int64_t tables = c.shared_table ? 1 : c.batch;
  const Array cos = Array::normal(c.table, tables * c.sequence * width);
  const Array sin = Array::normal(c.table, tables * c.sequence * width);
  const int64_t table_stride = c.shared_table ? 0 : c.sequence * width;

  // In memory [batch, sequence, heads, D], each head one element further on than it has to be.
  const int64_t heads[] = {c.query_heads, c.key_heads};
  Array in[2], out[2];
  bmf::RotaryOperand operands[2];
  for (int t = 0; t < 2; ++t) {
    in[t] = Array::normal(c.dtype, extent(c.batch * c.sequence * heads[t], width, padded));
    out[t] = Array(c.dtype, c.batch * c.sequence * heads[t] * width);
    operands[t] = {in[t].data(), out[t].data(),     heads[t], c.sequence * heads[t] * padded,
                   padded,       heads[t] * padded, c.dtype};
  }
  bmf::rotary({c.batch,
               c.sequence,
               c.half,
               operands[0],
               operands[1],
               {cos.data(), table_stride, width},
               {sin.data(), table_stride, width},
               c.table,
               c.inverse},
              threads);

  for (int t = 0; t < 2; ++t) {
    const int64_t rows = c.batch * c.sequence * heads[t];
    Exact exact(rows, width);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = row / heads[t] % c.sequence, batch = row / heads[t] / c.sequence;
      const int64_t table = batch * table_stride + position * width;
      for (int64_t i = 0; i < c.half; ++i) {
        const int64_t first = table + i, second = first + c.half;
        const double a = in[t][row * padded + i], b = in[t][row * padded + c.half + i];
        exact.add(row * width + i, a * cos[first]);
        exact.add(row * width + i, c.inverse ? b * sin[second] : -b * sin[first]);
        exact.add(row * width + c.half + i, b * cos[second]);
        exact.add(row * width + c.half + i, c.inverse ? -a * sin[first] : a * sin[second]);
      }
    }
    CHECK_CLOSE(out[t], exact, Dtype::float32);
  }
}

}  // namespace

int main() {
  for_each_isa([&](const Threads& threads) {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
      for (const Dtype table : {Dtype::float32, Dtype::bfloat16})
        for (const bool inverse : {false, true}) {
          check(threads, {1, 1, 1, 1, 1, dtype, table, inverse, true});
          check(threads, {2, 3, 4, 2, 5, dtype, table, inverse, false});
          check(threads, {2, 70, 3, 1, 33, dtype, table, inverse, true});
          check(threads, {0, 3, 2, 2, 4, dtype, table, inverse, true});
        }
  });
  return result();
}
