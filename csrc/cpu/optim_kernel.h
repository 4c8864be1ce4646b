// The step kernel, one template over the rule, the codec of the moments and the type of the parameters.
//
// A chunk of blocks is decoded, stepped and kept as fp32 in L1 until the blocks' maxima are known, then encoded: memory
// sees one read and one write of everything. For dyn8 the step costs about 70 vector operations for kLanes elements,
// of which the codec is two thirds; a square root and a division run beside them.
#pragma once

#include "cpu/optim_block.h"
#include "cpu/optim_params.h"
#include "cpu/optim_rules.h"
#include "cpu/optim_step.h"
#include "cpu/types.h"

namespace slk::cpu::SLK_ISA {

// Elements that are stepped before they are encoded: enough that waiting for the last maximum, about 200 cycles, does
// not show, and few enough that they, p and g lie in L1.
constexpr int kChunkElements = 2048;
// Where parameters and gradients lie there as fp32 too.
constexpr int kCopiedElements = 1024;
constexpr int kChunkBlocks = 64;
static_assert(kChunkBlocks % kLanes == 0, "maxima are reduced kLanes blocks at a time");

struct ChunkBuffers {
  // Next to each other, whatever the block size: at a distance of 4096 bytes loads would wait for unrelated stores.
  alignas(64) float values[3 * (kMaxQuantBlock + 48)];
};

// The moments of a rule on quantized state.
template <Rule kRule, Codec kCodec>
struct Kernel {
  static constexpr bool kHasV = has_v(kRule), kHasSlow = kRule == Rule::ademamix;
  static constexpr Codec kSecond = codec::second_moment(kCodec);
  static constexpr bool kKeepsRoot = kSecond == Codec::cmp8u;  // of v: what is encoded and decoded

  const StepTensor& t;
  const int64_t block;
  const VectorScalars s;
  const int padded, per_chunk;
  float *m, *v, *slow;  // [per_chunk][padded], in pair order
  struct Maxima {
    VU m, slow, v;
  };
  Maxima largest[kChunkBlocks];  // by lane
  int64_t kept = 0;

  Kernel(const StepTensor& t, const StepCall& call, ChunkBuffers& buffers, int elements)
      : t(t),
        block(call.block),
        s(call.scalars, call.rule),
        padded(int(round_up(call.block, kPair))),
        per_chunk(elements / padded < 1        ? 1
                  : elements / padded < kLanes ? elements / padded
                                               : kLanes),
        m(buffers.values),
        v(m + per_chunk * padded + 48),
        slow(v + per_chunk * padded + 48) {}

  int size_of(int64_t b) const { return int(t.n - b * block < block ? t.n - b * block : block); }
  static uint8_t* codes_of(const Moment& moment, Codec c, int64_t start) {
    return static_cast<uint8_t*>(moment.data) + code_bytes(c, start);
  }

  struct Decoders {
    StepDecoder<kCodec> m, slow;
    StepDecoder<kSecond> v;
    Decoders(const StepTensor& t, int64_t b)
        : m(t.m.scale[b]), slow(kHasSlow ? t.slow.scale[b] : 0.0f), v(kHasV ? t.v.scale[b] : 0.0f) {}
    SLK_INLINE Moments operator()(VI m_code, VI slow_code, VI v_code) const {
      Moments x = {};
      x.m = m(m_code);
      if (kHasSlow) x.slow = slow(slow_code);
      if (kHasV) x.v = v(v_code);
      x.root = x.v;
      if (kHasV && kKeepsRoot) x.v = x.v * x.v;
      return x;
    }
  };
  struct Codes {
    PairI m, slow, v;
  };
  template <class Whole>
  SLK_INLINE Codes load(int64_t start, int i, int size, Whole whole) const {
    Codes c = {};
    c.m = load_codes<kCodec>(codes_of(t.m, kCodec, start), i, size, whole);
    if (kHasSlow) c.slow = load_codes<kCodec>(codes_of(t.slow, kCodec, start), i, size, whole);
    if (kHasV) c.v = load_codes<kSecond>(codes_of(t.v, kSecond, start), i, size, whole);
    return c;
  }

  SLK_INLINE void keep(const Moments& x, int at, Maxima& largest) const {
    store(m + at, x.m);
    largest.m = max(largest.m, (VU)abs(x.m));
    if (kHasSlow) {
      store(slow + at, x.slow);
      largest.slow = max(largest.slow, (VU)abs(x.slow));
    }
    if (kHasV) {
      const V kept_v = kKeepsRoot ? x.root : x.v;
      store(v + at, kept_v);
      largest.v = max(largest.v, (VU)kept_v);  // >= 0, and a NaN of either sign exceeds infinity
    }
  }

  // Steps block b; `at`: its place in the buffers.
  template <class T>
  SLK_INLINE Maxima step_block(T* p, const T* g, int64_t b, int at) {
    const int size = size_of(b);
    const Decoders decode(t, b);
    const VectorScalars s = this->s;  // in registers: the stores below might change the member
    Maxima largest = {};
    for_pairs(size, [&](int i, auto whole) {
      const Codes code = load(b * block, i, size, whole);
      const Pair grad = load_pair(g, i, size, whole);
      Pair param = {};
      if (kRule != Rule::adam_direction) param = load_pair(p, i, size, whole);
      const PairI present = whole ? PairI{} : lanes_below(size - i);
      const auto half = [&](V& param, V grad, VI m_code, VI slow_code, VI v_code, VI present, int at) {
        Moments x = decode(m_code, slow_code, v_code);
        param = step_vector<kRule>(s, param, grad * s.inv_grad_scale, x);
        if (!whole) {
          V* const all[] = {&x.m, &x.slow, &x.v, &x.root};
          for (V* y : all) *y = (V)((VI)*y & present);
        }
        keep(x, at, largest);
      };
      half(param.even, grad.even, code.m.even, code.slow.even, code.v.even, present.even, at + i);
      half(param.odd, grad.odd, code.m.odd, code.slow.odd, code.v.odd, present.odd, at + i + kLanes);
      store_pair(p, param, i, size, whole);
    });
    return largest;
  }

  // Gives elements without finite moments their old ones back.
  __attribute__((noinline)) Maxima repair_block(int64_t b, int at) {
    const int size = size_of(b);
    const Decoders decode(t, b);
    Maxima largest = {};
    for_pairs(size, [&](int i, auto whole) {
      const Codes code = load(b * block, i, size, whole);
      const auto half = [&](VI m_code, VI slow_code, VI v_code, int at) {
        const Moments old = decode(m_code, slow_code, v_code);
        Moments x = {};
        x.m = SLK_ISA::load(m + at);
        if (kHasSlow) x.slow = SLK_ISA::load(slow + at);
        if (kHasV) x.v = x.root = SLK_ISA::load(v + at);
        const VU tested = kHasV ? (VU)x.v : (VU)abs(x.m);
        const VI bad = (VI)(tested >= kInfinityBits);
        for (int l = 0; l < kLanes; ++l) kept -= bad[l];
        x.m = bad ? old.m : x.m;
        x.slow = bad ? old.slow : x.slow;
        x.v = bad ? old.v : x.v;
        x.root = bad ? old.root : x.root;
        keep(x, at, largest);
      };
      half(code.m.even, code.slow.even, code.v.even, at + i);
      half(code.m.odd, code.slow.odd, code.v.odd, at + i + kLanes);
    });
    return largest;
  }

  // Steps blocks first .. first + count - 1, p and g pointing to the first element, and encodes them.
  template <class T>
  SLK_INLINE void step_chunk(T* p, const T* g, int64_t first, int count) {
    for (int j = 0; j < count; ++j) largest[j] = step_block(p + j * block, g + j * block, first + j, j * padded);
    for (int j = 0; j < count; j += kLanes) encode_group(first, j, count - j < kLanes ? count - j : kLanes);
  }

  // Encodes the chunk's blocks from .. from + count - 1, at most kLanes.
  SLK_INLINE void encode_group(int64_t first, int from, int count) {
    const auto reduce = [&](VU Maxima::* moment) {
      VU rows[kLanes];
      for (int j = 0; j < kLanes; ++j) rows[j] = j < count ? largest[from + j].*moment : VU{};
      return max_rows(rows);
    };
    constexpr VU Maxima::* kTested = kHasV ? &Maxima::v : &Maxima::m;
    const VU tested = reduce(kTested);
    if (__builtin_expect(max_lane(tested) >= kInfinityBits, 0))
      for (int j = from; j < from + count; ++j)
        if (tested[j - from] >= kInfinityBits) largest[j] = repair_block(first + j, j * padded);
    encode_moment<kCodec>(m, t.m, reduce(&Maxima::m), first, from, count);
    if constexpr (kHasSlow) encode_moment<kCodec>(slow, t.slow, reduce(&Maxima::slow), first, from, count);
    if constexpr (kHasV) encode_moment<kSecond>(v, t.v, reduce(&Maxima::v), first, from, count);
  }

  template <Codec kEncoded>
  SLK_INLINE void encode_moment(float* x, const Moment& moment, VU largest, int64_t first, int from, int count) {
    BlockScale scales[kLanes];
    block_scales<kEncoded>(largest, scales);
    if constexpr (!Encoder<kEncoded>::kDoubts) {
      // Small blocks that are whole and ordinary, without the questions that encode_block asks of each.
      const uint32_t low = to_bits(codec::kSmallScale), high = to_bits(codec::kLargeScale);
      bool ordinary = block % kPair == 0 && size_of(first + from + count - 1) == block;
      for (int j = 0; j < count; ++j) ordinary &= scales[j].largest_bits - low < high - low;
      if (__builtin_expect(ordinary, 1)) {
        uint8_t* const codes = codes_of(moment, kEncoded, (first + from) * block);
        float* const scale = moment.scale + first + from;
        uint16_t unused;
        for (int j = 0; j < count; ++j) {
          const Encoder<kEncoded> encode(from_bits(scales[j].largest_bits), scales[j].inverse);
          scale[j] = scales[j].scale;
          for (int i = 0; i < block; i += kPair) {
            const float* const y = x + (from + j) * padded + i;
            const PairI code = {encode(SLK_ISA::load(y), unused), encode(SLK_ISA::load(y + kLanes), unused)};
            store_codes<codec::bits(kEncoded)>(codes + code_bytes(kEncoded, j * block + i), code);
          }
        }
        return;
      }
    }
    for (int j = 0; j < count; ++j) {
      const int64_t b = first + from + j;
      encode_block<kEncoded>(x + (from + j) * padded, size_of(b), scales[j], codes_of(moment, kEncoded, b * block),
                             moment.scale + b);
    }
  }

  // f(first block, number of blocks) for the chunks of a range.
  template <class F>
  SLK_INLINE void for_chunks(Range blocks, F f) {
    for (int64_t b = blocks.begin; b < blocks.end; b += per_chunk)
      f(b, int(blocks.end - b < per_chunk ? blocks.end - b : per_chunk));
  }
};

// The same on fp32 moments, which need neither maxima nor buffers.
template <Rule kRule, class T>
int64_t step_f32(const VectorScalars& s, T* p, const T* g, const StepTensor& t, int64_t start, int size) {
  constexpr bool kHasV = has_v(kRule), kHasSlow = kRule == Rule::ademamix;
  float* m = static_cast<float*>(t.m.data) + start;
  float* v = kHasV ? static_cast<float*>(t.v.data) + start : nullptr;
  float* slow = kHasSlow ? static_cast<float*>(t.slow.data) + start : nullptr;
  int64_t kept = 0;
  for_pairs(size, [&](int i, auto whole) {
    const Pair grad = load_pair(g, i, size, whole);
    Pair param = {}, ms = load_pair(m, i, size, whole), vs = {}, slows = {};
    if (kRule != Rule::adam_direction) param = load_pair(p, i, size, whole);
    if (kHasV) vs = load_pair(v, i, size, whole);
    if (kHasSlow) slows = load_pair(slow, i, size, whole);
    VI bad = {};
    const auto half = [&](V& param, V grad, V& m, V& slow, V& v) {
      Moments x = {m, slow, v, zero()};
      param = step_vector<kRule>(s, param, grad * s.inv_grad_scale, x);
      const VI keeps = (VI)((VU)abs(kHasV ? x.v : x.m) >= kInfinityBits);
      bad += keeps;
      m = keeps ? m : x.m;
      slow = keeps ? slow : x.slow;
      v = keeps ? v : x.v;
    };
    half(param.even, grad.even, ms.even, slows.even, vs.even);
    half(param.odd, grad.odd, ms.odd, slows.odd, vs.odd);
    for (int l = 0; l < kLanes; ++l) kept -= bad[l];
    store_pair(p, param, i, size, whole);
    store_pair(m, ms, i, size, whole);
    if (kHasV) store_pair(v, vs, i, size, whole);
    if (kHasSlow) store_pair(slow, slows, i, size, whole);
  });
  return kept;
}

// What the kernels read and write by themselves: bf16 and fp32 parameters, rounded to nearest. Everything else passes
// through fp32 copies of a chunk.
inline bool is_plain(const StepTensor& t, const StepCall& call) {
  return call.scalars.l2 == 0 && !t.low && !t.out &&
         (t.dtype == DType::f32 || (t.dtype == DType::bf16 && !call.stochastic));
}

template <Rule kRule, Codec kCodec>
int64_t step_quantized(const StepTensor& t, const StepCall& call, Range blocks) {
  ChunkBuffers buffers;
  if constexpr (kRule != Rule::adam_direction)
    if (is_plain(t, call)) {
      const auto run = [&](auto* type) {
        using T = Element<decltype(type)>;
        Kernel<kRule, kCodec> kernel(t, call, buffers, kChunkElements);
        kernel.for_chunks(blocks, [&](int64_t first, int count) {
          const int64_t start = first * call.block;
          kernel.step_chunk(static_cast<T*>(t.p) + start, static_cast<const T*>(t.g) + start, first, count);
        });
        return kernel.kept;
      };
      return t.dtype == DType::f32 ? run((float*)nullptr) : run((bf16*)nullptr);
    }
  StepCall scaled = call;
  scaled.scalars.inv_grad_scale = 1;  // ParamBuffers divides
  Kernel<kRule, kCodec> kernel(t, scaled, buffers, kCopiedElements);
  ParamBuffers params(t, call);
  kernel.for_chunks(blocks, [&](int64_t first, int count) {
    const int64_t start = first * call.block, rest = t.n - start, elements = count * call.block;
    const int size = int(rest < elements ? rest : elements);
    params.load(start, size);
    kernel.step_chunk(params.p, params.g, first, count);
    params.store(start, size);
  });
  return kernel.kept;
}

template <Rule kRule>
int64_t step_unquantized(const StepTensor& t, const StepCall& call, Range blocks) {
  const int64_t end = blocks.end * call.block < t.n ? blocks.end * call.block : t.n;
  int64_t kept = 0;
  const bool plain = is_plain(t, call) && kRule != Rule::adam_direction;
  StepCall scaled = call;
  if (!plain) scaled.scalars.inv_grad_scale = 1;
  const VectorScalars s(scaled.scalars, call.rule);
  ParamBuffers params(t, call);
  for (int64_t start = blocks.begin * call.block; start < end; start += kChunkElements) {
    const int size = int(end - start < kChunkElements ? end - start : kChunkElements);
    if (!plain) {
      params.load(start, size);
      kept += step_f32<kRule>(s, params.p, params.g, t, start, size);
      params.store(start, size);
    } else if (t.dtype == DType::f32) {
      kept +=
          step_f32<kRule>(s, static_cast<float*>(t.p) + start, static_cast<const float*>(t.g) + start, t, start, size);
    } else {
      kept +=
          step_f32<kRule>(s, static_cast<bf16*>(t.p) + start, static_cast<const bf16*>(t.g) + start, t, start, size);
    }
  }
  return kept;
}

template <Rule kRule>
int64_t step_rule(const StepTensor& t, const StepCall& call, Range blocks) {
  if (!t.m.scale) return step_unquantized<kRule>(t, call, blocks);
  switch (call.codec) {
    case Codec::dyn8:
      return step_quantized<kRule, Codec::dyn8>(t, call, blocks);
    case Codec::lin8:
      return step_quantized<kRule, Codec::lin8>(t, call, blocks);
    case Codec::cmp8:
      return step_quantized<kRule, Codec::cmp8>(t, call, blocks);
    case Codec::dyn4:
      return step_quantized<kRule, Codec::dyn4>(t, call, blocks);
    default:
      return step_quantized<kRule, Codec::fp8>(t, call, blocks);
  }
}

}  // namespace slk::cpu::SLK_ISA
