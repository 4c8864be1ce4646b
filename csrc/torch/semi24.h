// Packed 2:4 weights at the torch boundary.
#pragma once

#include "slkernels/semi24_pack.h"
#include "torch/tensor.h"

namespace slk {

Layout24 layout24_of(const char* op, const char* argument, const std::string& name);

// Raises unless (values, meta) are an [n, m] weight in `layout`: dtypes, shapes, device. Returns them contiguous.
struct PackedTensors24 {
  Tensor values, meta;
};
PackedTensors24 check_packed24(const char* op, const Tensor& values, const Tensor& meta, int64_t n, int64_t m,
                               Layout24 layout);
// The same for meta alone.
Tensor check_meta24(const char* op, const char* name, const Tensor& meta, int64_t n, int64_t m, Layout24 layout);

// A new [n, m] weight of `like`'s dtype and device. On a CPU its padding is written: values 0, codes 0x4.
PackedTensors24 new_packed24(const Tensor& like, int64_t n, int64_t m, Layout24 layout);

// What kernels take. values may be an undefined tensor where only meta is used.
Packed24 view24(const PackedTensors24& t, int64_t n, int64_t m, Layout24 layout);

#ifdef SLKERNELS_WITH_CUDA
// The halves of the ops that run on a GPU. Arguments are checked, contiguous, and on one device, which is current; none
// is empty. Padding is theirs to write: new_packed24 does that on a CPU only.
namespace cuda {
void prune24(const Tensor& score, Prune24 by, const Tensor& mask);
void prune_compress24(const Tensor& W, const Tensor& score, Prune24 by, const Packed24& pack, const Packed24& pack_t);
void relu2_prune24(const Tensor& x, const Packed24& pack, const Packed24& pack_t);
void compress24(const Tensor& W, const Tensor& mask, const Packed24& pack);
int64_t check_mask24(const Tensor& mask);  // the first group (row * groups24(m) + group) that is not 2:4, or -1; waits
void decompress24(const Packed24& pack, const Tensor& W);
void mask_of24(const Packed24& pack, const Tensor& mask);
int64_t check24(const Packed24& pack, const Tensor& meta);  // the first group whose code is none of the six; waits
void convert24(const Tensor& values, const Packed24& from, const Packed24& to);
void repack24_perm(const Packed24& pack, const Packed24& pack_t, const Tensor& perm);
void repack24_t(const Tensor& values, const Tensor& perm, const Tensor& values_t);
}  // namespace cuda
#endif

}  // namespace slk
