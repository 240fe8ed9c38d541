// Gram matrices of the patches of a convolution, and the quadratic forms of cotangents with them.
#include <cstring>

#include "sq_conv.h"

namespace t2v::cuda {
namespace {

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

// Writes neighbouring values, each as a sum of terms that lie `apart`.
template <int Terms, class Term, class Sum, int Each>
__device__ inline void write_terms(Term* to, int64_t apart, Vector<Sum, Each> values) {
#pragma unroll
  for (int t = 0; t < Terms; ++t) {
    Vector<Term, Each> terms;
#pragma unroll
    for (int v = 0; v < Each; ++v) {
      if constexpr (Terms == 1) {
        terms.values[v] = values.values[v];
      } else {
        terms.values[v] = leading<Term>(values.values[v]);
        values.values[v] -= static_cast<Sum>(terms.values[v]);
      }
    }
    *reinterpret_cast<Vector<Term, Each>*>(to + t * apart) = terms;
  }
}

// A block whose tile is below the diagonal writes nothing. The others write zeros below it, and where rows are padded.
template <class Math, int V, class Term, int Terms, int Each>
__global__ void __launch_bounds__(kThreads, 2)
    gram_kernel(Shape s, int pitch, Pixels<typename Math::Value> x, Term* gram) {
  using Sum = typename Math::Sum;
  using Windows = Patches<typename Math::Value, V, true>;
  using Block = Tiles<Math, Windows, Windows>;

  Share share;
  const int i0 = share.of((s.positions + Block::rows - 1) / Block::rows) * Block::rows;
  const int j0 = share.of((s.positions + Block::columns - 1) / Block::columns) * Block::columns;
  if (i0 >= j0 + Block::columns) return;  // below the diagonal
  const int group = share.of(s.groups), n = share.rest();

  const Windows patches{s, x.data + n * x.example + group * s.group_channels, x.pixel};
  typename Block::Product product;
  product.clear();
  Block::add(product, patches, patches, i0, j0, 0, s.columns);
  const Sum* const tile = Block::store(product);
  const int64_t square = static_cast<int64_t>(s.positions) * pitch;
  Term* const to = gram + (static_cast<int64_t>(n) * s.groups + group) * Terms * square;
  for (int e = thread() * Each; e < Block::rows * Block::columns; e += kThreads * Each) {
    const int row = e / Block::columns, column = e % Block::columns, i = i0 + row, j = j0 + column;
    if (i >= s.positions || j >= pitch) continue;
    auto values = *reinterpret_cast<const Vector<Sum, Each>*>(tile + row * Block::pitch + column);
#pragma unroll
    for (int v = 0; v < Each; ++v) {
      Sum& value = values.values[v];
      value = i > j + v || j + v >= s.positions ? Sum(0) : i < j + v ? Sum(2) * value : value;
    }
    write_terms<Terms>(to + static_cast<int64_t>(i) * pitch + j, square, values);
  }
}

// The entry (p, p') is a sum over the taps of entries of the pixels' Gram matrix: the pixels that the tap sees from p
// and from p'. Taps keep the order of positions, so a folded matrix gives a folded matrix.
template <class Sum, class Term, int Terms>
__global__ void __launch_bounds__(kThreads, 2)
    shift_kernel(Shape s, int taps, int pitch, int64_t count, const Sum* pixels, Term* gram) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + thread();
  if (entry >= count) return;
  const int64_t square = static_cast<int64_t>(s.positions) * pitch, image = entry / square;
  const int within = static_cast<int>(entry - image * square), p = within / pitch, q = within % pitch;
  Vector<Sum, 1> sum = {};
  if (p <= q && q < s.positions) {
    const int64_t count_pixels = static_cast<int64_t>(s.height) * s.width;
    const Sum* const from = pixels + image * count_pixels * count_pixels;
    const Position a = position_at(s, p), b = position_at(s, q);
    for (int t = 0; t < taps; ++t) {
      const Tap tap = tap_at(s, t * s.group_channels);
      const Pixel from_a = pixel_at(s, a, tap), from_b = pixel_at(s, b, tap);
      if (from_a.inside && from_b.inside) sum.values[0] += from[from_a.at * count_pixels + from_b.at];
    }
  }
  write_terms<Terms>(gram + image * Terms * square + within, square, sum);
}

// Each value of a Gram matrix as a sum of terms, in matrices one after another. Rows are padded with zeros.
template <class Term, int Terms>
__global__ void __launch_bounds__(kThreads, 2)
    split_kernel(int positions, int pitch, int64_t count, const float* gram, Term* to) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + thread();
  if (entry >= count) return;
  const int64_t row = entry / pitch, matrix = row / positions;
  const int column = static_cast<int>(entry - row * pitch);
  const Vector<float, 1> value{column < positions ? gram[row * positions + column] : 0.0f};
  const int64_t square = static_cast<int64_t>(positions) * pitch;
  write_terms<Terms>(to + matrix * (Terms - 1) * square + entry, square, value);
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
                const typename Math::Value* gram, Pixels<typename Math::Value> g, typename Math::Sum* sums,
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
  const Matrix<T, V, false> b{g.data + m * g.example + group * group_filters, g.pixel, group_filters, positions};
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
      const uint32_t at = inside ? i0 + i : 0, apart = g.pixel;
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

// Calls use(Terms) with the number of terms of a Gram matrix, which `Term` is the type of and values of T are the
// factors of: one or two of float values, and two or three of bfloat16 ones.
template <class Term, class T, class Use>
void choose_terms(int64_t terms, const Use& use) {
  if constexpr (sizeof(Term) == 2)
    terms == 2 ? use(std::integral_constant<int, 2>()) : use(std::integral_constant<int, 3>());
  else if constexpr (std::is_same_v<T, c10::Half>)
    terms == 1 ? use(std::integral_constant<int, 1>()) : use(std::integral_constant<int, 2>());
  else
    use(std::integral_constant<int, 1>());
}

}  // namespace

int64_t form_parts(int64_t positions, int64_t filters, int64_t groups, int64_t rows, const Launch& l) {
  return parts_for(rows * groups * ceil_div(filters / groups, kColumns), ceil_div(positions, kRows), l);
}

template <class T, class Term>
void conv_grams(Term* gram, int64_t terms, int64_t pitch, const Convolution<T>& c, const Launch& l) {
  const ConvGeometry& s = c.geometry;
  choose<T>(s.group_channels() % kWide<T> == 0 && aligned(c.x, kWide<T>), l.tf32, [&](auto math, auto vector) {
    using Math = decltype(math);
    using Block = Tiles<Math, Patches<T, vector, true>, Patches<T, vector, true>>;
    choose_terms<Term, T>(terms, [&](auto terms) {
      const auto run = [&](auto each) {
        launch("conv_gram", gram_kernel<Math, vector, Term, terms, each>,
               ceil_div(s.positions(), Block::rows) * ceil_div(s.positions(), Block::columns) * s.groups * c.examples,
               kThreads, l.stream, Shape(s), pitch, c.x, gram);
      };
      constexpr int each = kWide<SumOf<T>>;
      if (terms > 1 || pitch % each == 0)  // rows of several terms are always padded
        run(std::integral_constant<int, each>());
      else if constexpr (terms == 1)
        run(std::integral_constant<int, 1>());
    });
  });
}

template <class T, class Term>
void shifted_grams(Term* gram, int64_t terms, int64_t pitch, const SumOf<T>* pixels, const ConvGeometry& s,
                   int64_t examples, const Launch& l) {
  const int64_t count = examples * s.groups * s.positions() * pitch;
  choose_terms<Term, T>(terms, [&](auto terms) {
    launch("conv_gram", shift_kernel<SumOf<T>, Term, terms>, ceil_div(count, kThreads), kThreads, l.stream, Shape(s),
           static_cast<int>(s.kernel_h * s.kernel_w), pitch, count, pixels, gram);
  });
}

template <class T>
void split_grams(TermOf<T>* to, int64_t terms, int64_t pitch, const float* gram, int64_t matrices, int64_t positions,
                 const Launch& l) {
  const int64_t count = matrices * positions * pitch;
  choose_terms<TermOf<T>, T>(terms, [&](auto terms) {
    launch("sq_gram", split_kernel<TermOf<T>, terms>, ceil_div(count, kThreads), kThreads, l.stream, positions, pitch,
           count, gram, to);
  });
}

template <class T>
void quadratic_forms(SumOf<T>* sums, SumOf<T>* plain, int64_t parts, const Grams<T>& gram, const Pixels<T>& g,
                     int64_t filters, int64_t rows, const Launch& l) {
  const bool wide =
      gram.pitch % kWide<T> == 0 && filters / gram.groups % kWide<T> == 0 && aligned(gram.data) && aligned(g, kWide<T>);
  choose<T>(wide, l.tf32 || gram.terms > 1, [&](auto math, auto vector) {
    using Math = decltype(math);
    // TF32 values are one term of float cotangents, and two of float16 ones that were converted.
    using Of = std::conditional_t<std::is_same_v<Math, TensorCores<float>>, c10::Half, T>;
    choose_terms<T, Of>(gram.terms, [&](auto terms) {
      launch("sq_gram", form_kernel<Math, vector, terms>,
             ceil_div(filters / gram.groups, Math::columns) * gram.groups * parts * rows, kThreads, l.stream,
             gram.positions, filters, gram.groups, gram.examples, rows, parts, gram.pitch, gram.data, g, sums, plain);
    });
  });
}

#define T2V_INSTANTIATE(T, TERM)                                                                               \
  template void conv_grams<T, TERM>(TERM*, int64_t, int64_t, const Convolution<T>&, const Launch&);            \
  template void shifted_grams<T, TERM>(TERM*, int64_t, int64_t, const SumOf<T>*, const ConvGeometry&, int64_t, \
                                       const Launch&);
T2V_INSTANTIATE(double, double)
T2V_INSTANTIATE(float, float)
T2V_INSTANTIATE(c10::Half, float)
T2V_INSTANTIATE(c10::BFloat16, float)
T2V_INSTANTIATE(c10::BFloat16, c10::BFloat16)
#undef T2V_INSTANTIATE

#define T2V_INSTANTIATE(T)                                                                                             \
  template void quadratic_forms<T>(SumOf<T>*, SumOf<T>*, int64_t, const Grams<T>&, const Pixels<T>&, int64_t, int64_t, \
                                   const Launch&);
T2V_INSTANTIATE(float)
T2V_INSTANTIATE(double)
T2V_INSTANTIATE(c10::BFloat16)
#undef T2V_INSTANTIATE

#define T2V_INSTANTIATE(T) \
  template void split_grams<T>(TermOf<T>*, int64_t, int64_t, const float*, int64_t, int64_t, const Launch&);
T2V_INSTANTIATE(c10::Half)
T2V_INSTANTIATE(c10::BFloat16)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
