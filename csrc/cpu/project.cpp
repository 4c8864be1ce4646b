// Weight updates, sums of squares and seeded normals of family `project`. Contract: slkernels/project.h.
//
// An update is bound by memory: a chunk of a row is kept as fp32 in L1 while its terms are added one after another, so
// that every operand is read once and each stage has one element type.
#include "cpu/project_vectors.h"

namespace slk::cpu::SLK_ISA {
namespace {

constexpr int64_t kChunk = 1024;   // columns: 4 KB of fp32, a small part of L1
constexpr int64_t kStrip = 512;    // columns that column sums advance together: whole pages of a row of G
constexpr int64_t kSumRows = 256;  // rows that are summed before their sum is added to the total
constexpr int kRowsAtOnce = 4;     // rows for one load and store of a strip's sums

void update(DType type, void* w, int64_t m, const UpdateOperands& operands, const UpdateScalars& scalars,
            const StochasticRounding& rounding, Range rows) {
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    alignas(64) float acc[kChunk];
    alignas(64) uint16_t room[random_room(kChunk)];
    const V decay = broadcast(scalars.decay);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t column = 0; column < m; column += kChunk) {
        const int64_t n = m - column < kChunk ? m - column : kChunk, first = row * m + column;
        T* p = static_cast<T*>(w) + first;
        each_vector(n, [&](int64_t i, auto count) { store(acc + i, decay * read(p + i, count)); });
        add_terms(operands, scalars.step, row, column, n, acc);
        store_rounded(acc, n, rounding.on ? random_halves(rounding, first, n, room) : nullptr, p);
      }
  });
}

void row_squares(DType type, const void* x, int64_t ld, int64_t columns, Range rows, float* sums) {
  constexpr int kChains = 4;
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T* p = static_cast<const T*>(x) + row * ld;
      V acc[kChains] = {};
      int64_t i = 0;
      for (; i + kChains * kLanes <= columns; i += kChains * kLanes)
        for (int k = 0; k < kChains; ++k) {
          const V v = load(p + i + k * kLanes);
          acc[k] = fma(v, v, acc[k]);
        }
      each_vector(columns - i, [&](int64_t j, auto count) {
        const V v = read(p + i + j, count);
        acc[0] = fma(v, v, acc[0]);
      });
      sums[row] = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
  });
}

// Sums over rows for kStrip columns: total[j][c] += partial[j][c] every kSumRows rows; add(row, rows) adds some rows.
template <class F>
SLK_INLINE void strip_sums(int64_t few, int64_t rows, int64_t width, float* partial, float* total, int64_t ld, F add) {
  for (int64_t first = 0; first < rows; first += kSumRows) {
    const int64_t end = first + kSumRows < rows ? first + kSumRows : rows;
    std::memset(partial, 0, few * kStrip * sizeof(float));
    int64_t i = first;
    for (; i + kRowsAtOnce <= end; i += kRowsAtOnce) add(i, std::integral_constant<int, kRowsAtOnce>());
    for (; i < end; ++i) add(i, std::integral_constant<int, 1>());
    for (int64_t j = 0; j < few; ++j)
      each_vector(width, [&](int64_t c, auto count) {
        const V sums = load(partial + j * kStrip + c);
        write(total + j * ld + c, first ? read(total + j * ld + c, count) + sums : sums, count);
      });
  }
}

void column_squares(DType type, const void* x, int64_t ld, int64_t rows, Range columns, float* sums) {
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    alignas(64) float partial[kStrip];
    for (int64_t first = columns.begin; first < columns.end; first += kStrip) {
      const int64_t width = columns.end - first < kStrip ? columns.end - first : kStrip;
      const T* p = static_cast<const T*>(x) + first;
      strip_sums(1, rows, width, partial, sums + first, 0, [&](int64_t row, auto many) {
        each_vector(width, [&](int64_t c, auto count) {
          V acc = load(partial + c);
          for (int k = 0; k < many; ++k) {
            const V v = read(p + (row + k) * ld + c, count);
            acc = fma(v, v, acc);
          }
          store(partial + c, acc);
        });
      });
    }
  });
}

void few_rows(DType type, const float* z, int64_t few, const void* x, int64_t ld, int64_t rows, Range columns,
              float* out, int64_t ld_out) {
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    alignas(64) float partial[kFewRows * kStrip];
    for (int64_t first = columns.begin; first < columns.end; first += kStrip) {
      const int64_t width = columns.end - first < kStrip ? columns.end - first : kStrip;
      const T* p = static_cast<const T*>(x) + first;
      strip_sums(few, rows, width, partial, out + first, ld_out, [&](int64_t row, auto many) {
        constexpr int kMany = decltype(many)::value;
        each_vector(width, [&](int64_t c, auto count) {
          V v[kMany];
          for (int k = 0; k < kMany; ++k) v[k] = read(p + (row + k) * ld + c, count);
          for (int64_t j = 0; j < few; ++j) {
            V acc = load(partial + j * kStrip + c);
            for (int k = 0; k < kMany; ++k) acc = fma(broadcast(z[j * rows + row + k]), v[k], acc);
            store(partial + j * kStrip + c, acc);
          }
        });
      });
    }
  });
}

void normals(DType type, uint64_t seed, float scale, Range rows, Range columns, void* out) {
  const int64_t size = columns.size();
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      T* p = static_cast<T*>(out) + (j - rows.begin) * size;
      for (int64_t block = 0; block < size; block += kNormalBlock)
        for (int lane = 0; lane < kNormalRun; lane += kLanes) {
          V z[4];
          const VU counter = VectorWords::word(uint32_t((columns.begin + block) / 4 + lane)) + lane_numbers();
          normals_of<VectorWords>(counter, uint32_t(j), seed, scale, z);
          for (int e = 0; e < 4; ++e) {
            const int64_t i = block + e * kNormalRun + lane;
            if (i + kLanes <= size)
              store(p + i, z[e]);
            else if (i < size)
              store_n(p + i, z[e], int(size - i));
          }
        }
    }
  });
}

}  // namespace

extern const ProjectKernels project_table;
const ProjectKernels project_table = {update, row_squares, column_squares, normals, few_rows};

}  // namespace slk::cpu::SLK_ISA
