// The steps with moments in dyn4.
#include "cuda/optim_adam.cuh"
#include "cuda/optim_step.cuh"

namespace slk::cuda {

template <>
cudaError_t launch_step_codec<Codec::dyn4>(const StepKind& kind, const StepTensor* tensors, int64_t count,
                                           const StepArgs& args, cudaStream_t stream) {
  return is_common_adam(kind, args) ? launch_common_adam<Codec::dyn4>(kind, tensors, count, args, stream)
                                    : launch_any_step<Codec::dyn4>(kind, tensors, count, args, stream);
}

}  // namespace slk::cuda
