// The operators on CUDA tensors. Nothing here waits for the device, so that CUDA graphs can capture every operator.
#include "tensors.h"

#ifdef T2V_EMULATED
#define T2V_LIBRARY t2v_fast_emulated
#define T2V_KEY CPU
#define T2V_WORKSPACE (int64_t{64} << 10)  // so that the tests' small batches are computed in parts, too
#else
#define T2V_LIBRARY t2v_fast
#define T2V_KEY CUDA
#define T2V_WORKSPACE (int64_t{256} << 20)
#endif

namespace t2v {
namespace {

using cuda::Launch;
using cuda::SumOf;

// Most bytes of Gram matrices that are held at once. A larger batch is computed in several parts.
constexpr int64_t kLargestWorkspace = T2V_WORKSPACE;

void check_size(const char* op, const ConvGeometry& s, bool gram) {
  constexpr int64_t largest = INT32_MAX, largest_gram = 46336;  // its square is below 2^31, and it is its own pitch
  T2V_CHECK_VALUE(
      s.pixels() <= largest && s.positions() <= largest && s.kernel_h * s.kernel_w * s.group_channels() <= largest, op,
      ": an image of ", s.pixels(), " pixels and ", s.channels, " channels is too large for the CUDA kernels");
  T2V_CHECK_VALUE(!gram || (s.positions() <= largest_gram && s.pixels() <= largest), op, ": ", s.positions(),
                  " positions are too many for a Gram matrix, expected at most ", largest_gram);
}

// Images from by_pixels.
template <class T>
cuda::Pixels<T> pixels_of(const Tensor& images) {
  return {images.const_data_ptr<T>(), images.stride(0), static_cast<int>(pixel_pitch(images))};
}

template <class T>
cuda::Convolution<T> convolution(const ConvGeometry& s, const Tensor& x, const Tensor& g) {
  return {s, pixels_of<T>(x), pixels_of<T>(g), x.size(0), g.size(0)};
}

ConvGeometry pixelwise(const ConvGeometry& s) {
  return {s.channels, s.height, s.width, s.groups, s.height, s.width, 1, 1, 1, 1, 0, 0, 1, 1, s.groups};
}

// A linear layer over tokens is a 1x1 convolution of an image with one column of tokens.
ConvGeometry tokenwise(const Tensor& x, const Tensor& g) {
  return {x.size(2), x.size(1), 1, g.size(2), x.size(1), 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
}

// Whether the patches' Gram matrix is cheaper to compute from the pixels' (t2v_fast/ops/geometry.py: gram_by_pixels).
bool gram_by_pixels(const ConvGeometry& s) {
  const double pixels = s.pixels(), positions = s.positions(), taps = s.kernel_h * s.kernel_w,
               channels = s.group_channels();
  return pixels * pixels * channels + 16 * taps * positions * positions < positions * positions * channels * taps;
}

int64_t gram_bytes(const ConvGeometry& s, const Tensor& x) {
  const int64_t entries = s.positions() * s.positions() + (gram_by_pixels(s) ? s.pixels() * s.pixels() : 0);
  return entries * s.groups * (x.scalar_type() == ScalarType::Double ? 8 : 4);
}

// Gram matrices of x [N, H, W, C] as sums of terms: [N, groups, terms, P, pitch]. What is not `whole` may have any
// values in tiles below the diagonal, which quadratic forms do not read.
template <class T, class Term>
Tensor grams(const ConvGeometry& s, const Tensor& x, int64_t terms, int64_t pitch, bool whole, const Launch& launch) {
  const ScalarType type = std::is_same_v<Term, SumOf<T>> ? sum_type(x) : x.scalar_type();
  const std::vector<int64_t> sizes{x.size(0), s.groups, terms, s.positions(), pitch};
  const bool by_pixels = gram_by_pixels(s);
  const Tensor gram = whole && !by_pixels ? zero_sums(sizes, x) : empty_like(x, sizes, type);
  Term* const to = gram.mutable_data_ptr<Term>();
  if (!by_pixels) {
    cuda::conv_grams<T, Term>(to, terms, pitch, convolution<T>(s, x, x), launch);
    return gram;
  }
  const ConvGeometry all = pixelwise(s);
  const Tensor pixels = empty_sums({x.size(0), all.groups, all.positions(), all.positions()}, x);
  cuda::conv_grams<T, SumOf<T>>(pixels.mutable_data_ptr<SumOf<T>>(), 1, all.positions(), convolution<T>(all, x, x),
                                launch);
  cuda::shifted_grams<T, Term>(to, terms, pitch, pixels.const_data_ptr<SumOf<T>>(), s, x.size(0), launch);
  return gram;
}

// Half-precision cotangents are multiplied on tensor cores, and the Gram matrices are split into terms, so that little
// or nothing of them is lost (kernels/sq_conv_gram.py: form_terms). float16 cotangents are multiplied in TF32, which
// has all of their bits and the range of float32.
template <class T>
int64_t terms_for(int64_t positions) {
  if (sizeof(T) != 2) return 1;
  return std::is_same_v<T, BFloat16> && positions < 64 ? 3 : 2;
}

// Rows of Gram matrices are padded, so that they can be read 16 bytes at a time.
int64_t pitch_for(int64_t positions) { return (positions + 7) / 8 * 8; }

// gram [N, groups, P, P] -> [N, groups, terms, P, pitch]
template <class T>
Tensor split(const Tensor& gram, const Launch& launch) {
  using Term = cuda::TermOf<T>;
  const int64_t positions = gram.size(2), pitch = pitch_for(positions), terms = terms_for<T>(positions);
  const std::vector<int64_t> sizes{gram.size(0), gram.size(1), terms, positions, pitch};
  if constexpr (sizeof(T) == 2) {
    const Tensor to = empty_like(gram, sizes, std::is_same_v<T, Half> ? ScalarType::Float : ScalarType::BFloat16);
    cuda::split_grams<T>(to.mutable_data_ptr<Term>(), terms, pitch, gram.const_data_ptr<float>(),
                         gram.size(0) * gram.size(1), positions, launch);
    return to;
  } else {
    return viewed(pitch == positions ? gram : Tensor(torch::stable::pad(gram, {0, pitch - positions})), sizes);
  }
}

// gram [N, groups, terms, P, pitch] and g [M, Ho, Wo, O] -> [1, M, O], or with `plain` [2, M, O], and then the sums of
// g.
template <class T>
Tensor forms(const Tensor& gram, const Tensor& g, bool plain, const Launch& launch) {
  using Term = cuda::TermOf<T>;
  const int64_t groups = gram.size(1), positions = gram.size(3), rows = g.size(0), filters = g.size(3);
  const Tensor cotangents = converted(g, std::is_same_v<T, Half> ? ScalarType::Float : g.scalar_type());
  const cuda::Grams<Term> grams{
      gram.const_data_ptr<Term>(), gram.size(0), groups, gram.size(2), positions, gram.size(4)};
  const int64_t parts = cuda::form_parts(positions, filters, groups, rows, launch);
  const Tensor sums = empty_sums({plain ? 2 : 1, parts, rows, filters}, g);
  SumOf<T>* const to = sums.mutable_data_ptr<SumOf<T>>();
  cuda::quadratic_forms<Term>(to, plain ? to + parts * rows * filters : nullptr, parts, grams,
                              pixels_of<Term>(cotangents), filters, rows, launch);
  return parts == 1 ? selected(sums, 1, 0) : total(sums, 1);
}

// x [N, H, W, C], g [M, Ho, Wo, O] -> [1, M, O], or with `plain` [2, M, O], and then the sums of g
template <class T>
Tensor gram_sums(const ConvGeometry& s, const Tensor& x, const Tensor& g, bool plain, const Launch& launch) {
  const int64_t examples = x.size(0), filters = g.size(3);
  const int64_t at_once = std::max<int64_t>(kLargestWorkspace / gram_bytes(s, x), 1);
  const auto sums_of = [&](const Tensor& images, const Tensor& cotangents) {
    const int64_t positions = s.positions();
    return forms<T>(grams<T, cuda::TermOf<T>>(s, images, terms_for<T>(positions), pitch_for(positions), false, launch),
                    cotangents, plain, launch);
  };
  if (examples <= at_once) return sums_of(x, g);
  const Tensor cotangents = by_cotangent(g, examples);
  const int64_t kinds = plain ? 2 : 1, each = cotangents.size(0);
  const Tensor q = empty_sums({kinds, each, examples, filters}, g);
  for (int64_t first = 0; first < examples; first += at_once) {
    const int64_t count = std::min(at_once, examples - first);
    const Tensor some = by_pixels(by_row(narrowed(cotangents, 1, first, count)));
    const Tensor sums = sums_of(narrowed(x, 0, first, count), some);
    copy_to(narrowed(q, 2, first, count), viewed(contiguous(sums), {kinds, each, count, filters}));
  }
  return viewed(q, {kinds, g.size(0), filters});
}

// [M, kh kw, O]. The gradients of a depthwise convolution are smaller than its input.
template <class T>
Tensor depthwise(const ConvGeometry& s, const Tensor& x, const Tensor& g, const Launch& launch) {
  const int64_t parts = cuda::depthwise_parts(s, g.size(0), launch);
  const Tensor gradients = empty_sums({parts, g.size(0), s.kernel_h * s.kernel_w, s.filters}, g);
  cuda::depthwise_gradients<T>(gradients.mutable_data_ptr<SumOf<T>>(), parts, convolution<T>(s, x, g), launch);
  return add_parts(gradients);
}

// Images of 3 channels get a fourth one of zeros, so that the kernels copy the values of a pixel together: without it,
// half-precision values are copied one by one. x [N, H, W, C]
Tensor whole_pixels(ConvGeometry& s, const Tensor& x) {
  if (s.groups != 1 || s.channels != 3 || s.filters % 4 != 0) return x;
  s.channels = 4;
  return torch::stable::pad(x, {0, 1});
}

// x [N, H, W, C], g [M, Ho, Wo, O] -> [M, O]
Tensor filter_sums(const ConvGeometry& s, const Tensor& x, const Tensor& g, bool gram) {
  check_size("sq_conv", s, gram);
  const OnDevice device(g, allows_tf32(g));
  return with_type("sq_conv", g.scalar_type(), [&]<class scalar_t>() -> Tensor {
    if (gram) return selected(gram_sums<scalar_t>(s, x, g, false, *device), 0, 0);
    if (s.depthwise()) return total(squared_in_place(depthwise<scalar_t>(s, x, g, *device)), 1);
    if (const int64_t split = cuda::gradient_parts(s, g.size(0), sizeof(scalar_t), *device); split > 1) {
      const Tensor gradients =
          empty_sums({split, g.size(0), s.filters, s.kernel_h * s.kernel_w * s.group_channels()}, g);
      cuda::conv_gradients<scalar_t>(gradients.mutable_data_ptr<SumOf<scalar_t>>(), split,
                                     convolution<scalar_t>(s, x, g), *device);
      return total(squared_in_place(add_parts(gradients)), 2);
    }
    const int64_t parts = cuda::filter_parts(s, g.size(0), *device);
    const Tensor sums = empty_sums({parts, g.size(0), s.filters}, g);
    cuda::conv_filter_sums<scalar_t>(sums.mutable_data_ptr<SumOf<scalar_t>>(), parts, convolution<scalar_t>(s, x, g),
                                     *device);
    return add_parts(sums);
  });
}

// The same arguments -> weighted sums [O, kh, kw, C / groups]
Tensor element_sums(const ConvGeometry& s, const Tensor& x, const Tensor& g, const Tensor& weight) {
  check_size("sq_conv_acc_", s, false);
  const OnDevice device(g, allows_tf32(g));
  const Tensor by = contiguous(weight);
  const Tensor sums = with_type("sq_conv_acc_", g.scalar_type(), [&]<class scalar_t>() -> Tensor {
    if (s.depthwise()) {
      const Tensor squares = squared_in_place(depthwise<scalar_t>(s, x, g, *device));
      return contiguous(transposed(total(product(squares, viewed(by, {-1, 1, 1})), 0)));
    }
    const int64_t parts = cuda::element_parts(s, g.size(0), *device);
    const Tensor sums = empty_sums({parts, s.filters, s.kernel_h * s.kernel_w * s.group_channels()}, g);
    cuda::conv_element_sums<scalar_t>(sums.mutable_data_ptr<SumOf<scalar_t>>(), parts,
                                      by.const_data_ptr<SumOf<scalar_t>>(), convolution<scalar_t>(s, x, g), *device);
    return add_parts(sums);
  });
  return viewed(sums, {s.filters, s.kernel_h, s.kernel_w, s.group_channels()});
}

Tensor sq_conv(const Tensor& x, const Tensor& g, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
               int64_t groups, const std::string& path) {
  check_path("sq_conv", path, {"explicit", "gram", "winograd"});  // "winograd" runs as "explicit"
  const ConvGeometry s = check_conv("sq_conv", x, g, kernel, stride, padding, dilation, groups);
  if (g.numel() == 0 || x.numel() == 0) return zero_sums({g.size(0), g.size(1)}, g);
  if (path == "gram") return filter_sums(s, pixels_first(x), pixels_first(g), true);
  ConvGeometry padded = s;
  const Tensor pixels = whole_pixels(padded, pixels_first(x));
  return filter_sums(padded, pixels, pixels_first(g), false);
}

void sq_conv_acc_(const Tensor& out, const Tensor& x, const Tensor& g, const Tensor& weight, Sizes stride,
                  Sizes padding, Sizes dilation, int64_t groups, const std::string& path) {
  const ConvGeometry s = check_conv_acc(out, x, g, weight, stride, padding, dilation, groups, path);
  if (g.numel() == 0 || x.numel() == 0) return;
  ConvGeometry padded = s;
  const Tensor pixels = whole_pixels(padded, pixels_first(x));
  const Tensor sums = element_sums(padded, pixels, pixels_first(g), weight);
  add_to(out, permuted(narrowed(sums, 3, 0, out.size(1)), {0, 3, 1, 2}));
}

Tensor conv_gram(const Tensor& x, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const ConvGeometry s = check_conv("conv_gram", x, groups, kernel, stride, padding, dilation, groups);
  check_size("conv_gram", s, true);
  if (x.numel() == 0) return zero_sums({x.size(0), groups, s.positions(), s.positions()}, x);
  const OnDevice device(x, allows_tf32(x));
  return with_type("conv_gram", x.scalar_type(), [&]<class scalar_t>() {
    const Tensor gram = grams<scalar_t, SumOf<scalar_t>>(s, pixels_first(x), 1, s.positions(), true, *device);
    return selected(gram, 2, 0);
  });
}

Tensor sq_gram(const Tensor& gram, const Tensor& g) {
  check_forms(gram, g);
  if (g.numel() == 0) return zero_sums({g.size(0), g.size(1)}, g);
  const OnDevice device(g, allows_tf32(g));
  const Tensor grams = contiguous(gram), cotangents = pixels_first(g);
  return with_type("sq_gram", g.scalar_type(), [&]<class scalar_t>() {
    return selected(forms<scalar_t>(split<scalar_t>(grams, *device), cotangents, false, *device), 0, 0);
  });
}

// For a single token, the square of the outer product is the outer product of the squares.
Tensor square_of_token(const Tensor& t) { return squared(converted(selected(t, 1, 0), sum_type(t))); }

Tensor sq_outer(const Tensor& x, const Tensor& g, const std::string& path) {
  check_path("sq_outer", path, {"explicit", "gram"});
  check_outer("sq_outer", x, g);
  if (g.numel() == 0 || x.numel() == 0) return zero_sums({g.size(0), g.size(2)}, g);
  if (x.size(1) == 1) {
    const Tensor norms = total(square_of_token(x), 1, /*keep_axis=*/true);
    return by_row(product(by_cotangent(square_of_token(g), x.size(0)), norms));
  }
  return filter_sums(tokenwise(x, g), tokens_first(x), tokens_first(g), path == "gram");
}

// The squares of the gradients of the weight, by quadratic forms, and then of those of the bias: [2, M, O].
Tensor sq_linear(const Tensor& x, const Tensor& g, const std::optional<Tensor>& gram) {
  check_outer("sq_linear", x, g);
  if (gram) check_forms(*gram, permuted(inserted(g, 2), {0, 3, 2, 1}));
  if (g.numel() == 0 || x.numel() == 0) return zero_sums({2, g.size(0), g.size(2)}, g);
  const ConvGeometry s = tokenwise(x, g);
  check_size("sq_linear", s, true);
  const OnDevice device(g, allows_tf32(g));
  const Tensor cotangents = tokens_first(g);
  const Tensor sums = with_type("sq_linear", g.scalar_type(), [&]<class scalar_t>() -> Tensor {
    if (gram) return forms<scalar_t>(split<scalar_t>(contiguous(*gram), *device), cotangents, true, *device);
    return gram_sums<scalar_t>(s, tokens_first(x), cotangents, true, *device);
  });
  squared_in_place(selected(sums, 0, 1));
  return sums;
}

void sq_outer_acc_(const Tensor& out, const Tensor& x, const Tensor& g, const Tensor& weight) {
  check_outer("sq_outer_acc_", x, g);
  check_accumulator("sq_outer_acc_", out, {g.size(2), x.size(2)}, g, weight);
  if (g.numel() == 0 || x.numel() == 0) return;
  if (x.size(1) == 1) {
    const Tensor weighted = total(by_cotangent(product(square_of_token(g), inserted(weight, 1)), x.size(0)), 0);
    add_to(out, torch::stable::matmul(transposed(weighted), square_of_token(x)));
    return;
  }
  const Tensor sums = element_sums(tokenwise(x, g), tokens_first(x), tokens_first(g), weight);
  add_to(out, viewed(sums, out.sizes()));
}

template <class T>
cuda::Tokens<T> tokens(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->const_data_ptr<T>(), t->stride(0), t->stride(1), t->stride(2)};
}

// The squares of the sums over positions: [M, C] for the products with x, if there is one, and then for g alone.
Tensor product_sums(const char* op, const Tensor& g, const std::optional<Tensor>& x, const std::optional<Tensor>& shift,
                    const std::optional<Tensor>& scale, bool plain) {
  check_prod(op, g, x, shift, scale);
  const int64_t kinds = x && plain ? 2 : 1, rows = g.size(0), channels = g.size(2);
  if (g.numel() == 0) return zero_sums({kinds, rows, channels}, g);
  const OnDevice device(g);
  const auto broadcast = [&](const std::optional<Tensor>& t) -> std::optional<Tensor> {
    if (!t) return std::nullopt;
    return call("aten::expand", "", converted(*t, sum_type(g)), x->sizes(), false);
  };
  const std::optional<Tensor> by = broadcast(shift), times = broadcast(scale);
  const Tensor q = empty_sums({kinds, rows, channels}, g);
  with_type("sq_prod", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    const cuda::Products<scalar_t> sums{tokens<scalar_t>(g),
                                        tokens<scalar_t>(x),
                                        tokens<T>(by),
                                        tokens<T>(times),
                                        g.size(1),
                                        channels,
                                        x ? x->size(0) : rows,
                                        rows,
                                        plain};
    const int64_t parts = cuda::product_parts(sums, *device);
    const Tensor partial = empty_sums({parts == 1 ? 0 : parts, kinds, rows, channels}, g);
    cuda::products(q.mutable_data_ptr<T>(), partial.mutable_data_ptr<T>(), sums, *device);
  });
  return q;
}

Tensor sq_prod(const Tensor& g, const std::optional<Tensor>& x, const std::optional<Tensor>& shift,
               const std::optional<Tensor>& scale) {
  return selected(product_sums("sq_prod", g, x, shift, scale, !x), 0, 0);
}

Tensor sq_norm(const Tensor& g, const Tensor& x, const std::optional<Tensor>& shift,
               const std::optional<Tensor>& scale) {
  return product_sums("sq_norm", g, x, shift, scale, true);
}

void sq_prod_acc_(const Tensor& out, const Tensor& g, const Tensor& weight, const std::optional<Tensor>& x,
                  const std::optional<Tensor>& shift, const std::optional<Tensor>& scale) {
  const Tensor q = sq_prod(g, x, shift, scale);
  check_accumulator("sq_prod_acc_", out, {g.size(2)}, g, weight);
  if (g.numel() == 0) return;
  const OnDevice device(g);
  const Tensor by = contiguous(weight);
  with_type("sq_prod_acc_", out.scalar_type(), [&]<class scalar_t>() {
    if constexpr (std::is_same_v<scalar_t, SumOf<scalar_t>>)
      cuda::add_weighted(out.mutable_data_ptr<scalar_t>(), q.const_data_ptr<scalar_t>(), by.const_data_ptr<scalar_t>(),
                         q.size(0), q.size(1), *device);
  });
}

// A number on the tensor's device.
Tensor whole_number(int64_t value, const Tensor& like) {
  return torch::stable::fill_(empty_like(like, {}, ScalarType::Long), static_cast<double>(value));
}

// Sorts the look-ups of a table and calls use(lookups).
template <class Use>
void with_lookups(const char* op, const Tensor& index, const Tensor& g, int64_t num_rows, const Use& use) {
  T2V_CHECK_VALUE(index.numel() <= INT32_MAX && g.size(0) <= INT32_MAX, op, ": ", index.sizes(),
                  " look-ups are too many for one call");
  const std::string wrong = text(op, ": index out of range for a table of ", num_rows, " rows");
  const Tensor inside = call("aten::lt", "Tensor", torch::stable::amax(index, {0, 1}), whole_number(num_rows, index));
  // The device raises this error, and torch reports it at the next synchronisation.
  StableIValue assertion[] = {passed(inside), passed(wrong)};
  if (!dispatch("aten::_assert_async", "msg", assertion)) throw std::runtime_error(wrong);
  StableIValue sorted[] = {passed(call("aten::reshape", "", index, Sizes{-1})), passed(std::optional(true)),
                           passed(int64_t{0}), passed(false)};
  if (!dispatch("aten::sort", "stable", sorted))
    throw std::runtime_error(text(op, ": the sort failed: ", last_error()));
  const Tensor row = torch::stable::detail::to<torch::stable::Tensor>(sorted[0]);
  const Tensor place = torch::stable::detail::to<torch::stable::Tensor>(sorted[1]);
  const auto number = [](int64_t size) { return static_cast<int>(size); };
  use(cuda::Lookups{row.const_data_ptr<int64_t>(), place.const_data_ptr<int64_t>(), number(index.numel()),
                    number(index.size(1)), number(index.size(0)), number(g.size(0))});
}

Tensor sq_scatter(const Tensor& index, const Tensor& g, int64_t num_rows) {
  check_scatter("sq_scatter", index, g, num_rows);
  const Tensor q = zero_sums({g.size(0), num_rows}, g);
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

void sq_scatter_acc_(const Tensor& out, const Tensor& index, const Tensor& g, const Tensor& weight) {
  T2V_CHECK_VALUE(out.dim() == 2, "sq_scatter_acc_: out must be [V, O], got ", out.sizes());
  check_scatter("sq_scatter_acc_", index, g, out.size(0));
  check_accumulator("sq_scatter_acc_", out, {out.size(0), g.size(2)}, g, weight);
  if (g.numel() == 0) return;
  const OnDevice device(g);
  const Tensor by = contiguous(weight);
  with_lookups("sq_scatter_acc_", index, g, out.size(0), [&](const cuda::Lookups& lookups) {
    with_type("sq_scatter_acc_", g.scalar_type(), [&]<class scalar_t>() {
      using T = SumOf<scalar_t>;
      cuda::scatter_element_sums<scalar_t>(out.mutable_data_ptr<T>(), lookups, tokens<scalar_t>(g),
                                           by.const_data_ptr<T>(), g.size(2), *device);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(T2V_LIBRARY, T2V_KEY, m) {
  T2V_IMPL(conv_gram);
  T2V_IMPL(sq_conv);
  T2V_IMPL(sq_conv_acc_);
  T2V_IMPL(sq_gram);
  T2V_IMPL(sq_linear);
  T2V_IMPL(sq_norm);
  T2V_IMPL(sq_outer);
  T2V_IMPL(sq_outer_acc_);
  T2V_IMPL(sq_prod);
  T2V_IMPL(sq_prod_acc_);
  T2V_IMPL(sq_scatter);
  T2V_IMPL(sq_scatter_acc_);
}

}  // namespace
}  // namespace t2v
