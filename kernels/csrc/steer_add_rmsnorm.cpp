// steer_add_rmsnorm on the CPU: two passes over a block of rows that stays in the cache, not one per operation.
//
// The squares are summed by PyTorch: its order of summation depends on the vector width, and only the same one gives
// the same bits as the operations one by one.
#include "steer.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <cmath>

namespace thinkserve {
namespace {

// Floats of one block of rows: its sums and their squares fit a second-level cache of half a megabyte.
constexpr int64_t kBlock = 32768;

// (x + steering) + residual of one row: rounded into `residual`, unrounded into `sums`, squared into `squares`.
template <typename T, typename V>
void add(const T* x, T* residual, float* sums, float* squares, const Steerings<V>& steerings, int64_t hidden) {
  int64_t column = 0;
  for (; column + kChunk <= hidden; column += kChunk) {
    Pair sum = steered(load_pair(x + column), steerings, column);
    const Pair before = load_pair(residual + column);
    sum = {sum.low + before.low, sum.high + before.high};
    store_pair(residual + column, sum);
    store_pair(sums + column, sum);
    store_pair(squares + column, Pair{sum.low * sum.low, sum.high * sum.high});
  }
  for (; column < hidden; ++column) {
    const float sum = steered(static_cast<float>(x[column]), steerings, column) + static_cast<float>(residual[column]);
    residual[column] = static_cast<T>(sum);
    sums[column] = sum;
    squares[column] = sum * sum;
  }
}

template <typename T>
Pair rounded(const Pair& value) {
  alignas(64) T buffer[kChunk];
  store_pair(buffer, value);
  return load_pair(buffer);
}

// sums * factor, rounded, times weight.
template <typename T>
void scale_row(T* x, const float* sums, float factor, const T* weight, int64_t hidden) {
  const Floats factors(factor);
  int64_t column = 0;
  for (; column + kChunk <= hidden; column += kChunk) {
    const Pair sum = load_pair(sums + column);
    const Pair normed = rounded<T>({sum.low * factors, sum.high * factors});
    const Pair weights = load_pair(weight + column);
    store_pair(x + column, Pair{normed.low * weights.low, normed.high * weights.high});
  }
  for (; column < hidden; ++column) {
    const float normed = static_cast<float>(static_cast<T>(sums[column] * factor));
    x[column] = static_cast<T>(normed * static_cast<float>(weight[column]));
  }
}

template <typename T>
struct Rows {
  T* values;
  int64_t stride;

  explicit Rows(const at::Tensor& rows) : values(rows.mutable_data_ptr<T>()), stride(rows.stride(0)) {}
  T* operator[](int64_t row) const { return values + row * stride; }
};

template <typename T, typename V>
void run(Rows<T> x, Rows<T> residual, const T* weight, double eps, const Table<V>& table, int64_t begin, int64_t end) {
  const int64_t hidden = table.hidden;
  const int64_t block = std::min(end - begin, std::max<int64_t>(1, kBlock / std::max<int64_t>(1, hidden)));
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor scratch = at::empty({2 * block, hidden}, at::kFloat);
  float* const sums = scratch.mutable_data_ptr<float>();
  float* const squares = sums + block * hidden;
  Steerings<V> steerings;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = std::min(block, end - first);
    for (int64_t row = 0; row < count; ++row) {
      table.of(first + row, steerings);
      add(x[first + row], residual[first + row], sums + row * hidden, squares + row * hidden, steerings, hidden);
    }
    const at::Tensor totals = at::sum(scratch.narrow(0, block, count), {1});
    const float* const total = totals.const_data_ptr<float>();
    for (int64_t row = 0; row < count; ++row) {
      const float factor = 1.0f / std::sqrt(total[row] / static_cast<float>(hidden) + static_cast<float>(eps));
      scale_row(x[first + row], sums + row * hidden, factor, weight, hidden);
    }
  }
}

template <typename T, typename V>
void run_all(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps, const Table<V>& table) {
  const Rows<T> xs(x), residuals(residual);
  const T* const weights = weight.const_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, table.hidden));
  at::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    run(xs, residuals, weights, eps, table, begin, end);
  });
}

void steer_add_rmsnorm(
    at::Tensor x, at::Tensor residual, const at::Tensor& weight, double eps, const at::Tensor& vectors,
    const at::Tensor& index, const at::Tensor& scale) {
  check(x, vectors, index, scale);
  TORCH_CHECK_VALUE(
      residual.sizes() == x.sizes() && (residual.stride(1) == 1 || residual.size(1) <= 1),
      "residual must be as x, each row in one piece");
  TORCH_CHECK_VALUE(
      weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous(), "weight must be [hidden]");
  TORCH_CHECK_TYPE(
      residual.scalar_type() == x.scalar_type() && weight.scalar_type() == x.scalar_type(),
      "residual and weight must be ", x.scalar_type());
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    if (vectors.scalar_type() == at::kFloat) {
      run_all<T>(x, residual, weight, eps, Table<float>(vectors, index, scale));
    } else {
      run_all<T>(x, residual, weight, eps, Table<T>(vectors, index, scale));
    }
  };
  AT_DISPATCH_SWITCH(
      x.scalar_type(), "steer_add_rmsnorm",
      AT_DISPATCH_CASE(at::kFloat, [&] { typed(scalar_t()); })
          AT_DISPATCH_CASE(at::kBFloat16, [&] { typed(scalar_t()); })
              AT_DISPATCH_CASE(at::kHalf, [&] { typed(scalar_t()); }));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(thinkserve_cpu, library) {
  library.def(
      "steer_add_rmsnorm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, Tensor vectors, Tensor index, "
      "Tensor scale) -> ()");
  library.impl("steer_add_rmsnorm", c10::DispatchKey::CPU, TORCH_FN(steer_add_rmsnorm));
}

}  // namespace thinkserve
