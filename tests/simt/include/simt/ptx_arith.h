// Host bodies of slkernels/ptx/arith.h.
#pragma once

#include "simt/device.h"

namespace slk::ptx {

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (nibble & 7)) & 0xff;
    d |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return d;
}

inline float divide_in_range(float a, float b) {
  const float size = std::fabs(a), q = a / b;
  if ((size != 0 && !(size >= 0x1p-100f && size <= 0x1p100f)) ||
      !(std::fabs(b) >= 0x1p-100f && std::fabs(b) <= 0x1p100f) ||
      (q != 0 && !(std::fabs(q) >= 0x1p-126f && std::fabs(q) < 0x1p127f)))
    simt::fault("divide_in_range of " + std::to_string(a) + " by " + std::to_string(b), SIMT_HERE);
  return q == 0 ? 0.0f : q;
}

inline float root_times_2_48(float a) {
  if (!(a >= 0 && a <= 0x1p30f)) simt::fault("root_times_2_48 of " + std::to_string(a), SIMT_HERE);
  return std::sqrt(a) * 0x1p48f;
}

}  // namespace slk::ptx
