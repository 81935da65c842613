// Samples as the first layer reads them: stored bytes or floats, distorted, normalised.
#pragma once
#include "core/gemm.h"
#include "cpu/mlp_trainer.h"

namespace bmf::BMF_ISA {

// Uniform numbers from a counter (SplitMix64, Steele et al. 2014): the same for a sample whichever thread draws them.
class Draws {
 public:
  Draws(uint64_t seed, uint64_t which)
      : state_(mix(seed + 0x9E3779B97F4A7C15u) ^ mix(which * 0xD1B54A32D192ED03u + 1)) {}
  float within(float bound) {  // in [-bound, bound)
    state_ += 0x9E3779B97F4A7C15u;
    return bound * static_cast<float>(static_cast<int64_t>(mix(state_)) >> 40) * 0x1p-23f;
  }

 private:
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

BMF_INLINE Vec gather(const float* p, VecI index) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_i32gather_ps(reinterpret_cast<__m512i>(index), p, 4));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_i32gather_ps(p, reinterpret_cast<__m256i>(index), 4));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[index[i]];
  return v;
#endif
}

BMF_INLINE Vec load_stored(const float* p, int lanes) { return load_lanes(p, lanes); }
BMF_INLINE Vec load_stored(const uint8_t* p, int lanes) {
  alignas(16) uint8_t some[kLanes] = {};
  if (lanes < kLanes) {
    __builtin_memcpy(some, p, lanes);
    p = some;
  }
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// A smooth displacement is a grid of points, of which pixel i of n takes four in each direction (cubic B-splines).
constexpr int kCells = 4, kPoints = kCells + 3;

inline void knot_weights(int64_t i, int64_t n, float* w, int64_t stride) {  // of all points: w[point * stride]
  const float at = (static_cast<float>(i) + 0.5f) * kCells / static_cast<float>(n);
  const int64_t cell = smaller(static_cast<int64_t>(at), kCells - 1);
  const float t = at - static_cast<float>(cell), s = 1 - t;
  for (int64_t k = 0; k < kPoints; ++k) w[k * stride] = 0;
  w[cell * stride] = s * s * s / 6;
  w[(cell + 1) * stride] = (3 * t * t * t - 6 * t * t + 4) / 6;
  w[(cell + 2) * stride] = (3 * s * s * s - 6 * s * s + 4) / 6;
  w[(cell + 3) * stride] = t * t * t / 6;
}

// What a thread needs to distort images of one size; made once, in memory of `floats` floats.
struct WarpMemory {
  static int64_t floats(const Augmentation* a) {
    return a ? row(*a) * (2 + kPoints) + a->height * kPoints + (a->height + 3) * (a->width + 3) + kLanes : 0;
  }
  static int64_t row(const Augmentation& a) { return a.width + kLanes; }

  WarpMemory(const Augmentation* a, float* at)
      : at_x(at),
        at_y(a ? at_x + row(*a) : at),
        across(a ? at_y + row(*a) : at),
        down(a ? across + kPoints * row(*a) : at),
        padded(a ? down + a->height * kPoints : at) {}
  void prepare(const Augmentation& a) const {
    for (int64_t i = 0; i < kPoints * row(a); ++i) across[i] = 0;
    for (int64_t x = 0; x < a.width; ++x) knot_weights(x, a.width, across + x, row(a));
    for (int64_t y = 0; y < a.height; ++y) knot_weights(y, a.height, down + y * kPoints, 1);
  }

  float *at_x, *at_y;  // sources of a row of pixels
  float* across;       // [kPoints][row]: what pixels take of each point
  float* down;         // [height][kPoints]
  float* padded;       // [height + 3][width + 3]: an image with its surroundings
};

// Where the pixels of one sample come from.
class Warp {
 public:
  Warp(const Augmentation& a, Draws draws) : of_(a), elastic_(a.elastic > 0) {
    const float turn = draws.within(a.rotate) * 0.017453292519943295f;
    const float zoom = 1 / (1 + draws.within(a.scale));
    cos_ = __builtin_cosf(turn) * zoom;
    sin_ = __builtin_sinf(turn) * zoom;
    center_x_ = 0.5f * static_cast<float>(a.width - 1);
    center_y_ = 0.5f * static_cast<float>(a.height - 1);
    dx_ = draws.within(a.shift);
    dy_ = draws.within(a.shift);
    if (!elastic_) return;
    // A uniform number on [-b, b] has deviation b / sqrt(3), and a pixel takes sums of 16 with weights whose squares
    // add up to 0.23 on average.
    const float bound = a.elastic * 1.7320508f / 0.48f;
    for (auto& grid : grid_)
      for (float& point : grid) point = draws.within(bound);
  }

  // Source coordinates of output row y, in pixels.
  void row(int64_t y, const WarpMemory& memory) const {
    const float v = static_cast<float>(y) - center_y_;
    const float from_x = sin_ * v + center_x_ - dx_, from_y = cos_ * v + center_y_ - dy_;
    float blend[2][kPoints] = {};
    for (int g = 0; elastic_ && g < 2; ++g)
      for (int i = 0; i < kPoints; ++i)
        for (int k = 0; k < kPoints; ++k) blend[g][i] += memory.down[y * kPoints + k] * grid_[g][k * kPoints + i];
    Vec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
    for_lanes(of_.width, [&](int64_t x, int) {
      const Vec u = lane + (static_cast<float>(x) - center_x_);
      Vec at_x = fma(u, broadcast(cos_), broadcast(from_x)), at_y = fma(u, broadcast(-sin_), broadcast(from_y));
      for (int i = 0; elastic_ && i < kPoints; ++i) {
        const Vec share = load(memory.across + i * WarpMemory::row(of_) + x);
        at_x = fma(share, broadcast(blend[0][i]), at_x);
        at_y = fma(share, broadcast(blend[1][i]), at_y);
      }
      store(memory.at_x + x, at_x);
      store(memory.at_y + x, at_y);
    });
  }

 private:
  const Augmentation& of_;
  bool elastic_;
  float cos_, sin_, center_x_, center_y_, dx_, dy_;
  float grid_[2][kPoints * kPoints];
};

// An image as `warp` moves it, sampled bilinearly; beyond its edge it is `fill`.
template <class T>
void warp_image(const Augmentation& a, const Warp& warp, const T* image, float* out, const WarpMemory& memory) {
  const int64_t stride = a.width + 3, plane = a.height * a.width;
  float* padded = memory.padded;
  const float last_x = static_cast<float>(a.width), last_y = static_cast<float>(a.height);
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int64_t i = 0; i < (a.height + 3) * stride; ++i) padded[i] = a.fill;
    for (int64_t y = 0; y < a.height; ++y)
      for_lanes(a.width, [&](int64_t x, int lanes) {
        store_lanes(padded + (y + 1) * stride + 1 + x, load_stored(image + c * plane + y * a.width + x, lanes), lanes);
      });
    for (int64_t y = 0; y < a.height; ++y) {
      warp.row(y, memory);
      for_lanes(a.width, [&](int64_t x, int lanes) {
        // From the padding's corner; what lies further out than it is as good as on it.
        const Vec u = min(broadcast(last_x), max(broadcast(-1.0f), load(memory.at_x + x))) + 1.0f;
        const Vec v = min(broadcast(last_y), max(broadcast(-1.0f), load(memory.at_y + x))) + 1.0f;
        const VecI left = __builtin_convertvector(u, VecI), top = __builtin_convertvector(v, VecI);
        const Vec right_share = u - __builtin_convertvector(left, Vec);
        const Vec low_share = v - __builtin_convertvector(top, Vec);
        const VecI index = top * static_cast<int32_t>(stride) + left;
        const float* below = padded + stride;
        const Vec a0 = gather(padded, index), a1 = gather(padded + 1, index);
        const Vec b0 = gather(below, index), b1 = gather(below + 1, index);
        const Vec upper = fma(a1 - a0, right_share, a0), lower = fma(b1 - b0, right_share, b0);
        store_lanes(out + c * plane + y * a.width + x, fma(lower - upper, low_share, upper), lanes);
      });
    }
  }
}

// Features [begin, end) of the sample order[position], as the network sees them, to out[begin ..]. An image that is
// distorted comes whole only.
template <class T>
void sample_row(const MlpTrainArgs& args, int64_t position, int64_t begin, int64_t end, float* out,
                const WarpMemory& memory) {
  const T* stored = static_cast<const T*>(args.x) + args.order[position] * args.features;
  const bool warped = args.augmentation != nullptr;
  if (warped) {
    const uint64_t which = args.first_step * static_cast<uint64_t>(args.batch) + static_cast<uint64_t>(position);
    warp_image(*args.augmentation, Warp(*args.augmentation, Draws(args.seed, which)), stored, out, memory);
  }
  if (position + args.batch < args.count) {  // the sample in the same place of the next batch lies anywhere in memory
    const T* next = static_cast<const T*>(args.x) + args.order[position + args.batch] * args.features;
    for (int64_t i = begin; i < end; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(next + i, 0, 2);
  }
  for_lanes(end - begin, [&](int64_t i, int lanes) {
    i += begin;
    Vec v = warped ? load_lanes(out + i, lanes) : load_stored(stored + i, lanes);
    if (args.scale) v = fma(v, load_lanes(args.scale + i, lanes), load_lanes(args.shift + i, lanes));
    store_lanes(out + i, v, lanes);
  });
}

inline void sample_row(const MlpTrainArgs& args, int64_t position, int64_t begin, int64_t end, float* out,
                       const WarpMemory& memory) {
  if (args.bytes)
    sample_row<uint8_t>(args, position, begin, end, out, memory);
  else
    sample_row<float>(args, position, begin, end, out, memory);
}

}  // namespace bmf::BMF_ISA
