// What the paths of sq_conv share: access to the input and the cotangents of one convolution.
#pragma once

#include "pack.h"

namespace t2v {

template <class S>
class Conv {
 public:
  using T = SumOf<S>;

  Conv(const View& x, const View& g, const ConvGeometry& shape)
      : s(shape),
        examples(x.size(0)),
        rows(g.size(0)),
        tiles(filter_tiles(shape.groups, shape.group_filters(), kernels<T>().max_height)),
        x_(x),
        g_(g) {}

  int64_t padded_size() const { return s.padded_height() * s.padded_width() * s.channels; }
  int64_t gradient_size() const { return s.kernel_h * s.kernel_w * s.group_channels(); }
  int64_t filter(const FilterTile& tile) const { return tile.group * s.group_filters() + tile.first; }
  // Whether the filters of one position are contiguous in the cotangent.
  bool filters_are_contiguous() const { return g_.stride(1) == 1; }

  Positions<S> input(int64_t n) const {
    return {x_.const_data_ptr<S>() + n * x_.stride(0), s.height, s.width, x_.stride(2), x_.stride(3), x_.stride(1)};
  }
  Positions<S> cotangent(int64_t m) const {
    return {
        g_.const_data_ptr<S>() + m * g_.stride(0), s.out_height, s.out_width, g_.stride(2), g_.stride(3), g_.stride(1)};
  }

  // Copies an image [height][width][channels] to an offset in a larger image of zeros, with `pixel` elements per pixel.
  static void embed(T* to, int64_t to_height, int64_t to_width, int64_t pixel, const Positions<S>& from, int64_t top,
                    int64_t left, int64_t channels) {
    left = std::min(left, to_width);
    const int64_t right = std::min(left + from.inner, to_width);
    if (top == 0 && left == 0 && to_height == from.outer && to_width == from.inner)  // no border: one copy is enough
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

  const ConvGeometry s;
  const int64_t examples, rows;
  const std::vector<FilterTile> tiles;

 private:
  const View &x_, &g_;
};

// The paths. `*_sums` computes q [M, O], which is zero before the call. `*_accumulate` adds sum_m weight[m] G_m^2 to
// sums [O, kernel_h, kernel_w, C / groups].
template <class S>
void explicit_sums(const Conv<S>& conv, SumOf<S>* q);
template <class S>
void explicit_accumulate(const Conv<S>& conv, SumOf<S>* sums, const SumOf<S>* weight);
template <class S>
void winograd_sums(const Conv<S>& conv, SumOf<S>* q);
template <class S>
void winograd_accumulate(const Conv<S>& conv, SumOf<S>* sums, const SumOf<S>* weight);
template <class S>
void depthwise_sums(const Conv<S>& conv, SumOf<S>* q);
template <class S>
void depthwise_accumulate(const Conv<S>& conv, SumOf<S>* sums, const SumOf<S>* weight);
template <class S>
void gram_sums(const Conv<S>& conv, SumOf<S>* q);

#define T2V_FOR_EACH_TYPE(USE) USE(double) USE(float) USE(BFloat16) USE(Half)

}  // namespace t2v
