// Work on packed 2:4 weights that has no SIMD in it. Contracts: slkernels/semi24_pack.h.
#include <cstring>
#include <type_traits>

#include "slkernels/semi24.cuh"
#include "slkernels/semi24_pack.h"

namespace slk::cpu {
namespace {

// ---- elements by size -----------------------------------------------------------------------------------------------

template <class F>
void with_bits(int bytes, F f) {
  switch (bytes) {
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
  }
}

struct Element {
  int bytes;
  uint64_t nan;
};
Element element_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return {4, 0x7fc00000};
    case DType::bf16:
      return {2, 0x7fc0};
    case DType::f16:
      return {2, 0x7e00};
    case DType::f64:
      return {8, 0x7ff8000000000000};
  }
  return {};
}

// ---- metadata in words of four groups -------------------------------------------------------------------------------

constexpr uint32_t kPaddingWord = 0x4444;  // four codes 0x4

// The word `word` of row `row`; groups beyond the last read as padding.
uint32_t read_word(const Packed24& p, int64_t row, int64_t word) {
  uint32_t w;
  if (p.layout == Layout24::plain) {
    const int64_t bytes = ceil_div(p.m, 8);
    const uint8_t* at = static_cast<const uint8_t*>(p.meta) + row * bytes + 2 * word;
    w = at[0] | (2 * word + 1 < bytes ? at[1] : 0) << 8;
  } else {
    w = static_cast<const uint16_t*>(p.meta)[packed_word24(p.layout, row, word, p.rows())];
  }
  const int64_t groups = groups24(p.m) - 4 * word;
  const uint32_t used = groups >= 4 ? 0xffff : (1u << 4 * groups) - 1;
  return (w & used) | (kPaddingWord & ~used);
}

void write_word(const Packed24& p, int64_t row, int64_t word, uint32_t w) {
  if (p.layout == Layout24::plain) {
    const int64_t bytes = ceil_div(p.m, 8);
    uint8_t* at = static_cast<uint8_t*>(p.meta) + row * bytes + 2 * word;
    at[0] = uint8_t(w);
    if (2 * word + 1 < bytes) at[1] = uint8_t(w >> 8);
  } else {
    static_cast<uint16_t*>(p.meta)[packed_word24(p.layout, row, word, p.rows())] = uint16_t(w);
  }
}

// f(group, code) for the groups of a row, ascending.
template <class F>
void each_code(const Packed24& p, int64_t row, F f) {
  const int64_t groups = groups24(p.m);
  for (int64_t word = 0; word < ceil_div(groups, 4); ++word) {
    const uint32_t w = read_word(p, row, word);
    for (int64_t g = 4 * word; g < groups && g < 4 * word + 4; ++g) f(g, int(w >> 4 * (g - 4 * word) & 15));
  }
}

int64_t width_of(const Packed24& p, int64_t group) {
  return p.m - 4 * group < 4 ? p.m - 4 * group : 4;
}

// The columns of a group to a row of m.
template <class T>
void copy_columns(T* row, const T* group, int64_t m, int64_t g) {
  if (4 * g + 4 <= m)
    std::memcpy(row + 4 * g, group, 4 * sizeof(T));
  else
    std::memcpy(row + 4 * g, group, (m - 4 * g) * sizeof(T));
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// Four bools to the bits of a nibble; the bytes of the bits set.
int to_nibble(const uint8_t* bools) {
  uint32_t x;
  std::memcpy(&x, bools, 4);
  return int(x * 0x01020408u >> 24 & 15);
}
uint32_t to_bools(int nibble) {
  return uint32_t(nibble) * 0x00204081u & 0x01010101u;
}

bool is_24(int kept, int64_t width) {
  const int count = __builtin_popcount(kept);
  return count <= 2 && count >= width - 2;
}

// Packs a row. Returns the first group that is not 2:4, or -1.
template <class T>
int64_t compress_row(const T* w, const uint8_t* mask, const Packed24& p, int64_t row, T nan) {
  T* out = static_cast<T*>(p.values) + row * p.row_values();
  const int64_t groups = groups24(p.m);
  int64_t fault = -1;
  for (int64_t word = 0; word < ceil_div(groups, 4); ++word) {
    uint32_t codes = kPaddingWord;
    for (int64_t g = 4 * word; g < groups && g < 4 * word + 4; ++g) {
      const int64_t width = width_of(p, g);
      T edge[4] = {};
      uint8_t edge_mask[4] = {};
      const T* in = w + 4 * g;
      const uint8_t* bools = mask + 4 * g;
      if (width < 4) {
        std::memcpy(edge, in, width * sizeof(T));
        std::memcpy(edge_mask, bools, width);
        in = edge;
        bools = edge_mask;
      }
      const int kept = to_nibble(bools);
      const bool ok = is_24(kept, width);
      if (!ok && fault < 0) fault = g;
      const int code = ok ? code24(fill24(kept, int(width))) : 0x4;
      out[2 * g] = ok ? in[code & 3] : nan;
      out[2 * g + 1] = ok ? in[code >> 2] : nan;
      const int shift = 4 * int(g - 4 * word);
      codes = (codes & ~(15u << shift)) | uint32_t(code) << shift;
    }
    write_word(p, row, word, codes);
  }
  return fault;
}

}  // namespace

int64_t compress24(DType dtype, const void* w, const uint8_t* mask, const Packed24& p, Range rows) {
  const Element element = element_of(dtype);
  int64_t fault = -1;
  with_bits(element.bytes, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t g =
          compress_row(static_cast<const T*>(w) + i * p.m, mask + i * p.m, p, i, static_cast<T>(element.nan));
      if (g >= 0 && fault < 0) fault = i * groups24(p.m) + g;
    }
  });
  return fault;
}

void decompress24(int bytes, const Packed24& p, Range rows, void* w) {
  with_bits(bytes, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const T* values = static_cast<const T*>(p.values) + i * p.row_values();
      T* out = static_cast<T*>(w) + i * p.m;
      each_code(p, i, [&](int64_t g, int code) {
        T group[4] = {};
        group[code & 3] = values[2 * g];
        group[code >> 2] = values[2 * g + 1];
        copy_columns(out, group, p.m, g);
      });
    }
  });
}

void mask_of24(const Packed24& p, Range rows, uint8_t* mask) {
  for (int64_t i = rows.begin; i < rows.end; ++i)
    each_code(p, i, [&](int64_t g, int code) {
      const uint32_t bools = to_bools(kept24_of(code));
      copy_columns(mask + i * p.m, reinterpret_cast<const uint8_t*>(&bools), p.m, g);
    });
}

void convert24(int bytes, const Packed24& from, const Packed24& to, Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    std::memcpy(static_cast<char*>(to.values) + i * to.row_values() * bytes,
                static_cast<const char*>(from.values) + i * from.row_values() * bytes, kept24(from.m) * bytes);
    for (int64_t word = 0; word < ceil_div(from.m, 16); ++word) write_word(to, i, word, read_word(from, i, word));
  }
}

int64_t check24(const Packed24& p, Range rows) {
  int64_t fault = -1;
  for (int64_t i = rows.begin; i < rows.end && fault < 0; ++i)
    each_code(p, i, [&](int64_t g, int code) {
      if ((code & 3) >= code >> 2 && fault < 0) fault = i * groups24(p.m) + g;
    });
  return fault;
}

// ---- from one pack to the other -------------------------------------------------------------------------------------

void repack24_perm(const Packed24& p, const Packed24& t, Range rows, int32_t* perm) {
  const int64_t bytes = ceil_div(p.m, 8), columns = kept24(p.n);
  const uint8_t* meta = static_cast<const uint8_t*>(p.meta);
  for (int64_t j = rows.begin; j < rows.end; ++j) {
    const int64_t group = j / 4;
    // Where the element (i, j) of W is kept, if it is.
    const auto position = [&](int64_t i) {
      if (i >= p.n) return -1;
      const int code = meta[i * bytes + group / 2] >> 4 * (group % 2) & 15, column = int(j % 4);
      const int32_t first = int32_t(i * kept24(p.m) + 2 * group);
      return (code & 3) == column ? first : code >> 2 == column ? first + 1 : -1;
    };
    each_code(t, j, [&](int64_t g, int code) {
      perm[j * columns + 2 * g] = position(4 * g + (code & 3));
      perm[j * columns + 2 * g + 1] = position(4 * g + (code >> 2));
    });
  }
}

void repack24_t(int bytes, const void* values, int64_t count, const int32_t* perm, int64_t columns, Range rows,
                void* values_t) {
  // A line of values serves 32 to 64 neighbouring rows of W_t: it stays in the first-level cache over a block.
  constexpr int64_t kRows = 64, kColumns = 128;
  with_bits(bytes, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(values);
    T* to = static_cast<T*>(values_t);
    for (int64_t j0 = rows.begin; j0 < rows.end; j0 += kRows)
      for (int64_t s0 = 0; s0 < columns; s0 += kColumns)
        for (int64_t j = j0; j < rows.end && j < j0 + kRows; ++j)
          for (int64_t s = s0; s < columns && s < s0 + kColumns; ++s) {
            const int64_t at = perm[j * columns + s];
            to[j * columns + s] = at >= 0 && at < count ? from[at] : T{};
          }
  });
}

}  // namespace slk::cpu
