// ldmatrix, stmatrix, mma and mma.sp. Contracts: simt/ptx_*.h; layouts: slkernels/ptx/ldmatrix.h, mma.h, mma_sp.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "internal.h"
#include "simt/ptx_ldmatrix.h"
#include "simt/ptx_mma.h"
#include "simt/ptx_mma_sp.h"

namespace simt {
namespace {

constexpr uint32_t kWholeWarp = 0xffffffffu;

struct MatrixArgument {
  uint16_t* row;  // that this lane gives the address of
  uint32_t* registers;
  int matrices;
  bool transposed;
};

// Calls element(memory, registers as 16-bit halves) for every element of the matrices.
template <class F>
void for_elements(void* const* lanes, const F& element) {
  const auto argument = [&](int lane) { return static_cast<const MatrixArgument*>(lanes[lane]); };
  const int matrices = argument(0)->matrices;
  const bool transposed = argument(0)->transposed;
  for (int i = 0; i < matrices; ++i)
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) {
        const int r = transposed ? column : row, c = transposed ? row : column;
        auto* halves = reinterpret_cast<uint16_t*>(&argument(r * 4 + c / 2)->registers[i]);
        element(argument(8 * i + row)->row[column], halves[c % 2]);
      }
}
void check_whole(const char* what, uint32_t present) {
  if (present != kWholeWarp) fault(std::string(what) + " by a warp of fewer than 32 threads");
}
void load(void* const* lanes, uint32_t present) {
  check_whole("ldmatrix", present);
  for_elements(lanes, [](uint16_t& memory, uint16_t& half) { half = memory; });
}
void store(void* const* lanes, uint32_t present) {
  check_whole("stmatrix", present);
  for_elements(lanes, [](uint16_t& memory, uint16_t& half) { memory = half; });
}

void check_row(const char* what, const void* row, int matrices, bool write, void* pc) {
  if (current().lane >= 8 * matrices) return;
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fault(std::string(what) + ": the row's address is not 16-byte aligned", pc);
  access(row, 16, write, pc);
  if (!is_shared(row, 16)) fault(std::string(what) + ": the row is not in shared memory", pc);
}

struct MmaArgument {
  float* d;
  const uint32_t *a, *b;
  uint32_t meta = 0;  // mma.sp's
};

float half_to_float(MmaType type, uint32_t bits) {
  if (type == MmaType::bf16) return __uint_as_float(bits << 16);
  __half_raw raw;
  raw.x = uint16_t(bits);
  return __half2float(__half(raw));
}

template <MmaType type>
void run_mma(void* const* lanes, uint32_t present) {
  check_whole("mma.sync", present);
  constexpr bool wide = type == MmaType::tf32;
  constexpr int K = wide ? 8 : 16, per = wide ? 1 : 2;  // depth; elements a register
  constexpr int half = K / 2;
  float a[16][K], b[K][8], d[16][8];
  const auto element = [](uint32_t reg, int e) {
    return wide ? __uint_as_float(reg & 0xffffe000u) : half_to_float(type, reg >> (16 * e) & 0xffffu);
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& m = *static_cast<const MmaArgument*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < per; ++e) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t * per + e + i / 2 * half] = element(m.a[i], e);
      for (int i = 0; i < 2; ++i) b[t * per + e + i * half][g] = element(m.b[i], e);
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = m.d[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<MmaArgument*>(lanes[lane])->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

// The element that `kept` of a row of a is, one of two of each group of four columns.
int dense_column(void* const* lanes, int selector, int row, int kept) {
  const int group = kept / 2, lane = row % 8 * 4 + 2 * selector + group / 4;
  const uint32_t word = static_cast<const MmaArgument*>(lanes[lane])->meta;
  const uint32_t code = word >> (row / 8 * 16 + group % 4 * 4) & 0xf;
  if ((code & 3) >= code >> 2)
    fault("mma.sp: the metadata of row " + std::to_string(row) + ", columns " + std::to_string(4 * group) + " to " +
          std::to_string(4 * group + 3) + " (lane " + std::to_string(lane) + ") are " + std::to_string(code) +
          ", no ordered code");
  return 4 * group + int(kept % 2 ? code >> 2 : code & 3);
}

template <MmaType type, int selector>
void run_mma_sp(void* const* lanes, uint32_t present) {
  check_whole("mma.sp.sync", present);
  const auto argument = [&](int lane) -> const MmaArgument& { return *static_cast<MmaArgument*>(lanes[lane]); };
  const auto half = [](uint32_t reg, int e) { return half_to_float(type, reg >> (16 * e) & 0xffffu); };
  for (int row = 0; row < 16; ++row)
    for (int kept = 0; kept < 16; ++kept) {
      const float a = half(argument(row % 8 * 4 + kept % 8 / 2).a[row / 8 + kept / 8 * 2], kept % 2);
      const int k = dense_column(lanes, selector, row, kept);
      for (int column = 0; column < 8; ++column) {
        const float b = half(argument(column * 4 + k % 8 / 2).b[k / 8], k % 2);
        argument(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2] += a * b;
      }
    }
}

}  // namespace

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, void* pc) {
  check_row("ldmatrix", row, matrices, false, pc);
  MatrixArgument argument = {static_cast<uint16_t*>(const_cast<void*>(row)), registers, matrices, transposed};
  warp_collective("ldmatrix", kWholeWarp, &argument, load, false, pc);
}

void stmatrix(void* row, const uint32_t* registers, int matrices, void* pc) {
  check_row("stmatrix", row, matrices, true, pc);
  MatrixArgument argument = {static_cast<uint16_t*>(row), const_cast<uint32_t*>(registers), matrices, false};
  warp_collective("stmatrix", kWholeWarp, &argument, store, false, pc);
}

void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, void* pc) {
  MmaArgument argument = {d, a, b};
  warp_collective("mma.sync", kWholeWarp, &argument,
                  type == MmaType::bf16  ? run_mma<MmaType::bf16>
                  : type == MmaType::f16 ? run_mma<MmaType::f16>
                                         : run_mma<MmaType::tf32>,
                  false, pc);
}

void mma_sp(MmaType type, int selector, float* d, const uint32_t* a, const uint32_t* b, uint32_t meta, void* pc) {
  MmaArgument argument = {d, a, b, meta};
  warp_collective(selector ? "mma.sp.sync with selector 1" : "mma.sp.sync with selector 0", kWholeWarp, &argument,
                  type == MmaType::bf16 ? selector ? run_mma_sp<MmaType::bf16, 1> : run_mma_sp<MmaType::bf16, 0>
                  : selector            ? run_mma_sp<MmaType::f16, 1>
                                        : run_mma_sp<MmaType::f16, 0>,
                  false, pc);
}

}  // namespace simt
