// Squared per-example weight gradients of convolutions by tiles of each gradient. Linear layers are 1x1 convolutions.
#include "sq_conv.h"

namespace t2v::cuda {
namespace {

// With Elements, sums the weighted squares over m for each element; without, sums over columns for each m and filter.
template <class Math, int V, bool Elements>
__global__ void __launch_bounds__(kThreads, 2)
    squares_kernel(Shape s, Pixels<typename Math::Value> x, Pixels<typename Math::Value> g,
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
    const Cotangents a{g.data + m * g.example + group * s.group_filters, g.pixel, s.group_filters, s.positions};
    const Columns b{s, x.data + m % examples * x.example + group * s.group_channels, x.pixel};
    product.clear();
    Block::add(product, a, b, i0, tile * Block::columns, 0, s.positions);
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
    constexpr int sharing = kThreads / Block::rows;  // neighbouring threads that sum one row
    const int i = thread() / sharing;
    Sum sum = 0;
    for (int j = thread() % sharing; j < Block::columns; j += sharing) sum += tile[i * Block::pitch + j];
    for (int offset = sharing / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (thread() % sharing == 0 && i0 + i < s.group_filters)
      sums[(static_cast<int64_t>(part) * rows + only_row) * s.filters + group * s.group_filters + i0 + i] = sum;
  }
}

// Parts of the gradients [parts, M, O, D], each from some of the positions: for few examples of large images.
template <class Math, int V>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(Shape s, Pixels<typename Math::Value> x, Pixels<typename Math::Value> g, int examples, int rows,
                    int parts, typename Math::Sum* gradients) {
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  using Cotangents = Matrix<T, V, false>;
  using Columns = Patches<T, V, false>;
  using Block = Tiles<Math, Cotangents, Columns>;

  Share share;
  const int j0 = share.of((s.columns + Block::columns - 1) / Block::columns) * Block::columns;
  const int i0 = share.of((s.group_filters + Block::rows - 1) / Block::rows) * Block::rows, group = share.of(s.groups);
  const int part = share.of(parts), m = share.rest();
  const int steps = (s.positions + Block::depth - 1) / Block::depth, each = (steps + parts - 1) / parts * Block::depth;

  const Cotangents a{g.data + m * g.example + group * s.group_filters, g.pixel, s.group_filters, s.positions};
  const Columns b{s, x.data + m % examples * x.example + group * s.group_channels, x.pixel};
  typename Block::Product product;
  product.clear();
  Block::add(product, a, b, i0, j0, std::min(part * each, s.positions), std::min((part + 1) * each, s.positions));
  const Sum* const tile = Block::store(product);
  Sum* const to =
      gradients + ((static_cast<int64_t>(part) * rows + m) * s.filters + group * s.group_filters) * s.columns;
  for (int e = thread(); e < Block::rows * Block::columns; e += kThreads) {
    const int i = i0 + e / Block::columns, j = j0 + e % Block::columns;
    if (i < s.group_filters && j < s.columns)
      to[static_cast<int64_t>(i) * s.columns + j] = tile[(i - i0) * Block::pitch + j - j0];
  }
}

// Calls use(Math, V) with V for reads of 16 bytes where they are possible; or else of 8 bytes, which half-precision
// images of 4 channels have.
template <class T, class Use>
void choose_reads(const Convolution<T>& c, bool tf32, const Use& use) {
  const ConvGeometry& s = c.geometry;
  const auto fits = [&](int count) {
    return s.group_channels() % count == 0 && s.group_filters() % count == 0 && aligned(c.x, count) &&
           aligned(c.g, count);
  };
  choose_math<T>(tf32, [&](auto math) {
    if (fits(kWide<T>)) return use(math, std::integral_constant<int, kWide<T>>());
    if constexpr (sizeof(T) == 2)
      if (fits(4)) return use(math, std::integral_constant<int, 4>());
    use(math, std::integral_constant<int, 1>());
  });
}

template <bool Elements, class T>
void squares(const char* op, SumOf<T>* sums, int64_t parts, const SumOf<T>* weight, const Convolution<T>& c,
             const Launch& l) {
  const ConvGeometry& s = c.geometry;
  const int64_t columns = s.kernel_h * s.kernel_w * s.group_channels();
  choose_reads(c, l.tf32, [&](auto math, auto vector) {
    using Math = decltype(math);
    using Block = Tiles<Math, Matrix<T, vector, false>, Patches<T, vector, false>>;
    const int64_t tiles = ceil_div(s.group_filters(), Block::rows) * s.groups;
    launch(op, squares_kernel<Math, vector, Elements>,
           tiles * parts * (Elements ? ceil_div(columns, Block::columns) : c.rows), kThreads, l.stream, Shape(s), c.x,
           c.g, weight, c.examples, c.rows, parts, sums);
  });
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

int64_t gradient_parts(const ConvGeometry& s, int64_t rows, int64_t itemsize, const Launch& l) {
  constexpr int64_t fewest_positions = 512, sum_bytes = 4;
  const int64_t columns = s.kernel_h * s.kernel_w * s.group_channels();
  const int64_t blocks = rows * s.groups * ceil_div(s.group_filters(), kRows) * ceil_div(columns, kColumns);
  const int64_t operands = itemsize * (s.pixels() * s.channels + s.positions() * s.filters);
  // A part is written and read once. All of them together move fewer bytes than the operands have.
  const int64_t affordable = operands / (2 * sum_bytes * s.filters * columns);
  return parts_for(blocks, std::min(affordable, s.positions() / fewest_positions), l);
}

template <class T>
void conv_gradients(SumOf<T>* gradients, int64_t parts, const Convolution<T>& c, const Launch& l) {
  const ConvGeometry& s = c.geometry;
  const int64_t columns = s.kernel_h * s.kernel_w * s.group_channels();
  choose_reads(c, l.tf32, [&](auto math, auto vector) {
    using Math = decltype(math);
    using Block = Tiles<Math, Matrix<T, vector, false>, Patches<T, vector, false>>;
    const int64_t tiles = ceil_div(s.group_filters(), Block::rows) * s.groups * ceil_div(columns, Block::columns);
    launch("sq_conv", gradient_kernel<Math, vector>, tiles * parts * c.rows, kThreads, l.stream, Shape(s), c.x, c.g,
           c.examples, c.rows, parts, gradients);
  });
}

template <class T>
void conv_filter_sums(SumOf<T>* sums, int64_t parts, const Convolution<T>& c, const Launch& l) {
  squares<false, T>("sq_conv", sums, parts, nullptr, c, l);
}

template <class T>
void conv_element_sums(SumOf<T>* sums, int64_t parts, const SumOf<T>* weight, const Convolution<T>& c,
                       const Launch& l) {
  squares<true, T>("sq_conv_acc_", sums, parts, weight, c, l);
}

#define T2V_INSTANTIATE(T)                                                                     \
  template void conv_gradients<T>(SumOf<T>*, int64_t, const Convolution<T>&, const Launch&);   \
  template void conv_filter_sums<T>(SumOf<T>*, int64_t, const Convolution<T>&, const Launch&); \
  template void conv_element_sums<T>(SumOf<T>*, int64_t, const SumOf<T>*, const Convolution<T>&, const Launch&);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
