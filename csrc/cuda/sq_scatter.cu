// Squared per-example gradients of an embedding table. Look-ups are sorted, so those of one row are adjacent.
#include "device.h"

namespace t2v::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ SumOf<T> value_at(const Lookups& l, const Tokens<T>& g, int cotangent, int k, int c) {
  const int place = static_cast<int>(l.place[k]), n = place / l.positions, s = place - n * l.positions;
  return static_cast<SumOf<T>>(g.data[(cotangent * l.examples + n) * g.row + s * g.position + c * g.channel]);
}

__device__ inline bool same_row(const Lookups& l, int first, int k) { return k < l.count && l.row[k] == l.row[first]; }

__device__ inline bool same_example(const Lookups& l, int first, int k) {
  return same_row(l, first, k) &&
         static_cast<int>(l.place[k]) / l.positions == static_cast<int>(l.place[first]) / l.positions;
}

// Each block computes one table row that an example looks up, for one of the example's cotangents.
template <class T>
__global__ void __launch_bounds__(kThreads)
    filter_kernel(Lookups l, Tokens<T> g, int64_t table, int channels, SumOf<T>* sums) {
  using Sum = SumOf<T>;
  Share share;
  const int first = share.of(l.count), cotangent = share.rest();
  if (l.row[first] < 0 || (first > 0 && same_example(l, first - 1, first))) return;  // true for the whole block
  Sum squares = 0;
  for (int c = thread(); c < channels; c += kThreads) {
    Sum sum = 0;
    for (int k = first; same_example(l, first, k); ++k) sum += value_at(l, g, cotangent, k, c);
    squares += sum * sum;
  }
  Sum* const of_warps = reinterpret_cast<Sum*>(shared_memory<sizeof(Sum) * kThreads / 32>());
  squares = warp_sum(squares);
  if (thread() % 32 == 0) of_warps[thread() / 32] = squares;
  __syncthreads();
  if (thread() > 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) squares += of_warps[warp];
  const int n = static_cast<int>(l.place[first]) / l.positions;
  sums[(cotangent * l.examples + n) * table + l.row[first]] = squares;
}

// Each block computes some channels of one table row, and goes through the row's look-ups in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    element_kernel(Lookups l, Tokens<T> g, const SumOf<T>* weight, int channels, SumOf<T>* out) {
  using Sum = SumOf<T>;
  Share share;
  const int c = share.of((channels + kThreads - 1) / kThreads) * kThreads + thread(), first = share.rest();
  if (l.row[first] < 0 || (first > 0 && same_row(l, first - 1, first)) || c >= channels) return;
  Sum total = 0;
  for (int cotangent = 0; cotangent < l.rows / l.examples; ++cotangent)
    for (int k = first; same_row(l, first, k);) {
      const int example = k, n = static_cast<int>(l.place[k]) / l.positions;
      Sum sum = 0;
      for (; same_example(l, example, k); ++k) sum += value_at(l, g, cotangent, k, c);
      total += weight[cotangent * l.examples + n] * (sum * sum);
    }
  out[l.row[first] * channels + c] += total;
}

}  // namespace

template <class T>
void scatter_filter_sums(SumOf<T>* sums, const Lookups& lookups, const Tokens<T>& g, int64_t table, int64_t channels,
                         const Launch& l) {
  launch("sq_scatter", filter_kernel<T>, int64_t{lookups.count} * (lookups.rows / lookups.examples), kThreads, l.stream,
         lookups, g, table, channels, sums);
}

template <class T>
void scatter_element_sums(SumOf<T>* out, const Lookups& lookups, const Tokens<T>& g, const SumOf<T>* weight,
                          int64_t channels, const Launch& l) {
  launch("sq_scatter_acc_", element_kernel<T>, int64_t{lookups.count} * ceil_div(channels, kThreads), kThreads,
         l.stream, lookups, g, weight, channels, out);
}

#define T2V_INSTANTIATE(T)                                                                                            \
  template void scatter_filter_sums<T>(SumOf<T>*, const Lookups&, const Tokens<T>&, int64_t, int64_t, const Launch&); \
  template void scatter_element_sums<T>(SumOf<T>*, const Lookups&, const Tokens<T>&, const SumOf<T>*, int64_t,        \
                                        const Launch&);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
