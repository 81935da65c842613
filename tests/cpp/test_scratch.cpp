// The pool of working memory: alignment, reuse, the bound of what is kept, memory that outlives its scope, threads.
#include "core/scratch.h"
#include "testing.h"

using namespace testing;
using bmf::Scratch;

namespace {

constexpr size_t kMiB = size_t{1} << 20;

void* address(const Scratch& s) { return s.at<char>(0); }

void check_reuse() {
  void* first = nullptr;
  {
    const Scratch s(3 * kMiB);
    first = address(s);
    CHECK(reinterpret_cast<uintptr_t>(first) % 4096 == 0);
    std::memset(first, 1, 3 * kMiB);
  }
  const size_t kept = bmf::scratch_kept_bytes();
  CHECK(kept >= 3 * kMiB);
  {
    const Scratch again(3 * kMiB), other(3 * kMiB);
    CHECK(address(again) == first);
    CHECK(address(other) != first);
    CHECK(bmf::scratch_kept_bytes() <= kept);
  }
  const Scratch nothing(0);
  CHECK(address(nothing) != nullptr);
}

// Nothing here is touched, so no memory is really used.
void check_bound() {
  {
    const Scratch a(bmf::kScratchKeptLimit * 6 / 10), b(bmf::kScratchKeptLimit * 6 / 10);
  }
  CHECK(bmf::scratch_kept_bytes() <= bmf::kScratchKeptLimit);
  const size_t before = bmf::scratch_kept_bytes();
  {
    const Scratch too_large(bmf::kScratchKeptLimit + 1);
  }
  CHECK(bmf::scratch_kept_bytes() <= before);
  {
    std::vector<std::unique_ptr<Scratch>> many;
    for (int i = 0; i < 300; ++i) many.push_back(std::make_unique<Scratch>(40 * kMiB));
  }
  CHECK(bmf::scratch_kept_bytes() <= bmf::kScratchKeptLimit);
}

void check_release() {
  const Scratch::Held held = Scratch(5 * kMiB).release();
  CHECK(held.capacity >= 5 * kMiB);
  const Scratch other(5 * kMiB);
  CHECK(address(other) != held.data);  // it is not in the pool
  std::memset(held.data, 1, 5 * kMiB);
  const size_t before = bmf::scratch_kept_bytes();
  Scratch::give_back(held);
  CHECK(bmf::scratch_kept_bytes() != before);
  Scratch::give_back({nullptr, 0});
}

// No two holders ever see the same memory.
void check_threads() {
  struct Shared {
    bool clean[4] = {true, true, true, true};
  } shared;
  threads(4).launch(
      4,
      [](int thread, void* arg) {
        for (int i = 0; i < 200; ++i) {
          constexpr size_t kBytes = 9000;
          const Scratch s(kBytes);
          std::memset(s.at<char>(0), thread, kBytes);
          std::this_thread::yield();
          for (size_t b = 0; b < kBytes; ++b)
            if (s.at<char>(0)[b] != thread) static_cast<Shared*>(arg)->clean[thread] = false;
        }
      },
      &shared);
  for (const bool clean : shared.clean) CHECK(clean);
}

}  // namespace

int main() {
  check_reuse();
  check_bound();
  check_release();
  check_threads();
  return result();
}
