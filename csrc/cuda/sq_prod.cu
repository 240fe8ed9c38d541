// Sums over positions of cotangents, and of cotangents times normalised inputs: biases and norm weights.
#include "lanes.h"

namespace t2v::cuda {
namespace {

// The shift or the scale of x at one place, or `none` if there is no such tensor.
template <class T>
__device__ T value_at(const Tokens<T>& t, int64_t n, int s, int c, T none) {
  return t.data ? t.data[n * t.row + s * t.position + c * t.channel] : none;
}

template <class T, int V>
struct Sums {
  using Sum = SumOf<T>;

  // Adds V values that are consecutive along channels or along positions.
  __device__ void add(const T* g, const T* x, const Sum* shift, const Sum* scale) {
    const auto from_g = *reinterpret_cast<const Vector<T, V>*>(g);
    Vector<T, V> from_x = {};
    if (x) from_x = *reinterpret_cast<const Vector<T, V>*>(x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Sum value = static_cast<Sum>(from_g.values[v]);
      plain[v] += value;
      if (x) product[v] += value * ((static_cast<Sum>(from_x.values[v]) - shift[v]) * scale[v]);
    }
  }

  Sum product[V] = {}, plain[V] = {};
};

// Reads along channels where channels are contiguous: each lane computes V neighbouring channels.
template <class T, int V>
__global__ void __launch_bounds__(kLaneThreads)
    along_channels_kernel(Tokens<T> g, Tokens<T> x, Tokens<SumOf<T>> shift, Tokens<SumOf<T>> scale, int positions,
                          int channels, int examples, int rows, int parts, int lanes, SumOf<T>* sums, SumOf<T>* plain) {
  using Sum = SumOf<T>;
  Share share;
  const int c = (share.of((channels + lanes * V - 1) / (lanes * V)) * lanes + thread() % lanes) * V;
  const int part = share.of(parts), m = share.rest(), n = m % examples, walkers = kLaneThreads / lanes;
  Sums<T, V> total;
  if (c < channels) {
    Sum by[V], times[V];
    const auto read = [&](int s) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        by[v] = value_at(shift, n, s, c + v, Sum(0));
        times[v] = value_at(scale, n, s, c + v, Sum(1));
      }
    };
    read(0);
    for (int s = part * walkers + thread() / lanes; s < positions; s += parts * walkers) {
      if (shift.position || scale.position) read(s);
      total.add(g.data + m * g.row + s * g.position + c, x.data ? x.data + n * x.row + s * x.position + c : nullptr, by,
                times);
    }
  }
  add_walkers<2 * V>(total.product, lanes);
  if (thread() >= lanes || c >= channels) return;
  const int64_t to = (static_cast<int64_t>(part) * rows + m) * channels + c;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (sums) sums[to + v] = total.product[v];
    if (plain) plain[to + v] = total.plain[v];
  }
}

// Reads along positions where positions are contiguous, or with any strides where V is 1: each warp computes one
// channel.
template <class T, int V>
__global__ void __launch_bounds__(kLaneThreads)
    along_positions_kernel(Tokens<T> g, Tokens<T> x, Tokens<SumOf<T>> shift, Tokens<SumOf<T>> scale, int positions,
                           int channels, int examples, int rows, int parts, SumOf<T>* sums, SumOf<T>* plain) {
  using Sum = SumOf<T>;
  constexpr int warps = kLaneThreads / 32;
  Share share;
  const int c = share.of((channels + warps - 1) / warps) * warps + thread() / 32, lane = thread() % 32;
  const int part = share.of(parts), m = share.rest(), n = m % examples;
  if (c >= channels) return;  // true for the whole warp
  Sums<T, V> total;
  Sum by[V], times[V];
  const auto read = [&](int s) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      by[v] = value_at(shift, n, s + v, c, Sum(0));
      times[v] = value_at(scale, n, s + v, c, Sum(1));
    }
  };
  if (positions > 0 && !shift.position && !scale.position) read(0);
  for (int s = (part * 32 + lane) * V; s < positions; s += parts * 32 * V) {
    if (shift.position || scale.position) read(s);
    total.add(g.data + m * g.row + s * g.position + c * g.channel,
              x.data ? x.data + n * x.row + s * x.position + c * x.channel : nullptr, by, times);
  }
  Sum product = 0, all = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    product += total.product[v];
    all += total.plain[v];
  }
  product = warp_sum(product);
  all = warp_sum(all);
  const int64_t to = (static_cast<int64_t>(part) * rows + m) * channels + c;
  if (lane == 0 && sums) sums[to] = product;
  if (lane == 0 && plain) plain[to] = all;
}

// Whether vectors may be read along the axis with stride `along` and the given size.
template <class T>
bool wide_along(const Tokens<T>& t, int64_t Tokens<T>::* along, int64_t size) {
  if (!t.data) return true;
  const bool others = t.row % kWide<T> == 0 && (along == &Tokens<T>::channel ? t.position : t.channel) % kWide<T> == 0;
  return t.*along == 1 && size % kWide<T> == 0 && others && aligned(t.data);
}

}  // namespace

int64_t product_parts(int64_t positions, int64_t channels, int64_t rows, const Launch& l) {
  return lane_parts(rows * ceil_div(channels, 128), positions, l);
}

template <class T>
void products(SumOf<T>* sums, SumOf<T>* plain, int64_t parts, const Tokens<T>& g, const Tokens<T>& x,
              const Tokens<SumOf<T>>& shift, const Tokens<SumOf<T>>& scale, int64_t positions, int64_t channels,
              int64_t examples, int64_t rows, const Launch& l) {
  const auto channelwise = [&](auto vector) {
    const int lanes = lanes_for(ceil_div(channels, vector));
    launch("sq_prod", along_channels_kernel<T, vector>, ceil_div(channels, lanes * vector) * parts * rows, kLaneThreads,
           l.stream, g, x, shift, scale, positions, channels, examples, rows, parts, lanes, sums, plain);
  };
  const auto positionwise = [&](auto vector) {
    launch("sq_prod", along_positions_kernel<T, vector>, ceil_div(channels, kLaneThreads / 32) * parts * rows,
           kLaneThreads, l.stream, g, x, shift, scale, positions, channels, examples, rows, parts, sums, plain);
  };
  constexpr auto wide = std::integral_constant<int, kWide<T>>();
  constexpr auto one = std::integral_constant<int, 1>();
  using Of = Tokens<T>;
  if (wide_along(g, &Of::channel, channels) && wide_along(x, &Of::channel, channels))
    channelwise(wide);
  else if (wide_along(g, &Of::position, positions) && wide_along(x, &Of::position, positions))
    positionwise(wide);
  else if (g.channel == 1 && (!x.data || x.channel == 1))
    channelwise(one);
  else
    positionwise(one);
}

#define T2V_INSTANTIATE(T)                                                                                        \
  template void products<T>(SumOf<T>*, SumOf<T>*, int64_t, const Tokens<T>&, const Tokens<T>&,                    \
                            const Tokens<SumOf<T>>&, const Tokens<SumOf<T>>&, int64_t, int64_t, int64_t, int64_t, \
                            const Launch&);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
