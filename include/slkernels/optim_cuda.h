// The CUDA launchers of family `optim`. Contracts: slkernels/optim.h; the same bits as the CPU kernels'.
#pragma once

#include <cuda_runtime_api.h>

#include "slkernels/optim_codec.cuh"
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

}  // namespace slk::cuda
