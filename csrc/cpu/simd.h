// The few vector words that the CPU kernels are written in, for whichever ISA this translation unit is compiled for.
//
// V is a GCC/Clang vector of floats: + - * / work on it, and a * b + c is one FMA where the ISA has it. Only what the
// language lacks stands here: loads that convert, stores that round, shuffles, gathers, reductions.
// Everything lives in the namespace SLK_ISA (see cmake/cpu_isa.cmake) so that no two ISAs share a symbol.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SLK_ISA
#error "csrc/cpu sources are compiled once per ISA with -DSLK_ISA=<name>; see cmake/cpu_isa.cmake"
#endif

namespace slk::cpu::SLK_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float V __attribute__((vector_size(kLanes * 4)));
typedef int32_t VI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VU __attribute__((vector_size(kLanes * 4)));

#define SLK_INLINE inline __attribute__((always_inline))

// ---- scalars ------------------------------------------------------------------------------------------------------

SLK_INLINE uint32_t to_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
SLK_INLINE float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

SLK_INLINE float to_float(float x) {
  return x;
}
SLK_INLINE float to_float(bf16 x) {
  return from_bits(uint32_t(x.bits) << 16);
}
SLK_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, body = x.bits & 0x7fffu;
  if (body >= 0x7c00u) return from_bits(sign | 0x7f800000u | (body & 0x3ffu) << 13);  // infinity, NaN
  // Scaling by 2^112 turns both normal and subnormal halves into the right float, exactly.
  return from_bits(sign | to_bits(from_bits(body << 13) * 0x1p112f));
}

SLK_INLINE void from_float(float x, float& out) {
  out = x;
}
SLK_INLINE void from_float(float x, bf16& out) {  // round to nearest, ties to even; NaN stays NaN
  const uint32_t u = to_bits(x);
  out.bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
SLK_INLINE void from_float(float x, f16& out) {
  const uint32_t u = to_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {  // rounds to 65536 or more
    h = 0x7c00u;
  } else if (a < 0x38800000u) {  // subnormal: adding 0.5 lets the FPU round at bit 2^-24
    h = to_bits(from_bits(a) + 0.5f) - 0x3f000000u;
  } else {
    h = (a - 0x38000000u + 0xfffu + (a >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | h);
}

// ---- vectors ------------------------------------------------------------------------------------------------------

SLK_INLINE V zero() {
  return V{};
}
SLK_INLINE V broadcast(float x) {
#if defined(__AVX512F__)
  return (V)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (V)_mm256_set1_ps(x);
#else
  return V{} + x;
#endif
}

// Loads kLanes elements from p (any alignment) as floats.
SLK_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SLK_INLINE V load(const bf16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
SLK_INLINE V load(const f16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Stores kLanes floats to p, rounded to nearest even for 16-bit types.
SLK_INLINE void store(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
SLK_INLINE void store(bf16* p, V v) {
#if defined(__AVX512F__)
  const __m512i u = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
#elif defined(__AVX2__)
  const __m256i u = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p[i]);
#endif
}
SLK_INLINE void store(f16* p, V v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p[i]);
#endif
}

// The first `count` (0..kLanes) elements only; the rest read as zero and are not written.
template <class T>
SLK_INLINE V load_n(const T* p, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}
template <class T>
SLK_INLINE void store_n(T* p, V v, int count) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}
#if defined(__AVX512F__)
SLK_INLINE V load_n(const float* p, int count) {
  return (V)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
SLK_INLINE void store_n(float* p, V v, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
#endif

// Sum of all lanes, by halves: lane order does not depend on anything but kLanes.
SLK_INLINE float sum(V v) {
  float a[kLanes];
  std::memcpy(a, &v, sizeof a);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

// p[index[i]] for the kLanes indices at `index`.
SLK_INLINE V gather(const float* p, const int32_t* index) {
#if defined(__AVX512F__)
  return (V)_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
#elif defined(__AVX2__)
  return (V)_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i*)index), 4);
#else
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[index[i]];
  return v;
#endif
}
SLK_INLINE V gather(const float* p, const int16_t* index) {
#if defined(__AVX512F__)
  return (V)_mm512_i32gather_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)index)), p, 4);
#elif defined(__AVX2__)
  return (V)_mm256_i32gather_ps(p, _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)index)), 4);
#else
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[index[i]];
  return v;
#endif
}

// 2:4 groups: kLanes kept elements are two each of kLanes / 2 groups of four columns. kept_lanes reads their 2-bit
// positions from kLanes / 4 bytes and returns each lane's column among the 2 kLanes of (low, high); pick_kept fetches
// it.
SLK_INLINE VI kept_lanes(const uint8_t* codes) {
#if defined(__AVX512F__)
  int32_t word;
  std::memcpy(&word, codes, 4);
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  return ((VI)_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts) & 3) | (VI)groups;
#elif defined(__AVX2__)
  uint16_t word;
  std::memcpy(&word, codes, 2);
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i groups = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
  return ((VI)_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts) & 3) | (VI)groups;
#else
  VI v;
  for (int i = 0; i < kLanes; ++i) v[i] = 4 * (i / 2) + (codes[i / 4] >> 2 * (i % 4) & 3);
  return v;
#endif
}
SLK_INLINE V pick_kept(V low, V high, VI lanes) {
#if defined(__AVX512F__)
  return (V)_mm512_permutex2var_ps((__m512)low, (__m512i)lanes, (__m512)high);
#elif defined(__AVX2__)
  const __m256 a = _mm256_permutevar8x32_ps((__m256)low, (__m256i)lanes);
  return (V)_mm256_blend_ps(a, _mm256_permutevar8x32_ps((__m256)high, (__m256i)lanes), 0xf0);
#else
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = i < kLanes / 2 ? low[lanes[i]] : high[lanes[i] - kLanes];
  return v;
#endif
}

// In-register transpose of a kLanes x kLanes tile: r[i][j] <-> r[j][i].
SLK_INLINE void transpose(V (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: 2x2 tiles of floats
    t[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {  // 4x4 tiles within each 128-bit lane
    u[i] = (__m512)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
    u[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
    u[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    u[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit lanes across the four groups of rows
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88),
                 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i] = (V)_mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 8] = (V)_mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4] = (V)_mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 12] = (V)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = (__m256)_mm256_unpacklo_pd((__m256d)t[i], (__m256d)t[i + 2]);
    u[i + 1] = (__m256)_mm256_unpackhi_pd((__m256d)t[i], (__m256d)t[i + 2]);
    u[i + 2] = (__m256)_mm256_unpacklo_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
    u[i + 3] = (__m256)_mm256_unpackhi_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (V)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = (V)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = i + 1; j < kLanes; ++j) {
      const float a = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = a;
    }
#endif
}

// lane j of the result = sum of all lanes of r[j]. Same order of additions for every j.
SLK_INLINE V sum_rows(V (&r)[kLanes]) {
  transpose(r);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) r[i] = r[i] + r[i + width];
  return r[0];
}

// ---- elementwise words of the optimizer kernels -------------------------------------------------------------------

// Whether a * b + c is rounded once: the compiler fuses it where the set can.
#if defined(__FMA__)
constexpr bool kFusesProducts = true;
#else
constexpr bool kFusesProducts = false;
#endif

// a * b + c rounded once on every ISA: for arithmetic that must give the same bits everywhere. (Without FMA hardware
// the double sum is rounded to float a second time, which changes a result about once in 2^29.)
SLK_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  V r;
  for (int i = 0; i < kLanes; ++i) r[i] = float(double(a[i]) * b[i] + c[i]);
  return r;
#endif
}
SLK_INLINE V sqrt(V a) {
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (V)_mm256_sqrt_ps((__m256)a);
#else
  V r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}
SLK_INLINE V abs(V a) {
  return (V)((VI)a & 0x7fffffff);
}
SLK_INLINE V max(V a, V b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
SLK_INLINE V min(V a, V b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (V)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
SLK_INLINE VI max(VI a, VI b) {
  return a > b ? a : b;
}
SLK_INLINE VI min(VI a, VI b) {
  return a < b ? a : b;
}
SLK_INLINE VU max(VU a, VU b) {
  return a > b ? a : b;
}
SLK_INLINE uint32_t max_lane(VU a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)a);
#elif defined(__AVX2__)
  __m128i x = _mm_max_epu32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
  x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1))));
#else
  uint32_t best = a[0];
  for (int i = 1; i < kLanes; ++i) best = best > a[i] ? best : a[i];
  return best;
#endif
}
SLK_INLINE V to_float(VI a) {
  return __builtin_convertvector(a, V);
}

// max(|a|, floor) for floor > 0.
SLK_INLINE V max_abs(V a, V floor) {
#if defined(__AVX512DQ__)
  return (V)_mm512_range_ps((__m512)a, (__m512)floor, 0b1011);  // the larger magnitude, without its sign
#else
  return max(abs(a), floor);
#endif
}
// negative where x has its sign bit, else positive.
SLK_INLINE VI by_sign(V x, VI negative, VI positive) {
#if defined(__AVX512F__)
  return (VI)_mm512_mask_mov_epi32((__m512i)positive, _mm512_movepi32_mask((__m512i)x), (__m512i)negative);
#elif defined(__AVX2__)
  return (VI)_mm256_blendv_ps((__m256)positive, (__m256)negative, (__m256)x);
#else
  return ((VI)x < 0) ? negative : positive;
#endif
}
// Bit i: lane i of a has none of `bits`.
SLK_INLINE uint16_t lanes_without(VI a, int32_t bits) {
#if defined(__AVX512F__)
  return _mm512_testn_epi32_mask((__m512i)a, _mm512_set1_epi32(bits));
#elif defined(__AVX2__)
  return uint16_t(_mm256_movemask_ps((__m256)((a & bits) == 0)));
#else
  uint16_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= uint16_t(((a[i] & bits) == 0) << i);
  return lanes;
#endif
}

// table[index & 15] in every lane, from a 64-byte aligned table.
SLK_INLINE V lookup(const float (&table)[16], VI index) {
#if defined(__AVX512F__)
  return (V)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)index);
  return (V)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32((__m256i)index, 28));
#else
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[index[i] & 15];
  return v;
#endif
}
SLK_INLINE VI lookup(const int32_t (&table)[16], VI index) {
#if defined(__AVX512F__)
  return (VI)_mm512_permutexvar_epi32((__m512i)index, _mm512_load_si512(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps((const float*)table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps((const float*)table + 8), (__m256i)index);
  return (VI)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32((__m256i)index, 28));
#else
  VI v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[index[i] & 15];
  return v;
#endif
}

// kLanes bytes <-> integers; the store keeps the low byte of each lane.
SLK_INLINE VI load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  VI v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}
SLK_INLINE void store_bytes(uint8_t* p, VI v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xff));
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(v[i]);
#endif
}

// a rounded to an integer: to nearest even, and down.
SLK_INLINE V nearest_integer(V a) {
#if defined(__AVX512F__)
  return (V)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (V)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  V r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_nearbyintf(a[i]);
  return r;
#endif
}
SLK_INLINE V floor(V a) {
#if defined(__AVX512F__)
  return (V)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (V)_mm256_floor_ps((__m256)a);
#else
  V r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_floorf(a[i]);
  return r;
#endif
}

// The high words of the 64-bit products a[i] b.
SLK_INLINE VU multiply_high(VU a, uint32_t b) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(int32_t(b));
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(x, y), 32);
  return (VU)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y));
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(int32_t(b));
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, y), 32);
  return (VU)_mm256_blend_epi32(even, _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y), 0xaa);
#else
  VU r;
  for (int i = 0; i < kLanes; ++i) r[i] = uint32_t(uint64_t(a[i]) * b >> 32);
  return r;
#endif
}

}  // namespace slk::cpu::SLK_ISA
