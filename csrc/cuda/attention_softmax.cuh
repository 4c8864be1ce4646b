// The softmax of tiles of scores in mma's and wgmma's accumulators, row by row as keys come: 16 rows a warp and kMT, of
// which a thread holds rows lane / 4 and lane / 4 + 8, columns 8 n + 2 (lane % 4) and the next.
#pragma once

#include "cuda/attention.cuh"

namespace slk::cuda {

// Over the four lanes that hold a row of mma's d.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Softcap, and the sign of a negative scale.
template <int kMT, int kKeys>
__device__ void transform(float (&s)[kMT][kKeys / 8][4], const Scores& scores) {
#pragma unroll
  for (int i = 0; i < kMT; ++i)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][n][e] = scores.transform(s[i][n][e]);
    }
}

// Maxima and sums of a thread's rows so far; sums of the thread's own columns only.
template <int kMT>
struct Softmax {
  float top[kMT][2], sum[kMT][2];
  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < kMT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[i][half] = -SLK_INFINITY;
        sum[i][half] = 0;
      }
  }
};

// s becomes p = 2^(logit - maximum); rescale(i, half, by) tells what the row's sums so far are to be multiplied by, for
// the new maximum.
template <int kMT, int kKeys, class Rescale>
__device__ void update(Softmax<kMT>& state, float (&s)[kMT][kKeys / 8][4], const Scores& scores,
                       const Rescale& rescale) {
#pragma unroll
  for (int i = 0; i < kMT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.top[i][half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
      top = row_max(top);
      // A row that has kept nothing yet: its p are 2^(-inf - 0) = 0.
      const float base = top == -SLK_INFINITY ? 0.f : top * scores.to_log2;
      const float by = ptx::exp2_approx(state.top[i][half] * scores.to_log2 - base);
      state.top[i][half] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[i][n][e] = ptx::exp2_approx(s[i][n][e] * scores.to_log2 - base);
          sum += s[i][n][e];
        }
      state.sum[i][half] = state.sum[i][half] * by + sum;
      rescale(i, half, by);
    }
}

// o *= by, in one row of the thread's.
template <int kMT, int kDv>
__device__ void rescale_row(float (&o)[kMT][kDv / 8][4], int i, int half, float by) {
#pragma unroll
  for (int n = 0; n < kDv / 8; ++n) {
    o[i][n][2 * half] *= by;
    o[i][n][2 * half + 1] *= by;
  }
}

// After the last keys: state.sum becomes what o is to be multiplied by, 0 where nothing was kept, and lse(i, half,
// value) is called for every row.
template <int kMT, class Lse>
__device__ void finish(Softmax<kMT>& state, const Scores& scores, const Lse& lse) {
#pragma unroll
  for (int i = 0; i < kMT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(state.sum[i][half]);
      state.sum[i][half] = sum > 0 ? 1.f / sum : 0.f;
      lse(i, half, sum > 0 ? state.top[i][half] * scores.to_log2 * kLn2 + logf(sum) : -SLK_INFINITY);
    }
}

// Sums of one product are a's fragments of the next: rows of P, kK columns.
template <class T, int kMT, int kK>
__device__ void pack_a(uint32_t (&a)[kMT][kK / 16][4], const float (&p)[kMT][kK / 8][4]) {
#pragma unroll
  for (int m = 0; m < kMT; ++m)
#pragma unroll
    for (int step = 0; step < kK / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = p[m][2 * step + i / 2];
        a[m][step][i] = Element<T>::pack(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
}

}  // namespace slk::cuda
