// Tiles of attention for sm_80 and newer: cp.async into shared memory, ldmatrix into registers, mma.sync.
//
// A tile is rows of kD elements, kD / 8 chunks of 16 bytes; chunk c of row r lies at c ^ f(r), such that any eight
// rows that start at a multiple of 8 have their chunk c in eight different 16-byte columns of the banks: neither
// ldmatrix nor cp.async meets a bank twice.
#pragma once

#include "cuda/attention_softmax.cuh"
#include "slkernels/ptx/cp_async.h"
#include "slkernels/ptx/ldmatrix.h"

namespace slk::cuda {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kMaxShared = 99 * 1024;  // of a block on sm_86 and sm_89

// Rows of 8 chunks' multiples begin on bank 0: eight rows need eight permutations. Rows of 12 chunks begin on banks 0
// and 64 in turn: four do.
template <int kD>
__device__ int swizzled(int row, int chunk) {
  constexpr int kChunks = kD / 8;
  static_assert(kChunks % 4 == 0);
  return row * kChunks + (chunk ^ (kChunks % 8 == 0 ? row & 7 : row >> 1 & 3));
}

// Copies kRows rows of `d` <= kD elements; row r comes from base + offset(r), or is zeros where that is negative.
template <int kRows, int kD, class T, class Offset>
__device__ void copy_rows(uint4* tile, const T* base, int64_t d, const Offset& offset) {
  constexpr int kChunks = kD / 8;
  static_assert(kRows * kChunks % kThreads == 0);
  const int thread = ptx::opaque(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = thread + i * kThreads, row = at / kChunks, chunk = at % kChunks;
    const int64_t from = offset(row);
    const bool inside = from >= 0 && chunk * 8 < d;
    ptx::cp_async_16(&tile[swizzled<kD>(row, chunk)], base + (inside ? from + chunk * 8 : 0), inside ? 16 : 0);
  }
}

// mma's a: rows [row, row + 16), columns [16 step, 16 step + 16) of a tile.
template <int kD>
__device__ void load_a(uint32_t (&a)[4], const uint4* tile, int lane, int row, int step) {
  ptx::ldmatrix_x4(a, &tile[swizzled<kD>(row + lane % 16, 2 * step + lane / 16)]);
}

// s[row, n] += A[row, :] B[n, :]^T for 16 kMT rows of A from `row` on and kN rows of B from `first` on, over kD
// columns.
template <class T, int kMT, int kN, int kD>
__device__ void multiply_abt(float (&s)[kMT][kN / 8][4], const uint4* a_tile, int row, const uint4* b_tile) {
  const int lane = ptx::opaque(threadIdx.x % 32);
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    uint32_t a[kMT][4];
#pragma unroll
    for (int m = 0; m < kMT; ++m) load_a<kD>(a[m], a_tile, lane, row + 16 * m, step);
#pragma unroll
    for (int n = 0; n < kN / 8; n += 2) {
      // Columns 0-7 and 8-15 of rows 0-7, then of rows 8-15: mma's b for two pieces.
      uint32_t pair[4];
      ptx::ldmatrix_x4(pair, &b_tile[swizzled<kD>(8 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2)]);
      const uint32_t b[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
      for (int m = 0; m < kMT; ++m) {
        Element<T>::mma(s[m][n], a[m], b[0]);
        Element<T>::mma(s[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// d[row, :] += A[row, :] B[:, first .. first + kColumns) for A in registers and the kK rows of B, of kD elements.
template <class T, int kMT, int kK, int kD, int kColumns>
__device__ void multiply_ab(float (&d)[kMT][kColumns / 8][4], const uint32_t (&a)[kMT][kK / 16][4], const uint4* b_tile,
                            int first = 0) {
  const int lane = ptx::opaque(threadIdx.x % 32);
#pragma unroll
  for (int step = 0; step < kK / 16; ++step)
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t pair[4];
      ptx::ldmatrix_x4_trans(pair, &b_tile[swizzled<kD>(16 * step + lane % 16, first / 8 + n + lane / 16)]);
      const uint32_t b[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
      for (int m = 0; m < kMT; ++m) {
        Element<T>::mma(d[m][n], a[m][step], b[0]);
        Element<T>::mma(d[m][n + 1], a[m][step], b[1]);
      }
    }
}

// Sends a warp's sums, 16 kMT rows from `row` on, times factor(m, half), through the warp's own rows of `stage` (tiles
// of kStageD elements a row) to the rows to(row), null where there is none, of `d` <= kD elements; 16 bytes a store.
template <class T, int kMT, int kD, int kStageD, class Factor, class To>
__device__ void store_rows(uint4* stage, int row, const float (&sum)[kMT][kD / 8][4], int64_t d, const Factor& factor,
                           const To& to) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kMT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float f = factor(m, half);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        auto* words = reinterpret_cast<uint32_t*>(&stage[swizzled<kStageD>(row + 16 * m + 8 * half + lane / 4, n)]);
        words[lane % 4] = Element<T>::pack(sum[m][n][2 * half] * f, sum[m][n][2 * half + 1] * f);
      }
    }
  __syncwarp();
  constexpr int kChunks = kD / 8;
#pragma unroll 4
  for (int at = lane; at < 16 * kMT * kChunks; at += 32) {
    const int r = row + at / kChunks, chunk = at % kChunks;
    T* out = to(r);
    if (out && chunk * 8 < d) *reinterpret_cast<uint4*>(out + chunk * 8) = stage[swizzled<kStageD>(r, chunk)];
  }
}

// Runs f(Tag<kDk, kDv>) with the least of the compiled sizes that hold the shape's dimensions.
template <int kDk_, int kDv_>
struct HeadSize {
  static constexpr int kDk = kDk_, kDv = kDv_;
};
template <class F>
cudaError_t for_head_size(const AttentionShape& s, const F& f) {
  const int64_t d = s.dk > s.dv ? s.dk : s.dv;
  if (d <= 64) return f(HeadSize<64, 64>());
  if (d <= 96) return f(HeadSize<96, 96>());
  if (d <= 128) return f(HeadSize<128, 128>());
  if (s.dk <= 192 && s.dv <= 128) return f(HeadSize<192, 128>());
  return f(HeadSize<256, 256>());
}

}  // namespace slk::cuda
