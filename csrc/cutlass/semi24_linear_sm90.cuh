// y [T, n] = act(x W^T + bias) on sm_90a: a CUTLASS 3.x kernel whose sparse operand is W, with D = W x^T column-major.
//
// TMA brings values, metadata and x into a ring of tiles kSm90TileK deep; two warpgroups multiply by wgmma.sp; the
// epilogue adds the bias of D's row, applies the activation in fp32 and stores D through shared memory by TMA. Rows and
// columns beyond n, T and m are clipped by TMA: it reads them as zeros and does not write them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "slkernels/semi24_activation.cuh"
#include "slkernels/semi24_gemm.h"

namespace slk::cuda {

// A compute node of CUTLASS' epilogue tree. One instance serves every activation: the branch is uniform, and an
// instance an activation would be a minute of compiling each.
template <class T>
struct Activate24 {
  struct Arguments {
    Activation24 activation;
  };
  CUTLASS_DEVICE T operator()(T const& z, Arguments const& arguments) const {
    return activate24(arguments.activation, z);
  }
};
template <int kSize>
struct Activate24<cutlass::Array<float, kSize>> {
  using Arguments = typename Activate24<float>::Arguments;
  using Fragment = cutlass::Array<float, kSize>;

  CUTLASS_DEVICE Fragment operator()(Fragment const& z, Arguments const& arguments) const {
    if (arguments.activation == Activation24::none) return z;
    Fragment y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) y[i] = activate24(arguments.activation, z[i]);
    return y;
  }
};

template <class T, int kTileM, int kTileN, int kClusterM>
struct Linear24Sm90 {
  using Element = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, cutlass::bfloat16_t, cutlass::half_t>;
  using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kSm90TileK>>;
  using Cluster = cute::Shape<cute::Int<kClusterM>, cute::_1, cute::_1>;
  using Arch = cutlass::arch::Sm90;
  using OpClass = cutlass::arch::OpClassSparseTensorOp;
  static constexpr int kAlignment = 8;  // 16 bytes: what TMA asks of rows
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  template <template <class> class F, class To>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<F, To, float, kRound>;
  using Bias = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, Element, float,
                                                           cute::Stride<cute::_1, cute::_0, cute::_0>, 1>;
  using Sum =
      cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::plus, float>, Bias, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Output = cutlass::epilogue::fusion::Sm90EVT<Compute<Activate24, Element>, Sum>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, OpClass, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::ColumnMajor, kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Output>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, OpClass, Element, cutlass::layout::RowMajor, kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment,
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Config = typename Mainloop::SparseConfig;
  static_assert(std::is_same_v<typename Mainloop::ElementE, uint8_t>);
  static_assert(Config::TensorEAtomM::value == 64 && Config::TensorEAtomK::value == kSm90TileK,
                "layout sm90 of semi24.h");

  static typename Kernel::Arguments arguments(const Linear24Args& a, int device, int sms) {
    const int n = int(a.n), tokens = int(a.tokens), m = int(a.m);
    // W as it is stored, padded; the products run over what x and y have.
    const auto stored = cute::make_shape(int(padded_rows24(Layout24::sm90, a.n)), tokens,
                                         int(padded_columns24(Layout24::sm90, a.m)), 1);
    typename Kernel::Arguments arguments;
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = cute::make_shape(n, tokens, m, 1);
    arguments.mainloop = {static_cast<const Element*>(a.values), Config::fill_layoutA(stored),
                          static_cast<const Element*>(a.x),      {a.ld_x, cute::_1{}, 0},
                          static_cast<const uint8_t*>(a.meta),   Config::fill_layoutE(stored)};
    arguments.epilogue.thread = {{{static_cast<const Element*>(a.bias), Element(0), {}}, {}, {}}, {a.activation}};
    arguments.epilogue.ptr_D = static_cast<Element*>(a.y);
    arguments.epilogue.dD = {cute::_1{}, a.ld_y, 0};
    arguments.hw_info.device_id = device;
    arguments.hw_info.sm_count = sms;
    return arguments;
  }
};

// A kernel of our own around CUTLASS' operator, for a name that says what it is.
template <class T, int kTileM, int kTileN, int kClusterM>
__global__ void __launch_bounds__(Linear24Sm90<T, kTileM, kTileN, kClusterM>::Kernel::MaxThreadsPerBlock, 1)
    linear24_sm90_kernel(const __grid_constant__
                         typename Linear24Sm90<T, kTileM, kTileN, kClusterM>::Kernel::Params params) {
  extern __shared__ char cutlass_shared[];
  typename Linear24Sm90<T, kTileM, kTileN, kClusterM>::Kernel()(params, cutlass_shared);
}

template <class T, int kTileM, int kTileN, int kClusterM>
cudaError_t launch_linear24_instance(const Linear24Args& a, int sms, cudaStream_t stream) {
  using Kernel = typename Linear24Sm90<T, kTileM, kTileN, kClusterM>::Kernel;
  const auto kernel = linear24_sm90_kernel<T, kTileM, kTileN, kClusterM>;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  if (error != cudaSuccess) return error;
  const auto params =
      Kernel::to_underlying_arguments(Linear24Sm90<T, kTileM, kTileN, kClusterM>::arguments(a, device, sms), nullptr);

  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterM, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace slk::cuda
