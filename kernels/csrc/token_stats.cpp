// token_stats on the CPU: a row is read once, a block at a time, and the block again from the first-level cache.
#include "steer.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace thinkserve {
namespace {

constexpr int64_t kColumns = 6;
constexpr int64_t kBlock = 512;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Stands for -inf wherever it would be multiplied by zero; its exponential is zero beside any logit.
constexpr float kLowest = -1e30f;

inline float sum_of(const Floats& lanes) {
  return at::vec::vec_reduce_all<float>([](const Floats& a, const Floats& b) { return a + b; }, lanes);
}

inline float largest_of(const Floats& lanes) {
  return at::vec::vec_reduce_all<float>(
      [](const Floats& a, const Floats& b) { return at::vec::maximum(a, b); }, lanes);
}

// Everything a row has told so far; mass is sum exp(z - pivot), slope is sum exp(z - pivot) * (z - pivot).
struct Row {
  Floats first{-kInfinity}, second{-kInfinity};
  float pivot = kLowest;
  double mass = 0, slope = 0, total = 0;

  void raise(float peak) {
    if (peak <= pivot) return;
    const double step = static_cast<double>(pivot) - peak, scale = std::exp(step);
    slope = (slope + mass * step) * scale;
    mass *= scale;
    pivot = peak;
  }

  // `size` floats, a multiple of the register width; what fills it up is -inf.
  void add(const float* block, int64_t size) {
    for (int64_t at = 0; at < size; at += kHalf) {
      const Floats z = Floats::loadu(block + at);
      second = at::vec::maximum(second, at::vec::minimum(first, z));
      first = at::vec::maximum(first, z);
    }
    raise(largest_of(first));
    const Floats lowest(kLowest), top(pivot);
    Floats weights(0.f), products(0.f);
    for (int64_t at = 0; at < size; at += kHalf) {
      const Floats step = at::vec::maximum(Floats::loadu(block + at), lowest) - top;
      const Floats weight = step.exp_u20();
      weights = weights + weight;
      products = products + weight * step;
    }
    mass += sum_of(weights);
    slope += sum_of(products);
  }

  void write(float* out, int64_t vocab, bool closes, float own) const {
    float firsts[kHalf], seconds[kHalf];
    first.store(firsts);
    second.store(seconds);
    float best = -kInfinity, next = -kInfinity;
    for (int64_t lane = 0; lane < kHalf; ++lane) {
      next = std::max({next, seconds[lane], std::min(best, firsts[lane])});
      best = std::max(best, firsts[lane]);
    }
    const double size = std::log(mass), mean = total / static_cast<double>(vocab);
    out[0] = static_cast<float>(best + size);
    out[1] = static_cast<float>(mean);
    out[2] = static_cast<float>(size + (best - mean) - std::log(static_cast<double>(vocab)));
    out[3] = static_cast<float>(size - slope / mass);
    out[4] = best - next;
    out[5] = closes ? own - (own >= best ? next : best) : -kInfinity;
  }
};

// `size` entries as floats, filled up with -inf to whole registers; returns their sum.
template <typename T>
float fetch(const T* from, int64_t size, float* block) {
  Floats total(0.f);
  int64_t at = 0;
  for (; at + kChunk <= size; at += kChunk) {
    const Pair pair = load_pair(from + at);
    total = total + pair.low + pair.high;
    store_pair(block + at, pair);
  }
  float sum = sum_of(total);
  for (; at < size; ++at) sum += block[at] = static_cast<float>(from[at]);
  for (; at % kHalf != 0; ++at) block[at] = -kInfinity;
  return sum;
}

template <typename T>
void stats_row(const T* logits, int64_t vocab, int64_t close, float* out) {
  alignas(64) float block[kBlock];
  Row row;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t size = std::min(kBlock, vocab - begin);
    row.total += fetch(logits + begin, size, block);
    row.add(block, (size + kHalf - 1) / kHalf * kHalf);
  }
  row.write(out, vocab, close >= 0, close >= 0 ? static_cast<float>(logits[close]) : 0.f);
}

at::Tensor token_stats(const at::Tensor& logits, int64_t vocab, int64_t close) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.stride(1) == 1, "a row of logits must lie in one piece");
  TORCH_CHECK_VALUE(2 <= vocab && vocab <= logits.size(1) && -1 <= close && close < vocab, "vocabulary or token too large");
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  at::Tensor out = at::empty({rows, kColumns}, logits.options().dtype(at::kFloat));
  float* const to = out.mutable_data_ptr<float>();
  const auto all = [&](const auto* from) {
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / vocab), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) stats_row(from + row * stride, vocab, close, to + row * kColumns);
    });
  };
  AT_DISPATCH_SWITCH(
      logits.scalar_type(), "token_stats",
      AT_DISPATCH_CASE(at::kFloat, [&] { all(logits.const_data_ptr<scalar_t>()); })
          AT_DISPATCH_CASE(at::kBFloat16, [&] { all(logits.const_data_ptr<scalar_t>()); })
              AT_DISPATCH_CASE(at::kHalf, [&] { all(logits.const_data_ptr<scalar_t>()); }));
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(thinkserve_cpu, library) {
  library.def("token_stats(Tensor logits, int vocab, int close=-1) -> Tensor");
  library.impl("token_stats", c10::DispatchKey::CPU, TORCH_FN(token_stats));
}

}  // namespace thinkserve
