// Family `semi24` in fp64; see slkernels/semi24_linear.h.
#include "slkernels/semi24_linear.h"

#include <cmath>

namespace slk::cpu {
namespace {

double activate(Activation24 f, double z) {
  switch (f) {
    case Activation24::none:
      break;
    case Activation24::relu:
      return z < 0 ? 0 : z;
    case Activation24::silu:
      return z / (1 + std::exp(-z));
    case Activation24::gelu:
      return 0.5 * z * std::erfc(-z * std::sqrt(0.5));
    case Activation24::relu2:
      return z < 0 ? 0 : z * z;
  }
  return z;
}

// f(slot, column) for the kept elements of row i that lie in W.
template <class F>
void for_kept(const Weight24& w, int64_t i, F f) {
  const int64_t kept = kept24(w.m), bytes = ceil_div(kept, 4);
  for (int64_t s = 0; s < kept; ++s) {
    const int64_t column = s / 2 * 4 + (w.meta[i * bytes + s / 4] >> 2 * (s % 4) & 3);
    if (column < w.m) f(i * kept + s, column);
  }
}

double* row_of(const Matrix& x, int64_t t) {
  return static_cast<double*>(x.data) + t * x.ld;
}

}  // namespace

void linear24_f64(const Weight24& w, const Matrix& x, const double* bias, Activation24 f, Range tokens,
                  const Matrix& y) {
  const double* values = static_cast<const double*>(w.values);
  for (int64_t t = tokens.begin; t < tokens.end; ++t)
    for (int64_t i = 0; i < w.n; ++i) {
      double total = bias ? bias[i] : 0;
      for_kept(w, i, [&](int64_t s, int64_t column) { total += values[s] * row_of(x, t)[column]; });
      row_of(y, t)[i] = activate(f, total);
    }
}

void grad_x24_f64(const Weight24& w, const Matrix& dy, Range tokens, const Matrix& dx) {
  const double* values = static_cast<const double*>(w.values);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    for (int64_t j = 0; j < w.m; ++j) row_of(dx, t)[j] = 0;
    for (int64_t i = 0; i < w.n; ++i)
      for_kept(w, i, [&](int64_t s, int64_t column) { row_of(dx, t)[column] += values[s] * row_of(dy, t)[i]; });
  }
}

void grad_w24_f64(const Weight24& w, const Matrix& dy, const Matrix& x, Range rows, double* dvalues) {
  const int64_t kept = kept24(w.m);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    for (int64_t s = 0; s < kept; ++s) dvalues[i * kept + s] = 0;
    for_kept(w, i, [&](int64_t s, int64_t column) {
      for (int64_t t = 0; t < x.rows; ++t) dvalues[s] += row_of(dy, t)[i] * row_of(x, t)[column];
    });
  }
}

}  // namespace slk::cpu
