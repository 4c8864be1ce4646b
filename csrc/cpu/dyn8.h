// The codec dyn8: bitsandbytes' dynamic map (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861), bit for
// bit, without its 256-entry table.
//
// Magnitudes have an index t. Signed: code 127 +- t, t = 0..127, and 128 for +1 (there is no -1). Unsigned: code
// t - 1, t = 1..256. With e = floor(log2 t), k = t - 2^e and w = k / 2^e, decade e holds
//     value(t) = 10^(e - 6) * (b(w) + b(w + 2^-e)) / 2      (unsigned: 10^(e - 7)),
//     b(w)     = 0.1 + 0.9 w, rounded to fp32 as torch.linspace(0.1, 1, 2^e + 1) does,
// and value = 0 at t = 0 (unsigned: t = 1), 1 at t = 128 (256). linspace counts up from 0.1 in its lower half and down
// from 1 in its upper half; with S = fl(1 - 0.1f) the latter is fma(S, w, 1 - S), since 1 - S is exact. So
//     value = P * (fma(S, w, c) + fma(S, w + h, c))         with h = 2^-e, P = fl(10^(e - 6)) / 2,
// and c, h, P depend on e and on the half only: 16 table entries, whose index is the low exponent bits and the top
// mantissa bit of float(t). t = 0, 128 (1, 256) fall on entries with room for them: see decode_table.
// (torch computes linspace with FMA on every CPU that has it; its scalar build differs by one unit in the last place
// in 42 + 31 entries. The FMA table is the one that checkpoints hold.)
#pragma once

#include "cpu/simd.h"

namespace slk::cpu::SLK_ISA::dyn8 {

constexpr float kStep = 1.0f - 0.1f;        // S
constexpr float kUpperBase = 1.0f - kStep;  // exact
constexpr float kPower[8] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f, 1.0f};

// ---- value of a code ------------------------------------------------------------------------------------------------

// One magnitude; exact in double up to the roundings of the definition, so the same bits as decode() below.
template <bool kSigned>
constexpr float value(int t) {
  if (t == (kSigned ? 0 : 1)) return 0.0f;
  if (t == (kSigned ? 128 : 256)) return 1.0f;
  int e = 0;
  while (t >> (e + 1)) ++e;
  const double h = 1.0 / (1 << e), w = double(t - (1 << e)) * h;
  const double c = w < 0.5 ? 0.1f : kUpperBase;
  const float low = float(double(kStep) * w + c), high = float(double(kStep) * (w + h) + c);
  return kPower[kSigned ? e : e - 1] * ((low + high) / 2);
}

struct DecodeTable {
  alignas(64) float c[16], h[16], p[16];
};
template <bool kSigned>
constexpr DecodeTable decode_table() {
  DecodeTable table{};
  for (int slot = 0; slot < 16; ++slot) {
    const int e = kSigned ? (slot / 2 + 1) % 8 : slot / 2 + 1;  // float(2^e) has the exponent field 127 + e
    table.c[slot] = slot % 2 ? kUpperBase : 0.1f;
    table.h[slot] = 1.0f / (1 << e);
    table.p[slot] = e <= 7 ? kPower[kSigned ? e : e - 1] / 2 : 0;
  }
  // Slots with more than one magnitude in different decades: h = 1 makes w = t - 1, so that the two terms cancel
  // exactly at the zero, and P then gives the other magnitude its value.
  if (kSigned) {
    table.c[0] = kStep / 2;  // t = 0 and t = 2
    table.h[0] = 1.0f;
    table.p[0] = 0x1.e4acd8p-21f;
    table.c[12] = 0.5f;  // t = 128
    table.p[12] = 0x1.fc6cd8p-1f;
  } else {
    table.c[14] = -kStep / 2;  // t = 1 and t = 256
    table.h[14] = 1.0f;
    table.p[14] = 0x1.1d8f56p-9f;
  }
  return table;
}
template <bool kSigned>
constexpr DecodeTable kDecode = decode_table<kSigned>();

// The map's values of kLanes codes.
template <bool kSigned>
SLK_INLINE V decode(VI code) {
  const V q = to_float(kSigned ? code - 127 : code + 1), t = kSigned ? abs(q) : q;
  const VI slot = (VI)((VU)t >> 22);
  const V h = lookup(kDecode<kSigned>.h, slot), c = lookup(kDecode<kSigned>.c, slot), s = broadcast(kStep);
  const V w = fma(t, h, broadcast(-1.0f));
  const V magnitude = lookup(kDecode<kSigned>.p, slot) * (fma(s, w, c) + fma(s, w + h, c));
  return kSigned ? (V)((VI)magnitude | ((VI)q & INT32_MIN)) : magnitude;
}

// ---- code of a value ------------------------------------------------------------------------------------------------
//
// Within a decade the map is affine up to roundings, so one FMA gives 256 + index + fraction, whose fp32 bits are a
// fixed-point number with 15 fraction bits. The fraction tells how far the nearest midpoint is: where that is less
// than 4 units, which covers every rounding on the way (the reciprocal's and the table's included), the lane is
// decided exactly instead. Decades are told apart by one comparison, since a pair of binades holds at most one of
// their borders; a border is biased upwards by 4 units, because below it the FMA also sees a midpoint there.

constexpr int32_t kFixedZero = 0x43800000;  // 256.0f

struct EncodeTable {
  alignas(64) float border[16];             // by pair of binades (bits >> 24): the decade border in it, or infinity
  alignas(64) int32_t decade[16];           // and the decade below that border
  alignas(64) float slope[16], offset[16];  // by decade: 0 holds only zero, 1..7 the map's, 8 the neighbourhood of 1
  alignas(64) int32_t last[16];             // the decade's last index
};
template <bool kSigned>
constexpr EncodeTable encode_table() {
  constexpr int zero = kSigned ? 0 : 1;           // t of the value zero: the index is t - zero
  constexpr int first = kSigned ? 0 : 1;          // e of the first decade
  constexpr double top = kSigned ? 0.99 : 0.995;  // between the last two midpoints; decade 8 starts here
  EncodeTable table{};
  double border[8] = {};
  for (int i = 0; i < 7; ++i) {
    const int t = 1 << (i + first);
    border[i] = (double(value<kSigned>(i ? t - 1 : zero)) + value<kSigned>(t)) / 2;
  }
  border[7] = top;
  for (int pair = 48; pair < 64; ++pair) {  // 2^-31 to 2
    double low = 0x1p-31;
    for (int i = 48; i < pair; ++i) low *= 4;
    float inside = __builtin_inff();
    int below = 0;
    for (int i = 0; i < 8; ++i) {
      if (border[i] < low) ++below;
      if (border[i] >= low && border[i] < 4 * low) inside = float(border[i] * (1 + 0x1p-22));
    }
    table.border[pair & 15] = inside;
    table.decade[pair & 15] = below;
  }
  table.slope[0] = float(0.5 / border[0]);
  table.offset[0] = 256.5f;
  table.last[0] = 0;
  for (int d = 1; d <= 7; ++d) {
    const int e = d - 1 + first;
    const double width = double(1 << e) / 0.9;
    table.slope[d] = float(width / kPower[d - 1]);
    table.offset[d] = float(256 - zero + (1 << e) - 0.1 * width);
    table.last[d] = (2 << e) - 1 - zero;
  }
  constexpr int t_one = kSigned ? 128 : 256;
  const double midpoint = (double(value<kSigned>(t_one - 1)) + 1) / 2, slope = 0.5 / (midpoint - top);
  table.slope[8] = float(slope);
  table.offset[8] = float(256 + t_one - zero - slope * midpoint);
  table.last[8] = t_one - zero;
  return table;
}
template <bool kSigned>
constexpr EncodeTable kEncode = encode_table<kSigned>();

// The code nearest to x / scale, by exact comparison with midpoints; ties go to the smaller magnitude. `t` starts the
// search. The sums of two neighbours are exact in double.
template <bool kSigned>
inline int nearest(float x, float scale, int t) {
  const float y = x / scale;
  const double twice = 2.0 * (y < 0 ? -double(y) : double(y));
  const int first = kSigned ? 0 : 1, last = kSigned ? (y < 0 ? 127 : 128) : 256;
  while (t > first && twice <= double(value<kSigned>(t - 1)) + value<kSigned>(t)) --t;
  while (t < last && twice > double(value<kSigned>(t)) + value<kSigned>(t + 1)) ++t;
  return kSigned ? (y < 0 ? 127 - t : 127 + t) : t - 1;
}

// The same, starting from a code.
template <bool kSigned>
inline uint8_t nearest_code(float x, float scale, uint8_t code) {
  const int t = kSigned ? (code < 127 ? 127 - code : code - 127) : code + 1;
  return uint8_t(nearest<kSigned>(x, scale, t));
}

// Codes of kLanes finite values; |x| <= scale and reciprocal = 1 / scale, both normal numbers. The lanes of `doubtful`
// (a bit each) may be off by one: nearest_code() decides them.
template <bool kSigned>
SLK_INLINE VI encode(V x, V reciprocal, uint16_t& doubtful) {
  constexpr const EncodeTable& table = kEncode<kSigned>;
  const V a = max_abs(x * reciprocal, broadcast(0x1p-24f));
  const VI pair = (VI)((VU)a >> 24);
  const VI decade = count_ge(lookup(table.decade, pair), a, lookup(table.border, pair));
  const VI fixed = (VI)fma(a, lookup(table.slope, decade), lookup(table.offset, decade)) - (kFixedZero - 4);
  doubtful = lanes_without(fixed, 0x7ff8);  // within 4 units of a midpoint
  const VI index = min(fixed >> 15, lookup(table.last, decade));
  if (!kSigned) return index;
  const VI code = by_sign(x, 127 - index, 127 + index);
  return max(code, VI{});  // there is no -1
}

}  // namespace slk::cpu::SLK_ISA::dyn8
