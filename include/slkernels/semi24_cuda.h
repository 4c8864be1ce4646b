// The CUDA launchers of family `semi24`, packing. Contracts: slkernels/semi24_pack.h; the same bits as the CPU
// kernels'.
//
// Asynchronous on `stream`, deterministic, no scratch. Float types are f32, bf16, f16; `bytes` (2, 4) is the size of
// an element that is only moved. Nothing is empty. Unlike the CPU's kernels, these write a pack's padding.
#pragma once

#include "slkernels/semi24_pack.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>

namespace slk::cuda {

// mask [n, m] = prune24(score [n, m]).
cudaError_t launch_prune24(DType, const void* score, int64_t n, int64_t m, Prune24, uint8_t* mask, cudaStream_t);

// W's pack and W_t's from one pass over W [n, m], pruned by |score|, or by |W| if score is null. Padding is written
// too.
cudaError_t launch_prune_compress24(DType, const void* w, const void* score, Prune24, const Packed24& pack,
                                    const Packed24& pack_t, cudaStream_t);

// The same by rows of max(x, 0)^2, rounded to x's type.
cudaError_t launch_relu2_prune24(DType, const void* x, const Packed24& pack, const Packed24& pack_t, cudaStream_t);

// W (*) mask. Whether the mask is 2:4 is not known on the host: a group that is not becomes two NaNs with code 0x4.
cudaError_t launch_compress24(DType, const void* w, const uint8_t* mask, const Packed24&, cudaStream_t);
// *first = the first group (row * groups24(m) + group) of the mask that is not 2:4, or -1; the first whose code is none
// of the six.
cudaError_t launch_check_mask24(const uint8_t* mask, int64_t n, int64_t m, int64_t* first, cudaStream_t);
cudaError_t launch_check24(const Packed24&, int64_t* first, cudaStream_t);

cudaError_t launch_decompress24(int bytes, const Packed24&, void* w, cudaStream_t);
cudaError_t launch_mask_of24(const Packed24&, uint8_t* mask, cudaStream_t);
cudaError_t launch_convert24(int bytes, const Packed24& from, const Packed24& to, cudaStream_t);

// perm [m, 2 groups24(n)] of plain packs of W [n, m] and W_t: positions in values, or -1.
cudaError_t launch_repack24_perm(const Packed24& pack, const Packed24& pack_t, int32_t* perm, cudaStream_t);
// values_t[i] = values[perm[i]] for i < count_t, or zero where perm[i] is not in [0, count).
cudaError_t launch_repack24_t(int bytes, const void* values, int64_t count, const int32_t* perm, int64_t count_t,
                              void* values_t, cudaStream_t);

}  // namespace slk::cuda
#endif
