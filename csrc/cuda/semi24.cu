// Packs of 2:4 weights from and to dense matrices and each other. Contract: slkernels/semi24_cuda.h.
//
// All move bytes and are bound by them. A thread has eight columns of a row, which are one byte of metadata, and a warp
// 256 of a row; where a layout puts metadata elsewhere, single bytes go there, and meet in L2.
#include "cuda/semi24_tile.cuh"
#include "slkernels/semi24_cuda.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunks = 32, kRows = kThreads / kChunks;  // a block's
constexpr int kNoGroup = 0x4;                            // code of a group outside the matrix

// Runs of eight columns, and the block and thread for each.
struct Chunks {
  int64_t n, m;
  int row_of_blocks;

  static Chunks with_padding(const Packed24& pack) { return of(pack.rows(), 2 * pack.row_values()); }
  static Chunks of(int64_t n, int64_t m) { return {n, m, int(ceil_div(ceil_div(m, kChunk24), kChunks))}; }
  unsigned blocks() const { return unsigned(ceil_div(n, kRows) * row_of_blocks); }
  __device__ int64_t row() const {
    return int64_t(int(blockIdx.x) / row_of_blocks) * kRows + int(threadIdx.x) / kChunks;
  }
  __device__ int64_t chunk() const {
    return int64_t(int(blockIdx.x) % row_of_blocks) * kChunks + int(threadIdx.x) % kChunks;
  }
  // How many of the thread's columns there are; in a matrix [n, m] that this one pads.
  __device__ int columns() const { return columns(n, m); }
  __device__ int columns(int64_t n, int64_t m) const {
    const int64_t left = m - kChunk24 * chunk();
    return row() >= n || left <= 0 ? 0 : left < kChunk24 ? int(left) : kChunk24;
  }
};

// Two elements, as values lie: aligned by 2 sizeof(E) in every layout.
template <class E>
struct alignas(2 * sizeof(E)) Two {
  E first, second;
};
template <class E>
__device__ Two<E>* two_of(const Packed24& pack, int64_t row, int64_t group) {
  return static_cast<Two<E>*>(pack.values) + row * (pack.row_values() / 2) + group;
}

// E is an unsigned integer of the element's size.
template <class E>
__device__ void store_eight(E* to, const E (&x)[kChunk24], int count) {
  constexpr int kVectors = kChunk24 * sizeof(E) / 16;
  if (count == kChunk24 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    uint4 vector[kVectors];
    memcpy(vector, x, sizeof vector);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) ptx::store_global(reinterpret_cast<uint4*>(to) + i, vector[i]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kChunk24; ++k)
    if (k < count) to[k] = x[k];
}
template <class E>
__device__ void load_eight(const E* from, E (&x)[kChunk24], int count) {
  constexpr int kVectors = kChunk24 * sizeof(E) / 16;
  if (count == kChunk24 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    uint4 vector[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vector[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(x, vector, sizeof vector);
    return;
  }
#pragma unroll
  for (int k = 0; k < kChunk24; ++k) x[k] = k < count ? from[k] : E(0);
}
// The bits of eight bytes 0 or 1.
__device__ uint32_t load_bits(const uint8_t* from, int count) {
  uint32_t bits = 0;
  if (count == kChunk24 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(from);
    return bytes.x * 0x10204080u >> 28 | bytes.y * 0x10204080u >> 28 << 4;
  }
#pragma unroll
  for (int k = 0; k < kChunk24; ++k)
    if (k < count) bits |= uint32_t(from[k]) << k;
  return bits;
}
__device__ void store_bits(uint8_t* to, uint32_t bits, int count) {
  if (count == kChunk24 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    ptx::store_global(to, make_uint2(bytes_of(bits), bytes_of(bits >> 4)));
    return;
  }
#pragma unroll
  for (int k = 0; k < kChunk24; ++k)
    if (k < count) to[k] = uint8_t(bits >> k & 1);
}

__device__ uint8_t& meta_at(const Packed24& pack, int64_t row, int64_t chunk) {
  return static_cast<uint8_t*>(pack.meta)[meta_byte(pack, row, chunk)];
}
// Whether a group of `width` columns keeps what a 2:4 mask may.
__device__ bool is_24(int kept, int width) {
  const int count = __popc(uint32_t(kept));
  return count <= 2 && count >= 2 - (4 - width);
}
__device__ int width_of(int columns, int group) {
  return min(max(columns - 4 * group, 0), 4);
}

// ---- dense to packed ------------------------------------------------------------------------------------------------

template <class E>
__global__ void __launch_bounds__(kThreads)
    compress24_kernel(Chunks at, const E* w, const uint8_t* mask, E not_a_number, Packed24 pack) {
  const int padded = at.columns(), columns = at.columns(pack.n, pack.m);
  if (padded == 0) return;
  const int64_t row = at.row(), chunk = at.chunk(), first = row * pack.m + kChunk24 * chunk;
  E x[kChunk24] = {};
  uint32_t bits = 0;
  if (columns > 0) {
    load_eight(w + first, x, columns);
    bits = load_bits(mask + first, columns);
  }
  uint32_t meta = 0;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const int width = width_of(columns, group), kept = int(bits >> (4 * group) & 15);
    int code = kNoGroup;
    Two<E> two = {0, 0};
    if (width > 0 && !is_24(kept, width)) {
      two = {not_a_number, not_a_number};
    } else if (width > 0) {
      code = code24(fill24(kept, width));
      const E* four = x + 4 * group;
      if (kept >> (code & 3) & 1) two.first = code & 2 ? four[2] : code & 1 ? four[1] : four[0];
      if (kept >> (code >> 2) & 1) two.second = code & 8 ? (code & 4 ? four[3] : four[2]) : four[1];
    }
    if (4 * group < padded) *two_of<E>(pack, row, 2 * chunk + group) = two;
    meta |= uint32_t(code) << (4 * group);
  }
  meta_at(pack, row, chunk) = uint8_t(meta);
}

// The first group of a matrix that is not as it should be.
__device__ void report(int64_t group, int64_t* first) {
  atomicMin(reinterpret_cast<unsigned long long*>(first), static_cast<unsigned long long>(group));
}

__global__ void __launch_bounds__(kThreads) check_mask24_kernel(Chunks at, const uint8_t* mask, int64_t* first) {
  const int columns = at.columns();
  if (columns == 0) return;
  const int64_t row = at.row(), chunk = at.chunk();
  const uint32_t bits = load_bits(mask + row * at.m + kChunk24 * chunk, columns);
  for (int group = 1; group >= 0; --group) {
    const int width = width_of(columns, group);
    if (width && !is_24(int(bits >> (4 * group) & 15), width))
      report(row * ((at.m + 3) / 4) + 2 * chunk + group, first);
  }
}

__global__ void __launch_bounds__(kThreads) check24_kernel(Chunks at, Packed24 pack, int64_t* first) {
  const int columns = at.columns();
  if (columns == 0) return;
  const int64_t row = at.row(), chunk = at.chunk();
  const uint32_t meta = meta_at(pack, row, chunk);
  for (int group = 1; group >= 0; --group) {
    const uint32_t code = meta >> (4 * group) & 15;
    if (4 * group < columns && (code & 3) >= code >> 2) report(row * ((at.m + 3) / 4) + 2 * chunk + group, first);
  }
}

// ---- packed to dense, and to packed ---------------------------------------------------------------------------------

template <class E>
__global__ void __launch_bounds__(kThreads) decompress24_kernel(Chunks at, Packed24 pack, E* w) {
  const int columns = at.columns();
  if (columns == 0) return;
  const int64_t row = at.row(), chunk = at.chunk();
  const uint32_t meta = meta_at(pack, row, chunk);
  E x[kChunk24];
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const int code = int(meta >> (4 * group) & 15);
    Two<E> two = {0, 0};
    if (4 * group < columns) two = *two_of<E>(pack, row, 2 * chunk + group);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[4 * group + k] = code >> 2 == k ? two.second : (code & 3) == k ? two.first : E(0);
  }
  store_eight(w + row * at.m + kChunk24 * chunk, x, columns);
}

__global__ void __launch_bounds__(kThreads) mask_of24_kernel(Chunks at, Packed24 pack, uint8_t* mask) {
  const int columns = at.columns();
  if (columns == 0) return;
  const int64_t row = at.row(), chunk = at.chunk();
  const int meta = meta_at(pack, row, chunk);
  store_bits(mask + row * at.m + kChunk24 * chunk, uint32_t(kept24_of(meta & 15) | kept24_of(meta >> 4) << 4), columns);
}

template <class E>
__global__ void __launch_bounds__(kThreads) convert24_kernel(Chunks at, Packed24 from, Packed24 to) {
  const int padded = at.columns(), columns = at.columns(from.n, from.m);
  if (padded == 0) return;
  const int64_t row = at.row(), chunk = at.chunk();
  const int meta = columns > 0 ? meta_at(from, row, chunk) : 0;
  meta_at(to, row, chunk) = uint8_t((columns > 0 ? meta & 15 : kNoGroup) | (columns > 4 ? meta >> 4 : kNoGroup) << 4);
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    Two<E> two = {0, 0};
    if (4 * group < columns) two = *two_of<E>(from, row, 2 * chunk + group);
    if (4 * group < padded) *two_of<E>(to, row, 2 * chunk + group) = two;
  }
}

// ---- from values to those of the transpose --------------------------------------------------------------------------

constexpr int kQuads = 4;  // groups of W_t a thread: 32 bytes of perm

// Lanes go along W's columns, so that they meet in W's metadata.
__global__ void __launch_bounds__(kThreads)
    repack24_perm_kernel(Packed24 pack, Packed24 pack_t, int column_blocks, int32_t* perm) {
  const int64_t column = int64_t(int(blockIdx.x) % column_blocks) * 32 + threadIdx.x % 32;
  const int64_t quads = (pack.n + 3) / 4;
  const int64_t quad0 = (int64_t(int(blockIdx.x) / column_blocks) * (kThreads / 32) + threadIdx.x / 32) * kQuads;
  if (column >= pack.m) return;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int64_t quad = quad0 + i;
    if (quad >= quads) break;
    const int code_t = meta_at(pack_t, column, quad / 2) >> (quad % 2 * 4) & 15;
    int2 position;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int64_t row = 4 * quad + (slot ? code_t >> 2 : code_t & 3);
      int at = -1;
      if (row < pack.n) {
        const int code = meta_at(pack, row, column / 8) >> (column / 4 % 2 * 4) & 15;
        const int64_t group = row * pack.row_values() + column / 4 * 2;
        if ((code & 3) == int(column % 4)) at = int(group);
        if (code >> 2 == int(column % 4)) at = int(group + 1);
      }
      (slot ? position.y : position.x) = at;
    }
    ptx::store_global(perm + (column * quads + quad) * 2, make_uint2(uint32_t(position.x), uint32_t(position.y)));
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    repack24_kernel(const E* values, int64_t count, const int32_t* perm, int64_t count_t, E* values_t) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kChunk24;
  if (first >= count_t) return;
  const int here = count_t - first < kChunk24 ? int(count_t - first) : kChunk24;
  uint32_t from[kChunk24];
  load_eight(reinterpret_cast<const uint32_t*>(perm) + first, from, here);
  E x[kChunk24];
#pragma unroll
  for (int k = 0; k < kChunk24; ++k) x[k] = k < here && from[k] < count ? values[from[k]] : E(0);
  store_eight(values_t + first, x, here);
}

// f(a null pointer of the unsigned integer of that size).
template <class F>
cudaError_t with_bytes(int bytes, F f) {
  if (bytes == 2) return f((uint16_t*)nullptr);
  return bytes == 4 ? f((uint32_t*)nullptr) : cudaErrorInvalidValue;
}

cudaError_t no_group(int64_t* first, cudaStream_t stream) {
  return cudaMemsetAsync(first, 0xff, sizeof *first, stream);  // -1, and the largest of unsigned numbers
}

}  // namespace

cudaError_t launch_compress24(DType type, const void* w, const uint8_t* mask, const Packed24& pack,
                              cudaStream_t stream) {
  const Chunks chunks = Chunks::with_padding(pack);
  const auto run = [&](auto not_a_number) {
    using E = decltype(not_a_number);
    return launch(compress24_kernel<E>, chunks.blocks(), kThreads, 0, stream, chunks, static_cast<const E*>(w), mask,
                  not_a_number, pack);
  };
  switch (type) {
    case DType::f32:
      return run(uint32_t(0x7fc00000));
    case DType::bf16:
      return run(uint16_t(0x7fc0));
    case DType::f16:
      return run(uint16_t(0x7e00));
    case DType::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_check_mask24(const uint8_t* mask, int64_t n, int64_t m, int64_t* first, cudaStream_t stream) {
  const Chunks chunks = Chunks::of(n, m);
  const cudaError_t error = no_group(first, stream);
  return error ? error : launch(check_mask24_kernel, chunks.blocks(), kThreads, 0, stream, chunks, mask, first);
}

cudaError_t launch_check24(const Packed24& pack, int64_t* first, cudaStream_t stream) {
  const Chunks chunks = Chunks::of(pack.n, pack.m);
  const cudaError_t error = no_group(first, stream);
  return error ? error : launch(check24_kernel, chunks.blocks(), kThreads, 0, stream, chunks, pack, first);
}

cudaError_t launch_decompress24(int bytes, const Packed24& pack, void* w, cudaStream_t stream) {
  const Chunks chunks = Chunks::of(pack.n, pack.m);
  return with_bytes(bytes, [&](auto* tag) {
    using E = std::remove_pointer_t<decltype(tag)>;
    return launch(decompress24_kernel<E>, chunks.blocks(), kThreads, 0, stream, chunks, pack, static_cast<E*>(w));
  });
}

cudaError_t launch_mask_of24(const Packed24& pack, uint8_t* mask, cudaStream_t stream) {
  const Chunks chunks = Chunks::of(pack.n, pack.m);
  return launch(mask_of24_kernel, chunks.blocks(), kThreads, 0, stream, chunks, pack, mask);
}

cudaError_t launch_convert24(int bytes, const Packed24& from, const Packed24& to, cudaStream_t stream) {
  const Chunks chunks = Chunks::with_padding(to);
  return with_bytes(bytes, [&](auto* tag) {
    return launch(convert24_kernel<std::remove_pointer_t<decltype(tag)>>, chunks.blocks(), kThreads, 0, stream, chunks,
                  from, to);
  });
}

cudaError_t launch_repack24_perm(const Packed24& pack, const Packed24& pack_t, int32_t* perm, cudaStream_t stream) {
  const int64_t column_blocks = ceil_div(pack.m, 32), blocks = ceil_div(groups24(pack.n), kThreads / 32 * kQuads);
  return launch(repack24_perm_kernel, unsigned(blocks * column_blocks), kThreads, 0, stream, pack, pack_t,
                int(column_blocks), perm);
}

cudaError_t launch_repack24_t(int bytes, const void* values, int64_t count, const int32_t* perm, int64_t count_t,
                              void* values_t, cudaStream_t stream) {
  const unsigned blocks = unsigned(ceil_div(count_t, kThreads * kChunk24));
  return with_bytes(bytes, [&](auto* tag) {
    using E = std::remove_pointer_t<decltype(tag)>;
    return launch(repack24_kernel<E>, blocks, kThreads, 0, stream, static_cast<const E*>(values), count, perm, count_t,
                  static_cast<E*>(values_t));
  });
}

}  // namespace slk::cuda
