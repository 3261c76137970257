// guide on the CPU: the entries that no mask drops are gathered, their ln r taken a register at a time, and put back.
#include "steer.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace thinkserve {
namespace {

using Doubles = at::vec::Vectorized<double>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// What is left out beyond the span is exp(-16) of the integrand's peak.
constexpr float kDepth = 16.f;
// Gauss-Legendre, 14 points on [0, 1]: the lower half of the nodes (the upper are 1 - node), and their weights.
constexpr double kNodes[] = {0.006858095651593787, 0.03578255816821324, 0.08639934246511749, 0.15635354759415726,
                             0.24237568182092295,  0.3404438155360551,  0.44597252564632817};
constexpr double kWeights[] = {0.017559730165875875, 0.04007904357987999, 0.060759285343951655, 0.07860158357909681,
                               0.09276919873896894,  0.10259923186064786, 0.10763192673157897};

// a ln x - x - ln Gamma(a), by Stirling's series at a + 3.
inline Doubles log_density(const Doubles& a, const Doubles& x) {
  const Doubles one(1.), shifted = a + Doubles(3.), inverse = one / (shifted * shifted);
  const Doubles stirling =
      (Doubles(1. / 12) - inverse * (Doubles(1. / 360) - inverse * Doubles(1. / 1260))) / shifted;
  const Doubles product = a * (a + one) * (a + Doubles(2.));
  const Doubles log_gamma = (shifted - Doubles(.5)) * shifted.log() - shifted + Doubles(0.91893853320467274178) +
      stirling - product.log();
  return a * x.log() - x - log_gamma;
}

// exp(-s) - 1 + s, by its series where the difference would cancel.
inline Floats psi(const Floats& s) {
  Floats series(1.f / 40320);
  for (const float term : {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2}) {
    series = Floats(term) - s * series;
  }
  const Floats direct = s.neg().exp_u20() - Floats(1.f) + s;
  return Floats::blendv(direct, s * s * series, s.abs() < Floats(.5f));
}

// The integral over s of exp(-gap s - x psi(sign s)); see gamma.py.
inline Floats integral(const Floats& gap, const Floats& x, const Floats& sign) {
  const Floats depth(kDepth);
  Floats span = (depth + depth) / (gap + (gap * gap + (depth + depth) * x).sqrt());
  const Floats bend = (sign * span).neg().expm1();
  span = span - (gap * span + x * (bend + sign * span) - depth) / (gap - x * sign * bend);
  Floats total(0.f);
  const auto add = [&](double node, double weight) {
    const Floats s = span * Floats(static_cast<float>(node));
    total = total + Floats(static_cast<float>(weight)) * (gap * s + x * psi(sign * s)).neg().exp_u20();
  };
  for (int at = 0; at < 7; ++at) {
    add(kNodes[at], kWeights[at]);
    add(1 - kNodes[at], kWeights[at]);
  }
  return total * span;
}

// ln P(a, x) of kHalf pairs.
void log_cdf(const double* a, const double* x, double* out) {
  alignas(64) float gap[kHalf], near[kHalf], sign[kHalf], size[kHalf];
  for (int64_t i = 0; i < kHalf; ++i) {
    gap[i] = static_cast<float>(std::abs(a[i] - x[i]));
    near[i] = static_cast<float>(x[i]);
    sign[i] = a[i] > x[i] ? 1.f : -1.f;
  }
  integral(Floats::loadu(gap), Floats::loadu(near), Floats::loadu(sign)).log().store(size);
  for (int64_t i = 0; i < kHalf; i += Doubles::size()) {
    log_density(Doubles::loadu(a + i), Doubles::loadu(x + i)).store(out + i);
  }
  // Below x = a the integral is P itself, above it is the rest.
  for (int64_t i = 0; i < kHalf; ++i) {
    out[i] += size[i];
    near[i] = std::min(static_cast<float>(out[i]), -.1f);
  }
  (Floats(1.f) - Floats::loadu(near).exp()).log().store(near);
  for (int64_t i = 0; i < kHalf; ++i) out[i] = sign[i] > 0 ? out[i] : near[i];
}

struct Masks {
  double lam_min, alpha_min, log_mode_min;

  bool keep(float alpha, float lam) const {
    return lam >= lam_min && alpha > alpha_min && alpha - 1. >= log_mode_min * lam && alpha < kInfinity;
  }
};

// One row at a time, in memory that is kept from row to row.
struct Row {
  std::vector<int64_t> columns;
  std::vector<double> shapes, arguments, scores;

  void gather(const float* alpha, const float* lam, int64_t vocab, double horizon, const Masks& masks) {
    columns.clear();
    shapes.clear();
    arguments.clear();
    for (int64_t v = 0; v < vocab; ++v) {
      if (!masks.keep(alpha[v], lam[v])) continue;
      columns.push_back(v);
      shapes.push_back(alpha[v]);
      arguments.push_back(lam[v] * horizon);
    }
    const size_t whole = (columns.size() + kHalf - 1) / kHalf * kHalf;
    shapes.resize(whole, 1.);
    arguments.resize(whole, 1.);
    scores.resize(whole);
  }

  template <typename T>
  void guide(const T* logits, int64_t vocab, float* out) {
    std::fill(out, out + vocab, -kInfinity);
    for (size_t at = 0; at < scores.size(); at += kHalf) log_cdf(&shapes[at], &arguments[at], &scores[at]);
    double peak = -kInfinity, mass = 0;
    for (size_t i = 0; i < columns.size(); ++i) {
      peak = std::max(peak, scores[i] += static_cast<float>(logits[columns[i]]));
    }
    if (peak == -kInfinity) {
      out[std::max_element(logits, logits + vocab) - logits] = 0;
      return;
    }
    for (size_t i = 0; i < columns.size(); ++i) mass += std::exp(scores[i] - peak);
    const double whole = peak + std::log(mass);
    for (size_t i = 0; i < columns.size(); ++i) out[columns[i]] = static_cast<float>(scores[i] - whole);
  }
};

at::Tensor guide(
    const at::Tensor& logits, const at::Tensor& alpha, const at::Tensor& lam, const at::Tensor& remaining,
    double lam_min, double alpha_min, double mode_min) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  TORCH_CHECK_VALUE(
      logits.stride(1) == 1 && alpha.is_contiguous() && lam.is_contiguous() && remaining.is_contiguous(),
      "a row must lie in one piece; alpha, lam and remaining must be contiguous");
  TORCH_CHECK_VALUE(
      alpha.sizes() == logits.sizes() && lam.sizes() == logits.sizes() && remaining.numel() == rows,
      "logits, alpha and lam must have one shape, and remaining its rows");
  at::Tensor out = at::empty({rows, vocab}, logits.options().dtype(at::kFloat));
  float* const to = out.mutable_data_ptr<float>();
  const float *shape = alpha.const_data_ptr<float>(), *rate = lam.const_data_ptr<float>();
  const float* const left = remaining.const_data_ptr<float>();
  const Masks masks{lam_min, alpha_min, std::log1p(mode_min)};
  const auto all = [&](const auto* from) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Row row;
      for (int64_t at = begin; at < end; ++at) {
        row.gather(shape + at * vocab, rate + at * vocab, vocab, std::log(std::max(1.f, left[at]) + 1.), masks);
        row.guide(from + at * stride, vocab, to + at * vocab);
      }
    });
  };
  AT_DISPATCH_SWITCH(
      logits.scalar_type(), "guide",
      AT_DISPATCH_CASE(at::kFloat, [&] { all(logits.const_data_ptr<scalar_t>()); })
          AT_DISPATCH_CASE(at::kBFloat16, [&] { all(logits.const_data_ptr<scalar_t>()); })
              AT_DISPATCH_CASE(at::kHalf, [&] { all(logits.const_data_ptr<scalar_t>()); }));
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(thinkserve_cpu, library) {
  library.def(
      "guide(Tensor logits, Tensor alpha, Tensor lam, Tensor remaining, float lam_min, float alpha_min, "
      "float mode_min) -> Tensor");
  library.impl("guide", c10::DispatchKey::CPU, TORCH_FN(guide));
}

}  // namespace thinkserve
