// Prints where CUTLASS' sparse GEMM for sm_90a reads the operands of W [n, m] from, by its own layout types:
// `semi24_layout_sm90 n m`, n a multiple of 64, m of kSm90TileK. One line a group of four columns, row by row:
//
//     offset of the first kept value in `values`, byte of `meta`, shift of the group's four bits in it
#include <cstdio>
#include <cstdlib>

#include "cute/arch/mma_sm90_gmma_sparse.hpp"
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/numeric_types.h"
#include "slkernels/semi24.h"

// What the CollectiveBuilder makes of csrc/cutlass/semi24_linear_sm90.cuh: A K-major, 2 of 4, and metadata of 8 columns
// a byte, in atoms as deep as the tile.
using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, cutlass::bfloat16_t>, cute::GMMA::Major::K,
                                             cute::sparse_elem<8, uint8_t>, cute::Int<slk::kSm90TileK>>;

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int n = std::atoi(argv[1]), m = std::atoi(argv[2]);
  const auto problem = cute::make_shape(n, 8, m, 1);
  const auto a = Config::fill_layoutA(problem);
  const auto e = Config::fill_layoutE(problem);
  for (int row = 0; row < n; ++row)
    for (int column = 0; column < m; column += 4) {
      // Offsets count columns of the dense matrix: two of them a stored value, eight a byte of metadata of two bits
      // each of a kept one.
      const long value = long(a(row, column, 0)), meta = long(e(row, column, 0));
      std::printf("%ld %ld %ld\n", value / 2, meta / 8, meta % 8);
    }
}
