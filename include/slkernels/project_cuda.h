// The CUDA launchers of family `project`: the contracts of project.h and project_quant.h, on device pointers. Scalars
// that change from step to step are read on the device; nothing waits for it.
#pragma once

#include <cuda_runtime.h>

#include "slkernels/project_quant.h"

namespace slk::cuda {

constexpr int64_t kSquareRows = 128;  // rows of a partial column sum
constexpr int kFactorThreads = 512;   // the one block that makes APOLLO's scalars

// Rounding as a kernel is told: rng = (seed, step), or null for nearest even.
struct DeviceRounding {
  const int64_t* rng;
#if defined(__CUDACC__) || defined(SLK_SIMT)
  __device__ bool on() const { return rng != nullptr; }
  __device__ RoundingBits bits() const { return {uint64_t(rng[0]), uint32_t(rng[1])}; }
#endif
};

// What an update is told besides its operands. found_inf may be null.
struct DeviceUpdate {
  const float *lr, *found_inf;
  float alpha, weight_decay;
  DeviceRounding rounding;
#if defined(__CUDACC__) || defined(SLK_SIMT)
  __device__ bool skipped() const { return found_inf && *found_inf != 0; }
  __device__ UpdateScalars scalars() const { return UpdateScalars::of(*lr, alpha, weight_decay); }
#endif
};

cudaError_t launch_update(DType, void* w, int64_t m, Range rows, const UpdateOperands&, const DeviceUpdate&,
                          cudaStream_t);
// out = -lr alpha x
cudaError_t launch_fold(DType, const void* x, int64_t n, const DeviceUpdate&, void* out, cudaStream_t);
cudaError_t launch_row_squares(DType, const void* x, int64_t ld, int64_t rows, int64_t columns, float* sums,
                               cudaStream_t);
// partial [ceil(rows / kSquareRows), columns] is scratch.
cudaError_t launch_column_squares(DType, const void* x, int64_t ld, int64_t rows, int64_t columns, float* partial,
                                  float* sums, cudaStream_t);
cudaError_t launch_apollo_factors(const ApolloSums&, const float* found_inf, float* norm, float* factor, cudaStream_t);
cudaError_t launch_normals(DType, const int64_t* seed, float scale, Range rows, Range columns, void* out, cudaStream_t);

cudaError_t launch_quantize_group(DType, const void* w, const GroupCodes&, int64_t rows, const DeviceRounding&,
                                  cudaStream_t);
cudaError_t launch_dequantize_group(const GroupCodes&, Range rows, Range columns, DType, void* out, int64_t ld_out,
                                    cudaStream_t);
cudaError_t launch_update_q(const GroupCodes&, Range rows, const UpdateOperands&, const DeviceUpdate&, cudaStream_t);
// y [tokens, n] = x W^T + bias for at most kFewTokens tokens; x [tokens, m] contiguous, bias (or null) and y of x's
// type; 8 bits.
cudaError_t launch_linear_q(DType, const GroupCodes&, const void* x, int64_t tokens, int64_t n, const void* bias,
                            void* y, cudaStream_t);

}  // namespace slk::cuda
