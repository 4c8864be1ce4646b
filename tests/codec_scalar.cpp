// The scalar codecs of include/slkernels/optim_codec.cuh behind a C interface: test_optim_codec.py loads it with
// ctypes.
#include <type_traits>

#include "slkernels/optim_codec.cuh"
#include "slkernels/philox.cuh"

using namespace slk;

namespace {

template <Codec kCodec>
void encode(const float* x, int64_t n, float largest, uint8_t* codes) {
  const codec::Block block = codec::block_of<kCodec>(largest);
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(codec::encode<kCodec>(x[i], block));
}
template <Codec kCodec>
void decode(int64_t n, float scale, float* exact, float* in_step) {
  for (int64_t c = 0; c < n; ++c) {
    exact[c] = codec::decode<kCodec>(int(c), scale);
    in_step[c] = codec::decode_in_step<kCodec>(int(c), scale);
  }
}

template <class F>
void with_codec(int codec, F f) {
#define CASE(name)  \
  case Codec::name: \
    return f(std::integral_constant<Codec, Codec::name>())
  switch (Codec(codec)) {
    CASE(dyn8);
    CASE(dyn8u);
    CASE(lin8);
    CASE(lin8u);
    CASE(cmp8);
    CASE(cmp8u);
    CASE(dyn4);
    CASE(lin4u);
    CASE(fp8);
    CASE(fp8u);
  }
#undef CASE
}

}  // namespace

extern "C" {

void scalar_encode(int codec, const float* x, int64_t n, float largest, uint8_t* codes, float* scale) {
  with_codec(codec, [&](auto which) {
    encode<which()>(x, n, largest, codes);
    *scale = codec::scale_of<which()>(largest);
  });
}
void scalar_decode(int codec, int64_t n, float scale, float* exact, float* in_step) {
  with_codec(codec, [&](auto which) { decode<which()>(n, scale, exact, in_step); });
}

// Number of (high, low) that do not survive join and split: every low half for some high ones, every high half for some
// low ones, every int8 pair. NaN and infinity have one form each.
int64_t scalar_master_faults() {
  int64_t faults = 0;
  const auto ordinary = [](uint32_t high) { return (high & 0x7f80u) != 0x7f80u; };
  const auto check16 = [&](uint32_t high, uint32_t low) {
    const float x = codec::join_master16(uint16_t(high), int16_t(low));
    const codec::Master m = codec::split_master16(x);
    if (ordinary(codec::bits_of(x) >> 16)) faults += m.high != high || m.low != int16_t(low);
  };
  for (uint32_t a = 0; a < 65536; ++a)
    for (uint32_t b = 0; b < 65536; b += 1021) {
      check16(a, b);
      check16(b, a);
    }
  for (uint32_t high = 0; high < 65536; ++high)
    for (int low = -128; low < 128; ++low) {
      const float x = codec::join_master8(uint16_t(high), int8_t(low));
      const codec::Master m = codec::split_master8(x), s = codec::split_master8_stochastic(x, 0xffff);
      if (!ordinary(codec::bits_of(x) >> 16)) continue;
      faults += m.high != high || m.low != low;  // the number has 16 bits: nothing is rounded
      faults += s.high != high || s.low != low;
    }
  return faults;
}

}  // extern "C"
