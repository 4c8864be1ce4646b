// Vectors in pairs: 2 kLanes consecutive elements, the even ones in one vector and the odd ones in the other. That is
// the order in which 16-bit floats, bytes and nibbles come out of a register with one shift or mask each, so kernels
// that work element by element on packed data use it throughout.
#pragma once

#include "cpu/simd.h"

namespace slk::cpu::SLK_ISA {

constexpr int kPair = 2 * kLanes;

struct Pair {
  V even, odd;
};
struct PairI {
  VI even, odd;
};

// ---- floats
// -----------------------------------------------------------------------------------------------------------

// a and b hold consecutive elements; and back.
SLK_INLINE Pair split(V a, V b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {(V)_mm512_permutex2var_ps((__m512)a, even, (__m512)b), (V)_mm512_permutex2var_ps((__m512)a, odd, (__m512)b)};
#elif defined(__AVX2__)
  const __m256 low = _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20);  // a0..3 b0..3
  const __m256 high = _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
  // Even elements of a, then of b, with 128-bit halves (a0 a2 a4 a6 | b0 b2 b4 b6).
  return {(V)_mm256_shuffle_ps(low, high, 0x88), (V)_mm256_shuffle_ps(low, high, 0xdd)};
#else
  Pair r;
  for (int i = 0; i < kLanes; ++i) {
    r.even[i] = 2 * i < kLanes ? a[2 * i] : b[2 * i - kLanes];
    r.odd[i] = 2 * i < kLanes ? a[2 * i + 1] : b[2 * i + 1 - kLanes];
  }
  return r;
#endif
}
SLK_INLINE void merge(Pair x, V& a, V& b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  a = (V)_mm512_permutex2var_ps((__m512)x.even, low, (__m512)x.odd);
  b = (V)_mm512_permutex2var_ps((__m512)x.even, high, (__m512)x.odd);
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)x.even, (__m256)x.odd);
  const __m256 high = _mm256_unpackhi_ps((__m256)x.even, (__m256)x.odd);
  a = (V)_mm256_permute2f128_ps(low, high, 0x20);
  b = (V)_mm256_permute2f128_ps(low, high, 0x31);
#else
  for (int i = 0; i < kLanes; ++i) {
    a[i] = i % 2 ? x.odd[i / 2] : x.even[i / 2];
    b[i] = i % 2 ? x.odd[(i + kLanes) / 2] : x.even[(i + kLanes) / 2];
  }
#endif
}

template <class T>
SLK_INLINE Pair load_pair(const T* p) {
  return split(load(p), load(p + kLanes));
}
SLK_INLINE Pair load_pair(const bf16* p) {
  VU w;
  std::memcpy(&w, p, sizeof w);
  return {(V)(w << 16), (V)(w & 0xffff0000u)};
}
template <class T>
SLK_INLINE void store_pair(T* p, Pair x) {
  V a, b;
  merge(x, a, b);
  store(p, a);
  store(p + kLanes, b);
}
// fp32 bits whose high half is x rounded to bf16, to nearest even; NaN stays NaN.
SLK_INLINE VU round_bf16(V x) {
  const VU u = (VU)x;
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  const __m512i half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  const __m512i r = _mm512_add_epi32((__m512i)u, half);
  return (VU)_mm512_mask_or_epi32(r, nan, (__m512i)u, _mm512_set1_epi32(0x400000));
#else
  const VU r = u + (0x7fffu + (u >> 16 & 1u));
  return (x != x) ? (u | 0x400000u) : r;
#endif
}
SLK_INLINE void store_pair(bf16* p, Pair x) {
  const VU w = (round_bf16(x.odd) & 0xffff0000u) | round_bf16(x.even) >> 16;
  std::memcpy(p, &w, sizeof w);
}

// ---- codes
// ------------------------------------------------------------------------------------------------------------

// kLanes 16-bit words, each holding two bytes, zero- or sign-extended; and their low halves back.
template <bool kSignExtend>
SLK_INLINE VI load_words(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m256i w = _mm256_loadu_si256((const __m256i*)p);
  return (VI)(kSignExtend ? _mm512_cvtepi16_epi32(w) : _mm512_cvtepu16_epi32(w));
#elif defined(__AVX2__)
  const __m128i w = _mm_loadu_si128((const __m128i*)p);
  return (VI)(kSignExtend ? _mm256_cvtepi16_epi32(w) : _mm256_cvtepu16_epi32(w));
#else
  VI v;
  for (int i = 0; i < kLanes; ++i) {
    uint16_t w;
    std::memcpy(&w, p + 2 * i, 2);
    v[i] = kSignExtend ? int32_t(int16_t(w)) : int32_t(w);
  }
  return v;
#endif
}
SLK_INLINE void store_words(uint8_t* p, VI v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t w = uint16_t(v[i]);
    std::memcpy(p + 2 * i, &w, 2);
  }
#endif
}

// kLanes integers below 16 to kLanes / 2 bytes, the even lane in the low half.
SLK_INLINE void store_nibbles(uint8_t* p, VI v) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)v;
  _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8(_mm512_or_si512(x, _mm512_srli_epi64(x, 28))));
#elif defined(__AVX2__)
  const __m256i x = _mm256_or_si256((__m256i)v, _mm256_srli_epi64((__m256i)v, 28));
  const __m128i bytes = _mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 8, 0);
  const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(x), bytes);
  const __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256(x, 1), bytes);
  const int32_t four = _mm_cvtsi128_si32(_mm_unpacklo_epi16(low, high));
  std::memcpy(p, &four, 4);
#else
  for (int i = 0; i < kLanes / 2; ++i) p[i] = uint8_t(v[2 * i] | v[2 * i + 1] << 4);
#endif
}

// kPair codes of kBits bits: unsigned, or int8.
template <int kBits, bool kInt8>
SLK_INLINE PairI load_codes(const uint8_t* p) {
  if constexpr (kBits == 4) {
    const VI w = load_bytes(p);
    return {w >> 4, w & 15};
  } else {
    const VI w = load_words<kInt8>(p);
    return kInt8 ? PairI{w << 24 >> 24, w >> 8} : PairI{w & 255, w >> 8};
  }
}
// The low kBits bits of each. (Those above are ignored with 8 bits and must be 0 with 4.)
template <int kBits>
SLK_INLINE void store_codes(uint8_t* p, PairI code) {
  if constexpr (kBits == 4)
    store_bytes(p, code.even << 4 | code.odd);
  else
    store_words(p, (code.even & 255) | code.odd << 8);
}

// ---- the rest
// ---------------------------------------------------------------------------------------------------------

// Lane j of the result = the largest lane of r[j].
SLK_INLINE VU max_rows(VU (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512i t[8], u[4];
  for (int i = 0; i < 8; ++i) {
    const __m512i a = (__m512i)r[2 * i], b = (__m512i)r[2 * i + 1];
    t[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i)
    u[i] =
        _mm512_max_epu32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    t[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0x88),
                            _mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0xdd));
  return (VU)_mm512_max_epu32(_mm512_shuffle_i32x4(t[0], t[1], 0x88), _mm512_shuffle_i32x4(t[0], t[1], 0xdd));
#else
  VU out;
  for (int i = 0; i < kLanes; ++i) out[i] = max_lane(r[i]);
  return out;
#endif
}

// High and low words of a * b.
SLK_INLINE void multiply_wide(VU a, uint32_t b, VU& high, VU& low) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_set1_epi32(int32_t(b)), even = _mm512_mul_epu32((__m512i)a, wide);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), wide);
  low = (VU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (VU)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i wide = _mm256_set1_epi32(int32_t(b)), even = _mm256_mul_epu32((__m256i)a, wide);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), wide);
  low = (VU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (VU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t(a[i]) * b;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// rint, to nearest even.
SLK_INLINE VI round_to_int(V a) {
#if defined(__AVX512F__)
  return (VI)_mm512_cvtps_epi32((__m512)a);
#elif defined(__AVX2__)
  return (VI)_mm256_cvtps_epi32((__m256)a);
#else
  VI r;
  for (int i = 0; i < kLanes; ++i) r[i] = int32_t(__builtin_nearbyintf(a[i]));
  return r;
#endif
}

// A table of 16 or 32 floats held in registers.
template <int kSize>
struct Table {
  V part[kSize / kLanes];
};
template <int kSize>
SLK_INLINE Table<kSize> load_table(const float (&values)[kSize]) {
  Table<kSize> t;
  for (int i = 0; i < kSize / kLanes; ++i) t.part[i] = load(values + i * kLanes);
  return t;
}
template <int kSize>
SLK_INLINE Table<kSize> load_table(const int32_t (&values)[kSize]) {  // of integers, as they are
  Table<kSize> t;
  std::memcpy(&t, values, sizeof t);
  return t;
}
SLK_INLINE Table<16> operator*(Table<16> t, float scale) {
  for (V& v : t.part) v = v * broadcast(scale);
  return t;
}
// table[index % kSize] in every lane.
template <int kSize>
SLK_INLINE V lookup(const Table<kSize>& t, VI index) {
#if defined(__AVX512F__)
  if constexpr (kSize == 16) return (V)_mm512_permutexvar_ps((__m512i)index, (__m512)t.part[0]);
  if constexpr (kSize == 32) return (V)_mm512_permutex2var_ps((__m512)t.part[0], (__m512i)index, (__m512)t.part[1]);
#elif defined(__AVX2__)
  const auto half = [&](int i) {  // of entries 16 i .. 16 i + 15
    const __m256 low = _mm256_permutevar8x32_ps((__m256)t.part[2 * i], (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)t.part[2 * i + 1], (__m256i)index);
    return _mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32((__m256i)index, 28));
  };
  if constexpr (kSize == 16) return (V)half(0);
  if constexpr (kSize == 32)
    return (V)_mm256_blendv_ps(half(0), half(1), (__m256)_mm256_slli_epi32((__m256i)index, 27));
#else
  V v;
  for (int i = 0; i < kLanes; ++i) {
    const int at = index[i] & (kSize - 1);
    v[i] = t.part[at / kLanes][at % kLanes];
  }
  return v;
#endif
}

// index + 16 where a >= b (index < 16).
SLK_INLINE VI add16_ge(VI index, V a, V b) {
#if defined(__AVX512F__)
  const __mmask16 ge = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
  return (VI)_mm512_mask_add_epi32((__m512i)index, ge, (__m512i)index, _mm512_set1_epi32(16));
#else
  return index + ((VI)(a >= b) & 16);
#endif
}

// n + (a > b ? 1 : 0)
SLK_INLINE VI count_gt(VI n, V a, V b) {
#if defined(__AVX512F__)
  const __mmask16 gt = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
  return (VI)_mm512_mask_sub_epi32((__m512i)n, gt, (__m512i)n, _mm512_set1_epi32(-1));
#else
  return n - (VI)(a > b);
#endif
}
// max(n, 1) where a > 0, else n.
SLK_INLINE VI at_least_one(VI n, V a) {
#if defined(__AVX512F__)
  const __mmask16 positive = _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_GT_OQ);
  return (VI)_mm512_mask_max_epi32((__m512i)n, positive, (__m512i)n, _mm512_set1_epi32(1));
#else
  return max(n, (VI)(a > zero()) & 1);
#endif
}
// from - n where x has its sign bit, else from + n.
SLK_INLINE VI step_by_sign(int32_t from, VI n, V x) {
#if defined(__AVX512F__)
  const __m512i base = _mm512_set1_epi32(from), up = _mm512_add_epi32(base, (__m512i)n);
  return (VI)_mm512_mask_sub_epi32(up, _mm512_movepi32_mask((__m512i)x), base, (__m512i)n);
#else
  return by_sign(x, from - n, from + n);
#endif
}

}  // namespace slk::cpu::SLK_ISA
