// dW at the slots of a pack, thread by thread: every layout, ragged sizes, in panels of rows.
#include "semi24_check.h"
#include "slkernels/semi24_gemm.h"

using namespace semi24_check;
using slk::Layout24;

namespace {

// Metadata as bytes. sm90: from CuTe's TensorEAtom_16bit of a tile 128 deep, Shape <<8,2,4>,<16,2,4>> and Step
// <<3,1,5>,<0,4,2>> over columns, a byte for eight of them; atoms of 64 x 128 down the rows first.
std::vector<uint8_t> meta_bytes(const Mask& mask, Layout24 layout, int64_t m) {
  const int64_t N = slk::padded_rows24(layout, mask.rows), M = slk::padded_columns24(layout, m);
  if (layout == Layout24::sm80) {
    const std::vector<uint16_t> words = sm80_meta(mask, N, M);
    std::vector<uint8_t> bytes;
    for (const uint16_t word : words) bytes.insert(bytes.end(), {uint8_t(word & 255), uint8_t(word >> 8)});
    return bytes;
  }
  const int64_t chunks = (M + 7) / 8;
  std::vector<uint8_t> bytes(size_t(N * chunks));
  for (int64_t row = 0; row < N; ++row)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t column = 8 * chunk;
      int64_t at = row * chunks + chunk;
      if (layout == Layout24::sm90) {
        const int64_t inside = column % 16 + 16 * (row / 8 % 2) + 32 * (column / 32 % 4) + 128 * (row % 8) +
                               1024 * (column / 16 % 2) + 2048 * (row / 16 % 4);
        at = (row / 64 + column / 128 * (N / 64)) * 1024 + inside / 8;
      }
      bytes[size_t(at)] = uint8_t(code_at(mask, row, 2 * chunk) | code_at(mask, row, 2 * chunk + 1) << 4);
    }
  return bytes;
}

bool run(int64_t n, int64_t m, Layout24 layout, int64_t panel, slk::DType type) {
  std::mt19937 random(unsigned(n * 31 + m));
  const Mask mask = random_mask(n, m, random);
  const simt::Buffer<uint8_t> meta(meta_bytes(mask, layout, m));
  const int64_t N = slk::padded_rows24(layout, n), half = slk::padded_columns24(layout, m) / 2;
  const bool wide = type == slk::DType::f32;
  std::vector<uint32_t> w(size_t(n * m));
  for (uint32_t& x : w) x = (unsigned(random()) | 1) & (wide ? ~0u : 0xffffu);
  std::vector<uint16_t> narrow(w.begin(), w.end());
  const simt::Buffer<uint32_t> w32(w), to32(wide ? size_t(N * half) : 0);
  const simt::Buffer<uint16_t> w16(narrow), to16(wide ? 0 : size_t(N * half));

  int64_t errors = 0;
  for (int64_t row = 0; row < N; row += panel) {
    const int64_t at = std::min(row, n - 1) * m;
    const void* from = wide ? static_cast<const void*>(w32.get() + at) : w16.get() + at;
    void* to = wide ? static_cast<void*>(to32.get()) : to16.get();
    const slk::Range rows = {row, std::min(N, row + panel)};
    errors += slk::cuda::launch_gather24(type, from, meta.get(), n, m, layout, rows, to, nullptr) != cudaSuccess;
  }
  for (int64_t row = 0; row < N; ++row)
    for (int64_t slot = 0; slot < half; ++slot) {
      const unsigned code = code_at(mask, row, slot / 2);
      const int64_t column = slot / 2 * 4 + (slot % 2 ? code >> 2 : code & 3);
      const uint32_t expected = row < n && column < m ? w[size_t(row * m + column)] : 0;
      errors += (wide ? to32[row * half + slot] : to16[row * half + slot]) != expected;
    }
  if (errors) std::printf("FAIL n=%ld m=%ld layout %d: %ld errors\n", long(n), long(m), int(layout), long(errors));
  return errors == 0;
}

}  // namespace

int main() {
  using slk::DType;
  bool ok = run(5, 8, Layout24::plain, 5, DType::bf16);
  ok &= run(1, 1, Layout24::plain, 1, DType::f32);
  ok &= run(7, 9, Layout24::plain, 3, DType::f32);     // an odd number of groups: half of the last byte
  ok &= run(3, 1034, Layout24::plain, 2, DType::f16);  // more bytes a row than threads
  ok &= run(33, 70, Layout24::sm80, 16, DType::bf16);
  ok &= run(70, 130, Layout24::sm90, 64, DType::f16);
  std::printf(ok ? "semi24_gather: ok\n" : "semi24_gather: failed\n");
  return ok ? 0 : 1;
}
