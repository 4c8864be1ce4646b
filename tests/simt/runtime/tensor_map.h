// The harness' own content of a CUtensorMap: what cuTensorMapEncodeTiled was told.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace simt {

constexpr int kMapRank = 4;

struct EncodedMap {
  static constexpr uint32_t kMagic = 0x70616d74;
  uint32_t magic;
  int32_t rank, element, swizzle_bits;  // 0, 1, 2, 3 bits of the address: none, 32, 64, 128 bytes
  const char* base;
  uint64_t size[kMapRank], stride[kMapRank];  // elements, bytes
  uint32_t box[kMapRank];

  uint32_t row_bytes() const { return box[0] * element; }
  uint32_t tile_bytes() const { return row_bytes() * box[1] * box[2] * box[3]; }
};
static_assert(sizeof(EncodedMap) <= sizeof(CUtensorMap));

}  // namespace simt
