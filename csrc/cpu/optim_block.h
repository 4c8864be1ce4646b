// Blocks on their way from fp32 values in L1 to a scale and codes. Values lie in pair order (simd_pairs.h).
#pragma once

#include "cpu/optim_codec.h"
#include "slkernels/optim.h"

namespace slk::cpu::SLK_ISA {

constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr int kMaxPairs = kMaxQuantBlock / kPair;
static_assert(kMaxQuantBlock % kPair == 0, "a padded block must fit the buffers");

constexpr int64_t code_bytes(Codec c, int64_t elements) {
  return codec::bits(c) == 4 ? (elements + 1) / 2 : elements;
}

// Lanes of a pair's even and odd vector that are among its first `count` elements, as all ones.
SLK_INLINE PairI lanes_below(int count) {
  PairI mask;
  for (int i = 0; i < kLanes; ++i) {
    mask.even[i] = 2 * i < count ? -1 : 0;
    mask.odd[i] = 2 * i + 1 < count ? -1 : 0;
  }
  return mask;
}

// f(pair, whole) for the pairs of n elements, whole = true_type for all but a ragged end.
template <class F>
SLK_INLINE void for_pairs(int n, F f) {
  int i = 0;
  for (; i + kPair <= n; i += kPair) f(i, std::true_type());
  if (i < n) f(i, std::false_type());
}

// Elements i .. of an array of n; absent ones read as zero and are not written.
template <class T>
SLK_INLINE Pair load_pair(const T* p, int i, int, std::true_type) {
  return load_pair(p + i);
}
template <class T>
SLK_INLINE Pair load_pair(const T* p, int i, int n, std::false_type) {
  T buffer[kPair] = {};
  std::memcpy(buffer, p + i, (n - i) * sizeof(T));
  return load_pair(buffer);
}
template <class T>
SLK_INLINE void store_pair(T* p, Pair x, int i, int, std::true_type) {
  store_pair(p + i, x);
}
template <class T>
SLK_INLINE void store_pair(T* p, Pair x, int i, int n, std::false_type) {
  T buffer[kPair];
  store_pair(buffer, x);
  std::memcpy(p + i, buffer, (n - i) * sizeof(T));
}

// The same for codes. What absent ones decode to does not matter.
template <Codec kCodec>
SLK_INLINE PairI load_codes(const uint8_t* p, int i, int, std::true_type) {
  return load_codes<codec::bits(kCodec), is_int8(kCodec)>(p + code_bytes(kCodec, i));
}
template <Codec kCodec>
SLK_INLINE PairI load_codes(const uint8_t* p, int i, int n, std::false_type) {
  uint8_t buffer[kPair] = {};
  std::memcpy(buffer, p + code_bytes(kCodec, i), code_bytes(kCodec, n - i));
  return load_codes<codec::bits(kCodec), is_int8(kCodec)>(buffer);
}
template <Codec kCodec>
SLK_INLINE void store_codes(uint8_t* p, PairI code, int i, int, std::true_type) {
  store_codes<codec::bits(kCodec)>(p + code_bytes(kCodec, i), code);
}
template <Codec kCodec>
SLK_INLINE void store_codes(uint8_t* p, PairI code, int i, int n, std::false_type) {
  uint8_t buffer[kPair];
  const PairI present = lanes_below(n - i);  // the last low half byte of an odd tensor is 0
  code.even &= present.even;
  code.odd &= present.odd;
  store_codes<codec::bits(kCodec)>(buffer, code);
  std::memcpy(p + code_bytes(kCodec, i), buffer, code_bytes(kCodec, n - i));
}

// Decides the lanes of x[n] that are marked, a mask a vector.
template <bool kSigned>
__attribute__((noinline)) void decide(const float* x, int n, float largest, const uint16_t* marked, uint8_t* codes) {
  for (int vector = 0; vector / 2 * kPair < n; ++vector)
    for (uint32_t lanes = marked[vector]; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes), i = vector / 2 * kPair + 2 * lane + vector % 2;
      if (i < n) codes[i] = dyn8::nearest_code<kSigned>(x[vector * kLanes + lane], largest, codes[i]);
    }
}

// A block's scale and codec::Block, from its largest magnitude.
struct BlockScale {
  uint32_t largest_bits;  // cmp8u: of the root. As bits: comparing these puts NaN above infinity
  float scale, inverse;
};

// Encodes n values; x is padded to whole pairs (and may be scaled by a power of two on the way).
template <Codec kCodec>
SLK_INLINE void encode_block(float* x, int n, const BlockScale& block, uint8_t* codes, float* scale) {
  if (block.largest_bits == 0 || block.largest_bits >= kInfinityBits) {  // scale 0 decodes to zeros, NaN to NaN
    *scale = block.largest_bits == 0 ? 0.0f : __builtin_nanf("");
    constexpr int zero = codec::zero_code(kCodec);
    std::memset(codes, codec::bits(kCodec) == 4 ? zero * 17 : zero, code_bytes(kCodec, n));
    if (codec::bits(kCodec) == 4 && n % 2) codes[n / 2] = zero << 4;
    return;
  }
  *scale = block.scale;
  float largest = from_bits(block.largest_bits), inverse = block.inverse;
  if (kCodec != Codec::cmp8u && (largest < codec::kSmallScale || largest > codec::kLargeScale)) {
    const codec::Block b = codec::block_of<kCodec>(largest);
    for (int i = 0; i < round_up(n, kPair); i += kLanes) store(x + i, load(x + i) * broadcast(b.power));
    largest = b.largest;
    inverse = b.inverse;
  }
  const Encoder<kCodec> encode(largest, inverse);
  uint16_t doubtful[2 * kMaxPairs];
  uint32_t any = 0;
  for_pairs(n, [&](int i, auto whole) {
    uint16_t* lanes = doubtful + i / kLanes;
    const PairI code = {encode(load(x + i), lanes[0]), encode(load(x + i + kLanes), lanes[1])};
    store_codes<kCodec>(codes, code, i, n, whole);
    if (Encoder<kCodec>::kDoubts) any |= lanes[0] | lanes[1];
  });
  // About one element in 4000 is decided apart, so that the loop above has no branch.
  if constexpr (Encoder<kCodec>::kDoubts)
    if (__builtin_expect(any != 0, 0)) decide<codec::is_signed(kCodec)>(x, n, largest, doubtful, codes);
}

// Scales of kLanes blocks at once.
template <Codec kCodec>
SLK_INLINE void block_scales(VU largest_bits, BlockScale (&out)[kLanes]) {
  const V largest = (V)largest_bits;
  constexpr float top = codec::top(kCodec);
  const V scale = top == 1.0f ? largest : largest / broadcast(top);
  const V inverse = broadcast(kCodec == Codec::lin4u ? 16.0f : top) / largest;
  float scales[kLanes], inverses[kLanes];
  uint32_t bits[kLanes];
  store(scales, scale);
  store(inverses, inverse);
  std::memcpy(bits, &largest_bits, sizeof bits);
  for (int i = 0; i < kLanes; ++i) out[i] = {bits[i], scales[i], inverses[i]};
}

}  // namespace slk::cpu::SLK_ISA
