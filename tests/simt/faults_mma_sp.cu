// Planted faults around mma.sp: what the harness must report of fragments and metadata. See faults.h.
#include "faults.h"

#include <cuda_bf16.h>

#include <vector>

#include "slkernels/ptx/ldmatrix.h"
#include "slkernels/ptx/mma_sp.h"

using namespace slk;

namespace {

enum class Wrong { nothing, selector, lane, half, order, b_registers };

constexpr int kRows = 16, kColumns = 8, kDepth = 32, kGroups = kDepth / 4;
constexpr uint32_t kCodes[6] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};

constexpr int code_index(int row, int group) {
  return (row + 1) * (group + 1) % 13 % 6;
}

// C[16, 8] = A[16, 32] B[8, 32]^T by one warp; a [16, 16] is what A keeps, groups [16, 8] the codes. The metadata of
// the selector that is not used are codes too, so that only their use can be wrong.
template <Wrong wrong>
__global__ void small_product(bool planted, const float* in, const uint32_t* codes, float* out) {
  __shared__ __align__(16) __nv_bfloat16 a[kRows][kDepth / 2], b[kColumns][kDepth];
  const int lane = threadIdx.x;
  for (int i = lane; i < kRows * kDepth / 2; i += 32) a[i / 16][i % 16] = __nv_bfloat16(in[i % 97]);
  for (int i = lane; i < kColumns * kDepth; i += 32) b[i / 32][i % 32] = __nv_bfloat16(in[i % 13]);
  __syncwarp();
  uint32_t fa[4], fb[4];
  ptx::ldmatrix_x4(fa, &a[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix_x4(fb, &b[lane % 8][lane / 8 * 8]);

  const auto is = [&](Wrong w) { return planted && wrong == w; };
  const bool other_half = is(Wrong::half);
  uint32_t meta = 0x44444444u;
  if (lane % 4 / 2 == 0) {
    meta = 0;
    for (int row_half = 0; row_half < 2; ++row_half)
      for (int group = 0; group < 4; ++group) {
        const int row = lane / 4 + (row_half ^ other_half) * 8, first = (lane % 2 ^ is(Wrong::lane)) * 4;
        uint32_t code = codes[row * kGroups + first + group];
        if (is(Wrong::order) && row == 11 && first + group == 6) code = code >> 2 | (code & 3) << 2;
        meta |= code << (row_half * 16 + group * 4);
      }
  }
  if (is(Wrong::b_registers)) {
    const uint32_t second = fb[1];
    fb[1] = fb[2];
    fb[2] = second;
  }
  float d[4] = {};
  if (is(Wrong::selector))
    ptx::mma_sp_m16n8k32_bf16<1>(d, fa, fb, meta);
  else
    ptx::mma_sp_m16n8k32_bf16<0>(d, fa, fb, meta);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * kColumns + 2 * (lane % 4) + i % 2] = d[i];
}

template <Wrong wrong>
bool product_is_right(bool planted) {
  std::vector<float> numbers(97);
  std::vector<uint32_t> codes(kRows * kGroups);
  for (int i = 0; i < 97; ++i) numbers[i] = float(i);
  for (int i = 0; i < kRows * kGroups; ++i) codes[i] = kCodes[code_index(i / kGroups, i % kGroups)];
  simt::Buffer<float> in(numbers), out(kRows * kColumns);
  simt::Buffer<uint32_t> meta(codes);
  cuda::launch(small_product<wrong>, dim3(1), dim3(32), 0, nullptr, planted, in.get(), meta.get(), out.get());
  constexpr int positions[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0;  // whole numbers below 2^24: exact in any order
      for (int kept = 0; kept < kDepth / 2; ++kept) {
        const int k = kept / 2 * 4 + positions[code_index(row, kept / 2)][kept % 2];
        sum += numbers[(row * 16 + kept) % 97] * numbers[(column * kDepth + k) % 13];
      }
      if (out[row * kColumns + column] != sum) return false;
    }
  return true;
}

// Half a warp at one selector, half at the other.
__global__ void different_selectors(bool planted, const uint32_t* in, float* out) {
  const uint32_t a[4] = {}, b[4] = {};
  float d[4] = {};
  if (planted && threadIdx.x >= 16)
    ptx::mma_sp_m16n8k32_f16<1>(d, a, b, in[threadIdx.x]);
  else
    ptx::mma_sp_m16n8k32_f16<0>(d, a, b, in[threadIdx.x]);
  out[threadIdx.x] = d[0];
}
bool run_different_selectors(bool planted) {
  simt::Buffer<uint32_t> in(std::vector<uint32_t>(32, 0x44444444u));
  simt::Buffer<float> out(32);
  cuda::launch(different_selectors, dim3(1), dim3(32), 0, nullptr, planted, in.get(), out.get());
  return out[31] == 0;
}

const faults::Fault table[] = {
    {"selector", "differs from the reference", product_is_right<Wrong::selector>},
    {"metadata_lane", "differs from the reference", product_is_right<Wrong::lane>},
    {"metadata_half", "differs from the reference", product_is_right<Wrong::half>},
    {"sparse_b_registers", "differs from the reference", product_is_right<Wrong::b_registers>},
    {"unordered_metadata", "the metadata of row 11, columns 24 to 27", product_is_right<Wrong::order>},
    {"different_selectors", "divergence: lane", run_different_selectors},
};

}  // namespace

int main(int argc, char** argv) {
  return faults::main(argc, argv, table);
}
