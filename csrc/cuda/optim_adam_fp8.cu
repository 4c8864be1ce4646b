// adam_q_ with the moments in fp8: optim_adam.cuh.
#include "cuda/optim_adam.cuh"

namespace slk::cuda {

SLK_ADAM_OF_CODEC(Codec::fp8)

}  // namespace slk::cuda
