// Family sparse's CUDA kernels, thread by thread, against fp64: every dtype and index type, ragged sizes, empty rows,
// rows and columns with every entry, rows of y with room between them that must stay untouched.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/sparse.h"

using namespace slk;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

template <class T>
constexpr DType kType = std::is_same_v<T, float>    ? DType::f32
                        : std::is_same_v<T, double> ? DType::f64
                        : std::is_same_v<T, __half> ? DType::f16
                                                    : DType::bf16;
template <class T>
constexpr double kRounding = std::is_same_v<T, double>   ? 0x1p-53
                             : std::is_same_v<T, float>  ? 0x1p-24
                             : std::is_same_v<T, __half> ? 0x1p-11
                                                         : 0x1p-8;
template <class T>
constexpr double kSumRounding = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;

template <class T>
double wide(T x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return double(float(x));
}

struct Problem {
  int64_t n, m, tokens;
  double density;
  std::string show() const {
    return "n=" + std::to_string(n) + " m=" + std::to_string(m) + " T=" + std::to_string(tokens) +
           " density=" + std::to_string(density);
  }
};

// A support with an empty first row, a full second row and a full first column.
template <class Col>
struct Support {
  std::vector<int32_t> crow{0};
  std::vector<Col> col;
  Support(const Problem& p, std::mt19937& random) {
    std::uniform_real_distribution<double> uniform;
    for (int64_t i = 0; i < p.n; ++i) {
      for (int64_t j = 0; j < p.m; ++j)
        if (i == 1 || (i != 0 && (j == 0 || uniform(random) < p.density))) col.push_back(Col(j));
      crow.push_back(int32_t(col.size()));
    }
  }
};

template <class T>
std::vector<T> normal(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> draw;
  std::vector<T> values(count);
  for (T& v : values) v = T(draw(random));
  return values;
}

// One result against its exact value; `size` is the sum of the terms' magnitudes.
template <class T>
bool near(T got, double exact, double size, int64_t terms) {
  return std::fabs(wide(got) - exact) <=
         1.01 * kRounding<T> * std::fabs(exact) + size * double(terms + 2) * kSumRounding<T>;
}

template <class T, class Col>
struct Run {
  Problem p;
  std::mt19937 random;
  Support<Col> support;
  simt::Buffer<int32_t> crow;
  simt::Buffer<Col> col;
  Csr s;
  std::vector<T> values, x, dy;
  int64_t ldx;
  simt::Buffer<T> d_values, d_x, d_dy;
  std::string name;

  explicit Run(const Problem& problem)
      : p(problem),
        random(unsigned(problem.n * 131 + problem.m * 7 + problem.tokens)),
        support(problem, random),
        crow(support.crow),
        col(support.col),
        s{crow.get(), col.get(), sizeof(Col) == 2, p.n, p.m, int64_t(support.col.size())},
        values(normal<T>(s.nnz, random)),
        x(normal<T>(p.tokens * (p.m + 3), random)),
        dy(normal<T>(p.tokens * p.n, random)),
        ldx(p.m + 3),
        d_values(values),
        d_x(x),
        d_dy(dy),
        name(p.show() + " type " + std::to_string(int(kType<T>)) + " index " + std::to_string(sizeof(Col))) {}

  Matrix tokens_of(simt::Buffer<T>& data, int64_t cols, int64_t ld) { return {data.get(), p.tokens, cols, ld}; }

  void check_product(const char* what, const simt::Buffer<T>& y, int64_t ld, const std::vector<T>& before,
                     bool accumulate) {
    bool ok = true;
    for (int64_t t = 0; t < p.tokens; ++t) {
      for (int64_t i = 0; i < p.n; ++i) {
        double exact = accumulate ? wide(before[t * ld + i]) : 0, size = std::fabs(exact);
        for (int k = support.crow[i]; k < support.crow[i + 1]; ++k) {
          const double term = wide(values[k]) * wide(x[t * ldx + support.col[k]]);
          exact += term;
          size += std::fabs(term);
        }
        ok = ok && near(y[t * ld + i], exact, size, support.crow[i + 1] - support.crow[i]);
      }
      for (int64_t i = p.n; i < ld; ++i) ok = ok && wide(y[t * ld + i]) == wide(before[t * ld + i]);
    }
    expect(ok, std::string(what) + (accumulate ? " accumulating " : " ") + name);
  }

  void to_features(simt::Buffer<T>& out, simt::Buffer<T>& from, int64_t cols, int64_t ld, const std::vector<T>& host) {
    const int64_t padded = cuda::padded_tokens(p.tokens);
    expect(cuda::launch_to_features(kType<T>, tokens_of(from, cols, ld), out.get(), nullptr) == cudaSuccess, "launch");
    bool ok = true;
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t t = 0; t < padded; ++t)
        ok = ok && wide(out[j * padded + t]) == (t < p.tokens ? wide(host[t * ld + j]) : 0);
    expect(ok, "to_features " + name);
  }

  void products() {
    const int64_t ldy = p.n + 5;
    const int64_t padded = cuda::padded_tokens(p.tokens);
    simt::Buffer<T> xt(p.m * padded), dyt(p.n * padded);
    to_features(xt, d_x, p.m, ldx, x);
    to_features(dyt, d_dy, p.n, p.n, dy);
    for (bool accumulate : {false, true}) {
      const std::vector<T> before = normal<T>(p.tokens * ldy, random);
      simt::Buffer<T> y(before);
      expect(cuda::launch_spmm(kType<T>, s, d_values.get(), xt.get(), {y.get(), p.tokens, p.n, ldy}, accumulate,
                               nullptr) == cudaSuccess,
             "launch");
      check_product("spmm", y, ldy, before, accumulate);
      if (p.tokens > cuda::kFewTokens) continue;
      simt::Buffer<T> few(before);
      expect(cuda::launch_spmm_few(kType<T>, s, d_values.get(), tokens_of(d_x, p.m, ldx),
                                   {few.get(), p.tokens, p.n, ldy}, accumulate, nullptr) == cudaSuccess,
             "launch");
      check_product("spmm_few", few, ldy, before, accumulate);
    }
    simt::Buffer<T> dv(s.nnz);
    expect(cuda::launch_sddmm(kType<T>, s, dyt.get(), xt.get(), p.tokens, dv.get(), nullptr) == cudaSuccess, "launch");
    bool ok = true;
    for (int64_t i = 0; i < p.n; ++i)
      for (int k = support.crow[i]; k < support.crow[i + 1]; ++k) {
        double exact = 0, size = 0;
        for (int64_t t = 0; t < p.tokens; ++t) {
          const double term = wide(dy[t * p.n + i]) * wide(x[t * ldx + support.col[k]]);
          exact += term;
          size += std::fabs(term);
        }
        ok = ok && near(dv[k], exact, size, p.tokens);
      }
    expect(ok, "sddmm " + name);
  }

  void scatter() {
    const int64_t ld = p.m + 2;
    const std::vector<T> before = normal<T>(p.n * ld, random);
    simt::Buffer<T> w(before), gathered(s.nnz);
    cuda::launch_gather(kType<T>, s, w.get(), ld, gathered.get(), nullptr);
    cuda::launch_scatter_add(kType<T>, s, d_values.get(), w.get(), ld, nullptr);
    std::vector<T> want = before;
    bool ok = true;
    for (int64_t i = 0; i < p.n; ++i)
      for (int k = support.crow[i]; k < support.crow[i + 1]; ++k) {
        T& at = want[i * ld + support.col[k]];
        ok = ok && wide(gathered[k]) == wide(at);
        at = T(std::is_same_v<T, double> ? wide(at) + wide(values[k]) : float(wide(at)) + float(wide(values[k])));
      }
    expect(ok, "gather " + name);
    ok = true;
    for (size_t at = 0; at < want.size(); ++at) ok = ok && wide(w[at]) == wide(want[at]);
    expect(ok, "scatter_add " + name);
  }

  void transpose() {
    simt::Buffer<int32_t> crow_t(p.m + 1), scratch(cuda::transpose_scratch(s));
    simt::Buffer<int16_t> row_t(s.nnz);
    simt::Buffer<T> values_t(s.nnz);
    expect(cuda::launch_transpose_csr(kType<T>, s, d_values.get(), crow_t.get(), row_t.get(), values_t.get(),
                                      scratch.get(), nullptr) == cudaSuccess,
           "launch");
    std::vector<float> from(s.nnz), to(s.nnz);
    for (int64_t k = 0; k < s.nnz; ++k) from[k] = float(wide(values[k]));
    std::vector<int32_t> want_crow(p.m + 1);
    std::vector<int16_t> want_row(s.nnz);
    const Csr host = {support.crow.data(), support.col.data(), s.col_is_16, s.n, s.m, s.nnz};
    cpu::transpose_csr(host, from.data(), want_crow.data(), want_row.data(), to.data());
    bool ok = crow_t.host() == want_crow && row_t.host() == want_row;
    for (int64_t k = 0; k < s.nnz; ++k) ok = ok && float(wide(values_t[k])) == to[k];
    expect(ok, "transpose " + name);
  }
};

template <class T, class Col>
void check(const Problem& p) {
  Run<T, Col> run(p);
  run.products();
  run.scatter();
  run.transpose();
}

}  // namespace

int main() {
  for (const Problem& p :
       {Problem{37, 45, 1, 0.2}, Problem{35, 29, 7, 0.3}, Problem{3, 70, 300, 0.1}, Problem{66, 40, 33, 0.1}})
    check<__nv_bfloat16, int16_t>(p);
  check<__half, int16_t>({40, 33, 12, 0.2});
  check<float, int16_t>({40, 33, 130, 0.2});
  check<float, int32_t>({9, 33, 5, 0.2});
  check<double, int32_t>({34, 20, 70, 0.2});
  check<__nv_bfloat16, int16_t>({530, 3, 2, 0.3});  // 34 chunks of rows: two passes of the prefix sum
  check<float, int16_t>({2, 1, 1, 0.0});
  Run<float, int16_t> refused({2, 4, 9, 0.5});
  expect(cuda::launch_spmm_few(DType::f32, refused.s, refused.d_values.get(), refused.tokens_of(refused.d_x, 4, 7),
                               {refused.d_dy.get(), 9, 2, 2}, false, nullptr) == cudaErrorInvalidValue,
         "spmm_few refuses many tokens");
  std::printf(failures ? "%d failures\n" : "sparse: ok\n", failures);
  return failures ? 1 : 0;
}
