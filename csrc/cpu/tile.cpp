// Compiled once for each instruction set, with T2V_ISA naming it. Vectors are the compiler's own (vector_size), so that
// one text serves every width.
#include "tile.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#define T2V_BYTES 64
#elif defined(__AVX2__)
#define T2V_BYTES 32
#else
#define T2V_BYTES 16
#endif

namespace t2v {
namespace T2V_ISA {
namespace {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(T2V_BYTES)));
  static constexpr int width = T2V_BYTES / sizeof(T);
};
template <class T>
using V = typename Vector<T>::type;

template <class T>
inline V<T> load(const T* p) {
  V<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, V<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

typedef uint32_t Bits __attribute__((vector_size(T2V_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(T2V_BYTES / 2)));

// The upper halves are bfloat16 values: the nearest, of two the even one.
inline Bits rounded(V<float> v) {
  const Bits bits = (Bits)v;
  return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : Bits{} + 0x7fc00000;
}

// Values of another type, if need be bfloat16, as those of a vector.
template <class T, class S>
inline V<T> load_as(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    return load(p);
  } else {
    Halves halves;
    std::memcpy(&halves, p, sizeof(halves));
    return (V<T>)(__builtin_convertvector(halves, Bits) << 16);
  }
}

template <class T, class S>
inline void store_as(S* p, V<T> v, int64_t valid = Vector<T>::width) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(p, &v, valid * sizeof(T));
  } else {
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
    const Halves halves = __builtin_convertvector(rounded(v) >> 16, Halves);
#endif
    std::memcpy(p, &halves, valid * sizeof(S));
  }
}

// The sum of a vector, by halves.
template <class T, int Bytes = T2V_BYTES>
inline T whole_total(const void* v) {
  if constexpr (Bytes > 16) {
    typedef T Half __attribute__((vector_size(Bytes / 2)));
    Half low, high;
    std::memcpy(&low, v, sizeof(low));
    std::memcpy(&high, static_cast<const char*>(v) + sizeof(low), sizeof(high));
    const Half sum = low + high;
    return whole_total<T, Bytes / 2>(&sum);
  } else {
    T values[Bytes / sizeof(T)];
    std::memcpy(values, v, Bytes);
    if constexpr (sizeof(T) == 8) return values[0] + values[1];
    return (values[0] + values[1]) + (values[2] + values[3]);
  }
}

template <class T>
inline T total(V<T> v, int valid = Vector<T>::width) {
  if (valid == Vector<T>::width) return whole_total<T>(&v);
  T sum = 0;
  for (int k = 0; k < valid; ++k) sum += v[k];
  return sum;
}

// How a tile takes its operands: one value, or a pair, at a time.
template <class E>
struct Operand {
  typedef V<E> Values;
  typedef V<E> Sums;
  static V<E> multiply_add(V<E> sum, E a, Values b) { return sum + a * b; }
};

#ifdef __AVX512BF16__
template <>
struct Operand<Pair> {
  typedef int32_t Values __attribute__((vector_size(T2V_BYTES)));
  typedef V<float> Sums;
  // Denormal operands count as zero.
  static V<float> multiply_add(V<float> sum, Pair a, Values b) {
    int32_t bits;
    std::memcpy(&bits, &a, sizeof(bits));
    return (V<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
  }
};

template <>
struct Operand<Fixed> {
  typedef int32_t Values __attribute__((vector_size(T2V_BYTES)));
  typedef Values Sums;
  static Sums multiply_add(Sums sum, Fixed a, Values b) {
    int32_t bits;
    std::memcpy(&bits, &a, sizeof(bits));
    return (Sums)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(bits), (__m512i)b);
  }
};
#endif

// 32 registers of AVX-512 hold 12 x 2 sums, 2 columns and a broadcast; 16 of AVX2 hold 6 x 2.
constexpr int max_height = T2V_BYTES == 64 ? 12 : 6;

// Runs one tile of MR rows and NV vectors, and hands each row of sums to the epilogue.
template <class T, int MR, int NV, class E, class Epilogue>
inline void tile(const E* a, const Rows& rows, const E* b, int64_t column, int64_t columns, const Epilogue& epilogue) {
  constexpr int width = Vector<T>::width;
  typename Operand<E>::Sums sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = typename Operand<E>::Sums{};
  for (int64_t y = 0; y < rows.outer; ++y, a += rows.a_skip) {
    const E* p = b + y * rows.outer_stride + column;
    for (int64_t z = 0; z < rows.inner; ++z, p += rows.inner_stride, a += rows.a_stride) {
      typename Operand<E>::Values values[NV];
      for (int v = 0; v < NV; ++v) std::memcpy(&values[v], p + v * width, sizeof(values[v]));
      for (int i = 0; i < MR; ++i)
        for (int v = 0; v < NV; ++v) sums[i][v] = Operand<E>::multiply_add(sums[i][v], a[i * rows.a_column], values[v]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = column + v * width, left = columns - at;
      if (left > 0) epilogue(i, at, left < width ? static_cast<int>(left) : width, sums[i][v]);
    }
}

template <class T, int MR, class E, class Epilogue>
void all_columns(const E* a, const Rows& rows, const E* b, int64_t columns, const Epilogue& epilogue) {
  constexpr int width = Vector<T>::width;
  int64_t column = 0;
  for (; column + width < columns; column += 2 * width) tile<T, MR, 2>(a, rows, b, column, columns, epilogue);
  if (column < columns) tile<T, MR, 1>(a, rows, b, column, columns, epilogue);
}

// Turns the run-time height into the compile-time one.
template <class T, int MR = max_height, class E, class Epilogue>
void outer(int height, const E* a, const Rows& rows, const E* b, int64_t columns, const Epilogue& epilogue) {
  if (height == MR) return all_columns<T, MR>(a, rows, b, columns, epilogue);
  if constexpr (MR > 1) outer<T, MR - 1>(height, a, rows, b, columns, epilogue);
}

template <class T, class E = T>
void square_sum(T* q, const E* a, int height, Rows rows, const E* b, int64_t columns) {
  outer<T>(height, a, rows, b, columns,
           [q](int i, int64_t, int valid, V<T> sums) { q[i] += total<T>(sums * sums, valid); });
}

template <class T, class E = T>
void square_add(T* out, int64_t ld, T weight, const E* a, int height, Rows rows, const E* b, int64_t columns) {
  outer<T>(height, a, rows, b, columns, [=](int i, int64_t column, int valid, V<T> sums) {
    T* to = out + i * ld + column;
    const V<T> squares = weight * sums * sums;
    if (valid == Vector<T>::width) return store(to, load(to) + squares);
    for (int k = 0; k < valid; ++k) to[k] += squares[k];
  });
}

template <class T, class E = T>
void store_tile(T* out, int64_t ld, const E* a, int height, Rows rows, const E* b, int64_t columns) {
  outer<T>(height, a, rows, b, columns, [=](int i, int64_t column, int valid, V<T> sums) {
    T* to = out + i * ld + column;
    if (valid == Vector<T>::width) return store(to, sums);
    for (int k = 0; k < valid; ++k) to[k] = sums[k];
  });
}

template <class T>
void dot(T* q, const T* d, int64_t ld, const T* a, int height, Rows rows, const T* b, int64_t columns) {
  outer<T>(height, a, rows, b, columns, [=](int i, int64_t column, int valid, V<T> sums) {
    const T* by = d + i * ld + column;
    if (valid == Vector<T>::width) {
      q[i] += total<T>(sums * load(by));
    } else {
      for (int k = 0; k < valid; ++k) q[i] += sums[k] * by[k];
    }
  });
}

// Columns are the vectors: nothing is transposed, and no vector is mostly empty where positions are few.
template <class T, int NV>
inline void some_forms(T* q, const T* gram, int64_t positions, const T* d, int64_t stride) {
  constexpr int width = Vector<T>::width;
  V<T> sums[NV];
  for (int v = 0; v < NV; ++v) sums[v] = load(q + v * width);
  for (int64_t p = 0; p < positions; ++p, gram += positions, d += stride) {
    V<T> row[NV];
    for (int v = 0; v < NV; ++v) row[v] = gram[p] * load(d + v * width);
    const T* other = d + stride;
    for (int64_t r = p + 1; r < positions; ++r, other += stride)
      for (int v = 0; v < NV; ++v) row[v] += gram[r] * load(other + v * width);
    for (int v = 0; v < NV; ++v) sums[v] += row[v] * load(d + v * width);
  }
  for (int v = 0; v < NV; ++v) store(q + v * width, sums[v]);
}

template <class T>
void form(T* q, const T* gram, int64_t positions, const T* d, int64_t stride, int64_t columns) {
  constexpr int width = Vector<T>::width;
  int64_t c = 0;
  for (; c + 4 * width <= columns; c += 4 * width) some_forms<T, 4>(q + c, gram, positions, d + c, stride);
  for (; c + width <= columns; c += width) some_forms<T, 1>(q + c, gram, positions, d + c, stride);
  if (c == columns) return;
  // The last columns as a whole vector: every column is rounded alike, wherever a worker's share ends.
  T block[few_positions * width] = {}, sums[width] = {};
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t k = c; k < columns; ++k) block[p * width + k - c] = d[p * stride + k];
  std::memcpy(sums, q + c, (columns - c) * sizeof(T));
  some_forms<T, 1>(sums, gram, positions, block, width);
  std::memcpy(q + c, sums, (columns - c) * sizeof(T));
}

template <class T, int K>
void some_taps(T* r, int64_t ld, const T* a, const Rows& rows, const T* b, const int64_t* offsets, int64_t columns) {
  constexpr int width = Vector<T>::width;
  for (int64_t column = 0; column < columns; column += width) {
    V<T> sums[K];
    for (int k = 0; k < K; ++k) sums[k] = V<T>{};
    const T* from = a + column;
    for (int64_t y = 0; y < rows.outer; ++y) {
      const T* p = b + y * rows.outer_stride + column;
      for (int64_t z = 0; z < rows.inner; ++z, p += rows.inner_stride, from += rows.a_stride) {
        const V<T> value = load(from);
        for (int k = 0; k < K; ++k) sums[k] += value * load(p + offsets[k]);
      }
    }
    const int valid = columns - column < width ? static_cast<int>(columns - column) : width;
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < valid; ++c) r[k * ld + column + c] = sums[k][c];
  }
}

template <class T>
void taps(T* r, int64_t ld, const T* a, Rows rows, const T* b, const int64_t* offsets, int count, int64_t columns) {
  for (; count >= 5; count -= 5, offsets += 5, r += 5 * ld) some_taps<T, 5>(r, ld, a, rows, b, offsets, columns);
  for (; count >= 3; count -= 3, offsets += 3, r += 3 * ld) some_taps<T, 3>(r, ld, a, rows, b, offsets, columns);
  for (; count > 0; --count, ++offsets, r += ld) some_taps<T, 1>(r, ld, a, rows, b, offsets, columns);
}

// Winograd's F(3x3, 4x4) (Lavin and Gray, 2016): a 3x3 gradient over 4x4 positions from 36 products instead of 144; and
// F(4x4, 3x3): 4x4 outputs of a 3x3 kernel. The points are 0, 2/3, -2/3, 3/2, -3/2 and infinity in both, with the roles
// of filter and output exchanged. With the usual 1 and 2 rounded operands leave twice the error.
constexpr double near = 2. / 3, far = 3. / 2, near2 = near * near, far2 = far * far;
static_assert(near * far == 1);  // what spares transform_input the factors of its first and last row

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

// A kernel of 3 values or a cotangent of 4, at the points.
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

// A gradient of 3 values or an output of 4, from products at the points.
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

// d [From][From] along both axes to out [To][To]
template <class T, int From, int To, Transform<T> Along>
inline void transform_square(const V<T>* d, V<T>* out) {
  V<T> half[To * From];
  for (int x = 0; x < From; ++x) Along(d + x, From, half + x, From);
  for (int y = 0; y < To; ++y) Along(half + y * From, 1, out + y * To, 1);
}

// from may be bfloat16.
template <class T, class S, int From, Transform<T> Along>
T winograd_transform(T* to, int64_t to_stride, const S* from, int64_t row, int64_t pixel, int64_t channels) {
  for (int64_t c = 0; c < channels; c += Vector<T>::width) {
    V<T> d[From * From], out[36];
    for (int y = 0; y < From; ++y)
      for (int x = 0; x < From; ++x) d[y * From + x] = load_as<T>(from + c + y * row + x * pixel);
    transform_square<T, From, 6, Along>(d, out);
    for (int f = 0; f < 36; ++f) store(to + f * to_stride + c, out[f]);
  }
  return 1;
}

#ifdef __AVX512BF16__
// Transformed values in fixed point. A value of x at one frequency is at most the norm of a row of the transform times
// that of what the other axis' transform made of the patch: measured there, its largest quotient by the bounds below is
// the unit. They hold for the norms of the six rows of transform_input and of transform_points.
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

inline void store_fixed(int16_t* p, V<float> v) {
  const __m256i values = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)v));
  std::memcpy(p, &values, sizeof(values));
}

// Whether squares may have left what a float can hold.
inline bool out_of_range(float norm2) { return !(norm2 > 1e-30f && norm2 < 1e30f); }

// Of 6x6 pixels times `by`, transformed along one axis, the largest sum of squares over fixed_operands of channels,
// each over the square of its row's norm.
inline float largest_norm2(const uint16_t* from, int64_t row, int64_t pixel, int64_t channels, float by) {
  constexpr int width = Vector<float>::width;
  float largest = 0;
  for (int64_t first = 0; first < channels; first += 2 * fixed_operands) {
    V<float> sums[6] = {};
    for (int64_t c = first; c < channels && c < first + 2 * fixed_operands; c += width)
      for (int x = 0; x < 6; ++x) {
        V<float> d[6], half[6];
        for (int y = 0; y < 6; ++y) d[y] = load_as<float>(from + c + y * row + x * pixel) * by;
        transform_input<float>(d, 1, half, 1);
        for (int f = 0; f < 6; ++f) sums[f] += half[f] * half[f];
      }
    for (int f = 0; f < 6; ++f) {
      const float norm2 = total<float>(sums[f]) / (input_norms[f] * input_norms[f]);
      if (!(norm2 <= largest)) largest = norm2;  // NaN stays
    }
  }
  return largest;
}

// One over the largest of 6x6 pixels; NaN if that is not finite or close to it, and zero if all are next to nothing.
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
  if (!(value < 1e30f)) return NAN;
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
  const float norm = std::sqrt(norm2) / largest_fixed, scale = norm > 0 ? by / norm : norm;
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

// Each output has a unit of its own.
void winograd_fixed_kernel(Fixed* to, int64_t to_stride, float* units, const float* from, int64_t channels) {
  constexpr int width = Vector<float>::width, block = 2 * width;
  const int64_t tap = channels * block;
  for (int o = 0; o < block; o += width) {
    const auto largest_norm2 = [&](V<float> by) {
      V<float> largest{};
      for (int64_t first = 0; first < channels; first += 2 * fixed_operands) {
        V<float> sums[6] = {};
        for (int64_t c = first; c < channels && c < first + 2 * fixed_operands; ++c)
          for (int x = 0; x < 3; ++x) {
            V<float> d[3], half[6];
            for (int y = 0; y < 3; ++y) d[y] = load(from + (3 * y + x) * tap + c * block + o) * by;
            transform_points<float, 3>(d, 1, half, 1);
            for (int f = 0; f < 6; ++f) sums[f] += half[f] * half[f];
          }
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

// The products of MR rows and two vectors of columns at the 36 points, to products[36][MR][2 * width]; a and b hold the
// operands of one point after the other.
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

// One vector of a row of the products of operands E, transformed to out [N][N].
template <class T, int MR, int N, class E = T>
inline void winograd_output(V<T>* out, const T* products, int row, int vector) {
  constexpr int width = Vector<T>::width;
  V<T> d[36];
  for (int f = 0; f < 36; ++f) {
    d[f] = load(products + ((f * MR + row) * 2 + vector) * width);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<E, Fixed>) d[f] *= input_norm(f) * kernel_norm(f);
#endif
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
  // What is written comes into the cache while the products are computed.
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
      V<T> unit = V<T>{} + T(1);
      if constexpr (std::is_same_v<E, Fixed>) unit = load(kernel_units + at) * x_units[i];
      for (int y = 0; y < to[i].high; ++y)
        for (int c = 0; c < to[i].wide; ++c) {
          V<T> value = out[y * 4 + c];
          if constexpr (std::is_same_v<E, Fixed>) value *= unit;
          value += added;
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

// Blocks of width x width in registers, by exchanging halves, quarters, and so on of pairs of rows.
template <class T, int Step>
inline void exchange(V<T>* r) {
  constexpr int width = Vector<T>::width;
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  typedef Index Indices __attribute__((vector_size(T2V_BYTES)));
  Indices low, high;
  for (int k = 0; k < width; ++k) {
    low[k] = k & Step ? width + k - Step : k;
    high[k] = k & Step ? width + k : k + Step;
  }
  for (int i = 0; i < width; ++i)
    if (!(i & Step)) {
      const V<T> a = r[i], b = r[i + Step];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + Step] = __builtin_shuffle(a, b, high);
    }
  if constexpr (Step > 1) exchange<T, Step / 2>(r);
}

template <class T>
void transpose(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr int width = Vector<T>::width;
  if (rows < width || columns < width) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
    return;
  }
  // The last block of each axis ends where the axis does, and so may overlap the one before.
  for (int64_t r0 = 0; r0 < rows; r0 += width)
    for (int64_t c0 = 0; c0 < columns; c0 += width) {
      const int64_t r = r0 + width <= rows ? r0 : rows - width, c = c0 + width <= columns ? c0 : columns - width;
      V<T> block[width];
      for (int k = 0; k < width; ++k) block[k] = load(from + (r + k) * from_stride + c);
      exchange<T, width / 2>(block);
      for (int k = 0; k < width; ++k) store(to + (c + k) * to_stride + r, block[k]);
    }
}

// Four chains hide the latency of the additions.
template <class T, class Term>
inline T reduce(int64_t n, const Term& term) {
  constexpr int width = Vector<T>::width;
  V<T> sums[4] = {};
  int64_t s = 0;
  for (; s + 4 * width <= n; s += 4 * width)
    for (int k = 0; k < 4; ++k) sums[k] += term.vector(s + k * width);
  for (; s + width <= n; s += width) sums[0] += term.vector(s);
  T rest = 0;
  for (; s < n; ++s) rest += term.scalar(s);
  return total<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class T>
T shifted_dot(const T* g, const T* x, T shift, int64_t n) {
  struct {
    const T *g, *x;
    T shift;
    V<T> vector(int64_t s) const { return load(g + s) * (load(x + s) - shift); }
    T scalar(int64_t s) const { return g[s] * (x[s] - shift); }
  } term{g, x, shift};
  return reduce<T>(n, term);
}

template <class T>
T sum(const T* g, int64_t n) {
  struct {
    const T* g;
    V<T> vector(int64_t s) const { return load(g + s); }
    T scalar(int64_t s) const { return g[s]; }
  } term{g};
  return reduce<T>(n, term);
}

// Sums of the first `count` of NV vectors of channels from c: input(s, c) is what g is multiplied by at position s.
template <int NV, class T, class S, class Input>
inline void some_norm_sums(T* sums, T* plain, const S* g, int64_t g_stride, int64_t positions, int64_t c,
                           const Input& input) {
  constexpr int width = Vector<T>::width;
  V<T> products[NV], all[NV];
  for (int v = 0; v < NV; ++v) products[v] = all[v] = V<T>{};
  for (int64_t s = 0; s < positions; ++s)
    for (int v = 0; v < NV; ++v) {
      const V<T> value = load_as<T>(g + s * g_stride + c + v * width);
      all[v] += value;
      products[v] += value * input(s, c + v * width);
    }
  for (int v = 0; v < NV; ++v) {
    store(sums + c + v * width, products[v]);
    if (plain) store(plain + c + v * width, all[v]);
  }
}

// Of all channels; the last vector ends where they do, and so may overlap the one before.
template <class T, class S, class Input>
inline void norm_sums(T* sums, T* plain, const S* g, int64_t g_stride, int64_t positions, int64_t channels,
                      const Input& input) {
  constexpr int width = Vector<T>::width, some = T2V_BYTES == 64 ? 4 : 2;
  int64_t c = 0;
  for (; c + some * width <= channels; c += some * width)
    some_norm_sums<some>(sums, plain, g, g_stride, positions, c, input);
  for (; c + width <= channels; c += width) some_norm_sums<1>(sums, plain, g, g_stride, positions, c, input);
  if (c < channels) some_norm_sums<1>(sums, plain, g, g_stride, positions, channels - width, input);
}

template <class T, class S>
void sums_by_channel(T* sums, T* plain, const S* g, int64_t g_stride, const S* x, int64_t x_stride, const T* shift,
                     int64_t positions, int64_t channels) {
  if (x)
    norm_sums(sums, plain, g, g_stride, positions, channels,
              [=](int64_t s, int64_t c) { return load_as<T>(x + s * x_stride + c) - load(shift + c); });
  else
    norm_sums(sums, plain, g, g_stride, positions, channels, [](int64_t, int64_t) { return V<T>{} + T(1); });
}

template <class T, class S>
void sums_by_position(T* sums, T* plain, const S* g, int64_t g_stride, const S* x, int64_t x_stride, const T* shift,
                      int64_t shift_stride, const T* scale, int64_t scale_stride, int64_t positions, int64_t channels) {
  norm_sums(sums, plain, g, g_stride, positions, channels, [=](int64_t s, int64_t c) {
    return (load_as<T>(x + s * x_stride + c) - shift[s * shift_stride]) * scale[s * scale_stride];
  });
}

void interleave(Pair* to, const uint16_t* a, const uint16_t* b, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k] = {a[k], b[k]};
}

template <class S, class T>
constexpr WinogradSteps<S, T, T> winograd_steps() {
  return {winograd_transform<T, S, 6, transform_input<T>>, winograd_kernel<T>, winograd_outputs<S, T, T>};
}

// Fills in the kernels of bfloat16, and of its pairs where there are any.
constexpr Kernels<float> with_bfloat16(Kernels<float> table) {
  table.wide_winograd_steps = winograd_steps<uint16_t, float>();
  table.wide_norm_sums = {sums_by_channel<float, uint16_t>, sums_by_position<float, uint16_t>};
#ifdef __AVX512BF16__
  table.pair_square_sum = square_sum<float, Pair>;
  table.pair_square_add = square_add<float, Pair>;
  table.pair_store = store_tile<float, Pair>;
  table.fixed_winograd_steps = {winograd_fixed_input, winograd_fixed_kernel, winograd_outputs<uint16_t, float, Fixed>};
#endif
  return table;
}

}  // namespace

#define T2V_STRING_(text) #text
#define T2V_STRING(text) T2V_STRING_(text)

template <class T>
constexpr Kernels<T> make_table() {
  return {T2V_STRING(T2V_ISA),
          Vector<T>::width,
          max_height,
          square_sum<T>,
          square_add<T>,
          store_tile<T>,
          dot<T>,
          form<T>,
          winograd_transform<T, T, 6, transform_input<T>>,
          winograd_transform<T, T, 4, transform_points<T, 4>>,
          winograd_sum<T>,
          winograd_add<T>,
          winograd_steps<T, T>(),
          {},
          {},
          taps<T>,
          nullptr,
          nullptr,
          nullptr,
          interleave,
          transpose<T>,
          shifted_dot<T>,
          sum<T>,
          {sums_by_channel<T, T>, sums_by_position<T, T>},
          {}};
}

extern const Kernels<float> single_table;
extern const Kernels<double> double_table;
const Kernels<float> single_table = with_bfloat16(make_table<float>());
const Kernels<double> double_table = make_table<double>();

}  // namespace T2V_ISA
}  // namespace t2v
