// Squared per-example weight gradients of a convolution.
#include <torch/library.h>

#include "pack.h"

namespace t2v {
namespace {

// Columns of the tiles over the zero-padded channels-last image: where they start, and where their results belong in a
// gradient laid out [kernel_h, kernel_w, channels].
struct Block {
  int64_t offset, columns, result;
};

std::vector<Block> column_blocks(const ConvGeometry& s) {
  const int64_t channels = s.group_channels(), row = s.padded_width() * s.channels;
  std::vector<Block> blocks;
  for (int64_t h = 0; h < s.kernel_h; ++h) {
    if (s.groups == 1 && s.dilation_w == 1) {
      // A kernel row and its channels are contiguous: a stem of 3 channels and width 7 is one block of 21 columns.
      blocks.push_back({h * s.dilation_h * row, s.kernel_w * channels, h * s.kernel_w * channels});
      continue;
    }
    for (int64_t w = 0; w < s.kernel_w; ++w)
      blocks.push_back(
          {h * s.dilation_h * row + w * s.dilation_w * s.channels, channels, (h * s.kernel_w + w) * channels});
  }
  return blocks;
}

template <class S>
class Conv {
 public:
  using T = SumOf<S>;

  Conv(const at::Tensor& x, const at::Tensor& g, const ConvGeometry& shape)
      : s(shape),
        x_(x),
        g_(g),
        examples(x.size(0)),
        rows(g.size(0)),
        blocks(column_blocks(shape)),
        tiles(filter_tiles(shape.groups, shape.group_filters(), kernels<T>().max_height)) {}

  int64_t padded_size() const { return s.padded_height() * s.padded_width() * s.channels; }
  int64_t cotangent_size() const { return Broadcast<T, S>::size(s.positions(), s.filters); }
  int64_t gradient_size() const { return s.kernel_h * s.kernel_w * s.group_channels(); }

  Positions<S> input(int64_t n) const {
    return {x_.const_data_ptr<S>() + n * x_.stride(0), s.height, s.width, x_.stride(2), x_.stride(3), x_.stride(1)};
  }
  Positions<S> cotangent(int64_t m) const {
    return {
        g_.const_data_ptr<S>() + m * g_.stride(0), s.out_height, s.out_width, g_.stride(2), g_.stride(3), g_.stride(1)};
  }

  // Images [height][width][channels] at an offset in a larger image of zeros, `pixel` elements a pixel.
  static void embed(T* to, int64_t to_height, int64_t to_width, int64_t pixel, const Positions<S>& from, int64_t top,
                    int64_t left, int64_t channels) {
    left = std::min(left, to_width);
    const int64_t right = std::min(left + from.inner, to_width);
    if (top == 0 && left == 0 && to_height == from.outer && to_width == from.inner)  // no border: in one piece
      return pack_columns_last(to, pixel, from, channels);
    for (int64_t y = 0; y < to_height; ++y, to += to_width * pixel) {
      const int64_t row = y - top;
      if (row < 0 || row >= from.outer) {
        std::fill(to, to + to_width * pixel, T(0));
        continue;
      }
      std::fill(to, to + left * pixel, T(0));
      pack_columns_last(
          to + left * pixel, pixel,
          Positions<S>{from.data + row * from.outer_stride, 1, right - left, 0, from.inner_stride, from.column_stride},
          channels);
      std::fill(to + right * pixel, to + to_width * pixel, T(0));
    }
  }

  // One example's input, zero-padded, channels last: [padded_height][padded_width][channels].
  void pad(T* to, int64_t n) const {
    embed(to, s.padded_height(), s.padded_width(), s.channels, input(n), s.pad_h, s.pad_w, s.channels);
  }

  Rows window_rows(const Broadcast<T, S>& g) const {
    const int64_t pixel = s.channels;
    return {s.out_height, s.out_width, s.stride_h * s.padded_width() * pixel, s.stride_w * pixel, g.stride, g.column};
  }

  int64_t filter(const FilterTile& tile) const { return tile.group * s.group_filters() + tile.first; }

  // One example's input as pairs of the pixels that two adjacent positions see, laid out as by pad().
  void pad_pairs(Pair* to, int64_t n) const {
    const int64_t longest = (s.padded_width() + s.stride_w) * s.channels;
    const Scratch<uint16_t> buffer(longest);
    const Scratch<Pair> pairs(longest);
    const Positions<S> from = input(n);
    const int64_t width = s.padded_width();
    for (int64_t y = 0; y < s.padded_height(); ++y, to += width * s.channels) {
      const int64_t row = y - s.pad_h;
      if (row < 0 || row >= from.outer)
        std::fill(to, to + width * s.channels, Pair{0, 0});
      else
        pack_pixel_pairs(to,
                         {from.data + row * from.outer_stride, 1, from.inner, 0, from.inner_stride, from.column_stride},
                         s.pad_w, width, s.stride_w, s.channels, buffer.get(), pairs.get());
    }
  }

  void explicit_pair_sums(T* q) const {
    parallel_examples(examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<Pair> padded(padded_size()), scratch(PairBroadcast::size(s));
      pad_pairs(padded.get(), n);
      for (int64_t m = n; m < rows; m += examples) {
        const PairBroadcast g(cotangent(m), s.filters, scratch);
        const Rows window{s.out_height,
                          (s.out_width + 1) / 2,
                          s.stride_h * s.padded_width() * s.channels,
                          2 * s.stride_w * s.channels,
                          g.stride,
                          g.column};
        for (int64_t t = first; t < last; ++t)
          for (const Block& block : blocks)
            kernels<T>().pair_square_sum(
                q + m * s.filters + filter(tiles[t]), g.data + filter(tiles[t]) * g.column, tiles[t].height, window,
                padded.get() + block.offset + tiles[t].group * s.group_channels(), block.columns);
      }
    });
  }

  // Whether filters fill the vectors and columns of the image, some at a time, are broadcast: the other way round a
  // stem's 21 columns fill two thirds of two vectors.
  bool filters_are_vectors() const {
    if (!(std::is_same_v<S, T> || uses_pairs<S>()) || s.groups != 1 || g_.stride(1) != 1) return false;
    const int64_t width = kernels<T>().width, columns = blocks[0].columns;
    return s.filters % width == 0 && columns % width != 0 && columns >= 8 && columns < 4 * width;
  }

  // q [M, O] with filters as vectors, from operands E: values, or pairs of adjacent positions, of which a row has
  // `wide` and the padded image has those of one pixel at `step`. G: one example's cotangent as such.
  template <class E, class G, class Pad, class Add>
  void sums_by_filters(T* q, int64_t scratch_size, int64_t wide, int64_t step, const Pad& pad, const Add& add) const {
    const int64_t vectors = 2 * kernels<T>().width, row = s.padded_width() * s.channels;
    const std::vector<FilterTile> columns = filter_tiles(1, blocks[0].columns, kernels<T>().max_height);  // as all have
    parallel_examples(examples, (s.filters + vectors - 1) / vectors, [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<E> padded(padded_size()), scratch(scratch_size);
      pad(padded.get(), n);
      for (int64_t m = n; m < rows; m += examples) {
        const G g(cotangent(m), s.filters, scratch);
        const Rows window{s.out_height, wide, wide * g.stride, g.stride, step, 1, s.stride_h * row - wide * step};
        for (int64_t o = first * vectors; o < std::min(last * vectors, s.filters); o += vectors)
          for (const Block& block : blocks)
            for (const FilterTile& tile : columns)
              add(q + m * s.filters + o, 0, T(1), padded.get() + block.offset + tile.first, tile.height, window,
                  g.data + o, std::min(vectors, s.filters - o));
      }
    });
  }

  // q [M, O]
  void explicit_sums(T* q) const {
    if (filters_are_vectors()) {
      const int64_t step = s.stride_w * s.channels;
      if constexpr (std::is_same_v<S, T>)
        return sums_by_filters<T, Broadcast<T, S>>(
            q, cotangent_size(), s.out_width, step, [&](T* to, int64_t n) { pad(to, n); }, kernels<T>().square_add);
      if constexpr (std::is_same_v<S, at::BFloat16>)
        return sums_by_filters<Pair, PairBroadcast>(
            q, PairBroadcast::size(s), (s.out_width + 1) / 2, 2 * step, [&](Pair* to, int64_t n) { pad_pairs(to, n); },
            kernels<T>().pair_square_add);
    }
    if constexpr (std::is_same_v<S, at::BFloat16>)
      if (uses_pairs<S>()) return explicit_pair_sums(q);
    parallel_examples(examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<T> padded(padded_size()), scratch(cotangent_size());
      pad(padded.get(), n);
      for (int64_t m = n; m < rows; m += examples) {
        const Broadcast<T, S> g(cotangent(m), s.filters, scratch);
        for (int64_t t = first; t < last; ++t)
          for (const Block& block : blocks)
            kernels<T>().square_sum(q + m * s.filters + filter(tiles[t]), g.data + filter(tiles[t]) * g.column,
                                    tiles[t].height, window_rows(g),
                                    padded.get() + block.offset + tiles[t].group * s.group_channels(), block.columns);
      }
    });
  }

  // sums [O, kernel_h, kernel_w, C / groups] += sum_m weight[m] G_m^2; each worker owns a share of the filters.
  void explicit_accumulate(T* sums, const T* weight) const {
    at::parallel_for(0, tiles.size(), 1, [&](int64_t first, int64_t last) {
      const Scratch<T> padded(padded_size()), scratch(cotangent_size());
      for (int64_t n = 0; n < examples; ++n) {
        pad(padded.get(), n);
        for (int64_t m = n; m < rows; m += examples) {
          const Broadcast<T, S> g(cotangent(m), s.filters, scratch);
          for (int64_t t = first; t < last; ++t)
            for (const Block& block : blocks)
              kernels<T>().square_add(sums + filter(tiles[t]) * gradient_size() + block.result, gradient_size(),
                                      weight[m], g.data + filter(tiles[t]) * g.column, tiles[t].height, window_rows(g),
                                      padded.get() + block.offset + tiles[t].group * s.group_channels(), block.columns);
        }
      }
    });
  }

  bool winograd_fits() const {
    return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
           s.dilation_w == 1 && s.groups == 1;
  }

  // One example in tiles of 4x4 positions, its operands transformed once for all its filters.
  class WinogradExample {
   public:
    explicit WinogradExample(const Conv& conv)
        : conv_(conv),
          high_((conv.s.out_height + 3) / 4),
          wide_((conv.s.out_width + 3) / 4),
          x_stride_(whole(conv.s.channels)),
          g_stride_(whole(conv.s.filters)),
          image_(std::max((4 * high_ + 2) * (4 * wide_ + 2) * x_stride_, 16 * high_ * wide_ * g_stride_)),
          x_(36 * high_ * wide_ * x_stride_),
          g_(36 * high_ * wide_ * g_stride_) {}

    void load_input(int64_t n) const {
      const ConvGeometry& s = conv_.s;
      embed(image_.get(), 4 * high_ + 2, 4 * wide_ + 2, x_stride_, conv_.input(n), s.pad_h, s.pad_w, s.channels);
      for_tiles(4 * wide_ + 2, x_stride_, x_, kernels<T>().winograd_input, s.channels);
    }
    void load_cotangent(int64_t m) const {
      const ConvGeometry& s = conv_.s;
      embed(image_.get(), 4 * high_, 4 * wide_, g_stride_, conv_.cotangent(m), 0, 0, s.filters);
      for_tiles(4 * wide_, g_stride_, g_, kernels<T>().winograd_cotangent, s.filters);
    }
    Winograd<T> operands() const { return {high_ * wide_, x_.get(), x_stride_, g_.get(), g_stride_}; }

   private:
    static int64_t whole(int64_t count) {
      const int64_t width = kernels<T>().width;
      return (count + width - 1) / width * width;
    }
    template <class Transform>
    void for_tiles(int64_t image_width, int64_t pixel, const Scratch<T>& to, Transform transform,
                   int64_t channels) const {
      for (int64_t y = 0; y < high_; ++y)
        for (int64_t x = 0; x < wide_; ++x)
          transform(to.get() + (y * wide_ + x) * pixel, high_ * wide_ * pixel,
                    image_.get() + 4 * (y * image_width + x) * pixel, image_width * pixel, pixel, channels);
    }

    const Conv& conv_;
    const int64_t high_, wide_, x_stride_, g_stride_;
    const Scratch<T> image_, x_, g_;
  };

  void winograd_sums(T* q) const {
    parallel_examples(examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const WinogradExample example(*this);
      example.load_input(n);
      for (int64_t m = n; m < rows; m += examples) {
        example.load_cotangent(m);
        for (int64_t t = first; t < last; ++t)
          kernels<T>().winograd_sum(q + m * s.filters + tiles[t].first, example.operands(), tiles[t].first,
                                    tiles[t].height, s.channels);
      }
    });
  }

  void winograd_accumulate(T* sums, const T* weight) const {
    at::parallel_for(0, tiles.size(), 1, [&](int64_t first, int64_t last) {
      const WinogradExample example(*this);
      for (int64_t n = 0; n < examples; ++n) {
        example.load_input(n);
        for (int64_t m = n; m < rows; m += examples) {
          example.load_cotangent(m);
          for (int64_t t = first; t < last; ++t)
            kernels<T>().winograd_add(sums + tiles[t].first * gradient_size(), gradient_size(), weight[m],
                                      example.operands(), tiles[t].first, tiles[t].height, s.channels);
        }
      }
    });
  }

  // Depthwise: channels are the vector, taps the registers. Hands out gradients G [kernel size][channels] of the
  // `multiple`-th filter of each of `channels` channels: use(m, multiple, G).
  template <class Use>
  void depthwise_gradients(int64_t n, int64_t first, int64_t channels, const Use& use) const {
    const int64_t taps = s.kernel_h * s.kernel_w, multiples = s.group_filters(), width = s.padded_width();
    const Scratch<T> padded(s.padded_height() * width * channels), cotangents(s.positions() * channels);
    const Scratch<T> gradient(taps * channels);
    std::vector<int64_t> offsets;
    for (int64_t h = 0; h < s.kernel_h; ++h)
      for (int64_t w = 0; w < s.kernel_w; ++w)
        offsets.push_back((h * s.dilation_h * width + w * s.dilation_w) * channels);
    const Rows window{s.out_height, s.out_width, s.stride_h * width * channels, s.stride_w * channels, channels};
    embed(padded.get(), s.padded_height(), width, channels, input(n).from_column(first), s.pad_h, s.pad_w, channels);
    for (int64_t m = n; m < rows; m += examples)
      for (int64_t j = 0; j < multiples; ++j) {
        Positions<S> from = cotangent(m).from_column(first * multiples + j);  // of filter c * multiples + j, column c
        from.column_stride *= multiples;
        pack_columns_last(cotangents.get(), channels, from, channels);
        kernels<T>().taps(gradient.get(), channels, cotangents.get(), window, padded.get(), offsets.data(),
                          static_cast<int>(taps), channels);
        use(m, j, gradient.get());
      }
  }

  // Vectors of channels, which workers share as they do tiles.
  int64_t channel_blocks() const { return (s.channels + kernels<T>().width - 1) / kernels<T>().width; }

  void depthwise_sums(T* q) const {
    parallel_examples(examples, channel_blocks(), [&](int64_t n, int64_t first, int64_t last) {
      first *= kernels<T>().width;
      const int64_t count = std::min(last * kernels<T>().width, s.channels) - first;
      depthwise_gradients(n, first, count, [&](int64_t m, int64_t j, const T* gradient) {
        for (int64_t t = 0; t < gradient_size(); ++t)
          for (int64_t c = 0; c < count; ++c) {
            const T value = gradient[t * count + c];
            q[m * s.filters + (first + c) * s.group_filters() + j] += value * value;
          }
      });
    });
  }

  void depthwise_accumulate(T* sums, const T* weight) const {
    at::parallel_for(0, channel_blocks(), 1, [&](int64_t first, int64_t last) {
      first *= kernels<T>().width;
      const int64_t count = std::min(last * kernels<T>().width, s.channels) - first;
      for (int64_t n = 0; n < examples; ++n)
        depthwise_gradients(n, first, count, [&](int64_t m, int64_t j, const T* gradient) {
          for (int64_t c = 0; c < count; ++c)
            for (int64_t t = 0; t < gradient_size(); ++t) {
              const T value = gradient[t * count + c];
              sums[((first + c) * s.group_filters() + j) * gradient_size() + t] += weight[m] * value * value;
            }
        });
    });
  }

  // The Gram matrix K of the patches of one example and group, [positions][positions], folded onto its upper half. It
  // is taken from that of the pixels: for every kernel offset, patches p and p' meet in the pixels that they see there.
  // Known from convolutional kernel networks (Mairal et al., 2014) and Neural Tangents (Novak et al., 2020), where the
  // shifts are separable as here.
  class PatchGram {
   public:
    explicit PatchGram(const Conv& conv)
        : conv_(conv),
          image_(conv.s.group_channels() * conv.s.pixels()),
          pixels_(conv.pointwise() ? 0 : conv.s.pixels() * conv.s.pixels()),
          half_(conv.pointwise() ? 0 : conv.s.out_height * conv.s.width * conv.s.out_height * conv.s.width) {}

    void form(T* gram, int64_t n, int64_t group) const {
      const ConvGeometry& s = conv_.s;
      const int64_t pixels = s.pixels(), channels = s.group_channels();
      T* pixel_gram = conv_.pointwise() ? gram : pixels_.get();
      const Positions<S> input = conv_.input(n).from_column(group * channels);
      upper_pixel_gram(pixel_gram, input, channels, pixels);
      if (!conv_.pointwise()) conv_.patch_gram(gram, half_.get(), pixel_gram);
      fold_symmetric(gram, s.positions(), s.positions());
    }

   private:
    void upper_pixel_gram(T* gram, const Positions<S>& input, int64_t channels, int64_t pixels) const {
      if constexpr (std::is_same_v<S, at::BFloat16>)
        if (uses_pairs<S>()) {
          Pair* pairs = reinterpret_cast<Pair*>(image_.get());
          pack_column_pairs(pairs, pixels, input, channels);
          return upper_gram(gram, pixels, pairs, pixels, (channels + 1) / 2, pixels);
        }
      if constexpr (std::is_same_v<S, T>)
        if (pixels <= few && input.column_stride == 1) return upper_gram_of_few(gram, input, channels);
      pack_positions_last(image_.get(), pixels, input, channels);
      upper_gram(gram, pixels, image_.get(), pixels, channels, pixels);
    }

    static constexpr int64_t few = 8;  // pixels, whose channels fill vectors where they themselves do not

    static void upper_gram_of_few(T* gram, const Positions<T>& input, int64_t channels) {
      const int64_t pixels = input.outer * input.inner;
      const auto pixel = [&](int64_t p) {
        return input.data + p / input.inner * input.outer_stride + p % input.inner * input.inner_stride;
      };
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t r = p; r < pixels; ++r)
          gram[p * pixels + r] = kernels<T>().shifted_dot(pixel(p), pixel(r), T(0), channels);
    }

    const Conv& conv_;
    const Scratch<T> image_, pixels_, half_;
  };

  // Patches that are pixels.
  bool pointwise() const {
    return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
  }

  // q[m, o] = d_o^T K d_o
  void gram_sums(T* q) const {
    parallel_examples(examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const PatchGram patches(*this);
      const Scratch<T> gram(s.positions() * s.positions());
      const QuadraticForms<S> forms(s.positions(), s.group_filters());
      for (int64_t t = first; t < last;) {
        const int64_t group = tiles[t].group, begin = t;
        while (t < last && tiles[t].group == group) ++t;
        patches.form(gram.get(), n, group);
        const int64_t from = filter(tiles[begin]), to = filter(tiles[t - 1]) + tiles[t - 1].height;
        for (int64_t m = n; m < rows; m += examples)
          forms.add(q + m * s.filters + from, gram.get(), cotangent(m).from_column(from), to - from);
      }
    });
  }

  // grams [N, groups, positions, positions]
  void grams(T* grams) const {
    at::parallel_for(0, examples * s.groups, 1, [&](int64_t begin, int64_t end) {
      const PatchGram patches(*this);
      for (int64_t unit = begin; unit < end; ++unit)
        patches.form(grams + unit * s.positions() * s.positions(), unit / s.groups, unit % s.groups);
    });
  }

  const ConvGeometry s;

 private:
  // gram[(i, j)][(i', j')] for the positions above the diagonal, from the pixels': one pass along the height into
  // half [(i, y)][(i', y')], one along the width.
  void patch_gram(T* gram, T* half, const T* pixel_gram) const {
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
            // From `first` to `end` the second window's pixel is inside, too.
            const int64_t end = std::min(s.out_width, (w - shift + s.stride_w - 1) / s.stride_w);
            if (s.stride_w == 1)
              for (int64_t j2 = first; j2 < end; ++j2) out[j2] += in[j2];
            else
              for (int64_t j2 = first; j2 < end; ++j2) out[j2] += in[j2 * s.stride_w];
          }
        }
  }

  const at::Tensor &x_, &g_;

 public:
  const int64_t examples, rows;
  const std::vector<Block> blocks;
  const std::vector<FilterTile> tiles;
};

void check_winograd(const char* op, c10::string_view path, bool fits) {
  TORCH_CHECK_VALUE(path != "winograd" || fits, op,
                    ": path 'winograd' is for 3x3 kernels of stride 1, dilation 1 and one group");
}

at::Tensor sq_conv(const at::Tensor& x, const at::Tensor& g, at::IntArrayRef kernel, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, c10::string_view path) {
  check_path("sq_conv", path, {"explicit", "gram", "winograd"});
  const ConvGeometry shape = check_conv("sq_conv", x, g, kernel, stride, padding, dilation, groups);
  at::Tensor q = at::zeros({g.size(0), g.size(1)}, g.options().dtype(sum_type(g)));
  if (q.numel() == 0) return q;
  T2V_DISPATCH(g.scalar_type(), "sq_conv", [&] {
    const Conv<scalar_t> conv(x, g, shape);
    auto* sums = q.mutable_data_ptr<SumOf<scalar_t>>();
    check_winograd("sq_conv", path, conv.winograd_fits());
    if (path == "gram")
      conv.gram_sums(sums);
    else if (path == "winograd")
      conv.winograd_sums(sums);
    else if (conv.s.depthwise())
      conv.depthwise_sums(sums);
    else
      conv.explicit_sums(sums);
  });
  return q;
}

void sq_conv_acc_(at::Tensor& out, const at::Tensor& x, const at::Tensor& g, const at::Tensor& weight,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                  c10::string_view path) {
  const ConvGeometry s = check_conv_acc(out, x, g, weight, stride, padding, dilation, groups, path);
  if (g.numel() == 0 || out.numel() == 0) return;
  const at::Tensor w = weight.contiguous();
  at::Tensor sums = at::zeros({s.filters, s.kernel_h, s.kernel_w, s.group_channels()}, out.options());
  T2V_DISPATCH(g.scalar_type(), "sq_conv_acc_", [&] {
    using T = SumOf<scalar_t>;
    const Conv<scalar_t> conv(x, g, s);
    T* to = sums.mutable_data_ptr<T>();
    const T* by = w.const_data_ptr<T>();
    check_winograd("sq_conv_acc_", path, conv.winograd_fits());
    if (path == "winograd")
      conv.winograd_accumulate(to, by);
    else if (conv.s.depthwise())
      conv.depthwise_accumulate(to, by);
    else
      conv.explicit_accumulate(to, by);
  });
  out.add_(sums.permute({0, 3, 1, 2}));
}

at::Tensor conv_gram(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups) {
  const ConvGeometry s = check_conv("conv_gram", x, groups, kernel, stride, padding, dilation, groups);
  at::Tensor grams = at::empty({x.size(0), groups, s.positions(), s.positions()}, x.options().dtype(sum_type(x)));
  if (grams.numel() == 0) return grams;
  T2V_DISPATCH(x.scalar_type(), "conv_gram",
               [&] { Conv<scalar_t>(x, x, s).grams(grams.mutable_data_ptr<SumOf<scalar_t>>()); });
  return grams;
}

// q[m, o] = d_o^T K d_o with Gram matrices as conv_gram gives them
at::Tensor sq_gram(const at::Tensor& gram, const at::Tensor& g) {
  check_forms(gram, g);
  at::Tensor q = at::zeros({g.size(0), g.size(1)}, g.options().dtype(sum_type(g)));
  if (q.numel() == 0) return q;
  const at::Tensor grams = gram.contiguous();
  T2V_DISPATCH(g.scalar_type(), "sq_gram", [&] {
    using T = SumOf<scalar_t>;
    const int64_t examples = gram.size(0), groups = gram.size(1), positions = gram.size(2), filters = g.size(1);
    const int64_t group_filters = filters / groups;
    const std::vector<FilterTile> tiles = filter_tiles(groups, group_filters, kernels<T>().max_height);
    const T* from = grams.const_data_ptr<T>();
    T* to = q.mutable_data_ptr<T>();
    // Vectors reach beyond a matrix, which they may not where the tensor ends.
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

TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  m.impl("conv_gram", conv_gram);
  m.impl("sq_gram", sq_gram);
  m.impl("sq_conv", sq_conv);
  m.impl("sq_conv_acc_", sq_conv_acc_);
}

}  // namespace
}  // namespace t2v
