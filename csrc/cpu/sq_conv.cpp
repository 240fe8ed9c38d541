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
  int64_t panel_size() const { return s.positions() * kernels<T>().max_height; }
  int64_t gradient_size() const { return s.kernel_h * s.kernel_w * s.group_channels(); }
  bool depthwise() const { return s.group_channels() == 1 && s.groups > 1; }

  Positions<S> cotangent(int64_t m) const {
    return {
        g_.const_data_ptr<S>() + m * g_.stride(0), s.out_height, s.out_width, g_.stride(2), g_.stride(3), g_.stride(1)};
  }

  // One example's input, zero-padded, channels last: [padded_height][padded_width][channels].
  void pad(T* to, int64_t n) const {
    const S* from = x_.const_data_ptr<S>() + n * x_.stride(0);
    const int64_t width = s.padded_width();
    const int64_t left = std::min(s.pad_w, width), right = std::clamp<int64_t>(s.pad_w + s.width, left, width);
    for (int64_t y = 0; y < s.padded_height(); ++y, to += width * s.channels) {
      const int64_t row = y - s.pad_h;
      if (row < 0 || row >= s.height) {
        std::fill(to, to + width * s.channels, T(0));
        continue;
      }
      std::fill(to, to + left * s.channels, T(0));
      pack_columns_last(to + left * s.channels, s.channels,
                        Positions<S>{from + row * x_.stride(2), 1, right - left, 0, x_.stride(3), x_.stride(1)}, 0,
                        s.channels);
      std::fill(to + right * s.channels, to + width * s.channels, T(0));
    }
  }

  Rows window_rows() const {
    return {s.out_height, s.out_width, s.stride_h * s.padded_width() * s.channels, s.stride_w * s.channels};
  }

  // q [M, O]
  void explicit_sums(T* q) const {
    parallel_examples(examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const Kernels<T>& k = kernels<T>();
      const Scratch<T> padded(padded_size()), panel(panel_size());
      pad(padded.get(), n);
      for (int64_t m = n; m < rows; m += examples)
        for (int64_t t = first; t < last; ++t) {
          const FilterTile& tile = tiles[t];
          const int64_t filter = tile.group * s.group_filters() + tile.first;
          pack_panel(panel.get(), cotangent(m), filter, tile.height);
          for (const Block& block : blocks)
            k.square_sum(q + m * s.filters + filter, panel.get(), tile.height, window_rows(),
                         padded.get() + block.offset + tile.group * s.group_channels(), block.columns);
        }
    });
  }

  // sums [O, kernel_h, kernel_w, C / groups] += sum_m weight[m] G_m^2; each worker owns a share of the filters.
  void accumulate(T* sums, const T* weight) const {
    at::parallel_for(0, tiles.size(), 1, [&](int64_t first, int64_t last) {
      const Kernels<T>& k = kernels<T>();
      const Scratch<T> padded(padded_size()), panel(panel_size());
      for (int64_t n = 0; n < examples; ++n) {
        pad(padded.get(), n);
        for (int64_t m = n; m < rows; m += examples)
          for (int64_t t = first; t < last; ++t) {
            const FilterTile& tile = tiles[t];
            const int64_t filter = tile.group * s.group_filters() + tile.first;
            pack_panel(panel.get(), cotangent(m), filter, tile.height);
            for (const Block& block : blocks)
              k.square_add(sums + filter * gradient_size() + block.result, gradient_size(), weight[m], panel.get(),
                           tile.height, window_rows(), padded.get() + block.offset + tile.group * s.group_channels(),
                           block.columns);
          }
      }
    });
  }

  // Depthwise: channels are the vector, taps the registers. Hands out gradients G [kernel size][channels] of the
  // `multiple`-th filter of each channel: use(m, multiple, G).
  template <class Use>
  void depthwise_gradients(int64_t n, const Use& use) const {
    const Kernels<T>& k = kernels<T>();
    const int64_t taps = s.kernel_h * s.kernel_w, multiples = s.group_filters();
    const Scratch<T> padded(padded_size()), cotangents(s.positions() * s.channels), gradient(taps * s.channels);
    std::vector<int64_t> offsets;
    for (const Block& block : blocks) offsets.push_back(block.offset);
    pad(padded.get(), n);
    for (int64_t m = n; m < rows; m += examples)
      for (int64_t j = 0; j < multiples; ++j) {
        Positions<S> from = cotangent(m);  // of filter c * multiples + j, at column c
        from.data += j * from.column_stride;
        from.column_stride *= multiples;
        pack_columns_last(cotangents.get(), s.channels, from, 0, s.channels);
        k.taps(gradient.get(), s.channels, cotangents.get(), s.channels, window_rows(), padded.get(), offsets.data(),
               static_cast<int>(taps), s.channels);
        use(m, j, gradient.get());
      }
  }

  void depthwise_sums(T* q) const {
    at::parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        depthwise_gradients(n, [&](int64_t m, int64_t j, const T* gradient) {
          for (int64_t t = 0; t < gradient_size(); ++t)
            for (int64_t c = 0; c < s.channels; ++c) {
              const T value = gradient[t * s.channels + c];
              q[m * s.filters + c * s.group_filters() + j] += value * value;
            }
        });
    });
  }

  void depthwise_accumulate(T* sums, const T* weight) const {
    for (int64_t n = 0; n < examples; ++n)
      depthwise_gradients(n, [&](int64_t m, int64_t j, const T* gradient) {
        for (int64_t c = 0; c < s.channels; ++c)
          for (int64_t t = 0; t < gradient_size(); ++t) {
            const T value = gradient[t * s.channels + c];
            sums[(c * s.group_filters() + j) * gradient_size() + t] += weight[m] * value * value;
          }
      });
  }

  // q[m, o] = d_o^T K d_o, with the Gram matrix K of the patches taken from that of the pixels: for every kernel
  // offset, patches p and p' meet in the pixels that they see there. Known from convolutional kernel networks
  // (Mairal et al., 2014) and Neural Tangents (Novak et al., 2020), where the shifts are separable as here.
  void gram_sums(T* q) const {
    const int64_t count = static_cast<int64_t>(tiles.size()) / s.groups;  // tiles of a group
    parallel_examples(examples, s.groups * count, [&](int64_t n, int64_t first, int64_t last) {
      const int64_t pixels = s.pixels(), positions = s.positions(), channels = s.group_channels();
      const int64_t height = kernels<T>().max_height;
      const Scratch<T> image(channels * pixels), pixel_gram(pixels * pixels),
          panel(std::max(channels, positions) * height);
      const Scratch<T> half(s.out_height * s.width * s.out_height * s.width), gram(positions * positions);
      const Scratch<T> d(height * positions);
      const Positions<S> source{
          x_.const_data_ptr<S>() + n * x_.stride(0), s.height, s.width, x_.stride(2), x_.stride(3), x_.stride(1)};
      int64_t ready = -1;
      for (int64_t t = first; t < last; ++t) {
        const FilterTile& tile = tiles[t];
        if (tile.group != ready) {
          pack_positions_last(image.get(), pixels, source, tile.group * channels, channels);
          upper_gram(pixel_gram.get(), pixels, image.get(), pixels, channels, pixels, panel.get());
          patch_gram(gram.get(), half.get(), pixel_gram.get());
          fold_symmetric(gram.get(), positions, positions);
          ready = tile.group;
        }
        const int64_t filter = tile.group * s.group_filters() + tile.first;
        for (int64_t m = n; m < rows; m += examples) {
          pack_panel(panel.get(), cotangent(m), filter, tile.height);
          pack_positions_last(d.get(), positions, cotangent(m), filter, tile.height);
          quadratic_form(q + m * s.filters + filter, gram.get(), positions, d.get(), positions, panel.get(),
                         tile.height, positions);
        }
      }
    });
  }

  // Flops of the two paths; 2 for each multiply-add. The Gram's are counted at their symmetric half.
  double explicit_cost() const { return 2.0 * s.filters * gradient_size() * s.positions(); }
  double gram_cost() const {
    const double pixels = s.pixels(), positions = s.positions(), half = s.out_height * s.width;
    return s.groups * (pixels * pixels * s.group_channels() + positions * positions * s.group_filters() +
                       half * half * s.kernel_h + positions * positions * s.kernel_w);
  }
  bool prefers_gram() const {
    constexpr double largest = 1 << 20;  // elements of a Gram matrix that still fit in a cache
    return !depthwise() && double(s.pixels()) * s.pixels() <= largest && gram_cost() < 0.7 * explicit_cost();
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
            const T* in = half + (i * w + y) * ld + i2 * w + shift;
            for (int64_t j2 = from; j2 < s.out_width; ++j2) {
              const int64_t y2 = j2 * s.stride_w + shift;
              if (y2 >= 0 && y2 < w) out[j2] += in[j2 * s.stride_w];
            }
          }
        }
  }

  const at::Tensor &x_, &g_;

 public:
  const int64_t examples, rows;
  const std::vector<Block> blocks;
  const std::vector<FilterTile> tiles;
};

at::Tensor sq_conv(const at::Tensor& x, const at::Tensor& g, at::IntArrayRef kernel, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, c10::string_view path) {
  check_path("sq_conv", path);
  const ConvGeometry shape = check_conv("sq_conv", x, g, kernel, stride, padding, dilation, groups);
  at::Tensor q = at::zeros({g.size(0), g.size(1)}, g.options().dtype(sum_type(g)));
  if (q.numel() == 0) return q;
  T2V_DISPATCH(g.scalar_type(), "sq_conv", [&] {
    const Conv<scalar_t> conv(x, g, shape);
    auto* sums = q.mutable_data_ptr<SumOf<scalar_t>>();
    if (path == "gram" || (path == "auto" && conv.prefers_gram()))
      conv.gram_sums(sums);
    else if (conv.depthwise())
      conv.depthwise_sums(sums);
    else
      conv.explicit_sums(sums);
  });
  return q;
}

void sq_conv_acc_(at::Tensor& out, const at::Tensor& x, const at::Tensor& g, const at::Tensor& weight,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(out.dim() == 4, "sq_conv_acc_: out must have 4 axes, got ", out.sizes());
  const ConvGeometry s = check_conv("sq_conv_acc_", x, g, out.sizes().slice(2), stride, padding, dilation, groups);
  check_accumulator("sq_conv_acc_", out, {s.filters, s.group_channels(), s.kernel_h, s.kernel_w}, g, weight);
  if (g.numel() == 0 || out.numel() == 0) return;
  const at::Tensor w = weight.contiguous();
  at::Tensor sums = at::zeros({s.filters, s.kernel_h, s.kernel_w, s.group_channels()}, out.options());
  T2V_DISPATCH(g.scalar_type(), "sq_conv_acc_", [&] {
    using T = SumOf<scalar_t>;
    const Conv<scalar_t> conv(x, g, s);
    if (conv.depthwise())
      conv.depthwise_accumulate(sums.mutable_data_ptr<T>(), w.const_data_ptr<T>());
    else
      conv.accumulate(sums.mutable_data_ptr<T>(), w.const_data_ptr<T>());
  });
  out.add_(sums.permute({0, 3, 1, 2}));
}

TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  m.impl("sq_conv", sq_conv);
  m.impl("sq_conv_acc_", sq_conv_acc_);
}

}  // namespace
}  // namespace t2v
