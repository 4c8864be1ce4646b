// The codecs of slkernels/optim_codec.cuh for a warp: eight elements a lane, tables in shared memory.
//
// Decoding is a table of 256 values, stored 32 times, a copy a bank, so that 32 lanes with 32 different codes
// read it in one cycle: the word of `code` for a lane lies at byte code << 8 | codec << 7 | lane << 2, which PRMT
// builds from the packed codes in one instruction; the codecs of m and v interleave.
//
// Encoding dyn8 is exact with no rare path. y = |x / scale|, correctly rounded, is looked up by its high bits: the
// intervals that share them are so short (2^-6 or 2^-7 of a binade) that each holds at most one midpoint of the map.
// Its entry is such that adding the low bits of y carries into the code if y is above that midpoint:
//     entry + (bits(y) << 7 or 8) = index << 24 | ..        (the entry also takes off the high bits)
// The correctly rounded quotient costs three operations (Markstein, "Computation of elementary functions on the IBM
// RISC System/6000 processor", 1990): r = fl(1 / scale); q = fl(x r); y = fl(q + r (x - q scale)), the residue exact.
#pragma once

#include "slkernels/launch.cuh"
#include "slkernels/optim_codec.cuh"
#include "slkernels/ptx/arith.h"

namespace slk::cuda {

constexpr int kLaneElements = 8;  // 16 bytes of bf16, 8 bytes of codes
constexpr int kLanes = 32;

// ---- dyn8: midpoints by interval ------------------------------------------------------------------------------------

template <bool kSigned>
struct Dyn8Intervals {
  static constexpr int kMantissaBits = kSigned ? 6 : 7;  // 2^-7 is below the widest step's half, 0.9 / 64 (0.9 / 128)
  static constexpr int kShift = 23 - kMantissaBits;
  static constexpr int kFirstExponent = kSigned ? -22 : -23;  // below the smallest midpoint, 2.75e-7 (1.62e-7)
  static constexpr int kFirst = (127 + kFirstExponent) << kMantissaBits;
  static constexpr int kCount = (-kFirstExponent << kMantissaBits) + 1;  // up to y = 1
  static constexpr float kSmallest = kSigned ? 0x1p-22f : 0x1p-23f;
};

// The bits of the largest fp32 number that is not above the midpoint of magnitudes t and t + 1.
template <bool kSigned>
constexpr uint32_t midpoint_bits(int t) {
  double x = (double(codec::dynamic_value<kSigned>(t)) + codec::dynamic_value<kSigned>(t + 1)) / 2;
  int exponent = 0;
  for (; x < 1; x *= 2) --exponent;
  return (uint32_t(127 + exponent) << 23) + uint32_t((x - 1) * (1 << 23));
}

template <bool kSigned>
struct Dyn8EncodeTable {
  using Intervals = Dyn8Intervals<kSigned>;
  static constexpr int kWords = int(round_up(Intervals::kCount, 4));  // copied 16 bytes at a time
  alignas(16) uint32_t entry[kWords];

  constexpr Dyn8EncodeTable() : entry() {
    constexpr int zero = kSigned ? 0 : 1, last = kSigned ? 128 : 256;
    int t = zero;
    uint32_t next = midpoint_bits<kSigned>(t);
    for (int i = 0; i < Intervals::kCount; ++i) {
      const uint32_t begin = uint32_t(Intervals::kFirst + i) << Intervals::kShift;
      const uint32_t end = begin + (1u << Intervals::kShift);
      uint32_t word = uint32_t(t - zero - ((Intervals::kFirst + i) & 0xff)) << 24;
      if (next < end) {
        word += (1u << 24) - ((next - begin + 1) << (24 - Intervals::kShift));
        ++t;
        next = t < last ? midpoint_bits<kSigned>(t) : 0xffffffffu;
        if (next < end) throw "an interval with two midpoints";
      }
      entry[i] = word;
    }
    if (t != last) throw "midpoints outside the intervals";
  }
};

template <bool kSigned>
__device__ constexpr Dyn8EncodeTable<kSigned> kDyn8Encode;

template <Codec kCodec>
constexpr bool kIsDyn8 = kCodec == Codec::dyn8 || kCodec == Codec::dyn8u;

// ---- tables in shared memory ----------------------------------------------------------------------------------------

// The codes of eight elements: 8 bytes, or 4.
template <Codec kCodec>
using Codes = std::conditional_t<codec::bits(kCodec) == 8, uint2, uint32_t>;

// What decoding multiplies with the scale (cmp8u squares the product).
template <Codec kCodec>
__device__ inline float decoded_unit(int code) {
  return kCodec == Codec::cmp8u ? float(code) : codec::decode<kCodec>(code, 1.0f);
}

// Words of a decoding table for two codecs of equal width.
template <Codec kCodec>
constexpr int kDecodeWords = (1 << codec::bits(kCodec)) * 2 * kLanes;

// Fills one codec's half of the table: a warp computes 32 values at a time, a lane each, and writes the copies of each.
template <Codec kCodec>
__device__ inline void fill_decode(float* table, int half) {
  constexpr int kCodes = 1 << codec::bits(kCodec);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  for (int first = warp * kLanes; first < kCodes; first += warps * kLanes) {
    const float value = decoded_unit<kCodec>((first + lane) % kCodes);
    for (int i = 0; i < kLanes && first + i < kCodes; ++i)
      table[((first + i) * 2 + half) * kLanes + lane] = __shfl_sync(0xffffffffu, value, i);
  }
}

// The same for the steps' decoding: dyn8's lines take the place of its values.
template <Codec kCodec>
__device__ inline void fill_step_decode(float* table, int half) {
  if constexpr (kIsDyn8<kCodec>) {
    constexpr bool kSigned = kCodec == Codec::dyn8;
    constexpr int kCopies = kLanes / 2;
    auto* lines = reinterpret_cast<float2*>(table);
    for (int i = threadIdx.x; i < 256 * kCopies; i += blockDim.x) {
      const int code = i / kCopies, t = !kSigned ? code + 1 : code < 127 ? 127 - code : code - 127;
      const codec::Line line = codec::dynamic_line<kSigned>(codec::dynamic_slot(t));
      lines[(code * 2 + half) * kCopies + i % kCopies] =
          make_float2(line.slope, kSigned && code < 127 ? -line.offset : line.offset);
    }
  } else {
    fill_decode<kCodec>(table, half);
  }
}

template <Codec kCodec>
constexpr int kEncodeWords = kIsDyn8<kCodec> ? Dyn8EncodeTable<codec::is_signed(kCodec)>::kWords : 0;

template <Codec kCodec>
__device__ inline void fill_encode(uint32_t* table) {
  if constexpr (kIsDyn8<kCodec>)
    for (int i = threadIdx.x * 4; i < kEncodeWords<kCodec>; i += blockDim.x * 4)
      *reinterpret_cast<uint4*>(table + i) =
          *reinterpret_cast<const uint4*>(kDyn8Encode<codec::is_signed(kCodec)>.entry + i);
}

// ---- decode ---------------------------------------------------------------------------------------------------------

// Element i of eight, from a table filled by fill_decode; lane_bytes = 4 lane + 128 half.
__device__ inline float look_up(const float* table, const uint2& codes, int i, uint32_t lane_bytes) {
  const uint32_t at = ptx::prmt(i < 4 ? codes.x : codes.y, lane_bytes, 0x5504 | (i % 4) << 4);
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + at);
}
// 4 bits: element 2 j is the high half of byte j.
__device__ inline float look_up(const float* table, uint32_t codes, int i, uint32_t lane_bytes) {
  const int low_bit = i / 2 * 8 + (i % 2 ? 0 : 4);
  const uint32_t at = ((low_bit < 8 ? codes << (8 - low_bit) : codes >> (low_bit - 8)) & 0xf00u) | lane_bytes;
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + at);
}

template <Codec kCodec>
__device__ inline float decode_one(const float* table, const Codes<kCodec>& codes, int i, uint32_t lane_bytes,
                                   float scale) {
  const float x = __fmul_rn(look_up(table, codes, i, lane_bytes), scale);
  return kCodec == Codec::cmp8u ? __fmul_rn(x, x) : x;
}

// Where fill_step_decode put what a lane reads: its lane_bytes.
template <Codec kCodec>
__device__ inline uint32_t step_lane_bytes(int half) {
  const uint32_t lane = threadIdx.x % kLanes;
  return (kIsDyn8<kCodec> ? lane % (kLanes / 2) * 8 : lane * 4) + 4 * kLanes * half;
}
template <Codec kCodec>
__device__ inline float step_decode_one(const float* table, const Codes<kCodec>& codes, int i, uint32_t lane_bytes,
                                        float scale) {
  if constexpr (kIsDyn8<kCodec>) {
    const uint32_t word = i < 4 ? codes.x : codes.y;
    const uint32_t at = ptx::prmt(word, lane_bytes, 0x5504 | (i % 4) << 4);
    const float2 line = *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(table) + at);
    const float shifted = __uint_as_float(ptx::prmt(word, 0x4b000000, 0x7440 | i % 4));  // 2^23 + code
    const float t = kCodec == Codec::dyn8 ? shifted - (0x1p23f + 127) : shifted - (0x1p23f - 1);
    return __fmaf_rn(t, __fmul_rn(line.x, scale), __fmul_rn(line.y, scale));
  } else {
    return decode_one<kCodec>(table, codes, i, lane_bytes, scale);
  }
}

// ---- encode ---------------------------------------------------------------------------------------------------------

__device__ inline uint32_t pack_high_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return ptx::prmt(ptx::prmt(a, b, 0x0073), ptx::prmt(c, d, 0x0073), 0x5410);
}
// 0xff in every byte whose word is negative.
__device__ inline uint32_t pack_signs(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return ptx::prmt(ptx::prmt(a, b, 0x0073), ptx::prmt(c, d, 0x0073), 0xdc98);
}
__device__ inline uint32_t spread_signs(uint32_t bytes) {
  return ptx::prmt(bytes, 0, 0xba98);
}

// The index of |x / scale| in the high byte. scale and reciprocal = fl(1 / scale) are normal, |x| <= scale.
template <bool kSigned>
__device__ inline uint32_t dyn8_index(const uint32_t* table, float x, float scale, float reciprocal) {
  using Intervals = Dyn8Intervals<kSigned>;
  const float q = __fmul_rn(x, reciprocal);
  const float y = __fmaf_rn(__fmaf_rn(-q, scale, x), reciprocal, q);
  const uint32_t bits = __float_as_uint(fmaxf(fabsf(y), Intervals::kSmallest));
  return table[int(bits >> Intervals::kShift) - Intervals::kFirst] + (bits << (24 - Intervals::kShift));
}

// Codes 127 + t, or 127 - t where the sign byte is set, for four t at once. No byte carries: t <= 128, and 127 - t is
// 127 ^ t for t <= 127. t = 128 below zero becomes code 0: there is no -1.
__device__ inline uint32_t dyn8_codes(uint32_t t, uint32_t signs) {
  const uint32_t positive = t + 0x7f7f7f7fu, negative = (t ^ 0x7f7f7f7fu) & ~spread_signs(t);
  return (negative & signs) | (positive & ~signs);
}

template <Codec kCodec>
__device__ inline Codes<kCodec> codes_of_zero() {
  constexpr uint32_t kByte = codec::zero_code(kCodec) * (codec::bits(kCodec) == 8 ? 1 : 0x11),
                     kWord = kByte * 0x01010101u;
  if constexpr (codec::bits(kCodec) == 8) {
    return {kWord, kWord};
  } else {
    return kWord;
  }
}

__device__ inline bool dyn8_plain(uint32_t largest) {
  constexpr uint32_t kLeast = (127u - 70) << 23, kMost = (127u + 100) << 23;
  return largest - kLeast <= kMost - kLeast;
}

// A block's scale, and its values' codes, from the bits of its largest magnitude. kPlain: dyn8 and largest in [2^-70,
// 2^100], far enough from the ends of fp32 for the quotient's residue.
template <Codec kCodec, bool kPlain = false>
class BlockCoding {
 public:
  __device__ explicit BlockCoding(uint32_t largest) : largest_(largest) {
    const float size = kPlain || (largest && usable()) ? __uint_as_float(largest) : 1.0f;
    if constexpr (kIsDyn8<kCodec>) {
      // x / scale stays the same number (or, where x turns subnormal, far below the smallest code).
      block_.power = kPlain ? 1.0f : size < 0x1p-70f ? 0x1p100f : size > 0x1p100f ? 0x1p-100f : 1.0f;
      block_.largest = kPlain ? size : __fmul_rn(size, block_.power);
      block_.inverse = ptx::divide_in_range(1.0f, block_.largest);
      scale_ = size;
    } else {
      block_ = codec::block_of<kCodec>(size);
      scale_ = codec::scale_of<kCodec>(size);
    }
  }

  // Scale 0 decodes to zeros, scale NaN to NaN.
  __device__ float scale() const {
    return kPlain ? scale_ : largest_ == 0 ? 0.0f : usable() ? scale_ : __uint_as_float(0x7fc00000u);
  }

  __device__ Codes<kCodec> encode(const uint32_t* table, float (&x)[kLaneElements]) const {
    if constexpr (kIsDyn8<kCodec>) {
      if constexpr (!kPlain) {
#pragma unroll
        for (int i = 0; i < kLaneElements; ++i) x[i] = __fmul_rn(x[i], block_.power);
      }
      return encode_dyn8(table, x);
    } else {
      int c[kLaneElements];
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        c[i] = codec::encode<kCodec>(largest_ && usable() ? x[i] : 0.0f, block_);  // -0 has a code of its own in fp8
      if constexpr (codec::bits(kCodec) == 8) {
        return {uint32_t(c[0] | c[1] << 8 | c[2] << 16) | uint32_t(c[3]) << 24,
                uint32_t(c[4] | c[5] << 8 | c[6] << 16) | uint32_t(c[7]) << 24};
      } else {
        return uint32_t(c[1] | c[0] << 4 | c[3] << 8 | c[2] << 12 | c[5] << 16 | c[4] << 20 | c[7] << 24) |
               uint32_t(c[6]) << 28;
      }
    }
  }

 private:
  __device__ bool usable() const { return largest_ < 0x7f800000u; }

  __device__ uint2 encode_dyn8(const uint32_t* table, const float (&x)[kLaneElements]) const {
    constexpr bool kSigned = codec::is_signed(kCodec);
    uint32_t t[kLaneElements], sign[kLaneElements];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const float size = kPlain || usable() ? x[i] : 0.0f;
      sign[i] = __float_as_uint(size);
      t[i] = dyn8_index<kSigned>(table, size, block_.largest, block_.inverse);
    }
    uint2 codes = {pack_high_bytes(t[0], t[1], t[2], t[3]), pack_high_bytes(t[4], t[5], t[6], t[7])};
    if constexpr (kSigned) {
      codes.x = dyn8_codes(codes.x, pack_signs(sign[0], sign[1], sign[2], sign[3]));
      codes.y = dyn8_codes(codes.y, pack_signs(sign[4], sign[5], sign[6], sign[7]));
    }
    return codes;
  }

  uint32_t largest_;
  float scale_;
  codec::Block block_;
};

// ---- the tables of a step -------------------------------------------------------------------------------------------

template <Codec kM, bool kHasV = true>
struct StepTables {
  static constexpr Codec kV = codec::second_moment(kM);
  static constexpr int kWords = kDecodeWords<kM> + kEncodeWords<kM> + kEncodeWords<kV>;
  float* decode;
  uint32_t *encode_m, *encode_v;
  uint32_t m_lane, v_lane;  // lane_bytes

  __device__ explicit StepTables(uint32_t* words)
      : decode(reinterpret_cast<float*>(words)),
        encode_m(words + kDecodeWords<kM>),
        encode_v(encode_m + kEncodeWords<kM>),
        m_lane(step_lane_bytes<kM>(0)),
        v_lane(step_lane_bytes<kV>(1)) {}
  __device__ void fill() const {
    fill_step_decode<kM>(decode, 0);
    fill_encode<kM>(encode_m);
    if constexpr (kHasV) {
      fill_step_decode<kV>(decode, 1);
      fill_encode<kV>(encode_v);
    }
  }
  __device__ float m(const Codes<kM>& codes, int i, float scale) const {
    return step_decode_one<kM>(decode, codes, i, m_lane, scale);
  }
  __device__ float v(const Codes<kV>& codes, int i, float scale) const {
    return step_decode_one<kV>(decode, codes, i, v_lane, scale);
  }
};

}  // namespace slk::cuda
