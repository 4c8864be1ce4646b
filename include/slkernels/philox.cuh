// Counter-based random bits: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC'11). A draw is a pure function of its key and counter: the same bits on every device, for any number of threads.
#pragma once

#include <cstdint>

#include "slkernels/types.h"

namespace slk {
SLK_PER_ISA {
  struct Philox {
    static constexpr int kRounds = 10;
    static constexpr uint32_t kMultiply0 = 0xD2511F53u, kMultiply1 = 0xCD9E8D57u;
    static constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

    uint32_t word[4];

    SLK_HD static Philox draw(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
      uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
      for (int r = 0; r < kRounds; ++r) {
        const uint64_t p0 = uint64_t(kMultiply0) * c0, p1 = uint64_t(kMultiply1) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += kWeyl0;
        k1 += kWeyl1;
      }
      return {{c0, c1, c2, c3}};
    }
  };

  // Stochastic rounding of the elements of a list of tensors, 16 bits an element, 8 elements a draw:
  //   key = seed,  counter = (element / 8, low and high word; index of the tensor in the list; step modulo 2^32),
  //   element e takes half word e % 8: the low half of word 0, its high half, the low half of word 1, ...
  struct RoundingBits {
    static constexpr int kElements = 8;
    uint64_t seed;
    uint32_t step;

    SLK_HD Philox draw(uint32_t tensor, int64_t group) const {  // of elements 8 group .. 8 group + 7
      return Philox::draw(seed, uint32_t(group), uint32_t(uint64_t(group) >> 32), tensor, step);
    }
    SLK_HD uint32_t operator()(uint32_t tensor, int64_t element) const {
      const int half = int(element % kElements);
      return draw(tensor, element / kElements).word[half / 2] >> (half % 2 * 16) & 0xffffu;
    }
  };

}  // SLK_PER_ISA
}  // namespace slk
