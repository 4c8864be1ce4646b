// Family `semi24`, packing, on CUDA: the stream for the launchers. Arguments were checked in semi24.cpp.
#ifdef SLKERNELS_WITH_CUDA
#include "slkernels/semi24_cuda.h"

#include "torch/semi24.h"
#include "torch/stream.h"

namespace slk::cuda {
namespace {

// f(the current stream of t's device, which is current).
template <class F>
void on_stream_of(const char* op, const Tensor& t, F f) {
  check_cuda(op, f(current_stream(op, t.get_device_index())));
}

uint8_t* bytes_of(const Tensor& t) {
  return static_cast<uint8_t*>(t.mutable_data_ptr());
}

// What launch(int64_t* found, stream) leaves in *found. Waits for the device.
template <class F>
int64_t wait_for(const char* op, const Tensor& like, F launch) {
  const Tensor found = empty_like_shape(like, {1}, ScalarType::Long);
  on_stream_of(op, like, [&](cudaStream_t stream) { return launch(found.mutable_data_ptr<int64_t>(), stream); });
  const int64_t one = 1;
  Tensor host = torch::stable::empty({&one, 1}, ScalarType::Long, std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU));
  torch::stable::copy_(host, found);
  return *host.const_data_ptr<int64_t>();
}

}  // namespace

void prune24(const Tensor& score, Prune24 by, const Tensor& mask) {
  constexpr const char* op = "prune24";
  const DType type = dtype_of(op, "W", score);
  on_stream_of(op, score, [&](cudaStream_t stream) {
    return launch_prune24(type, score.const_data_ptr(), score.size(0), score.size(1), by, bytes_of(mask), stream);
  });
}

void prune_compress24(const Tensor& W, const Tensor& score, Prune24 by, const Packed24& pack, const Packed24& pack_t) {
  constexpr const char* op = "prune_compress24";
  const DType type = dtype_of(op, "W", W);
  on_stream_of(op, W, [&](cudaStream_t stream) {
    return launch_prune_compress24(type, W.const_data_ptr(), score.const_data_ptr(), by, pack, pack_t, stream);
  });
}

void relu2_prune24(const Tensor& x, const Packed24& pack, const Packed24& pack_t) {
  constexpr const char* op = "relu2_prune24";
  on_stream_of(op, x, [&](cudaStream_t stream) {
    return launch_relu2_prune24(dtype_of(op, "x", x), x.const_data_ptr(), pack, pack_t, stream);
  });
}

void compress24(const Tensor& W, const Tensor& mask, const Packed24& pack) {
  constexpr const char* op = "compress24";
  const DType type = dtype_of(op, "W", W);
  on_stream_of(op, W, [&](cudaStream_t stream) {
    return launch_compress24(type, W.const_data_ptr(), bytes_of(mask), pack, stream);
  });
}

int64_t check_mask24(const Tensor& mask) {
  return wait_for("compress24", mask, [&](int64_t* found, cudaStream_t stream) {
    return launch_check_mask24(bytes_of(mask), mask.size(0), mask.size(1), found, stream);
  });
}

int64_t check24(const Packed24& pack, const Tensor& meta) {
  return wait_for("check24", meta,
                  [&](int64_t* found, cudaStream_t stream) { return launch_check24(pack, found, stream); });
}

void decompress24(const Packed24& pack, const Tensor& W) {
  on_stream_of("decompress24", W, [&](cudaStream_t stream) {
    return launch_decompress24(int(W.element_size()), pack, W.mutable_data_ptr(), stream);
  });
}

void mask_of24(const Packed24& pack, const Tensor& mask) {
  on_stream_of("mask_of24", mask, [&](cudaStream_t stream) { return launch_mask_of24(pack, bytes_of(mask), stream); });
}

void convert24(const Tensor& values, const Packed24& from, const Packed24& to) {
  on_stream_of("convert24", values,
               [&](cudaStream_t stream) { return launch_convert24(int(values.element_size()), from, to, stream); });
}

void repack24_perm(const Packed24& pack, const Packed24& pack_t, const Tensor& perm) {
  on_stream_of("repack24_perm", perm, [&](cudaStream_t stream) {
    return launch_repack24_perm(pack, pack_t, perm.mutable_data_ptr<int32_t>(), stream);
  });
}

void repack24_t(const Tensor& values, const Tensor& perm, const Tensor& values_t) {
  on_stream_of("repack24_t_", values, [&](cudaStream_t stream) {
    return launch_repack24_t(int(values.element_size()), values.const_data_ptr(), values.numel(),
                             perm.const_data_ptr<int32_t>(), values_t.numel(), values_t.mutable_data_ptr(), stream);
  });
}

}  // namespace slk::cuda
#endif
