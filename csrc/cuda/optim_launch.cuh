// How the launchers of the step kernels turn a list of tensors into launches.
#pragma once

#include <memory>

#include "cuda/optim_list.cuh"
#include "slkernels/optim_cuda.h"

namespace slk::cuda {

inline uint64_t address_of(const void* p) {
  return reinterpret_cast<uint64_t>(p);
}

inline cudaError_t multiprocessors(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// One block of threads a multiprocessor, or as many as there are tiles.
inline cudaError_t step_grid(int64_t tiles, dim3& grid) {
  int most = 0;
  const cudaError_t error = multiprocessors(most);
  grid = dim3(unsigned(tiles < most ? tiles : most));
  return error;
}

// Calls flush() whenever the builder holds what fits a launch.
template <class Builder, class EntryOf, class Flush>
cudaError_t in_tables(Builder& builder, const StepTensor* tensors, int64_t count, DType dtype, EntryOf entry_of,
                      Flush flush) {
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].dtype != dtype || tensors[i].n == 0) continue;
    const typename Builder::Entry entry = entry_of(tensors[i], i);
    if (builder.add(entry)) continue;
    if (builder.count() == 0) return cudaErrorInvalidValue;
    if (const cudaError_t error = flush(); error != cudaSuccess) return error;
    builder.clear();
    if (!builder.add(entry)) return cudaErrorInvalidValue;
  }
  return builder.count() ? flush() : cudaSuccess;
}

}  // namespace slk::cuda
