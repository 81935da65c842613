// Matrix products C = sum_i A_i B_i with float sums and whatever the caller wants done to each finished tile of C.
//
// Operands are prepared once (OperandA, OperandB: converted, transposed and packed as the micro-kernel reads them),
// then tiles of C are handed out to the threads. A tile is summed in a float scratch that stays in L2 together with the
// A rows and B panels it comes from; an epilogue turns it into the output: bias, activation, conversion, derivative.
// The order of the sums depends on the shapes alone, so results are the same for any number of threads.
//
// One Zen 4 core runs the micro-kernel at its FMA peak on such tiles; what is left is packing, K N / (M N K / threads)
// of it.
#pragma once
#include "core/microkernel.h"
#include "core/packed_weights.h"
#include "core/scratch.h"
#include "core/threads.h"

namespace bmf::BMF_ISA {

constexpr int64_t kTileRows = 96, kFewestTileRows = 12, kTilePanels = 4;  // rows are halved down to the fewest
static_assert(kRows % 2 == 0 && kFewestTileRows % kRows == 0);            // strips are whole, and of row pairs
// Units of k summed in one sweep of a tile. 96 rows and 4 panels of 512 are 704 KiB, which leaves L2 (1 MiB) room for
// C; floats take half of it, because one sum of 512 of them would round off more than plain torch's.
template <class Mode>
constexpr int64_t kSweepUnits = Mode::kPerUnit == 2 ? 512 : 256;

constexpr int64_t kFewestTasks =
    20;  // tiles for each thread: the last ones leave at most a twentieth of the time unshared

BMF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BMF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BMF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The A operand, [m, k]: read in place where its memory already has the form, copied otherwise.
template <class Mode>
class OperandA {
 public:
  template <class T>
  OperandA(const Threads& threads, const MatrixView<T>& a, int64_t m, int64_t k)
      : units_(units_of<Mode>(k)), in_place_(in_place(a, k)), copy_(in_place_ ? 0 : m * padded_stride()) {
    if (in_place_) {
      data_ = reinterpret_cast<const char*>(a.data);
      stride_ = a.row_stride * static_cast<int64_t>(sizeof(T));
      return;
    }
    data_ = copy_.template at<char>(0);
    stride_ = padded_stride();
    // Blocks of rows and k, so that a transposed source is read in runs of a cache line or more.
    const int64_t row_blocks = ceil_div(m, kCopyRows), unit_blocks = ceil_div(units_, kCopyUnits);
    parallel_shares(threads, row_blocks * unit_blocks, [&](int64_t task, int) {
      const int64_t row = task / unit_blocks * kCopyRows, unit = task % unit_blocks * kCopyUnits;
      const int64_t from = unit * Mode::kPerUnit, units = smaller(kCopyUnits, units_ - unit);
      const int64_t elements = smaller(units * Mode::kPerUnit, k - from);
      const MatrixView<T> part{a.at(0, from), a.row_stride, a.col_stride};
      const int rows = static_cast<int>(smaller(kCopyRows, m - row));
      pack_rows<Mode>(part, elements, row, rows, copy_.template at<float>(row * stride_ + unit * 4), stride_ / 4);
    });
  }

  const char* row(int64_t r) const { return data_ + r * stride_; }
  int64_t stride() const { return stride_; }  // bytes
  int64_t units() const { return units_; }

 private:
  static constexpr int64_t kCopyRows = 64, kCopyUnits = 256;

  template <class T>
  static bool in_place(const MatrixView<T>& a, int64_t k) {
    return sizeof(T) == sizeof(typename Mode::Element) && a.col_stride == 1 && k % Mode::kPerUnit == 0;
  }
  int64_t padded_stride() const { return (units_ + 16) * 4; }  // rows a power of two apart would share cache sets

  int64_t units_;
  bool in_place_;
  Scratch copy_;
  const char* data_;
  int64_t stride_;
};

// The B operand, [k, n], in panels. Several sources of one shape are interleaved panel by panel.
template <class Mode>
class OperandB {
 public:
  // To be filled by the caller at place(), with whole units and whole registers.
  OperandB(int64_t k, int64_t n) : OperandB(k, n, 1, {}) {}

  template <class T, class... More>
  OperandB(const Threads& threads, int64_t k, int64_t n, const MatrixView<T>& first, const More&... more)
      : OperandB(k, n, 1 + sizeof...(more), {}) {
    const MatrixView<T> sources[] = {first, more...};
    pack(threads, sources, k);
  }

  // The same of weights (one or two), packed once for as long as they are held.
  template <class T, class... More>
  static OperandB of_weights(const Threads& threads, int64_t k, int64_t n, const MatrixView<T>& first,
                             const More&... more) {
    return OperandB(OfWeights{}, threads, k, n, first, more...);
  }

  // Where a register of columns from `col` on stands, of the unit that `row` begins.
  float* place(int64_t row, int64_t col) const {
    return packed_ + (col / kPanel * units_ + row / Mode::kPerUnit) * kPanel + col % kPanel;
  }
  const float* panel(int64_t index) const { return packed_ + index * units_ * kPanel; }
  int columns(int64_t index) const { return static_cast<int>(smaller(kPanel, columns_ - index / sources_ * kPanel)); }
  int64_t count() const { return ceil_div(columns_, kPanel) * sources_; }
  int64_t units() const { return units_; }

 private:
  struct OfWeights {};
  template <class T>
  static constexpr char kLayout = 0;  // of which the address counts

  OperandB(int64_t k, int64_t n, int64_t sources, const PackedForm& form)
      : units_(units_of<Mode>(k)),
        columns_(n),
        sources_(sources),
        held_(form, bytes()),
        own_(held_.data() ? 0 : bytes()),
        packed_(held_.data() ? static_cast<float*>(held_.data()) : own_.template at<float>(0)) {}

  template <class T, class... More>
  OperandB(OfWeights, const Threads& threads, int64_t k, int64_t n, const MatrixView<T>& first, const More&... more)
      : OperandB(k, n, 1 + sizeof...(more), form_of<T>(k, n, first, more...)) {
    if (held_.filled()) return;
    const MatrixView<T> sources[] = {first, more...};
    pack(threads, sources, k);
    held_.set_filled();
  }

  template <class T>
  static PackedForm form_of(int64_t k, int64_t n, const MatrixView<T>& first, const MatrixView<T>& second = {}) {
    return {{first.data, first.row_stride, first.col_stride},
            {second.data, second.row_stride, second.col_stride},
            k,
            n,
            &kLayout<T>};
  }

  size_t bytes() const { return static_cast<size_t>(count() * units_ * kPanel) * 4; }

  template <class T>
  void pack(const Threads& threads, const MatrixView<T>* sources, int64_t k) {
    const int64_t k_blocks = ceil_div(units_, kSweepUnits<Mode>);
    parallel_shares(threads, count() * k_blocks, [&](int64_t task, int) {
      const int64_t index = task / k_blocks, unit = task % k_blocks * kSweepUnits<Mode>;
      const int64_t from = unit * Mode::kPerUnit, col = index / sources_ * kPanel;
      const MatrixView<T>& source = sources[index % sources_];
      const MatrixView<T> part{source.at(from, 0), source.row_stride, source.col_stride};
      pack_panel<Mode>(part, smaller(kSweepUnits<Mode> * Mode::kPerUnit, k - from), col, columns(index),
                       packed_ + (index * units_ + unit) * kPanel);
    });
  }

  int64_t units_, columns_, sources_;
  PackedWeights held_;
  Scratch own_;
  float* packed_;
};

template <class Mode>
struct Product {
  const OperandA<Mode>* a;
  const OperandB<Mode>* b;
};

// A tile of C, or some finished rows of one, as an epilogue sees them.
struct Tile {
  int64_t row, rows, panel, panels;
  float* sums;  // [rows][stride]; the epilogue may use them up
  static constexpr int64_t stride = kTilePanels * kPanel;
};

// How many rows of a tile an epilogue takes at once, while their sums are in L1: those of one call of the micro-kernel,
// unless it has a number of its own.
template <class Epilogue>
constexpr int64_t kStripRows = [] {
  if constexpr (requires { Epilogue::kStripRows; })
    return Epilogue::kStripRows;
  else
    return int64_t{kRows};
}();

// Sums the products for one tile and hands it to the epilogue, strip by strip. Before a strip's last sweep of a panel,
// epilogue.prefetch(row, rows, panel) may ask for the lines of memory it is going to use.
template <class Mode, class Epilogue>
void multiply_tile(const Product<Mode>* products, int product_count, const Tile& tile, const Epilogue& epilogue) {
  constexpr int64_t kStrip = kStripRows<Epilogue>;
  bool first = true;
  for (int i = 0; i < product_count; ++i) {
    const OperandA<Mode>& a = *products[i].a;
    const OperandB<Mode>& b = *products[i].b;
    const int64_t sweeps = larger(ceil_div(a.units(), kSweepUnits<Mode>), 1);
    for (int64_t s = 0; s < sweeps; ++s) {
      const int64_t unit = a.units() * s / sweeps, units = a.units() * (s + 1) / sweeps - unit;
      const bool last = i + 1 == product_count && s + 1 == sweeps;
      const auto multiply = first ? multiply_panel<Mode, false> : multiply_panel<Mode, true>;
      for (int64_t r = 0; r < tile.rows; r += kStrip) {
        const int64_t row = tile.row + r, rows = smaller(kStrip, tile.rows - r);
        float* sums =
            tile.sums + (first && last ? 0 : r * Tile::stride);  // finished in one sweep: the next strip's too
        for (int64_t p = 0; p < tile.panels; ++p) {
          const int64_t panel = tile.panel + p;
          if constexpr (requires { epilogue.prefetch(row, rows, panel); })
            if (last) epilogue.prefetch(row, rows, panel);
          multiply({a.row(row) + unit * 4, a.stride()}, {b.panel(panel) + unit * kPanel}, units, rows, b.columns(panel),
                   sums + p * kPanel, Tile::stride);
        }
        if (last) epilogue(Tile{row, rows, tile.panel, tile.panels, sums});
      }
      first = false;
    }
  }
}

// C [m, products' panels] tile by tile; epilogue(const Tile&) runs on the thread that summed it, for some rows of a
// tile at a time and all its panels. Tiles start at panels that are multiples of `panel_multiple` (1, 2 or 4).
template <class Mode, class Epilogue>
inline void gemm(const Threads& threads, int64_t m, const Product<Mode>* products, int product_count,
                 int panel_multiple, const Epilogue& epilogue) {
  const int64_t panel_count = products[0].b->count();
  int64_t tile_rows = kTileRows, tile_panels = kTilePanels;
  auto tasks = [&] { return ceil_div(m, tile_rows) * ceil_div(panel_count, tile_panels); };
  while (tasks() < kFewestTasks * threads.count && tile_panels > panel_multiple) tile_panels /= 2;
  while (tasks() < kFewestTasks * threads.count && tile_rows > kFewestTileRows) tile_rows /= 2;
  const int64_t row_blocks = ceil_div(m, tile_rows);
  const int64_t tile_bytes = kTileRows * Tile::stride * 4;
  const Scratch tiles(tile_bytes * threads.count);
  parallel_shares(threads, tasks(), [&](int64_t task, int thread) {
    // Row blocks inside: consecutive tasks share the B panels, which are the larger part of what a tile reads.
    const int64_t panel = task / row_blocks * tile_panels, row = task % row_blocks * tile_rows;
    float* sums = tiles.at<float>(tile_bytes * thread);
    const Tile tile{row, smaller(tile_rows, m - row), panel, smaller(tile_panels, panel_count - panel), sums};
    multiply_tile(products, product_count, tile, epilogue);
  });
}

// C = A B, B weights.
template <class Mode, class TA, class TB, class Epilogue>
inline void gemm(const Threads& threads, const MatrixView<TA>& a, const MatrixView<TB>& b, int64_t m, int64_t n,
                 int64_t k, const Epilogue& epilogue) {
  const OperandB<Mode> panels = OperandB<Mode>::of_weights(threads, k, n, b);
  const OperandA<Mode> rows(threads, a, m, k);
  const Product<Mode> product{&rows, &panels};
  gemm<Mode>(threads, m, &product, 1, 1, epilogue);
}

// f(row, col, lanes, sums) for each register of the tile's columns below n.
template <class F>
BMF_INLINE void for_tile(const Tile& tile, int64_t n, const F& f) {
  const int64_t col = tile.panel * kPanel, cols = smaller(tile.panels * kPanel, n - col);
  for (int64_t r = 0; r < tile.rows; ++r)
    for_lanes(cols,
              [&](int64_t c, int lanes) { f(tile.row + r, col + c, lanes, load(tile.sums + r * Tile::stride + c)); });
}

// Asks for the lines of `rows` rows of a panel's columns, of a matrix that is about to be read (or written, if kWrite).
template <bool kWrite = true, class T>
BMF_INLINE void prefetch_panel(const T* matrix, int64_t stride, int64_t row, int64_t rows, int64_t panel) {
  constexpr int64_t kLine = 64 / sizeof(T);
  __asm__ volatile("");  // GCC removes calls of a function that does nothing but prefetch
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t c = 0; c < kPanel; c += kLine) __builtin_prefetch(matrix + r * stride + panel * kPanel + c, kWrite);
}

// An epilogue of two lambdas.
template <class Prefetch, class F>
struct PrefetchingEpilogue {
  Prefetch prefetch;
  F finish;
  void operator()(const Tile& tile) const { finish(tile); }
};
template <class Prefetch, class F>
PrefetchingEpilogue(Prefetch, F) -> PrefetchingEpilogue<Prefetch, F>;

// Epilogues that store C as T, or add it to what is there. Element (row, col) stands at out[row * stride + col], or
// transposed at out[col * stride + row]; `n`: columns of C.
template <class T, bool kAdds>
BMF_INLINE void put(T* at, Vec v, int lanes, bool first) {
  store_lanes(at, kAdds && !first ? v + load_lanes(at, lanes) : v, lanes);
}

template <class T, bool kAdds = false>
struct StoreTile {
  T* out;
  int64_t n, stride;
  bool first = true;  // kAdds: there is nothing to add to yet
  void prefetch(int64_t row, int64_t rows, int64_t panel) const { prefetch_panel(out, stride, row, rows, panel); }
  void operator()(const Tile& tile) const {
    for_tile(tile, n, [&](int64_t row, int64_t col, int lanes, Vec v) {
      put<T, kAdds>(out + row * stride + col, v, lanes, first);
    });
  }
};
template <class T>
using AddTile = StoreTile<T, true>;

template <class T, bool kAdds = false>
struct StoreTransposed {
  static constexpr int64_t kStripRows = kTileRows;  // that lines of the transpose be whole
  T* out;
  int64_t n, stride;
  bool first = true;
  void operator()(const Tile& tile) const {
    const int64_t col = tile.panel * kPanel;
    for_lanes(smaller(tile.panels * kPanel, n - col), [&](int64_t c, int cols) {
      for_lanes(tile.rows, [&](int64_t r, int rows) {
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = i < rows ? load(tile.sums + (r + i) * Tile::stride + c) : Vec{};
        transpose_units(square);
        for (int i = 0; i < cols; ++i)
          put<T, kAdds>(out + (col + c + i) * stride + tile.row + r, square[i], rows, first);
      });
    });
  }
};
template <class T>
using AddTransposed = StoreTransposed<T, true>;

}  // namespace bmf::BMF_ISA
