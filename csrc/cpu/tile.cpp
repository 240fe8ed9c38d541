// Compiled once for each instruction set, with T2V_ISA naming it. Vectors are the compiler's own (vector_size), so that
// one text serves every width.
#include "tile.h"

#include <cstring>

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

template <class T>
inline T total(V<T> v, int valid = Vector<T>::width) {
  T sum = 0;
  for (int k = 0; k < valid; ++k) sum += v[k];
  return sum;
}

// 32 registers of AVX-512 hold 12 x 2 sums, 2 columns and a broadcast; 16 of AVX2 hold 6 x 2.
constexpr int max_height = T2V_BYTES == 64 ? 12 : 6;

// Runs one tile of MR rows and NV vectors, and hands each row of sums to the epilogue.
template <class T, int MR, int NV, class Epilogue>
inline void tile(const T* a, const Rows& rows, const T* b, int64_t column, int64_t columns, const Epilogue& epilogue) {
  constexpr int width = Vector<T>::width;
  V<T> sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = V<T>{};
  for (int64_t y = 0; y < rows.outer; ++y) {
    const T* p = b + y * rows.outer_stride + column;
    for (int64_t z = 0; z < rows.inner; ++z, p += rows.inner_stride, a += MR) {
      V<T> values[NV];
      for (int v = 0; v < NV; ++v) values[v] = load(p + v * width);
      for (int i = 0; i < MR; ++i)
        for (int v = 0; v < NV; ++v) sums[i][v] += a[i] * values[v];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = column + v * width, left = columns - at;
      if (left > 0) epilogue(i, at, left < width ? static_cast<int>(left) : width, sums[i][v]);
    }
}

template <class T, int MR, class Epilogue>
void all_columns(const T* a, const Rows& rows, const T* b, int64_t columns, const Epilogue& epilogue) {
  constexpr int width = Vector<T>::width;
  int64_t column = 0;
  for (; column + width < columns; column += 2 * width) tile<T, MR, 2>(a, rows, b, column, columns, epilogue);
  if (column < columns) tile<T, MR, 1>(a, rows, b, column, columns, epilogue);
}

// Turns the run-time height into the compile-time one.
template <class T, int MR = max_height, class Epilogue>
void outer(int height, const T* a, const Rows& rows, const T* b, int64_t columns, const Epilogue& epilogue) {
  if (height == MR) return all_columns<T, MR>(a, rows, b, columns, epilogue);
  if constexpr (MR > 1) outer<T, MR - 1>(height, a, rows, b, columns, epilogue);
}

template <class T>
void square_sum(T* q, const T* a, int height, Rows rows, const T* b, int64_t columns) {
  outer(height, a, rows, b, columns,
        [q](int i, int64_t, int valid, V<T> sums) { q[i] += total<T>(sums * sums, valid); });
}

template <class T>
void square_add(T* out, int64_t ld, T weight, const T* a, int height, Rows rows, const T* b, int64_t columns) {
  outer(height, a, rows, b, columns, [=](int i, int64_t column, int valid, V<T> sums) {
    T* to = out + i * ld + column;
    const V<T> squares = weight * sums * sums;
    if (valid == Vector<T>::width) return store(to, load(to) + squares);
    for (int k = 0; k < valid; ++k) to[k] += squares[k];
  });
}

template <class T>
void store_tile(T* out, int64_t ld, const T* a, int height, Rows rows, const T* b, int64_t columns) {
  outer(height, a, rows, b, columns, [=](int i, int64_t column, int valid, V<T> sums) {
    T* to = out + i * ld + column;
    if (valid == Vector<T>::width) return store(to, sums);
    for (int k = 0; k < valid; ++k) to[k] = sums[k];
  });
}

template <class T>
void dot(T* q, const T* d, int64_t ld, const T* a, int height, Rows rows, const T* b, int64_t columns) {
  outer(height, a, rows, b, columns, [=](int i, int64_t column, int valid, V<T> sums) {
    const T* by = d + i * ld + column;
    if (valid == Vector<T>::width) {
      q[i] += total<T>(sums * load(by));
    } else {
      for (int k = 0; k < valid; ++k) q[i] += sums[k] * by[k];
    }
  });
}

template <class T, int K>
void some_taps(T* r, int64_t ld, const T* a, int64_t a_stride, const Rows& rows, const T* b, const int64_t* offsets,
               int64_t columns) {
  constexpr int width = Vector<T>::width;
  for (int64_t column = 0; column < columns; column += width) {
    V<T> sums[K];
    for (int k = 0; k < K; ++k) sums[k] = V<T>{};
    const T* from = a + column;
    for (int64_t y = 0; y < rows.outer; ++y) {
      const T* p = b + y * rows.outer_stride + column;
      for (int64_t z = 0; z < rows.inner; ++z, p += rows.inner_stride, from += a_stride) {
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
void taps(T* r, int64_t ld, const T* a, int64_t a_stride, Rows rows, const T* b, const int64_t* offsets, int count,
          int64_t columns) {
  for (; count >= 3; count -= 3, offsets += 3, r += 3 * ld)
    some_taps<T, 3>(r, ld, a, a_stride, rows, b, offsets, columns);
  for (; count > 0; --count, ++offsets, r += ld) some_taps<T, 1>(r, ld, a, a_stride, rows, b, offsets, columns);
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

template <class T>
void add_shifted(T* r, const T* g, const T* x, const T* shift, int64_t n) {
  constexpr int width = Vector<T>::width;
  int64_t c = 0;
  for (; c + width <= n; c += width) store(r + c, load(r + c) + load(g + c) * (load(x + c) - load(shift + c)));
  for (; c < n; ++c) r[c] += g[c] * (x[c] - shift[c]);
}

template <class T>
void add(T* r, const T* g, int64_t n) {
  constexpr int width = Vector<T>::width;
  int64_t c = 0;
  for (; c + width <= n; c += width) store(r + c, load(r + c) + load(g + c));
  for (; c < n; ++c) r[c] += g[c];
}

}  // namespace

#define T2V_STRING_(text) #text
#define T2V_STRING(text) T2V_STRING_(text)

template <class T>
constexpr Kernels<T> make_table() {
  return {T2V_STRING(T2V_ISA), Vector<T>::width, max_height,     square_sum<T>,
          square_add<T>,       store_tile<T>,    dot<T>,         taps<T>,
          shifted_dot<T>,      sum<T>,           add_shifted<T>, add<T>};
}

extern const Kernels<float> single_table;
extern const Kernels<double> double_table;
const Kernels<float> single_table = make_table<float>();
const Kernels<double> double_table = make_table<double>();

}  // namespace T2V_ISA
}  // namespace t2v
