// dvalues = dW at the slots of a 2:4 pack, next to the dense library's dW.
//
// A block takes a row of the pack, a thread eight columns: one byte of metadata, four values. dW has just been written
// and comes from L2.
#include "cuda/semi24_tile.cuh"
#include "slkernels/semi24_gather.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 128, kSlots = kChunk24 / 2;

// E: an unsigned integer of the element's size.
template <class E>
__global__ void gather24_kernel(const E* w, Packed24 pack, int64_t first_row) {
  const int64_t row = first_row + blockIdx.x, slots = pack.row_values();
  const int64_t chunks = ceil_div(slots, int64_t(kSlots));
  const E* from = w + int64_t(blockIdx.x) * pack.m;
  E* to = static_cast<E*>(pack.values) + row * slots;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    const int codes = static_cast<const uint8_t*>(pack.meta)[meta_byte(pack, row, chunk)];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int64_t slot = chunk * kSlots + i, column = slot / 2 * 4 + (codes >> (2 * i) & 3);
      // An odd number of groups leaves half of the last byte, and no slots for it.
      if (slot < slots) to[slot] = row < pack.n && column < pack.m ? from[column] : E(0);
    }
  }
}

}  // namespace

cudaError_t launch_gather24(int bytes, const void* w, const Packed24& pack, Range rows, cudaStream_t stream) {
  if (rows.size() == 0 || pack.m == 0) return cudaSuccess;
  if (rows.size() > INT32_MAX) return cudaErrorInvalidValue;
  const auto launch_with = [&](auto* of) {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(of)>>;
    return launch(gather24_kernel<E>, unsigned(rows.size()), kThreads, 0, stream, static_cast<const E*>(w), pack,
                  rows.begin);
  };
  if (bytes == 2) return launch_with(static_cast<const uint16_t*>(w));
  if (bytes == 4) return launch_with(static_cast<const uint32_t*>(w));
  return cudaErrorInvalidValue;
}

}  // namespace slk::cuda
