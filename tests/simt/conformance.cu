// Conformance: runs the PTX wrappers on seeded random data and records what comes out, so that the harness' reading of
// the manual is held to hardware.
//
//   conformance record <folder>    on a GPU: writes <case>.bin and index.json
//   conformance compare <folder>   anywhere, meant for the harness: runs the recorded inputs again and compares
//
// A .bin is the length of the input (8 bytes, little endian), the input, the output. Copies are compared bit by bit;
// wgmma to K 2^-22 and mma to K 2^-20 (fp16 operands reach 2), because the order in which the hardware adds 16
// products, and what it rounds, are its own.
//
// On a GPU:
//   nvcc -std=c++17 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -Iinclude -Itests/simt
//   tests/simt/conformance.cu -o conformance
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "sm80_cases.cuh"
#include "sm90_cases.cuh"

using namespace slk;

namespace {

using Bytes = std::vector<char>;

struct Case {
  std::string name;
  Bytes input;
  double tolerance;  // absolute, output as floats; 0: bit by bit
  std::function<Bytes(const Bytes&)> run;
};

template <class T>
Bytes to_bytes(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}
template <class T>
std::vector<T> from_bytes(const Bytes& bytes, size_t first, size_t count) {
  std::vector<T> values(count);
  std::memcpy(values.data(), bytes.data() + first * sizeof(T), count * sizeof(T));
  return values;
}

// bf16 in (-1, 1), by integer arithmetic alone: the same everywhere.
std::vector<uint16_t> random_bf16(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> bits(count);
  for (uint16_t& b : bits) b = uint16_t((random() & 0x8000) | (0x3e80 + random() % 0x100));
  return bits;
}

constexpr int kRows = 20, kColumns = 88, kPitch = 96;

cuda::TensorMap<2> tile_tensor(const uint16_t* base, CUtensorMapSwizzle swizzle) {
  const uint32_t columns = swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 16 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 32 : 64;
  return {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, {kColumns, kRows}, {2, kPitch * 2}, {columns, 16}, swizzle};
}

void add_tma(std::vector<Case>& cases, CUtensorMapSwizzle swizzle, const char* name, sm90::At at) {
  const std::string where = std::string(name) + "_" + std::to_string(at.x) + "_" + std::to_string(at.y);
  cases.push_back({"tma_load_" + where, to_bytes(random_bf16(kRows * kPitch, 1)), 0, [=](const Bytes& in) {
                     sm90::DeviceArray<uint16_t> tensor(from_bytes<uint16_t>(in, 0, kRows * kPitch));
                     return to_bytes(sm90::load_tile(tile_tensor(tensor.get(), swizzle), at));
                   }});
  const size_t tile_words = sm90::tile_bytes(tile_tensor(nullptr, swizzle)) / 4;
  cases.push_back({"tma_store_" + where, to_bytes(random_bf16(tile_words * 2, 2)), 0, [=](const Bytes& in) {
                     sm90::DeviceArray<uint16_t> tensor(kRows * kPitch);
                     sm90::store_tile(tile_tensor(tensor.get(), swizzle), at, from_bytes<uint32_t>(in, 0, tile_words));
                     return to_bytes(tensor.host());
                   }});
}

template <int N, ptx::Swizzle kSwizzle>
void add_wgmma(std::vector<Case>& cases) {
  constexpr int kK = sm90::row_values(kSwizzle);
  cases.push_back({"wgmma_n" + std::to_string(N) + "_swizzle" + std::to_string(int(kSwizzle)),
                   to_bytes(random_bf16((64 + N) * kK, N)), std::ldexp(kK, -22), [](const Bytes& in) {
                     return to_bytes(sm90::multiply<N, kSwizzle>(from_bytes<uint16_t>(in, 0, 64 * kK),
                                                                 from_bytes<uint16_t>(in, 64 * kK, N * kK)));
                   }});
}

template <int N>
void add_wgmma_registers(std::vector<Case>& cases) {
  constexpr size_t kWords = 128 * 4;
  cases.push_back({"wgmma_registers_n" + std::to_string(N), to_bytes(random_bf16(2 * kWords + 16 * N, N)),
                   std::ldexp(16, -22), [](const Bytes& in) {
                     return to_bytes(sm90::multiply_registers<N, sm90::Half::bf16>(
                         from_bytes<uint32_t>(in, 0, kWords), from_bytes<uint16_t>(in, 2 * kWords, 16 * N)));
                   }});
}

void add_warp(std::vector<Case>& cases, const char* name, void (*kernel)(const uint32_t*, uint32_t*), Bytes input,
              int out_words, double tolerance) {
  cases.push_back({name, std::move(input), tolerance, [=](const Bytes& in) {
                     return to_bytes(sm80::run(kernel, from_bytes<uint32_t>(in, 0, in.size() / 4), out_words));
                   }});
}
void add_warp(std::vector<Case>& cases, const char* name, void (*kernel)(const uint32_t*, uint32_t*), int in_words,
              int out_words, double tolerance) {
  add_warp(cases, name, kernel, to_bytes(random_bf16(2 * size_t(in_words), uint32_t(in_words))), out_words, tolerance);
}

// Every lane's metadata are random ordered codes, also where a selector does not read them.
Bytes sparse_input() {
  constexpr uint32_t codes[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};
  std::vector<uint16_t> halves = random_bf16(2 * sm80::kMmaSpIn, 24);
  std::mt19937 random(24);
  for (size_t i = halves.size() - 64; i < halves.size(); ++i) {
    halves[i] = 0;
    for (int group = 0; group < 4; ++group) halves[i] |= uint16_t(codes[random() % 6] << (4 * group));
  }
  return to_bytes(halves);
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_warp(cases, "ldmatrix", sm80::ldmatrix_kernel, sm80::kLdmatrixIn, sm80::kLdmatrixOut, 0);
  add_warp(cases, "stmatrix", sm80::stmatrix_kernel, sm80::kStmatrixIn, sm80::kStmatrixOut, 0);
  add_warp(cases, "cp_async", sm80::copy_kernel, sm80::kCopyIn, sm80::kCopyOut, 0);
  add_warp(cases, "mma", sm80::mma_kernel, sm80::kMmaIn, sm80::kMmaOut, 16 * std::ldexp(1, -20));
  add_warp(cases, "mma_sp", sm80::mma_sp_kernel, sparse_input(), sm80::kMmaSpOut, 16 * std::ldexp(1, -20));
  for (const sm90::At at : {sm90::At{0, 0, 0}, sm90::At{-3, -2, 0}, sm90::At{64, 8, 0}}) {
    add_tma(cases, CU_TENSOR_MAP_SWIZZLE_NONE, "plain", at);
    add_tma(cases, CU_TENSOR_MAP_SWIZZLE_32B, "32b", at);
    add_tma(cases, CU_TENSOR_MAP_SWIZZLE_64B, "64b", at);
    add_tma(cases, CU_TENSOR_MAP_SWIZZLE_128B, "128b", at);
  }
  add_wgmma<8, ptx::Swizzle::bytes128>(cases);
  add_wgmma<24, ptx::Swizzle::bytes128>(cases);
  add_wgmma<256, ptx::Swizzle::bytes128>(cases);
  add_wgmma<64, ptx::Swizzle::bytes64>(cases);
  add_wgmma<96, ptx::Swizzle::bytes32>(cases);
  add_wgmma<40, ptx::Swizzle::none>(cases);
  add_wgmma_registers<64>(cases);
  add_wgmma_registers<128>(cases);
  return cases;
}

std::string path_of(const std::string& folder, const Case& c) {
  return folder + "/" + c.name + ".bin";
}

int record(const std::string& folder) {
  std::string index;
  for (const Case& c : all_cases()) {
    const Bytes output = c.run(c.input);
    const uint64_t length = c.input.size();
    std::ofstream file(path_of(folder, c), std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), 8);
    file.write(c.input.data(), std::streamsize(c.input.size()));
    file.write(output.data(), std::streamsize(output.size()));
    if (!file) throw std::runtime_error("cannot write " + path_of(folder, c));
    index += (index.empty() ? "" : ",\n") + std::string("  {\"name\": \"") + c.name +
             "\", \"input_bytes\": " + std::to_string(c.input.size()) +
             ", \"output_bytes\": " + std::to_string(output.size()) + "}";
  }
  std::ofstream(folder + "/index.json") << "[\n" << index << "\n]\n";
  return 0;
}

bool agrees(const Case& c, const Bytes& got, const Bytes& want) {
  if (got.size() != want.size()) return false;
  if (c.tolerance == 0) return got == want;
  const auto g = from_bytes<float>(got, 0, got.size() / 4), w = from_bytes<float>(want, 0, want.size() / 4);
  for (size_t i = 0; i < g.size(); ++i)
    if (!(std::abs(g[i] - w[i]) <= c.tolerance)) return false;
  return true;
}

int compare(const std::string& folder) {
  int compared = 0, wrong = 0;
  for (const Case& c : all_cases()) {
    std::ifstream file(path_of(folder, c), std::ios::binary);
    if (!file) {
      std::printf("MISSING %s\n", c.name.c_str());
      ++wrong;
      continue;
    }
    uint64_t length = 0;
    file.read(reinterpret_cast<char*>(&length), 8);
    const Bytes rest((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    ++compared;
    if (length == c.input.size() && rest.size() >= length) {
      const auto middle = rest.begin() + std::ptrdiff_t(length);
      if (agrees(c, c.run(Bytes(rest.begin(), middle)), Bytes(middle, rest.end()))) continue;
    }
    std::printf("DIFFERS %s\n", c.name.c_str());
    ++wrong;
  }
  std::printf("conformance: %d cases compared, %d wrong\n", compared, wrong);
  return wrong ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 3 && !std::strcmp(argv[1], "record")) return record(argv[2]);
    if (argc == 3 && !std::strcmp(argv[1], "compare")) return compare(argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "conformance: %s\n", error.what());
    return 1;
  }
  std::fprintf(stderr, "usage: conformance record|compare <folder>\n");
  return 2;
}
