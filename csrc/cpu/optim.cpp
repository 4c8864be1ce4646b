// Block-wise quantization and the fused AdamW step. Contracts: slkernels/optim.h; the codec: dyn8.h.
//
// A block is decoded, stepped and kept as fp32 in L1 until its maxima are known, then encoded: memory sees one read
// and one write of everything. The step costs about 100 vector operations for kLanes elements, of which the codec is
// two thirds.
#include "slkernels/optim.h"

#include "cpu/dyn8.h"
#include "cpu/types.h"

namespace slk::cpu::SLK_ISA {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000;
// Outside these, scale or its reciprocal may be subnormal.
constexpr float kSmallScale = 0x1p-100f, kLargeScale = 0x1p100f;

// Whole vectors where they are, and the ragged end of a tensor through a padded copy. f(i, count) for each vector.
template <class F>
SLK_INLINE void for_vectors(int n, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int, kLanes>());
  if (i < n) f(i, n - i);
}
template <class T>
SLK_INLINE V load_some(const T* p, std::integral_constant<int, kLanes>) {
  return load(p);
}
template <class T>
SLK_INLINE V load_some(const T* p, int count) {
  return load_n(p, count);
}
template <class T>
SLK_INLINE void store_some(T* p, V v, std::integral_constant<int, kLanes>) {
  store(p, v);
}
template <class T>
SLK_INLINE void store_some(T* p, V v, int count) {
  store_n(p, v, count);
}
// Codes; absent ones read as the code of zero.
template <bool kSigned>
SLK_INLINE VI load_codes(const uint8_t* p, std::integral_constant<int, kLanes>) {
  return load_bytes(p);
}
template <bool kSigned>
SLK_INLINE VI load_codes(const uint8_t* p, int count) {
  uint8_t buffer[kLanes];
  std::memset(buffer, kSigned ? 127 : 0, sizeof buffer);
  std::memcpy(buffer, p, count);
  return load_bytes(buffer);
}
SLK_INLINE void store_codes(uint8_t* p, VI codes, std::integral_constant<int, kLanes>) {
  store_bytes(p, codes);
}
SLK_INLINE void store_codes(uint8_t* p, VI codes, int count) {
  uint8_t buffer[kLanes];
  store_bytes(buffer, codes);
  std::memcpy(p, buffer, count);
}

// ---- codec ----------------------------------------------------------------------------------------------------------

// Decides the lanes of x[n] that are marked, one mask a vector.
template <bool kSigned>
__attribute__((noinline)) void decide(const float* x, int n, float scale, const uint16_t* marked, uint8_t* codes) {
  for (int first = 0; first < n; first += kLanes)
    for (uint32_t lanes = marked[first / kLanes]; lanes; lanes &= lanes - 1) {
      const int i = first + __builtin_ctz(lanes);
      if (i < n) codes[i] = dyn8::nearest_code<kSigned>(x[i], scale, codes[i]);
    }
}

// Encodes n values, a multiple of kLanes of which is readable at x. max_bits = the largest |x| as bits: comparing bits
// puts NaN above infinity, where comparing floats would lose it.
template <bool kSigned>
SLK_INLINE void encode_block(float* x, int n, uint32_t max_bits, uint8_t* codes, float* scale) {
  if (max_bits == 0 || max_bits >= kInfinityBits) {  // scale 0 decodes to zeros, scale NaN to NaN
    *scale = max_bits == 0 ? 0.0f : __builtin_nanf("");
    std::memset(codes, kSigned ? 127 : 0, n);
    return;
  }
  float largest = from_bits(max_bits);
  *scale = largest;
  if (largest < kSmallScale || largest > kLargeScale) {
    // By a power of two: x / scale stays what it was (or, where x turns subnormal, far below the smallest code).
    const float power = largest < kSmallScale ? 0x1p100f : 0x1p-100f;
    largest *= power;
    for (int i = 0; i < n; i += kLanes) store(x + i, load(x + i) * broadcast(power));
  }
  const V reciprocal = broadcast(1.0f / largest);
  uint16_t doubtful[kMaxQuantBlock / kLanes];
  uint32_t any = 0;
  for_vectors(n, [&](int i, auto count) {
    uint16_t& lanes = doubtful[i / kLanes];
    store_codes(codes + i, dyn8::encode<kSigned>(load(x + i), reciprocal, lanes), count);
    any |= lanes;
  });
  // About one element in 4000 is decided apart, so that the loop above has no branch.
  if (__builtin_expect(any != 0, 0)) decide<kSigned>(x, n, largest, doubtful, codes);
}

template <bool kSigned, class T>
void quantize_t(const T* x, int64_t n, int64_t block, Range blocks, uint8_t* codes, float* scale) {
  alignas(64) float buffer[kMaxQuantBlock];
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t start = b * block;
    const int size = int(n - start < block ? n - start : block);
    VU largest = {};
    for_vectors(size, [&](int i, auto count) {
      V v = load_some(x + start + i, count);
      if (!kSigned) v = v < zero() ? zero() : v;
      store(buffer + i, v);
      largest = max(largest, (VU)abs(v));
    });
    encode_block<kSigned>(buffer, size, max_lane(largest), codes + start, scale + b);
  }
}

template <bool kSigned, class T>
void dequantize_t(const uint8_t* codes, const float* scale, int64_t n, int64_t block, Range blocks, T* out) {
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t start = b * block;
    const int size = int(n - start < block ? n - start : block);
    const V s = broadcast(scale[b]);
    for_vectors(size, [&](int i, auto count) {
      store_some(out + start + i, dyn8::decode<kSigned>(load_codes<kSigned>(codes + start + i, count)) * s, count);
    });
  }
}

void quantize(Codec codec, DType dtype, const void* x, int64_t n, int64_t block, Range blocks, uint8_t* codes,
              float* scale) {
  with_float_type(dtype, [&](auto* type) {
    auto* p = static_cast<const Element<decltype(type)>*>(x);
    if (codec == Codec::dyn8)
      quantize_t<true>(p, n, block, blocks, codes, scale);
    else
      quantize_t<false>(p, n, block, blocks, codes, scale);
  });
}

void dequantize(Codec codec, DType dtype, const uint8_t* codes, const float* scale, int64_t n, int64_t block,
                Range blocks, void* out) {
  with_float_type(dtype, [&](auto* type) {
    auto* p = static_cast<Element<decltype(type)>*>(out);
    if (codec == Codec::dyn8)
      dequantize_t<true>(codes, scale, n, block, blocks, p);
    else
      dequantize_t<false>(codes, scale, n, block, blocks, p);
  });
}

// ---- Adam -----------------------------------------------------------------------------------------------------------

// The step's scalars in registers.
struct Scalars {
  V beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, l2, minus_step_size, inv_sqrt_bias2, inv_grad_scale;
  explicit Scalars(const AdamStep& s)
      : beta1(broadcast(s.beta1)),
        one_minus_beta1(broadcast(s.one_minus_beta1)),
        beta2(broadcast(s.beta2)),
        one_minus_beta2(broadcast(s.one_minus_beta2)),
        eps(broadcast(s.eps)),
        decay(broadcast(s.decay)),
        l2(broadcast(s.l2)),
        minus_step_size(broadcast(-s.step_size)),
        inv_sqrt_bias2(broadcast(s.inv_sqrt_bias2)),
        inv_grad_scale(broadcast(s.inv_grad_scale)) {}
};

// kScaled: there is a gradient scale or an L2 term.
template <bool kScaled>
SLK_INLINE V adam_vector(const Scalars& s, V p, V g, V& m, V& v) {
  if (kScaled) g = fma(s.l2, p, g * s.inv_grad_scale);
  const V m_new = fma(s.beta1, m, s.one_minus_beta1 * g);
  const V v_new = fma(s.beta2, v, s.one_minus_beta2 * g * g);
  const V direction = m_new / fma(sqrt(v_new), s.inv_sqrt_bias2, s.eps);
  const VI finite = (VI)(v_new < broadcast(from_bits(kInfinityBits)));
  m = finite ? m_new : m;
  v = finite ? v_new : v;
  return fma(s.minus_step_size, direction, p * s.decay);
}

// A block between its step and its encoding.
struct SteppedBlock {
  float *m, *v;
  VU m_max, v_max;
};

template <bool kScaled, class T>
SLK_INLINE void step_block(const AdamTensor& t, const Scalars& s, int64_t block, int64_t b, SteppedBlock& out) {
  const int64_t start = b * block;
  const int size = int(t.n - start < block ? t.n - start : block);
  T* p = static_cast<T*>(t.p) + start;
  const T* g = static_cast<const T*>(t.g) + start;
  const uint8_t* m_codes = static_cast<const uint8_t*>(t.m) + start;
  const uint8_t* v_codes = static_cast<const uint8_t*>(t.v) + start;
  const V m_scale = broadcast(t.m_scale[b]), v_scale = broadcast(t.v_scale[b]);
  VU m_max = {}, v_max = {};
  for_vectors(size, [&](int i, auto count) {
    V m = dyn8::decode<true>(load_codes<true>(m_codes + i, count)) * m_scale;
    V v = dyn8::decode<false>(load_codes<false>(v_codes + i, count)) * v_scale;
    store_some(p + i, adam_vector<kScaled>(s, load_some(p + i, count), load_some(g + i, count), m, v), count);
    store(out.m + i, m);
    store(out.v + i, v);
    m_max = max(m_max, (VU)abs(m));
    v_max = max(v_max, (VU)v);  // v >= 0, and a NaN of either sign exceeds infinity
  });
  out.m_max = m_max;
  out.v_max = v_max;
}

SLK_INLINE void encode_stepped(const AdamTensor& t, int64_t block, int64_t b, SteppedBlock& stepped) {
  const int64_t start = b * block;
  const int size = int(t.n - start < block ? t.n - start : block);
  encode_block<true>(stepped.m, size, max_lane(stepped.m_max), static_cast<uint8_t*>(t.m) + start, t.m_scale + b);
  encode_block<false>(stepped.v, size, max_lane(stepped.v_max), static_cast<uint8_t*>(t.v) + start, t.v_scale + b);
}

// A block is encoded after the next one has been stepped: its maxima are then known, and the core need not drain its
// pipeline to wait for them.
template <bool kScaled, class T>
void adam_quantized(const AdamTensor& t, const AdamStep& step, int64_t block, Range blocks) {
  // Next to each other, whatever the block size: at a distance of 4096 bytes loads would wait for unrelated stores.
  alignas(64) float values[4 * kMaxQuantBlock];
  SteppedBlock stepped[2] = {{values, values + block, {}, {}}, {values + 2 * block, values + 3 * block, {}, {}}};
  const Scalars s(step);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    step_block<kScaled, T>(t, s, block, b, stepped[b & 1]);
    if (b > blocks.begin) encode_stepped(t, block, b - 1, stepped[(b - 1) & 1]);
  }
  if (blocks.size() > 0) encode_stepped(t, block, blocks.end - 1, stepped[(blocks.end - 1) & 1]);
}

template <bool kScaled, class T>
void adam_f32(const AdamTensor& t, const AdamStep& step, int64_t block, Range blocks) {
  const Scalars s(step);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t start = b * block;
    const int size = int(t.n - start < block ? t.n - start : block);
    T* p = static_cast<T*>(t.p) + start;
    const T* g = static_cast<const T*>(t.g) + start;
    float* ms = static_cast<float*>(t.m) + start;
    float* vs = static_cast<float*>(t.v) + start;
    for_vectors(size, [&](int i, auto count) {
      V m = load_some(ms + i, count), v = load_some(vs + i, count);
      store_some(p + i, adam_vector<kScaled>(s, load_some(p + i, count), load_some(g + i, count), m, v), count);
      store_some(ms + i, m, count);
      store_some(vs + i, v, count);
    });
  }
}

void adam(const AdamTensor& t, const AdamStep& step, int64_t block, Range blocks) {
  with_float_type(t.dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const bool scaled = step.l2 != 0 || step.inv_grad_scale != 1;
    const auto run = t.m_scale ? (scaled ? adam_quantized<true, T> : adam_quantized<false, T>)
                               : (scaled ? adam_f32<true, T> : adam_f32<false, T>);
    run(t, step, block, blocks);
  });
}

}  // namespace

extern const OptimKernels optim_table;
const OptimKernels optim_table = {quantize, dequantize, adam};

}  // namespace slk::cpu::SLK_ISA
