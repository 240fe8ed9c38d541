// Squared per-example weight gradients of a convolution: the operators, which choose among the paths of sq_conv_*.cpp.
#include "sq_conv.h"

#include <torch/library.h>

namespace t2v {
namespace {

bool winograd_fits(const ConvGeometry& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.groups == 1;
}

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
    check_winograd("sq_conv_acc_", path, winograd_fits(conv.s));
    if (path == "winograd")
      winograd_accumulate(conv, to, by);
    else if (conv.s.depthwise())
      depthwise_accumulate(conv, to, by);
    else
      explicit_accumulate(conv, to, by);
  });
  out.add_(sums.permute({0, 3, 1, 2}));
}

TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  m.impl("sq_conv", sq_conv);
  m.impl("sq_conv_acc_", sq_conv_acc_);
}

}  // namespace
}  // namespace t2v
