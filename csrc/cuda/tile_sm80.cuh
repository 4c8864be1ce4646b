// What the sm_80 products share: row-major tiles of 16-bit elements on their way into shared memory by cp.async, where
// ldmatrix finds them without bank conflicts, and the order in which blocks walk over tiles.
#pragma once

#include "slkernels/launch.cuh"
#include "slkernels/ptx/cp_async.h"
#include "slkernels/types.h"

namespace slk::cuda {

constexpr int kChunk = 8;  // elements of a 16-byte chunk

// Where chunk `chunk` of row `row` lies in a tile of rows of kRowChunks chunks. Any eight rows that start at a multiple
// of 8 have their chunk c in eight different 16-byte columns of the banks (of rows of 64 bytes, two make a 128-byte
// line), so that neither ldmatrix nor cp.async meets a bank twice.
template <int kRowChunks>
__device__ inline int swizzled(int row, int chunk) {
  static_assert(kRowChunks == 4 || kRowChunks % 8 == 0);
  return row * kRowChunks + (chunk ^ (kRowChunks == 4 ? row / 2 % 4 : row % 8));
}

// Copies one thread's part of the tiles [kRows, 8 kRowChunks] of a row-major matrix, tile after tile along its columns:
// in every tile the same chunk of the rows row, row + kRowsAPass, ... Rows and columns beyond the matrix become zeros.
template <int kRows, int kRowChunks, int kThreads>
class RowLoader {
  static constexpr int kRowsAPass = kThreads / kRowChunks, kPasses = kRows / kRowsAPass;
  static_assert(kRowsAPass % 8 == 0, "the rows of a thread's passes share one swizzle");
  static_assert(kPasses * kRowsAPass == kRows);

 public:
  static constexpr int kChunks = kRows * kRowChunks;

  __device__ RowLoader(const void* matrix, int64_t rows, int64_t columns, int64_t ld, int64_t first_row) {
    const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    from_ = static_cast<const uint16_t*>(matrix) + (first_row + row) * ld + chunk * kChunk;
    pass_ = ld * kRowsAPass;
    to_ = swizzled<kRowChunks>(row, chunk);
    rows_left_ = int(rows - first_row < kRows ? rows - first_row : kRows) - row;
    columns_left_ = columns - chunk * kChunk;
  }

  __device__ void load_next(uint4* tile) {
    const int bytes = columns_left_ >= kChunk ? 16 : columns_left_ > 0 ? 2 * int(columns_left_) : 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      ptx::cp_async_16(&tile[to_ + i * kRowsAPass * kRowChunks], from_ + i * pass_,
                       i * kRowsAPass < rows_left_ ? bytes : 0);
    from_ += kRowChunks * kChunk;
    columns_left_ -= kRowChunks * kChunk;
  }

 private:
  const uint16_t* from_;
  int64_t pass_, columns_left_;
  int to_, rows_left_;
};

// Tiles are walked in bands of kBand rows, column by column, so that blocks that run together share rows of both
// operands in L2: a wave of 108 blocks reads about 8 x 14 tiles. The last band may be lower.
constexpr int kBand = 8;
__device__ inline int2 tile_of_block(int rows, int columns) {
  const int band = blockIdx.x / (kBand * columns), at = blockIdx.x % (kBand * columns);
  const int height = min(kBand, rows - band * kBand);
  return make_int2(band * kBand + at % height, at / height);
}

}  // namespace slk::cuda
