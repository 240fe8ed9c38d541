// Squared per-example weight gradients of a convolution: the operators, which choose among the paths of sq_conv_*.cpp.
#include "sq_conv.h"

namespace t2v {
namespace {

bool winograd_fits(const ConvGeometry& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.groups == 1;
}

void check_winograd(const char* op, std::string_view path, bool fits) {
  T2V_CHECK_VALUE(path != "winograd" || fits, op,
                  ": path 'winograd' is for 3x3 kernels of stride 1, dilation 1 and one group");
}

// out [O, C / groups, kernel_h, kernel_w] += sums [O, kernel_h, kernel_w, C / groups]
template <class T>
void add_permuted(T* out, const T* sums, const ConvGeometry& s) {
  const int64_t taps = s.kernel_h * s.kernel_w, channels = s.group_channels();
  for (int64_t o = 0; o < s.filters; ++o, out += channels * taps, sums += channels * taps)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < taps; ++k) out[c * taps + k] += sums[k * channels + c];
}

Tensor sq_conv(const Tensor& x, const Tensor& g, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
               int64_t groups, std::string_view path) {
  check_path("sq_conv", path, {"explicit", "gram", "winograd"});
  const ConvGeometry shape = check_conv("sq_conv", x, g, kernel, stride, padding, dilation, groups);
  const Tensor q = zeros({g.size(0), g.size(1)}, sum_type(g));
  if (q.numel() == 0) return q;
  with_type("sq_conv", g.scalar_type(), [&]<class scalar_t>() {
    const Conv<scalar_t> conv(x, g, shape);
    auto* sums = q.mutable_data_ptr<SumOf<scalar_t>>();
    check_winograd("sq_conv", path, winograd_fits(conv.s));
    if (path == "gram")
      gram_sums(conv, sums);
    else if (path == "winograd")
      winograd_sums(conv, sums);
    else if (conv.s.depthwise())
      depthwise_sums(conv, sums);
    else
      explicit_sums(conv, sums);
  });
  return q;
}

void sq_conv_acc_(const Tensor& out, const Tensor& x, const Tensor& g, const Tensor& weight, Sizes stride,
                  Sizes padding, Sizes dilation, int64_t groups, std::string_view path) {
  const ConvGeometry s = check_conv_acc(out, x, g, weight, stride, padding, dilation, groups, path);
  if (g.numel() == 0 || out.numel() == 0) return;
  const Tensor w = contiguous(weight);
  const Tensor sums = zeros({s.filters, s.kernel_h, s.kernel_w, s.group_channels()}, sum_type(g));
  with_type("sq_conv_acc_", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    const Conv<scalar_t> conv(x, g, s);
    T* to = sums.mutable_data_ptr<T>();
    const T* by = w.const_data_ptr<T>();
    check_winograd("sq_conv_acc_", path, winograd_fits(conv.s));
    if (path == "winograd")
      winograd_accumulate(conv, to, by);
    else if (conv.s.depthwise())
      depthwise_accumulate(conv, to, by);
    else
      explicit_accumulate(conv, to, by);
    add_permuted(out.mutable_data_ptr<T>(), to, s);
  });
}

STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  T2V_IMPL(sq_conv);
  T2V_IMPL(sq_conv_acc_);
}

}  // namespace
}  // namespace t2v
