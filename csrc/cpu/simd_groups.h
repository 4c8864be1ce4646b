// Vectors of groups: kLanes consecutive records of four or six elements, as one vector for each place in the record.
#pragma once

#include "cpu/simd_pairs.h"

namespace slk::cpu::SLK_ISA {

// ---- three vectors --------------------------------------------------------------------------------------------------

// Lane l of x where l % 3 is kX, of y where it is kY, else of z.
template <int kX, int kY>
SLK_INLINE V pick(V x, V y, V z) {
#if defined(__AVX512F__)
  constexpr __mmask16 kThirds[3] = {0x9249, 0x2492, 0x4924};
  const __m512 xz = _mm512_mask_blend_ps(kThirds[kX], (__m512)z, (__m512)x);
  return (V)_mm512_mask_blend_ps(kThirds[kY], xz, (__m512)y);
#elif defined(__AVX2__)
  constexpr int kThirds[3] = {0x49, 0x92, 0x24};
  return (V)_mm256_blend_ps(_mm256_blend_ps((__m256)z, (__m256)x, kThirds[kX]), (__m256)y, kThirds[kY]);
#else
  V r;
  for (int i = 0; i < kLanes; ++i) r[i] = i % 3 == kX ? x[i] : i % 3 == kY ? y[i] : z[i];
  return r;
#endif
}
// Lane i = lane (kStep i + kFirst) % kLanes of v.
template <int kStep, int kFirst>
SLK_INLINE V stride_lanes(V v) {
  alignas(64) int32_t index[kLanes];
  for (int i = 0; i < kLanes; ++i) index[i] = (kStep * i + kFirst) % kLanes;
#if defined(__AVX512F__)
  return (V)_mm512_permutexvar_ps(_mm512_load_si512(index), (__m512)v);
#elif defined(__AVX2__)
  return (V)_mm256_permutevar8x32_ps((__m256)v, _mm256_load_si256((const __m256i*)index));
#else
  V r;
  for (int i = 0; i < kLanes; ++i) r[i] = v[index[i]];
  return r;
#endif
}

constexpr int kLane3 = kLanes % 3;  // where, in a record of three, the second of three vectors begins: 1 or 2
constexpr int kThird = kLanes == 8 ? 3 : 11 % kLanes;  // 3 kThird % kLanes = 1

// v[0..2] hold kLanes records of three, consecutive; out: the first elements, the second, the third. And back.
SLK_INLINE void split3(const V (&v)[3], V& first, V& second, V& third) {
  // Element e of the records in vector u is at lanes l with (u kLanes + l) % 3 = e.
  first = stride_lanes<3, 0>(pick<0, 3 - kLane3>(v[0], v[1], v[2]));
  second = stride_lanes<3, 1>(pick<1, (4 - kLane3) % 3>(v[0], v[1], v[2]));
  third = stride_lanes<3, 2>(pick<2, (5 - kLane3) % 3>(v[0], v[1], v[2]));
}
SLK_INLINE void merge3(V first, V second, V third, V (&v)[3]) {
  const V a = stride_lanes<kThird, 0>(first), b = stride_lanes<kThird, kLanes - kThird % kLanes>(second);
  const V c = stride_lanes<kThird, (2 * kLanes - 2 * kThird) % kLanes>(third);
  v[0] = pick<0, 1>(a, b, c);
  v[1] = pick<3 - kLane3, (4 - kLane3) % 3>(a, b, c);
  v[2] = pick<(2 * (3 - kLane3)) % 3, (1 + 2 * (3 - kLane3)) % 3>(a, b, c);
}

// ---- records in memory ----------------------------------------------------------------------------------------------

template <class T>
SLK_INLINE void load_records(const T* p, V (&x)[4]) {
  const Pair a = load_pair(p), b = load_pair(p + kPair);
  const Pair even = split(a.even, b.even), odd = split(a.odd, b.odd);
  x[0] = even.even;
  x[1] = odd.even;
  x[2] = even.odd;
  x[3] = odd.odd;
}
template <class T>
SLK_INLINE void store_records(T* p, const V (&x)[4]) {
  Pair a, b;
  merge({x[0], x[2]}, a.even, b.even);
  merge({x[1], x[3]}, a.odd, b.odd);
  store_pair(p, a);
  store_pair(p + kPair, b);
}
template <class T>
SLK_INLINE void load_records(const T* p, V (&x)[6]) {
  V even[3], odd[3];
  for (int i = 0; i < 3; ++i) {
    const Pair pair = load_pair(p + i * kPair);
    even[i] = pair.even;
    odd[i] = pair.odd;
  }
  split3(even, x[0], x[2], x[4]);
  split3(odd, x[1], x[3], x[5]);
}
template <class T>
SLK_INLINE void store_records(T* p, const V (&x)[6]) {
  V even[3], odd[3];
  merge3(x[0], x[2], x[4], even);
  merge3(x[1], x[3], x[5], odd);
  for (int i = 0; i < 3; ++i) store_pair(p + i * kPair, {even[i], odd[i]});
}

}  // namespace slk::cpu::SLK_ISA
