// Block-sparse attention at the torch boundary: what its ops share on the CPU.
#pragma once

#include <algorithm>
#include <atomic>

#include "torch/attention.h"

namespace slk {

// Raises at the first entry of `list` that is outside: idx * unit in [0, end), bit_id below bit_tiles. O(entries).
// `prefix` is "row" or "t", as the tensors' names.
void check_list_inside(const char* op, const char* prefix, const BlockList& list, int64_t lists, int64_t unit,
                       int64_t end, int64_t bit_tiles);
// The same for a layout's rows and its columns.
void check_rows_inside(const char* op, const AttentionShape& shape, const BlockRows& mask);

// Calls body(i, scratch) for i in [0, items): a thread that is done takes the next, since the work of items differs.
template <class Body>
void for_each_item(int64_t items, int64_t scratch_floats, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(items, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    float* scratch = thread_scratch(scratch_floats);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i, scratch);
  });
}

inline const cpu::AttentionKernels& attention_kernels_for(DType dtype) {
  return dtype == DType::f64 ? cpu::attention_kernels_f64() : cpu::attention_kernels();
}

}  // namespace slk
