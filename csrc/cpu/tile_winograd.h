// Winograd's transforms, products and squares for one instruction set. Included by tile.cpp only.
#pragma once

#include "vector.h"

namespace t2v {
namespace T2V_ISA {
namespace {

// Winograd's F(3x3, 4x4) (Lavin and Gray, 2016) computes a 3x3 gradient over 4x4 positions from 36 products instead of
// 144. F(4x4, 3x3) computes 4x4 outputs of a 3x3 kernel; filter and output exchange their roles. Both use the points 0,
// 2/3, -2/3, 3/2, -3/2 and infinity. The usual points with 1 and 2 would double the error of rounded operands.
constexpr double near = 2. / 3, far = 3. / 2, near2 = near * near, far2 = far * far;
static_assert(near * far == 1);  // so the first and last row of transform_input need no factors

template <class T>
inline void transform_input(const V<T>* d, int step, V<T>* to, int to_step) {  // 6 to 6
  const V<T> d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const V<T> a = d4 - T(far2) * d2, b = d3 - T(far2) * d1, c = d4 - T(near2) * d2, e = d3 - T(near2) * d1;
  to[0] = d0 - T(near2 + far2) * d2 + d4;
  to[to_step] = a + T(near) * b;
  to[2 * to_step] = a - T(near) * b;
  to[3 * to_step] = c + T(far) * e;
  to[4 * to_step] = c - T(far) * e;
  to[5 * to_step] = d1 - T(near2 + far2) * d3 + d5;
}

// Evaluates a kernel of 3 values or a cotangent of 4 at the points.
template <class T, int N>
inline void transform_points(const V<T>* d, int step, V<T>* to, int to_step) {  // N to 6
  constexpr double by_near = 1 / (2 * near2 * (near2 - far2)), by_far = 1 / (2 * far2 * (far2 - near2));
  const V<T> d0 = d[0], d1 = d[step], d2 = d[2 * step];
  V<T> b = d1, e = d1;
  if constexpr (N == 4) {
    b += T(near2) * d[3 * step];
    e += T(far2) * d[3 * step];
  }
  const V<T> a = T(by_near) * (d0 + T(near2) * d2), c = T(by_far) * (d0 + T(far2) * d2);
  to[0] = d0;
  to[to_step] = a + T(by_near * near) * b;
  to[2 * to_step] = a - T(by_near * near) * b;
  to[3 * to_step] = c + T(by_far * far) * e;
  to[4 * to_step] = c - T(by_far * far) * e;
  to[5 * to_step] = d[(N - 1) * step];
}

// Computes a gradient of 3 values or an output of 4 from the products at the points.
template <class T, int N>
inline void transform_output(const V<T>* d, int step, V<T>* to, int to_step) {  // 6 to N
  const V<T> a = d[step] + d[2 * step], b = d[step] - d[2 * step];
  const V<T> c = d[3 * step] + d[4 * step], e = d[3 * step] - d[4 * step];
  to[0] = d[0] + a + c;
  to[to_step] = T(near) * b + T(far) * e;
  if constexpr (N == 3) {
    to[2 * to_step] = d[5 * step] + T(near2) * a + T(far2) * c;
  } else {
    to[2 * to_step] = T(near2) * a + T(far2) * c;
    to[3 * to_step] = d[5 * step] + T(near2 * near) * b + T(far2 * far) * e;
  }
}

template <class T>
using Transform = void (*)(const V<T>*, int, V<T>*, int);

// Transforms d [From][From] along both axes to out [To][To].
template <class T, int From, int To, Transform<T> Along>
inline void transform_square(const V<T>* d, V<T>* out) {
  V<T> half[To * From];
  for (int x = 0; x < From; ++x) Along(d + x, From, half + x, From);
  for (int y = 0; y < To; ++y) Along(half + y * From, 1, out + y * To, 1);
}

// from may be bfloat16.
template <class T, class S, int From, Transform<T> Along>
void winograd_transform(T* to, int64_t to_stride, const S* from, int64_t row, int64_t pixel, int64_t channels) {
  for (int64_t c = 0; c < channels; c += Vector<T>::width) {
    V<T> d[From * From], out[36];
    for (int y = 0; y < From; ++y)
      for (int x = 0; x < From; ++x) d[y * From + x] = load_as<T>(from + c + y * row + x * pixel);
    transform_square<T, From, 6, Along>(d, out);
    for (int f = 0; f < 36; ++f) store(to + f * to_stride + c, out[f]);
  }
}

template <class T, class S>
T winograd_input(T* to, int64_t to_stride, const S* from, int64_t row, int64_t pixel, int64_t channels) {
  winograd_transform<T, S, 6, transform_input<T>>(to, to_stride, from, row, pixel, channels);
  return 1;
}

// Transformed values in fixed point. After the transform along one axis, a value at one frequency of the other axis is
// at most the norm of a column of that intermediate result times the norm of a row of the transform. The unit is chosen
// from the intermediate result with these bounds for the norms of the six rows of transform_input and transform_points.
constexpr float input_norms[] = {3.05f, 2.96f, 2.96f, 1.98f, 1.98f, 3.05f};
constexpr float kernel_norms[] = {1, 0.80f, 0.80f, 0.36f, 0.36f, 1};
constexpr float largest_fixed = 32767;
constexpr double square(double a) { return a * a; }
static_assert(square(input_norms[0]) > 2 + square(near2 + far2));
static_assert(square(input_norms[1]) > (1 + square(far2)) * (1 + near2));
static_assert(square(input_norms[3]) > (1 + square(near2)) * (1 + far2));
static_assert(square(kernel_norms[1]) > (1 + near2 + square(near2)) / square(2 * near2 * (near2 - far2)));
static_assert(square(kernel_norms[3]) > (1 + far2 + square(far2)) / square(2 * far2 * (far2 - near2)));

inline float input_norm(int f) { return input_norms[f / 6] * input_norms[f % 6]; }
inline float kernel_norm(int f) { return kernel_norms[f / 6] * kernel_norms[f % 6]; }

#ifdef __AVX512BF16__
inline void store_fixed(int16_t* p, V<float> v) {
  const __m256i values = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)v));
  std::memcpy(p, &values, sizeof(values));
}

// Whether squares may have left the range of a float.
inline bool out_of_range(float norm2) { return !(norm2 > 1e-30f && norm2 < 1e30f); }

// Adds to sums[f] the squares of the From x From values value(y, x) after the transform along one axis.
template <int From, Transform<float> Along, class Value>
inline void add_squares(V<float>* sums, const Value& value) {
  for (int x = 0; x < From; ++x) {
    V<float> d[From], half[6];
    for (int y = 0; y < From; ++y) d[y] = value(y, x);
    Along(d, 1, half, 1);
    for (int f = 0; f < 6; ++f) sums[f] += half[f] * half[f];
  }
}

// Transforms 6x6 pixels times `by` along one axis, and returns the largest sum of squares over `fixed_operands`
// operands of channels, divided by the square of the row's norm.
inline float largest_norm2(const uint16_t* from, int64_t row, int64_t pixel, int64_t channels, float by) {
  constexpr int width = Vector<float>::width;
  float largest = 0;
  for (int64_t first = 0; first < channels; first += 2 * fixed_operands) {
    V<float> sums[6] = {};
    for (int64_t c = first; c < channels && c < first + 2 * fixed_operands; c += width)
      add_squares<6, transform_input<float>>(
          sums, [=](int y, int x) { return load_as<float>(from + c + y * row + x * pixel) * by; });
    for (int f = 0; f < 6; ++f) {
      const float norm2 = total<float>(sums[f]) / (input_norms[f] * input_norms[f]);
      if (!(norm2 <= largest)) largest = norm2;  // NaN stays
    }
  }
  return largest;
}

// One over the largest of 6x6 pixels: NaN if that pixel is infinite, NaN or close to overflow, and zero if all pixels
// are negligible.
inline float one_over_largest(const uint16_t* from, int64_t row, int64_t pixel, int64_t channels) {
  uint16_t largest = 0;
  for (int y = 0; y < 6; ++y)
    for (int x = 0; x < 6; ++x)
      for (int64_t c = 0; c < channels; ++c) {
        const uint16_t size = from[c + y * row + x * pixel] & 0x7fff;
        largest = size > largest ? size : largest;
      }
  const uint32_t bits = static_cast<uint32_t>(largest) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  if (!(value < 1e30f)) return __builtin_nanf("");
  return value < 1e-30f ? 0 : 1 / value;
}

float winograd_fixed_input(int16_t* to, int64_t to_stride, const uint16_t* from, int64_t row, int64_t pixel,
                           int64_t channels) {
  constexpr int width = Vector<float>::width;
  float by = 1, norm2 = largest_norm2(from, row, pixel, channels, by);
  if (out_of_range(norm2)) {
    by = one_over_largest(from, row, pixel, channels);
    norm2 = largest_norm2(from, row, pixel, channels, by);
  }
  const float norm = __builtin_sqrtf(norm2) / largest_fixed, scale = norm > 0 ? by / norm : norm;
  V<float> scales[36];
  for (int f = 0; f < 36; ++f) scales[f] = V<float>{} + scale / input_norm(f);
  for (int64_t c = 0; c < channels; c += width) {
    V<float> d[36], out[36];
    for (int y = 0; y < 6; ++y)
      for (int x = 0; x < 6; ++x) d[y * 6 + x] = load_as<float>(from + c + y * row + x * pixel);
    transform_square<float, 6, 6, transform_input<float>>(d, out);
    for (int f = 0; f < 36; ++f) store_fixed(to + f * to_stride + c, out[f] * scales[f]);
  }
  return norm > 0 ? norm / by : norm;
}

// Each output channel has a unit of its own.
void winograd_fixed_kernel(Fixed* to, int64_t to_stride, float* units, const float* from, int64_t channels) {
  constexpr int width = Vector<float>::width, block = 2 * width;
  const int64_t tap = channels * block;
  for (int o = 0; o < block; o += width) {
    const auto largest_norm2 = [&](V<float> by) {
      V<float> largest{};
      for (int64_t first = 0; first < channels; first += 2 * fixed_operands) {
        V<float> sums[6] = {};
        for (int64_t c = first; c < channels && c < first + 2 * fixed_operands; ++c)
          add_squares<3, transform_points<float, 3>>(
              sums, [=](int y, int x) { return load(from + (3 * y + x) * tap + c * block + o) * by; });
        for (int f = 0; f < 6; ++f) {
          const V<float> norm2 = sums[f] / (kernel_norms[f] * kernel_norms[f]);
          largest = norm2 <= largest ? largest : norm2;
        }
      }
      return largest;
    };
    V<float> by = V<float>{} + 1, norm2 = largest_norm2(by);
    bool out = false;
    for (int i = 0; i < width; ++i) out |= out_of_range(norm2[i]);
    if (out) {
      V<float> largest{};
      for (int64_t at = o; at < 9 * tap; at += block) {
        const V<float> w = load(from + at), size = w < 0 ? -w : w;
        largest = size <= largest ? largest : size;
      }
      by = largest < 1e-30f ? V<float>{} : 1 / largest;
      norm2 = largest_norm2(by);
    }
    const V<float> norm = (V<float>)_mm512_sqrt_ps((__m512)norm2) / largest_fixed;
    const V<float> scale = norm > 0 ? by / norm : norm;
    store(units + o, norm > 0 ? norm / by : norm);
    for (int64_t c = 0; c < channels; c += 2) {
      V<float> d[9], out[2][36];
      for (int second = 0; second < 2; ++second) {
        for (int k = 0; k < 9; ++k) d[k] = load(from + k * tap + (c + second) * block + o) * scale;
        transform_square<float, 3, 6, transform_points<float, 3>>(d, out[second]);
      }
      for (int f = 0; f < 36; ++f) {
        const float factor = 1 / kernel_norm(f);
        const __m512i low = _mm512_cvtps_epi32((__m512)(out[0][f] * factor));
        const __m512i high = _mm512_cvtps_epi32((__m512)(out[1][f] * factor));
        const __m512i pair =
            _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16));
        std::memcpy(to + f * to_stride + c / 2 * block + o, &pair, sizeof(pair));
      }
    }
  }
}
#endif

template <class T>
void winograd_kernel(T* to, int64_t to_stride, T*, const T* from, int64_t channels) {
  const int64_t block = 2 * Vector<T>::width, tap = channels * block;
  winograd_transform<T, T, 3, transform_points<T, 3>>(to, to_stride, from, 3 * tap, tap, tap);
}

// Multiplies MR rows and two vectors of columns at the 36 points, to products[36][MR][2 * width]. a and b hold the
// operands point by point.
template <class T, int MR, class E>
inline void winograd_products(T* products, const E* a, int64_t a_plane, const Rows& rows, const E* b, int64_t b_plane,
                              int64_t column) {
  constexpr int block = 2 * Vector<T>::width;
  for (int f = 0; f < 36; ++f, products += MR * block)
    if constexpr (std::is_same_v<E, Fixed>)
      for (int64_t k = 0; k < rows.inner; k += fixed_operands) {
        Rows some = rows;
        some.inner = rows.inner - k < fixed_operands ? rows.inner - k : fixed_operands;
        tile<T, MR, 2>(a + f * a_plane + k * rows.a_stride, some, b + f * b_plane + k * rows.inner_stride, column,
                       column + block, [=](int i, int64_t at, int, typename Operand<E>::Sums sums) {
                         T* to = products + i * block + at - column;
                         const V<T> values = __builtin_convertvector(sums, V<T>);
                         store(to, k ? load(to) + values : values);
                       });
      }
    else
      tile<T, MR, 2>(a + f * a_plane, rows, b + f * b_plane, column, column + block,
                     [=](int i, int64_t at, int, V<T> sums) { store(products + i * block + at - column, sums); });
}

// Transforms one vector of a row of the products to out [N][N].
template <class T, int MR, int N, class E = T>
inline void winograd_output(V<T>* out, const T* products, int row, int vector) {
  constexpr int width = Vector<T>::width;
  V<T> d[36];
  for (int f = 0; f < 36; ++f) {
    d[f] = load(products + ((f * MR + row) * 2 + vector) * width);
    if constexpr (std::is_same_v<E, Fixed>) d[f] *= input_norm(f) * kernel_norm(f);
  }
  transform_square<T, 6, N, transform_output<T, N>>(d, out);
}

template <class S, class T, class E, int MR = max_height>
void winograd_outputs(const OutputTile<S>* to, int64_t row, int64_t pixel, const E* x, int64_t x_stride,
                      int64_t x_pixel, const E* kernels, int64_t kernels_stride, int64_t operands, const T* x_units,
                      const T* kernel_units, const T* bias, int height, int64_t columns) {
  if (height != MR) {
    if constexpr (MR > 1)
      winograd_outputs<S, T, E, MR - 1>(to, row, pixel, x, x_stride, x_pixel, kernels, kernels_stride, operands,
                                        x_units, kernel_units, bias, height, columns);
    return;
  }
  constexpr int width = Vector<T>::width, block = 2 * width;
  // The output's cache lines are fetched while the products are computed.
  for (int i = 0; i < MR; ++i)
    for (int y = 0; y < to[i].high; ++y)
      for (int c = 0; c < to[i].wide; ++c)
        for (int64_t at = 0; at < columns; at += 64 / static_cast<int64_t>(sizeof(S)))
          __builtin_prefetch(to[i].to + y * row + c * pixel + at, 1);
  T products[36 * MR * block];
  winograd_products<T, MR>(products, x, x_stride, {1, operands, 0, block, 1, x_pixel}, kernels, kernels_stride, 0);
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < 2; ++v) {
      const int64_t at = v * width, left = columns - at;
      if (left <= 0) continue;
      V<T> out[16];
      winograd_output<T, MR, 4, E>(out, products, i, v);
      const V<T> added = load(bias + at);
      if constexpr (std::is_same_v<E, Fixed>)
        for (V<T>& value : out) value *= load(kernel_units + at) * x_units[i];
      for (int y = 0; y < to[i].high; ++y)
        for (int c = 0; c < to[i].wide; ++c) {
          const V<T> value = out[y * 4 + c] + added;
          S* position = to[i].to + y * row + c * pixel + at;
          if (left >= width)
            store_as<T>(position, value);
          else
            store_as<T>(position, value, left);
        }
    }
}

// Hands the squares of each 3x3 gradient to the epilogue: (i, column, valid, squares[9]).
template <class T, int MR = max_height, class Epilogue>
void winograd(const Winograd<T>& w, int64_t first, int height, int64_t columns, const Epilogue& epilogue) {
  if (height != MR) {
    if constexpr (MR > 1) winograd<T, MR - 1>(w, first, height, columns, epilogue);
    return;
  }
  constexpr int width = Vector<T>::width, block = 2 * width;
  T products[36 * MR * block];
  for (int64_t column = 0; column < columns; column += block) {
    winograd_products<T, MR>(products, w.g + first, w.tiles * w.g_stride, {1, w.tiles, 0, w.x_stride, w.g_stride}, w.x,
                             w.tiles * w.x_stride, column);
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < 2; ++v) {
        const int64_t at = column + v * width, left = columns - at;
        if (left <= 0) continue;
        V<T> out[9];
        winograd_output<T, MR, 3>(out, products, i, v);
        for (int k = 0; k < 9; ++k) out[k] *= out[k];
        epilogue(i, at, left < width ? static_cast<int>(left) : width, out);
      }
  }
}

template <class T>
void winograd_sum(T* q, const Winograd<T>& operands, int64_t first, int height, int64_t columns) {
  winograd<T>(operands, first, height, columns, [q](int i, int64_t, int valid, const V<T>* squares) {
    V<T> sum = squares[0];
    for (int k = 1; k < 9; ++k) sum += squares[k];
    q[i] += total<T>(sum, valid);
  });
}

template <class T>
void winograd_add(T* out, int64_t ld, T weight, const Winograd<T>& operands, int64_t first, int height,
                  int64_t columns) {
  winograd<T>(operands, first, height, columns, [=](int i, int64_t column, int valid, const V<T>* squares) {
    for (int k = 0; k < 9; ++k)
      for (int c = 0; c < valid; ++c) out[i * ld + k * columns + column + c] += weight * squares[k][c];
  });
}

}  // namespace
}  // namespace T2V_ISA
}  // namespace t2v
