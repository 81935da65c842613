// What the emulated GPU has of Hopper: copies, barriers and products do as the PTX ISA says, and each fault that
// cuda_emulated_async.h lists is seen, in every order of the threads.
#include "cuda_emulator.h"
// The emulator comes first.
#include "cuda/panels.h"
#include "cuda_faults.h"

using namespace bmf::cuda;
using bmf::bf16;
using emulator::Order;
using testing::context;

namespace {

constexpr int kThreads = 2 * kGroupThreads, kRows = 64, kDim = 128;
using Tile = Panels<kDim, kRows>;
constexpr uint32_t kFirst = 0, kSecond = Tile::kBytes, kBarrier = 2 * Tile::kBytes, kOther = kBarrier + 8;
constexpr int kBytes = kBarrier + 64;
constexpr Order kOrders[] = {Order::first, Order::last, Order::random};

struct Boxes {
  void* data;
  int64_t columns, rows, heads, batches, row_bytes, head_bytes, batch_bytes;
  int box_rows;
};

float number(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 11 - 5); }

// [2 batches, 3 heads, 70 rows, 136 columns] in memory [batch, row, head, column]: each copy of it has something
// beyond.
template <class T>
struct Source {
  static constexpr int kWidth = 136, kHeads = 3, kCount = 70;
  std::vector<uint16_t> data;
  TensorMap map;

  Source() : data(2 * kCount * kHeads * kWidth) {
    for (size_t i = 0; i < data.size(); ++i) {
      const int column = static_cast<int>(i) % kWidth, rest = static_cast<int>(i) / kWidth;
      const int batch = rest / kHeads / kCount;
      data[i] =
          rounded(number(rest / kHeads % kCount, column) + static_cast<float>(8 * (rest % kHeads) + 32 * batch), T{});
    }
    CHECK(emulator::encode(map, Boxes{data.data(), kWidth, kCount, kHeads, 2, 2 * kHeads * kWidth, 2 * kWidth,
                                      2 * kCount * kHeads * kWidth, kRows}));
  }
  static float at(int batch, int head, int row, int column) {
    if (row >= kCount || column >= kWidth) return 0;
    return number(row, column) + static_cast<float>(8 * head + 32 * batch);
  }
};

void launch(Order order, const std::function<void()>& kernel) {
  emulator::launch({1}, kThreads, kBytes, order, kernel);
}

void begin(int arrivals = 1) {
  if (thread_index() == 0) {
    init_barrier(kBarrier, arrivals);
    init_barrier(kOther, 1);
    publish_barriers();
  }
  barrier();
}
template <class T>
void load(const Source<T>& source, uint32_t to, int row, int head, int batch, uint32_t at = kBarrier) {
  arrive_expecting(at, Tile::kBytes);
  Tile{to}.load(source.map, row, head, batch, at);
}

// A tile's element, as the swizzle places it.
template <class T>
float element(const Tile& tile, int row, int column) {
  const auto begin = tile.begin + static_cast<uint32_t>(column / kPanel) * Tile::kPanelBytes;
  const auto chunk = static_cast<uint32_t>(column % kPanel / kChunk ^ row % 8);
  const Words words = load_shared(begin + static_cast<uint32_t>(row) * 128 + chunk * 16);
  const int within = column % kChunk;
  return to_float(T{static_cast<uint16_t>(words.word[within / 2] >> (16 * (within % 2)))});
}

template <class T>
void test_copies_and_products() {
  static const Source<T> source;
  for (const Order order : kOrders) {
    context = "copies and products";
    launch(order, [&] {
      begin();
      if (thread_index() == 0) {
        arrive_expecting(kBarrier, 2 * Tile::kBytes);
        Tile{kFirst}.load(source.map, 5, 1, 0, kBarrier);
        Tile{kSecond}.load(source.map, 10, 2, 1, kBarrier);  // four of its rows lie beyond
      }
      wait_barrier(kBarrier, 0);
      const Tile first{kFirst}, second{kSecond};
      const auto a = [](int row, int c) { return Source<T>::at(0, 1, 5 + row, c); };
      const auto b = [](int row, int c) { return Source<T>::at(1, 2, 10 + row, c); };
      for (int i = thread_index(); i < kRows * kDim; i += kThreads) {
        CHECK(element<T>(first, i / kDim, i % kDim) == a(i / kDim, i % kDim));
        CHECK(element<T>(second, i / kDim, i % kDim) == b(i / kDim, i % kDim));
      }
      if (group_index() == 1) return;
      const int row = warp_index() * kStrip;
      float scores[1][kRows / kColumns][kPerLane], sums[1][kDim / kColumns][kPerLane] = {};
      uint32_t operand[1][kRows / kDepth][4];
      begin_products(scores);
      multiply_transposed<T>(scores, first, 0, second);
      commit_products();
      wait_products<0>(scores);
      for_sums(scores, [&](float& x, const Spot& at) {
        float expected = 0;
        for (int c = 0; c < kDim; ++c) expected += a(row + at.row, c) * b(at.column, c);
        CHECK(x == expected);
        x = number(row + at.row, at.column);
      });
      as_operand<T>(operand, scores);
      begin_products(sums, operand);
      multiply<T>(sums, operand, second);
      commit_products();
      wait_products<0>(sums, operand);
      for_sums(sums, [&](float& x, const Spot& at) {
        float expected = 0;
        for (int k = 0; k < kRows; ++k) expected += number(row + at.row, k) * b(k, at.column);
        CHECK(x == expected);
      });
    });
  }
}

// What TMA does not take.
void test_encoding() {
  context = "encoding";
  alignas(16) static uint16_t data[1024];
  TensorMap map;
  const Boxes good{data, 64, 4, 2, 1, 256, 128, 16, 64};
  CHECK(emulator::encode(map, good));
  const auto refused = [&](const std::function<void(Boxes&)>& change) {
    Boxes boxes = good;
    change(boxes);
    return !emulator::encode(map, boxes);
  };
  CHECK(refused([](Boxes& b) { b.data = data + 1; }));
  CHECK(refused([](Boxes& b) { b.row_bytes = 248; }));
  CHECK(refused([](Boxes& b) { b.heads = 0; }));
  CHECK(refused([](Boxes& b) { b.box_rows = 257; }));
  CHECK(refused([](Boxes& b) { b.batch_bytes = int64_t{1} << 40; }));
}

void test_faults_of_barriers_and_copies() {
  static const Source<bf16> source;
  const auto first = [] { return thread_index() == 0; };
  for (const Order order : kOrders) {
    const auto fails = [&](const char* message, const std::function<void()>& kernel) {
      testing::expect_failure(message, [&] { launch(order, kernel); });
    };
    fails("no barrier was made", [&] {
      begin();
      arrive(kBarrier + 16);
    });
    fails("may not be there yet", [&] {
      if (first()) init_barrier(kBarrier, 1);
      barrier();
      wait_barrier(kBarrier, 1);
    });
    fails("as data", [&] {
      begin();
      load_shared(kBarrier);
    });
    fails("more arrivals", [&] {
      begin(2);
      if (first()) {
        arrive_expecting(kBarrier, 16);
        arrive(kBarrier);
        arrive(kBarrier);
      }
    });
    fails("never come", [&] {  // one arrival too few
      begin(2);
      if (first()) arrive(kBarrier);
      wait_barrier(kBarrier, 0);
    });
    fails("never come", [&] {  // more bytes than come
      begin();
      if (first()) {
        arrive_expecting(kBarrier, Tile::kBytes + 16);
        Tile{kFirst}.load(source.map, 0, 0, 0, kBarrier);
      }
      wait_barrier(kBarrier, 0);
    });
    fails("copy to it is under way", [&] {  // nobody waits
      begin();
      if (first()) {
        load(source, kFirst, 0, 0, 0);
        load_shared(kFirst);
      }
    });
    fails("emulator: block", [&] {  // waits for the phase before: not there yet, or a race with what has come
      begin();
      if (first()) load(source, kFirst, 0, 0, 0);
      wait_barrier(kBarrier, 1);
      load_shared(kFirst);
    });
    fails("interval", [&] {  // of two that read, one says so
      begin();
      if (first()) load(source, kFirst, 0, 0, 0);
      wait_barrier(kBarrier, 0);
      if (thread_index() >= kThreads - 2) load_shared(kFirst);
      if (thread_index() == kThreads - 1) arrive(kOther);
      if (first()) {
        wait_barrier(kOther, 0);
        load(source, kFirst, 0, 0, 0);
        wait_barrier(kBarrier, 1);
      }
    });
    fails("may not see yet", [&] {  // a store before a copy
      begin();
      if (first()) {
        store_shared(kFirst, Words{});
        load(source, kFirst, 0, 0, 0);
      }
    });
    fails("multiple of 1024", [&] {
      begin();
      if (first()) load(source, kFirst + 512, 0, 0, 0);
    });
    fails("nobody waits", [&] { announce(1, kThreads); });
    fails("announced and not met", [&] {
      if (group_index() == 0) announce(1, kThreads);
    });
    fails("never come", [&] {
      if (group_index() == 0) meet(1, kThreads);
    });
    fails("differ about a barrier's count", [&] { meet(1, kWarp * (1 + thread_index() % 2)); });
  }
}

void test_faults_of_products() {
  static const Source<bf16> source;
  constexpr int kPlain = 0, kNoBegin = 1, kNoWait = 2, kSums = 3, kOperand = 4, kStore = 5, kOverwritten = 6,
                kLayout = 7, kDiffer = 8, kUsed = 9;
  for (const Order order : kOrders) {
    const auto kernel = [&](int fault) {
      return [&, fault] {
        begin();
        if (thread_index() == 0) load(source, kFirst, 0, 0, 0);
        wait_barrier(kBarrier, 0);
        if (fault == kStore && thread_index() == 0) store_shared(kFirst, Words{});
        barrier();
        if (group_index() == 1) {
          if (fault == kOverwritten && thread_index() == kGroupThreads) {
            wait_barrier(kOther, 0);
            load(source, kFirst, 0, 0, 0);
          }
          return;
        }
        float sums[1][kDim / kColumns][kPerLane] = {};
        uint32_t operand[1][kRows / kDepth][4] = {};
        Tile tile{fault == kDiffer && thread_index() == 5 ? kSecond : kFirst};
        if (fault != kNoBegin) begin_products(sums, operand);
        if (fault == kLayout)
          group_product_add<bf16, 16>(sums[0], operand[0][0], tile.down_columns(0, 0) ^ kSwizzle128);
        else
          multiply<bf16>(sums, operand, tile);
        commit_products();
        if (fault == kUsed) begin_products(sums);
        if (fault == kSums) sums[0][0][0] = 1;
        if (fault == kOperand) operand[0][0][0] = 1;
        if (fault == kOverwritten && thread_index() == 0) arrive(kOther);
        if (fault == kNoWait) return;
        wait_products<0>(sums, operand);
      };
    };
    const auto fails = [&](const char* message, int fault) {
      testing::expect_failure(message, [&] { launch(order, kernel(fault)); });
    };
    launch(order, kernel(kPlain));
    fails("without begin_products", kNoBegin);
    fails("never waited for", kNoWait);
    fails("sums change under a product", kSums);
    fails("operand changes under a product", kOperand);
    fails("a product reads a store", kStore);
    fails("written in the interval in which another thread read", kOverwritten);
    fails("another layout", kLayout);
    fails("differ about a product", kDiffer);
    fails("whose products are under way", kUsed);
  }
}

}  // namespace

int main() {
  test_encoding();
  test_copies_and_products<bf16>();
  test_copies_and_products<f16>();
  test_faults_of_barriers_and_copies();
  test_faults_of_products();
  return testing::result();
}
