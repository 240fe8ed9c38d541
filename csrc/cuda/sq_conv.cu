// Squared per-example weight gradients of convolutions, and of linear layers, which are convolutions of one pixel.
#include <algorithm>

#include "shape.h"
#include "tile.h"

namespace t2v::cuda {
namespace {

// The patches U [P, D] of an image, of one group. Depth is D for their Gram matrix, and P for gradients.
template <class T, int V, bool DepthIsColumns>
struct Patches {
  using Value = T;
  static constexpr int vector = V;
  static constexpr bool along_depth = DepthIsColumns;

  __device__ auto outer(int i) const {
    if constexpr (DepthIsColumns)
      return position_at(shape, i);
    else
      return tap_at(shape, i);
  }
  __device__ auto inner(int k) const {
    if constexpr (DepthIsColumns)
      return tap_at(shape, k);
    else
      return position_at(shape, k);
  }
  __device__ const T* at(const Position& position, const Tap& tap) const {
    const int pixel = pixel_at(shape, position, tap);
    return pixel < 0 ? nullptr : image + (static_cast<int64_t>(pixel) * shape.channels + tap.channel);
  }
  __device__ const T* at(const Tap& tap, const Position& position) const { return at(position, tap); }

  const Shape& shape;
  const T* image;  // from the group's first channel on
};

// A matrix [outer, inner] or [inner, outer] whose rows lie `pitch` apart.
template <class T, int V, bool AlongDepth>
struct Matrix {
  using Value = T;
  static constexpr int vector = V;
  static constexpr bool along_depth = AlongDepth;

  __device__ int outer(int i) const { return i < outer_size ? i : -1; }
  __device__ int inner(int k) const { return k < inner_size ? k : -1; }
  __device__ const T* at(int i, int k) const {
    if (i < 0 || k < 0) return nullptr;
    return data + (AlongDepth ? static_cast<int64_t>(i) * pitch + k : static_cast<int64_t>(k) * pitch + i);
  }

  const T* data;
  int pitch, outer_size, inner_size;
};

// Elements: sums over m of weighted squares, for each element; otherwise sums over columns, for each m and filter.
template <class Math, int V, bool Elements>
__global__ void __launch_bounds__(kThreads, 2)
    squares_kernel(Shape s, const typename Math::Value* x, const typename Math::Value* g,
                   const typename Math::Sum* weight, int examples, int rows, int parts, typename Math::Sum* sums) {
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  using Cotangents = Matrix<T, V, false>;
  using Columns = Patches<T, V, false>;
  using Block = Tiles<Math, Cotangents, Columns>;

  const int column_tiles = (s.columns + Block::columns - 1) / Block::columns;
  Share share;
  const int i0 = share.of((s.group_filters + Block::rows - 1) / Block::rows) * Block::rows, group = share.of(s.groups);
  const int only_tile = Elements ? share.of(column_tiles) : 0, part = share.of(parts), only_row = share.rest();

  typename Block::Product product, squares;
  squares.clear();
  const auto add = [&](int m, int tile, Sum by) {
    const T* const image = x + static_cast<int64_t>(m % examples) * s.height * s.width * s.channels;
    const T* const cotangent = g + static_cast<int64_t>(m) * s.positions * s.filters;
    const Cotangents a{cotangent + group * s.group_filters, s.filters, s.group_filters, s.positions};
    const Columns b{s, image + group * s.group_channels};
    Block::multiply(product, a, b, i0, tile * Block::columns, 0, s.positions);
    squares.add_squares(product, by);
  };
  if constexpr (Elements)
    for (int m = part; m < rows; m += parts) add(m, only_tile, weight[m]);
  else
    for (int tile = part; tile < column_tiles; tile += parts) add(only_row, tile, Sum(1));

  const Sum* const tile = Block::store(squares);
  if constexpr (Elements) {
    for (int e = thread(); e < Block::rows * Block::columns; e += kThreads) {
      const int i = e / Block::columns, j = e % Block::columns;
      const int filter = i0 + i, column = only_tile * Block::columns + j;
      if (filter < s.group_filters && column < s.columns)
        sums[(static_cast<int64_t>(part) * s.filters + group * s.group_filters + filter) * s.columns + column] =
            tile[i * Block::pitch + j];
    }
  } else {
    constexpr int sharing = kThreads / Block::rows;  // neighbouring threads that add up one row
    const int i = thread() / sharing;
    Sum sum = 0;
    for (int j = thread() % sharing; j < Block::columns; j += sharing) sum += tile[i * Block::pitch + j];
    for (int offset = sharing / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (thread() % sharing == 0 && i0 + i < s.group_filters)
      sums[(static_cast<int64_t>(part) * rows + only_row) * s.filters + group * s.group_filters + i0 + i] = sum;
  }
}

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

// Windows at p and p' meet, tap by tap, at pixels whose product is in the pixels' Gram matrix. Taps keep the order of
// positions, so that halves stay halves and doubled entries stay doubled.
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
    const int from_a = pixel_at(s, a, tap), from_b = pixel_at(s, b, tap);
    if (from_a >= 0 && from_b >= 0) sum += from[from_a * count_pixels + from_b];
  }
  gram[entry] = sum;
}

// sum_{p <= p'} g[p, o] gram[p, p'] g[p', o]: a thread adds up a column of (gram g) g.
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
        sum += tile[i * Block::pitch + thread()] * *b.at(o, i0 + i);
  }
  if (mine) sums[(static_cast<int64_t>(part) * rows + m) * filters + group * group_filters + o] = sum;
}

// Calls use(Math, V) for the arithmetic asked for, and for reads of 16 bytes where they are possible.
template <class T, class Use>
void choose(bool wide, bool tf32, const Use& use) {
  const auto with = [&](auto math) {
    if (wide)
      use(math, std::integral_constant<int, kWide<T>>());
    else
      use(math, std::integral_constant<int, 1>());
  };
  if constexpr (std::is_same_v<T, double>)
    with(Exact<double>());
  else if constexpr (std::is_same_v<T, float>)
    tf32 ? with(TensorCores<float>()) : with(Exact<float>());
  else
    with(TensorCores<T>());
}

// Of what a tile covers, as every kind of arithmetic but float64 has it: these only say how many blocks there will be.
constexpr int kRows = 64, kColumns = 128;

int64_t parts_for(int64_t blocks, int64_t most, const Launch& l) {
  constexpr int64_t each = 4;  // blocks that a processor runs side by side
  return std::clamp<int64_t>(ceil_div(each * l.processors, std::max<int64_t>(blocks, 1)), 1,
                             std::max<int64_t>(most, 1));
}

}  // namespace

int64_t filter_parts(const ConvGeometry& s, int64_t rows, const Launch& l) {
  const int64_t columns = s.kernel_h * s.kernel_w * s.group_channels();
  return parts_for(rows * s.groups * ceil_div(s.group_filters(), kRows), ceil_div(columns, kColumns), l);
}

int64_t element_parts(const ConvGeometry& s, int64_t rows, const Launch& l) {
  const int64_t columns = s.kernel_h * s.kernel_w * s.group_channels();
  return parts_for(s.groups * ceil_div(s.group_filters(), kRows) * ceil_div(columns, kColumns), rows, l);
}

int64_t form_parts(int64_t positions, int64_t filters, int64_t groups, int64_t rows, const Launch& l) {
  return parts_for(rows * groups * ceil_div(filters / groups, kColumns), ceil_div(positions, kRows), l);
}

namespace {

template <class T>
bool wide_reads(const Convolution<T>& c) {
  const ConvGeometry& s = c.geometry;
  return s.group_channels() % kWide<T> == 0 && s.group_filters() % kWide<T> == 0 && aligned(c.x) && aligned(c.g);
}

template <bool Elements, class T>
void squares(const char* op, SumOf<T>* sums, int64_t parts, const SumOf<T>* weight, const Convolution<T>& c,
             const Launch& l) {
  const ConvGeometry& s = c.geometry;
  const int64_t columns = s.kernel_h * s.kernel_w * s.group_channels();
  choose<T>(wide_reads(c), l.tf32, [&](auto math, auto vector) {
    using Math = decltype(math);
    using Block = Tiles<Math, Matrix<T, vector, false>, Patches<T, vector, false>>;
    const int64_t tiles = ceil_div(s.group_filters(), Block::rows) * s.groups;
    launch(op, squares_kernel<Math, vector, Elements>,
           tiles * parts * (Elements ? ceil_div(columns, Block::columns) : c.rows), kThreads, l.stream, Shape(s), c.x,
           c.g, weight, c.examples, c.rows, parts, sums);
  });
}

}  // namespace

template <class T>
void conv_filter_sums(SumOf<T>* sums, int64_t parts, const Convolution<T>& c, const Launch& l) {
  squares<false, T>("sq_conv", sums, parts, nullptr, c, l);
}

template <class T>
void conv_element_sums(SumOf<T>* sums, int64_t parts, const SumOf<T>* weight, const Convolution<T>& c,
                       const Launch& l) {
  squares<true, T>("sq_conv_acc_", sums, parts, weight, c, l);
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

#define T2V_INSTANTIATE(T)                                                                                       \
  template void conv_filter_sums<T>(SumOf<T>*, int64_t, const Convolution<T>&, const Launch&);                   \
  template void conv_element_sums<T>(SumOf<T>*, int64_t, const SumOf<T>*, const Convolution<T>&, const Launch&); \
  template void conv_grams<T>(SumOf<T>*, const Convolution<T>&, const Launch&);
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
