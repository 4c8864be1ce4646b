// prune24, prune_compress24 and relu2_prune24. Contract: slkernels/semi24_cuda.h; arithmetic: slkernels/semi24.cuh.
//
// prune_compress24 reads W once and writes both packs. A block takes 128 x 128 of W, a thread two units of four rows by
// eight columns: two tiles each, that never leave its registers. W's values go out directly, 64 bytes a row and warp.
// W_t's lie along W's rows, which are spread over the block: they and both metadata cross through shared memory,
// and leave as 16-byte vectors, 128 bytes a row of W_t.
//
// A bf16 matrix moves 2 bytes an element in and 2.25 out: 71 MB for 4096 x 4096, 21 us at 3.35 TB/s, or 10 us if what
// is written stays in a cache of 50 MB. A 4 x 4 tile costs 290 instructions by the best of 90 patterns and 230 by rows,
// and 100 more for addresses, metadata and stores, about half of them at half rate: 15 to 17 us of a GPU's 528
// schedulers. Hence tiles one at a time and registers for 24 warps, so that loads of some run under the arithmetic of
// others.
#include <algorithm>

#include "cuda/semi24_tile.cuh"
#include "slkernels/semi24_cuda.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;         // rows and columns of W a block; a multiple of every layout's padding
constexpr int kQuads = kTile / 4;  // rows of tiles
constexpr int kUnits = 2;          // a thread
constexpr unsigned kMaxBlocks = 8192;
static_assert(kUnits * kThreads * 4 * kChunk24 == kTile * kTile);
static_assert(kTile % kSm90TileK == 0 && kTile % 64 == 0);

__device__ void load_vectors(const void* from, uint2 (&four)[2]) {
  const uint4 both = *static_cast<const uint4*>(from);
  four[0] = {both.x, both.y};
  four[1] = {both.z, both.w};
}
__device__ void load_vectors(const void* from, uint4 (&four)[2]) {
  four[0] = static_cast<const uint4*>(from)[0];
  four[1] = static_cast<const uint4*>(from)[1];
}

template <class T>
struct Source {
  const T* data;
  int64_t n, m;
};

// Two neighbouring tiles that are inside of a matrix of m columns, their rows at multiples of 16 bytes.
template <class T>
__device__ void load_tiles(const T* from, int64_t m, Tile<T> (&tile)[2]) {
#pragma unroll
  for (int r = 0; r < 4; ++r, from += m) {
    Four24<T> four[2];
    load_vectors(from, four);
    tile[0].set_row(r, four[0]);
    tile[1].set_row(r, four[1]);
  }
}

// A tile. kInside: as above; otherwise its elements outside the matrix are zeros.
template <bool kInside, class T>
__device__ Tile<T> load_tile(const Source<T>& source, int64_t row, int64_t column) {
  Tile<T> tile;
  const T* from = source.data + row * source.m + column;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (kInside) {
      tile.set_row(r, *reinterpret_cast<const Four24<T>*>(from + r * source.m));
    } else {
      T element[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        element[k] = row + r < source.n && column + k < source.m ? from[r * source.m + k] : T(0.0f);
      Four24<T> four;
      memcpy(&four, element, sizeof four);
      tile.set_row(r, four);
    }
  }
  return tile;
}

// Columns or rows of a tile that are inside, of `left` from its first.
__device__ int within_tile(int64_t left) {
  return left < 0 ? 0 : left < 4 ? int(left) : 4;
}

// ---- prune24 --------------------------------------------------------------------------------------------------------

template <class T, bool kTransposable>
__global__ void __launch_bounds__(kThreads) prune24_kernel(Source<T> score, bool vectors, uint8_t* mask) {
  const int64_t tiles = (score.m + 3) / 4, total = (score.n + 3) / 4 * tiles;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / tiles * 4, column = i % tiles * 4;
    const Tile<T> tile =
        vectors && row + 4 <= score.n ? load_tile<true>(score, row, column) : load_tile<false>(score, row, column);
    const uint32_t word = prune_tile<kTransposable>(tile).word;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (row + r >= score.n) break;
      uint8_t* to = mask + (row + r) * score.m + column;
      const uint32_t kept = bytes_of(word >> (4 * r));
      if (vectors) {
        *reinterpret_cast<uint32_t*>(to) = kept;
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (column + k < score.m) to[k] = uint8_t(kept >> (8 * k));
      }
    }
  }
}

// ---- prune_compress24 -----------------------------------------------------------------------------------------------

// A pack, its padded extents worked out.
struct Target {
  void *values, *meta;
  Layout24 layout;
  int64_t rows, columns;  // of the dense matrix

  static Target of(const Packed24& pack) {
    return {pack.values, pack.meta, pack.layout, pack.rows(), 2 * pack.row_values()};
  }
};

// Where a block's 128 x 128 lie in a pack, and how much of them.
struct Place {
  int64_t row, column;
  int rows, columns;  // of the block's, inside the padded extents; not positive: none

  __device__ Place(const Target& to, int64_t row, int64_t column)
      : row(row),
        column(column),
        rows(int(min(to.rows - row, int64_t(kTile)))),
        columns(int(min(to.columns - column, int64_t(kTile)))) {}
};

// A block's metadata are staged as in layout plain: words of 16 columns, eight a row. A thread stores 16 bytes of them.
constexpr int kMetaThreads = kTile;
constexpr int kRowWords = kTile / 16;
static_assert(kRowWords == 8 && kTile == kSm90TileK);

// Of the packed layouts' 16 bytes, the staged word whose place is word k of thread t.
struct Staged {
  int row, word;
};
constexpr Staged staged_sm90(int t, int k) {  // two rows, the words of either parity
  return {t / 16 * 16 + t % 8 + k % 2 * 8, k / 2 * 2 + t / 8 % 2};
}
constexpr Staged staged_sm80(int t, int k) {  // four rows, a pair of words
  const int u = t % 32;
  return {u / 8 * 32 + u % 8 + 8 * (k / 4 * 2 + k % 2), t / 32 * 2 + k / 2 % 2};
}
constexpr bool staged_right() {
  for (int t = 0; t < kMetaThreads; ++t)
    for (int k = 0; k < 8; ++k) {
      const Staged a = staged_sm90(t, k), b = staged_sm80(t, k);
      if (sm90_word24(a.row, a.word, kTile) != 8 * t + k || sm80_word24(b.row, b.word, kTile) != 8 * t + k)
        return false;
    }
  return true;
}
static_assert(staged_right());

__device__ void store_meta(const Target& to, const Place& at, const uint16_t* staged, int thread) {
  const auto row = [&](int i) { return reinterpret_cast<const uint4*>(staged)[i]; };
  uint16_t* words = static_cast<uint16_t*>(to.meta);
  if (to.layout == Layout24::sm90) {
    const Staged first = staged_sm90(thread, 0);
    const uint4 a = row(first.row), b = row(first.row + 8);
    const uint32_t parity = first.word ? 0x7632 : 0x5410;
    const uint4 chunk = {ptx::prmt(a.x, b.x, parity), ptx::prmt(a.y, b.y, parity), ptx::prmt(a.z, b.z, parity),
                         ptx::prmt(a.w, b.w, parity)};
    if (at.columns > 0 && first.row < at.rows)
      ptx::store_global(words + sm90_word24(at.row, at.column / 16, to.rows) + 8 * thread, chunk);
  } else if (to.layout == Layout24::sm80) {
    const Staged first = staged_sm80(thread, 0);
    const uint32_t* pair = reinterpret_cast<const uint32_t*>(staged) + first.row * (kRowWords / 2) + first.word / 2;
    const uint32_t a = pair[0], b = pair[8 * kRowWords / 2], c = pair[16 * kRowWords / 2], d = pair[24 * kRowWords / 2];
    const uint4 chunk = {ptx::prmt(a, b, 0x5410), ptx::prmt(a, b, 0x7632), ptx::prmt(c, d, 0x5410),
                         ptx::prmt(c, d, 0x7632)};
    if (16 * first.word < at.columns && first.row < at.rows)
      ptx::store_global(words + sm80_word24(at.row, at.column / 16 + first.word, to.rows) + thread % 32 * 8, chunk);
  } else {
    const int64_t pitch = (to.columns + kChunk24 - 1) / kChunk24;
    uint8_t* bytes = static_cast<uint8_t*>(to.meta) + at.row * pitch + at.column / kChunk24;
    const int here = (at.columns + kChunk24 - 1) / kChunk24;
    if (pitch % 16 == 0) {
      if (thread < at.rows && here > 0) ptx::store_global(bytes + thread * pitch, row(thread));
    } else {
      for (int i = thread; i < kTile * 2 * kRowWords; i += kMetaThreads)
        if (i / 16 < at.rows && i % 16 < here) bytes[i / 16 * pitch + i % 16] = uint8_t(staged[i / 2] >> (i % 2 * 8));
    }
  }
}

// Neighbours in a row of a pack: two elements of each of kCount groups.
template <class T, int kCount>
struct alignas(kCount * sizeof(Pair24<T>)) Pairs {
  Pair24<T> at[kCount];
};
// Stores them: those of groups that are inside, `left` columns of the matrix from the first. kVector: all, at once.
template <bool kVector, class T, int kCount>
__device__ void store_pairs(T* to, const Pairs<T, kCount>& pairs, int left) {
  if constexpr (kVector) {
    using Word = std::conditional_t<sizeof pairs == 8, uint2, uint4>;
    ptx::store_global(to, *reinterpret_cast<const Word*>(&pairs));
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (4 * k < left) reinterpret_cast<Pair24<T>*>(to)[k] = pairs.at[k];
  }
}

// Where W_t's values of a column and a row of tiles are staged. Warps write 8 columns 8 apart by 4 rows of tiles, and
// read 16 bytes along a column: with the 16-byte units of a column permuted by its number, both meet every bank once.
template <class T>
__device__ int staged_pair(int column, int quad) {
  constexpr int kPairs = 16 / sizeof(Pair24<T>);
  return column * kQuads + (quad / kPairs ^ column / 8 % 8) * kPairs + quad % kPairs;
}

// The metadata of a thread's rows, a byte a row; that with g + 1 has the next eight columns. Gives 16 columns each of
// rows g % 2 and g % 2 + 2.
__device__ uint32_t gather_rows(uint32_t x, int g) {
  const uint32_t y = __shfl_xor_sync(0xffffffffu, x, 1);
  return ptx::prmt(x, y, g & 1 ? 0x3715 : 0x6240);
}

// The codes of a thread's columns, a byte a column of its left and right tile; four threads 8 lanes apart have 16 rows.
// Gives those of columns 4 (q % 2) + 2 (q / 2) and the next, 16 bits each.
__device__ uint32_t gather_columns(uint32_t left, uint32_t right, int q) {
  const uint32_t own = q & 1 ? right : left;
  uint32_t y = __shfl_xor_sync(0xffffffffu, q & 1 ? left : right, 8);
  const uint32_t x = q & 1 ? y | own << 4 : own | y << 4;
  y = __shfl_xor_sync(0xffffffffu, x, 16);
  return ptx::prmt(x, y, q & 2 ? 0x3726 : 0x5140);
}

// The matrix' rows x columns of blocks, of which the first inside_rows x inside_columns have a launch of their own.
struct Blocks {
  int rows, columns, inside_rows, inside_columns;

  int outside() const { return rows * columns - inside_rows * inside_columns; }
  __device__ int2 outside(int i) const {
    const int right = columns - inside_columns, beside = inside_rows * right;
    if (i < beside) return {i / right, inside_columns + i % right};
    return {inside_rows + (i - beside) / columns, (i - beside) % columns};
  }
};

// What a pack is made of: W, or max(W, 0)^2 where nothing but pruning by rows is asked for.
enum class Of24 { w, scored, relu2 };

// kInside: the blocks' elements are all inside of W, and its rows start at multiples of 16 bytes.
template <class T, bool kTransposable, Of24 kOf, bool kInside>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kInside ? 3 : 2)
    prune_compress24_kernel(Source<T> w, Source<T> score, Target to, Target to_t, Blocks blocks, bool vectors_t) {
  using Pair = Pair24<T>;
  __shared__ __align__(16) Pair staged_values[kTile * kQuads];
  __shared__ __align__(16) uint16_t staged_meta[2][kTile * kRowWords];
  const int2 block = kInside ? make_int2(blockIdx.y, blockIdx.x) : blocks.outside(blockIdx.x);
  const int64_t row0 = int64_t(block.x) * kTile, column0 = int64_t(block.y) * kTile;
  const int g = threadIdx.x % 8, q = threadIdx.x / 8 % 4, warp = threadIdx.x / 32, quad = 4 * warp + q;
  const Place at(to, row0, column0), at_t(to_t, column0, row0);
  const int64_t row = row0 + 4 * quad, pitch = to.columns / 2;
  T* values = static_cast<T*>(to.values) + row * pitch + column0 / 2 + 4 * g;
  const T* from = w.data + row * w.m + column0 + 8 * g;
  Pair* staged =
      staged_values + staged_pair<T>(8 * g, quad);  // of all its columns: they are a multiple of 64 away, or < 8
  uint16_t* meta = staged_meta[0] + (4 * quad + g % 2) * kRowWords + g / 2;
  uint16_t* meta_t = staged_meta[1] + (8 * g + 4 * (q % 2) + q / 2 * 2) * kRowWords + warp;

#pragma unroll 1
  for (int half = 0; half < kUnits; ++half) {
    const int column = 64 * half + 8 * g;  // of the block's
    Tile<T> tiles[2];
    if constexpr (kInside) load_tiles(from + 64 * half, w.m, tiles);
    Pairs<T, 2> picked[4] = {};
    uint32_t code = 0, code_t[2] = {};
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {  // one after the other: registers are for more warps
      const int64_t first = column0 + column + 4 * side;
      Tile<T> tile;
      if constexpr (kInside) {
        tile = tiles[0];
        tiles[0] = tiles[1];
      } else {
        tile = load_tile<false>(w, row, first);
      }
      if constexpr (kOf == Of24::relu2) tile.relu2();
      Tile24 kept = prune_tile<kTransposable>(kOf == Of24::scored ? load_tile<kInside>(score, row, first) : tile);
      if constexpr (!kInside)
        kept = at_edge24(kept.word, kept.columns, within_tile(w.m - first), within_tile(w.n - row));
      const Slots24 slots = slots24(kept.rows), slots_t = slots24(kept.columns);
      code = code >> 4 | slots.code << 4;
      code_t[0] = code_t[1];
      code_t[1] = slots_t.code;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        picked[r].at[0] = picked[r].at[1];
        picked[r].at[1] = tile.pick(r, slots);
      }
      if constexpr (!kTransposable || !kInside) tile.keep(kept.word);
      tile = tile.transposed();
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Pair pair = tile.pick(c, slots_t);
        staged[(64 * half + 4 * side + c) * kQuads] = pair;
      }
    }
    T* out = values + 32 * half;
#pragma unroll
    for (int r = 0; r < 4; ++r, out += pitch)
      if (kInside || 4 * quad + r < at.rows)
        store_pairs<(kInside && sizeof(T) == 2)>(out, picked[r], at.columns - column);
    const uint32_t rows = gather_rows(code, g);
    const uint32_t columns = gather_columns(code_t[0], code_t[1], q);
    meta[4 * half] = uint16_t(rows);
    meta[4 * half + 2 * kRowWords] = uint16_t(rows >> 16);
    meta_t[64 * half * kRowWords] = uint16_t(columns);
    meta_t[(64 * half + 1) * kRowWords] = uint16_t(columns >> 16);
  }
  __syncthreads();

  constexpr int kPairs = 16 / sizeof(Pair), kColumnUnits = kQuads / kPairs;  // 16-byte units of a column
  constexpr int kStep = kThreads / kColumnUnits;
  const int first = threadIdx.x % kColumnUnits * kPairs, column_t = threadIdx.x / kColumnUnits;
  const int64_t pitch_t = to_t.columns / 2;
  T* out = static_cast<T*>(to_t.values) + (column0 + column_t) * pitch_t + row0 / 2 + 2 * first;
#pragma unroll
  for (int i = 0; i < kTile / kStep; ++i, out += kStep * pitch_t) {
    const int column = column_t + i * kStep;
    const auto pairs = *reinterpret_cast<const Pairs<T, kPairs>*>(staged_values + staged_pair<T>(column, first));
    if (kInside && vectors_t)
      store_pairs<true>(out, pairs, 0);
    else if (kInside || column < at_t.rows)
      store_pairs<false>(out, pairs, at_t.columns - 4 * first);
  }
  static_assert(2 * kMetaThreads == kThreads);
  if (int(threadIdx.x) < kMetaThreads)
    store_meta(to, at, staged_meta[0], threadIdx.x);
  else
    store_meta(to_t, at_t, staged_meta[1], int(threadIdx.x) - kMetaThreads);
}

// f(a null pointer of the element type).
template <class F>
cudaError_t with_weight_type(DType type, F f) {
  return with_type(type, [&](auto* tag) {
    if constexpr (sizeof(*tag) == 8)
      return cudaErrorInvalidValue;
    else
      return f(tag);
  });
}

bool starts_whole(const void* data, int64_t columns, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns * bytes % 16 == 0;
}

template <class T, bool kTransposable, Of24 kOf>
cudaError_t prune_compress(const void* data, const void* scores, const Packed24& pack, const Packed24& pack_t,
                           cudaStream_t stream) {
  const Target to = Target::of(pack), to_t = Target::of(pack_t);
  const int64_t n = pack.n, m = pack.m;
  const Source<T> w = {static_cast<const T*>(data), n, m}, score = {static_cast<const T*>(scores), n, m};
  Blocks blocks = {int(ceil_div(std::max(to.rows, to_t.columns), kTile)),
                   int(ceil_div(std::max(to.columns, to_t.rows), kTile)), 0, 0};
  if (starts_whole(data, m, sizeof(T)) && starts_whole(scores, m, sizeof(T))) {
    blocks.inside_rows = int(std::min<int64_t>(n / kTile, 65535));  // the most that a grid takes
    blocks.inside_columns = int(m / kTile);
  }
  const bool vectors_t = to_t.columns / 2 * int64_t(sizeof(T)) % 16 == 0;
  cudaError_t error = cudaSuccess;
  if (blocks.inside_rows > 0 && blocks.inside_columns > 0)
    error =
        launch(prune_compress24_kernel<T, kTransposable, kOf, true>, dim3(blocks.inside_columns, blocks.inside_rows),
               kThreads, 0, stream, w, score, to, to_t, blocks, vectors_t);
  if (blocks.outside() > 0 && error == cudaSuccess)
    error = launch(prune_compress24_kernel<T, kTransposable, kOf, false>, blocks.outside(), kThreads, 0, stream, w,
                   score, to, to_t, blocks, vectors_t);
  return error;
}

}  // namespace

cudaError_t launch_prune24(DType type, const void* score, int64_t n, int64_t m, Prune24 by, uint8_t* mask,
                           cudaStream_t stream) {
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(ceil_div(n, 4) * ceil_div(m, 4), kThreads), kMaxBlocks));
  return with_weight_type(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto kernel = by == Prune24::transposable ? prune24_kernel<T, true> : prune24_kernel<T, false>;
    const bool vectors = reinterpret_cast<uintptr_t>(score) % sizeof(Four24<T>) == 0 && m % 4 == 0;
    return launch(kernel, blocks, kThreads, 0, stream, Source<T>{static_cast<const T*>(score), n, m}, vectors, mask);
  });
}

cudaError_t launch_prune_compress24(DType type, const void* w, const void* score, Prune24 by, const Packed24& pack,
                                    const Packed24& pack_t, cudaStream_t stream) {
  return with_weight_type(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool scored = score != nullptr && score != w;
    const auto run = by == Prune24::transposable
                         ? (scored ? prune_compress<T, true, Of24::scored> : prune_compress<T, true, Of24::w>)
                         : (scored ? prune_compress<T, false, Of24::scored> : prune_compress<T, false, Of24::w>);
    return run(w, scored ? score : w, pack, pack_t, stream);
  });
}

cudaError_t launch_relu2_prune24(DType type, const void* x, const Packed24& pack, const Packed24& pack_t,
                                 cudaStream_t stream) {
  return with_weight_type(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    return prune_compress<T, false, Of24::relu2>(x, x, pack, pack_t, stream);
  });
}

}  // namespace slk::cuda
