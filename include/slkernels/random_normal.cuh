// Standard normals, counter-based: the same bits on every device and instruction set.
//
//   Z[j, i] of a matrix with rows j and columns i is a pure function of (seed, j, i). Of 64 neighbours in a row, the
//   Philox draw with counter (16 (i / 64) + l, j, 0, tag), l = 0 .. 15, makes columns l, 16 + l, 32 + l and 48 + l:
//   vectors of up to 16 lanes store runs. A draw's words 0 and 1 are radius and angle of one Box-Muller pair, words 2
//   and 3 of another.
//
// The arithmetic is written once, over a class of operations: `ScalarWords` here for CUDA and host code, vectors of
// lanes in csrc/cpu/random_normal.h. Every float operation rounds once and has a name, so that no compiler fuses two.
#pragma once

#include <cstdint>
#include <cstring>

#include "slkernels/philox.cuh"

namespace slk {
SLK_PER_ISA {
  constexpr uint32_t kNormalStream = 0x6e6f726d;  // a counter's fourth word ("norm"): no step of an optimizer meets it

  constexpr int kNormalRun = 16;                        // columns of one word of neighbouring counters
  constexpr int kNormalBlock = 4 * kNormalRun;          // columns of the four words
  constexpr int64_t kNormalColumns = int64_t(1) << 34;  // most columns: the counter's first word counts 16 of 64

  struct ScalarWords {
    using F = float;
    using U = uint32_t;
    using I = int32_t;
    SLK_HD static U word(uint32_t x) { return x; }
    SLK_HD static F number(float x) { return x; }
    SLK_HD static void multiply(U a, uint32_t b, U& high, U& low) {
      const uint64_t product = uint64_t(a) * b;
      high = uint32_t(product >> 32);
      low = uint32_t(product);
    }
    SLK_HD static F from_bits(U u) {
      F x;
      memcpy(&x, &u, 4);
      return x;
    }
    SLK_HD static U to_bits(F x) {
      U u;
      memcpy(&u, &x, 4);
      return u;
    }
    SLK_HD static I as_int(U u) { return I(u); }
    SLK_HD static U as_word(I i) { return U(i); }
    SLK_HD static U select(U mask, U a, U b) { return (mask & a) | (~mask & b); }
#if defined(__CUDA_ARCH__)
    __device__ static F to_float(I i) { return __int2float_rn(i); }
    __device__ static F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
    __device__ static F mul(F a, F b) { return __fmul_rn(a, b); }
    __device__ static F add(F a, F b) { return __fadd_rn(a, b); }
    __device__ static F sqrt(F a) { return __fsqrt_rn(a); }
#else
    static F to_float(I i) { return float(i); }
    static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
    static F mul(F a, F b) { return a * b; }
    static F add(F a, F b) { return a + b; }
    static F sqrt(F a) { return __builtin_sqrtf(a); }
#endif
  };

  // Philox::draw on `Words`.
  template <class W>
  SLK_HD inline void philox_draw(typename W::U(&c)[4], uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < Philox::kRounds; ++round) {
      typename W::U high0, low0, high1, low1;
      W::multiply(c[0], Philox::kMultiply0, high0, low0);
      W::multiply(c[2], Philox::kMultiply1, high1, low1);
      c[0] = high1 ^ c[1] ^ W::word(k0);
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ W::word(k1);
      c[3] = low0;
      k0 += Philox::kWeyl0;
      k1 += Philox::kWeyl1;
    }
  }

  // log u of a positive normal u: the polynomial of Cephes' logf on [sqrt(1/2), sqrt(2)).
  template <class W>
  SLK_HD inline typename W::F log_of(typename W::F u) {
    using F = typename W::F;
    const auto shifted = W::as_int(W::to_bits(u) - W::word(0x3f3504f3u));
    const F e = W::to_float(shifted >> 23);
    const F f =
        W::add(W::from_bits((W::as_word(shifted) & W::word(0x7fffffu)) + W::word(0x3f3504f3u)), W::number(-1.f));
    const F z = W::mul(f, f);
    F p = W::number(7.0376836292e-2f);
    p = W::fma(p, f, W::number(-1.1514610310e-1f));
    p = W::fma(p, f, W::number(1.1676998740e-1f));
    p = W::fma(p, f, W::number(-1.2420140846e-1f));
    p = W::fma(p, f, W::number(1.4249322787e-1f));
    p = W::fma(p, f, W::number(-1.6668057665e-1f));
    p = W::fma(p, f, W::number(2.0000714765e-1f));
    p = W::fma(p, f, W::number(-2.4999993993e-1f));
    p = W::fma(p, f, W::number(3.3333331174e-1f));
    F y = W::mul(p, W::mul(f, z));
    y = W::fma(e, W::number(-2.12194440e-4f), y);
    y = W::fma(z, W::number(-0.5f), y);
    return W::fma(e, W::number(0.693359375f), W::add(f, y));
  }

  // Two normals from two random words (Box and Muller 1958). The radius is sqrt(-2 log u) with u = (word / 2 + 1/2) /
  // 2^31; of the angle, two bits are the quadrant and thirty the angle from its middle, in [-pi / 4, pi / 4).
  template <class W>
  SLK_HD inline void normal_pair(typename W::U radius_word, typename W::U angle_word, typename W::F & a,
                                 typename W::F & b) {
    using F = typename W::F;
    using U = typename W::U;
    const F u = W::fma(W::to_float(W::as_int(radius_word >> 1)), W::number(0x1p-31f), W::number(0x1p-32f));
    const F radius = W::sqrt(W::mul(W::number(-2.f), log_of<W>(u)));
    const F x = W::mul(W::to_float(W::as_int(angle_word << 2)), W::number(0.78539816339f * 0x1p-31f));
    const F z = W::mul(x, x);
    F sine = W::fma(W::number(-1.9515295891e-4f), z, W::number(8.3321608736e-3f));
    sine = W::fma(sine, z, W::number(-1.6666654611e-1f));
    sine = W::fma(W::mul(x, z), sine, x);
    F cosine = W::fma(W::number(2.443315711809948e-5f), z, W::number(-1.388731625493765e-3f));
    cosine = W::fma(cosine, z, W::number(4.166664568298827e-2f));
    cosine = W::fma(W::mul(z, z), cosine, W::fma(z, W::number(-0.5f), W::number(1.f)));
    const U quadrant = angle_word >> 30;
    const U odd = W::word(0) - (quadrant & W::word(1));
    const U s = W::to_bits(sine), c = W::to_bits(cosine);
    const U first = W::select(odd, s, c) ^ (((quadrant + W::word(1)) & W::word(2)) << 30);
    const U second = W::select(odd, c, s) ^ ((quadrant & W::word(2)) << 30);
    a = W::mul(radius, W::from_bits(first));
    b = W::mul(radius, W::from_bits(second));
  }

  // Columns l, l + 16, l + 32, l + 48 of block `block` of row j, times `scale`; lane = 16 block + l.
  template <class W>
  SLK_HD inline void normals_of(typename W::U lane, uint32_t row, uint64_t seed, float scale, typename W::F(&out)[4]) {
    typename W::U c[4] = {lane, W::word(row), W::word(0), W::word(kNormalStream)};
    philox_draw<W>(c, seed);
    normal_pair<W>(c[0], c[1], out[0], out[1]);
    normal_pair<W>(c[2], c[3], out[2], out[3]);
    for (int e = 0; e < 4; ++e) out[e] = W::mul(out[e], W::number(scale));
  }

}  // SLK_PER_ISA
}  // namespace slk
