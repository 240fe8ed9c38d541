// The operators on CUDA tensors. Nothing here waits for the device, so that CUDA graphs can capture every operator.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "kernels.h"

#ifdef T2V_EMULATED
#define T2V_LIBRARY t2v_fast_emulated
#define T2V_KEY CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define T2V_LIBRARY t2v_fast
#define T2V_KEY CUDA
#endif

namespace t2v {
namespace {

using cuda::Launch;
using cuda::SumOf;

// Most bytes of Gram matrices that are held at once. A larger batch is computed in several parts.
constexpr int64_t kLargestWorkspace = int64_t{256} << 20;

// Makes the tensor's device the current one for its own lifetime.
class OnDevice {
 public:
#ifdef T2V_EMULATED
  explicit OnDevice(const at::Tensor&) : launch_{nullptr, 3, tf32()} {}
#else
  explicit OnDevice(const at::Tensor& t)
      : guard_(t.device()), launch_{c10::cuda::getCurrentCUDAStream().stream(), processors(t.get_device()), tf32()} {}
#endif
  const Launch& operator*() const { return launch_; }

 private:
  // Set by torch.set_float32_matmul_precision or by torch.backends.cuda.matmul.fp32_precision. After the latter,
  // float32MatmulPrecision() throws.
  static bool tf32() {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
           at::Float32Precision::TF32;
  }

#ifndef T2V_EMULATED
  static int processors(int device) {
    int count = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }

  c10::cuda::CUDAGuard guard_;
#endif
  Launch launch_;
};

at::Tensor empty_sums(at::IntArrayRef shape, const at::Tensor& like) {
  return at::empty(shape, like.options().dtype(sum_type(like)));
}
at::Tensor zero_sums(at::IntArrayRef shape, const at::Tensor& like) {
  return at::zeros(shape, like.options().dtype(sum_type(like)));
}
at::Tensor add_parts(const at::Tensor& parts) { return parts.size(0) == 1 ? parts[0] : parts.sum(0); }

// [N, C, H, W] -> dense [N, H, W, C]. Channels-last tensors are not copied.
at::Tensor pixels_first(const at::Tensor& images) { return images.permute({0, 2, 3, 1}).contiguous(); }

void check_size(const char* op, const ConvGeometry& s, bool gram) {
  constexpr int64_t largest = INT32_MAX, largest_gram = 46340;  // its square is below 2^31
  TORCH_CHECK_VALUE(
      s.pixels() <= largest && s.positions() <= largest && s.kernel_h * s.kernel_w * s.group_channels() <= largest, op,
      ": an image of ", s.pixels(), " pixels and ", s.channels, " channels is too large for the CUDA kernels");
  TORCH_CHECK_VALUE(!gram || (s.positions() <= largest_gram && s.pixels() <= largest), op, ": ", s.positions(),
                    " positions are too many for a Gram matrix, expected at most ", largest_gram);
}

// A convolution of tensors from pixels_first.
template <class T>
cuda::Convolution<T> convolution(const ConvGeometry& s, const at::Tensor& x, const at::Tensor& g) {
  return {s, x.const_data_ptr<T>(), g.const_data_ptr<T>(), x.size(0), g.size(0)};
}

ConvGeometry pixelwise(const ConvGeometry& s) {
  return {s.channels, s.height, s.width, s.groups, s.height, s.width, 1, 1, 1, 1, 0, 0, 1, 1, s.groups};
}

// A linear layer over tokens is a 1x1 convolution of an image with one column of tokens.
ConvGeometry tokenwise(const at::Tensor& x, const at::Tensor& g) {
  return {x.size(2), x.size(1), 1, g.size(2), x.size(1), 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
}

// Whether the patches' Gram matrix is cheaper to compute from the pixels' (t2v_fast/ops/geometry.py: gram_by_pixels).
bool gram_by_pixels(const ConvGeometry& s) {
  const double pixels = s.pixels(), positions = s.positions(), taps = s.kernel_h * s.kernel_w,
               channels = s.group_channels();
  return pixels * pixels * channels + 16 * taps * positions * positions < positions * positions * channels * taps;
}

int64_t gram_bytes(const ConvGeometry& s, const at::Tensor& x) {
  const int64_t entries = s.positions() * s.positions() + (gram_by_pixels(s) ? s.pixels() * s.pixels() : 0);
  return entries * s.groups * (x.scalar_type() == at::kDouble ? 8 : 4);
}

// x [N, H, W, C] -> [N, groups, P, P]
template <class T>
at::Tensor grams(const ConvGeometry& s, const at::Tensor& x, const Launch& launch) {
  const auto of_patches = [&](const ConvGeometry& shape) {
    at::Tensor gram = zero_sums({x.size(0), shape.groups, shape.positions(), shape.positions()}, x);
    cuda::conv_grams<T>(gram.mutable_data_ptr<SumOf<T>>(), convolution<T>(shape, x, x), launch);
    return gram;
  };
  if (!gram_by_pixels(s)) return of_patches(s);
  const at::Tensor pixels = of_patches(pixelwise(s));
  at::Tensor gram = zero_sums({x.size(0), s.groups, s.positions(), s.positions()}, x);
  cuda::shifted_grams(gram.mutable_data_ptr<SumOf<T>>(), pixels.const_data_ptr<SumOf<T>>(), s, x.size(0), launch);
  return gram;
}

// gram [N, groups, P, P] and g [M, Ho, Wo, O] -> [M, O]. Half-precision cotangents are multiplied on tensor cores, and
// the Gram matrices are split into terms, so that little or nothing of them is lost (kernels/sq_conv_gram.py:
// form_terms). float16 cotangents are multiplied in TF32, which has all of their bits and the range of float32.
template <class T>
at::Tensor forms(const at::Tensor& gram, const at::Tensor& g, const Launch& launch) {
  using Factor = std::conditional_t<std::is_same_v<T, c10::Half>, float, T>;
  constexpr bool split = sizeof(T) == 2;
  const int64_t groups = gram.size(1), positions = gram.size(2), rows = g.size(0), filters = g.size(-1);
  const at::ScalarType factor = c10::CppTypeToScalarType<Factor>::value;
  const at::Tensor cotangents = g.to(factor);
  cuda::Grams<Factor> grams{nullptr, gram.size(0), groups, 1, positions, positions};
  at::Tensor terms = gram;
  if constexpr (split) {
    grams.terms = std::is_same_v<T, c10::BFloat16> && positions < 64 ? 3 : 2;
    grams.pitch = (positions + 7) / 8 * 8;
    terms = at::empty({gram.size(0), groups, grams.terms, positions, grams.pitch}, gram.options().dtype(factor));
    cuda::split_grams<Factor>(terms.mutable_data_ptr<Factor>(), grams.terms, grams.pitch, gram.const_data_ptr<float>(),
                              gram.size(0) * groups, positions, launch);
  }
  grams.data = terms.const_data_ptr<Factor>();
  const int64_t parts = cuda::form_parts(positions, filters, groups, rows, launch);
  at::Tensor sums = empty_sums({parts, rows, filters}, g);
  cuda::quadratic_forms<Factor>(sums.mutable_data_ptr<SumOf<T>>(), parts, grams, cotangents.const_data_ptr<Factor>(),
                                filters, rows, launch);
  return add_parts(sums);
}

// x [N, H, W, C], g [M, Ho, Wo, O] -> [M, O]
template <class T>
at::Tensor gram_sums(const ConvGeometry& s, const at::Tensor& x, const at::Tensor& g, const Launch& launch) {
  const int64_t examples = x.size(0), filters = g.size(-1);
  const int64_t at_once = std::max<int64_t>(kLargestWorkspace / gram_bytes(s, x), 1);
  if (examples <= at_once) return forms<T>(grams<T>(s, x, launch), g, launch);
  const at::Tensor by_cotangent = g.unflatten(0, {-1, examples});
  at::Tensor q = empty_sums({by_cotangent.size(0), examples, filters}, g);
  for (int64_t first = 0; first < examples; first += at_once) {
    const int64_t last = std::min(first + at_once, examples);
    const at::Tensor some = by_cotangent.slice(1, first, last).flatten(0, 1).contiguous();
    q.slice(1, first, last)
        .copy_(forms<T>(grams<T>(s, x.slice(0, first, last), launch), some, launch).unflatten(0, {-1, last - first}));
  }
  return q.flatten(0, 1);
}

// [M, kh kw, O]. The gradients of a depthwise convolution are smaller than its input.
template <class T>
at::Tensor depthwise(const ConvGeometry& s, const at::Tensor& x, const at::Tensor& g, const Launch& launch) {
  const int64_t parts = cuda::depthwise_parts(s, g.size(0), launch);
  at::Tensor gradients = empty_sums({parts, g.size(0), s.kernel_h * s.kernel_w, s.filters}, g);
  cuda::depthwise_gradients<T>(gradients.mutable_data_ptr<SumOf<T>>(), parts, convolution<T>(s, x, g), launch);
  return add_parts(gradients);
}

// Images of 3 channels get a fourth one of zeros, so that the kernels copy the values of a pixel together: without it,
// half-precision values are copied one by one. x [N, H, W, C]
at::Tensor whole_pixels(ConvGeometry& s, const at::Tensor& x) {
  if (s.groups != 1 || s.channels != 3 || s.filters % 4 != 0) return x;
  s.channels = 4;
  return at::constant_pad_nd(x, {0, 1});
}

// x [N, H, W, C], g [M, Ho, Wo, O] -> [M, O]
at::Tensor filter_sums(const ConvGeometry& s, const at::Tensor& x, const at::Tensor& g, bool gram) {
  check_size("sq_conv", s, gram);
  const OnDevice device(g);
  at::Tensor q;
  with_type("sq_conv", g.scalar_type(), [&]<class scalar_t>() {
    if (gram) {
      q = gram_sums<scalar_t>(s, x, g, *device);
    } else if (s.depthwise()) {
      q = depthwise<scalar_t>(s, x, g, *device).square_().sum(1);
    } else if (const int64_t split = cuda::gradient_parts(s, g.size(0), g.element_size(), *device); split > 1) {
      at::Tensor gradients = empty_sums({split, g.size(0), s.filters, s.kernel_h * s.kernel_w * s.group_channels()}, g);
      cuda::conv_gradients<scalar_t>(gradients.mutable_data_ptr<SumOf<scalar_t>>(), split,
                                     convolution<scalar_t>(s, x, g), *device);
      q = add_parts(gradients).square_().sum(2);
    } else {
      const int64_t parts = cuda::filter_parts(s, g.size(0), *device);
      at::Tensor sums = empty_sums({parts, g.size(0), s.filters}, g);
      cuda::conv_filter_sums<scalar_t>(sums.mutable_data_ptr<SumOf<scalar_t>>(), parts, convolution<scalar_t>(s, x, g),
                                       *device);
      q = add_parts(sums);
    }
  });
  return q;
}

// The same arguments -> weighted sums [O, kh, kw, C / groups]
at::Tensor element_sums(const ConvGeometry& s, const at::Tensor& x, const at::Tensor& g, const at::Tensor& weight) {
  check_size("sq_conv_acc_", s, false);
  const OnDevice device(g);
  const at::Tensor by = weight.contiguous();
  at::Tensor total;
  with_type("sq_conv_acc_", g.scalar_type(), [&]<class scalar_t>() {
    if (s.depthwise()) {
      total = at::mul(depthwise<scalar_t>(s, x, g, *device).square_(), by.view({-1, 1, 1})).sum(0).t();
    } else {
      const int64_t parts = cuda::element_parts(s, g.size(0), *device);
      at::Tensor sums = empty_sums({parts, s.filters, s.kernel_h * s.kernel_w * s.group_channels()}, g);
      cuda::conv_element_sums<scalar_t>(sums.mutable_data_ptr<SumOf<scalar_t>>(), parts,
                                        by.const_data_ptr<SumOf<scalar_t>>(), convolution<scalar_t>(s, x, g), *device);
      total = add_parts(sums);
    }
  });
  return total.reshape({s.filters, s.kernel_h, s.kernel_w, s.group_channels()});
}

at::Tensor sq_conv(const at::Tensor& x, const at::Tensor& g, at::IntArrayRef kernel, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, c10::string_view path) {
  check_path("sq_conv", path, {"explicit", "gram", "winograd"});  // "winograd" runs as "explicit"
  const ConvGeometry s = check_conv("sq_conv", x, g, kernel, stride, padding, dilation, groups);
  if (g.numel() == 0 || x.numel() == 0) return zero_sums({g.size(0), g.size(1)}, g);
  if (path == "gram") return filter_sums(s, pixels_first(x), pixels_first(g), true);
  ConvGeometry padded = s;
  const at::Tensor pixels = whole_pixels(padded, pixels_first(x));
  return filter_sums(padded, pixels, pixels_first(g), false);
}

void sq_conv_acc_(at::Tensor& out, const at::Tensor& x, const at::Tensor& g, const at::Tensor& weight,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                  c10::string_view path) {
  const ConvGeometry s = check_conv_acc(out, x, g, weight, stride, padding, dilation, groups, path);
  if (g.numel() == 0 || x.numel() == 0) return;
  ConvGeometry padded = s;
  const at::Tensor pixels = whole_pixels(padded, pixels_first(x));
  const at::Tensor sums = element_sums(padded, pixels, pixels_first(g), weight);
  out.add_(sums.narrow(3, 0, out.size(1)).permute({0, 3, 1, 2}));
}

at::Tensor conv_gram(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups) {
  const ConvGeometry s = check_conv("conv_gram", x, groups, kernel, stride, padding, dilation, groups);
  check_size("conv_gram", s, true);
  if (x.numel() == 0) return zero_sums({x.size(0), groups, s.positions(), s.positions()}, x);
  const OnDevice device(x);
  at::Tensor gram;
  with_type("conv_gram", x.scalar_type(),
            [&]<class scalar_t>() { gram = grams<scalar_t>(s, pixels_first(x), *device); });
  return gram;
}

at::Tensor sq_gram(const at::Tensor& gram, const at::Tensor& g) {
  check_forms(gram, g);
  if (g.numel() == 0) return zero_sums({g.size(0), g.size(1)}, g);
  const OnDevice device(g);
  const at::Tensor grams = gram.contiguous(), cotangents = pixels_first(g);
  at::Tensor q;
  with_type("sq_gram", g.scalar_type(), [&]<class scalar_t>() { q = forms<scalar_t>(grams, cotangents, *device); });
  return q;
}

// For a single token, the square of the outer product is the outer product of the squares.
at::Tensor square_of_token(const at::Tensor& t) { return t.select(1, 0).to(sum_type(t)).square(); }

at::Tensor sq_outer(const at::Tensor& x, const at::Tensor& g, c10::string_view path) {
  check_path("sq_outer", path, {"explicit", "gram"});
  check_outer("sq_outer", x, g);
  if (g.numel() == 0 || x.numel() == 0) return zero_sums({g.size(0), g.size(2)}, g);
  if (x.size(1) == 1) {
    const at::Tensor norms = square_of_token(x).sum(1, /*keepdim=*/true);
    return square_of_token(g).unflatten(0, {-1, x.size(0)}).mul_(norms).flatten(0, 1);
  }
  return filter_sums(tokenwise(x, g), x.contiguous().unsqueeze(2), g.contiguous().unsqueeze(2), path == "gram");
}

void sq_outer_acc_(at::Tensor& out, const at::Tensor& x, const at::Tensor& g, const at::Tensor& weight) {
  check_outer("sq_outer_acc_", x, g);
  check_accumulator("sq_outer_acc_", out, {g.size(2), x.size(2)}, g, weight);
  if (g.numel() == 0 || x.numel() == 0) return;
  if (x.size(1) == 1) {
    const at::Tensor weighted = square_of_token(g).mul_(weight.unsqueeze(1)).unflatten(0, {-1, x.size(0)}).sum(0);
    out.addmm_(weighted.t(), square_of_token(x));
    return;
  }
  out.add_(
      element_sums(tokenwise(x, g), x.contiguous().unsqueeze(2), g.contiguous().unsqueeze(2), weight).view_as(out));
}

template <class T>
cuda::Tokens<T> tokens(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

// The squares of the sums over positions: [M, C] for the products with x, if there is one, and then for g alone.
at::Tensor product_sums(const char* op, const at::Tensor& g, const std::optional<at::Tensor>& x,
                        const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& scale, bool plain) {
  check_prod(op, g, x, shift, scale);
  const int64_t kinds = (x ? 1 : 0) + (plain ? 1 : 0), rows = g.size(0), channels = g.size(2);
  if (g.numel() == 0) return zero_sums({kinds, rows, channels}, g);
  const OnDevice device(g);
  const auto broadcast = [&](const std::optional<at::Tensor>& t) {
    return t ? t->to(sum_type(g)).expand(x->sizes()) : at::Tensor();
  };
  const at::Tensor by = broadcast(shift), times = broadcast(scale), input = x ? *x : at::Tensor();
  const int64_t parts = cuda::product_parts(g.size(1), channels, rows, *device);
  at::Tensor sums = empty_sums({kinds, parts, rows, channels}, g);
  with_type("sq_prod", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    T* const to = sums.mutable_data_ptr<T>();
    cuda::products<scalar_t>(x ? to : nullptr, plain ? to + (kinds - 1) * parts * rows * channels : nullptr, parts,
                             tokens<scalar_t>(g), tokens<scalar_t>(input), tokens<T>(by), tokens<T>(times), g.size(1),
                             channels, x ? x->size(0) : rows, rows, *device);
  });
  return sums.sum(1).square_();
}

at::Tensor sq_prod(const at::Tensor& g, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& shift,
                   const std::optional<at::Tensor>& scale) {
  return product_sums("sq_prod", g, x, shift, scale, !x)[0];
}

at::Tensor sq_norm(const at::Tensor& g, const at::Tensor& x, const std::optional<at::Tensor>& shift,
                   const std::optional<at::Tensor>& scale) {
  return product_sums("sq_norm", g, x, shift, scale, true);
}

void sq_prod_acc_(at::Tensor& out, const at::Tensor& g, const at::Tensor& weight, const std::optional<at::Tensor>& x,
                  const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& scale) {
  const at::Tensor q = sq_prod(g, x, shift, scale);
  check_accumulator("sq_prod_acc_", out, {g.size(2)}, g, weight);
  out.add_(at::mul(q, weight.unsqueeze(1)).sum(0));
}

// Sorts the look-ups of a table and calls use(lookups).
template <class Use>
void with_lookups(const char* op, const at::Tensor& index, const at::Tensor& g, int64_t num_rows, const Use& use) {
  TORCH_CHECK_VALUE(index.numel() <= INT32_MAX && g.size(0) <= INT32_MAX, op, ": ", index.sizes(),
                    " look-ups are too many for one call");
  // The device raises this error, and torch reports it at the next synchronisation.
  at::_assert_async(index.max() < num_rows,
                    std::string(op) + ": index out of range for a table of " + std::to_string(num_rows) + " rows");
  const auto [row, place] = at::sort(index.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto number = [](int64_t size) { return static_cast<int>(size); };
  use(cuda::Lookups{row.template const_data_ptr<int64_t>(), place.template const_data_ptr<int64_t>(),
                    number(index.numel()), number(index.size(1)), number(index.size(0)), number(g.size(0))});
}

at::Tensor sq_scatter(const at::Tensor& index, const at::Tensor& g, int64_t num_rows) {
  check_scatter("sq_scatter", index, g, num_rows);
  at::Tensor q = zero_sums({g.size(0), num_rows}, g);
  if (g.numel() == 0) return q;
  const OnDevice device(g);
  with_lookups("sq_scatter", index, g, num_rows, [&](const cuda::Lookups& lookups) {
    with_type("sq_scatter", g.scalar_type(), [&]<class scalar_t>() {
      cuda::scatter_filter_sums<scalar_t>(q.mutable_data_ptr<SumOf<scalar_t>>(), lookups, tokens<scalar_t>(g), num_rows,
                                          g.size(2), *device);
    });
  });
  return q;
}

void sq_scatter_acc_(at::Tensor& out, const at::Tensor& index, const at::Tensor& g, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(out.dim() == 2, "sq_scatter_acc_: out must be [V, O], got ", out.sizes());
  check_scatter("sq_scatter_acc_", index, g, out.size(0));
  check_accumulator("sq_scatter_acc_", out, {out.size(0), g.size(2)}, g, weight);
  if (g.numel() == 0) return;
  const OnDevice device(g);
  const at::Tensor by = weight.contiguous();
  with_lookups("sq_scatter_acc_", index, g, out.size(0), [&](const cuda::Lookups& lookups) {
    with_type("sq_scatter_acc_", g.scalar_type(), [&]<class scalar_t>() {
      using T = SumOf<scalar_t>;
      cuda::scatter_element_sums<scalar_t>(out.mutable_data_ptr<T>(), lookups, tokens<scalar_t>(g),
                                           by.const_data_ptr<T>(), g.size(2), *device);
    });
  });
}

TORCH_LIBRARY_IMPL(T2V_LIBRARY, T2V_KEY, m) {
  m.impl("conv_gram", conv_gram);
  m.impl("sq_conv", sq_conv);
  m.impl("sq_conv_acc_", sq_conv_acc_);
  m.impl("sq_gram", sq_gram);
  m.impl("sq_norm", sq_norm);
  m.impl("sq_outer", sq_outer);
  m.impl("sq_outer_acc_", sq_outer_acc_);
  m.impl("sq_prod", sq_prod);
  m.impl("sq_prod_acc_", sq_prod_acc_);
  m.impl("sq_scatter", sq_scatter);
  m.impl("sq_scatter_acc_", sq_scatter_acc_);
}

}  // namespace
}  // namespace t2v
