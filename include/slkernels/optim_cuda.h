// The CUDA launchers of family `optim`. Contracts: slkernels/optim.h; the same bits as the CPU kernels'.
#pragma once

#include "slkernels/optim.h"
#include "slkernels/philox.cuh"
#include "slkernels/types.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>

namespace slk::cuda {

using cpu::StepTensor;

// x [n] of a floating type -> codes (two a byte where the codec has 4 bits), scale [ceil(n / block)].
struct QuantizeArgs {
  Codec codec;
  DType dtype;
  const void* x;
  int64_t n;
  int block;
  const int64_t* random;  // [2], in device memory: RoundingBits{seed, step} of stochastic rounding; null: nearest
  uint8_t* codes;
  float* scale;
};
cudaError_t launch_quantize(const QuantizeArgs&, cudaStream_t);

struct DequantizeArgs {
  Codec codec;
  DType dtype;
  const uint8_t* codes;
  const float* scale;
  int64_t n;
  int block;
  void* out;
};
cudaError_t launch_dequantize(const DequantizeArgs&, cudaStream_t);

// Everything that a step reads besides its tensors. Pointers are to device memory, read by the kernel; null: absent.
struct StepArgs {
  StepOptions options;
  Codec codec;  // of m
  int block;
  const float *step, *lr, *beta3, *alpha, *grad_scale, *found_inf;
  const int64_t* random;  // [2]: RoundingBits{seed, step} of stochastic rounding; null: nearest
  int64_t* nonfinite;     // incremented by the number of elements whose moments were kept
};

// adam_q_, adam_q_dir_, ademamix_q_, momentum_q_: one launch for all tensors of a dtype, unless they are more than fit
// a kernel's arguments.
cudaError_t launch_step(const StepTensor* tensors, int64_t count, const StepArgs&, cudaStream_t);

struct NormTensor {
  const void* data;
  int64_t n;
  DType dtype;
};
// sums: room for a double a chunk (kNormChunk) of every tensor.
cudaError_t launch_grad_norm_sq(const NormTensor* tensors, int64_t count, double* sums, float* out, cudaStream_t);
cudaError_t launch_clip_coef(const float* norm_sq, float max_norm, float* out, cudaStream_t);

}  // namespace slk::cuda
#endif
