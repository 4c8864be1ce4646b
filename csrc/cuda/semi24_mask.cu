// Learned 2:4 masks. Contract: slkernels/semi24_mask.h.
//
// A thread takes as many neighbouring groups as have 48 bytes of gates: two with fp32 gates, four with 16-bit ones.
// Gates and columns then go as 16-byte vectors, and every sector that a warp touches is used whole; rows that do not
// begin at such an address go element by element, from the same sectors. Groups do not know of each other: no shared
// memory, no barriers, and the sums are the same for every grid.
#include "cuda/types.cuh"
#include "slkernels/semi24_mask.cuh"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMaxBlocks = 4096, kMaxRows = 32768;  // beyond, blocks take more than one turn

template <class T>
using Words = std::conditional_t<std::is_same_v<T, double>, MaskDouble, MaskFloat>;

// Groups of a thread: the gates are three 16-byte vectors (six in fp64, which exists to be right).
template <class TG>
constexpr int kGroups = sizeof(TG) == 2 ? 4 : 2;

// Blocks on a multiprocessor: 24 warps to hide long chains of arithmetic, 16 where 80 registers would not do.
template <class TG>
constexpr int kForwardBlocks = sizeof(TG) == 8 ? 2 : 3;
template <class TG>
constexpr int kBackwardBlocks = sizeof(TG) == 4 ? 3 : 2;

// ---- runs of elements -----------------------------------------------------------------------------------------------

template <class T, int kCount>
__device__ inline bool in_vectors(const T* p, int64_t count) {
  static_assert(kCount % Vector<T>::kSize == 0);
  return count >= kCount && reinterpret_cast<uintptr_t>(p) % sizeof(Vector<T>) == 0;
}

// kCount neighbours as they are in memory: 16-bit types take half a register each until they are used.
template <class T, int kCount>
struct Run {
  static constexpr int kVectors = kCount / Vector<T>::kSize;
  Vector<T> part[kVectors];

  __device__ Sum<T> operator[](int i) const { return widen(part[i / Vector<T>::kSize].at[i % Vector<T>::kSize]); }
  __device__ void set(int i, Sum<T> x) { part[i / Vector<T>::kSize].at[i % Vector<T>::kSize] = narrow<T>(x); }
};

// The first `count` of the elements at p; zeros beyond.
template <int kCount, class T>
__device__ inline Run<T, kCount> load_run(const T* p, int64_t count) {
  Run<T, kCount> run;
  if (in_vectors<T, kCount>(p, count)) {
#pragma unroll
    for (int i = 0; i < run.kVectors; ++i) run.part[i] = reinterpret_cast<const Vector<T>*>(p)[i];
    return run;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    run.part[i / Vector<T>::kSize].at[i % Vector<T>::kSize] = i < count ? p[i] : narrow<T>(0);
  return run;
}
template <class T, int kCount>
__device__ inline void store_run(T* p, int64_t count, const Run<T, kCount>& run) {
  if (in_vectors<T, kCount>(p, count)) {
#pragma unroll
    for (int i = 0; i < run.kVectors; ++i) reinterpret_cast<Vector<T>*>(p)[i] = run.part[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < count) p[i] = run.part[i / Vector<T>::kSize].at[i % Vector<T>::kSize];
}
// kSize of its elements, from `first`.
template <int kSize, class T, int kCount>
__device__ inline void take(const Run<T, kCount>& run, int first, Sum<T> (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = run[first + i];
}

// f(first group, its first element of W, elements of W from there to the row's end) for every run of groups of this
// thread. Rows along y, runs of a row along x. (A W whose rows are whole groups is one row.)
template <int kRun, class F>
__device__ inline void each_run(int64_t n, int64_t m, F f) {
  const int64_t groups = groups24(m);
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y)
    for (int64_t run = int64_t(blockIdx.x) * kThreads + threadIdx.x; run * kRun < groups;
         run += int64_t(gridDim.x) * kThreads)
      f(row * groups + run * kRun, row * m + 4 * kRun * run, m - 4 * kRun * run, groups - run * kRun);
}
template <class K, class... Args>
cudaError_t launch_runs(K kernel, int run, int64_t n, int64_t m, cudaStream_t stream, Args... args) {
  if (n == 0 || m == 0) return cudaSuccess;
  if (m % 4 == 0) {
    m *= n;
    n = 1;
  }
  const int64_t blocks = ceil_div(ceil_div(groups24(m), run), kThreads);
  const dim3 grid(unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks), unsigned(n < kMaxRows ? n : kMaxRows));
  return launch(kernel, grid, kThreads, 0, stream, n, m, args...);
}

// ---- maskllm24 ------------------------------------------------------------------------------------------------------

// Group i of a run of gates, number `group` of all.
template <class TG, int kCount, class R>
__device__ inline SoftGroup<Words<R>> soft_group_of(const Run<TG, kCount>& gates, int i, const MaskFactors<R>& factors,
                                                    int64_t group, uint64_t seed) {
  R gate[kCodes24];
  take(gates, kCodes24 * i, gate);
  return soft_group<Words<R>>(gate, factors, uint32_t(group), uint32_t(uint64_t(group) >> 32), seed);
}

template <class T, class TG>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<TG>)
    soft_mask_kernel(int64_t n, int64_t m, const T* w, const TG* gate, SoftMask24 mask, T* y) {
  using R = Sum<T>;
  constexpr int kRun = kGroups<TG>;
  const auto factors = MaskFactors<R>::template of<Words<R>>(*mask.kappa, *mask.tau);
  const uint64_t seed = uint64_t(*mask.seed);
  each_run<kRun>(n, m, [&](int64_t group, int64_t at, int64_t columns, int64_t groups) {
    const auto gates = load_run<kCodes24 * kRun>(gate + kCodes24 * group, kCodes24 * groups);
    auto v = load_run<4 * kRun>(w + at, columns);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const auto soft = soft_group_of(gates, i, factors, group + i, seed);
#pragma unroll
      for (int c = 0; c < 4; ++c) v.set(4 * i + c, Words<R>::mul(v[4 * i + c], soft.mask(c)));
    }
    store_run(y + at, columns, v);
  });
}

// dgate or dw may be null.
template <class T, class TG>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<TG>)
    soft_mask_backward_kernel(int64_t n, int64_t m, const T* w, const TG* gate, const T* dy, SoftMask24 mask, TG* dgate,
                              T* dw) {
  using R = Sum<T>;
  constexpr int kRun = kGroups<TG>;
  const auto factors = MaskFactors<R>::template of<Words<R>>(*mask.kappa, *mask.tau);
  const uint64_t seed = uint64_t(*mask.seed);
  each_run<kRun>(n, m, [&](int64_t group, int64_t at, int64_t columns, int64_t groups) {
    auto gates = load_run<kCodes24 * kRun>(gate + kCodes24 * group, kCodes24 * groups);
    auto d = load_run<4 * kRun>(dy + at, columns);
    const auto v = load_run<4 * kRun>(w + at, dgate ? columns : 0);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const auto soft = soft_group_of(gates, i, factors, group + i, seed);
      R cotangent[4], weight[4], out[kCodes24];
      take(d, 4 * i, cotangent);
      take(v, 4 * i, weight);
      gate_gradient<Words<R>>(soft, factors, cotangent, weight, out);
#pragma unroll
      for (int k = 0; k < kCodes24; ++k) gates.set(kCodes24 * i + k, out[k]);
#pragma unroll
      for (int c = 0; c < 4; ++c) d.set(4 * i + c, Words<R>::mul(cotangent[c], soft.mask(c)));
    }
    if (dgate) store_run(dgate + kCodes24 * group, kCodes24 * groups, gates);
    if (dw) store_run(dw + at, columns, d);
  });
}

// ---- gate_to_mask ---------------------------------------------------------------------------------------------------

template <class TG>
__global__ void __launch_bounds__(kThreads) gate_to_mask_kernel(int64_t n, int64_t m, const TG* gate, uint8_t* mask) {
  constexpr int kRun = kGroups<TG>;
  struct alignas(4 * kRun) Bytes {
    uint32_t of[kRun];
  };
  each_run<kRun>(n, m, [&](int64_t group, int64_t at, int64_t columns, int64_t groups) {
    const auto gates = load_run<kCodes24 * kRun>(gate + kCodes24 * group, kCodes24 * groups);
    Bytes bytes;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      Sum<TG> one[kCodes24];
      take(gates, kCodes24 * i, one);
      bytes.of[i] = pattern_bytes24(uint32_t(best_code24(one)));
    }
    if (columns >= 4 * kRun && reinterpret_cast<uintptr_t>(mask + at) % sizeof(Bytes) == 0) {
      *reinterpret_cast<Bytes*>(mask + at) = bytes;
      return;
    }
#pragma unroll
    for (int c = 0; c < 4 * kRun; ++c)
      if (c < columns) mask[at + c] = uint8_t(bytes.of[c / 4] >> 8 * (c % 4));
  });
}

// ---- srste_grad_ ----------------------------------------------------------------------------------------------------

// A thread takes eight elements: one or two 16-byte vectors of each of grad and W, eight bytes of the mask.
template <class T>
__global__ void __launch_bounds__(kThreads)
    srste_grad_kernel(const T* w, const uint8_t* mask, Sum<T> lam, int64_t count, T* grad) {
  constexpr int kRun = 8;
  struct alignas(kRun) Bytes {
    uint8_t at[kRun];
  };
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kRun; i < count;
       i += int64_t(gridDim.x) * kThreads * kRun) {
    const int64_t rest = count - i;
    auto g = load_run<kRun>(grad + i, rest);
    const auto v = load_run<kRun>(w + i, rest);
    Bytes keep;
    if (rest >= kRun && reinterpret_cast<uintptr_t>(mask + i) % kRun == 0) {
      keep = *reinterpret_cast<const Bytes*>(mask + i);
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k) keep.at[k] = k < rest ? mask[i + k] : 1;
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k)
      if (!keep.at[k]) g.set(k, Words<Sum<T>>::fma(lam, v[k], g[k]));
    store_run(grad + i, rest, g);
  }
}

// f(null pointers of W's and the gates' element types).
template <class F>
cudaError_t with_gate_types(const GatedWeight24& x, F f) {
  if (x.type == DType::f64) return f((double*)nullptr, (double*)nullptr);
  return with_float_type(
      x.type, [&](auto* type) { return with_float_type(x.gate_type, [&](auto* gate) { return f(type, gate); }); });
}
}  // namespace

cudaError_t launch_soft_mask24(const GatedWeight24& x, const SoftMask24& mask, void* y, cudaStream_t stream) {
  return with_gate_types(x, [&](auto* type, auto* gate_type) {
    using T = Pointee<decltype(type)>;
    using TG = Pointee<decltype(gate_type)>;
    return launch_runs(soft_mask_kernel<T, TG>, kGroups<TG>, x.n, x.m, stream, static_cast<const T*>(x.w),
                       static_cast<const TG*>(x.gate), mask, static_cast<T*>(y));
  });
}

cudaError_t launch_soft_mask24_backward(const GatedWeight24& x, const SoftMask24& mask, const void* dy, void* dgate,
                                        void* dw, cudaStream_t stream) {
  return with_gate_types(x, [&](auto* type, auto* gate_type) {
    using T = Pointee<decltype(type)>;
    using TG = Pointee<decltype(gate_type)>;
    return launch_runs(soft_mask_backward_kernel<T, TG>, kGroups<TG>, x.n, x.m, stream, static_cast<const T*>(x.w),
                       static_cast<const TG*>(x.gate), static_cast<const T*>(dy), mask, static_cast<TG*>(dgate),
                       static_cast<T*>(dw));
  });
}

cudaError_t launch_gate_to_mask24(DType type, const void* gate, int64_t n, int64_t m, uint8_t* mask,
                                  cudaStream_t stream) {
  return with_type(type, [&](auto* tag) {
    using TG = Pointee<decltype(tag)>;
    return launch_runs(gate_to_mask_kernel<TG>, kGroups<TG>, n, m, stream, static_cast<const TG*>(gate), mask);
  });
}

cudaError_t launch_srste_grad(DType type, const void* w, const uint8_t* mask, double lam, int64_t count, void* grad,
                              cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(count, 8 * kThreads);
  return with_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    return launch(srste_grad_kernel<T>, unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream,
                  static_cast<const T*>(w), mask, Sum<T>(lam), count, static_cast<T*>(grad));
  });
}

}  // namespace slk::cuda
