// What the files of family `optim` share at the torch boundary.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "slkernels/optim.h"
#include "torch/tensor.h"

namespace slk::optim {

inline int64_t grain_blocks(int64_t block) {
  constexpr int64_t kGrainElements = 16384;  // that are worth another thread
  return std::max<int64_t>(1, kGrainElements / block);
}

struct CodecName {
  const char* name;
  Codec codec;
};
constexpr CodecName kCodecs[] = {{"dyn8", Codec::dyn8},   {"dyn8u", Codec::dyn8u}, {"lin8", Codec::lin8},
                                 {"lin8u", Codec::lin8u}, {"cmp8", Codec::cmp8},   {"cmp8u", Codec::cmp8u},
                                 {"dyn4", Codec::dyn4},   {"lin4u", Codec::lin4u}, {"fp8", Codec::fp8},
                                 {"fp8u", Codec::fp8u}};

// `of_m`: the name of a pair, which is that of m's codec.
inline Codec codec_of(const char* op, const std::string& name, bool of_m) {
  std::string known, last;
  for (const CodecName& c : kCodecs) {
    if (of_m && !codec::is_signed(c.codec)) continue;
    if (name == c.name) return c.codec;
    known += (known.empty() || last.empty() ? "" : ", ") + last;
    last = "'" + std::string(c.name) + "'";
  }
  check(false, op, "codec must be ", known, " or ", last, ", got '", name, "'");
  return Codec::dyn8;
}

inline void check_block(const char* op, int64_t block) {
  check(block >= kQuantBlockMultiple && block <= kMaxQuantBlock && block % kQuantBlockMultiple == 0, op,
        "block must be a multiple of ", kQuantBlockMultiple, " from ", kQuantBlockMultiple, " to ", kMaxQuantBlock,
        ", got ", block);
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}
inline DType float_type_of(const char* op, const char* name, const Tensor& t) {
  check(is_float(t.scalar_type()), op, name, " must be float32, bfloat16 or float16, got ", show(t.scalar_type()));
  return dtype_of(op, name, t);
}

inline int64_t code_count(Codec c, int64_t n) {
  return codec::bits(c) == 4 ? ceil_div(n, 2) : n;
}

// round_mode and rng of an op; the key is read where `rng` lies.
inline void check_rounding(const char* op, int64_t round_mode, const std::optional<Tensor>& rng) {
  check(round_mode == 0 || round_mode == 1, op, "round_mode must be 0 (nearest even) or 1 (stochastic), got ",
        round_mode);
  if (round_mode == 0) return;
  check(rng.has_value(), op, "round_mode 1 needs rng, int64 [2] = (seed, step)");
  check(rng->scalar_type() == ScalarType::Long && rng->numel() == 2 && rng->is_contiguous(), op,
        "rng must be contiguous int64 [2] = (seed, step), got ", show(rng->scalar_type()), " ", show(*rng));
}
inline cpu::RandomKey random_key(const std::optional<Tensor>& rng) {
  const int64_t* words = rng->const_data_ptr<int64_t>();
  return {uint64_t(words[0]), uint32_t(words[1])};
}

}  // namespace slk::optim
