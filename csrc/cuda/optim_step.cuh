// The multi-tensor steps that are not the common AdamW: adam_q_dir_, ademamix_q_ and momentum_q_, and adam_q_ with
// master remainders, stochastic rounding, or blocks of more than 256 elements. Contracts: slkernels/optim.h and
// optim_step.cuh; the same bits as the CPU's.
//
// Tiles, tables and memory are as in optim_adam.cuh, which has what makes it fast. Here one kernel a codec and family
// serves every dtype, rule and rounding: what differs is a branch of the whole warp.
#pragma once

#include "cuda/optim_launch.cuh"

namespace slk::cuda {

// What a kernel is compiled for. momentum: all rules with one moment.
enum class Family : int { adam, direction, ademamix, momentum };

constexpr bool has_v(Family f) {
  return f != Family::momentum;
}

constexpr int kStepThreads = 512;  // 128 registers a thread
constexpr int kStepWarps = kStepThreads / kLanes;

template <Family kFamily>
constexpr int kStepColumns = kFamily == Family::ademamix ? kAdamColumns + 2 : kAdamColumns;
enum SlowColumn : int { kSlow = kAdamColumns, kSlowScale };

template <Family kFamily>
constexpr int kStepTable = (kMaxKernelArguments - 512) / (4 * kStepColumns<kFamily> + 8);

template <Family kFamily>
struct StepLaunch {
  StepArgs args;
  DType dtype, out_dtype;
  int low_bits;
  TensorTable<kStepColumns<kFamily>, kStepTable<kFamily>> tensors;
};

// ---- rules ----------------------------------------------------------------------------------------------------------

struct StepMoments {
  float m, slow, v;
};

__device__ inline float sign_of(float x) {  // of NaN: NaN
  return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? 0.0f : x;
}

// p' (or the direction), and the moments brought up to date; they stay, and `kept` is set, where they would not be
// finite.
template <Family kFamily>
__device__ inline float step_element(const StepScalars& s, Rule rule, float p, float g, StepMoments& x, bool& kept) {
  StepMoments next = x;
  float result;
  if constexpr (has_v(kFamily)) {
    next.m = __fmaf_rn(s.beta1, x.m, __fmul_rn(s.one_minus_beta1, g));
    next.v = __fmaf_rn(s.beta2, x.v, __fmul_rn(__fmul_rn(s.one_minus_beta2, g), g));
    const float denominator = __fmaf_rn(__fsqrt_rn(next.v), s.inv_sqrt_bias2, s.eps);
    if constexpr (kFamily == Family::ademamix) {
      next.slow = __fmaf_rn(s.beta3, x.slow, __fmul_rn(s.one_minus_beta3, g));
      const float d = __fdiv_rn(__fmaf_rn(next.m, s.inv_bias1, __fmul_rn(s.alpha, next.slow)), denominator);
      result = __fmaf_rn(s.minus_step, d, __fmul_rn(p, s.decay));
    } else {
      const float d = __fdiv_rn(next.m, denominator);
      result =
          kFamily == Family::direction ? __fmul_rn(d, s.inv_bias1) : __fmaf_rn(s.minus_step, d, __fmul_rn(p, s.decay));
    }
    kept = __float_as_uint(next.v) >= kInfinityBits;
  } else {
    if (rule == Rule::lion) {
      const float c = __fmaf_rn(s.beta1, x.m, __fmul_rn(s.one_minus_beta1, g));
      next.m = __fmaf_rn(s.beta2, x.m, __fmul_rn(s.one_minus_beta2, g));
      result = __fmaf_rn(s.minus_step, sign_of(c), __fmul_rn(p, s.decay));
    } else if (rule == Rule::signum) {
      next.m = __fmaf_rn(s.beta1, x.m, __fmul_rn(s.one_minus_beta1, g));
      result = __fmaf_rn(s.minus_step, sign_of(next.m), __fmul_rn(p, s.decay));
    } else {
      next.m = s.first ? g : __fmaf_rn(s.beta1, x.m, g);
      result = __fmaf_rn(s.minus_step, rule == Rule::nesterov ? __fmaf_rn(s.beta1, next.m, g) : next.m, p);
    }
    kept = (__float_as_uint(next.m) & 0x7fffffffu) >= kInfinityBits;
  }
  if (!kept) x = next;
  return result;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <Codec kM, Family kFamily>
class StepWarp {
 public:
  static constexpr Codec kV = codec::second_moment(kM);
  using Launch = StepLaunch<kFamily>;
  using Tables = StepTables<kM, has_v(kFamily)>;

  __device__ StepWarp(const Launch& launch, const StepScalars& scalars, const Tables& tables)
      : l_(launch), s_(scalars), tables_(tables), lanes_(launch.args.block) {}

  __device__ void run(uint32_t tile, uint32_t stride) {
    const int block = l_.args.block;
    const int64_t tile_size = block >= kChunkElements ? block : lanes_.blocks * block;
    int i = 0;
    for (; tile < l_.tensors.first[l_.tensors.count]; tile += stride) {
      i = l_.tensors.find(i, tile);
      view(i, tile_size);
      step_tile((tile - l_.tensors.first[i]) * int64_t(lanes_.blocks));
    }
    if (kept_ && l_.args.nonfinite) atomicAdd(reinterpret_cast<unsigned long long*>(l_.args.nonfinite), kept_);
  }

 private:
  template <class T>
  __device__ T* pointer(int column) const {
    return global(l_.tensors.template pointer<T>(column, tensor_));
  }
  __device__ void view(int i, int64_t tile_size) {
    tensor_ = i;
    n_ = (l_.tensors.first[i + 1] - l_.tensors.first[i]) * tile_size - (l_.tensors.missing[i] & kMissingMask);
    float_states_ = l_.tensors.missing[i] & kFloatStates;
  }

  // ---- parameters and gradients as fp32

  template <class F>
  __device__ static void with_type(DType dtype, F f) {
    if (dtype == DType::f32) return f((float*)nullptr);
    return dtype == DType::bf16 ? f((__nv_bfloat16*)nullptr) : f((__half*)nullptr);
  }
  template <class T>
  __device__ Eight<T> load(int column, const Part& part) const {
    const T* p = pointer<const T>(column) + part.first;
    return load8(p, part.count, part.count == kLaneElements && can_move_whole(p));
  }
  template <class T>
  __device__ void store(int column, const Part& part, const Eight<T>& x) const {
    T* p = pointer<T>(column) + part.first;
    store8(p, x, part.count, part.count == kLaneElements && can_move_whole(p));
  }
  __device__ void load_floats(DType dtype, int column, const Part& part, float (&x)[kLaneElements]) const {
    with_type(dtype, [&](auto* type) {
      const auto raw = load<std::remove_pointer_t<decltype(type)>>(column, part);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) x[i] = element(raw, i);
    });
  }
  __device__ void load_params(const Part& part, float (&p)[kLaneElements]) const {
    load_floats(l_.dtype, kP, part, p);
    if (l_.low_bits == 16) {
      const Eight<uint16_t> low = load<uint16_t>(kLow, part);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        p[i] = codec::join_master16(uint16_t(__float_as_uint(p[i]) >> 16), int16_t(low.word[i / 2] >> i % 2 * 16));
    } else if (l_.low_bits == 8) {
      const Eight<uint8_t> low = load<uint8_t>(kLow, part);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        p[i] = codec::join_master8(uint16_t(__float_as_uint(p[i]) >> 16), int8_t(low.word[i / 4] >> i % 4 * 8));
    }
  }
  __device__ void store_nearest(DType dtype, const Part& part, const float (&x)[kLaneElements]) const {
    with_type(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      store<T>(kP, part, rounded<T>(x));
    });
  }
  __device__ void store_params(const Part& part, const float (&p)[kLaneElements]) const {
    if constexpr (kFamily == Family::direction) return store_nearest(l_.out_dtype, part, p);
    const bool stochastic = l_.args.random && l_.dtype != DType::f32 && l_.low_bits != 16;
    if (l_.low_bits == 0 && !stochastic) return store_nearest(l_.dtype, part, p);
    Philox bits = {};
    if (stochastic) {
      const RoundingBits source = {uint64_t(l_.args.random[0]), uint32_t(l_.args.random[1])};
      bits = source.draw(l_.tensors.index[tensor_], part.first / kLaneElements);
    }
    Eight<uint16_t> high = {}, low16 = {};
    Eight<uint8_t> low8 = {};
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const uint32_t random = bits.word[i / 2] >> i % 2 * 16 & 0xffffu;
      uint32_t h;
      if (l_.low_bits) {
        const codec::Master x = l_.low_bits == 16 ? codec::split_master16(p[i])
                                : stochastic      ? codec::split_master8_stochastic(p[i], random)
                                                  : codec::split_master8(p[i]);
        h = x.high;
        low16.word[i / 2] |= uint32_t(uint16_t(x.low)) << i % 2 * 16;
        low8.word[i / 4] |= uint32_t(uint8_t(x.low)) << i % 4 * 8;
      } else {
        h = l_.dtype == DType::bf16 ? codec::round_bf16_stochastic(p[i], random)
                                    : codec::round_f16_stochastic(p[i], random);
      }
      high.word[i / 2] |= h << i % 2 * 16;
    }
    store(kP, part, high);
    if (l_.low_bits == 16) store(kLow, part, low16);
    if (l_.low_bits == 8) store(kLow, part, low8);
  }

  // ---- moments

  struct Lane {  // of a tile or chunk
    float p[kLaneElements], g[kLaneElements];
    float m[kLaneElements], slow[kLaneElements], v[kLaneElements];
  };
  struct Scales {
    float m, slow, v;
  };
  struct Largest {  // magnitudes, as bits
    uint32_t m = 0, slow = 0, v = 0;
  };

  template <Codec kCodec>
  __device__ void load_moment(int column, int half, const Part& part, float scale, float (&x)[kLaneElements]) const {
    if (float_states_) {
      load_floats(DType::f32, column, part, x);
      return;
    }
    const auto* codes = pointer<const uint8_t>(column);
    const auto packed =
        load_codes<kCodec>(codes, part.first, part.count, part.count == kLaneElements && can_move_codes<kCodec>(codes));
    const uint32_t lane_bytes = half ? tables_.v_lane : tables_.m_lane;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i)
      x[i] = step_decode_one<kCodec>(tables_.decode, packed, i, lane_bytes, scale);
  }
  template <Codec kCodec>
  __device__ void store_moment(int column, const uint32_t* table, const Part& part, const BlockCoding<kCodec>& coding,
                               float (&x)[kLaneElements]) const {
    auto* codes = pointer<uint8_t>(column);
    store_codes<kCodec>(codes, part.first, part.count, part.count == kLaneElements && can_move_codes<kCodec>(codes),
                        coding.encode(table, x));
  }
  __device__ float scale_at(int column, int64_t block, bool here) const {
    return here && !float_states_ ? pointer<const float>(column)[block] : 0.0f;
  }

  // Loads and steps; `last`: this is not only to find the largest magnitudes.
  __device__ void step_part(Lane& x, const Part& part, const Scales& scales, Largest& largest, bool last) {
    if constexpr (kFamily != Family::direction) load_params(part, x.p);
    load_floats(l_.dtype, kG, part, x.g);
    load_moment<kM>(kMState, 0, part, scales.m, x.m);
    if constexpr (kFamily == Family::ademamix) load_moment<kM>(kSlow, 0, part, scales.slow, x.slow);
    if constexpr (has_v(kFamily)) load_moment<kV>(kVState, 1, part, scales.v, x.v);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const float p = kFamily == Family::direction ? 0.0f : x.p[i];
      const float g = s_.plain_grad ? x.g[i] : __fmaf_rn(s_.l2, p, __fmul_rn(x.g[i], s_.inv_grad_scale));
      StepMoments moments = {x.m[i], x.slow[i], x.v[i]};
      bool kept = false;
      x.p[i] = step_element<kFamily>(s_, l_.args.options.rule, p, g, moments, kept);
      const bool here = i < part.count;
      kept_ += last && kept && here;
      x.m[i] = here ? moments.m : 0.0f;
      largest.m = max(largest.m, __float_as_uint(x.m[i]) & 0x7fffffffu);
      if constexpr (kFamily == Family::ademamix) {
        x.slow[i] = here ? moments.slow : 0.0f;
        largest.slow = max(largest.slow, __float_as_uint(x.slow[i]) & 0x7fffffffu);
      }
      if constexpr (has_v(kFamily)) {
        x.v[i] = here ? moments.v : 0.0f;
        largest.v = max(largest.v, __float_as_uint(x.v[i]));
      }
    }
    if (last) store_params(part, x.p);
  }

  // The blocks of a tile, from `first_block` on; or a larger block, chunk by chunk: once for its scales, once more for
  // everything else.
  __device__ void step_tile(int64_t first_block) {
    const int block_size = l_.args.block;
    const int64_t block = first_block + lanes_.group, start = block * block_size;
    const bool here = !lanes_.idle() && start < n_;
    const int64_t end = here ? start + block_size : start;
    const Scales scales = {scale_at(kMScale, block, here),
                           kFamily == Family::ademamix ? scale_at(kSlowScale, block, here) : 0.0f,
                           has_v(kFamily) ? scale_at(kVScale, block, here) : 0.0f};
    const bool large = block_size > kChunkElements;
    const auto part_at = [&](int at) { return part_of(n_, start + at + lanes_.at * kLaneElements, end); };
    Lane x;
    Largest largest;
    if (float_states_) {
      for (int at = 0; at < block_size; at += kChunkElements) {
        const Part part = part_at(at);
        step_part(x, part, scales, largest, true);
        store<float>(kMState, part, rounded<float>(x.m));
        if constexpr (kFamily == Family::ademamix) store<float>(kSlow, part, rounded<float>(x.slow));
        if constexpr (has_v(kFamily)) store<float>(kVState, part, rounded<float>(x.v));
      }
      return;
    }
    for (int at = 0; at < block_size; at += kChunkElements) step_part(x, part_at(at), scales, largest, !large);
    const BlockCoding<kM> m(lanes_.max(largest.m)), slow(kFamily == Family::ademamix ? lanes_.max(largest.slow) : 0);
    const BlockCoding<kV> v(has_v(kFamily) ? lanes_.max(largest.v) : 0);
    if (here && lanes_.at == 0) {
      pointer<float>(kMScale)[block] = m.scale();
      if constexpr (kFamily == Family::ademamix) pointer<float>(kSlowScale)[block] = slow.scale();
      if constexpr (has_v(kFamily)) pointer<float>(kVScale)[block] = v.scale();
    }
    for (int at = 0; at < block_size; at += kChunkElements) {
      const Part part = part_at(at);
      if (large) step_part(x, part, scales, largest, true);
      store_moment<kM>(kMState, tables_.encode_m, part, m, x.m);
      if constexpr (kFamily == Family::ademamix) store_moment<kM>(kSlow, tables_.encode_m, part, slow, x.slow);
      if constexpr (has_v(kFamily)) store_moment<kV>(kVState, tables_.encode_v, part, v, x.v);
    }
  }

  const Launch& l_;
  const StepScalars& s_;
  const Tables& tables_;
  const Lanes lanes_;
  int tensor_;
  int64_t n_;
  bool float_states_;
  unsigned kept_ = 0;
};

// A direction whose step is skipped is zero.
template <Family kFamily>
__device__ void zero_outputs(const StepLaunch<kFamily>& l) {
  const int64_t threads = int64_t(gridDim.x) * kStepThreads, me = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  const int64_t tile = l.args.block >= kChunkElements ? l.args.block : kChunkElements / l.args.block * l.args.block;
  for (int i = 0; i < l.tensors.count; ++i) {
    const int64_t n = (l.tensors.first[i + 1] - l.tensors.first[i]) * tile - (l.tensors.missing[i] & kMissingMask);
    for (int64_t j = me; j < n; j += threads) {
      if (l.out_dtype == DType::f32) {
        l.tensors.template pointer<float>(kP, i)[j] = 0;
      } else {
        l.tensors.template pointer<uint16_t>(kP, i)[j] = 0;
      }
    }
  }
}

template <Codec kM>
constexpr size_t kStepSharedBytes = StepTables<kM>::kWords * sizeof(uint32_t) + sizeof(StepScalars);

template <Codec kM, Family kFamily>
__global__ void __launch_bounds__(kStepThreads, 1) step_kernel(const __grid_constant__ StepLaunch<kFamily> launch) {
  const StepArgs& a = launch.args;
  if (a.found_inf && *a.found_inf != 0) {
    if constexpr (kFamily == Family::direction) zero_outputs(launch);
    return;
  }
  uint32_t* const words = dynamic_shared<uint32_t>();  // kStepSharedBytes
  const StepTables<kM, has_v(kFamily)> tables(words);
  auto* const shared = reinterpret_cast<StepScalars*>(words + tables.kWords);
  tables.fill();
  if (threadIdx.x == 0)
    *shared = step_scalars(a.options, *a.step, a.lr ? *a.lr : 0.0f, a.grad_scale ? *a.grad_scale : 1.0f,
                           a.beta3 ? *a.beta3 : 0.0f, a.alpha ? *a.alpha : 0.0f);
  __syncthreads();
  const StepScalars scalars = *shared;
  StepWarp<kM, kFamily>(launch, scalars, tables)
      .run(threadIdx.x / kLanes * gridDim.x + blockIdx.x, gridDim.x * kStepWarps);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <Codec kM, Family kFamily>
cudaError_t launch_step_of(const StepKind& kind, const StepTensor* tensors, int64_t count, const StepArgs& args,
                           cudaStream_t stream) {
  using Builder = TableBuilder<kStepColumns<kFamily>, kStepTable<kFamily>>;
  const auto builder = std::make_unique<Builder>(tile_elements(args.block));
  const auto entry = [](const StepTensor& t) {
    typename Builder::Entry e = {
        {address_of(kFamily == Family::direction ? t.out : t.p), address_of(t.g), address_of(t.m.data),
         address_of(t.m.scale), address_of(t.v.data), address_of(t.v.scale), address_of(t.low)},
        t.n,
        uint16_t(t.index),
        uint16_t(t.m.scale ? 0 : kFloatStates)};
    if constexpr (kFamily == Family::ademamix) {
      e.address[kSlow] = address_of(t.slow.data);
      e.address[kSlowScale] = address_of(t.slow.scale);
    }
    return e;
  };
  return in_tables(*builder, tensors, count, kind, entry, [&] {
    const auto launched = std::make_unique<StepLaunch<kFamily>>();
    launched->args = args;
    launched->dtype = kind.dtype;
    launched->out_dtype = kind.out_dtype;
    launched->low_bits = kind.low_bits;
    builder->write(launched->tensors);
    return launch_grid(step_kernel<kM, kFamily>, builder->tiles(), kStepThreads, kStepSharedBytes<kM>, stream,
                       *launched);
  });
}

template <Codec kM>
cudaError_t launch_any_step(const StepKind& kind, const StepTensor* tensors, int64_t count, const StepArgs& args,
                            cudaStream_t stream) {
  switch (args.options.rule) {
    case Rule::adam:
      return launch_step_of<kM, Family::adam>(kind, tensors, count, args, stream);
    case Rule::adam_direction:
      return launch_step_of<kM, Family::direction>(kind, tensors, count, args, stream);
    case Rule::ademamix:
      return launch_step_of<kM, Family::ademamix>(kind, tensors, count, args, stream);
    default:
      return launch_step_of<kM, Family::momentum>(kind, tensors, count, args, stream);
  }
}

}  // namespace slk::cuda
