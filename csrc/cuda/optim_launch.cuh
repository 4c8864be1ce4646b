// How the launchers of the step kernels turn a list of tensors into launches.
#pragma once

#include <memory>

#include "cuda/optim_list.cuh"
#include "slkernels/optim_cuda.h"

namespace slk::cuda {

// Columns of the table of tensors. kP: the direction's output where there is one.
enum StepColumn : int { kP, kG, kMState, kMScale, kVState, kVScale, kLow, kAdamColumns };

// What the tensors of one launch have in common.
struct StepKind {
  DType dtype, out_dtype;
  int low_bits;
  bool operator==(const StepKind& k) const {
    return dtype == k.dtype && out_dtype == k.out_dtype && low_bits == k.low_bits;
  }
};
inline StepKind kind_of(const StepTensor& t) {
  return {t.dtype, t.out ? t.out_dtype : t.dtype, t.low ? t.low_bits : 0};
}

inline uint64_t address_of(const void* p) {
  return reinterpret_cast<uint64_t>(p);
}

// One block of threads a multiprocessor, or as many as there are tiles.
template <class Args>
cudaError_t launch_grid(void (*kernel)(Args), int64_t tiles, int threads, size_t shared_bytes, cudaStream_t stream,
                        const Args& args) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(unsigned(tiles < most ? tiles : most)), threads, shared_bytes, stream, args);
}

// Calls flush() whenever the builder holds what fits a launch.
template <class Builder, class EntryOf, class Flush>
cudaError_t in_tables(Builder& builder, const StepTensor* tensors, int64_t count, const StepKind& kind,
                      EntryOf entry_of, Flush flush) {
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].n == 0 || !(kind_of(tensors[i]) == kind)) continue;
    const typename Builder::Entry entry = entry_of(tensors[i]);
    if (builder.add(entry)) continue;
    if (builder.count() == 0) return cudaErrorInvalidValue;
    if (const cudaError_t error = flush(); error != cudaSuccess) return error;
    builder.clear();
    if (!builder.add(entry)) return cudaErrorInvalidValue;
  }
  return builder.count() ? flush() : cudaSuccess;
}

// Steps the tensors of one kind. Defined by one file a codec.
template <Codec kM>
cudaError_t launch_step_codec(const StepKind&, const StepTensor* tensors, int64_t count, const StepArgs&, cudaStream_t);

}  // namespace slk::cuda
