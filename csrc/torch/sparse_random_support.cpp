// random_support and random_blocks8 at the torch boundary. They take no tensor, so one implementation serves every
// device.
#include "slkernels/sparse.h"
#include "torch/tensor.h"
#ifdef SLKERNELS_WITH_CUDA
#include "torch/stream.h"
#endif

namespace slk {
namespace {

using torch::headeronly::DeviceType;
using torch::stable::Device;

struct Support {
  Tensor crow, col;
};

ScalarType index_type(int64_t columns) {
  return columns <= 32768 ? ScalarType::Short : ScalarType::Int;
}

Tensor empty_on(const Shape& shape, ScalarType type, const Device& device) {
  return torch::stable::empty({shape.data(), shape.size()}, type, std::nullopt, device);
}

void check_sizes(const char* op, int64_t n, int64_t m, double density) {
  check(n >= 0 && m >= 0, op, "n and m must not be negative, got ", n, " and ", m);
  check(n < (int64_t(1) << 31) && m < (int64_t(1) << 31), op, "n and m must be below 2^31, got ", n, " and ", m);
  check(density >= 0 && density <= 1, op, "density must be in [0, 1], got ", density);
}

void check_count(const char* op, int64_t nnz) {
  check(nnz < (int64_t(1) << 31), op, "more than 2^31 - 1 nonzeros (", nnz, ") do not fit int32 offsets");
}

void check_device(const char* op, const Device& device) {
#ifdef SLKERNELS_WITH_CUDA
  if (device.type() == DeviceType::CUDA) check_torch_has_cuda(op);
  check(device.type() == DeviceType::CPU || device.type() == DeviceType::CUDA, op, "device must be cpu or cuda");
#else
  check(device.type() != DeviceType::CUDA, op,
        "this build of slkernels has no CUDA kernels (see slkernels.build_info())");
  check(device.type() == DeviceType::CPU, op, "device must be cpu or cuda");
#endif
}

Support sample(const char* op, const SupportSampler& sampler, const Device& device) {
  check_count(op, sampler.count);
  Support s = {empty_on({sampler.n + 1}, ScalarType::Int, device),
               empty_on({sampler.count}, index_type(sampler.m), device)};
  int32_t* crow = s.crow.mutable_data_ptr<int32_t>();
  const bool narrow = s.col.scalar_type() == ScalarType::Short;
#ifdef SLKERNELS_WITH_CUDA
  if (device.type() == DeviceType::CUDA) {
    const torch::stable::accelerator::DeviceGuard guard(s.crow.get_device_index());
    const Tensor scratch = empty_on({sampler.n + sampler.count}, ScalarType::Int, device);
    check_cuda(op, cuda::launch_random_support(sampler, crow, s.col.mutable_data_ptr(), narrow,
                                               scratch.mutable_data_ptr<int32_t>(),
                                               current_stream(op, s.crow.get_device_index())));
    return s;
  }
#endif
  const Tensor scratch = empty_on({sampler.count}, ScalarType::Long, device);
  int64_t* samples = scratch.mutable_data_ptr<int64_t>();
  parallel_for(sampler.count, 1 << 12, [&](int64_t b, int64_t e) { cpu::sample_support(sampler, {b, e}, samples); });
  const auto fill = [&](auto* col) {
    cpu::bucket_support(sampler, samples, crow, col);
    parallel_for(sampler.n, 64, [&](int64_t b, int64_t e) { cpu::sort_support(sampler, crow, col, {b, e}); });
  };
  if (narrow)
    fill(s.col.mutable_data_ptr<int16_t>());
  else
    fill(s.col.mutable_data_ptr<int32_t>());
  return s;
}

// Nonzeros of an [n, m] matrix whose 8x8 blocks `sampler` draws: the edges cut the blocks of the last row and column.
int64_t block_nonzeros(const SupportSampler& s, int64_t n, int64_t m) {
  const int64_t corner = s.count - s.inner - s.right - s.bottom;
  return 64 * s.inner + 8 * (m % 8) * s.right + 8 * (n % 8) * s.bottom + (n % 8) * (m % 8) * corner;
}

Support expand([[maybe_unused]] const char* op, const Support& blocks, int64_t n, int64_t m, int64_t nnz,
               const Device& device) {
  Support s = {empty_on({n + 1}, ScalarType::Int, device), empty_on({nnz}, index_type(m), device)};
  const int32_t* block_crow = blocks.crow.const_data_ptr<int32_t>();
  int32_t* crow = s.crow.mutable_data_ptr<int32_t>();
  const bool blocks_16 = blocks.col.scalar_type() == ScalarType::Short,
             narrow = s.col.scalar_type() == ScalarType::Short;
#ifdef SLKERNELS_WITH_CUDA
  if (device.type() == DeviceType::CUDA) {
    const torch::stable::accelerator::DeviceGuard guard(s.crow.get_device_index());
    check_cuda(op, cuda::launch_expand_blocks(block_crow, blocks.col.const_data_ptr(), blocks_16, n, m, crow,
                                              s.col.mutable_data_ptr(), narrow,
                                              current_stream(op, s.crow.get_device_index())));
    return s;
  }
#endif
  if (narrow)
    cpu::expand_blocks(block_crow, blocks.col.const_data_ptr<int16_t>(), n, m, crow, s.col.mutable_data_ptr<int16_t>());
  else if (blocks_16)
    cpu::expand_blocks(block_crow, blocks.col.const_data_ptr<int16_t>(), n, m, crow, s.col.mutable_data_ptr<int32_t>());
  else
    cpu::expand_blocks(block_crow, blocks.col.const_data_ptr<int32_t>(), n, m, crow, s.col.mutable_data_ptr<int32_t>());
  return s;
}

Device device_or_cpu(std::optional<Device> device) {
  return device ? *device : Device(DeviceType::CPU);
}

std::tuple<Tensor, Tensor> random_support(int64_t n, int64_t m, double density, int64_t seed, Text kind,
                                          std::optional<Device> device) {
  const char* op = "random_support";
  const Device target = device_or_cpu(device);
  check_sizes(op, n, m, density);
  check_device(op, target);
  Support s;
  if (kind == "uniform") {
    s = sample(op, SupportSampler::uniform(n, m, density, uint64_t(seed)), target);
  } else if (kind == "row") {
    s = sample(op, SupportSampler::rows(SupportKind::row, n, m, density, uint64_t(seed)), target);
  } else if (kind == "column") {
    s = sample(op, SupportSampler::rows(SupportKind::column, n, m, density, uint64_t(seed)), target);
  } else if (kind == "block8") {
    const SupportSampler blocks = SupportSampler::blocks(n, m, density, uint64_t(seed));
    const int64_t nnz = block_nonzeros(blocks, n, m);
    check_count(op, nnz);  // before the blocks are drawn: they can be many
    s = expand(op, sample(op, blocks, target), n, m, nnz, target);
  } else {
    check(false, op, "kind must be uniform, row, column or block8, got ", kind);
  }
  return {s.crow, s.col};
}

std::tuple<Tensor, Tensor> random_blocks8(int64_t n, int64_t m, double density, int64_t seed,
                                          std::optional<Device> device) {
  const char* op = "random_blocks8";
  const Device target = device_or_cpu(device);
  check_sizes(op, n, m, density);
  check_device(op, target);
  const Support s = sample(op, SupportSampler::blocks(n, m, density, uint64_t(seed)), target);
  return {s.crow, s.col};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CompositeExplicitAutograd, m) {
  m.impl("random_support", TORCH_BOX(&random_support));
  m.impl("random_blocks8", TORCH_BOX(&random_blocks8));
}

}  // namespace slk
