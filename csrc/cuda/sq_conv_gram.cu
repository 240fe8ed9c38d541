// Gram matrices of the patches of a convolution, and the quadratic forms of cotangents with them.
#include "sq_conv.h"

namespace t2v::cuda {
namespace {

template <class Math, int V>
__global__ void __launch_bounds__(kThreads, 2)
    gram_kernel(Shape s, const typename Math::Value* x, typename Math::Sum* gram) {
  using Sum = typename Math::Sum;
  using Windows = Patches<typename Math::Value, V, true>;
  using Block = Tiles<Math, Windows, Windows>;

  Share share;
  const int i0 = share.of((s.positions + Block::rows - 1) / Block::rows) * Block::rows;
  const int j0 = share.of((s.positions + Block::columns - 1) / Block::columns) * Block::columns;
  if (i0 >= j0 + Block::columns) return;  // below the diagonal
  const int group = share.of(s.groups), n = share.rest();

  const Windows patches{s, x + static_cast<int64_t>(n) * s.height * s.width * s.channels + group * s.group_channels};
  typename Block::Product product;
  Block::multiply(product, patches, patches, i0, j0, 0, s.columns);
  const Sum* const tile = Block::store(product);
  Sum* const to = gram + (static_cast<int64_t>(n) * s.groups + group) * s.positions * s.positions;
  for (int e = thread(); e < Block::rows * Block::columns; e += kThreads) {
    const int i = i0 + e / Block::columns, j = j0 + e % Block::columns;
    if (i <= j && j < s.positions)
      to[static_cast<int64_t>(i) * s.positions + j] =
          (i < j ? Sum(2) : Sum(1)) * tile[(i - i0) * Block::pitch + j - j0];
  }
}

// The entry (p, p') is a sum over the taps of entries of the pixels' Gram matrix: the pixels that the tap sees from p
// and from p'. Taps keep the order of positions, so a folded matrix gives a folded matrix.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    shift_kernel(Shape s, int taps, int64_t count, const T* pixels, T* gram) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + thread();
  if (entry >= count) return;
  const int64_t square = static_cast<int64_t>(s.positions) * s.positions, image = entry / square;
  const int within = static_cast<int>(entry - image * square), p = within / s.positions, q = within % s.positions;
  if (p > q) return;
  const int64_t count_pixels = static_cast<int64_t>(s.height) * s.width;
  const T* const from = pixels + image * count_pixels * count_pixels;
  const Position a = position_at(s, p), b = position_at(s, q);
  T sum = 0;
  for (int t = 0; t < taps; ++t) {
    const Tap tap = tap_at(s, t * s.group_channels);
    const Pixel from_a = pixel_at(s, a, tap), from_b = pixel_at(s, b, tap);
    if (from_a.inside && from_b.inside) sum += from[from_a.at * count_pixels + from_b.at];
  }
  gram[entry] = sum;
}

// sum_{p <= p'} g[p, o] gram[p, p'] g[p', o]: each thread sums one column of (gram g) g.
template <class Math, int V>
__global__ void __launch_bounds__(kThreads, 2)
    form_kernel(int positions, int filters, int groups, int examples, int rows, int parts,
                const typename Math::Value* gram, const typename Math::Value* g, typename Math::Sum* sums) {
  using T = typename Math::Value;
  using Block = Tiles<Math, Matrix<T, V, true>, Matrix<T, V, false>>;

  const int group_filters = filters / groups;
  Share share;
  const int j0 = share.of((group_filters + Block::columns - 1) / Block::columns) * Block::columns;
  const int group = share.of(groups), part = share.of(parts), m = share.rest();

  const int64_t square = static_cast<int64_t>(positions) * positions;
  const Matrix<T, V, true> a{gram + (static_cast<int64_t>(m % examples) * groups + group) * square, positions,
                             positions, positions};
  const Matrix<T, V, false> b{g + static_cast<int64_t>(m) * positions * filters + group * group_filters, filters,
                              group_filters, positions};
  const int o = j0 + thread();
  const bool mine = thread() < Block::columns && o < group_filters;
  typename Math::Sum sum = 0;
  typename Block::Product product;
  for (int i0 = part * Block::rows; i0 < positions; i0 += parts * Block::rows) {
    Block::multiply(product, a, b, i0, j0, i0, positions);
    const auto* const tile = Block::store(product);
    if (mine)
      for (int i = 0; i < Block::rows && i0 + i < positions; ++i)
        sum += tile[i * Block::pitch + thread()] * b.data[static_cast<int64_t>(i0 + i) * filters + o];
  }
  if (mine) sums[(static_cast<int64_t>(part) * rows + m) * filters + group * group_filters + o] = sum;
}

}  // namespace

int64_t form_parts(int64_t positions, int64_t filters, int64_t groups, int64_t rows, const Launch& l) {
  return parts_for(rows * groups * ceil_div(filters / groups, kColumns), ceil_div(positions, kRows), l);
}

template <class T>
void conv_grams(SumOf<T>* gram, const Convolution<T>& c, const Launch& l) {
  const ConvGeometry& s = c.geometry;
  choose<T>(s.group_channels() % kWide<T> == 0 && aligned(c.x), l.tf32, [&](auto math, auto vector) {
    using Math = decltype(math);
    using Block = Tiles<Math, Patches<T, vector, true>, Patches<T, vector, true>>;
    launch("conv_gram", gram_kernel<Math, vector>,
           ceil_div(s.positions(), Block::rows) * ceil_div(s.positions(), Block::columns) * s.groups * c.examples,
           kThreads, l.stream, Shape(s), c.x, gram);
  });
}

template <class T>
void shifted_grams(T* gram, const T* pixels, const ConvGeometry& s, int64_t examples, const Launch& l) {
  const int64_t count = examples * s.groups * s.positions() * s.positions();
  launch("conv_gram", shift_kernel<T>, ceil_div(count, kThreads), kThreads, l.stream, Shape(s),
         static_cast<int>(s.kernel_h * s.kernel_w), count, pixels, gram);
}

template <class T>
void quadratic_forms(T* sums, int64_t parts, const T* gram, const T* g, int64_t positions, int64_t filters,
                     int64_t groups, int64_t examples, int64_t rows, const Launch& l) {
  const bool wide = positions % kWide<T> == 0 && filters / groups % kWide<T> == 0 && aligned(gram) && aligned(g);
  choose<T>(wide, l.tf32, [&](auto math, auto vector) {
    using Math = decltype(math);
    using Block = Tiles<Math, Matrix<T, vector, true>, Matrix<T, vector, false>>;
    launch("sq_gram", form_kernel<Math, vector>, ceil_div(filters / groups, Block::columns) * groups * parts * rows,
           kThreads, l.stream, positions, filters, groups, examples, rows, parts, gram, g, sums);
  });
}

#define T2V_INSTANTIATE(T) template void conv_grams<T>(SumOf<T>*, const Convolution<T>&, const Launch&);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

#define T2V_INSTANTIATE(T)                                                                                       \
  template void shifted_grams<T>(T*, const T*, const ConvGeometry&, int64_t, const Launch&);                     \
  template void quadratic_forms<T>(T*, int64_t, const T*, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                   const Launch&);
T2V_INSTANTIATE(float)
T2V_INSTANTIATE(double)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
