// Squared per-example gradients of an embedding table. The cotangents of positions with the same index are summed
// first.
#include <numeric>

#include "pack.h"

namespace t2v {
namespace {

void check_lookups(const char* op, const View& index, const View& g, int64_t num_rows) {
  check_scatter(op, index, g, num_rows);
  if (index.numel() == 0) return;
  const int64_t* rows = index.const_data_ptr<int64_t>();
  int64_t largest = -1;
  for (int64_t n = 0; n < index.size(0); ++n)
    for (int64_t s = 0; s < index.size(1); ++s)
      largest = std::max(largest, rows[n * index.stride(0) + s * index.stride(1)]);
  if (largest >= num_rows)
    throw std::out_of_range(
        text(op, ": index ", largest, " is out of range for a table of ", num_rows, " rows"));  // IndexError
}

// Calls use(row, sums) for each table row that example n looks up, with the sums of g[m] over the row's positions, for
// the columns from `first` to `last`.
template <class S, class Use>
void scatter_gradients(const View& index, const View& g, int64_t n, int64_t m, int64_t first, int64_t last,
                       const Use& use) {
  using T = SumOf<S>;
  const int64_t positions = g.size(1), width = last - first;
  const int64_t* rows = index.const_data_ptr<int64_t>() + n * positions;
  const S* cotangent = g.const_data_ptr<S>() + m * g.stride(0) + first * g.stride(2);
  std::vector<int64_t> order(positions);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [rows](int64_t a, int64_t b) { return rows[a] < rows[b]; });
  std::vector<T> sums(width);
  for (int64_t k = 0; k < positions;) {
    const int64_t row = rows[order[k]];
    std::fill(sums.begin(), sums.end(), T(0));
    for (; k < positions && rows[order[k]] == row; ++k) {
      const S* from = cotangent + order[k] * g.stride(1);
      for (int64_t o = 0; o < width; ++o) sums[o] += static_cast<T>(from[o * g.stride(2)]);
    }
    if (row >= 0) use(row, sums.data());  // negative indices are padding
  }
}

Tensor sq_scatter(const Tensor& index, const Tensor& g, int64_t num_rows) {
  check_lookups("sq_scatter", index, g, num_rows);
  const Tensor q = zeros({g.size(0), num_rows}, sum_type(g));
  if (g.numel() == 0) return q;
  const Tensor rows = contiguous(index);
  with_type("sq_scatter", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    T* out = q.mutable_data_ptr<T>();
    parallel_for(0, g.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        scatter_gradients<scalar_t>(rows, g, m % rows.size(0), m, 0, g.size(2), [&](int64_t row, const T* sums) {
          T total = 0;
          for (int64_t o = 0; o < g.size(2); ++o) total += sums[o] * sums[o];
          out[m * num_rows + row] = total;
        });
    });
  });
  return q;
}

void sq_scatter_acc_(const Tensor& out, const Tensor& index, const Tensor& g, const Tensor& weight) {
  T2V_CHECK_VALUE(out.dim() == 2, "sq_scatter_acc_: out must be [V, O], got ", out.sizes());
  check_lookups("sq_scatter_acc_", index, g, out.size(0));
  check_accumulator("sq_scatter_acc_", out, {out.size(0), g.size(2)}, g, weight);
  if (g.numel() == 0) return;
  const Tensor rows = contiguous(index), w = contiguous(weight);
  with_type("sq_scatter_acc_", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    const int64_t width = g.size(2);
    T* to = out.mutable_data_ptr<T>();
    const T* by = w.const_data_ptr<T>();
    // Each worker owns a share of the columns, so no two workers write to the same entry of the table.
    parallel_for(0, width, 64, [&](int64_t first, int64_t last) {
      for (int64_t m = 0; m < g.size(0); ++m)
        scatter_gradients<scalar_t>(rows, g, m % rows.size(0), m, first, last, [&](int64_t row, const T* sums) {
          for (int64_t o = first; o < last; ++o) to[row * width + o] += by[m] * sums[o - first] * sums[o - first];
        });
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  T2V_IMPL(sq_scatter);
  T2V_IMPL(sq_scatter_acc_);
}

}  // namespace
}  // namespace t2v
