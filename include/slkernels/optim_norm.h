// Family `optim`: the global gradient norm, and the number that clipping divides gradients by.
//
//   grad_norm_sq   sum over all tensors and elements of g^2
//   clip_coef      max(1, (sqrt(norm_sq) + 1e-6) / max_norm), NaN if norm_sq is NaN
//
// clip_coef is the reciprocal of torch.nn.utils.clip_grad_norm_'s coefficient: adam_q_ and momentum_q_ divide by their
// grad_scale, so it goes there as it is, and gradients are neither rewritten nor read twice.
#pragma once

#include <cmath>
#include <cstdint>

#include "slkernels/types.h"

namespace slk {

// The unit of parallel work. Its sum depends on nothing else, and the order in which chunks are added on their number
// only, so the result has the same bits for every number of threads, on every instruction set and on a GPU.
constexpr int64_t kNormChunk = 16384;
// Chunk c of the list belongs to lane c % kNormLanes. A lane adds its chunks in the order of the list; then lane i adds
// lane i + kNormLanes / 2, and so on by halves. A thread of one block each: 400,000 chunks (7 B elements) are 400 loads
// a thread.
constexpr int kNormLanes = 1024;
// Element i of a chunk belongs to partial sum i % kNormSums, in fp32: 256 additions long at most. Chunks add up in
// fp64.
constexpr int kNormSums = 64;

SLK_HD inline float clip_divisor(float norm_sq, float max_norm) {
  const float divisor = (sqrtf(norm_sq) + 1e-6f) / max_norm;
  return divisor < 1.0f ? 1.0f : divisor;
}

SLK_PER_ISA {
  // The sum of n chunks' sums.
  inline double add_norm_chunks(const double* sums, int64_t n) {
    double lane[kNormLanes] = {};
    for (int64_t c = 0; c < n; ++c) lane[c % kNormLanes] += sums[c];
    for (int width = kNormLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
  }
}

namespace cpu {

struct NormKernels {
  // Of n <= kNormChunk elements at x.
  double (*sum_of_squares)(DType, const void* x, int64_t n);
};
const NormKernels& norm_kernels();

}  // namespace cpu
}  // namespace slk
