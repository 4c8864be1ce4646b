// The CUDA launchers of family `semi24`, packing. Formats: slkernels/semi24.h; the same bits as the CPU kernels'.
//
// Sizes n, m are the dense matrix'. Everything is contiguous; float types are f32, bf16 and f16, and packed layouts
// hold the 16-bit ones. Asynchronous on `stream`, deterministic, no scratch.
#pragma once

#include "slkernels/semi24.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>

namespace slk::cuda {

enum class Prune24 : int { rows, transposable };

// mask [n, m] bytes 0 or 1 from score [n, m].
cudaError_t launch_prune24(DType, const void* score, int64_t n, int64_t m, Prune24 by, uint8_t* mask,
                           cudaStream_t stream);

// One pass over W [n, m], pruned by |score| (null: |W|; its type is W's): W's pack and W_t's, both in `layout`.
struct PruneCompress24 {
  const void *w, *score;
  int64_t n, m;
  Prune24 by;
  Layout24 layout;
  void *values, *meta, *values_t, *meta_t;
};
cudaError_t launch_prune_compress24(DType, const PruneCompress24&, cudaStream_t stream);

// A mask whose bytes are 0 or 1. Nothing is read back, so that a group that is not 2:4 cannot raise here: what it packs
// are two NaNs, in its first two slots by fill24. (check_mask24 finds the first such group, and waits.)
cudaError_t launch_compress24(DType, const void* w, const uint8_t* mask, int64_t n, int64_t m, Layout24 layout,
                              void* values, void* meta, cudaStream_t stream);
// first = the number of the first group (row * ceil(m / 4) + group) of a mask that is not 2:4, or -1.
cudaError_t launch_check_mask24(const uint8_t* mask, int64_t n, int64_t m, int64_t* first, cudaStream_t stream);

// W [n, m] with zeros where it was pruned; mask [n, m].
cudaError_t launch_decompress24(DType, const void* values, const void* meta, int64_t n, int64_t m, Layout24 layout,
                                void* w, cudaStream_t stream);
cudaError_t launch_mask_of24(const void* meta, int64_t n, int64_t m, Layout24 layout, uint8_t* mask,
                             cudaStream_t stream);

// Exact, between any two layouts.
cudaError_t launch_convert24(DType, const void* values, const void* meta, int64_t n, int64_t m, Layout24 source,
                             Layout24 target, void* out_values, void* out_meta, cudaStream_t stream);

// Plain packs of W and W_t. perm int32 [m, 2 ceil(n / 4)]: where in `values` each slot of values_t comes from, -1:
// nowhere, it is zero. Then values_t[i] = values[perm[i]], elements of `bytes` (2, 4 or 8) bytes.
cudaError_t launch_repack24_perm(const void* meta, const void* meta_t, int64_t n, int64_t m, int32_t* perm,
                                 cudaStream_t stream);
cudaError_t launch_repack24_t(int bytes, const void* values, const int32_t* perm, int64_t count, void* values_t,
                              cudaStream_t stream);

}  // namespace slk::cuda
#endif
