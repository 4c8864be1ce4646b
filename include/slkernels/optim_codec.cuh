// The codecs of family `optim`: what a code means and which code a value gets. This is the definition for both
// devices; vector code must give the same bits. Only IEEE operations that are rounded to nearest, each written so that
// no compiler can fuse two of them.
//
// A block is stored as one fp32 `scale` and a code for each element; A = the largest |x| of the block.
//
//   codec    bits  scale           x is decoded as      code of x
//   dyn8     8     A               scale value(code) *  nearest of the map to fl(x / A), ties to the smaller magnitude
//   dyn8u    8     A               scale value(code) *  the same; x < 0 counts as 0
//   lin8     8     A / 127         scale q              q = rint(x inv),  inv = fl(127 / A);  q as int8
//   lin8u    8     A / 255         scale q              q = rint(x inv),  inv = fl(255 / A);  at least 1 where x > 0
//   cmp8     8     A               scale q/(254 - |q|)  q = rint(fl(x / fma(|x|, 1/254, A/254)));  q as int8
//   cmp8u    8     sqrt(A) / 255   (scale q)^2          q = rint(sqrt(x) inv),  inv = fl(255 / sqrt(A));  at least 1
//                                                       where x > 0
//   dyn4     4     A               scale value(code)    number of midpoints below fl(|x| inv),  inv = fl(1 / A)
//   lin4u    4     A               scale (code + 1)/16  code + 1 = rint(x inv), at least 1,  inv = fl(16 / A)
//   fp8      8     A / 448         scale e4m3(code)     fl(x inv) to e4m3, nearest even,  inv = fl(448 / A)
//   fp8u     8     A / 448         scale e4m3(code)     the same; at least 1 (the smallest subnormal) where x > 0
//
// * dequantize_block; the steps decode dyn8 and dyn8u with one FMA instead: decode_in_step().
//
// rint is to nearest even. Every product, quotient and root above is one fp32 operation. All encoders but dyn8's and
// cmp8u's see x and A times 2^100 where A < 2^-100, times 2^-100 where A > 2^100, so that inv is a normal number.
//
// Zero: 0 becomes exactly 0 in every codec but lin4u, which has no zero: there 0 becomes scale / 16 (unless the whole
// block is 0). Codes of zero: 127 for dyn8, 7 for dyn4, 0 for the others. A block of zeros has scale 0, and any codes.
// A non-zero v decodes to a non-zero value in lin8u, cmp8u, lin4u and fp8u (down to the underflow of fp32: blocks with
// A < 2^-110, and elements below 2^-130 of A, are not covered); in dyn8u it may decode to 0, below 1.6e-7 A, as it does
// in bitsandbytes, whose states this codec shares.
// A block with a NaN or an infinity has scale NaN.
//
// 4-bit codes are packed two a byte: element 2 i in the high half, element 2 i + 1 in the low half (torchao's order).
// The last low half of an odd tensor is 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "slkernels/types.h"

namespace slk {

enum class Codec : int { dyn8, dyn8u, lin8, lin8u, cmp8, cmp8u, dyn4, lin4u, fp8, fp8u };

namespace codec {
SLK_PER_ISA {
  SLK_HD constexpr bool is_signed(Codec c) {
    return c == Codec::dyn8 || c == Codec::lin8 || c == Codec::cmp8 || c == Codec::dyn4 || c == Codec::fp8;
  }
  SLK_HD constexpr int bits(Codec c) {
    return c == Codec::dyn4 || c == Codec::lin4u ? 4 : 8;
  }
  SLK_HD constexpr int zero_code(Codec c) {
    return c == Codec::dyn8 ? 127 : c == Codec::dyn4 ? 7 : 0;
  }
  // The codec of v that goes with a codec of m.
  SLK_HD constexpr Codec second_moment(Codec m) {
    return m == Codec::dyn4 ? Codec::lin4u : Codec(int(m) + 1);
  }

  // ---- fp32 operations, each rounded once
  // -----------------------------------------------------------------------------

  SLK_HD inline float fused(float a, float b, float c) {  // a b + c
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
  }
  SLK_HD inline float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
  }
  SLK_HD inline float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
  SLK_HD inline float subtract(float a, float b) {  // never fused with the product that made a or b
#if defined(__CUDA_ARCH__)
    return __fsub_rn(a, b);
#else
    const volatile float x = a, y = b;
    return x - y;
#endif
  }
  SLK_HD inline float root(float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return __builtin_sqrtf(a);
#endif
  }
  SLK_HD inline int round_even(float a) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(a);
#else
    return int(__builtin_nearbyintf(a));
#endif
  }
  SLK_HD inline float magnitude(float a) {
#if defined(__CUDA_ARCH__)
    return fabsf(a);
#else
    return __builtin_fabsf(a);
#endif
  }
  SLK_HD inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
  }
  SLK_HD inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
  }

  // ---- dyn8, dyn8u
  // ----------------------------------------------------------------------------------------------------
  //
  // bitsandbytes' dynamic map (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861), bit for bit, without
  // its 256-entry table.
  //
  // Magnitudes have an index t. Signed: code 127 +- t, t = 0..127, and 128 for +1 (there is no -1). Unsigned: code
  // t - 1, t = 1..256. With e = floor(log2 t), k = t - 2^e and w = k / 2^e, decade e holds
  //     value(t) = 10^(e - 6) * (b(w) + b(w + 2^-e)) / 2      (unsigned: 10^(e - 7)),
  //     b(w)     = 0.1 + 0.9 w, rounded to fp32 as torch.linspace(0.1, 1, 2^e + 1) does,
  // and value = 0 at t = 0 (unsigned: t = 1), 1 at t = 128 (256). linspace counts up from 0.1 in its lower half and
  // down from 1 in its upper half; with S = fl(1 - 0.1f) the latter is fma(S, w, 1 - S), since 1 - S is exact. So
  //     value = P * (fma(S, w, c) + fma(S, w + h, c))         with h = 2^-e, P = fl(10^(e - 6)) / 2,
  // and c, h, P depend on e and on the half only.
  // (torch computes linspace with FMA on every CPU that has it; its scalar build differs by one unit in the last place
  // in 42 + 31 entries. The FMA table is the one that checkpoints hold.)

  constexpr float kStep = 1.0f - 0.1f;        // S
  constexpr float kUpperBase = 1.0f - kStep;  // exact
  SLK_HD constexpr float decade_power(int decade) {
    return decade == 0   ? 1e-6f
           : decade == 1 ? 1e-5f
           : decade == 2 ? 1e-4f
           : decade == 3 ? 1e-3f
           : decade == 4 ? 1e-2f
           : decade == 5 ? 1e-1f
                         : 1.0f;
  }

  // The value of a magnitude; exact in double up to the roundings of the definition.
  template <bool kSigned>
  SLK_HD constexpr float dynamic_value(int t) {
    if (t == (kSigned ? 0 : 1)) return 0.0f;
    if (t == (kSigned ? 128 : 256)) return 1.0f;
    int e = 0;
    while (t >> (e + 1)) ++e;
    const double h = 1.0 / (1 << e), w = double(t - (1 << e)) * h;
    const double c = w < 0.5 ? 0.1f : kUpperBase;
    const float low = float(double(kStep) * w + c), high = float(double(kStep) * (w + h) + c);
    return decade_power(kSigned ? e : e - 1) * ((low + high) / 2);
  }

  // The magnitude nearest to |y|, by comparison with midpoints, which are exact in double; ties to the smaller one. The
  // search starts at t.
  template <bool kSigned>
  SLK_HD inline int nearest_dynamic(float y, int t) {
    const double twice = 2.0 * double(magnitude(y));
    const int first = kSigned ? 0 : 1, last = kSigned ? (y < 0 ? 127 : 128) : 256;
    while (t > first && twice <= double(dynamic_value<kSigned>(t - 1)) + dynamic_value<kSigned>(t)) --t;
    while (t < last && twice > double(dynamic_value<kSigned>(t)) + dynamic_value<kSigned>(t + 1)) ++t;
    return t;
  }

  // What the steps decode with: one FMA, value(t) scale = fma(t, fl(slope scale), fl(offset scale)), within 2e-6 of the
  // map (its roundings of linspace are the difference), exact at 0 and, signed, at +-A. slope and offset depend on the
  // slot of t: the low three exponent bits and the top mantissa bit of float(t), so that a table has 16 entries. In the
  // slots with two magnitudes, 0 and 2 (unsigned: 1 and 256), the line goes through both.
  SLK_HD inline int dynamic_slot(int t) {
    return int(bits_of(float(t)) >> 22 & 15);
  }
  struct Line {
    float slope, offset;
  };
  template <bool kSigned>
  SLK_HD constexpr Line dynamic_line(int slot) {
    const int e = kSigned ? (slot / 2 + 1) % 8 : slot / 2 + 1;  // float(2^e) has the exponent field 127 + e
    if (kSigned && slot == 0) return {dynamic_value<true>(2) / 2, 0.0f};
    if (kSigned && e == 7) return {0x1p-7f, 0.0f};
    if (!kSigned && e == 8) return {float(1.0 / 255), -float(1.0 / 255)};
    double power = 1e-6;
    for (int i = 0; i < (kSigned ? e : e - 1); ++i) power *= 10;
    return {float(0.9 * power / (1 << e)), float(power * (0.45 / (1 << e) - 0.8))};
  }

  // ---- dyn4
  // -----------------------------------------------------------------------------------------------------------
  //
  // The dynamic map with 3 exponent bits (Li, Chen, Zhu, "Memory efficient optimizers with 4-bit states", arXiv
  // 2309.01507), sorted: code 7 +- t for magnitude t, t = 8 only positive. The same table as torchao's 4-bit AdamW.

  SLK_HD constexpr float dyn4_value(int t) {
    return t == 0   ? 0.0f
           : t == 1 ? 0.0055f
           : t == 2 ? 0.0325000025f
           : t == 3 ? 0.0775f
           : t == 4 ? 0.21249999f
           : t == 5 ? 0.4375f
           : t == 6 ? 0.6625f
           : t == 7 ? 0.8875f
                    : 1.0f;
  }
  // Between magnitudes t and t + 1: the largest fp32 number that is not above the midpoint, so that y > it is exact.
  SLK_HD constexpr float dyn4_midpoint(int t) {
    return t == 0   ? 0.00275f
           : t == 1 ? 0.019000001f
           : t == 2 ? 0.055f
           : t == 3 ? 0.145f
           : t == 4 ? 0.325f
           : t == 5 ? 0.55f
           : t == 6 ? 0.775f
                    : 0.94374996f;
  }

  // ---- fp8
  // ------------------------------------------------------------------------------------------------------------

  // e4m3 of a code's low 7 bits. Codes 127 and 255, NaN in e4m3fn, are never written; they read as 480.
  SLK_HD inline float e4m3_value(int code) {
    const int e = code >> 3 & 15, m = code & 7;
    return e ? float_of(uint32_t(e + 120) << 23 | uint32_t(m) << 20) : float(m) * 0x1p-9f;
  }
  // The magnitude nearest to a in [0, 464), ties to even.
  SLK_HD inline int e4m3_nearest(float a) {
    if (a < 0x1p-6f) return round_even(a * 512.0f);  // subnormal, or its carry into the first normal one
    const uint32_t u = bits_of(a);
    return int((u + 0x7ffffu + (u >> 20 & 1)) >> 20) - (120 << 3);
  }

  // ---- a block's scale
  // ------------------------------------------------------------------------------------------------

  // The largest stored magnitude in units of the stored scale (cmp8u: its root).
  SLK_HD constexpr float top(Codec c) {
    return c == Codec::lin8                         ? 127.0f
           : c == Codec::lin8u || c == Codec::cmp8u ? 255.0f
           : c == Codec::fp8 || c == Codec::fp8u    ? 448.0f
                                                    : 1.0f;
  }

  // The stored scale of a block whose largest magnitude is `largest`, a finite number.
  template <Codec kCodec>
  SLK_HD inline float scale_of(float largest) {
    const float a = kCodec == Codec::cmp8u ? root(largest) : largest;
    return top(kCodec) == 1.0f ? a : divide(a, top(kCodec));
  }

  // What encode() needs to know about a block.
  struct Block {
    float power;    // x is multiplied by it first
    float largest;  // A times power; cmp8u: sqrt(A)
    float inverse;  // fl(top / largest)
  };

  constexpr float kSmallScale = 0x1p-100f, kLargeScale = 0x1p100f;

  template <Codec kCodec>
  SLK_HD inline Block block_of(float largest) {
    Block b;
    b.power = kCodec == Codec::cmp8u  ? 1.0f
              : largest < kSmallScale ? 0x1p100f
              : largest > kLargeScale ? 0x1p-100f
                                      : 1.0f;
    b.largest = kCodec == Codec::cmp8u ? root(largest) : multiply(largest, b.power);
    b.inverse = divide(kCodec == Codec::lin4u ? 16.0f : top(kCodec), b.largest);
    return b;
  }

  // ---- code of a value, value of a code
  // -------------------------------------------------------------------------------
  //
  // index: the position of a code on its side of zero, ascending in magnitude: t above for the dynamic maps, |q|, the
  // low 7 bits of an fp8 code, code + 1 for lin4u.

  constexpr float kCompand = float(1.0 / 254);

  // The value of an index in units of the stored scale (cmp8u: squared scale).
  template <Codec kCodec>
  SLK_HD inline float value_of(int t) {
    switch (kCodec) {
      case Codec::dyn8:
        return dynamic_value<true>(t);
      case Codec::dyn8u:
        return dynamic_value<false>(t);
      case Codec::cmp8:
        return divide(float(t), float(254 - t));
      case Codec::cmp8u:
        return float(t * t);
      case Codec::dyn4:
        return dyn4_value(t);
      case Codec::lin4u:
        return float(t) * 0x1p-4f;
      case Codec::fp8:
      case Codec::fp8u:
        return e4m3_value(t);
      default:
        return float(t);
    }
  }

  // The largest index on the side of x, and the smallest that a non-zero x may get.
  template <Codec kCodec>
  SLK_HD constexpr int last_index(bool negative) {
    return kCodec == Codec::dyn8                              ? (negative ? 127 : 128)
           : kCodec == Codec::dyn8u                           ? 256
           : kCodec == Codec::lin8u || kCodec == Codec::cmp8u ? 255
           : kCodec == Codec::dyn4                            ? (negative ? 7 : 8)
           : kCodec == Codec::lin4u                           ? 16
           : kCodec == Codec::fp8 || kCodec == Codec::fp8u    ? 126
                                                              : 127;
  }
  template <Codec kCodec>
  SLK_HD constexpr int first_index() {
    return is_signed(kCodec) ? 0 : 1;  // dyn8u: the index of its zero
  }

  // The index nearest to x; unsigned codecs take x >= 0.
  template <Codec kCodec>
  SLK_HD inline int nearest_index(float x, const Block& b) {
    x = multiply(x, b.power);
    const float a = magnitude(x);
    int t = 0;
    switch (kCodec) {
      case Codec::dyn8:
        return nearest_dynamic<true>(divide(x, b.largest), 64);
      case Codec::dyn8u:
        return nearest_dynamic<false>(divide(x, b.largest), 128);
      case Codec::cmp8:
        t = round_even(divide(a, fused(a, kCompand, multiply(b.largest, kCompand))));
        break;
      case Codec::cmp8u:
        t = round_even(multiply(root(a), b.inverse));
        break;
      case Codec::dyn4:
        for (const float y = multiply(a, b.inverse); t < (x < 0 ? 7 : 8) && y > dyn4_midpoint(t);) ++t;
        break;
      case Codec::fp8:
      case Codec::fp8u:
        t = e4m3_nearest(multiply(a, b.inverse));
        break;
      default:
        t = round_even(multiply(a, b.inverse));
    }
    return !is_signed(kCodec) && t == 0 && (x > 0 || kCodec == Codec::lin4u) ? 1 : t;
  }

  // Stochastic rounding: one of the two indices around x, so that the mean of the decoded values is x; `random` is a
  // number in [0, 2^16). Below the smallest and above the largest index as nearest_index().
  template <Codec kCodec>
  SLK_HD inline int stochastic_index(float x, const Block& b, float scale, uint32_t random) {
    const int t = nearest_index<kCodec>(x, b);
    const float unit = kCodec == Codec::cmp8u ? multiply(scale, scale) : scale, y = divide(magnitude(x), unit);
    const int low = value_of<kCodec>(t) <= y ? t : t - 1;
    if (low < first_index<kCodec>() || low >= last_index<kCodec>(x < 0)) return t;
    const float below = value_of<kCodec>(low), gap = subtract(value_of<kCodec>(low + 1), below);
    return subtract(y, below) > multiply(gap, float(random) * 0x1p-16f) ? low + 1 : low;
  }

  // Index and sign to code.
  template <Codec kCodec>
  SLK_HD inline int code_of(int t, bool negative) {
    switch (kCodec) {
      case Codec::dyn8:
        return negative ? 127 - t : 127 + t;
      case Codec::dyn4:
        return negative ? 7 - t : 7 + t;
      case Codec::dyn8u:
      case Codec::lin4u:
        return t - 1;
      case Codec::fp8:
        return negative ? t | 128 : t;  // -0 has a code of its own
      default:
        return (negative ? -t : t) & 255;
    }
  }

  template <Codec kCodec>
  SLK_HD inline int encode(float x, const Block& b) {
    return code_of<kCodec>(nearest_index<kCodec>(x, b), (bits_of(x) >> 31) != 0);
  }
  template <Codec kCodec>
  SLK_HD inline int encode_stochastic(float x, const Block& b, float scale, uint32_t random) {
    return code_of<kCodec>(stochastic_index<kCodec>(x, b, scale, random), (bits_of(x) >> 31) != 0);
  }

  template <Codec kCodec>
  SLK_HD inline float decode(int code, float scale) {
    if (kCodec == Codec::cmp8u) {
      const float r = multiply(float(code), scale);
      return multiply(r, r);
    }
    const int zero = zero_code(kCodec);
    int t = code;
    bool negative = false;
    if (kCodec == Codec::dyn8 || kCodec == Codec::dyn4) {
      negative = code < zero;
      t = negative ? zero - code : code - zero;
    } else if (kCodec == Codec::dyn8u || kCodec == Codec::lin4u) {
      t = code + 1;
    } else if (kCodec == Codec::fp8 || kCodec == Codec::fp8u) {
      negative = code > 127;
      t = code & 127;
    } else if (is_signed(kCodec)) {
      const int q = code > 127 ? code - 256 : code;
      negative = q < 0;
      t = negative ? -q : q;
    }
    const float x = multiply(value_of<kCodec>(t), scale);
    return negative ? -x : x;
  }

  // As the steps decode: dyn8 and dyn8u by dynamic_line(), the others by decode().
  template <Codec kCodec>
  SLK_HD inline float decode_in_step(int code, float scale) {
    if (kCodec != Codec::dyn8 && kCodec != Codec::dyn8u) return decode<kCodec>(code, scale);
    const bool negative = kCodec == Codec::dyn8 && code < 127;
    const int t = kCodec == Codec::dyn8u ? code + 1 : negative ? 127 - code : code - 127;
    const Line line = dynamic_line<kCodec == Codec::dyn8>(dynamic_slot(t));
    const float x = fused(float(t), multiply(line.slope, scale), multiply(line.offset, scale));
    return negative ? -x : x;
  }

  // ---- rounding of parameters
  // -----------------------------------------------------------------------------------------

  // fp32 bits to the 16 high ones, stochastically: adds a random number in [0, 2^16) to what is cut off. NaN stays NaN;
  // an infinity stays one.
  SLK_HD inline uint16_t round_bf16_stochastic(float x, uint32_t random) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7f800000u) == 0x7f800000u) return uint16_t(u >> 16 | ((u & 0x7fffffu) ? 0x40u : 0u));
    return uint16_t((u + random) >> 16);
  }

  // fp32 to float16 bits: adds a random number to the 13 bits that are cut off, below the smallest normal number to 13
  // bits under the last one (and what lies below these is dropped). NaN stays NaN; from 2^16 on, infinity.
  SLK_HD inline uint16_t round_f16_stochastic(float x, uint32_t random) {
    const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    const uint32_t fixed = a < 0x38800000u ? uint32_t(float_of(a) * 0x1p37f) : a - 0x38000000u;
    const uint32_t h = (fixed + (random >> 3)) >> 13;
    return uint16_t(sign | (h < 0x7c00u ? h : 0x7c00u));
  }

  // A master weight: bf16 bits `high` and a remainder `low`, together the fp32 number with the bits
  //   int16:  (high << 16) + low           every bit of fp32 (as TransformerEngine's param_remainder)
  //   int8:   (high << 16) + (low << 8)    fp32 rounded to 16 significand bits
  // `high` is the number rounded to bf16, ties away from zero. NaN is stored as high = 0x7fc0, low = 0.
  struct Master {
    uint16_t high;
    int16_t low;
  };
  SLK_HD inline float join_master16(uint16_t high, int16_t low) {
    return float_of((uint32_t(high) << 16) + uint32_t(int32_t(low)));
  }
  SLK_HD inline float join_master8(uint16_t high, int8_t low) {
    return float_of((uint32_t(high) << 16) + (uint32_t(int32_t(low)) << 8));
  }
  SLK_HD inline Master split_master16(float x) {
    const uint32_t u = x != x ? 0x7fc00000u : bits_of(x);
    return {uint16_t((u + 0x8000u) >> 16), int16_t(u)};
  }
  // `added` decides how the 8 low bits are rounded away: below.
  SLK_HD inline Master split_master8_added(float x, uint32_t added) {
    const bool special = (bits_of(x) & 0x7f800000u) == 0x7f800000u;
    const uint32_t u = x != x ? 0x7fc00000u : bits_of(x), r = special ? u : u + added;
    return {uint16_t((r + 0x8000u) >> 16), int16_t(int8_t(r >> 8))};
  }
  SLK_HD inline Master split_master8(float x) {  // nearest even
    return split_master8_added(x, 0x7fu + (bits_of(x) >> 8 & 1));
  }
  SLK_HD inline Master split_master8_stochastic(float x, uint32_t random) {  // random in [0, 2^16)
    return split_master8_added(x, random >> 8);
  }

}  // SLK_PER_ISA
}  // namespace codec
}  // namespace slk
