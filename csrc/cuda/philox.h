// The choices of dropout, the same as on CPU (core/philox.h): Philox4x32 (Salmon et al. 2011) with seven rounds, whose
// counter stands for one of 16 lanes of 128 neighbouring columns of one row.
#pragma once
#include "cuda/device.h"

namespace bmf::cuda {

constexpr int kDropoutGroup = 128, kDropoutLanes = 16;

// Bit j: whether column 128 group + 16 j + lane of this row is kept, with probability 1 - threshold / 65536.
BMF_DEVICE uint32_t dropout_choices(uint64_t seed, uint32_t head, uint32_t row, uint32_t group, uint32_t lane,
                                    uint32_t threshold) {
  uint32_t x[4] = {lane, row, head, group};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = multiply_high(x[0], 0xD2511F53u), low0 = x[0] * 0xD2511F53u;
    const uint32_t high1 = multiply_high(x[2], 0xCD9E8D57u), low1 = x[2] * 0xCD9E8D57u;
    x[0] = high1 ^ x[1] ^ key0;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ key1;
    x[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  uint32_t kept = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    kept |= static_cast<uint32_t>((x[word] & 0xffffu) >= threshold) << (2 * word);
    kept |= static_cast<uint32_t>((x[word] >> 16) >= threshold) << (2 * word + 1);
  }
  return kept;
}

}  // namespace bmf::cuda
