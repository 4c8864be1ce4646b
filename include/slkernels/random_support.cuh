// Random supports, counter-based: sample i of a support is a pure function of (kind, n, m, density, seed, i), so that
// every device and every rank of any world size draws the same one without storing or sending it.
//
// A keyed permutation of [0, N) replaces randperm: sampling k of N positions without replacement is evaluating it at
// 0 .. k-1. It is an alternating Feistel network on ceil(log2 N) bits with cycle walking (Black and Rogaway, "Ciphers
// with Arbitrary Finite Domains", CT-RSA 2002): the expected number of walks is below 2.
#pragma once

#include <cstdint>

#include "slkernels/types.h"

namespace slk {

SLK_HD inline uint64_t mix64(uint64_t x) {  // SplitMix64's output function
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct Permutation {
  static constexpr int kRounds = 8;
  uint64_t size;
  int low_bits;
  uint32_t high_mask, low_mask;
  uint32_t keys[kRounds];

  SLK_HD static Permutation make(uint64_t size, uint64_t key) {
    Permutation p;
    p.size = size;
    int bits = 0;
    while (bits < 63 && (uint64_t(1) << bits) < size) ++bits;
    p.low_bits = bits - bits / 2;
    p.high_mask = uint32_t((uint64_t(1) << (bits / 2)) - 1);
    p.low_mask = uint32_t((uint64_t(1) << p.low_bits) - 1);
    for (int r = 0; r < kRounds; ++r) p.keys[r] = uint32_t(mix64(key + uint64_t(r + 1) * 0x9e3779b97f4a7c15u));
    return p;
  }

  SLK_HD static uint32_t round(uint32_t half, uint32_t key) {  // MurmurHash3's finalizer
    uint32_t h = half ^ key;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return h ^ (h >> 16);
  }

  // The image of x in [0, size).
  SLK_HD uint64_t operator()(uint64_t x) const {
    do {
      uint32_t high = uint32_t(x >> low_bits), low = uint32_t(x) & low_mask;
      for (int r = 0; r < kRounds; r += 2) {
        high ^= round(low, keys[r]) & high_mask;
        low ^= round(high, keys[r + 1]) & low_mask;
      }
      x = uint64_t(high) << low_bits | low;
    } while (x >= size);
    return x;
  }
};

enum class SupportKind : int { uniform, row, column, blocks };

struct Position {
  int64_t row, col;
};

// Sample i in [0, count) of a support of an [n, m] matrix.
//   uniform: int(density n m) of all positions.
//   row:     int(density m) columns in every row, chosen for each row by itself.
//   column:  the same int(density m) columns in every row.
//   blocks:  positions of 8x8 blocks, [n, m] then being the grid of blocks. Blocks that the matrix's edge cuts are
//   strata of
//            their own, of which the same share is drawn, so that the number of nonzeros depends on the sizes only.
struct SupportSampler {
  SupportKind kind;
  int64_t n, m, count;
  int64_t per_row;  // row, column
  uint64_t seed;
  Permutation whole;             // uniform: of n m; column: of m; blocks: of the whole blocks
  int64_t inner_n, inner_m;      // blocks: the grid of whole blocks
  int64_t inner, right, bottom;  // blocks: how many of each stratum; the corner is count - their sum
  Permutation right_edge, bottom_edge;

  SLK_HD static uint64_t stream(uint64_t seed, uint64_t index) {
    return mix64(mix64(seed) + index * 0xd1342543de82ef95u);
  }

  static SupportSampler uniform(int64_t n, int64_t m, double density, uint64_t seed) {
    SupportSampler s = {};
    s.kind = SupportKind::uniform;
    s.n = n;
    s.m = m;
    s.count = int64_t(density * double(n) * double(m));
    s.whole = Permutation::make(uint64_t(n) * uint64_t(m), stream(seed, 0));
    return s;
  }
  static SupportSampler rows(SupportKind kind, int64_t n, int64_t m, double density, uint64_t seed) {
    SupportSampler s = {};
    s.kind = kind;
    s.n = n;
    s.m = m;
    s.per_row = int64_t(density * double(m));
    s.count = s.per_row * n;
    s.seed = seed;
    s.whole = Permutation::make(uint64_t(m), stream(seed, 0));
    return s;
  }
  static SupportSampler blocks(int64_t n, int64_t m, double density, uint64_t seed) {
    SupportSampler s = {};
    s.kind = SupportKind::blocks;
    s.n = (n + 7) / 8;
    s.m = (m + 7) / 8;
    s.inner_n = n / 8;
    s.inner_m = m / 8;
    const bool cut_right = m % 8 != 0, cut_bottom = n % 8 != 0;
    s.inner = int64_t(density * double(s.inner_n) * double(s.inner_m));
    s.right = cut_right ? int64_t(density * double(s.inner_n)) : 0;
    s.bottom = cut_bottom ? int64_t(density * double(s.inner_m)) : 0;
    s.count = s.inner + s.right + s.bottom + (cut_right && cut_bottom ? int64_t(density) : 0);
    s.whole = Permutation::make(uint64_t(s.inner_n) * uint64_t(s.inner_m), stream(seed, 0));
    s.right_edge = Permutation::make(uint64_t(s.inner_n), stream(seed, 1));
    s.bottom_edge = Permutation::make(uint64_t(s.inner_m), stream(seed, 2));
    return s;
  }

  SLK_HD Position operator()(int64_t i) const {
    switch (kind) {
      case SupportKind::uniform: {
        const uint64_t p = whole(uint64_t(i));
        return {int64_t(p / uint64_t(m)), int64_t(p % uint64_t(m))};
      }
      case SupportKind::row: {
        const int64_t r = i / per_row;
        return {r, int64_t(Permutation::make(uint64_t(m), stream(seed, uint64_t(r) + 1))(uint64_t(i % per_row)))};
      }
      case SupportKind::column:
        return {i / per_row, int64_t(whole(uint64_t(i % per_row)))};
      case SupportKind::blocks:
        break;
    }
    if (i < inner) {
      const uint64_t p = whole(uint64_t(i));
      return {int64_t(p / uint64_t(inner_m)), int64_t(p % uint64_t(inner_m))};
    }
    i -= inner;
    if (i < right) return {int64_t(right_edge(uint64_t(i))), m - 1};
    i -= right;
    if (i < bottom) return {n - 1, int64_t(bottom_edge(uint64_t(i)))};
    return {n - 1, m - 1};
  }
};

}  // namespace slk
