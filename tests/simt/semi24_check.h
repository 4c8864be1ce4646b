// Family `semi24` under the harness: 16-bit numbers, random 2:4 matrices, and a packer of its own, written from
// CUTLASS 2.x' reorder_meta (host_reorder.h) and the layouts' descriptions. Used by semi24_*.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/semi24.h"
#include "slkernels/types.h"

namespace semi24_check {

using slk::DType;

inline const char* name_of(DType type) {
  return type == DType::f16 ? "f16" : "bf16";
}
inline double value(DType type, uint16_t bits) {
  if (type == DType::f16) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}
inline uint16_t to_bits(DType type, float x) {
  if (type == DType::f16) return static_cast<__half_raw>(__float2half_rn(x)).x;
  return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x;
}
// Half of the distance of two neighbours at |x|.
inline double half_ulp(DType type, double x) {
  const int bits = type == DType::f16 ? 11 : 8, smallest = type == DType::f16 ? -25 : -134;
  return std::max(std::ldexp(std::fabs(x), -bits), std::ldexp(1, smallest));
}

// A matrix whose rows start at multiples of 8 elements and `pad` more; what lies between them is poison (NaN), and
// nothing follows the last row's last column.
struct Matrix {
  int64_t rows, columns, ld;
  simt::Buffer<uint16_t> bits;
  Matrix(int64_t rows_, int64_t columns_, int64_t ld_)
      : rows(rows_), columns(columns_), ld(ld_), bits(rows_ && columns_ ? size_t((rows_ - 1) * ld_ + columns_) : 0) {}
  uint16_t& at(int64_t i, int64_t j) const { return bits[i * ld + j]; }
};
inline int64_t aligned_ld(int64_t columns, int64_t pad) {
  return std::max<int64_t>(8, (columns + 7) / 8 * 8) + pad;
}
inline void fill(DType type, const Matrix& m, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.columns; ++j) m.at(i, j) = to_bits(type, normal(random));
}

inline std::vector<double> values(DType type, const Matrix& m) {
  std::vector<double> out;
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.columns; ++j) out.push_back(value(type, m.at(i, j)));
  return out;
}

constexpr std::array<std::array<int, 2>, 6> kPairs = {{{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}}};

// Which two of each group of four columns are kept, [rows, groups].
struct Mask {
  int64_t rows, groups;
  std::vector<std::array<int, 2>> pairs;
  const std::array<int, 2>& at(int64_t row, int64_t group) const { return pairs[row * groups + group]; }
};
inline Mask random_mask(int64_t rows, int64_t columns, std::mt19937& random) {
  Mask mask = {rows, (columns + 3) / 4, {}};
  for (int64_t i = 0; i < mask.rows * mask.groups; ++i) mask.pairs.push_back(kPairs[random() % 6]);
  return mask;
}
// The code of a group; (0, 1) outside of the matrix.
inline unsigned code_at(const Mask& mask, int64_t row, int64_t group) {
  if (row >= mask.rows || group >= mask.groups) return 0x4;
  return unsigned(mask.at(row, group)[0] | mask.at(row, group)[1] << 2);
}

// The metadata of layout sm80: words of four groups, [N, M / 16], reordered: rows first, then the two by two blocks of
// words from Z to N, in a column-major matrix of which two columns are interleaved.
inline std::vector<uint16_t> sm80_meta(const Mask& mask, int64_t N, int64_t M) {
  const int64_t columns = M / 16;
  std::vector<uint16_t> meta(size_t(N * columns));
  for (int64_t row = 0; row < N; ++row)
    for (int64_t k = 0; k < columns; ++k) {
      unsigned word = 0;
      for (int g = 0; g < 4; ++g) word |= code_at(mask, row, 4 * k + g) << (4 * g);
      int64_t to_row = row / 32 * 32 + row % 8 * 4 + row % 32 / 8, to_column = k;
      if (to_row % 2 == 0 && to_column % 2 == 1) {
        ++to_row;
        --to_column;
      } else if (to_row % 2 == 1 && to_column % 2 == 0) {
        --to_row;
        ++to_column;
      }
      meta[size_t(to_column / 2 * (N * 2) + to_row * 2 + to_column % 2)] = uint16_t(word);
    }
  return meta;
}

// Layout sm90: bytes in the order of CUTLASS 3.x' TensorEAtom_16bit, shape ((8, 2, 4), (16, 2, K / 32)), order ((3, 1,
// 5), (0, 4, 2)), a bit a column; atoms of 64 rows and K = kSm90TileK columns follow each other along the rows, then
// along the columns.
inline std::vector<uint16_t> sm90_meta(const Mask& mask, int64_t N, int64_t M) {
  constexpr int64_t K = slk::kSm90TileK;
  struct Mode {
    int64_t size, order, stride;
  };
  std::array<Mode, 6> modes = {{{8, 3, 0}, {2, 1, 0}, {4, 5, 0}, {16, 0, 0}, {2, 4, 0}, {K / 32, 2, 0}}};
  for (Mode& mode : modes) {
    mode.stride = 1;
    for (const Mode& faster : modes) mode.stride *= faster.order < mode.order ? faster.size : 1;
  }
  std::vector<uint16_t> meta(size_t(N * M / 16));
  for (int64_t row = 0; row < N; ++row)
    for (int64_t column = 0; column < M; column += 4) {
      int64_t bit = (column / K * (N / 64) + row / 64) * 64 * K;
      int64_t rest[2] = {row % 64, column % K};
      for (size_t i = 0; i < modes.size(); ++i) {
        bit += rest[i / 3] % modes[i].size * modes[i].stride;
        rest[i / 3] /= modes[i].size;
      }
      meta[size_t(bit / 16)] |= uint16_t(code_at(mask, row, column / 4) << (bit % 16));
    }
  return meta;
}

// Layout plain: group 2 b in the low half of byte b, group 2 b + 1 in the high half.
inline std::vector<uint8_t> plain_meta(const Mask& mask) {
  std::vector<uint8_t> meta;
  for (int64_t row = 0; row < mask.rows; ++row)
    for (int64_t group = 0; group < mask.groups; group += 2)
      meta.push_back(uint8_t(code_at(mask, row, group) | code_at(mask, row, group + 1) << 4));
  return meta;
}

}  // namespace semi24_check
