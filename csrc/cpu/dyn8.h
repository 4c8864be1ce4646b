// The codecs dyn8 and dyn8u in vectors. Definition: slkernels/optim_codec.cuh.
#pragma once

#include "cpu/simd_pairs.h"
#include "slkernels/optim_codec.cuh"

namespace slk::cpu::SLK_ISA::dyn8 {

template <bool kSigned>
constexpr float value(int t) {
  return codec::dynamic_value<kSigned>(t);
}

// ---- value of a code ------------------------------------------------------------------------------------------------
//
// Tables by the slot of t: the low three exponent bits and the top mantissa bit of float(t).

struct DecodeTable {
  alignas(64) float c[16], h[16], p[16];
};
template <bool kSigned>
constexpr DecodeTable decode_table() {
  DecodeTable table{};
  for (int slot = 0; slot < 16; ++slot) {
    const int e = kSigned ? (slot / 2 + 1) % 8 : slot / 2 + 1;  // float(2^e) has the exponent field 127 + e
    table.c[slot] = slot % 2 ? codec::kUpperBase : 0.1f;
    table.h[slot] = 1.0f / (1 << e);
    table.p[slot] = e <= 7 ? codec::decade_power(kSigned ? e : e - 1) / 2 : 0;
  }
  // Slots with more than one magnitude in different decades: h = 1 makes w = t - 1, so that the two terms cancel
  // exactly at the zero, and P then gives the other magnitude its value.
  if (kSigned) {
    table.c[0] = codec::kStep / 2;  // t = 0 and t = 2
    table.h[0] = 1.0f;
    table.p[0] = 0x1.e4acd8p-21f;
    table.c[12] = 0.5f;  // t = 128
    table.p[12] = 0x1.fc6cd8p-1f;
  } else {
    table.c[14] = -codec::kStep / 2;  // t = 1 and t = 256
    table.h[14] = 1.0f;
    table.p[14] = 0x1.1d8f56p-9f;
  }
  return table;
}
template <bool kSigned>
constexpr DecodeTable kDecode = decode_table<kSigned>();

// t, with the sign of its side; and the index of its slot in the low 4 bits.
template <bool kSigned>
SLK_INLINE V index_of(VI code) {
  return to_float(kSigned ? code - 127 : code + 1);
}
SLK_INLINE VI slot_of(V t) {
  return (VI)((VU)t >> 22);
}
SLK_INLINE V with_sign_of(V magnitude, V q) {
  return (V)((VI)magnitude | ((VI)q & INT32_MIN));
}

// The map's values of kLanes codes.
template <bool kSigned>
SLK_INLINE V decode(VI code) {
  constexpr const DecodeTable& table = kDecode<kSigned>;
  const V q = index_of<kSigned>(code), t = kSigned ? abs(q) : q;
  const VI slot = slot_of(t);
  const V h = lookup(table.h, slot), c = lookup(table.c, slot), s = broadcast(codec::kStep);
  const V w = fma(t, h, broadcast(-1.0f));
  const V magnitude = lookup(table.p, slot) * (fma(s, w, c) + fma(s, w + h, c));
  return kSigned ? with_sign_of(magnitude, q) : magnitude;
}

struct LineTable {
  alignas(64) float slope[16], offset[16];
};
template <bool kSigned>
constexpr LineTable line_table() {
  LineTable table{};
  for (int slot = 0; slot < 16; ++slot) {
    table.slope[slot] = codec::dynamic_line<kSigned>(slot).slope;
    table.offset[slot] = codec::dynamic_line<kSigned>(slot).offset;
  }
  return table;
}
template <bool kSigned>
constexpr LineTable kLine = line_table<kSigned>();

// codec::decode_in_step.
template <bool kSigned>
struct StepDecoder {
  Table<16> slope, offset;
  explicit StepDecoder(float scale)
      : slope(load_table(kLine<kSigned>.slope) * scale), offset(load_table(kLine<kSigned>.offset) * scale) {}
  SLK_INLINE V operator()(VI code) const {
    const V q = index_of<kSigned>(code);
    const VI slot = slot_of(q);
    V c = lookup(offset, slot);
    if (kSigned) c = (V)((VI)c ^ ((VI)q & INT32_MIN));
    return fma(q, lookup(slope, slot), c);
  }
};

// ---- code of a value ------------------------------------------------------------------------------------------------
//
// Within a decade the map is affine up to roundings, so one FMA gives 256 + index + fraction, whose fp32 bits are a
// fixed-point number with 15 fraction bits. The fraction tells how far the nearest midpoint is: where that is less
// than 4 units, which covers every rounding on the way (the reciprocal's and the table's included), the lane is
// decided exactly instead. Decades are told apart by one comparison, since a pair of binades holds at most one of
// their borders; a border is biased upwards by 4 units, because below it the FMA also sees a midpoint there.
//
// Tables by pair of binades (bits >> 24) and side of its border: pairs from 2^-31 to 2 have bit 4 set, and a value at
// or above its border adds 16, which clears it.

struct EncodeTable {
  alignas(64) float border[16];             // the decade border in the pair, or infinity
  alignas(64) float slope[32], offset[32];  // of the decade; the offset includes 4 units
  alignas(64) float last[32];               // the largest fixed-point number of the decade's last index
};
template <bool kSigned>
constexpr EncodeTable encode_table() {
  constexpr int zero = kSigned ? 0 : 1;           // t of the value zero: the index is t - zero
  constexpr int first = kSigned ? 0 : 1;          // e of the first decade
  constexpr double top = kSigned ? 0.99 : 0.995;  // between the last two midpoints; decade 8 starts here
  // By decade: 0 holds only zero, 1..7 are the map's, 8 is the neighbourhood of 1.
  double border[8] = {};  // above decade d
  float slope[9] = {}, offset[9] = {};
  int last[9] = {};
  for (int d = 0; d < 7; ++d) {
    const int t = 1 << (d + first);
    border[d] = (double(value<kSigned>(d ? t - 1 : zero)) + value<kSigned>(t)) / 2;
  }
  border[7] = top;
  slope[0] = float(0.5 / border[0]);
  offset[0] = 256.5f;
  for (int d = 1; d <= 7; ++d) {
    const int e = d - 1 + first;
    const double width = double(1 << e) / 0.9;
    slope[d] = float(width / codec::decade_power(d - 1));
    offset[d] = float(256 - zero + (1 << e) - 0.1 * width);
    last[d] = (2 << e) - 1 - zero;
  }
  constexpr int t_one = kSigned ? 128 : 256;
  const double midpoint = (double(value<kSigned>(t_one - 1)) + 1) / 2, steep = 0.5 / (midpoint - top);
  slope[8] = float(steep);
  offset[8] = float(256 + t_one - zero - steep * midpoint);
  last[8] = t_one - zero;

  EncodeTable table{};
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
    for (int above = 0; above < 2; ++above) {
      const int d = below + above < 8 ? below + above : 8, at = above ? pair & 15 : pair & 31;
      table.slope[at] = slope[d];
      table.offset[at] = offset[d] + 4 * 0x1p-15f;
      table.last[at] = 256 + last[d] + (1 - 0x1p-15f);
    }
  }
  return table;
}
template <bool kSigned>
constexpr EncodeTable kEncode = encode_table<kSigned>();

// The code nearest to x / largest, by exact comparison, starting from a code.
template <bool kSigned>
inline uint8_t nearest_code(float x, float largest, uint8_t code) {
  constexpr Codec kCodec = kSigned ? Codec::dyn8 : Codec::dyn8u;
  const int t = kSigned ? (code < 127 ? 127 - code : code - 127) : code + 1;
  const float y = x / largest;
  return uint8_t(codec::code_of<kCodec>(codec::nearest_dynamic<kSigned>(y, t), y < 0));
}

template <bool kSigned>
struct Encoder {
  static constexpr bool kDoubts = true;
  V inverse;
  Encoder(float, float inverse) : inverse(broadcast(inverse)) {}
  // Codes of kLanes finite values; |x| <= largest, and inverse = 1 / largest, both normal numbers. The lanes of
  // `doubtful` (a bit each) may be off by one: nearest_code() decides them.
  SLK_INLINE VI operator()(V x, uint16_t& doubtful) const {
    constexpr const EncodeTable& table = kEncode<kSigned>;
    const V a = kSigned ? max_abs(x * inverse, broadcast(0x1p-24f)) : max(x * inverse, broadcast(0x1p-24f));
    const VI pair = (VI)((VU)a >> 24);
    const VI at = add16_ge(pair, a, lookup(load_table(table.border), pair));
    const V fixed = fma(a, lookup(load_table(table.slope), at), lookup(load_table(table.offset), at));
    doubtful = lanes_without((VI)fixed, 0x7ff8);  // within 4 units of a midpoint
    const VI index = (VI)min(fixed, lookup(load_table(table.last), at)) >> 15;
    if (!kSigned) return index;                                          // the low byte is the code
    return max(step_by_sign(127, index - (0x43800000 >> 15), x), VI{});  // there is no -1
  }
};

}  // namespace slk::cpu::SLK_ISA::dyn8
