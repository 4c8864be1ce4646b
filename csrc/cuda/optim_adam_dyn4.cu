// adam_q_ with the moments in dyn4: optim_adam.cuh.
#include "cuda/optim_adam.cuh"

namespace slk::cuda {

SLK_ADAM_OF_CODEC(Codec::dyn4)

}  // namespace slk::cuda
