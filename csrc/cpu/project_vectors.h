// What the kernels of family `project` share: ragged vectors, random bits, and stores that round stochastically.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/random_normal.h"
#include "cpu/types.h"
#include "slkernels/project.h"

namespace slk::cpu::SLK_ISA {

using Whole = std::integral_constant<int, kLanes>;

// f(i, count) for each vector of n elements; count is Whole, but for the ragged end.
template <class F>
SLK_INLINE void each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, Whole());
  if (i < n) f(i, int(n - i));
}
template <class T>
SLK_INLINE V read(const T* p, Whole) {
  return load(p);
}
template <class T>
SLK_INLINE V read(const T* p, int count) {
  return load_n(p, count);
}
template <class T>
SLK_INLINE void write(T* p, V v, Whole) {
  store(p, v);
}
template <class T>
SLK_INLINE void write(T* p, V v, int count) {
  store_n(p, v, count);
}

// ---- random bits for stochastic rounding ----------------------------------------------------------------------------

// Room for the bits of n elements, and for what a vector of draws makes beyond them on both sides.
constexpr int64_t random_room(int64_t n) {
  return n + RoundingBits::kElements * (kLanes + 1);
}

// The 16 bits of elements first .. first + n - 1 of tensor 0, in `room` (64-byte aligned); returns where they begin.
inline const uint16_t* random_halves(const StochasticRounding& bits, int64_t first, int64_t n, uint16_t* room) {
  constexpr int kPerDraw = RoundingBits::kElements;
  const int64_t group = first / kPerDraw, groups = ceil_div(first + n, kPerDraw) - group;
  for (int64_t g = 0; g < groups; g += kLanes) {
    VU low, high;
    counters(uint64_t(group + g), low, high);
    VU c[4] = {low, high, VectorWords::word(0), VectorWords::word(bits.step)};
    philox_draw<VectorWords>(c, bits.seed);
    uint32_t words[4][kLanes], *out = reinterpret_cast<uint32_t*>(room + g * kPerDraw);
    std::memcpy(words, c, sizeof words);
    for (int i = 0; i < kLanes; ++i)
      for (int k = 0; k < 4; ++k) out[4 * i + k] = words[k][i];
  }
  return room + (first - group * kPerDraw);
}

// kLanes 16-bit numbers as words; the caller's room is padded.
SLK_INLINE VU load_halves(const uint16_t* p) {
  return (VU)load(reinterpret_cast<const bf16*>(p)) >> 16;
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// One of the two numbers of type T around v, the upper with the probability of the fraction; as fp32, exactly.
SLK_INLINE V round_stochastic(V v, VU, float) {
  return v;
}
SLK_INLINE V round_stochastic(V v, VU random, bf16) {
  const VU u = (VU)v;
  const VI special = (u & 0x7f800000u) == 0x7f800000u;
  return (V)(special ? (VI)u : (VI)((u + random) & 0xffff0000u));
}
SLK_INLINE V round_stochastic(V v, VU random, f16) {
  const VU u = (VU)v;
  const VI special = (u & 0x7f800000u) == 0x7f800000u;
  const VI tiny = (u & 0x7fffffffu) < 0x38800000u;  // below 2^-14: multiples of 2^-24
  const VI normal = (VI)((u + (random >> 3)) & 0xffffe000u);
  const V scaled = v * broadcast(0x1p24f), down = floor(scaled);
  const VI up = (VI)(scaled - down > to_float((VI)random) * broadcast(0x1p-16f));
  const V subnormal = (down - to_float(up)) * broadcast(0x1p-24f);
  return (V)(special ? (VI)u : tiny ? (VI)subnormal : normal);
}

// acc[n] to w, rounded to nearest even, or stochastically where there are random bits.
template <class T>
SLK_INLINE void store_rounded(const float* acc, int64_t n, const uint16_t* random, T* w) {
  if (random)
    each_vector(n, [&](int64_t i, auto count) {
      write(w + i, round_stochastic(load(acc + i), load_halves(random + i), T{}), count);
    });
  else
    each_vector(n, [&](int64_t i, auto count) { write(w + i, load(acc + i), count); });
}

// ---- the terms of an update -----------------------------------------------------------------------------------------

// acc[n] += step T + step f G, for columns [column, column + n) of a row of W.
inline void add_terms(const UpdateOperands& x, float step, int64_t row, int64_t column, int64_t n, float* acc) {
  if (x.t)
    with_float_type(x.t_type, [&](auto* type) {
      using T = Element<decltype(type)>;
      const T* t = static_cast<const T*>(x.t) + (row - x.t_row) * x.ldt + column;
      const V factor = broadcast(step);
      each_vector(n, [&](int64_t i, auto count) { store(acc + i, fma(factor, read(t + i, count), load(acc + i))); });
    });
  if (!x.g) return;
  with_float_type(x.g_type, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T* g = static_cast<const T*>(x.g) + row * x.ldg + column;
    if (x.factor_of == FactorOf::column) {
      const float* factors = x.factor + column;
      each_vector(n, [&](int64_t i, auto count) {
        const V factor = broadcast(step) * read(factors + i, count);
        store(acc + i, fma(factor, read(g + i, count), load(acc + i)));
      });
    } else {
      const V factor = broadcast(step * x.factor[x.factor_of == FactorOf::row ? row : 0]);
      each_vector(n, [&](int64_t i, auto count) { store(acc + i, fma(factor, read(g + i, count), load(acc + i))); });
    }
  });
}

}  // namespace slk::cpu::SLK_ISA
