// steer on the CPU: adds vectors to the rows that want them, in place; the other rows are not even read.
#include "steer.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace thinkserve {
namespace {

template <typename T, typename V>
void add(T* row, const Steerings<V>& steerings, int64_t hidden) {
  int64_t column = 0;
  for (; column + kChunk <= hidden; column += kChunk) {
    store_pair(row + column, steered(load_pair(row + column), steerings, column));
  }
  for (; column < hidden; ++column) {
    row[column] = static_cast<T>(steered(static_cast<float>(row[column]), steerings, column));
  }
}

template <typename T, typename V>
void add_all(const at::Tensor& hidden, const Table<V>& table) {
  T* const rows = hidden.mutable_data_ptr<T>();
  const int64_t stride = hidden.stride(0);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, table.hidden));
  at::parallel_for(0, hidden.size(0), grain, [&](int64_t begin, int64_t end) {
    Steerings<V> steerings;
    for (int64_t row = begin; row < end; ++row) {
      table.of(row, steerings);
      if (!steerings.empty()) add(rows + row * stride, steerings, table.hidden);
    }
  });
}

template <typename T>
void steer_rows(const at::Tensor& hidden, const at::Tensor& vectors, const at::Tensor& index, const at::Tensor& scale) {
  if (vectors.scalar_type() == at::kFloat) {
    add_all<T>(hidden, Table<float>(vectors, index, scale));
  } else {
    add_all<T>(hidden, Table<T>(vectors, index, scale));
  }
}

void steer(at::Tensor hidden, const at::Tensor& vectors, const at::Tensor& index, const at::Tensor& scale) {
  check(hidden, vectors, index, scale);
  AT_DISPATCH_SWITCH(
      hidden.scalar_type(), "steer",
      AT_DISPATCH_CASE(at::kFloat, [&] { steer_rows<scalar_t>(hidden, vectors, index, scale); })
          AT_DISPATCH_CASE(at::kBFloat16, [&] { steer_rows<scalar_t>(hidden, vectors, index, scale); })
              AT_DISPATCH_CASE(at::kHalf, [&] { steer_rows<scalar_t>(hidden, vectors, index, scale); }));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(thinkserve_cpu, library) {
  library.def("steer(Tensor(a!) hidden, Tensor vectors, Tensor index, Tensor scale) -> ()");
  library.impl("steer", c10::DispatchKey::CPU, TORCH_FN(steer));
}

}  // namespace thinkserve
