// The CUDA kernels of adam_q_, adam_q_dir_, ademamix_q_ and momentum_q_ against their rules and the codecs, element by
// element: the same bits.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>

#include "optim_numbers.h"
#include "simt/runtime.h"
#include "slkernels/optim_cuda.h"

using namespace slk;
using cuda::StepArgs;
using cuda::StepTensor;

namespace {

int failures = 0;

struct Options {
  const char* name;
  double weight_decay = 0.1, eps = 1e-8;
  bool decoupled = true;
  float grad_scale = 1, found_inf = 0, t = 3;
  int low_bits = 0;
  bool stochastic = false;
  Rule rule = Rule::adam;
  DType out_dtype = DType::f32;  // of a direction
};

struct TensorData {
  int64_t n;
  DType dtype;
  bool float_states;
  int offset;  // elements by which its buffers are misaligned
  uint64_t seed;
};

int64_t code_bytes(Codec codec, int64_t n) {
  return codec::bits(codec) == 8 ? n : ceil_div(n, 2);
}
int code_at(Codec codec, const uint8_t* codes, int64_t i) {
  return codec::bits(codec) == 8 ? codes[i] : codes[i / 2] >> (i % 2 ? 0 : 4) & 15;
}
void set_code(Codec codec, uint8_t* codes, int64_t i, int code) {
  if (codec::bits(codec) == 8) {
    codes[i] = uint8_t(code);
  } else if (i % 2 == 0) {
    codes[i / 2] = uint8_t(code << 4);  // element i + 1, where there is one, comes next
  } else {
    codes[i / 2] = uint8_t(codes[i / 2] | code);
  }
}

template <Codec kCodec>
void encode_block(const std::vector<float>& x, int64_t begin, int64_t end, uint8_t* codes, float* scale) {
  uint32_t largest = 0;
  for (int64_t i = begin; i < end; ++i) largest = std::max(largest, numbers::bits(x[i]) & 0x7fffffffu);
  const bool usable = largest && largest < 0x7f800000u;
  const float size = usable ? numbers::from_bits(largest) : 1.0f;
  *scale = usable ? codec::scale_of<kCodec>(size) : largest ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  const codec::Block coding = codec::block_of<kCodec>(size);
  for (int64_t i = begin; i < end; ++i)
    set_code(kCodec, codes, i, usable ? codec::encode<kCodec>(x[i], coding) : codec::encode<kCodec>(0.0f, coding));
}

// One moment of a tensor.
struct State {
  simt::Buffer<uint8_t> data;
  simt::Buffer<float> scale;
  uint8_t* at;

  State(Codec codec, const TensorData& d, int block)
      : data(d.float_states ? 4 * d.n : code_bytes(codec, d.n) + d.offset),
        scale(d.float_states ? 0 : ceil_div(d.n, block)),
        at(data.get() + (d.float_states ? 0 : d.offset)) {}
  cpu::Moment moment(bool floats) const { return {at, floats ? nullptr : scale.get()}; }
};

template <Codec kCodec>
void fill_state(State& s, const TensorData& d, int block, std::vector<float> x) {
  if (d.float_states) {
    std::memcpy(s.at, x.data(), 4 * d.n);
    return;
  }
  for (int64_t b = 0; b * block < d.n; ++b) {
    const int64_t begin = b * block, end = std::min(d.n, begin + block);
    if (b % 5 == 3)  // a block that never had a gradient
      for (int64_t i = begin; i < end; ++i) x[i] = 0;
    encode_block<kCodec>(x, begin, end, s.at, &s.scale[b]);
  }
}

// A tensor on the device.
template <Codec kM>
struct Tensor {
  static constexpr Codec kV = codec::second_moment(kM);
  TensorData d;
  int block, item, low_item, out_item;
  DType out_dtype;
  bool direction;
  simt::Buffer<uint8_t> p, g, low, out;
  State m, slow, v;

  Tensor(const TensorData& data, int block_size, const Options& o)
      : d(data),
        block(block_size),
        item(numbers::bytes(d.dtype)),
        low_item(o.low_bits / 8),
        out_item(numbers::bytes(o.out_dtype)),
        out_dtype(o.out_dtype),
        direction(o.rule == Rule::adam_direction),
        p((d.n + d.offset) * item),
        g((d.n + d.offset) * item),
        low((d.n + d.offset) * low_item),
        out(direction ? (d.n + d.offset) * out_item : 0),
        m(kM, d, block),
        slow(kM, d, block),
        v(kV, d, block) {
    const auto ps = numbers::random(d.n, d.seed, 2), gs = numbers::random(d.n, d.seed + 1, 4);
    auto ms = numbers::random(d.n, d.seed + 2, 3);
    auto vs = ms;
    for (float& x : ms) x *= 1e-2f;
    for (float& x : vs) x *= x * 1e-4f;
    for (int64_t i = 0; i < d.n; ++i) {
      numbers::store(d.dtype, p.get() + d.offset * item, i, ps[i]);
      numbers::store(d.dtype, g_at(), i, gs[i]);
    }
    for (size_t i = 0; i < low.size(); ++i) low[i] = uint8_t(numbers::mix(d.seed + i));
    fill_state<kM>(m, d, block, ms);
    fill_state<kM>(slow, d, block, numbers::random(d.n, d.seed + 3, 3));
    fill_state<kV>(v, d, block, vs);
  }
  uint8_t* p_at() const { return direction ? out.get() + d.offset * out_item : p.get() + d.offset * item; }
  uint8_t* g_at() const { return g.get() + d.offset * item; }
  uint8_t* low_at() const { return low.get() + d.offset * low_item; }
  DType p_dtype() const { return direction ? out_dtype : d.dtype; }

  StepTensor arguments(uint32_t index) const {
    StepTensor t = {};
    (direction ? t.out : t.p) = p_at();
    t.g = g_at();
    t.m = m.moment(d.float_states);
    t.slow = slow.moment(d.float_states);
    t.v = v.moment(d.float_states);
    t.low = low_item ? low_at() : nullptr;
    t.low_bits = 8 * low_item;
    t.n = d.n;
    t.dtype = d.dtype;
    t.out_dtype = out_dtype;
    t.index = index;
    return t;
  }
};

struct Expected {
  std::vector<uint8_t> p, low, m, slow, v;
  std::vector<float> m_scale, slow_scale, v_scale;
};

float sign(float x) {
  return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? 0.0f : x;
}

// Writes one parameter, or element of a direction, as the contract says.
void put_result(const Options& o, DType dtype, Expected& e, int64_t i, float x, uint32_t random) {
  auto* high = reinterpret_cast<uint16_t*>(e.p.data()) + i;
  const bool direction = o.rule == Rule::adam_direction;
  if (direction || dtype == DType::f32 || (o.low_bits == 0 && !o.stochastic)) {
    numbers::store(direction ? o.out_dtype : dtype, e.p.data(), i, x);
  } else if (o.low_bits == 0) {
    *high = dtype == DType::bf16 ? codec::round_bf16_stochastic(x, random) : codec::round_f16_stochastic(x, random);
  } else {
    const codec::Master split = o.low_bits == 16 ? codec::split_master16(x)
                                : o.stochastic   ? codec::split_master8_stochastic(x, random)
                                                 : codec::split_master8(x);
    *high = split.high;
    if (o.low_bits == 16) {
      reinterpret_cast<int16_t*>(e.low.data())[i] = split.low;
    } else {
      e.low[i] = uint8_t(split.low);
    }
  }
}

template <Codec kCodec>
float moment_at(const State& s, const TensorData& d, int block, int64_t i) {
  return d.float_states ? reinterpret_cast<const float*>(s.at)[i]
                        : codec::decode_in_step<kCodec>(code_at(kCodec, s.at, i), s.scale[i / block]);
}
template <Codec kCodec>
void expect_state(const TensorData& d, int block, const std::vector<float>& x, std::vector<uint8_t>& data,
                  std::vector<float>& scale) {
  if (d.float_states) std::memcpy(data.data(), x.data(), 4 * d.n);
  for (int64_t b = 0; b * block < d.n && !d.float_states; ++b)
    encode_block<kCodec>(x, b * block, std::min(d.n, (b + 1) * block), data.data(), &scale[b]);
}

// The definition, on the tensor as it is now. Returns the number of elements whose moments stay.
template <Codec kM>
int64_t expect(const Tensor<kM>& t, const Options& o, const StepScalars& s, const RoundingBits& rounding,
               uint32_t index, Expected& e) {
  constexpr Codec kV = codec::second_moment(kM);
  const int64_t n = t.d.n;
  const auto copy = [](const uint8_t* from, int64_t count) { return std::vector<uint8_t>(from, from + count); };
  const auto data = [&](const State& x, Codec c) { return copy(x.at, t.d.float_states ? 4 * n : code_bytes(c, n)); };
  e.p = copy(t.p_at(), n * numbers::bytes(t.p_dtype()));
  e.low = copy(t.low_at(), n * t.low_item);
  e.m = data(t.m, kM);
  e.slow = data(t.slow, kM);
  e.v = data(t.v, kV);
  e.m_scale = t.m.scale.host();
  e.slow_scale = t.slow.scale.host();
  e.v_scale = t.v.scale.host();
  if (o.found_inf != 0) {
    if (t.direction) std::fill(e.p.begin(), e.p.end(), uint8_t(0));
    return 0;
  }
  const bool has_v = o.rule == Rule::adam || o.rule == Rule::adam_direction || o.rule == Rule::ademamix;
  std::vector<float> ms(n), slows(n), vs(n);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float m = moment_at<kM>(t.m, t.d, t.block, i), slow = moment_at<kM>(t.slow, t.d, t.block, i);
    const float v = moment_at<kV>(t.v, t.d, t.block, i);
    float p = t.direction ? 0.0f : numbers::load(t.d.dtype, e.p.data(), i);
    if (o.low_bits) {
      const uint16_t high = reinterpret_cast<uint16_t*>(e.p.data())[i];
      p = o.low_bits == 16 ? codec::join_master16(high, reinterpret_cast<const int16_t*>(e.low.data())[i])
                           : codec::join_master8(high, int8_t(e.low[i]));
    }
    float g = numbers::load(t.d.dtype, t.g_at(), i);
    if (!s.plain_grad) g = std::fma(s.l2, p, g * s.inv_grad_scale);
    float m_new = std::fma(s.beta1, m, s.one_minus_beta1 * g), v_new = v, slow_new = slow, result;
    if (has_v) {
      v_new = std::fma(s.beta2, v, s.one_minus_beta2 * g * g);
      const float denominator = std::fma(std::sqrt(v_new), s.inv_sqrt_bias2, s.eps);
      if (o.rule == Rule::ademamix) {
        slow_new = std::fma(s.beta3, slow, s.one_minus_beta3 * g);
        result = std::fma(s.minus_step, std::fma(m_new, s.inv_bias1, s.alpha * slow_new) / denominator, p * s.decay);
      } else if (t.direction) {
        result = m_new / denominator * s.inv_bias1;
      } else {
        result = std::fma(s.minus_step, m_new / denominator, p * s.decay);
      }
    } else if (o.rule == Rule::lion) {
      result = std::fma(s.minus_step, sign(m_new), p * s.decay);
      m_new = std::fma(s.beta2, m, s.one_minus_beta2 * g);
    } else if (o.rule == Rule::signum) {
      result = std::fma(s.minus_step, sign(m_new), p * s.decay);
    } else {
      m_new = s.first ? g : std::fma(s.beta1, m, g);
      result = std::fma(s.minus_step, o.rule == Rule::nesterov ? std::fma(s.beta1, m_new, g) : m_new, p);
    }
    put_result(o, t.d.dtype, e, i, result, rounding(index, i));
    const bool finite = has_v ? v_new < std::numeric_limits<float>::infinity() : std::isfinite(m_new);
    kept += !finite;
    ms[i] = finite ? m_new : m;
    slows[i] = finite ? slow_new : slow;
    vs[i] = finite ? v_new : v;
  }
  expect_state<kM>(t.d, t.block, ms, e.m, e.m_scale);
  if (o.rule == Rule::ademamix) expect_state<kM>(t.d, t.block, slows, e.slow, e.slow_scale);
  if (has_v) expect_state<kV>(t.d, t.block, vs, e.v, e.v_scale);
  return kept;
}

template <class T>
void compare(const char* what, const char* name, int codec, const TensorData& d, int block, const T* got, const T* want,
             size_t count, bool nan_is_nan) {
  for (size_t i = 0; i < count; ++i) {
    if (!std::memcmp(&got[i], &want[i], sizeof(T))) continue;
    if (nan_is_nan && got[i] != got[i] && want[i] != want[i]) continue;
    if (++failures < 20)
      std::printf("FAIL %s: %s codec %d dtype %d n %ld block %d offset %d [%zu] = %g, want %g\n", name, what, codec,
                  int(d.dtype), long(d.n), block, d.offset, i, double(got[i]), double(want[i]));
    return;
  }
}

template <Codec kM>
void run(const Options& o, const std::vector<TensorData>& list, int block, bool bad_gradients) {
  std::vector<std::unique_ptr<Tensor<kM>>> tensors;
  for (const TensorData& d : list) {
    tensors.push_back(std::make_unique<Tensor<kM>>(d, block, o));
    if (bad_gradients && d.n > 3) {
      numbers::store(d.dtype, tensors.back()->g_at(), d.n / 2, std::numeric_limits<float>::quiet_NaN());
      numbers::store(d.dtype, tensors.back()->g_at(), d.n / 3, -std::numeric_limits<float>::infinity());
      numbers::store(d.dtype, tensors.back()->g_at(), d.n - 1, 3e25f);  // its square overflows
    }
  }
  const StepOptions step = {o.rule, 0.9, 0.999, o.eps, o.weight_decay, o.decoupled};
  simt::Buffer<float> scalars(std::vector<float>{o.t, 1e-2f, 0.9999f, 5.0f, o.grad_scale, o.found_inf});
  simt::Buffer<int64_t> random(std::vector<int64_t>{0x123456789abcdefLL, 9}), nonfinite(std::vector<int64_t>{7});
  const float* at = scalars.get();
  StepArgs args = {};
  args.options = step;
  args.codec = kM;
  args.block = block;
  args.step = at;
  args.lr = at + 1;
  args.beta3 = at + 2;
  args.alpha = at + 3;
  args.grad_scale = o.grad_scale == 1 ? nullptr : at + 4;
  args.found_inf = at + 5;
  args.random = o.stochastic ? random.get() : nullptr;
  args.nonfinite = nonfinite.get();
  const StepScalars s = step_scalars(step, at[0], at[1], at[4], at[2], at[3]);
  std::vector<Expected> want(tensors.size());
  std::vector<StepTensor> arguments;
  int64_t kept = 7;
  for (size_t i = 0; i < tensors.size(); ++i) {
    kept += expect(*tensors[i], o, s, {uint64_t(random[0]), uint32_t(random[1])}, uint32_t(i), want[i]);
    arguments.push_back(tensors[i]->arguments(uint32_t(i)));
  }
  if (cuda::launch_step(arguments.data(), int64_t(arguments.size()), args, nullptr) != cudaSuccess) {
    ++failures;
    std::printf("FAIL %s: launch\n", o.name);
  }
  if (nonfinite[0] != kept) {
    ++failures;
    std::printf("FAIL %s: %ld elements kept, want %ld\n", o.name, long(nonfinite[0]), long(kept));
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor<kM>& x = *tensors[i];
    const Expected& e = want[i];
    std::vector<float> got(x.d.n), wanted(x.d.n);
    for (int64_t j = 0; j < x.d.n; ++j) {
      got[j] = numbers::load(x.p_dtype(), x.p_at(), j);
      wanted[j] = numbers::load(x.p_dtype(), e.p.data(), j);
    }
    const auto same = [&](const char* what, const auto* a, const auto& b) {
      compare(what, o.name, int(kM), x.d, block, a, b.data(), b.size(), true);
    };
    same("p", got.data(), wanted);
    same("low", x.low_at(), e.low);
    same("m", x.m.at, e.m);
    same("slow", x.slow.at, e.slow);
    same("v", x.v.at, e.v);
    same("m_scale", x.m.scale.get(), e.m_scale);
    same("slow_scale", x.slow.scale.get(), e.slow_scale);
    same("v_scale", x.v.scale.get(), e.v_scale);
  }
}

std::vector<TensorData> sizes(DType dtype, int block) {
  return {{1, dtype, false, 0, 1},          {block + 3, dtype, false, 0, 2},    {0, dtype, false, 0, 3},
          {2 * 256, dtype, false, 0, 4},    {6 * block + 1, dtype, true, 0, 5}, {1000, dtype, false, 1, 6},
          {9 * 256 + 5, dtype, false, 0, 7}};
}

Options with_rule(Rule rule, bool decoupled, int low_bits = 0, bool stochastic = false) {
  return {"rule", 0.1, 1e-8, decoupled, 1, 0, 3, low_bits, stochastic, rule};
}

// What differs from codec to codec; the rest is dyn8's, in main.
template <Codec kM>
void run_codec(int common_block) {
  const auto bf16 = sizes(DType::bf16, common_block);
  run<kM>({"bad gradients"}, bf16, common_block, true);
  for (const int block : {48, 272}) run<kM>({"block"}, sizes(DType::bf16, block), block, false);
  run<kM>({"low8, stochastic", 0.1, 1e-8, true, 1, 0, 3, 8, true}, bf16, common_block, false);
  for (const Rule rule : {Rule::adam_direction, Rule::ademamix, Rule::lion})
    run<kM>(with_rule(rule, true), bf16, common_block, rule != Rule::lion);
}

}  // namespace

int main() {
  run_codec<Codec::dyn8>(256);
  run_codec<Codec::lin8>(256);
  run_codec<Codec::cmp8>(32);
  run_codec<Codec::dyn4>(128);
  run_codec<Codec::fp8>(256);

  constexpr Codec kM = Codec::dyn8;
  const auto mixed = [] {
    auto all = sizes(DType::f32, 256);
    for (const DType dtype : {DType::bf16, DType::f16})
      for (const TensorData& d : sizes(dtype, 256)) all.push_back(d);
    return all;
  }();
  run<kM>({"mixed"}, mixed, 256, false);
  for (const int block : {16, 1024}) run<kM>({"block"}, sizes(DType::bf16, block), block, block == 1024);
  run<kM>({"low16", 0.1, 1e-8, true, 1, 0, 3, 16}, sizes(DType::bf16, 256), 256, true);
  run<kM>({"coupled", 0.1, 1e-8, false}, mixed, 256, false);
  run<kM>({"grad_scale", 0.0, 1e-8, true, 1024}, mixed, 256, false);
  run<kM>({"coupled low8", 0.1, 1e-8, false, 3, 0, 3, 8}, sizes(DType::bf16, 256), 256, false);
  run<kM>({"found_inf", 0.1, 1e-8, true, 1, 1}, mixed, 256, true);
  run<kM>({"eps 0", 0.1, 0.0}, mixed, 256, false);
  run<kM>({"first step", 0.1, 1e-8, true, 1, 0, 1}, mixed, 256, false);
  run<kM>({"late step", 0.1, 1e-8, true, 1, 0, 123457}, mixed, 256, false);
  run<kM>({"stochastic", 0.1, 1e-8, true, 1, 0, 3, 0, true}, mixed, 256, false);
  run<kM>({"tiny gradients", 0.1, 1e-8, true, 1e15f}, mixed, 256, false);
  run<kM>({"tinier gradients", 0.1, 1e-8, true, 1e30f}, mixed, 256, false);
  run<kM>({"huge gradients", 0.1, 1e-8, true, 1e-14f}, mixed, 256, false);

  for (const Rule rule : {Rule::ademamix, Rule::lion, Rule::signum, Rule::sgd, Rule::nesterov}) {
    const bool decoupled = rule == Rule::ademamix || rule == Rule::lion || rule == Rule::signum;
    run<kM>(with_rule(rule, decoupled), mixed, 256, false);
    run<kM>(with_rule(rule, decoupled, 16), sizes(DType::bf16, 256), 256, true);
    run<kM>(with_rule(rule, decoupled, 0, true), sizes(DType::f16, 1024), 1024, true);
  }
  run<kM>({"first of sgd", 0.1, 0, false, 1, 0, 1, 0, false, Rule::sgd}, mixed, 256, false);
  for (const DType out : {DType::f32, DType::bf16})
    for (const float found : {0.0f, 1.0f})
      run<kM>({"direction", 0, 1e-8, true, 1, found, 3, 0, false, Rule::adam_direction, out}, sizes(DType::bf16, 256),
              256, true);

  // More tensors than a table holds, and more than the small one.
  std::vector<TensorData> many;
  for (int i = 0; i < 1000; ++i)
    many.push_back({1 + i % 7 + (i % 100 == 0 ? 300 : 0), DType::bf16, i % 3 == 0, 0, uint64_t(i)});
  run<kM>({"many"}, many, 256, false);
  many.resize(100);
  run<kM>({"a hundred"}, many, 256, false);

  std::printf(failures ? "%d failures\n" : "optim_step: ok\n", failures);
  return failures ? 1 : 0;
}
