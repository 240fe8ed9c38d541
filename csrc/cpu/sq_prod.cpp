// Squared per-example gradients of norm weights and of biases: one pass over the cotangent and the input.
#include "pack.h"

namespace t2v {
namespace {

// A shift or a scale of the input, broadcast to [N, S, C] by strides of zero; null if there is none.
template <class T>
struct Affine {
  const T* data = nullptr;
  int64_t strides[3] = {0, 0, 0};

  Affine() = default;
  Affine(const char* op, const View& t, const View& x) : data(t.const_data_ptr<T>()) {
    bool fits = t.dim() <= 3;
    for (int64_t axis = t.dim(), to = 3; fits && axis-- > 0;) {
      --to;
      fits = t.size(axis) == 1 || t.size(axis) == x.size(to);
      strides[to] = t.size(axis) == 1 ? 0 : t.stride(axis);
    }
    T2V_CHECK_VALUE(fits, op, ": a shift or scale is ", t.sizes(), ", expected what broadcasts to x ", x.sizes());
  }

  bool per_channel() const { return !data || (strides[0] == 0 && strides[1] == 0); }
  bool per_position() const { return !data || strides[2] == 0; }
  T at(int64_t n, int64_t s, int64_t c, T none) const {
    return data ? data[n * strides[0] + s * strides[1] + c * strides[2]] : none;
  }
};

template <class S>
class Product {
 public:
  using T = SumOf<S>;

  Product(const View& g, const View* x, const Affine<T>& shift, const Affine<T>& scale)
      : g_(g), x_(x), shift_(shift), scale_(scale), rows(g.size(0)), positions(g.size(1)), channels(g.size(2)) {}

  // sums[c] = sum_s g[m, s, c] (x[n, s, c] - shift) scale and, where `plain` is given, plain[c] = sum_s g[m, s, c]
  void gradient(T* sums, T* plain, int64_t m, int64_t n) const {
    const S* g = g_.const_data_ptr<S>() + m * g_.stride(0);
    const S* x = x_ ? x_->const_data_ptr<S>() + n * x_->stride(0) : nullptr;
    const bool simple = shift_.per_channel() && scale_.per_channel();
    if (simple && positions < few) return few_positions(sums, plain, g, x);
    if (simple && g_.stride(1) == 1 && (!x || x_->stride(1) == 1)) return along_positions(sums, plain, g, x);
    if (simple && g_.stride(2) == 1 && (!x || x_->stride(2) == 1)) return along_channels(sums, plain, g, x);
    if (x && shift_.per_position() && scale_.per_position() && g_.stride(2) == 1 && x_->stride(2) == 1)
      return normalised_channels(sums, plain, g, x, n);
    for (int64_t c = 0; c < channels; ++c) {
      T sum = 0, all = 0;
      for (int64_t s = 0; s < positions; ++s) {
        T value = static_cast<T>(g[s * g_.stride(1) + c * g_.stride(2)]);
        all += value;
        if (x)
          value *= (static_cast<T>(x[s * x_->stride(1) + c * x_->stride(2)]) - shift_.at(n, s, c, T(0))) *
                   scale_.at(n, s, c, T(1));
        sum += value;
      }
      sums[c] = sum;
      if (plain) plain[c] = all;
    }
  }

 private:
  static constexpr int64_t few = 16;
  static constexpr int64_t chunk = 1024;  // elements converted at a time, where the dtype is narrower than the sums

  // The values themselves, or a converted copy in `buffer`.
  static const T* widen(const S* from, int64_t count, T* buffer) {
    if constexpr (std::is_same_v<S, T>) return from;
    for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<T>(from[k]);
    return buffer;
  }

  // For too few positions to fill a vector: channels are the vectors where possible.
  void few_positions(T* sums, T* plain, const S* g, const S* x) const {
    const int64_t g_step = g_.stride(1), g_column = g_.stride(2), x_step = x ? x_->stride(1) : 0,
                  x_column = x ? x_->stride(2) : 0;
    if (g_column == 1 && (!x || x_column == 1)) return along_channels(sums, plain, g, x);
    for (int64_t c = 0; c < channels; ++c, g += g_column, x += x_column) {
      const T shift = shift_.at(0, 0, c, T(0));
      T sum = 0, all = 0;
      for (int64_t s = 0; s < positions; ++s) {
        const T value = static_cast<T>(g[s * g_step]);
        sum += x ? value * (static_cast<T>(x[s * x_step]) - shift) : value;
        all += value;
      }
      if (plain) plain[c] = all;
      sums[c] = sum * scale_.at(0, 0, c, T(1));
    }
  }

  void along_positions(T* sums, T* plain, const S* g, const S* x) const {
    T wide_g[chunk], wide_x[chunk];
    for (int64_t c = 0; c < channels; ++c) {
      const T shift = shift_.at(0, 0, c, T(0));
      T sum = 0, all = 0;
      for (int64_t s = 0; s < positions; s += chunk) {
        const int64_t count = std::min(chunk, positions - s);
        const T* some_g = widen(g + c * g_.stride(2) + s, count, wide_g);
        sum += x ? kernels<T>().shifted_dot(some_g, widen(x + c * x_->stride(2) + s, count, wide_x), shift, count)
                 : kernels<T>().sum(some_g, count);
        if (plain) all += kernels<T>().sum(some_g, count);  // these values are still in the cache
      }
      if (plain) plain[c] = all;
      sums[c] = sum * scale_.at(0, 0, c, T(1));
    }
  }

  // Calls run(sums, plain, g, g_stride, x, x_stride, channels) with rows of channels: in place, or as a widened copy
  // where channels fill no vector or the kernels lack the dtype.
  template <class Run>
  void in_rows(T* sums, T* plain, const S* g, const S* x, const Run& run) const {
    const int64_t wide = std::max<int64_t>(channels, kernels<T>().width), x_stride = x ? x_->stride(1) : 0;
    if constexpr (!std::is_same_v<S, Half>)
      if (wide == channels) return run(sums, plain, bits(g), g_.stride(1), bits(x), x_stride, channels);
    const Scratch<T> rows_of_g(positions * wide), rows_of_x(x ? positions * wide : 0), found(2 * wide);
    const auto copy = [&](T* to, const S* from, int64_t stride) {
      std::fill(to, to + positions * wide, T(0));
      pack_columns_last(to, wide, Positions<S>{from, 1, positions, 0, stride, 1}, channels);
    };
    copy(rows_of_g.get(), g, g_.stride(1));
    if (x) copy(rows_of_x.get(), x, x_stride);
    run(found.get(), plain ? found.get() + wide : nullptr, static_cast<const T*>(rows_of_g.get()), wide,
        static_cast<const T*>(x ? rows_of_x.get() : nullptr), wide, wide);
    std::copy_n(found.get(), channels, sums);
    if (plain) std::copy_n(found.get() + wide, channels, plain);
  }

  template <class E>
  static const NormSums<E, T>& norm_sums(const E*) {
    if constexpr (std::is_same_v<E, T>)
      return kernels<T>().norm_sums;
    else
      return kernels<T>().wide_norm_sums;
  }

  void along_channels(T* sums, T* plain, const S* g, const S* x) const {
    const Scratch<T> shift(std::max<int64_t>(channels, kernels<T>().width));
    std::fill(shift.get(), shift.get() + kernels<T>().width, T(0));
    for (int64_t c = 0; c < channels; ++c) shift.get()[c] = shift_.at(0, 0, c, T(0));
    in_rows(
        sums, plain, g, x,
        [&](T* to, T* all, const auto* rows_of_g, int64_t g_stride, auto rows_of_x, int64_t x_stride, int64_t count) {
          norm_sums(rows_of_g).by_channel(to, all, rows_of_g, g_stride, rows_of_x, x_stride, shift.get(), positions,
                                          count);
        });
    if (scale_.data)
      for (int64_t c = 0; c < channels; ++c) sums[c] *= scale_.at(0, 0, c, T(1));
  }

  // A shift and a scale for each position, as in a layer norm.
  void normalised_channels(T* sums, T* plain, const S* g, const S* x, int64_t n) const {
    const T none = 0, one = 1;
    const T* shift = shift_.data ? shift_.data + n * shift_.strides[0] : &none;
    const T* scale = scale_.data ? scale_.data + n * scale_.strides[0] : &one;
    in_rows(
        sums, plain, g, x,
        [&](T* to, T* all, const auto* rows_of_g, int64_t g_stride, auto rows_of_x, int64_t x_stride, int64_t count) {
          norm_sums(rows_of_g).by_position(to, all, rows_of_g, g_stride, rows_of_x, x_stride, shift, shift_.strides[1],
                                           scale, scale_.strides[1], positions, count);
        });
  }

  const View& g_;
  const View* x_;
  const Affine<T>&shift_, &scale_;

 public:
  const int64_t rows, positions, channels;
};

// q [M, C], or q [2, M, C] if `both`, where the second part is computed without x
Tensor products(const char* op, const Tensor& g, const std::optional<Tensor>& x, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& scale, bool both) {
  check_prod(op, g, x, shift, scale);
  const Tensor q = both ? zeros({2, g.size(0), g.size(2)}, sum_type(g)) : zeros({g.size(0), g.size(2)}, sum_type(g));
  if (g.numel() == 0) return q;
  const auto wide = [&](const std::optional<Tensor>& t) {
    return t ? std::optional(converted(*t, sum_type(g))) : std::nullopt;
  };
  const std::optional<Tensor> wide_shift = wide(shift), wide_scale = wide(scale);
  with_type("sq_prod", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    const Affine<T> by = wide_shift ? Affine<T>(op, *wide_shift, *x) : Affine<T>();
    const Affine<T> times = wide_scale ? Affine<T>(op, *wide_scale, *x) : Affine<T>();
    const Product<scalar_t> product(g, x ? &*x : nullptr, by, times);
    T* sums = q.mutable_data_ptr<T>();
    const int64_t examples = x ? x->size(0) : g.size(0), rows = product.rows, channels = product.channels;
    parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        T *row = sums + m * channels, *plain = both ? row + rows * channels : nullptr;
        product.gradient(row, plain, m, m % examples);
        for (int64_t c = 0; c < channels; ++c) row[c] *= row[c];
        if (plain)
          for (int64_t c = 0; c < channels; ++c) plain[c] *= plain[c];
      }
    });
  });
  return q;
}

// out [C] += sum_m weight[m] q[m, C]
template <class T>
void add_rows(const Tensor& out, const View& q, const View& weight) {
  const int64_t rows = q.size(0), channels = q.size(1);
  const T *from = q.const_data_ptr<T>(), *by = weight.const_data_ptr<T>();
  std::vector<double> sums(channels);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(by[m]) * from[m * channels + c];
  T* to = out.mutable_data_ptr<T>();
  for (int64_t c = 0; c < channels; ++c) to[c] += static_cast<T>(sums[c]);
}

Tensor sq_prod(const Tensor& g, const std::optional<Tensor>& x, const std::optional<Tensor>& shift,
               const std::optional<Tensor>& scale) {
  return products("sq_prod", g, x, shift, scale, false);
}

Tensor sq_norm(const Tensor& g, const Tensor& x, const std::optional<Tensor>& shift,
               const std::optional<Tensor>& scale) {
  return products("sq_norm", g, x, shift, scale, true);
}

void sq_prod_acc_(const Tensor& out, const Tensor& g, const Tensor& weight, const std::optional<Tensor>& x,
                  const std::optional<Tensor>& shift, const std::optional<Tensor>& scale) {
  check_prod("sq_prod_acc_", g, x, shift, scale);
  check_accumulator("sq_prod_acc_", out, {g.size(2)}, g, weight);
  const Tensor q = products("sq_prod_acc_", g, x, shift, scale, false), w = contiguous(weight);
  if (sum_type(g) == ScalarType::Double)
    add_rows<double>(out, q, w);
  else
    add_rows<float>(out, q, w);
}

STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  T2V_IMPL(sq_norm);
  T2V_IMPL(sq_prod);
  T2V_IMPL(sq_prod_acc_);
}

}  // namespace
}  // namespace t2v
