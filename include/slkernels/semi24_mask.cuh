// The arithmetic of semi24_mask.h on one group of four, or on a vector of groups, for both devices.
//
// It is written over a class of operations, as random_normal.cuh's: `MaskFloat` and `MaskDouble` here, vectors of lanes
// in csrc/cpu/semi24_mask.cpp. Every float operation rounds once, has a name, and no product goes straight into a sum,
// so that no compiler fuses two.
//
// Noise. softmax((kappa gate + g) / tau) with independent Gumbel g_k = -log E_k, E_k exponential, does not change when
// all E_k are divided by their sum; those quotients are distributed as the six spacings that five uniform points leave
// of the unit interval. So one Philox draw gives five points of 25 bits, and sorting them takes the place of six
// logarithms: g_k = -log(8 spacing_k) (the 8 cancels as well; it keeps g near 0). The rarest spacing is 2^-26.
#pragma once

#include "slkernels/random_normal.cuh"
#include "slkernels/semi24_mask.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace slk {
SLK_PER_ISA {
  constexpr uint32_t kMaskStream = 0x6d61736b;  // a counter's fourth word ("mask")

  // ---- operations
  // -----------------------------------------------------------------------------------------------------

  // 2^x for x <= 0, a minimax polynomial of degree 6 on [-1/2, 1/2], 1 ulp; 0 below 2^-126, NaN for NaN.
  template <class W>
  SLK_HD inline typename W::F exp2_of(typename W::F x) {
    using F = typename W::F;
    constexpr float kMagic = 0x1.8p23f;  // x + kMagic rounds x to an integer, which its low bits then hold
    const F y = W::max(W::number(-126.0f), x), shifted = W::add(y, W::number(kMagic));
    const F f = W::fma(W::add(shifted, W::number(-kMagic)), W::number(-1.0f), y);
    F p = W::number(1.5353361960e-4f);
    p = W::fma(p, f, W::number(1.3398875017e-3f));
    p = W::fma(p, f, W::number(9.6184369177e-3f));
    p = W::fma(p, f, W::number(5.5503323674e-2f));
    p = W::fma(p, f, W::number(2.4022647738e-1f));
    p = W::fma(p, f, W::number(6.9314718246e-1f));
    p = W::fma(p, f, W::number(1.0f));
    const F scaled = W::from_bits(W::to_bits(p) + (W::to_bits(shifted) << 23));
    return W::where_at_least(x, W::number(-126.0f), scaled, W::add(p, W::number(-1.0f)));  // else 1 - 1, or NaN
  }

  struct MaskFloat : ScalarWords {
    using Real = float;
    SLK_HD static F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN
    SLK_HD static F where_at_least(F a, F b, F yes, F no) { return a >= b ? yes : no; }
    SLK_HD static I min(I a, I b) { return a < b ? a : b; }
    SLK_HD static I max(I a, I b) { return a > b ? a : b; }
#if defined(__CUDA_ARCH__)
    __device__ static F divide(F a, F b) { return __fdiv_rn(a, b); }
#else
    static F divide(F a, F b) { return a / b; }
#endif
    SLK_HD static F log(F a) { return log_of<MaskFloat>(a); }
    SLK_HD static F exp2(F a) { return exp2_of<MaskFloat>(a); }
  };

  struct MaskDouble {
    using Real = double;
    using F = double;
    using U = uint32_t;
    using I = int32_t;
    SLK_HD static U word(uint32_t x) { return x; }
    SLK_HD static F number(double x) { return x; }
    SLK_HD static void multiply(U a, uint32_t b, U& high, U& low) { ScalarWords::multiply(a, b, high, low); }
    SLK_HD static I as_int(U u) { return I(u); }
    SLK_HD static I min(I a, I b) { return a < b ? a : b; }
    SLK_HD static I max(I a, I b) { return a > b ? a : b; }
    SLK_HD static F to_float(I i) { return i; }
    SLK_HD static F fma(F a, F b, F c) { return ::fma(a, b, c); }
    SLK_HD static F mul(F a, F b) { return a * b; }
    SLK_HD static F add(F a, F b) { return a + b; }
    SLK_HD static F max(F a, F b) { return a > b ? a : b; }
    SLK_HD static F divide(F a, F b) { return a / b; }
    SLK_HD static F log(F a) { return ::log(a); }
    SLK_HD static F exp2(F a) { return ::exp2(a); }
  };

  // ---- scalars
  // --------------------------------------------------------------------------------------------------------

  // Of the exponent to base 2, gate kappa log2(e) / tau and noise log2(e) / tau; of the gradient, kappa / tau.
  template <class Real>
  struct MaskFactors {
    Real gate, noise, gradient;
    template <class W>
    SLK_HD static MaskFactors of(Real kappa, Real tau) {
      const Real noise = W::divide(Real(1.4426950408889634), tau);
      return {W::mul(kappa, noise), noise, W::divide(kappa, tau)};
    }
  };

  // ---- noise
  // ----------------------------------------------------------------------------------------------------------

  template <class W>
  SLK_HD inline void sort_pair(typename W::I & a, typename W::I & b) {
    const typename W::I low = W::min(a, b);
    b = W::max(a, b);
    a = low;
  }

  // 2^26 times the six spacings of group (high, low): odd, hence positive. The points are words 0 to 3 without their
  // low seven bits, and 25 of those bits.
  template <class W>
  SLK_HD inline void spacings_of(typename W::U low, typename W::U high, uint64_t seed,
                                 typename W::I(&spacing)[kCodes24]) {
    using I = typename W::I;
    typename W::U c[4] = {low, high, W::word(0), W::word(kMaskStream)};
    philox_draw<W>(c, seed);
    const auto bits = W::word(127);
    I x0 = W::as_int(c[0] >> 7), x1 = W::as_int(c[1] >> 7), x2 = W::as_int(c[2] >> 7), x3 = W::as_int(c[3] >> 7);
    I x4 = W::as_int((c[0] & bits) << 18 | (c[1] & bits) << 11 | (c[2] & bits) << 4 | (c[3] & W::word(15)));
    sort_pair<W>(x0, x1);  // the least network of five
    sort_pair<W>(x3, x4);
    sort_pair<W>(x2, x4);
    sort_pair<W>(x2, x3);
    sort_pair<W>(x1, x4);
    sort_pair<W>(x0, x3);
    sort_pair<W>(x0, x2);
    sort_pair<W>(x1, x3);
    sort_pair<W>(x1, x2);
    const I one = W::as_int(W::word(1)), last = W::as_int(W::word((1u << 25) - 1));
    const I gaps[kCodes24] = {x0, x1 - x0, x2 - x1, x3 - x2, x4 - x3, last - x4};
    for (int k = 0; k < kCodes24; ++k) spacing[k] = gaps[k] + gaps[k] + one;
  }

  // ---- a group
  // --------------------------------------------------------------------------------------------------------

  // e_k = 2^(x_k - max x), x_k = (kappa gate_k + g_k) log2(e) / tau; 1 / sum e; and, of each column, the sum of the e_k
  // whose pattern keeps it: p_k = e_k inverse, the soft mask of column c = kept_c inverse.
  template <class W>
  struct SoftGroup {
    using F = typename W::F;
    F e[kCodes24], inverse, kept[4];

    SLK_HD F mask(int c) const { return W::mul(kept[c], inverse); }
  };

  template <class W>
  SLK_HD inline SoftGroup<W> soft_group(const typename W::F(&gate)[kCodes24], const MaskFactors<typename W::Real>& f,
                                        typename W::U low, typename W::U high, uint64_t seed) {
    using F = typename W::F;
    SoftGroup<W> s;
    typename W::I spacing[kCodes24];
    spacings_of<W>(low, high, seed, spacing);
    const F gate_factor = W::number(f.gate), noise_factor = W::number(-f.noise);
    F x[kCodes24];
    for (int k = 0; k < kCodes24; ++k) {
      const F log = W::log(W::mul(W::to_float(spacing[k]), W::number(0x1p-23f)));
      x[k] = W::fma(gate_factor, gate[k], W::mul(noise_factor, log));
    }
    const F top = W::max(W::max(W::max(x[0], x[1]), W::max(x[2], x[3])), W::max(x[4], x[5]));
    for (int k = 0; k < kCodes24; ++k) s.e[k] = W::exp2(W::fma(top, W::number(-1.0f), x[k]));
    const F* e = s.e;
    s.kept[0] = W::add(W::add(e[0], e[1]), e[2]);  // codes: 01 02 03 12 13 23
    s.kept[1] = W::add(W::add(e[0], e[3]), e[4]);
    s.kept[2] = W::add(W::add(e[1], e[3]), e[5]);
    s.kept[3] = W::add(W::add(e[2], e[4]), e[5]);
    s.inverse = W::divide(W::number(1.0f), W::add(s.kept[0], W::add(W::add(e[3], e[4]), e[5])));
    return s;
  }

  // d gate from dy and w of the group's columns.
  template <class W>
  SLK_HD inline void gate_gradient(const SoftGroup<W>& s, const MaskFactors<typename W::Real>& f,
                                   const typename W::F(&dy)[4], const typename W::F(&w)[4],
                                   typename W::F(&dgate)[kCodes24]) {
    using F = typename W::F;
    constexpr int kFirst[kCodes24] = {0, 0, 0, 1, 1, 2}, kSecond[kCodes24] = {1, 2, 3, 2, 3, 3};
    F product[4];
    for (int c = 0; c < 4; ++c) product[c] = W::mul(dy[c], w[c]);
    F sum = W::mul(s.kept[0], product[0]);  // of p_k q_k, times sum e
    for (int c = 1; c < 4; ++c) sum = W::fma(s.kept[c], product[c], sum);
    const F minus = W::mul(s.inverse, W::number(-1.0f));
    const F scale = W::mul(s.inverse, W::number(f.gradient));
    for (int k = 0; k < kCodes24; ++k) {
      const F q = W::fma(dy[kFirst[k]], w[kFirst[k]], product[kSecond[k]]);
      dgate[k] = W::mul(W::mul(s.e[k], scale), W::fma(minus, sum, q));
    }
  }

  // The code of the largest gate: the lowest of equals, the first NaN.
  template <class F>
  SLK_HD inline int best_code24(const F(&gate)[kCodes24]) {
    int code = 0;
    F best = gate[0];
    for (int k = 1; k < kCodes24; ++k) {
      const bool better = gate[k] > best || (gate[k] != gate[k] && best == best);
      code = better ? k : code;
      best = better ? gate[k] : best;
    }
    return code;
  }

  // The mask of a code as four bytes, column 0 lowest. U: uint32_t, or a vector of them.
  template <class U>
  SLK_HD inline U pattern_bytes24(U code) {
    const U bits = (U() + 0xca6953u) >> (code << 2) & 15u;  // a bit a column; six codes of four
    return bits * 0x204081u & 0x01010101u;
  }

}  // SLK_PER_ISA
}  // namespace slk
