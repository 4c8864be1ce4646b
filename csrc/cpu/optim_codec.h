// The codecs of slkernels/optim_codec.cuh in vectors: StepDecoder<codec> and Encoder<codec> give its bits, kLanes at a
// time.
#pragma once

#include "cpu/dyn8.h"
#include "cpu/simd_pairs.h"
#include "slkernels/optim_codec.cuh"

namespace slk::cpu::SLK_ISA {

// Codes that are int8 numbers.
constexpr bool is_int8(Codec c) {
  return c == Codec::lin8 || c == Codec::cmp8;
}

// ---- value of a code ------------------------------------------------------------------------------------------------

// codec::decode_in_step of a block's codes; the root of it for cmp8u.
template <Codec kCodec>
struct StepDecoder;

template <>
struct StepDecoder<Codec::dyn8> : dyn8::StepDecoder<true> {
  using dyn8::StepDecoder<true>::StepDecoder;
};
template <>
struct StepDecoder<Codec::dyn8u> : dyn8::StepDecoder<false> {
  using dyn8::StepDecoder<false>::StepDecoder;
};

// scale q
struct LinearDecoder {
  V scale;
  explicit LinearDecoder(float scale) : scale(broadcast(scale)) {}
  SLK_INLINE V operator()(VI code) const { return to_float(code) * scale; }
};
template <>
struct StepDecoder<Codec::lin8> : LinearDecoder {
  using LinearDecoder::LinearDecoder;
};
template <>
struct StepDecoder<Codec::lin8u> : LinearDecoder {
  using LinearDecoder::LinearDecoder;
};
template <>
struct StepDecoder<Codec::cmp8u> : LinearDecoder {
  using LinearDecoder::LinearDecoder;
};

template <>
struct StepDecoder<Codec::cmp8> {
  V scale;
  explicit StepDecoder(float scale) : scale(broadcast(scale)) {}
  SLK_INLINE V operator()(VI code) const {
    const V q = to_float(code);
    return q / (broadcast(254.0f) - abs(q)) * scale;
  }
};

template <Codec kCodec>
struct ValueTable {
  alignas(64) float value[16];
};
template <Codec kCodec>
constexpr ValueTable<kCodec> value_table() {
  ValueTable<kCodec> table{};
  for (int c = 0; c < 16; ++c)
    table.value[c] = kCodec == Codec::lin4u ? (c + 1) * 0x1p-4f
                     : c < 7                ? -codec::dyn4_value(7 - c)
                                            : codec::dyn4_value(c - 7);
  return table;
}
template <Codec kCodec>
constexpr ValueTable<kCodec> kValues = value_table<kCodec>();
template <Codec kCodec>
struct TableDecoder {
  Table<16> values;
  explicit TableDecoder(float scale) : values(load_table(kValues<kCodec>.value) * scale) {}
  SLK_INLINE V operator()(VI code) const { return lookup(values, code); }
};
template <>
struct StepDecoder<Codec::dyn4> : TableDecoder<Codec::dyn4> {
  using TableDecoder<Codec::dyn4>::TableDecoder;
};
template <>
struct StepDecoder<Codec::lin4u> : TableDecoder<Codec::lin4u> {
  using TableDecoder<Codec::lin4u>::TableDecoder;
};

struct Fp8Decoder {
  V scale;
  explicit Fp8Decoder(float scale) : scale(broadcast(scale)) {}
  SLK_INLINE V operator()(VI code) const {
    const VI body = (code & 127) << 20;
    const V normal = (V)(body + (120 << 23)), subnormal = (V)(body + (121 << 23)) - broadcast(0x1p-6f);
    const V magnitude = (body < (1 << 23)) ? subnormal : normal;
    return (V)((VI)magnitude | (code & 128) << 24) * scale;
  }
};
template <>
struct StepDecoder<Codec::fp8> : Fp8Decoder {
  using Fp8Decoder::Fp8Decoder;
};
template <>
struct StepDecoder<Codec::fp8u> : Fp8Decoder {
  using Fp8Decoder::Fp8Decoder;
};

// codec::decode: dyn8's by its map.
template <Codec kCodec>
struct Decoder : StepDecoder<kCodec> {
  using StepDecoder<kCodec>::StepDecoder;
  SLK_INLINE V operator()(VI code) const {
    const V x = StepDecoder<kCodec>::operator()(code);
    return kCodec == Codec::cmp8u ? x * x : x;
  }
};
template <bool kSigned>
struct MapDecoder {
  V scale;
  explicit MapDecoder(float scale) : scale(broadcast(scale)) {}
  SLK_INLINE V operator()(VI code) const { return dyn8::decode<kSigned>(code) * scale; }
};
template <>
struct Decoder<Codec::dyn8> : MapDecoder<true> {
  using MapDecoder<true>::MapDecoder;
};
template <>
struct Decoder<Codec::dyn8u> : MapDecoder<false> {
  using MapDecoder<false>::MapDecoder;
};

// ---- code of a value ------------------------------------------------------------------------------------------------

// codec::encode of a block's values (cmp8u: of their roots), for which Block::power is 1. Only the low byte (4 bits:
// the whole number) of a result counts. Where kDoubts, some lanes are to be decided apart.
template <Codec kCodec>
struct Encoder {
  static constexpr bool kDoubts = false;
  V largest, inverse;
  Encoder(float largest, float inverse) : largest(broadcast(largest)), inverse(broadcast(inverse)) {}
  SLK_INLINE VI operator()(V x, uint16_t&) const;
};
template <>
struct Encoder<Codec::dyn8> : dyn8::Encoder<true> {
  using dyn8::Encoder<true>::Encoder;
};
template <>
struct Encoder<Codec::dyn8u> : dyn8::Encoder<false> {
  using dyn8::Encoder<false>::Encoder;
};

// dyn4: at most one midpoint lies in a quarter of a binade of y + 2^-7, whose binades are those from 2^-7 to 2.
struct Dyn4Table {
  alignas(64) float midpoint[32];  // by quarter: its midpoint, or infinity
  alignas(64) int32_t below[32];   // the number of midpoints below it
};
constexpr Dyn4Table dyn4_table() {
  Dyn4Table table{};
  for (int quarter = 0; quarter < 32; ++quarter) {
    double low = 0x1p-7;
    for (int i = 0; i < quarter / 4; ++i) low *= 2;
    const double begin = low * (1 + quarter % 4 * 0.25) - 0x1p-7, end = begin + low / 4;
    const int at = (quarter + 4 * 120) & 31;
    table.midpoint[at] = __builtin_inff();
    for (int t = 0; t < 8; ++t) {
      if (codec::dyn4_midpoint(t) < begin)
        table.below[at] = t + 1;
      else if (codec::dyn4_midpoint(t) < end)
        table.midpoint[at] = codec::dyn4_midpoint(t);
    }
  }
  return table;
}
constexpr Dyn4Table kDyn4 = dyn4_table();

template <Codec kCodec>
SLK_INLINE VI Encoder<kCodec>::operator()(V x, uint16_t&) const {
  if constexpr (kCodec == Codec::cmp8) {
    const V k = broadcast(codec::kCompand);
    return round_to_int(x / fma(abs(x), k, largest * k));
  } else if constexpr (kCodec == Codec::dyn4) {
    const V y = abs(x) * inverse;
    const VI quarter = (VI)((VU)(y + broadcast(0x1p-7f)) >> 21);
    const VI below = (VI)lookup(load_table(kDyn4.below), quarter);
    const VI t = count_gt(below, y, lookup(load_table(kDyn4.midpoint), quarter));
    return max(step_by_sign(7, t, x), VI{});  // there is no -1
  } else if constexpr (kCodec == Codec::lin4u) {
    return max(round_to_int(x * inverse), VI{} + 1) - 1;
  } else if constexpr (kCodec == Codec::fp8 || kCodec == Codec::fp8u) {
    const V a = abs(x * inverse);
    const VI u = (VI)a, normal = (VI)((VU)(u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120 << 3);
    const VI subnormal = (VI)(a + broadcast(0x1p14f)) - int32_t(to_bits(0x1p14f));  // units of 2^-9
    const VI t = (a < broadcast(0x1p-6f)) ? subnormal : normal;
    if constexpr (kCodec == Codec::fp8u) return at_least_one(t, x);
    return t | (VI)((VU)x >> 24 & 128u);
  } else {
    const VI q = round_to_int(x * inverse);
    return kCodec == Codec::lin8 ? q : at_least_one(q, x);
  }
}

}  // namespace slk::cpu::SLK_ISA
