// Argument checks of every compiled backend, with expected and actual values. The operators can be called directly,
// without the checks in Python.
#pragma once

#include "geometry.h"
#include "tensor.h"

namespace t2v {

inline ScalarType sum_type(const View& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_pair(const char* op, const char* name, const View& t, const View& g, int64_t dims) {
  T2V_CHECK_VALUE(t.dim() == dims && g.dim() == dims, op, ": expected ", name, " and g with ", dims, " axes, got ",
                  t.sizes(), " and ", g.sizes());
  T2V_CHECK_VALUE(t.scalar_type() == g.scalar_type(), op, ": expected one dtype, got ", name, " ", t.scalar_type(),
                  " and g ", g.scalar_type());
}

inline void check_rows(const char* op, const View& examples, const View& g) {
  const int64_t n = examples.size(0), m = g.size(0);
  T2V_CHECK_VALUE(n == 0 ? m == 0 : m % n == 0, op, ": g has ", m, " rows, expected a multiple of the ", n,
                  " examples");
}

inline void check_accumulator(const char* op, const View& out, Sizes shape, const View& g, const View& weight) {
  T2V_CHECK_VALUE(out.sizes() == shape && out.scalar_type() == sum_type(g) && out.is_contiguous(), op, ": out is ",
                  out.sizes(), " ", out.scalar_type(), ", expected contiguous ", shape, " ", sum_type(g));
  T2V_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == g.size(0) && weight.scalar_type() == sum_type(g), op,
                  ": weight is ", weight.sizes(), " ", weight.scalar_type(), ", expected [", g.size(0), "] ",
                  sum_type(g));
}

inline void check_path(const char* op, std::string_view path, std::initializer_list<const char*> allowed) {
  for (const char* name : allowed)
    if (path == name) return;
  std::string all;
  for (const char* name : allowed) all += (all.empty() ? "" : ", ") + std::string(name);
  T2V_CHECK_VALUE(false, op, ": path '", path, "' is none of ", all);
}

// The geometry of a convolution of x with `filters` filters.
inline ConvGeometry check_conv(const char* op, const View& x, int64_t filters, Sizes kernel, Sizes stride,
                               Sizes padding, Sizes dilation, int64_t groups) {
  T2V_CHECK_VALUE(x.dim() == 4, op, ": expected x with 4 axes, got ", x.sizes());
  for (const Sizes& pair : {kernel, stride, padding, dilation})
    T2V_CHECK_VALUE(pair.size() == 2, op, ": expected two numbers for each of kernel, stride, padding, dilation");
  int64_t out[2];
  for (int axis = 0; axis < 2; ++axis) {
    T2V_CHECK_VALUE(kernel[axis] >= 1 && stride[axis] >= 1 && dilation[axis] >= 1 && padding[axis] >= 0, op,
                    ": expected positive sizes, got kernel ", kernel, ", stride ", stride, ", padding ", padding,
                    ", dilation ", dilation);
    const int64_t span = x.size(2 + axis) + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    out[axis] = span < 0 ? 0 : span / stride[axis] + 1;
    T2V_CHECK_VALUE(out[axis] >= 1, op, ": x ", x.sizes(), " with kernel ", kernel, ", stride ", stride, ", padding ",
                    padding, ", dilation ", dilation, " gives size 0 along axis ", 2 + axis);
  }
  T2V_CHECK_VALUE(groups >= 1 && x.size(1) % groups == 0 && filters % groups == 0, op, ": groups ", groups,
                  " must divide the ", x.size(1), " input and ", filters, " output channels");
  return {x.size(1), x.size(2), x.size(3),  filters,    out[0],      out[1],      kernel[0], kernel[1],
          stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups};
}

// The same for a convolution with g as the cotangent of its output.
inline ConvGeometry check_conv(const char* op, const View& x, const View& g, Sizes kernel, Sizes stride, Sizes padding,
                               Sizes dilation, int64_t groups) {
  check_pair(op, "x", x, g, 4);
  const ConvGeometry s = check_conv(op, x, g.size(1), kernel, stride, padding, dilation, groups);
  T2V_CHECK_VALUE(g.size(2) == s.out_height && g.size(3) == s.out_width, op, ": g is ", g.sizes(), " but x ", x.sizes(),
                  " with kernel ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ", dilation,
                  " gives size ", s.out_height, " x ", s.out_width);
  check_rows(op, x, g);
  return s;
}

// The arguments of sq_conv_acc_.
inline ConvGeometry check_conv_acc(const View& out, const View& x, const View& g, const View& weight, Sizes stride,
                                   Sizes padding, Sizes dilation, int64_t groups, std::string_view path) {
  check_path("sq_conv_acc_", path, {"explicit", "winograd"});
  T2V_CHECK_VALUE(out.dim() == 4, "sq_conv_acc_: out must have 4 axes, got ", out.sizes());
  const ConvGeometry s = check_conv("sq_conv_acc_", x, g, out.sizes().subspan(2), stride, padding, dilation, groups);
  check_accumulator("sq_conv_acc_", out, {s.filters, s.group_channels(), s.kernel_h, s.kernel_w}, g, weight);
  return s;
}

inline void check_outer(const char* op, const View& x, const View& g) {
  check_pair(op, "x", x, g, 3);
  T2V_CHECK_VALUE(x.size(1) == g.size(1), op, ": expected x [N, S, I] and g [M, S, O] with one S, got ", x.sizes(),
                  " and ", g.sizes());
  check_rows(op, x, g);
}

// The arguments of sq_gram.
inline void check_forms(const View& gram, const View& g) {
  T2V_CHECK_VALUE(gram.dim() == 4 && g.dim() == 4 && gram.size(2) == gram.size(3) &&
                      gram.size(2) == g.size(2) * g.size(3) && gram.size(1) >= 1 && g.size(1) % gram.size(1) == 0,
                  "sq_gram: expected gram [N, groups, P, P] and g [M, O, Ho, Wo] with P = Ho Wo, got ", gram.sizes(),
                  " and ", g.sizes());
  T2V_CHECK_VALUE(gram.scalar_type() == sum_type(g), "sq_gram: expected gram ", sum_type(g), " for g ", g.scalar_type(),
                  ", got ", gram.scalar_type());
  check_rows("sq_gram", gram, g);
}

inline void check_prod(const char* op, const View& g, const std::optional<View>& x, const std::optional<View>& shift,
                       const std::optional<View>& scale) {
  T2V_CHECK_VALUE(g.dim() == 3, op, ": expected g [M, S, C], got ", g.sizes());
  if (x) {
    check_pair(op, "x", *x, g, 3);
    T2V_CHECK_VALUE(x->size(1) == g.size(1) && x->size(2) == g.size(2), op,
                    ": expected g [M, S, C] and x [N, S, C], got ", g.sizes(), " and ", x->sizes());
    check_rows(op, *x, g);
  } else {
    T2V_CHECK_VALUE(!shift && !scale, op, ": shift and scale act on x, which was not given");
  }
}

// The arguments of sq_scatter, except the values of the index, which the backend checks.
inline void check_scatter(const char* op, const View& index, const View& g, int64_t num_rows) {
  T2V_CHECK_VALUE(
      index.dim() == 2 && g.dim() == 3 && index.size(1) == g.size(1) && index.scalar_type() == ScalarType::Long, op,
      ": expected index [N, S] int64 and g [M, S, O], got ", index.sizes(), " ", index.scalar_type(), " and ",
      g.sizes());
  T2V_CHECK_VALUE(num_rows >= 1, op, ": num_rows is ", num_rows, ", expected at least 1");
  check_rows(op, index, g);
}

// The arguments of sq_grouped, except the values of the offsets, which the backend checks. Returns the number of
// cotangents.
inline int64_t check_grouped(const char* op, const View& x, const View& g, const View& offsets) {
  check_pair(op, "x", x, g, 2);
  T2V_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.scalar_type() == ScalarType::Long, op,
                  ": expected offsets [B + 1] int64, got ", offsets.sizes(), " ", offsets.scalar_type());
  check_rows(op, x, g);
  return x.size(0) == 0 ? 1 : g.size(0) / x.size(0);
}

// The arguments of sq_grouped_acc_.
inline void check_grouped_acc(const View& out, const View& x, const View& g, const View& offsets, const View& groups,
                              const View& weight) {
  const char* op = "sq_grouped_acc_";
  const int64_t rows = check_grouped(op, x, g, offsets) * (offsets.size(0) - 1);
  T2V_CHECK_VALUE(out.dim() == 3 && out.size(1) == g.size(1) && out.size(2) == x.size(1) &&
                      out.scalar_type() == sum_type(g) && out.is_contiguous(),
                  op, ": out is ", out.sizes(), " ", out.scalar_type(), ", expected contiguous [E, ", g.size(1), ", ",
                  x.size(1), "] ", sum_type(g));
  T2V_CHECK_VALUE(groups.dim() == 1 && groups.size(0) == out.size(0) + 1 && groups.scalar_type() == ScalarType::Long,
                  op, ": groups is ", groups.sizes(), " ", groups.scalar_type(), ", expected [", out.size(0) + 1,
                  "] int64");
  T2V_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == rows && weight.scalar_type() == sum_type(g), op,
                  ": weight is ", weight.sizes(), " ", weight.scalar_type(), ", expected [", rows, "] ", sum_type(g));
}

}  // namespace t2v
