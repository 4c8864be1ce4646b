// The steps' launcher: kinds of tensors, and the codec of a call.
#include "cuda/optim_launch.cuh"

namespace slk::cuda {
namespace {

cudaError_t launch_kind(const StepKind& kind, const StepTensor* tensors, int64_t count, const StepArgs& args,
                        cudaStream_t stream) {
  switch (args.codec) {
    case Codec::dyn8:
      return launch_step_codec<Codec::dyn8>(kind, tensors, count, args, stream);
    case Codec::lin8:
      return launch_step_codec<Codec::lin8>(kind, tensors, count, args, stream);
    case Codec::cmp8:
      return launch_step_codec<Codec::cmp8>(kind, tensors, count, args, stream);
    case Codec::dyn4:
      return launch_step_codec<Codec::dyn4>(kind, tensors, count, args, stream);
    case Codec::fp8:
      return launch_step_codec<Codec::fp8>(kind, tensors, count, args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_step(const StepTensor* tensors, int64_t count, const StepArgs& args, cudaStream_t stream) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const DType out_dtype : {DType::f32, DType::bf16, DType::f16})
      for (const int low_bits : {0, 8, 16}) {
        const StepKind kind = {dtype, out_dtype, low_bits};
        bool some = false;
        for (int64_t i = 0; i < count && !some; ++i) some = tensors[i].n > 0 && kind_of(tensors[i]) == kind;
        if (!some) continue;
        const cudaError_t error = launch_kind(kind, tensors, count, args, stream);
        if (error != cudaSuccess) return error;
      }
  return cudaSuccess;
}

}  // namespace slk::cuda
