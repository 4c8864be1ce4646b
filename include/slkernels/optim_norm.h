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

#if defined(__CUDACC__)
#define SLK_NORM_HD __host__ __device__
#else
#define SLK_NORM_HD
#endif

namespace slk {

// The unit of parallel work. Its sum depends on nothing else, and chunks are added in the order of the list, so the
// result has the same bits for every number of threads and on every instruction set.
constexpr int64_t kNormChunk = 16384;
// Element i of a chunk belongs to partial sum i % kNormSums, in fp32: 256 additions long at most. Chunks add up in
// fp64.
constexpr int kNormSums = 64;

SLK_NORM_HD inline float clip_divisor(float norm_sq, float max_norm) {
  const float divisor = (sqrtf(norm_sq) + 1e-6f) / max_norm;
  return divisor < 1.0f ? 1.0f : divisor;
}

namespace cpu {

struct NormKernels {
  // Of n <= kNormChunk elements at x.
  double (*sum_of_squares)(DType, const void* x, int64_t n);
};
const NormKernels& norm_kernels();

}  // namespace cpu
}  // namespace slk
