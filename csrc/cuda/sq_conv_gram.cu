// Gram matrices of the patches of a convolution, and the quadratic forms of cotangents with them.
#include <cstring>

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
  product.clear();
  Block::add(product, patches, patches, i0, j0, 0, s.columns);
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

// Rounds a value to `Term`, or to TF32 if that is float: the last 13 bits become zero.
template <class Term>
__device__ inline Term leading(float value) {
  if constexpr (!std::is_same_v<Term, float>) return Term(value);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x1000u) & ~0x1fffu;
  memcpy(&value, &bits, sizeof bits);
  return Term(value);
}

// Each value of a Gram matrix as a sum of terms, in matrices one after another. Rows are padded with zeros.
template <class Term>
__global__ void __launch_bounds__(kThreads, 2)
    split_kernel(int positions, int terms, int pitch, int64_t count, const float* gram, Term* to) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + thread();
  if (entry >= count) return;
  const int64_t row = entry / pitch, matrix = row / positions;
  const int column = static_cast<int>(entry - row * pitch);
  float rest = column < positions ? gram[row * positions + column] : 0.0f;
  const int64_t square = static_cast<int64_t>(positions) * pitch, within = entry - matrix * square;
  for (int t = 0; t < terms; ++t) {
    const Term term = leading<Term>(rest);
    to[(matrix * terms + t) * square + within] = term;
    rest -= static_cast<float>(term);
  }
}

// Blocks of form_kernel that run on a processor at the same time: as many as the registers allow without spills.
template <class Math, int V, int Terms>
constexpr int kFormBlocks = std::is_same_v<Math, TensorCores<typename Math::Value>> && V > 1 &&
                                    Terms * sizeof(typename Math::Value) <= 4
                                ? 4
                                : 2;

// sum_{p <= p'} g[p, o] gram[p, p'] g[p', o]: the sums of the columns of (gram g) g. Neighbouring threads sum
// neighbouring columns, and the rows of threads, called walkers, share the positions. A product is weighted with each
// g[p, o] once, so that the sum of g takes no more than an addition.
template <class Math, int V, int Terms>
__global__ void __launch_bounds__(kThreads, kFormBlocks<Math, V, Terms>)
    form_kernel(int positions, int filters, int groups, int examples, int rows, int parts, int pitch,
                const typename Math::Value* gram, const typename Math::Value* g, typename Math::Sum* sums,
                typename Math::Sum* plain) {
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  using Factors = Matrix<T, V, true, Terms>;
  using Block = Tiles<Math, Factors, Matrix<T, V, false>>;
  constexpr int each = V == 1 ? 1 : kWide<Sum>, across = Block::columns / each, walkers = kThreads / across;

  const int group_filters = filters / groups;
  Share share;
  const int j0 = share.of((group_filters + Block::columns - 1) / Block::columns) * Block::columns;
  const int place = share.rest();  // [parts, M, groups], as in the sums
  const int group = share.of(groups), m = share.of(rows), part = share.rest();

  const int64_t square = static_cast<int64_t>(positions) * pitch;
  const Factors a{gram + (static_cast<int64_t>(m % examples) * groups + group) * Terms * square, pitch, positions,
                  positions, square};
  const Matrix<T, V, false> b{g + static_cast<int64_t>(m) * positions * filters + group * group_filters, filters,
                              group_filters, positions};
  const int column = thread() % across * each, walker = thread() / across;
  Sum sum[each] = {}, sum_of_g[each] = {};
  typename Block::Product product;
  for (int i0 = part * Block::rows; i0 < positions; i0 += parts * Block::rows) {
    product.clear();
    Block::add(product, a, b, i0, j0, i0, positions);
    const Sum* const tile = Block::store(product);
    if (j0 + column >= group_filters) continue;
    // A constant number of reads, none of which waits for another one.
#pragma unroll
    for (int i = walker; i < walker + Block::rows; i += walkers) {
      const bool inside = i0 + i < positions;
      const uint32_t at = inside ? i0 + i : 0, apart = filters;
      const T* const from = b.data + (static_cast<uint64_t>(at) * apart + static_cast<uint32_t>(j0 + column));
      const auto by = *reinterpret_cast<const Vector<T, each>*>(from);
      const auto products = *reinterpret_cast<const Vector<Sum, each>*>(tile + i * Block::pitch + column);
#pragma unroll
      for (int v = 0; v < each; ++v) {
        const Sum value = inside ? static_cast<Sum>(by.values[v]) : Sum(0);
        sum[v] += products.values[v] * value;
        sum_of_g[v] += value;
      }
    }
  }
  const Sum* const of_walkers = Block::exchanged([&](Sum* to) {
#pragma unroll
    for (int v = 0; v < each; ++v) {
      to[walker * Block::columns + column + v] = sum[v];
      to[(walkers + walker) * Block::columns + column + v] = sum_of_g[v];
    }
  });
  const int o = j0 + thread();
  if (thread() >= Block::columns || o >= group_filters) return;
  Sum all = 0, all_of_g = 0;
#pragma unroll
  for (int w = 0; w < walkers; ++w) {
    all += of_walkers[w * Block::columns + thread()];
    all_of_g += of_walkers[(walkers + w) * Block::columns + thread()];
  }
  const int64_t to = static_cast<int64_t>(place) * group_filters + o;
  sums[to] = all;
  if (plain) plain[to] = all_of_g;
}

// Calls use(Terms) with the number of terms, which is one or two of float values, and two or three of bfloat16 ones.
template <class Math, class Use>
void choose_terms(int64_t terms, const Use& use) {
  if constexpr (std::is_same_v<Math, Exact<typename Math::Value>>)
    use(std::integral_constant<int, 1>());
  else if constexpr (std::is_same_v<Math, TensorCores<float>>)
    terms == 1 ? use(std::integral_constant<int, 1>()) : use(std::integral_constant<int, 2>());
  else
    terms == 2 ? use(std::integral_constant<int, 2>()) : use(std::integral_constant<int, 3>());
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

template <class Term>
void split_grams(Term* to, int64_t terms, int64_t pitch, const float* gram, int64_t matrices, int64_t positions,
                 const Launch& l) {
  const int64_t count = matrices * positions * pitch;
  launch("sq_gram", split_kernel<Term>, ceil_div(count, kThreads), kThreads, l.stream, positions, terms, pitch, count,
         gram, to);
}

template <class T>
void quadratic_forms(SumOf<T>* sums, SumOf<T>* plain, int64_t parts, const Grams<T>& gram, const T* g, int64_t filters,
                     int64_t rows, const Launch& l) {
  const bool wide =
      gram.pitch % kWide<T> == 0 && filters / gram.groups % kWide<T> == 0 && aligned(gram.data) && aligned(g);
  choose<T>(wide, l.tf32 || gram.terms > 1, [&](auto math, auto vector) {
    using Math = decltype(math);
    choose_terms<Math>(gram.terms, [&](auto terms) {
      launch("sq_gram", form_kernel<Math, vector, terms>,
             ceil_div(filters / gram.groups, Math::columns) * gram.groups * parts * rows, kThreads, l.stream,
             gram.positions, filters, gram.groups, gram.examples, rows, parts, gram.pitch, gram.data, g, sums, plain);
    });
  });
}

#define T2V_INSTANTIATE(T) template void conv_grams<T>(SumOf<T>*, const Convolution<T>&, const Launch&);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

#define T2V_INSTANTIATE(T) template void shifted_grams<T>(T*, const T*, const ConvGeometry&, int64_t, const Launch&);
T2V_INSTANTIATE(float)
T2V_INSTANTIATE(double)
#undef T2V_INSTANTIATE

#define T2V_INSTANTIATE(T)                                                                                     \
  template void quadratic_forms<T>(SumOf<T>*, SumOf<T>*, int64_t, const Grams<T>&, const T*, int64_t, int64_t, \
                                   const Launch&);
T2V_INSTANTIATE(float)
T2V_INSTANTIATE(double)
T2V_INSTANTIATE(c10::BFloat16)
#undef T2V_INSTANTIATE

#define T2V_INSTANTIATE(T) \
  template void split_grams<T>(T*, int64_t, int64_t, const float*, int64_t, int64_t, const Launch&);
T2V_INSTANTIATE(float)
T2V_INSTANTIATE(c10::BFloat16)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
