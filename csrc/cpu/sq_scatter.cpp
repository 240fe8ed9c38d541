// Squared per-example gradients of an embedding table. The cotangents of positions with the same index are summed
// first.
#include <torch/library.h>

#include <numeric>

#include "pack.h"

namespace t2v {
namespace {

void check_lookups(const char* op, const at::Tensor& index, const at::Tensor& g, int64_t num_rows) {
  check_scatter(op, index, g, num_rows);
  if (index.numel() == 0) return;
  const int64_t largest = index.max().item<int64_t>();
  TORCH_CHECK_INDEX(largest < num_rows, op, ": index ", largest, " is out of range for a table of ", num_rows, " rows");
}

// Calls use(row, sums [O]) for each table row that example n looks up, with the sums of g[m] over the row's positions.
template <class S, class Use>
void scatter_gradients(const at::Tensor& index, const at::Tensor& g, int64_t n, int64_t m, const Use& use) {
  using T = SumOf<S>;
  const int64_t positions = g.size(1), width = g.size(2);
  const int64_t* rows = index.const_data_ptr<int64_t>() + n * positions;
  const S* cotangent = g.const_data_ptr<S>() + m * g.stride(0);
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

at::Tensor sq_scatter(const at::Tensor& index, const at::Tensor& g, int64_t num_rows) {
  check_lookups("sq_scatter", index, g, num_rows);
  at::Tensor q = at::zeros({g.size(0), num_rows}, g.options().dtype(sum_type(g)));
  if (g.numel() == 0) return q;
  const at::Tensor rows = index.contiguous();
  T2V_DISPATCH(g.scalar_type(), "sq_scatter", [&] {
    using T = SumOf<scalar_t>;
    T* out = q.mutable_data_ptr<T>();
    at::parallel_for(0, g.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        scatter_gradients<scalar_t>(rows, g, m % rows.size(0), m, [&](int64_t row, const T* sums) {
          T total = 0;
          for (int64_t o = 0; o < g.size(2); ++o) total += sums[o] * sums[o];
          out[m * num_rows + row] = total;
        });
    });
  });
  return q;
}

void sq_scatter_acc_(at::Tensor& out, const at::Tensor& index, const at::Tensor& g, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(out.dim() == 2, "sq_scatter_acc_: out must be [V, O], got ", out.sizes());
  check_lookups("sq_scatter_acc_", index, g, out.size(0));
  check_accumulator("sq_scatter_acc_", out, {out.size(0), g.size(2)}, g, weight);
  if (g.numel() == 0) return;
  const at::Tensor rows = index.contiguous(), w = weight.contiguous();
  T2V_DISPATCH(g.scalar_type(), "sq_scatter_acc_", [&] {
    using T = SumOf<scalar_t>;
    const int64_t width = g.size(2);
    T* to = out.mutable_data_ptr<T>();
    const T* by = w.const_data_ptr<T>();
    // Each worker owns a share of the columns, so no two workers write to the same entry of the table.
    at::parallel_for(0, width, 64, [&](int64_t first, int64_t last) {
      const at::Tensor share = g.slice(2, first, last);
      for (int64_t m = 0; m < g.size(0); ++m)
        scatter_gradients<scalar_t>(rows, share, m % rows.size(0), m, [&](int64_t row, const T* sums) {
          for (int64_t o = first; o < last; ++o) to[row * width + o] += by[m] * sums[o - first] * sums[o - first];
        });
    });
  });
}

TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  m.impl("sq_scatter", sq_scatter);
  m.impl("sq_scatter_acc_", sq_scatter_acc_);
}

}  // namespace
}  // namespace t2v
