// dvalues = dW at the slots of a 2:4 pack, next to the dense library's dW.
//
// A block takes a row of the pack, a thread eight columns: one byte of metadata, four values. dW has just been written
// and comes from L2.
#include "cuda/types.cuh"
#include "slkernels/semi24.cuh"
#include "slkernels/semi24_gemm.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 128, kColumns = 8;

// Word: an unsigned integer of the element's size.
template <class Word>
__global__ void gather24_kernel(const Word* w, const uint8_t* meta, int64_t n, int64_t m, Layout24 layout,
                                int64_t first_row, Word* dvalues) {
  const int64_t row = first_row + blockIdx.x, rows = padded_rows24(layout, n), columns = padded_columns24(layout, m);
  const int64_t chunks = ceil_div(columns, int64_t(kColumns));
  const Word* from = w + int64_t(blockIdx.x) * m;
  Word* to = dvalues + row * (columns / 2);
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    const bool plain = layout == Layout24::plain;
    const int64_t byte = plain ? row * chunks + chunk : 2 * packed_word24(layout, row, chunk / 2, rows) + chunk % 2;
    const int codes = meta[byte];
#pragma unroll
    for (int slot = 0; slot < kColumns / 2; ++slot) {
      const int64_t column = chunk * kColumns + slot / 2 * 4 + (codes >> (2 * slot) & 3);
      // An odd number of groups leaves half of the last byte, and no slots for it.
      if (chunk * kColumns / 2 + slot < columns / 2)
        to[chunk * kColumns / 2 + slot] = row < n && column < m ? from[column] : Word(0);
    }
  }
}

template <class Word>
cudaError_t launch_words(const void* w, const void* meta, int64_t n, int64_t m, Layout24 layout, Range rows,
                         void* dvalues, cudaStream_t stream) {
  return launch(gather24_kernel<Word>, unsigned(rows.size()), kThreads, 0, stream, static_cast<const Word*>(w),
                static_cast<const uint8_t*>(meta), n, m, layout, rows.begin, static_cast<Word*>(dvalues));
}

}  // namespace

cudaError_t launch_gather24(DType dtype, const void* w, const void* meta, int64_t n, int64_t m, Layout24 layout,
                            Range rows, void* dvalues, cudaStream_t stream) {
  if (rows.size() == 0 || m == 0) return cudaSuccess;
  if (rows.size() > INT32_MAX) return cudaErrorInvalidValue;
  switch (dtype) {
    case DType::bf16:
    case DType::f16:
      return launch_words<uint16_t>(w, meta, n, m, layout, rows, dvalues, stream);
    case DType::f32:
      return launch_words<uint32_t>(w, meta, n, m, layout, rows, dvalues, stream);
    case DType::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace slk::cuda
