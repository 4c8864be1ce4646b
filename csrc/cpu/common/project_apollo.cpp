// The limiter's scalars of apollo_scale_update_. Contract: slkernels/project.h.
#include <cmath>

#include "slkernels/project.h"

namespace slk {

void apollo_factors(const ApolloSums& x, float* norm, float* factor) {
  const auto scale = [](double n2, double r2) { return std::sqrt(n2) / (std::sqrt(r2) + 1e-8); };
  double all = 0, n2 = 0, r2 = 0;
  for (int64_t c = 0; c < x.channels; ++c) {
    n2 += x.n2[c];
    r2 += x.r2[c];
    const double rest = double(x.g2[c]) - (x.residual ? x.r2[c] : 0.0f), s = x.per_tensor ? 1 : scale(x.n2[c], x.r2[c]);
    all += s * s * (rest < 0 ? 0 : rest);
  }
  const double one = scale(n2, r2), u = std::sqrt(all) * (x.per_tensor ? one : 1);
  double growth = 1;
  if (*norm > 0 && x.limiter > 0) growth = std::fmax(u / (double(*norm) + 1e-8), x.limiter) / x.limiter;
  if (std::isfinite(u)) *norm = float(u / growth);
  if (x.per_tensor) {
    *factor = float(one / growth);
    return;
  }
  for (int64_t c = 0; c < x.channels; ++c) factor[c] = float(scale(x.n2[c], x.r2[c]) / growth);
}

}  // namespace slk
