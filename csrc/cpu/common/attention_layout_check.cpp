// The first fault of a BlockRows layout, in words. Contract: slkernels/attention_layout.h.
#include <algorithm>
#include <sstream>
#include <vector>

#include "slkernels/attention_layout.h"

namespace slk::cpu {
namespace {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Pointer, counts and every entry of row r, and that no key is listed twice. Fills `starts` with the tiles' first keys.
std::string row_fault(const BlockRows& in, int64_t Sk, int64_t r, std::vector<int64_t>& starts) {
  const BlockList& rows = in.rows;
  const int64_t ptr = rows.ptr[r], cnt = rows.cnt[r], nmask = rows.nmask[r], N = in.block_n;
  const int64_t limit = ceil_div(Sk, in.unit);
  if (cnt < 0) return text("row_cnt is ", cnt);
  if (nmask < 0 || nmask > cnt) return text("row_nmask is ", nmask, ", outside [0, row_cnt = ", cnt, "]");
  if (cnt > 0 && (ptr < 0 || ptr + cnt > rows.capacity))
    return text("row_ptr ", ptr, " + row_cnt ", cnt, " is outside the ", rows.capacity, " entries of idx");
  starts.clear();
  for (int64_t n = 0; n < cnt; ++n) {
    const int64_t e = ptr + n, at = rows.idx[e];
    if (at < 0 || at >= limit) return text("entry ", n, ": idx[", e, "] = ", at, " is out of range [0, ", limit, ")");
    if (rows.bit_id && n < nmask && (rows.bit_id[e] < -1 || rows.bit_id[e] >= in.bit_tiles))
      return text("entry ", n, ": bit_id[", e, "] = ", rows.bit_id[e], " is out of range [-1, ", in.bit_tiles, ")");
    starts.push_back(at * in.unit);
  }
  std::sort(starts.begin(), starts.end());
  for (size_t n = 1; n < starts.size(); ++n) {
    if (starts[n] == starts[n - 1]) return text("the tile at key ", starts[n], " is listed twice");
    if (starts[n] < starts[n - 1] + N) return text("the tiles at keys ", starts[n - 1], " and ", starts[n], " overlap");
  }
  return {};
}

std::string column_fault(const BlockRows& in, int64_t Sk, int64_t r, const std::vector<int64_t>& starts) {
  const int64_t begin = in.col_ptr[r], end = in.col_ptr[r + 1];
  if (begin < 0 || end < begin || end > in.columns)
    return text("col_ptr ", begin, " to ", end, " decreases or leaves the ", in.columns, " entries of col_idx");
  std::vector<int32_t> columns(in.col_idx + begin, in.col_idx + end);
  std::sort(columns.begin(), columns.end());
  for (size_t n = 0; n < columns.size(); ++n) {
    const int64_t j = columns[n];
    if (j < 0 || j >= Sk) return text("column ", j, " is out of range [0, ", Sk, ")");
    if (n > 0 && columns[n - 1] == j) return text("column ", j, " is listed twice");
    const auto after = std::upper_bound(starts.begin(), starts.end(), j);
    if (after != starts.begin() && j < after[-1] + in.block_n)
      return text("column ", j, " lies in the tile at key ", after[-1]);
  }
  return {};
}

}  // namespace

std::string layout_fault(const BlockRows& in, int64_t Sk) {
  const BlockList& rows = in.rows;
  const int64_t q_blocks = rows.blocks, heads = in.heads;
  std::vector<int64_t> starts;
  std::vector<int64_t> by_slot;
  for (int64_t r = 0; r < in.batches * heads * q_blocks; ++r) {
    std::string fault = row_fault(in, Sk, r, starts);
    if (fault.empty() && in.col_ptr) fault = column_fault(in, Sk, r, starts);
    if (!fault.empty())
      return text("row ", r, " (batch ", r / q_blocks / heads, ", head ", r / q_blocks % heads, ", block ",
                  r % q_blocks, "): ", fault);
    if (rows.cnt[r] > 0) by_slot.push_back(r);
  }
  std::sort(by_slot.begin(), by_slot.end(), [&](int64_t a, int64_t b) { return rows.ptr[a] < rows.ptr[b]; });
  for (size_t n = 1; n < by_slot.size(); ++n) {
    const int64_t a = by_slot[n - 1], b = by_slot[n];
    if (rows.ptr[a] + rows.cnt[a] > rows.ptr[b])
      return text("rows ", std::min(a, b), " and ", std::max(a, b), " share entries of idx");
  }
  return {};
}

}  // namespace slk::cpu
