// The gram path of sq_conv, and its two halves as operators: conv_gram and sq_gram.
#include "sq_conv.h"

namespace t2v {
namespace {

// Whether every patch is one pixel.
bool pointwise(const ConvGeometry& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
}

// The Gram matrix K of the patches of one example and group, [positions][positions], folded onto its upper half. K is
// computed from the Gram matrix of the pixels: K[p, p'] sums, over the taps of the kernel, the entry of the two pixels
// that the tap reads from p and from p'. The sum is separable into one pass per axis, as in convolutional kernel
// networks (Mairal et al., 2014) and Neural Tangents (Novak et al., 2020).
template <class S>
class PatchGram {
 public:
  using T = SumOf<S>;

  explicit PatchGram(const Conv<S>& conv)
      : conv_(conv),
        image_(conv.s.group_channels() * conv.s.pixels()),
        pixels_(pointwise(conv.s) ? 0 : conv.s.pixels() * conv.s.pixels()),
        half_(pointwise(conv.s) ? 0 : conv.s.out_height * conv.s.width * conv.s.out_height * conv.s.width) {}

  void form(T* gram, int64_t n, int64_t group) const {
    const ConvGeometry& s = conv_.s;
    const int64_t pixels = s.pixels(), channels = s.group_channels();
    T* pixel_gram = pointwise(conv_.s) ? gram : pixels_.get();
    const Positions<S> input = conv_.input(n).from_column(group * channels);
    upper_pixel_gram(pixel_gram, input, channels, pixels);
    if (!pointwise(conv_.s)) patch_gram(gram, half_.get(), pixel_gram);
    fold_symmetric(gram, s.positions(), s.positions());
  }

 private:
  void upper_pixel_gram(T* gram, const Positions<S>& input, int64_t channels, int64_t pixels) const {
    if constexpr (std::is_same_v<S, BFloat16>)
      if (uses_pairs<S>()) {
        Pair* pairs = reinterpret_cast<Pair*>(image_.get());
        pack_column_pairs(pairs, pixels, input, channels);
        return upper_gram(gram, pixels, pairs, pixels, (channels + 1) / 2, pixels);
      }
    if constexpr (std::is_same_v<S, T>)
      if (pixels <= few_pixels && input.column_stride == 1) return upper_gram_of_few(gram, input, channels);
    pack_positions_last(image_.get(), pixels, input, channels);
    upper_gram(gram, pixels, image_.get(), pixels, channels, pixels);
  }

  static constexpr int64_t few_pixels = 8;  // too few to fill a vector: the channels are the vectors then

  static void upper_gram_of_few(T* gram, const Positions<T>& input, int64_t channels) {
    const int64_t pixels = input.outer * input.inner;
    const auto pixel = [&](int64_t p) {
      return input.data + p / input.inner * input.outer_stride + p % input.inner * input.inner_stride;
    };
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t r = p; r < pixels; ++r)
        gram[p * pixels + r] = kernels<T>().shifted_dot(pixel(p), pixel(r), T(0), channels);
  }

  // Computes gram[(i, j)][(i', j')] above the diagonal from the pixels' Gram matrix: one pass along the height into
  // half [(i, y)][(i', y')], then one along the width.
  void patch_gram(T* gram, T* half, const T* pixel_gram) const {
    const ConvGeometry& s = conv_.s;
    const int64_t w = s.width, ld = s.out_height * w, positions = s.positions(), pixels = s.pixels();
    for (int64_t i = 0; i < s.out_height; ++i)
      for (int64_t y = 0; y < w; ++y)
        for (int64_t i2 = i; i2 < s.out_height; ++i2) {
          const int64_t from = i == i2 ? y : 0;
          T* out = half + (i * w + y) * ld + i2 * w;
          std::fill(out + from, out + w, T(0));
          for (int64_t a = 0; a < s.kernel_h; ++a) {
            const int64_t r = i * s.stride_h + a * s.dilation_h - s.pad_h,
                          r2 = i2 * s.stride_h + a * s.dilation_h - s.pad_h;
            if (r < 0 || r2 >= s.height) continue;  // r <= r2
            const T* in = pixel_gram + (r * w + y) * pixels + r2 * w;
            for (int64_t y2 = from; y2 < w; ++y2) out[y2] += in[y2];
          }
        }
    for (int64_t i = 0; i < s.out_height; ++i)
      for (int64_t j = 0; j < s.out_width; ++j)
        for (int64_t i2 = i; i2 < s.out_height; ++i2) {
          T* out = gram + (i * s.out_width + j) * positions + i2 * s.out_width;
          const int64_t from = i == i2 ? j : 0;
          std::fill(out + from, out + s.out_width, T(0));
          for (int64_t b = 0; b < s.kernel_w; ++b) {
            const int64_t shift = b * s.dilation_w - s.pad_w, y = j * s.stride_w + shift;
            if (y < 0 || y >= w) continue;
            const int64_t first = std::max(from, shift < 0 ? (-shift + s.stride_w - 1) / s.stride_w : 0);
            const T* in = half + (i * w + y) * ld + i2 * w + shift;
            // From `first` to `end`, the pixel of the second window is inside the image as well.
            const int64_t end = std::min(s.out_width, (w - shift + s.stride_w - 1) / s.stride_w);
            if (s.stride_w == 1)
              for (int64_t j2 = first; j2 < end; ++j2) out[j2] += in[j2];
            else
              for (int64_t j2 = first; j2 < end; ++j2) out[j2] += in[j2 * s.stride_w];
          }
        }
  }

  const Conv<S>& conv_;
  const Scratch<T> image_, pixels_, half_;
};

// grams [N, groups, positions, positions]
template <class S>
void form_grams(const Conv<S>& conv, SumOf<S>* grams) {
  parallel_for(0, conv.examples * conv.s.groups, 1, [&](int64_t begin, int64_t end) {
    const PatchGram<S> patches(conv);
    for (int64_t unit = begin; unit < end; ++unit)
      patches.form(grams + unit * conv.s.positions() * conv.s.positions(), unit / conv.s.groups, unit % conv.s.groups);
  });
}

Tensor conv_gram(const Tensor& x, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const ConvGeometry s = check_conv("conv_gram", x, groups, kernel, stride, padding, dilation, groups);
  const Tensor grams = empty({x.size(0), groups, s.positions(), s.positions()}, sum_type(x));
  if (grams.numel() == 0) return grams;
  with_type("conv_gram", x.scalar_type(),
            [&]<class scalar_t>() { form_grams(Conv<scalar_t>(x, x, s), grams.mutable_data_ptr<SumOf<scalar_t>>()); });
  return grams;
}

// q[m, o] = d_o^T K d_o with the Gram matrices of conv_gram
Tensor sq_gram(const Tensor& gram, const Tensor& g) {
  check_forms(gram, g);
  const Tensor q = zeros({g.size(0), g.size(1)}, sum_type(g));
  if (q.numel() == 0) return q;
  const Tensor grams = contiguous(gram);
  with_type("sq_gram", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    const int64_t examples = gram.size(0), groups = gram.size(1), positions = gram.size(2), filters = g.size(1);
    const int64_t group_filters = filters / groups;
    const std::vector<FilterTile> tiles = filter_tiles(groups, group_filters, kernels<T>().max_height);
    const T* from = grams.const_data_ptr<T>();
    T* to = q.mutable_data_ptr<T>();
    // Vector reads go beyond the end of a matrix. The last matrix is copied, so that they stay inside the memory.
    const int64_t size = positions * positions, end_matrix = examples * groups - 1;
    const Scratch<T> copy(size);
    std::copy_n(from + end_matrix * size, size, copy.get());
    parallel_examples(g.size(0), tiles.size(), [&](int64_t m, int64_t first, int64_t last) {
      const QuadraticForms<scalar_t> forms(positions, group_filters);
      const Positions<scalar_t> d{
          g.const_data_ptr<scalar_t>() + m * g.stride(0), g.size(2), g.size(3), g.stride(2), g.stride(3), g.stride(1)};
      for (int64_t t = first; t < last;) {
        const int64_t group = tiles[t].group, begin = group * group_filters + tiles[t].first;
        while (t < last && tiles[t].group == group) ++t;
        const int64_t end = group * group_filters + tiles[t - 1].first + tiles[t - 1].height;
        const int64_t matrix = (m % examples) * groups + group;
        forms.add(to + m * filters + begin, matrix == end_matrix ? copy.get() : from + matrix * size,
                  d.from_column(begin), end - begin);
      }
    });
  });
  return q;
}

STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  T2V_IMPL(conv_gram);
  T2V_IMPL(sq_gram);
}

}  // namespace

// q[m, o] = d_o^T K d_o
template <class S>
void gram_sums(const Conv<S>& conv, SumOf<S>* q) {
  using T = SumOf<S>;
  parallel_examples(conv.examples, conv.tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
    const PatchGram<S> patches(conv);
    const Scratch<T> gram(conv.s.positions() * conv.s.positions());
    const QuadraticForms<S> forms(conv.s.positions(), conv.s.group_filters());
    for (int64_t t = first; t < last;) {
      const int64_t group = conv.tiles[t].group, begin = t;
      while (t < last && conv.tiles[t].group == group) ++t;
      patches.form(gram.get(), n, group);
      const int64_t from = conv.filter(conv.tiles[begin]),
                    to = conv.filter(conv.tiles[t - 1]) + conv.tiles[t - 1].height;
      for (int64_t m = n; m < conv.rows; m += conv.examples)
        forms.add(q + m * conv.s.filters + from, gram.get(), conv.cotangent(m).from_column(from), to - from);
    }
  });
}

#define T2V_INSTANTIATE(T) template void gram_sums(const Conv<T>&, SumOf<T>*);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v
