// The geometry of a convolution on the device: which pixel a tap of a window reads.
#pragma once

#include "device.h"

namespace t2v::cuda {

// The geometry that kernels take as an argument. The D = kh kw C / groups columns of a gradient are in that order.
struct Shape {
  explicit Shape(const ConvGeometry& s)
      : height(s.height),
        width(s.width),
        channels(s.channels),
        filters(s.filters),
        groups(s.groups),
        group_channels(s.group_channels()),
        group_filters(s.group_filters()),
        positions(s.positions()),
        columns(s.kernel_h * s.kernel_w * s.group_channels()),
        stride_h(s.stride_h),
        stride_w(s.stride_w),
        pad_h(s.pad_h),
        pad_w(s.pad_w),
        dilation_h(s.dilation_h),
        dilation_w(s.dilation_w),
        by_out_width(s.out_width),
        by_kernel_w(s.kernel_w),
        by_channels(s.group_channels()) {}

  int height, width, channels, filters, groups, group_channels, group_filters, positions, columns;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Divisor by_out_width, by_kernel_w, by_channels;
};

// A row or column outside every image, also after an offset is added.
constexpr int kOutside = 1 << 29;

struct Position {
  int y, x;  // of the window's corner
};
struct Tap {
  int y, x, channel;  // relative to the corner
};

// Neither function branches, so that the compiler moves them out of loops.
__device__ inline Position position_at(const Shape& s, int p) {
  const int y = s.by_out_width.quotient(p), x = s.by_out_width.remainder(p, y);
  return {p < s.positions ? y * s.stride_h - s.pad_h : kOutside, x * s.stride_w - s.pad_w};
}

__device__ inline Tap tap_at(const Shape& s, int d) {
  const int tap = s.by_channels.quotient(d), y = s.by_kernel_w.quotient(tap), x = s.by_kernel_w.remainder(tap, y);
  return {d < s.columns ? y * s.dilation_h : kOutside, x * s.dilation_w, s.by_channels.remainder(d, tap)};
}

struct Pixel {
  uint32_t at;  // 0 outside the image
  bool inside;
};

// The pixel that the tap reads.
__device__ inline Pixel pixel_at(const Shape& s, const Position& position, const Tap& tap) {
  const auto y = static_cast<uint32_t>(position.y + tap.y), x = static_cast<uint32_t>(position.x + tap.x);
  const bool inside = y < static_cast<uint32_t>(s.height) && x < static_cast<uint32_t>(s.width);
  return {inside ? y * s.width + x : 0, inside};
}

// Whether the channels of every pixel start where `count` values can be read at once.
template <class T>
bool aligned(const Pixels<T>& images, int count) {
  return aligned(images.data) && images.example % count == 0 && images.pixel % count == 0;
}

}  // namespace t2v::cuda
