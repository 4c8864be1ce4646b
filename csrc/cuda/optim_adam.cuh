// adam_q_ on CUDA. Contract: slkernels/optim.h and optim_step.cuh; the same bits as the CPU's.
//
// A warp steps one tile: 256 neighbouring elements, eight a lane, so that a lane's parameters and gradients in bf16 are
// 16 bytes each and its codes 8. All loads of a tile are issued together; nothing is shared between warps but the
// tables that decode and encode, which a block fills once. Blocks stay for the whole launch (one a multiprocessor, 1024
// threads), and their warps take tiles in turns, so that at any time the device reads neighbouring tiles.
//
//   load p, g, codes, scales -> decode -> m', v' and their largest bits -> p' stored -> codes, scales stored
//
// m' / (sqrt(v') / c + eps) is correctly rounded, as on the CPU. Where all operands of a warp are of ordinary size,
// which a vote decides, quotients and roots need no test of their own (ptx/arith.h); elements whose v' is not finite
// are outside that size, so that they too cost nothing until there is one.
#pragma once

#include "cuda/optim_launch.cuh"

namespace slk::cuda {

// A block of threads has the multiprocessor to itself, with the tables once: as many threads as their registers allow,
// 85 a thread, or 128 for the kernels of rarer cases.
template <bool kGeneral>
constexpr int kStepThreads = kGeneral ? 512 : 768;
template <bool kGeneral>
constexpr int kStepWarps = kStepThreads<kGeneral> / kLanes;

enum StepColumn : int { kP, kG, kM, kMScale, kV, kVScale, kLow, kStepColumns };

// The block size that each codec is meant for.
template <Codec kM>
constexpr int kCommonBlock = kM == Codec::cmp8   ? 32
                             : kM == Codec::dyn4 ? 128
                                                 : 256;

// What fits a launch next to StepArgs; and a small table for the small lists of per-layer steps, which is cheaper to
// pass.
constexpr int kLargeTable = (kMaxKernelArguments - 512) / (4 * kStepColumns + 8);
constexpr int kSmallTable = 40;

template <int kCapacity>
struct StepLaunch {
  StepArgs args;
  StepScalars fixed;  // beta1 .. eps; what depends on the device tensors is computed there
  TensorTable<kStepColumns, kCapacity> tensors;
};
static_assert(sizeof(StepLaunch<kLargeTable>) <= kMaxKernelArguments);

// ---- scalars --------------------------------------------------------------------------------------------------------

// What the kernel computes from step, lr and grad_scale, and whether the vote may find operands of ordinary size.
struct LiveScalars {
  float decay, minus_step, inv_sqrt_bias2, inv_grad_scale;
  bool plain_grad, ordinary;
};
__device__ inline LiveScalars live_scalars(const StepArgs& a, float eps) {
  const float grad_scale = a.grad_scale ? *a.grad_scale : 1.0f;
  const StepScalars s = step_scalars(a.options, *a.step, *a.lr, grad_scale, 0.0f, 0.0f);
  return {s.decay,          s.minus_step,
          s.inv_sqrt_bias2, s.inv_grad_scale,
          s.plain_grad,     eps >= 0x1p-40f && eps <= 1.0f && s.inv_sqrt_bias2 >= 1.0f && s.inv_sqrt_bias2 <= 0x1p10f};
}

// ---- a lane's eight elements ----------------------------------------------------------------------------------------

// The largest |m'| and v' as bits, which puts NaN above infinity; and the smallest |m'| that is not 0.
struct Extremes {
  uint32_t m_doubled = 0;  // bits of m' without the sign, times 2
  uint32_t m_least = ~0u;  // the same less 1: 0 becomes the largest
  uint32_t v = 0;
  __device__ void include(float m, float new_v) {
    const uint32_t doubled = __float_as_uint(m) << 1;
    m_doubled = max(m_doubled, doubled);
    m_least = min(m_least, doubled - 1);
    v = max(v, __float_as_uint(new_v));
  }
  // |m'| in {0} and [2^-100, 2^20], v' in [0, 2^30]: with 2^-40 <= eps <= 1 what divide_in_range and root_times_2_48
  // ask.
  __device__ bool ordinary() const {
    constexpr uint32_t kLeast = (127u - 100) << 24, kMost = (127u + 20) << 24, kMostV = (127u + 30) << 23;
    return m_least >= kLeast - 1 && m_doubled <= kMost && v <= kMostV;
  }
  __device__ bool finite() const { return v < kInfinityBits; }
};

template <bool kOrdinary>
__device__ inline float adam_direction(float m, float v, float inv_sqrt_bias2, float eps) {
  if constexpr (kOrdinary) {
    const float root = ptx::root_times_2_48(v);  // inv_sqrt_bias2 is normal after the division too: the same bits
    return ptx::divide_in_range(m, __fmaf_rn(root, inv_sqrt_bias2 * 0x1p-48f, eps));
  } else {
    return __fdiv_rn(m, __fmaf_rn(__fsqrt_rn(v), inv_sqrt_bias2, eps));
  }
}

// Tables in shared memory, and the lane's offset into them.
template <Codec kM>
struct StepTables {
  static constexpr Codec kV = codec::second_moment(kM);
  static constexpr int kWords = kDecodeWords<kM> + kEncodeWords<kM> + kEncodeWords<kV>;
  float* decode;
  uint32_t *encode_m, *encode_v;
  uint32_t lane_bytes;

  __device__ explicit StepTables(uint32_t* words)
      : decode(reinterpret_cast<float*>(words)),
        encode_m(words + kDecodeWords<kM>),
        encode_v(encode_m + kEncodeWords<kM>),
        lane_bytes(threadIdx.x % kLanes * 4) {}
  __device__ void fill() const {
    fill_decode<kM>(decode, 0);
    fill_decode<kV>(decode, 1);
    fill_encode<kM>(encode_m);
    fill_encode<kV>(encode_v);
  }
  __device__ float m(const Codes<kM>& codes, int i, float scale) const {
    return decode_one<kM>(decode, codes, i, lane_bytes, scale);
  }
  __device__ float v(const Codes<kV>& codes, int i, float scale) const {
    return decode_one<kV>(decode, codes, i, lane_bytes + 4 * kLanes, scale);
  }
};

// What a warp knows of the tensor whose tiles it is at. In shared memory, one a warp: pointers cost a load at use
// instead of registers, or of being put together for every tile.
template <class T>
struct TensorView {
  T* p;
  const T* g;
  void *m, *v;
  float *m_scale, *v_scale;
  void* low;
  int64_t n;
  uint32_t first, end;   // tiles
  uint32_t whole_tiles;  // the first that many have all their elements, which may be moved as vectors
  uint16_t index;
  bool float_states;

  // common: see AdamWarp::step_common.
  template <class Table>
  __device__ TensorView(const Table& t, int i, int64_t tile, bool common)
      : p(t.template pointer<T>(kP, i)),
        g(t.template pointer<const T>(kG, i)),
        m(t.template pointer<void>(kM, i)),
        v(t.template pointer<void>(kV, i)),
        m_scale(t.template pointer<float>(kMScale, i)),
        v_scale(t.template pointer<float>(kVScale, i)),
        low(t.template pointer<void>(kLow, i)),
        n((t.first[i + 1] - t.first[i]) * tile - (t.missing[i] & kMissingMask)),
        first(t.first[i]),
        end(t.first[i + 1]),
        whole_tiles(common && (t.missing[i] & kAligned) ? uint32_t(n / tile) : 0),
        index(t.index[i]),
        float_states(t.missing[i] & kFloatStates) {}
};

template <class T>
constexpr bool kIsBf16 = std::is_same_v<T, __nv_bfloat16>;

// Eight parameters: bits of T, and of the master's remainder.
template <class T>
struct Params {
  Eight<T> high;
  Eight<uint16_t> low;  // low8: sign-extended

  __device__ void load(const TensorView<T>& t, MasterBits master, const Part& part, bool whole) {
    high = load8(global(t.p) + part.first, part.count, whole);
    if constexpr (kIsBf16<T>) {
      if (master == MasterBits::low16) {
        const auto* p = global(static_cast<const uint16_t*>(t.low)) + part.first;
        low = load8(p, part.count, part.count == kLaneElements && can_move_whole(p));
      } else if (master == MasterBits::low8) {
        const auto* p = global(static_cast<const uint8_t*>(t.low)) + part.first;
        const Eight<uint8_t> bytes = load8(p, part.count, part.count == kLaneElements && can_move_whole(p));
#pragma unroll
        for (int i = 0; i < 4; ++i) low.word[i] = ptx::prmt(bytes.word[i / 2], 0, i % 2 ? 0xb3a2 : 0x9180);
      }
    }
  }
  __device__ void load_unit(const TensorView<T>& t, uint32_t unit) { high = cuda::load_unit(global(t.p), unit); }
  __device__ void store_unit(const TensorView<T>& t, uint32_t unit) const { cuda::store_unit(global(t.p), unit, high); }
  __device__ float get(MasterBits master, int i) const {
    if constexpr (kIsBf16<T>) {
      if (master != MasterBits::none) {
        const auto h = uint16_t(high.word[i / 2] >> i % 2 * 16), l = uint16_t(low.word[i / 2] >> i % 2 * 16);
        return master == MasterBits::low16 ? codec::join_master16(h, int16_t(l)) : codec::join_master8(h, int8_t(l));
      }
    }
    return element(high, i);
  }
  __device__ void set(MasterBits master, bool stochastic, int i, float x, uint32_t random) {
    if constexpr (kIsBf16<T>) {
      const auto put = [i](auto& eight, uint32_t bits) {
        uint32_t& word = eight.word[i / 2];
        word = i % 2 ? (word & 0xffffu) | bits << 16 : (word & 0xffff0000u) | (bits & 0xffffu);
      };
      if (master != MasterBits::none) {
        const codec::Master split = master == MasterBits::low16 ? codec::split_master16(x)
                                    : stochastic                ? codec::split_master8_stochastic(x, random)
                                                                : codec::split_master8(x);
        put(high, split.high);
        put(low, uint16_t(split.low));
      } else {
        put(high, codec::round_bf16_stochastic(x, random));
      }
    }
  }
  __device__ void store(const TensorView<T>& t, MasterBits master, const Part& part, bool whole) const {
    store8(global(t.p) + part.first, high, part.count, whole);
    if constexpr (kIsBf16<T>) {
      if (master == MasterBits::low16) {
        auto* p = global(static_cast<uint16_t*>(t.low)) + part.first;
        store8(p, low, part.count, part.count == kLaneElements && can_move_whole(p));
      } else if (master == MasterBits::low8) {
        Eight<uint8_t> bytes;
        for (int w = 0; w < 2; ++w) bytes.word[w] = ptx::prmt(low.word[2 * w], low.word[2 * w + 1], 0x6420);
        auto* p = global(static_cast<uint8_t*>(t.low)) + part.first;
        store8(p, bytes, part.count, part.count == kLaneElements && can_move_whole(p));
      }
    }
  }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

// kGeneral: blocks of more than 256 elements, master bits, stochastic rounding. The other half of the kernels has none
// of their code and registers.
template <Codec kM, class T, bool kGeneral, int kCapacity>
class AdamWarp {
 public:
  static constexpr Codec kV = codec::second_moment(kM);
  static constexpr int kCommonLanes = kCommonBlock<kM> / kLaneElements;
  using Launch = StepLaunch<kCapacity>;
  using View = TensorView<T>;

  __device__ AdamWarp(const Launch& launch, const LiveScalars& live, const StepTables<kM>& tables, View* view)
      : l_(launch), s_(live), tables_(tables), lanes_(launch.args.block), view_(view) {}

  __device__ void run(uint32_t tile, uint32_t stride) const {
    const bool large = kGeneral && l_.args.block > kChunkElements;
    const int64_t tile_size = large ? l_.args.block : lanes_.blocks * l_.args.block;
    const bool common = lanes_.of_block == kCommonLanes && l_.args.block <= kChunkElements && !special_rounding();
    const uint32_t tiles = l_.tensors.first[l_.tensors.count];
    uint32_t end = 0;
    for (int i = 0; tile < tiles; tile += stride) {
      if (tile >= end) {
        i = l_.tensors.find(i, tile);
        __syncwarp();
        if (threadIdx.x % kLanes == 0) *view_ = View(l_.tensors, i, tile_size, common);
        __syncwarp();
        end = view_->end;
      }
      const View& t = *view_;
      const uint32_t at = tile - t.first;
      if (t.float_states) {
        step_floats(t, at * tile_size, (at + 1) * tile_size);
      } else if (large) {
        step_large_block(t, at);
      } else if (at < t.whole_tiles) {
        step_common(t, at);
      } else {
        step_blocks(t, at);
      }
    }
  }

 private:
  struct Moments {
    float m[kLaneElements], v[kLaneElements];
  };

  __device__ MasterBits master() const { return kGeneral ? l_.args.master : MasterBits::none; }
  __device__ bool special_rounding() const {
    return kGeneral && kIsBf16<T> && (l_.args.stochastic || l_.args.master != MasterBits::none);
  }

  __device__ float gradient(const Params<T>& p, const Eight<T>& g, int i) const {
    const float x = element(g, i);
    return s_.plain_grad ? x : __fmaf_rn(l_.fixed.l2, p.get(master(), i), __fmul_rn(x, s_.inv_grad_scale));
  }
  __device__ void advance(float& m, float& v, float g) const {
    m = __fmaf_rn(l_.fixed.beta1, m, __fmul_rn(l_.fixed.one_minus_beta1, g));
    v = __fmaf_rn(l_.fixed.beta2, v, __fmul_rn(__fmul_rn(l_.fixed.one_minus_beta2, g), g));
  }

  // p' of all elements.
  template <bool kOrdinary>
  __device__ void update(Params<T>& p, const Moments& x, const View& t, const Part& part) const {
    const auto next = [&](int i, float old) {
      const float d = adam_direction<kOrdinary>(x.m[i], x.v[i], s_.inv_sqrt_bias2, l_.fixed.eps);
      return __fmaf_rn(s_.minus_step, d, __fmul_rn(old, s_.decay));
    };
    if (special_rounding()) {
      Philox bits = {};
      if (l_.args.stochastic) {
        const RoundingBits source = {uint64_t(*l_.args.seed), uint32_t(int64_t(*l_.args.step))};
        bits = source.draw(t.index, part.first / kLaneElements);
      }
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        p.set(master(), l_.args.stochastic, i, next(i, p.get(master(), i)), bits.word[i / 2] >> i % 2 * 16 & 0xffffu);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElements; i += 2)
        set_pair(p.high, i / 2, next(i, element(p.high, i)), next(i + 1, element(p.high, i + 1)));
    }
  }

  // Moments that are not finite go back to their old values.
  template <class OldM, class OldV>
  __device__ void keep_old(Moments& x, Extremes& extremes, const Part& part, bool counted, OldM old_m,
                           OldV old_v) const {
    int kept = 0;
    extremes = Extremes();
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (__float_as_uint(x.v[i]) >= kInfinityBits) {
        x.m[i] = old_m(i);
        x.v[i] = old_v(i);
        kept += i < part.count;
      }
      extremes.include(x.m[i], x.v[i]);
    }
    if (counted && kept && l_.args.nonfinite) atomicAdd(reinterpret_cast<unsigned long long*>(l_.args.nonfinite), kept);
  }

  // Quantized elements as they are loaded, and their new moments.
  struct Chunk {
    Params<T> p;
    Eight<T> g;
    Codes<kM> m_codes;
    Codes<kV> v_codes;
    Moments x;
    Extremes extremes;
  };
  __device__ void load(Chunk& c, const View& t, const Part& part, bool whole) const {
    c.p.load(t, master(), part, whole);
    c.g = load8(global(t.g) + part.first, part.count, whole);
    c.m_codes = load_codes<kM>(global(static_cast<const uint8_t*>(t.m)), part.first, part.count, whole);
    c.v_codes = load_codes<kV>(global(static_cast<const uint8_t*>(t.v)), part.first, part.count, whole);
  }
  __device__ void make_moments(Chunk& c, float m_scale, float v_scale, const Part& part, bool whole) const {
    c.extremes = Extremes();
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      c.x.m[i] = tables_.m(c.m_codes, i, m_scale);
      c.x.v[i] = tables_.v(c.v_codes, i, v_scale);
      advance(c.x.m[i], c.x.v[i], gradient(c.p, c.g, i));
      if (!whole && i >= part.count) c.x.m[i] = c.x.v[i] = 0;  // code 0 stood for nothing
      c.extremes.include(c.x.m[i], c.x.v[i]);
    }
  }
  __device__ void keep_old(Chunk& c, float m_scale, float v_scale, const Part& part, bool counted) const {
    if (c.extremes.finite()) return;
    keep_old(
        c.x, c.extremes, part, counted, [&](int i) { return tables_.m(c.m_codes, i, m_scale); },
        [&](int i) { return tables_.v(c.v_codes, i, v_scale); });
  }
  // p', and moments that stay.
  __device__ void step_chunk(Chunk& c, const View& t, float m_scale, float v_scale, const Part& part) const {
    if (__all_sync(kAllLanes, s_.ordinary && c.extremes.ordinary())) {
      update<true>(c.p, c.x, t, part);
    } else {
      update<false>(c.p, c.x, t, part);
      keep_old(c, m_scale, v_scale, part, true);
    }
  }
  __device__ void store_codes_of(Chunk& c, const View& t, const Part& part, bool whole, const BlockCoding<kM>& m_coding,
                                 const BlockCoding<kV>& v_coding) const {
    store_codes<kM>(global(static_cast<uint8_t*>(t.m)), part.first, part.count, whole,
                    m_coding.encode(tables_.encode_m, c.x.m));
    store_codes<kV>(global(static_cast<uint8_t*>(t.v)), part.first, part.count, whole,
                    v_coding.encode(tables_.encode_v, c.x.v));
  }
  __device__ void store_scales(const View& t, int64_t block, const BlockCoding<kM>& m_coding,
                               const BlockCoding<kV>& v_coding) const {
    global(t.m_scale)[block] = m_coding.scale();
    global(t.v_scale)[block] = v_coding.scale();
  }
  // Tile `tile` of whole blocks, in the common case: every lane has eight elements, which move as vectors.
  __device__ void step_common(const View& t, uint32_t tile) const {
    const uint32_t lane = threadIdx.x % kLanes, unit = tile * kLanes + lane, block = unit / kCommonLanes;
    Chunk c;
    c.p.load_unit(t, unit);
    c.g = load_unit(global(t.g), unit);
    c.m_codes = load_codes_unit<kM>(t.m, unit);
    c.v_codes = load_codes_unit<kV>(t.v, unit);
    const float m_scale = global(t.m_scale)[block], v_scale = global(t.v_scale)[block];
    make_moments(c, m_scale, v_scale, {}, true);
    step_chunk(c, t, m_scale, v_scale, {int64_t(unit) * kLaneElements, kLaneElements});
    c.p.store_unit(t, unit);
    const uint32_t m_largest = max_of_lanes<kCommonLanes>(c.extremes.m_doubled) >> 1;
    const uint32_t v_largest = max_of_lanes<kCommonLanes>(c.extremes.v);
    const auto store = [&](const auto& m_coding, const auto& v_coding) {
      if (lane % kCommonLanes == 0) {
        global(t.m_scale)[block] = m_coding.scale();
        global(t.v_scale)[block] = v_coding.scale();
      }
      store_codes_unit<kM>(t.m, unit, m_coding.encode(tables_.encode_m, c.x.m));
      store_codes_unit<kV>(t.v, unit, v_coding.encode(tables_.encode_v, c.x.v));
    };
    if (kIsDyn8<kM> && __all_sync(kAllLanes, dyn8_plain(m_largest) && dyn8_plain(v_largest))) {
      store(BlockCoding<kM, true>(m_largest), BlockCoding<kV, true>(v_largest));
    } else {
      store(BlockCoding<kM>(m_largest), BlockCoding<kV>(v_largest));
    }
  }

  // Any tile of blocks of at most 256 elements.
  __device__ void step_blocks(const View& t, uint32_t tile) const {
    const int64_t block = int64_t(tile) * lanes_.blocks + lanes_.group, start = block * l_.args.block;
    const bool here = !lanes_.idle() && start < t.n;
    const Part part = part_of(t.n, start + lanes_.at * kLaneElements, here ? start + l_.args.block : start);
    const float m_scale = here ? global(t.m_scale)[block] : 0.0f, v_scale = here ? global(t.v_scale)[block] : 0.0f;
    Chunk c;
    load(c, t, part, false);
    make_moments(c, m_scale, v_scale, part, false);
    step_chunk(c, t, m_scale, v_scale, part);
    c.p.store(t, master(), part, false);
    const BlockCoding<kM> m_coding(lanes_.max(c.extremes.m_doubled) >> 1);
    const BlockCoding<kV> v_coding(lanes_.max(c.extremes.v));
    if (here && lanes_.at == 0) store_scales(t, block, m_coding, v_coding);
    store_codes_of(c, t, part, false, m_coding, v_coding);
  }

  // One larger block: once for its scales, once more for everything else.
  __device__ void step_large_block(const View& t, int64_t block) const {
    const int64_t start = block * l_.args.block, end = start + l_.args.block;
    const float m_scale = global(t.m_scale)[block], v_scale = global(t.v_scale)[block];
    const auto part_at = [&](int at) { return part_of(t.n, start + at + lanes_.at * kLaneElements, end); };
    Chunk c;
    Extremes all;
    for (int at = 0; at < l_.args.block; at += kChunkElements) {
      const Part part = part_at(at);
      load(c, t, part, false);
      make_moments(c, m_scale, v_scale, part, false);
      keep_old(c, m_scale, v_scale, part, false);
      all.m_doubled = max(all.m_doubled, c.extremes.m_doubled);
      all.v = max(all.v, c.extremes.v);
    }
    const BlockCoding<kM> m_coding(lanes_.max(all.m_doubled) >> 1);
    const BlockCoding<kV> v_coding(lanes_.max(all.v));
    for (int at = 0; at < l_.args.block; at += kChunkElements) {
      const Part part = part_at(at);
      load(c, t, part, false);
      make_moments(c, m_scale, v_scale, part, false);
      step_chunk(c, t, m_scale, v_scale, part);
      c.p.store(t, master(), part, false);
      store_codes_of(c, t, part, false, m_coding, v_coding);
    }
    if (lanes_.at == 0) store_scales(t, block, m_coding, v_coding);
  }

  // Elements whose moments are fp32.
  __device__ void step_floats(const View& t, int64_t first, int64_t end) const {
    for (first += threadIdx.x % kLanes * kLaneElements; first < end && first < t.n; first += kChunkElements) {
      const Part part = part_of(t.n, first, end);
      float* const m_at = global(static_cast<float*>(t.m)) + first;
      float* const v_at = global(static_cast<float*>(t.v)) + first;
      const bool whole = part.count == kLaneElements && can_move_whole(t.p + first) && can_move_whole(t.g + first) &&
                         can_move_whole(m_at) && can_move_whole(v_at);
      Params<T> p;
      p.load(t, master(), part, whole);
      const Eight<T> g = load8(global(t.g) + first, part.count, whole);
      Eight<float> m = load8(m_at, part.count, whole), v = load8(v_at, part.count, whole);
      Moments x;
      Extremes extremes;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        x.m[i] = element(m, i);
        x.v[i] = element(v, i);
        advance(x.m[i], x.v[i], gradient(p, g, i));
        extremes.include(x.m[i], x.v[i]);
      }
      update<false>(p, x, t, part);
      if (!extremes.finite())
        keep_old(x, extremes, part, true, [&](int i) { return element(m, i); }, [&](int i) { return element(v, i); });
      p.store(t, master(), part, whole);
      store8(m_at, rounded<float>(x.m), part.count, whole);
      store8(v_at, rounded<float>(x.v), part.count, whole);
    }
  }

  const Launch& l_;
  const LiveScalars& s_;
  const StepTables<kM>& tables_;
  const Lanes lanes_;
  View* const view_;
};

// Tables, a view of a tensor for each warp, LiveScalars.
template <Codec kM, bool kGeneral>
constexpr size_t kStepSharedBytes =
    StepTables<kM>::kWords * sizeof(uint32_t) + kStepWarps<kGeneral> * sizeof(TensorView<float>) + sizeof(LiveScalars);

template <Codec kM, class T, bool kGeneral, int kCapacity>
__global__ void __launch_bounds__(kStepThreads<kGeneral>, 1)
    adam_kernel(const __grid_constant__ StepLaunch<kCapacity> launch) {
  if (launch.args.found_inf && *launch.args.found_inf != 0) return;
  using Warp = AdamWarp<kM, T, kGeneral, kCapacity>;
  uint32_t* const words = dynamic_shared<uint32_t>();  // kStepSharedBytes
  const StepTables<kM> tables(words);
  auto* const views = reinterpret_cast<typename Warp::View*>(words + StepTables<kM>::kWords);
  auto* const shared = reinterpret_cast<LiveScalars*>(views + kStepWarps<kGeneral>);
  tables.fill();
  if (threadIdx.x == 0) *shared = live_scalars(launch.args, launch.fixed.eps);
  __syncthreads();
  const LiveScalars live = *shared;
  // Neighbouring tiles go to different multiprocessors, so that a short list keeps all of them busy.
  Warp(launch, live, tables, views + threadIdx.x / kLanes)
      .run(threadIdx.x / kLanes * gridDim.x + blockIdx.x, gridDim.x * kStepWarps<kGeneral>);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

using StepBuilder = TableBuilder<kStepColumns, kLargeTable>;

template <Codec kM, class T, bool kGeneral, int kCapacity>
cudaError_t launch_adam_table(const StepBuilder& builder, const StepArgs& args, cudaStream_t stream) {
  const auto kernel = adam_kernel<kM, T, kGeneral, kCapacity>;
  const auto launched = std::make_unique<StepLaunch<kCapacity>>();
  launched->args = args;
  launched->fixed = step_scalars(args.options, 1, 1, 1, 0, 0);
  builder.write(launched->tensors);
  dim3 grid;
  if (const cudaError_t error = step_grid(builder.tiles(), grid); error != cudaSuccess) return error;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kStepSharedBytes<kM, kGeneral>));
  return error != cudaSuccess
             ? error
             : launch(kernel, grid, kStepThreads<kGeneral>, kStepSharedBytes<kM, kGeneral>, stream, *launched);
}

template <Codec kM, class T>
cudaError_t launch_adam_of(DType dtype, const StepTensor* tensors, int64_t count, const StepArgs& args,
                           cudaStream_t stream) {
  const bool general = args.block > kChunkElements || args.stochastic || args.master != MasterBits::none;
  const auto builder = std::make_unique<StepBuilder>(tile_elements(args.block));
  const auto entry = [](const StepTensor& t, int64_t i) -> StepBuilder::Entry {
    const bool aligned = can_move_whole(static_cast<const T*>(t.p)) && can_move_whole(static_cast<const T*>(t.g)) &&
                         can_move_codes<kM>(static_cast<const uint8_t*>(t.m)) &&
                         can_move_codes<kM>(static_cast<const uint8_t*>(t.v));
    return {{address_of(t.p), address_of(t.g), address_of(t.m), address_of(t.m_scale), address_of(t.v),
             address_of(t.v_scale), address_of(t.master_lo)},
            t.n,
            uint16_t(i),
            uint16_t((t.m_scale ? 0 : kFloatStates) | (aligned ? kAligned : 0))};
  };
  return in_tables(*builder, tensors, count, dtype, entry, [&] {
    if (general) return launch_adam_table<kM, T, true, kLargeTable>(*builder, args, stream);
    if constexpr (kM == Codec::dyn8)
      if (builder->count() <= kSmallTable) return launch_adam_table<kM, T, false, kSmallTable>(*builder, args, stream);
    return launch_adam_table<kM, T, false, kLargeTable>(*builder, args, stream);
  });
}

// Defined by one file a codec.
template <Codec kM>
cudaError_t launch_adam_codec(const StepTensor* tensors, int64_t count, const StepArgs& args, cudaStream_t stream);

#define SLK_ADAM_OF_CODEC(kM)                                                                                       \
  template <>                                                                                                       \
  cudaError_t launch_adam_codec<kM>(const StepTensor* tensors, int64_t count, const StepArgs& args,                 \
                                    cudaStream_t stream) {                                                          \
    cudaError_t error = launch_adam_of<kM, float>(DType::f32, tensors, count, args, stream);                        \
    if (error == cudaSuccess) error = launch_adam_of<kM, __nv_bfloat16>(DType::bf16, tensors, count, args, stream); \
    if (error == cudaSuccess) error = launch_adam_of<kM, __half>(DType::f16, tensors, count, args, stream);         \
    return error;                                                                                                   \
  }

}  // namespace slk::cuda
