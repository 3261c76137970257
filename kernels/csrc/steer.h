// Steering of one row in float32, shared by the kernels that do it: which vectors, in order, and how strongly.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <type_traits>

namespace thinkserve {

using Floats = at::vec::Vectorized<float>;

constexpr int64_t kHalf = Floats::size();
// What one register of a 16-bit type converts to: two registers of floats.
constexpr int64_t kChunk = 2 * kHalf;
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

struct Pair {
  Floats low, high;
};

template <typename T>
inline Pair load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Floats::loadu(from), Floats::loadu(from + kHalf)};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
    return {low, high};
  }
}

template <typename T>
inline void store_pair(T* to, const Pair& value) {
  if constexpr (std::is_same_v<T, float>) {
    value.low.store(to);
    value.high.store(to + kHalf);
  } else {
    at::vec::convert_from_float<T>(value.low, value.high).store(to);
  }
}

template <typename V>
struct Steering {
  const V* vector;
  float scale;
};

template <typename V>
using Steerings = c10::SmallVector<Steering<V>, 8>;

// The table of vectors, and which of them steer each row: index and scale are [rows, k], contiguous.
template <typename V>
struct Table {
  const V* vectors;
  int64_t slots, hidden;
  const int64_t* index;
  const float* scale;
  int64_t k;

  Table(const at::Tensor& table, const at::Tensor& which, const at::Tensor& strength)
      : vectors(table.const_data_ptr<V>()), slots(table.size(0)), hidden(table.size(1)),
        index(which.const_data_ptr<int64_t>()), scale(strength.const_data_ptr<float>()), k(which.size(1)) {}

  // What steers `row`, in order; nothing for a row that must not be written.
  void of(int64_t row, Steerings<V>& out) const {
    out.clear();
    for (int64_t at = row * k; at < (row + 1) * k; ++at) {
      if (index[at] < 0) continue;
      TORCH_CHECK_INDEX(index[at] < slots, "index ", index[at], " is out of range: there are ", slots, " vectors");
      out.push_back({vectors + index[at] * hidden, scale[at]});
    }
  }
};

// sum + scale * vector for each, rounded after the product and after the sum: bit for bit what PyTorch does eagerly.
template <typename V>
inline Pair steered(Pair sum, const Steerings<V>& steerings, int64_t column) {
  for (const auto& one : steerings) {
    const Floats scale(one.scale);
    const Pair vector = load_pair(one.vector + column);
    sum.low = sum.low + scale * vector.low;
    sum.high = sum.high + scale * vector.high;
  }
  return sum;
}

template <typename V>
inline float steered(float sum, const Steerings<V>& steerings, int64_t column) {
  for (const auto& one : steerings) sum += one.scale * static_cast<float>(one.vector[column]);
  return sum;
}

// Shapes, layouts and dtypes of what steers `rows`.
inline void check(const at::Tensor& rows, const at::Tensor& vectors, const at::Tensor& index, const at::Tensor& scale) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && vectors.dim() == 2 && index.dim() == 2, "rows, vectors, index are matrices");
  TORCH_CHECK_VALUE(rows.size(1) == vectors.size(1), "vectors of ", vectors.size(1), " on rows of ", rows.size(1));
  TORCH_CHECK_VALUE(
      index.size(0) == rows.size(0) && index.sizes() == scale.sizes(), "index and scale must be [rows, k]: rows is ",
      rows.size(0), ", index ", index.sizes(), ", scale ", scale.sizes());
  TORCH_CHECK_VALUE(rows.stride(1) == 1 || rows.size(1) <= 1, "a row must lie in one piece");
  TORCH_CHECK_VALUE(
      vectors.is_contiguous() && index.is_contiguous() && scale.is_contiguous(),
      "vectors, index and scale must be contiguous");
  TORCH_CHECK_TYPE(
      index.scalar_type() == at::kLong && scale.scalar_type() == at::kFloat, "index must be int64, scale float32");
  TORCH_CHECK_TYPE(
      vectors.scalar_type() == at::kFloat || vectors.scalar_type() == rows.scalar_type(), "vectors must be ",
      rows.scalar_type(), " or Float: ", vectors.scalar_type());
}

}  // namespace thinkserve
