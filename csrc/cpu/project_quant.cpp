// Quantized weights of family `project`. Contract: slkernels/project_quant.h.
#include "slkernels/project_quant.h"

#include "cpu/project_vectors.h"

namespace slk::cpu::SLK_ISA {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000;

// ---- codes ----------------------------------------------------------------------------------------------------------

SLK_INLINE VI read_codes(const uint8_t* p, Whole) {
  return load_bytes(p);
}
SLK_INLINE VI read_codes(const uint8_t* p, int count) {
  uint8_t buffer[kLanes] = {};
  std::memcpy(buffer, p, count);
  return load_bytes(buffer);
}
SLK_INLINE void write_codes(uint8_t* p, VI codes, Whole) {
  store_bytes(p, codes);
}
SLK_INLINE void write_codes(uint8_t* p, VI codes, int count) {
  uint8_t buffer[kLanes];
  store_bytes(buffer, codes);
  std::memcpy(p, buffer, count);
}
SLK_INLINE VI splat(int x) {
  return VI{} + x;
}

// Codes of n elements of a packed row of 4-bit codes, one a byte; and back.
SLK_INLINE void unpack(const uint8_t* packed, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n / 2; ++i) {
    codes[2 * i] = packed[i] >> 4;
    codes[2 * i + 1] = packed[i] & 15;
  }
  if (n % 2) codes[n - 1] = packed[n / 2] >> 4;
}
SLK_INLINE void pack(const uint8_t* codes, int64_t n, uint8_t* packed) {
  for (int64_t i = 0; i < n / 2; ++i) packed[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
  if (n % 2) packed[n / 2] = uint8_t(codes[n - 1] << 4);
}

// ---- a group --------------------------------------------------------------------------------------------------------

// The codes of x[n], whose vectors are padded with zeros; random: 16 bits an element, or null for nearest even.
inline void encode_group(const float* x, int64_t n, int bits, const uint16_t* random, uint8_t* codes, float* scale,
                         uint8_t* zero) {
  V hi = SLK_ISA::zero(), lo = hi;
  VU largest = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = load(x + i);
    hi = v > hi ? v : hi;
    lo = v < lo ? v : lo;
    largest = max(largest, (VU)abs(v));
  }
  float h = 0, l = 0;
  for (int i = 0; i < kLanes; ++i) {
    h = hi[i] > h ? hi[i] : h;
    l = lo[i] < l ? lo[i] : l;
  }
  const float top = float((1 << bits) - 1), s = (h - l) / top;
  const bool finite = max_lane(largest) < kInfinityBits && to_bits(s) < kInfinityBits;
  if (!finite || s == 0) {
    *scale = finite ? 0.0f : __builtin_nanf("");
    *zero = 0;
    std::memset(codes, 0, n);
    return;
  }
  const float z = __builtin_nearbyintf(-l / s);
  const int offset = int(z < top ? z : top);
  *scale = s;
  *zero = uint8_t(offset);
  const V divisor = broadcast(s);
  each_vector(n, [&](int64_t i, auto count) {
    const V y = load(x + i) / divisor;
    V rounded;
    if (random) {
      const V down = floor(y), chance = to_float((VI)load_halves(random + i)) * broadcast(0x1p-16f);
      rounded = down - to_float((VI)(y - down > chance));
    } else {
      rounded = nearest_integer(y);
    }
    const VI code = __builtin_convertvector(rounded, VI) + splat(offset);
    write_codes(codes + i, min(max(code, splat(0)), splat((1 << bits) - 1)), count);
  });
}

SLK_INLINE int64_t group_size(const GroupCodes& w, int64_t g) {
  const int64_t rest = w.m - g * w.group;
  return rest < w.group ? rest : w.group;
}

// f(row, g, first column, columns) for the groups of some rows.
template <class F>
SLK_INLINE void each_group(const GroupCodes& w, Range rows, F f) {
  const int64_t groups = w.groups();
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t g = 0; g < groups; ++g) f(row, g, g * w.group, group_size(w, g));
}

void quantize(DType type, const void* w, const GroupCodes& q, const StochasticRounding& rounding, Range rows) {
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    alignas(64) float x[kMaxGroup];
    alignas(64) uint16_t room[random_room(kMaxGroup)];
    uint8_t one_a_byte[kMaxGroup];
    each_group(q, rows, [&](int64_t row, int64_t g, int64_t column, int64_t n) {
      const int64_t first = row * q.m + column, slot = row * q.groups() + g;
      each_vector(n, [&](int64_t i, auto count) { store(x + i, read(static_cast<const T*>(w) + first + i, count)); });
      const uint16_t* random = rounding.on ? random_halves(rounding, first, n, room) : nullptr;
      if (q.bits == 8) {
        encode_group(x, n, 8, random, q.codes + first, q.scale + slot, q.zero + slot);
      } else {
        encode_group(x, n, 4, random, one_a_byte, q.scale + slot, q.zero + slot);
        pack(one_a_byte, n, q.codes + row * q.row_bytes() + column / 2);
      }
    });
  });
}

void dequantize(const GroupCodes& q, Range rows, Range columns, DType type, void* out, int64_t ld_out) {
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    uint8_t one_a_byte[kMaxGroup];
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t column = columns.begin; column < columns.end; column += q.group) {
        const int64_t n = columns.end - column < q.group ? columns.end - column : q.group;
        const int64_t slot = row * q.groups() + column / q.group;
        const uint8_t* codes = q.codes + row * q.row_bytes() + (q.bits == 8 ? column : column / 2);
        if (q.bits == 4) {
          unpack(codes, n, one_a_byte);
          codes = one_a_byte;
        }
        const V scale = broadcast(q.scale[slot]);
        const VI zero = splat(q.zero[slot]);
        T* p = static_cast<T*>(out) + (row - rows.begin) * ld_out + (column - columns.begin);
        each_vector(n, [&](int64_t i, auto count) {
          write(p + i, to_float(read_codes(codes + i, count) - zero) * scale, count);
        });
      }
  });
}

void update(const GroupCodes& q, const UpdateOperands& operands, const UpdateScalars& scalars,
            const StochasticRounding& rounding, Range rows) {
  alignas(64) float x[kMaxGroup];
  alignas(64) uint16_t room[random_room(kMaxGroup)];
  const V decay = broadcast(scalars.decay);
  each_group(q, rows, [&](int64_t row, int64_t g, int64_t column, int64_t n) {
    const int64_t first = row * q.m + column, slot = row * q.groups() + g;
    uint8_t* codes = q.codes + first;
    const V scale = broadcast(q.scale[slot]);
    const VI zero = splat(q.zero[slot]);
    each_vector(n, [&](int64_t i, auto count) {
      const V w = to_float(read_codes(codes + i, count) - zero) * scale;
      store(x + i, w * decay);
    });
    for (int64_t i = n; i % kLanes; ++i) x[i] = 0;  // beyond the row: zero codes stand for -zero there
    add_terms(operands, scalars.step, row, column, n, x);
    const uint16_t* random = rounding.on ? random_halves(rounding, first, n, room) : nullptr;
    encode_group(x, n, 8, random, codes, q.scale + slot, q.zero + slot);
  });
}

// ---- linear ---------------------------------------------------------------------------------------------------------

// A tile is NR rows of W by NT tokens, one vector accumulator each. Codes are read once; converting a vector of them
// takes about as long as reading it from memory.
template <int NR, int NT>
SLK_INLINE void linear_tile(const GroupCodes& q, const float* x, int64_t row, int64_t n, const float* bias, float* y) {
  V acc[NR][NT] = {};
  const int64_t groups = q.groups();
  for (int64_t g = 0; g < groups; ++g) {
    V scale[NR];
    VI zero[NR];
    for (int r = 0; r < NR; ++r) {
      scale[r] = broadcast(q.scale[(row + r) * groups + g]);
      zero[r] = splat(q.zero[(row + r) * groups + g]);
    }
    const int64_t column = g * q.group;
    each_vector(group_size(q, g), [&](int64_t i, auto count) {
      V xv[NT];
      for (int t = 0; t < NT; ++t) xv[t] = read(x + t * q.m + column + i, count);
      for (int r = 0; r < NR; ++r) {
        const V w = to_float(read_codes(q.codes + (row + r) * q.m + column + i, count) - zero[r]) * scale[r];
        for (int t = 0; t < NT; ++t) acc[r][t] = fma(w, xv[t], acc[r][t]);
      }
    });
  }
  for (int r = 0; r < NR; ++r)
    for (int t = 0; t < NT; ++t) y[t * n + row + r] = sum(acc[r][t]) + (bias ? bias[row + r] : 0.0f);
}

template <int NT>
void linear_tokens(const GroupCodes& q, const float* x, int64_t n, Range rows, const float* bias, float* y) {
  constexpr int kRows = NT >= 8 ? 2 : 4;  // 16 accumulators at most
  int64_t i = rows.begin;
  for (; i + kRows <= rows.end; i += kRows) linear_tile<kRows, NT>(q, x, i, n, bias, y);
  for (; i < rows.end; ++i) linear_tile<1, NT>(q, x, i, n, bias, y);
}

void linear(const GroupCodes& q, const float* x, int64_t tokens, int64_t n, Range rows, const float* bias, float* y) {
  constexpr int64_t kRowBlock = 64;  // rows of W that stay in L2 while the next tokens use them
  for (int64_t first = rows.begin; first < rows.end; first += kRowBlock) {
    const Range block = {first, first + kRowBlock < rows.end ? first + kRowBlock : rows.end};
    for (int64_t t = 0; t < tokens;) {
      const float* from = x + t * q.m;
      float* to = y + t * n;
      if (tokens - t >= 8) {
        linear_tokens<8>(q, from, n, block, bias, to);
        t += 8;
      } else if (tokens - t >= 4) {
        linear_tokens<4>(q, from, n, block, bias, to);
        t += 4;
      } else {
        linear_tokens<1>(q, from, n, block, bias, to);
        ++t;
      }
    }
  }
}

}  // namespace

extern const QuantKernels quant_table;
const QuantKernels quant_table = {quantize, dequantize, update, linear};

}  // namespace slk::cpu::SLK_ISA
