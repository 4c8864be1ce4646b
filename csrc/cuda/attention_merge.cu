// merge_attention_states and its gradient. Contract: slkernels/attention.h and attention_merge.cuh.
//
// A warp has 32 neighbouring rows (tokens of a head): first each lane works out the weights of one row, in fp64 as on
// the CPU, so that the exponentials cost a thirty-second of what they would in every lane; then the warp walks the
// rows, 16 bytes a lane, and takes a row's weights from the lane that has them. Bound by memory: 3 D elements a row
// forward, 5 D backward.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "slkernels/attention.h"
#include "slkernels/attention_merge.cuh"
#include "slkernels/launch.cuh"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256, kRowsAWarp = 32, kRowsABlock = kThreads / 32 * kRowsAWarp;
constexpr int kRowLanes = 16;  // backward: lanes of a row; a row of 128 in bf16 is one load of each
constexpr unsigned kAll = 0xffffffffu;

// What sums and weights are kept in; the lse's type too.
template <class T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};
template <class T>
using Sum = typename SumOf<T>::Type;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T element[kCount];
};

// The lane's row, and where it begins in a tensor of given strides.
struct Row {
  int64_t index, batch, head, token;
  bool inside;
  __device__ Row(const MergeStates& m, int64_t first)
      : index(first + threadIdx.x % 32), inside(index < m.batch * m.heads * m.tokens) {
    const int64_t of_head = index / m.tokens;
    token = index - of_head * m.tokens;
    batch = of_head / m.heads;
    head = of_head - batch * m.heads;
  }
  __device__ int64_t offset(const HeadStrides& s) const {
    return inside ? batch * s.batch + head * s.head + token * s.token : 0;
  }
};

template <class T>
__device__ MergeWeights weights_of(const MergeStates& m, const Row& row) {
  if (!row.inside) return MergeWeights(-INFINITY, -INFINITY);
  return MergeWeights(static_cast<const Sum<T>*>(m.lse1)[row.index], static_cast<const Sum<T>*>(m.lse2)[row.index]);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeStates m) {
  using Part = Vector<T, kCount>;
  const int64_t first = int64_t(blockIdx.x) * kRowsABlock + threadIdx.x / 32 * kRowsAWarp;
  const Row row(m, first);
  const MergeWeights w = weights_of<T>(m, row);
  if (row.inside) static_cast<Sum<T>*>(m.lse)[row.index] = Sum<T>(w.lse);
  const Sum<T> w1 = Sum<T>(w.first), w2 = Sum<T>(w.second);
  const int64_t at1 = row.offset(m.o1_strides), at2 = row.offset(m.o2_strides), at = row.offset(m.o_strides);
  const unsigned parts = unsigned(m.features / kCount);
  // 32 rows of `parts` pieces: all lanes take part in every step.
  for (unsigned i = threadIdx.x % 32; i < kRowsAWarp * parts; i += 32) {
    const int lane = int(i / parts), part = int(i % parts) * kCount;
    const Sum<T> f1 = __shfl_sync(kAll, w1, lane), f2 = __shfl_sync(kAll, w2, lane);
    const int64_t from1 = __shfl_sync(kAll, at1, lane), from2 = __shfl_sync(kAll, at2, lane),
                  to = __shfl_sync(kAll, at, lane);
    if (first + lane >= m.batch * m.heads * m.tokens) continue;
    const Part a = *reinterpret_cast<const Part*>(static_cast<const T*>(m.o1) + from1 + part);
    const Part b = *reinterpret_cast<const Part*>(static_cast<const T*>(m.o2) + from2 + part);
    Part o;
#pragma unroll
    for (int e = 0; e < kCount; ++e) o.element[e] = T(Sum<T>(a.element[e]) * f1 + Sum<T>(b.element[e]) * f2);
    *reinterpret_cast<Part*>(static_cast<T*>(m.o) + to + part) = o;
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) merge_backward_kernel(const __grid_constant__ MergeStatesBackward g) {
  using Part = Vector<T, kCount>;
  const MergeStates& m = g.forward;
  const int64_t first = int64_t(blockIdx.x) * kRowsABlock + threadIdx.x / 32 * kRowsAWarp;
  const Row row(m, first);
  const MergeWeights w = weights_of<T>(m, row);
  const Sum<T> w1 = Sum<T>(w.first), w2 = Sum<T>(w.second);
  const int64_t at1 = row.offset(m.o1_strides), at2 = row.offset(m.o2_strides), at = row.offset(g.d_o_strides),
                to1 = row.offset(g.do1_strides), to2 = row.offset(g.do2_strides);
  const int lane = threadIdx.x % 32;
  Sum<T> dot = 0;  // of the lane's own row: do . (o1 - o2)
  for (int i = 0; i < kRowsAWarp; i += 32 / kRowLanes) {
    const int owner = i + lane / kRowLanes;
    const Sum<T> f1 = __shfl_sync(kAll, w1, owner), f2 = __shfl_sync(kAll, w2, owner);
    const int64_t from1 = __shfl_sync(kAll, at1, owner), from2 = __shfl_sync(kAll, at2, owner),
                  from = __shfl_sync(kAll, at, owner), into1 = __shfl_sync(kAll, to1, owner),
                  into2 = __shfl_sync(kAll, to2, owner);
    Sum<T> sum = 0;
    if (first + owner < m.batch * m.heads * m.tokens) {
      for (int64_t part = lane % kRowLanes * kCount; part < m.features; part += kRowLanes * kCount) {
        const Part x = *reinterpret_cast<const Part*>(static_cast<const T*>(g.d_o) + from + part);
        const Part a = *reinterpret_cast<const Part*>(static_cast<const T*>(m.o1) + from1 + part);
        const Part b = *reinterpret_cast<const Part*>(static_cast<const T*>(m.o2) + from2 + part);
        Part d1, d2;
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const Sum<T> d = Sum<T>(x.element[e]);
          sum += d * (Sum<T>(a.element[e]) - Sum<T>(b.element[e]));
          d1.element[e] = T(d * f1);
          d2.element[e] = T(d * f2);
        }
        *reinterpret_cast<Part*>(static_cast<T*>(g.do1) + into1 + part) = d1;
        *reinterpret_cast<Part*>(static_cast<T*>(g.do2) + into2 + part) = d2;
      }
    }
#pragma unroll
    for (int step = kRowLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    const Sum<T> mine = __shfl_sync(kAll, sum, (lane - i) * kRowLanes & 31);
    if (lane >= i && lane < i + 32 / kRowLanes) dot = mine;
  }
  if (!row.inside) return;
  const double dlse = g.dlse ? static_cast<const Sum<T>*>(g.dlse)[row.index] : 0;
  static_cast<Sum<T>*>(g.dlse1)[row.index] = Sum<T>(w.first * (dlse + w.second * dot));
  static_cast<Sum<T>*>(g.dlse2)[row.index] = Sum<T>(w.second * (dlse - w.first * dot));
}

// Whether rows of elements of `size` bytes may be read 16 bytes at a time.
bool whole_vectors(const void* base, const HeadStrides& s, int64_t features, int64_t size) {
  const auto even = [&](int64_t n) { return n * size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && even(s.batch) && even(s.head) && even(s.token) &&
         even(features);
}

// Runs f(null T*) with the dtype's element type.
template <class F>
cudaError_t with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<__half*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Runs f(grid) unless there are no rows.
template <class F>
cudaError_t over_rows(const MergeStates& m, const F& f) {
  const int64_t rows = m.batch * m.heads * m.tokens, blocks = ceil_div(rows, kRowsABlock);
  // 32-bit pieces of 32 rows.
  if (rows < 0 || blocks > INT32_MAX || m.features < 0 || m.features >= INT32_MAX / kRowsAWarp)
    return cudaErrorInvalidValue;
  return rows == 0 ? cudaSuccess : f(dim3(unsigned(blocks)));
}

}  // namespace

cudaError_t launch_merge_attention_states(const MergeStates& m, cudaStream_t stream) {
  return over_rows(m, [&](dim3 grid) {
    return with_element(m.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int kCount = 16 / sizeof(T);
      const bool vectors = whole_vectors(m.o1, m.o1_strides, m.features, sizeof(T)) &&
                           whole_vectors(m.o2, m.o2_strides, m.features, sizeof(T)) &&
                           whole_vectors(m.o, m.o_strides, m.features, sizeof(T));
      return launch(vectors ? merge_kernel<T, kCount> : merge_kernel<T, 1>, grid, dim3(kThreads), 0, stream, m);
    });
  });
}

cudaError_t launch_merge_attention_states_backward(const MergeStatesBackward& g, cudaStream_t stream) {
  const MergeStates& m = g.forward;
  return over_rows(m, [&](dim3 grid) {
    return with_element(m.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int kCount = 16 / sizeof(T);
      bool vectors = whole_vectors(g.d_o, g.d_o_strides, m.features, sizeof(T));
      vectors &= whole_vectors(m.o1, m.o1_strides, m.features, sizeof(T));
      vectors &= whole_vectors(m.o2, m.o2_strides, m.features, sizeof(T));
      vectors &= whole_vectors(g.do1, g.do1_strides, m.features, sizeof(T));
      vectors &= whole_vectors(g.do2, g.do2_strides, m.features, sizeof(T));
      return launch(vectors ? merge_backward_kernel<T, kCount> : merge_backward_kernel<T, 1>, grid, dim3(kThreads), 0,
                    stream, g);
    });
  });
}

}  // namespace slk::cuda
