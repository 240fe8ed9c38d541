// The geometry of a two-dimensional convolution, shared by every compiled backend.
#pragma once

#include <cstdint>

namespace t2v {

struct ConvGeometry {
  int64_t channels, height, width;         // input
  int64_t filters, out_height, out_width;  // output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  int64_t positions() const { return out_height * out_width; }
  int64_t pixels() const { return height * width; }
  // Whether each filter sees only one input channel.
  bool depthwise() const { return group_channels() == 1 && groups > 1; }
  // The part of the zero-padded input that the kernel visits.
  int64_t padded_height() const { return (out_height - 1) * stride_h + (kernel_h - 1) * dilation_h + 1; }
  int64_t padded_width() const { return (out_width - 1) * stride_w + (kernel_w - 1) * dilation_w + 1; }
};

}  // namespace t2v
