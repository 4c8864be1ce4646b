// adam_q_: the codec of a call.
#include "cuda/optim_adam.cuh"

namespace slk::cuda {

template <>
cudaError_t launch_adam_codec<Codec::dyn8>(const StepTensor*, int64_t, const StepArgs&, cudaStream_t);
template <>
cudaError_t launch_adam_codec<Codec::lin8>(const StepTensor*, int64_t, const StepArgs&, cudaStream_t);
template <>
cudaError_t launch_adam_codec<Codec::cmp8>(const StepTensor*, int64_t, const StepArgs&, cudaStream_t);
template <>
cudaError_t launch_adam_codec<Codec::dyn4>(const StepTensor*, int64_t, const StepArgs&, cudaStream_t);
template <>
cudaError_t launch_adam_codec<Codec::fp8>(const StepTensor*, int64_t, const StepArgs&, cudaStream_t);

cudaError_t launch_adam(const StepTensor* tensors, int64_t count, const StepArgs& args, cudaStream_t stream) {
  switch (args.codec) {
    case Codec::dyn8:
      return launch_adam_codec<Codec::dyn8>(tensors, count, args, stream);
    case Codec::lin8:
      return launch_adam_codec<Codec::lin8>(tensors, count, args, stream);
    case Codec::cmp8:
      return launch_adam_codec<Codec::cmp8>(tensors, count, args, stream);
    case Codec::dyn4:
      return launch_adam_codec<Codec::dyn4>(tensors, count, args, stream);
    case Codec::fp8:
      return launch_adam_codec<Codec::fp8>(tensors, count, args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace slk::cuda
