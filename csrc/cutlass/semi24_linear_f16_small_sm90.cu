#include "cutlass/semi24_linear_sm90.cuh"
#include "cutlass/semi24_linear_sm90.h"

namespace slk::cuda {

cudaError_t launch_linear24_sm90_f16_small(const Linear24Args& args, int sms, cudaStream_t stream) {
  return launch_linear24_instance<__half, kLinear24SmallM, kLinear24TileN, 1>(args, sms, stream);
}

}  // namespace slk::cuda
