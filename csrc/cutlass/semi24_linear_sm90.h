// The instances of the 2:4 product for sm_90a: one a file, because one takes more than a minute and 5 GB to compile.
#pragma once

#include "slkernels/semi24_gemm.h"

namespace slk::cuda {

// A block's tile of D [n, T]. `sms` blocks at most stay resident and take tiles in turn.
//   large  256 x 128, in clusters of two blocks along n that share x's tile
//   small  128 x 128: for products with too few large tiles to fill the device
constexpr int kLinear24LargeM = 256, kLinear24SmallM = 128, kLinear24TileN = 128;

cudaError_t launch_linear24_sm90_bf16_large(const Linear24Args&, int sms, cudaStream_t);
cudaError_t launch_linear24_sm90_bf16_small(const Linear24Args&, int sms, cudaStream_t);
cudaError_t launch_linear24_sm90_f16_large(const Linear24Args&, int sms, cudaStream_t);
cudaError_t launch_linear24_sm90_f16_small(const Linear24Args&, int sms, cudaStream_t);

}  // namespace slk::cuda
