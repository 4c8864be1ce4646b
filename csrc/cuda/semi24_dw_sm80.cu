// dvalues = dy^T x where the mask keeps it, for sm_80 and newer: the product of gemm_sm80.cuh, whose epilogue keeps two
// of every four columns of a tile, so that the dense gradient never leaves the chip.
//
// Both operands are rows along what is kept of the product, and tokens are its k: a stage holds kTileK tokens of 128
// columns of dy and of 256 of x, and ldmatrix transposes on its way to the registers.
#include "cuda/gemm_sm80.cuh"
#include "slkernels/ptx/arith.h"
#include "slkernels/semi24.cuh"
#include "slkernels/semi24_gemm.h"

namespace slk::cuda {
namespace {

using namespace gemm_sm80;

// Copies one thread's part of the tiles [kTileK tokens, kColumns] of a matrix, tile after tile along the tokens: in
// every tile the same chunk of tokens row, row + kRowsAPass, ...
template <int kColumns>
class TokenLoader {
  static constexpr int kRowChunks = kColumns / kChunk, kRowsAPass = kThreads / kRowChunks;
  static constexpr int kPasses = kTileK / kRowsAPass;
  static_assert(kRowsAPass % 8 == 0, "the rows of a thread's passes share one swizzle");

 public:
  static constexpr int kChunks = kTileK * kRowChunks;

  __device__ TokenLoader(const void* matrix, int64_t tokens, int64_t columns, int64_t ld, int64_t first_column) {
    const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    const int64_t column = first_column + chunk * kChunk;
    from_ = static_cast<const uint16_t*>(matrix) + row * ld + column;
    ld_ = ld;
    to_ = swizzled<kRowChunks>(row, chunk);
    bytes_ = columns - column >= kChunk ? 16 : columns > column ? 2 * int(columns - column) : 0;
    tokens_left_ = tokens - row;
  }

  __device__ void load_next(uint4* tile) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      ptx::cp_async_16(&tile[to_ + i * kRowsAPass * kRowChunks], from_ + i * kRowsAPass * ld_,
                       i * kRowsAPass < tokens_left_ ? bytes_ : 0);
    from_ += kTileK * ld_;
    tokens_left_ -= kTileK;
  }

 private:
  const uint16_t* from_;
  int64_t ld_, tokens_left_;
  int to_, bytes_;
};

// A [k, m] and B [k, n].
template <class T>
struct AlongTokens {
  using Element = T;
  using LoaderA = TokenLoader<kTileM>;
  using LoaderB = TokenLoader<kTileN>;

  struct Stage {
    uint4 a[LoaderA::kChunks], b[LoaderB::kChunks];
  };

  class Loader {
   public:
    __device__ Loader(const GemmArgs& g, int64_t first_m, int64_t first_n)
        : a_(g.a, g.k, g.m, g.lda, first_m), b_(g.b, g.k, g.n, g.ldb, first_n) {}
    __device__ void load_next(Stage& stage) {
      a_.load_next(stage.a);
      b_.load_next(stage.b);
    }

   private:
    LoaderA a_;
    LoaderB b_;
  };

  // Transposed quarters. Of a [16 tokens, 16 columns] piece of A: columns 0-7 and 8-15 of tokens 0-7, then of 8-15. Of
  // 16 columns of B: tokens 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  static __device__ void load(const Stage& stage, const WarpTile& warp, int step, Fragments& f) {
    const int token = step * kMmaK + warp.lane % 8, first = warp.lane / 8 % 2, second = warp.lane / 16;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
      ptx::ldmatrix_x4_trans(
          f.a[i], &stage.a[swizzled<kTileM / kChunk>(token + second * 8, (warp.m + i * kMmaM) / kChunk + first)]);
#pragma unroll
    for (int j = 0; j < kFragmentsN; j += 2) {
      uint32_t pair[4];
      ptx::ldmatrix_x4_trans(
          pair, &stage.b[swizzled<kTileN / kChunk>(token + first * 8, (warp.n + j * kMmaN) / kChunk + second)]);
      set_pair(f, j, pair);
    }
  }
};

// Of every four neighbours of a row of C the two that the row's metadata name. A thread keeps 8 of 16: a word of
// metadata, of which every layout has the 16 bits together, and 16 bytes of values.
struct KeepTwo : Product {
  static constexpr int kUnit = 16, kUnits = kTileN / kUnit;

  const void* meta;
  Layout24 layout;
  int64_t rows, columns;  // of the padded matrix

  __device__ uint32_t codes(int64_t row, int64_t word) const {
    if (layout != Layout24::plain)
      return __ldg(static_cast<const uint16_t*>(meta) + packed_word24(layout, row, word, rows));
    const int64_t bytes = ceil_div(columns, 8), byte = 2 * word;
    const auto* at = static_cast<const uint8_t*>(meta) + row * bytes + byte;
    return __ldg(at) | (byte + 1 < bytes ? __ldg(at + 1) << 8 : 0);
  }

  // Elements p and q of four, p | q << 2 = code.
  static __device__ uint32_t keep(uint2 four, uint32_t code) {
    return ptx::prmt(four.x, four.y, 0x1010 + (code & 3) * 0x22 + (code >> 2 & 3) * 0x2200);
  }

  template <class T>
  __device__ void store(const GemmArgs& g, int64_t first_m, int64_t first_n, Vector<T>* tile) const {
    const bool aligned = reinterpret_cast<uintptr_t>(g.c) % 16 == 0 && g.ldc % kChunk == 0;
#pragma unroll 4
    for (int at = threadIdx.x; at < kTileM * kUnits; at += kThreads) {
      const int row = at / kUnits, unit = at % kUnits;
      const int64_t i = first_m + row, j = first_n + unit * kUnit;
      if (i >= rows || j >= columns) continue;
      const uint32_t word = codes(i, j / kUnit);
      const uint4 low = reinterpret_cast<const uint4&>(chunk_of(tile, row, 2 * unit));
      const uint4 high = reinterpret_cast<const uint4&>(chunk_of(tile, row, 2 * unit + 1));
      const uint4 kept = make_uint4(keep({low.x, low.y}, word), keep({low.z, low.w}, word >> 4),
                                    keep({high.x, high.y}, word >> 8), keep({high.z, high.w}, word >> 12));
      auto* to = reinterpret_cast<uint32_t*>(static_cast<T*>(g.c) + i * g.ldc + j / 2);
      const int64_t groups = (columns - j) / 4;
      if (groups >= 4 && aligned) {
        *reinterpret_cast<uint4*>(to) = kept;
      } else {
        to[0] = kept.x;
        if (groups > 1) to[1] = kept.y;
        if (groups > 2) to[2] = kept.z;
        if (groups > 3) to[3] = kept.w;
      }
    }
  }
};

cudaError_t check(const DwCompress24Args& d) {
  const auto fits = [](int64_t size) { return size >= 0 && size <= INT32_MAX; };
  if (!fits(d.n) || !fits(d.m) || !fits(d.tokens) || d.ld_dy < d.n || d.ld_x < d.m) return cudaErrorInvalidValue;
  const auto unaligned = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (unaligned(d.dy, 16) || unaligned(d.x, 16) || d.ld_dy % kChunk || d.ld_x % kChunk)
    return cudaErrorMisalignedAddress;
  if (unaligned(d.values, 4) || (d.layout != Layout24::plain && unaligned(d.meta, 2)))
    return cudaErrorMisalignedAddress;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_dw_compress24_sm80(DType dtype, const DwCompress24Args& d, cudaStream_t stream) {
  if (const cudaError_t error = check(d); error != cudaSuccess) return error;
  const int64_t rows = padded_rows24(d.layout, d.n), columns = padded_columns24(d.layout, d.m);
  static_assert(kTileM % 64 == 0 && kTileN % kSm90TileK == 0, "the tiles of [n, m] cover the padded matrix");
  const GemmArgs g = {d.dy, d.x, d.values, d.n, d.m, d.tokens, d.ld_dy, d.ld_x, columns / 2};
  const KeepTwo epilogue = {{}, d.meta, d.layout, rows, columns};
  if (dtype == DType::bf16) return launch_with<AlongTokens<__nv_bfloat16>>(g, epilogue, stream);
  if (dtype == DType::f16) return launch_with<AlongTokens<__half>>(g, epilogue, stream);
  return cudaErrorInvalidValue;
}

}  // namespace slk::cuda
