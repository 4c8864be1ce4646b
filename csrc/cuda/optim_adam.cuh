// adam_q_ in its common form: parameters rounded to nearest, blocks of at most 256 elements. Contract:
// slkernels/optim.h and optim_step.cuh; the same bits as the CPU's. Everything else is in csrc/cuda/optim_step.cuh.
//
// A warp steps one tile: 256 neighbouring elements, eight a lane, so that a lane's parameters and gradients in bf16 are
// 16 bytes each and its codes 8. All loads of a tile are issued together; nothing is shared between warps but the
// tables that decode and encode, which a block fills once. Blocks stay for the whole launch (one a multiprocessor), and
// their warps take tiles in turns, so that at any time the device reads neighbouring tiles.
//
//   load p, g, codes, scales -> decode -> m', v' and their largest bits -> p' stored -> codes, scales stored
//
// m' / (sqrt(v') / c + eps) is correctly rounded, as on the CPU. Where all operands of a warp are of ordinary size,
// which a vote decides, quotients and roots need no test of their own (ptx/arith.h); elements whose v' is not finite
// are outside that size, so that they too cost nothing until there is one.
#pragma once

#include "cuda/optim_launch.cuh"

namespace slk::cuda {

// A block of threads has the multiprocessor to itself, with the tables once; 85 registers a thread.
constexpr int kAdamThreads = 768;
constexpr int kAdamWarps = kAdamThreads / kLanes;

// The block size that each codec is meant for.
template <Codec kM>
constexpr int kCommonBlock = kM == Codec::cmp8   ? 32
                             : kM == Codec::dyn4 ? 128
                                                 : 256;

// What fits a launch next to StepArgs; and a small table for the small lists of per-layer steps, cheaper to pass.
constexpr int kLargeTable = (kMaxKernelArguments - 512) / (4 * kAdamColumns + 8);
constexpr int kSmallTable = 40;

template <int kCapacity>
struct AdamLaunch {
  StepArgs args;
  StepScalars fixed;  // beta1 .. l2; what depends on the device tensors is computed there
  TensorTable<kAdamColumns, kCapacity> tensors;
};
static_assert(sizeof(AdamLaunch<kLargeTable>) <= kMaxKernelArguments);

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

// What a warp knows of the tensor whose tiles it is at. In shared memory, one a warp: pointers cost a load at use
// instead of registers, or of being put together for every tile.
template <class T>
struct TensorView {
  T* p;
  const T* g;
  void *m, *v;
  float *m_scale, *v_scale;
  int64_t n;
  uint32_t first, end;   // tiles
  uint32_t whole_tiles;  // the first that many have all their elements, which may be moved as vectors
  bool float_states;

  // common: see AdamWarp::step_common.
  template <class Table>
  __device__ TensorView(const Table& t, int i, int64_t tile, bool common)
      : p(t.template pointer<T>(kP, i)),
        g(t.template pointer<const T>(kG, i)),
        m(t.template pointer<void>(kMState, i)),
        v(t.template pointer<void>(kVState, i)),
        m_scale(t.template pointer<float>(kMScale, i)),
        v_scale(t.template pointer<float>(kVScale, i)),
        n((t.first[i + 1] - t.first[i]) * tile - (t.missing[i] & kMissingMask)),
        first(t.first[i]),
        end(t.first[i + 1]),
        whole_tiles(common && (t.missing[i] & kAligned) ? uint32_t(n / tile) : 0),
        float_states(t.missing[i] & kFloatStates) {}
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <Codec kM, class T, int kCapacity>
class AdamWarp {
 public:
  static constexpr Codec kV = codec::second_moment(kM);
  static constexpr int kCommonLanes = kCommonBlock<kM> / kLaneElements;
  using Launch = AdamLaunch<kCapacity>;
  using View = TensorView<T>;

  __device__ AdamWarp(const Launch& launch, const LiveScalars& live, const StepTables<kM>& tables, View* view)
      : l_(launch), s_(live), tables_(tables), lanes_(launch.args.block), view_(view) {}

  __device__ void run(uint32_t tile, uint32_t stride) const {
    const int tile_size = lanes_.blocks * l_.args.block;
    const uint32_t tiles = l_.tensors.first[l_.tensors.count];
    uint32_t end = 0;
    for (int i = 0; tile < tiles; tile += stride) {
      if (tile >= end) {
        i = l_.tensors.find(i, tile);
        __syncwarp();
        if (threadIdx.x % kLanes == 0) *view_ = View(l_.tensors, i, tile_size, lanes_.of_block == kCommonLanes);
        __syncwarp();
        end = view_->end;
      }
      const View& t = *view_;
      const uint32_t at = tile - t.first;
      if (t.float_states) {
        step_floats(t, int64_t(at) * tile_size, tile_size);
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

  __device__ float gradient(const Eight<T>& p, const Eight<T>& g, int i) const {
    const float x = element(g, i);
    return s_.plain_grad ? x : __fmaf_rn(l_.fixed.l2, element(p, i), __fmul_rn(x, s_.inv_grad_scale));
  }
  __device__ void advance(float& m, float& v, float g) const {
    m = __fmaf_rn(l_.fixed.beta1, m, __fmul_rn(l_.fixed.one_minus_beta1, g));
    v = __fmaf_rn(l_.fixed.beta2, v, __fmul_rn(__fmul_rn(l_.fixed.one_minus_beta2, g), g));
  }

  template <bool kOrdinary>
  __device__ void update(Eight<T>& p, const Moments& x) const {
    const auto next = [&](int i) {
      const float d = adam_direction<kOrdinary>(x.m[i], x.v[i], s_.inv_sqrt_bias2, l_.fixed.eps);
      return __fmaf_rn(s_.minus_step, d, __fmul_rn(element(p, i), s_.decay));
    };
#pragma unroll
    for (int i = 0; i < kLaneElements; i += 2) {
      const float low = next(i), high = next(i + 1);
      set_pair(p, i / 2, low, high);
    }
  }

  // Moments that are not finite go back to their old values.
  template <class OldM, class OldV>
  __device__ void keep_old(Moments& x, Extremes& extremes, int count, OldM old_m, OldV old_v) const {
    int kept = 0;
    extremes = Extremes();
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (__float_as_uint(x.v[i]) >= kInfinityBits) {
        x.m[i] = old_m(i);
        x.v[i] = old_v(i);
        kept += i < count;
      }
      extremes.include(x.m[i], x.v[i]);
    }
    if (kept && l_.args.nonfinite) atomicAdd(reinterpret_cast<unsigned long long*>(l_.args.nonfinite), kept);
  }

  // Quantized elements as they are loaded, and their new moments.
  struct Chunk {
    Eight<T> p, g;
    Codes<kM> m_codes;
    Codes<kV> v_codes;
    Moments x;
    Extremes extremes;
  };
  __device__ void make_moments(Chunk& c, float m_scale, float v_scale, int count) const {
    c.extremes = Extremes();
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      c.x.m[i] = tables_.m(c.m_codes, i, m_scale);
      c.x.v[i] = tables_.v(c.v_codes, i, v_scale);
      advance(c.x.m[i], c.x.v[i], gradient(c.p, c.g, i));
      if (i >= count) c.x.m[i] = c.x.v[i] = 0;  // code 0 stood for nothing
      c.extremes.include(c.x.m[i], c.x.v[i]);
    }
  }
  // p', and moments that stay.
  __device__ void step_chunk(Chunk& c, float m_scale, float v_scale, int count) const {
    if (__all_sync(kAllLanes, s_.ordinary && c.extremes.ordinary())) {
      update<true>(c.p, c.x);
    } else {
      update<false>(c.p, c.x);
      if (!c.extremes.finite())
        keep_old(
            c.x, c.extremes, count, [&](int i) { return tables_.m(c.m_codes, i, m_scale); },
            [&](int i) { return tables_.v(c.v_codes, i, v_scale); });
    }
  }

  // Tile `tile` of whole blocks, in the common case: every lane has eight elements, which move as vectors.
  __device__ void step_common(const View& t, uint32_t tile) const {
    const uint32_t lane = threadIdx.x % kLanes, unit = tile * kLanes + lane, block = unit / kCommonLanes;
    Chunk c;
    c.p = load_unit(global(t.p), unit);
    c.g = load_unit(global(t.g), unit);
    c.m_codes = load_codes_unit<kM>(t.m, unit);
    c.v_codes = load_codes_unit<kV>(t.v, unit);
    const float m_scale = global(t.m_scale)[block], v_scale = global(t.v_scale)[block];
    make_moments(c, m_scale, v_scale, kLaneElements);
    step_chunk(c, m_scale, v_scale, kLaneElements);
    store_unit(global(t.p), unit, c.p);
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
    auto* const m_at = global(static_cast<uint8_t*>(t.m));
    auto* const v_at = global(static_cast<uint8_t*>(t.v));
    Chunk c;
    c.p = load8(global(t.p) + part.first, part.count, false);
    c.g = load8(global(t.g) + part.first, part.count, false);
    c.m_codes = load_codes<kM>(m_at, part.first, part.count, false);
    c.v_codes = load_codes<kV>(v_at, part.first, part.count, false);
    make_moments(c, m_scale, v_scale, part.count);
    step_chunk(c, m_scale, v_scale, part.count);
    store8(global(t.p) + part.first, c.p, part.count, false);
    const BlockCoding<kM> m_coding(lanes_.max(c.extremes.m_doubled) >> 1);
    const BlockCoding<kV> v_coding(lanes_.max(c.extremes.v));
    if (here && lanes_.at == 0) {
      global(t.m_scale)[block] = m_coding.scale();
      global(t.v_scale)[block] = v_coding.scale();
    }
    store_codes<kM>(m_at, part.first, part.count, false, m_coding.encode(tables_.encode_m, c.x.m));
    store_codes<kV>(v_at, part.first, part.count, false, v_coding.encode(tables_.encode_v, c.x.v));
  }

  // A tile whose moments are fp32.
  __device__ void step_floats(const View& t, int64_t first, int tile_size) const {
    const int at = threadIdx.x % kLanes * kLaneElements;
    if (at >= tile_size) return;
    const Part part = part_of(t.n, first + at, first + tile_size);
    T* const p_at = global(t.p) + part.first;
    const T* const g_at = global(t.g) + part.first;
    float* const m_at = global(static_cast<float*>(t.m)) + part.first;
    float* const v_at = global(static_cast<float*>(t.v)) + part.first;
    const bool whole = part.count == kLaneElements && can_move_whole(p_at) && can_move_whole(g_at) &&
                       can_move_whole(m_at) && can_move_whole(v_at);
    Eight<T> p = load8(p_at, part.count, whole);
    const Eight<T> g = load8(g_at, part.count, whole);
    const Eight<float> m = load8(m_at, part.count, whole), v = load8(v_at, part.count, whole);
    Moments x;
    Extremes extremes;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      x.m[i] = element(m, i);
      x.v[i] = element(v, i);
      advance(x.m[i], x.v[i], gradient(p, g, i));
      extremes.include(x.m[i], x.v[i]);
    }
    update<false>(p, x);
    if (!extremes.finite())
      keep_old(x, extremes, part.count, [&](int i) { return element(m, i); }, [&](int i) { return element(v, i); });
    store8(p_at, p, part.count, whole);
    store8(m_at, rounded<float>(x.m), part.count, whole);
    store8(v_at, rounded<float>(x.v), part.count, whole);
  }

  const Launch& l_;
  const LiveScalars& s_;
  const StepTables<kM>& tables_;
  const Lanes lanes_;
  View* const view_;
};

// Tables, a view of a tensor for each warp, LiveScalars.
template <Codec kM>
constexpr size_t kAdamSharedBytes =
    StepTables<kM>::kWords * sizeof(uint32_t) + kAdamWarps * sizeof(TensorView<float>) + sizeof(LiveScalars);

template <Codec kM, class T, int kCapacity>
__global__ void __launch_bounds__(kAdamThreads, 1) adam_kernel(const __grid_constant__ AdamLaunch<kCapacity> launch) {
  if (launch.args.found_inf && *launch.args.found_inf != 0) return;
  using Warp = AdamWarp<kM, T, kCapacity>;
  uint32_t* const words = dynamic_shared<uint32_t>();  // kAdamSharedBytes
  const StepTables<kM> tables(words);
  auto* const views = reinterpret_cast<typename Warp::View*>(words + StepTables<kM>::kWords);
  auto* const shared = reinterpret_cast<LiveScalars*>(views + kAdamWarps);
  tables.fill();
  if (threadIdx.x == 0) *shared = live_scalars(launch.args, launch.fixed.eps);
  __syncthreads();
  const LiveScalars live = *shared;
  // Neighbouring tiles go to different multiprocessors, so that a short list keeps all of them busy.
  Warp(launch, live, tables, views + threadIdx.x / kLanes)
      .run(threadIdx.x / kLanes * gridDim.x + blockIdx.x, gridDim.x * kAdamWarps);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

inline bool is_common_adam(const StepKind& kind, const StepArgs& args) {
  const bool stochastic = args.random && kind.dtype != DType::f32;
  return args.options.rule == Rule::adam && args.block <= kChunkElements && !stochastic && kind.low_bits == 0;
}

using AdamBuilder = TableBuilder<kAdamColumns, kLargeTable>;

template <Codec kM, class T, int kCapacity>
cudaError_t launch_adam_table(const AdamBuilder& builder, const StepArgs& args, cudaStream_t stream) {
  const auto launched = std::make_unique<AdamLaunch<kCapacity>>();
  launched->args = args;
  launched->fixed = step_scalars(args.options, 1, 1, 1, 0, 0);
  builder.write(launched->tensors);
  return launch_grid(adam_kernel<kM, T, kCapacity>, builder.tiles(), kAdamThreads, kAdamSharedBytes<kM>, stream,
                     *launched);
}

template <Codec kM, class T>
cudaError_t launch_adam_of(const StepKind& kind, const StepTensor* tensors, int64_t count, const StepArgs& args,
                           cudaStream_t stream) {
  const auto builder = std::make_unique<AdamBuilder>(tile_elements(args.block));
  const auto entry = [](const StepTensor& t) -> AdamBuilder::Entry {
    const bool aligned = can_move_whole(static_cast<const T*>(t.p)) && can_move_whole(static_cast<const T*>(t.g)) &&
                         can_move_codes<kM>(static_cast<const uint8_t*>(t.m.data)) &&
                         can_move_codes<kM>(static_cast<const uint8_t*>(t.v.data));
    return {{address_of(t.p), address_of(t.g), address_of(t.m.data), address_of(t.m.scale), address_of(t.v.data),
             address_of(t.v.scale)},
            t.n,
            uint16_t(t.index),
            uint16_t((t.m.scale ? 0 : kFloatStates) | (aligned ? kAligned : 0))};
  };
  return in_tables(*builder, tensors, count, kind, entry, [&] {
    if constexpr (kM == Codec::dyn8)
      if (builder->count() <= kSmallTable) return launch_adam_table<kM, T, kSmallTable>(*builder, args, stream);
    return launch_adam_table<kM, T, kLargeTable>(*builder, args, stream);
  });
}

template <Codec kM>
cudaError_t launch_common_adam(const StepKind& kind, const StepTensor* tensors, int64_t count, const StepArgs& args,
                               cudaStream_t stream) {
  switch (kind.dtype) {
    case DType::f32:
      return launch_adam_of<kM, float>(kind, tensors, count, args, stream);
    case DType::bf16:
      return launch_adam_of<kM, __nv_bfloat16>(kind, tensors, count, args, stream);
    default:
      return launch_adam_of<kM, __half>(kind, tensors, count, args, stream);
  }
}

}  // namespace slk::cuda
