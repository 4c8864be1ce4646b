// dW at the slots of a pack, thread by thread: every layout, ragged sizes, in panels of rows.
#include "slkernels/semi24_gather.h"
#include "semi24_check.h"

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

template <class E>
bool run(int64_t n, int64_t m, Layout24 layout, int64_t panel) {
  std::mt19937_64 random(unsigned(n * 31 + m));
  std::mt19937 patterns(unsigned(n + m));
  const Mask mask = random_mask(n, m, patterns);
  const simt::Buffer<uint8_t> meta(meta_bytes(mask, layout, m));
  std::vector<E> dense(size_t(n * m));
  for (E& x : dense) x = E(random() | 1);
  const simt::Buffer<E> w(dense);
  slk::Packed24 pack = {nullptr, meta.get(), layout, n, m};
  const int64_t rows = pack.rows(), slots = pack.row_values();
  const simt::Buffer<E> values(size_t(rows * slots));
  pack.values = values.get();

  int64_t errors = 0;
  for (int64_t row = 0; row < rows; row += panel)
    errors += slk::cuda::launch_gather24(sizeof(E), w.get() + std::min(row, n - 1) * m, pack,
                                         {row, std::min(rows, row + panel)}, nullptr) != cudaSuccess;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t slot = 0; slot < slots; ++slot) {
      const unsigned code = code_at(mask, row, slot / 2);
      const int64_t column = slot / 2 * 4 + (slot % 2 ? code >> 2 : code & 3);
      errors += values[row * slots + slot] != (row < n && column < m ? dense[size_t(row * m + column)] : E(0));
    }
  if (errors) std::printf("FAIL n=%ld m=%ld layout %d: %ld errors\n", long(n), long(m), int(layout), long(errors));
  return errors == 0;
}

}  // namespace

int main() {
  bool ok = run<uint16_t>(5, 8, Layout24::plain, 5);
  ok &= run<uint32_t>(1, 1, Layout24::plain, 1);
  ok &= run<uint32_t>(7, 9, Layout24::plain, 3);     // an odd number of groups: half of the last byte
  ok &= run<uint16_t>(3, 1034, Layout24::plain, 2);  // more bytes a row than threads
  ok &= run<uint16_t>(33, 70, Layout24::sm80, 16);
  ok &= run<uint16_t>(70, 130, Layout24::sm90, 64);
  std::printf(ok ? "semi24_gather: ok\n" : "semi24_gather: failed\n");
  return ok ? 0 : 1;
}
