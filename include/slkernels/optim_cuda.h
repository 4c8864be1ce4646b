// The CUDA launchers of family `optim`. Contracts: slkernels/optim.h; the same bits as the CPU kernels'.
#pragma once

#include <cuda_runtime_api.h>

#include "slkernels/optim_codec.cuh"
#include "slkernels/optim_step.cuh"
#include "slkernels/philox.cuh"
#include "slkernels/types.h"

namespace slk::cuda {

// x [n] of a floating type -> codes (two a byte where the codec has 4 bits), scale [ceil(n / block)].
struct QuantizeArgs {
  Codec codec;
  DType dtype;
  const void* x;
  int64_t n;
  int block;
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

// One tensor of a step. m and v are codes, or fp32 where m_scale is null.
struct StepTensor {
  void* p;
  const void* g;
  void *m, *v;
  float *m_scale, *v_scale;  // [ceil(n / block)]
  void* master_lo;           // int8 or int16 [n], or null
  int64_t n;
  DType dtype;  // of p and g
};

enum class MasterBits : int { none, low8, low16 };

// Everything that a step reads besides its tensors. Pointers are to device memory, read by the kernel; null: absent.
struct StepArgs {
  StepOptions options;
  Codec codec;  // of m
  int block;
  MasterBits master;
  bool stochastic;  // parameters are rounded stochastically, with the bits of RoundingBits{*seed, *step}
  const float *step, *lr, *grad_scale, *found_inf;
  const int64_t* seed;
  int64_t* nonfinite;  // incremented by the number of elements whose moments were kept
};

// One launch for all tensors of a dtype, unless they are more than fit a kernel's arguments.
cudaError_t launch_adam(const StepTensor* tensors, int64_t count, const StepArgs&, cudaStream_t);

}  // namespace slk::cuda
