// 3x3 convolutions of stride 1 and their input gradients by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016), which
// computes 4x4 outputs from 36 products instead of 144.
#include <limits>

#include "pack.h"

namespace t2v {
namespace {

constexpr int64_t side = 4, patch = 6, frequencies = patch * patch;
constexpr int64_t tiles_bytes = 512 << 10;  // least transformed input to hold at a time: half of a typical L2 cache
constexpr int64_t kernels_bytes = 6 << 20;  // most transformed kernels to hold at a time

// The convolution of images of type S, with products of operands E.
template <class S, class E>
class WinogradConvolution {
  using T = SumOf<S>;
  using X = typename ValueOf<E>::type;      // values of the transformed input
  using Stored = typename BitsOf<S>::type;  // values of the images
  static constexpr int64_t lanes = sizeof(E) / sizeof(X);

  static const WinogradSteps<Stored, T, E>& steps() {
    if constexpr (std::is_same_v<E, Fixed>)
      return kernels<T>().fixed_winograd_steps;
    else if constexpr (std::is_same_v<S, BFloat16>)
      return kernels<T>().wide_winograd_steps;
    else
      return kernels<T>().winograd_steps;
  }

 public:
  // x and y are [N, C, H, W], channels last. If `transposed`, weight [C, O, 3, 3] belongs to the convolution whose
  // input gradient is computed.
  WinogradConvolution(const View& x, const View& weight, const S* bias, int64_t pad_h, int64_t pad_w, bool transposed,
                      const Tensor& y)
      : x_(bits(x.const_data_ptr<S>())),
        weight_(weight),
        transposed_(transposed),
        y_(reinterpret_cast<Stored*>(y.mutable_data_ptr<S>())),
        channels_(x.size(1)),
        height_(x.size(2)),
        width_(x.size(3)),
        outputs_(y.size(1)),
        out_height_(y.size(2)),
        out_width_(y.size(3)),
        pad_h_(pad_h),
        pad_w_(pad_w),
        high_((out_height_ + side - 1) / side),
        wide_((out_width_ + side - 1) / side),
        tiles_(x.size(0) * high_ * wide_),
        block_(2 * kernels<T>().width),
        blocks_((outputs_ + block_ - 1) / block_),
        pixel_((channels_ + kernels<T>().width - 1) / kernels<T>().width * kernels<T>().width),
        operands_((channels_ + lanes - 1) / lanes),
        plane_(spread<E>(operands_ * block_)),
        bias_(blocks_ * block_) {
    std::fill(bias_.get(), bias_.get() + blocks_ * block_, T(0));
    if (bias) std::copy_n(bias, outputs_, bias_.get());
    run();
  }

 private:
  // Fills to [last - first blocks][frequencies][plane_], where a plane starts with [operands][block] and is zero beyond
  // the outputs and channels, and units [last - first blocks][block].
  void load_kernels(E* to, T* units, int64_t first, int64_t last) const {
    const S* from = weight_.const_data_ptr<S>();
    int64_t of_output = weight_.stride(0), of_channel = weight_.stride(1), of_row = weight_.stride(2),
            of_column = weight_.stride(3);
    if (transposed_) {  // the kernels rotated by half a turn, from outputs to inputs
      std::swap(of_output, of_channel);
      from += 2 * (of_row + of_column);
      of_row = -of_row;
      of_column = -of_column;
    }
    const int64_t rows = operands_ * lanes, size = rows * block_;
    const Scratch<T> taps(9 * size);
    for (int64_t b = first; b < last; ++b, to += frequencies * plane_, units += block_) {
      const int64_t count = std::min(block_, outputs_ - b * block_);
      if (count < block_ || rows != channels_) std::fill(taps.get(), taps.get() + 9 * size, T(0));
      for (int64_t k = 0; k < 9; ++k)
        pack_columns_last(taps.get() + k * size, block_,
                          Positions<S>{from + b * block_ * of_output + k / 3 * of_row + k % 3 * of_column, 1, channels_,
                                       0, of_channel, of_output},
                          count);
      steps().kernel(to, plane_, units, taps.get(), rows);
    }
  }

  // Transforms the input of tile number t for all channels, to to[f * stride + c], and returns the tile's unit.
  T load_tile(X* to, int64_t stride, int64_t t, Stored* border) const {
    const int64_t n = t / (high_ * wide_), top = t / wide_ % high_ * side - pad_h_, left = t % wide_ * side - pad_w_;
    const Stored* image = x_ + n * height_ * width_ * channels_;
    if (top >= 0 && left >= 0 && top + patch <= height_ && left + patch <= width_ && pixel_ == channels_)
      return steps().input(to, stride, image + (top * width_ + left) * channels_, width_ * channels_, channels_,
                           channels_);
    for (int64_t y = 0; y < patch; ++y)
      for (int64_t x = 0; x < patch; ++x) {
        Stored* out = border + (y * patch + x) * pixel_;
        const int64_t row = top + y, column = left + x;
        const bool inside = row >= 0 && row < height_ && column >= 0 && column < width_;
        if (inside) std::copy_n(image + (row * width_ + column) * channels_, channels_, out);
        std::fill(out + (inside ? channels_ : 0), out + pixel_, Stored(0));
      }
    return steps().input(to, stride, border, patch * pixel_, pixel_, channels_);
  }

  OutputTile<Stored> output(int64_t t, int64_t first) const {
    const int64_t n = t / (high_ * wide_), top = t / wide_ % high_ * side, left = t % wide_ * side;
    return {y_ + ((n * out_height_ + top) * out_width_ + left) * outputs_ + first,
            static_cast<int>(std::min(side, out_height_ - top)), static_cast<int>(std::min(side, out_width_ - left))};
  }

  // The number of shares of the blocks that leaves the threads the least to transform. Each thread transforms the
  // kernels of its own blocks and the input of its own tiles, because data that another thread has just written is slow
  // to read.
  int64_t block_shares(int64_t threads) const {
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t shares = 1; shares <= std::min(blocks_, threads); ++shares) {
      if (threads % shares != 0) continue;
      const int64_t each = (blocks_ + shares - 1) / shares * block_ + tiles_ * shares / threads;
      if (each < least) {
        least = each;
        best = shares;
      }
    }
    return best;
  }

  void run() const {
    const int64_t threads = num_threads(), shares = block_shares(threads), tile_shares = threads / shares;
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit % shares, t = unit / shares;
        compute(b * blocks_ / shares, (b + 1) * blocks_ / shares, t * tiles_ / tile_shares,
                (t + 1) * tiles_ / tile_shares);
      }
    });
  }

  // Computes some blocks of some tiles: as many blocks at a time as fit, for one part of the tiles after another.
  void compute(int64_t first_block, int64_t last_block, int64_t first_tile, int64_t last_tile) const {
    const int64_t height = kernels<T>().max_height, block_bytes = frequencies * plane_ * sizeof(E);
    const int64_t bytes = std::max<int64_t>(tiles_bytes, block_bytes), tile_bytes = frequencies * pixel_ * sizeof(X);
    const int64_t most = std::max<int64_t>(1, bytes / (tile_bytes * height)) * height;
    const int64_t parts = (last_tile - first_tile + most - 1) / most;
    const int64_t group = std::min(last_block - first_block, std::max<int64_t>(1, kernels_bytes / block_bytes));
    const Scratch<E> by(group * frequencies * plane_);
    const Scratch<T> kernel_units(group * block_);
    const Scratch<X> x(frequencies * spread<X>(std::min(most, last_tile - first_tile) * pixel_));
    const Scratch<T> x_units(std::min(most, last_tile - first_tile));
    const Scratch<Stored> border(frequencies * pixel_);
    std::vector<OutputTile<Stored>> outputs(height);
    for (int64_t from = first_block; from < last_block; from += group) {
      const int64_t to = std::min(from + group, last_block);
      load_kernels(by.get(), kernel_units.get(), from, to);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = first_tile + part * (last_tile - first_tile) / parts;
        const int64_t count = first_tile + (part + 1) * (last_tile - first_tile) / parts - first;
        const int64_t stride = spread<X>(count * pixel_);
        if (parts > 1 || from == first_block)
          for (int64_t t = 0; t < count; ++t)
            x_units.get()[t] = load_tile(x.get() + t * pixel_, stride, first + t, border.get());
        const std::vector<FilterTile> rows = filter_tiles(1, count, height);
        for (int64_t b = from; b < to; ++b)
          for (const FilterTile& tiles : rows) {
            for (int64_t i = 0; i < tiles.height; ++i) outputs[i] = output(first + tiles.first + i, b * block_);
            steps().outputs(outputs.data(), out_width_ * outputs_, outputs_,
                            reinterpret_cast<const E*>(x.get() + tiles.first * pixel_), stride / lanes, pixel_ / lanes,
                            by.get() + (b - from) * frequencies * plane_, plane_, operands_,
                            x_units.get() + tiles.first, kernel_units.get() + (b - from) * block_,
                            bias_.get() + b * block_, tiles.height, std::min(block_, outputs_ - b * block_));
          }
      }
    }
  }

  const Stored* x_;
  const View& weight_;
  const bool transposed_;
  Stored* y_;
  const int64_t channels_, height_, width_, outputs_, out_height_, out_width_, pad_h_, pad_w_;
  const int64_t high_, wide_, tiles_, block_, blocks_;
  const int64_t pixel_;     // channels, rounded up to whole vectors
  const int64_t operands_;  // operands of a kernel: its channels, or pairs of them
  const int64_t plane_;     // distance between the frequencies of a block of kernels
  const Scratch<T> bias_;
};

// Without input channels, every pixel of the output is the bias.
template <class S>
void fill(const Tensor& y, const S* from) {
  const int64_t outputs = y.size(1);
  S* to = y.mutable_data_ptr<S>();
  for (int64_t k = 0; k < y.numel(); ++k) to[k] = from ? from[k % outputs] : S(0);
}

Tensor winograd_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Sizes padding,
                     bool transposed) {
  T2V_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      x.size(1) == weight.size(transposed ? 0 : 1),
                  "winograd_conv: expected x [N, C, H, W] and a weight ", transposed ? "[C, O, 3, 3]" : "[O, C, 3, 3]",
                  ", got ", x.sizes(), " and ", weight.sizes());
  T2V_CHECK_VALUE(x.scalar_type() == weight.scalar_type() &&
                      (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double ||
                       x.scalar_type() == ScalarType::BFloat16),
                  "winograd_conv: expected float32, float64 or bfloat16, got ", x.scalar_type(), " and ",
                  weight.scalar_type());
  T2V_CHECK_VALUE(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0 &&
                      (!transposed || (padding[0] <= 2 && padding[1] <= 2)),
                  "winograd_conv: padding is ", padding, ", expected two numbers from 0, for a gradient to 2");
  const int64_t outputs = weight.size(transposed ? 1 : 0);
  T2V_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == x.scalar_type()),
                  "winograd_conv: bias is ", bias ? bias->sizes() : Sizes(), ", expected [", outputs, "]");
  const int64_t pad_h = transposed ? 2 - padding[0] : padding[0], pad_w = transposed ? 2 - padding[1] : padding[1];
  const int64_t out_height = x.size(2) + 2 * pad_h - 2, out_width = x.size(3) + 2 * pad_w - 2;
  T2V_CHECK_VALUE(out_height >= 1 && out_width >= 1, "winograd_conv: x ", x.sizes(), " with padding ", padding,
                  " gives size ", out_height, " x ", out_width);
  const Tensor y = empty({x.size(0), outputs, out_height, out_width}, x.scalar_type(), {0, 2, 3, 1});
  if (y.numel() == 0) return y;
  const Tensor images = channels_last(x);
  const Tensor added = bias ? contiguous(*bias) : x;
  with_type("winograd_conv", x.scalar_type(), [&]<class S>() {
    const S* from = bias ? added.const_data_ptr<S>() : nullptr;
    if (x.size(1) == 0) return fill(y, from);
    if constexpr (std::is_same_v<S, BFloat16>)
      if (kernels<float>().fixed_winograd_steps.outputs) {
        WinogradConvolution<S, Fixed>(images, weight, from, pad_h, pad_w, transposed, y);
        return;
      }
    if constexpr (!std::is_same_v<S, Half>)
      WinogradConvolution<S, SumOf<S>>(images, weight, from, pad_h, pad_w, transposed, y);
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) { T2V_IMPL(winograd_conv); }

}  // namespace
}  // namespace t2v
