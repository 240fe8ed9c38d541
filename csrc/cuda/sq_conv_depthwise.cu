// Per-example gradients of depthwise convolutions. A gradient has few numbers per channel, so the time goes to reading
// the input and the cotangent.
#include "lanes.h"
#include "shape.h"

namespace t2v::cuda {
namespace {

constexpr int kTaps = 8;  // taps per block; a larger kernel takes several blocks

// Each lane computes V neighbouring filters.
template <class T, int V>
__global__ void __launch_bounds__(kLaneThreads, 2)
    depthwise_kernel(Shape s, int examples, int rows, int parts, int lanes, Pixels<T> x, Pixels<T> g,
                     SumOf<T>* gradients) {
  using Sum = SumOf<T>;
  Share share;
  const int o = (share.of((s.filters + lanes * V - 1) / (lanes * V)) * lanes + thread() % lanes) * V;
  const int tap0 = share.of((s.columns + kTaps - 1) / kTaps) * kTaps, part = share.of(parts), m = share.rest();
  const int walkers = kLaneThreads / lanes;

  Tap taps[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) taps[t] = tap_at(s, tap0 + t);
  Sum sums[kTaps][V] = {};
  if (o < s.filters) {
    const T* const image = x.data + m % examples * x.example + o / s.group_filters;
    const T* const cotangent = g.data + m * g.example + o;
    for (int p = part * walkers + thread() / lanes; p < s.positions; p += parts * walkers) {
      const Position position = position_at(s, p);
      const auto from_g = *reinterpret_cast<const Vector<T, V>*>(cotangent + static_cast<int64_t>(p) * g.pixel);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const Pixel pixel = pixel_at(s, position, taps[t]);
        if (!pixel.inside) continue;
        const auto from_x = *reinterpret_cast<const Vector<T, V>*>(image + static_cast<int64_t>(pixel.at) * x.pixel);
#pragma unroll
        for (int v = 0; v < V; ++v)
          sums[t][v] += static_cast<Sum>(from_g.values[v]) * static_cast<Sum>(from_x.values[v]);
      }
    }
  }
  const int first = o - thread() % lanes * V;
  Sum* const to = gradients + (static_cast<int64_t>(part) * rows + m) * s.columns * s.filters;
  constexpr size_t of_walkers = walkers_bytes<kTaps * V, Sum>();
  Sum* const shared = reinterpret_cast<Sum*>(shared_memory<of_walkers>());
  add_walkers<kTaps * V>(&sums[0][0], lanes, shared, [&](int lane, int e, Sum sum) {
    const int tap = tap0 + e / V, filter = first + lane * V + e % V;
    if (tap < s.columns && filter < s.filters) to[tap * s.filters + filter] = sum;
  });
}

}  // namespace

int64_t depthwise_parts(const ConvGeometry& s, int64_t rows, const Launch& l) {
  return lane_parts(rows * ceil_div(s.filters, 128) * ceil_div(s.kernel_h * s.kernel_w, kTaps), s.positions(), l);
}

template <class T>
void depthwise_gradients(SumOf<T>* gradients, int64_t parts, const Convolution<T>& c, const Launch& l) {
  const ConvGeometry& s = c.geometry;
  const auto run = [&](auto vector) {
    const int lanes = lanes_for(ceil_div(s.filters, vector));
    launch("sq_conv", depthwise_kernel<T, vector>,
           ceil_div(s.filters, lanes * vector) * ceil_div(s.kernel_h * s.kernel_w, kTaps) * parts * c.rows,
           kLaneThreads, l.stream, Shape(s), c.examples, c.rows, parts, lanes, c.x, c.g, gradients);
  };
  if (s.group_filters() == 1 && s.channels % kWide<T> == 0 && aligned(c.x, kWide<T>) && aligned(c.g, kWide<T>))
    run(std::integral_constant<int, kWide<T>>());
  else
    run(std::integral_constant<int, 1>());
}

#define T2V_INSTANTIATE(T) \
  template void depthwise_gradients<T>(SumOf<T>*, int64_t, const Convolution<T>&, const Launch&);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
