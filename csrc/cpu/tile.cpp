// The kernels of one instruction set, which T2V_ISA names; compiled once for each.
#include "tile_winograd.h"
#include "vector.h"

namespace t2v {
namespace T2V_ISA {
namespace {

template <class T, int MR, class E, class Epilogue>
void all_columns(const E* a, const Rows& rows, const E* b, int64_t columns, const Epilogue& epilogue) {
  constexpr int width = Vector<T>::width;
  int64_t column = 0;
  for (; column + width < columns; column += 2 * width) tile<T, MR, 2>(a, rows, b, column, columns, epilogue);
  if (column < columns) tile<T, MR, 1>(a, rows, b, column, columns, epilogue);
}

// Calls the kernel with the run-time height as a compile-time constant.
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

// Keeps the squares of all segments in registers, and then adds them to `out`.
template <class T, int MR, int NV>
void some_segments(T* out, int64_t ld, const Segment<T>* segments, int64_t count, const T* a, int64_t a_column,
                   const T* b, int64_t columns) {
  constexpr int width = Vector<T>::width;
  V<T> squares[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) squares[i][v] = V<T>{};
  for (const Segment<T>* s = segments; s < segments + count; ++s) {
    const Rows rows{1, s->rows, 0, 2 * width, 1, a_column};
    const T weight = s->weight;
    if (s->squares)
      tile<T, MR, NV>(a, rows, b, 0, NV * width,
                      [&](int i, int64_t c, int, V<T> sums) { squares[i][c / width] += sums; });
    else
      tile<T, MR, NV>(a, rows, b, 0, NV * width,
                      [&](int i, int64_t c, int, V<T> sums) { squares[i][c / width] += weight * sums * sums; });
    a += s->rows;
    b += s->rows * 2 * width;
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      T* to = out + i * ld + v * width;
      const int64_t left = columns - v * width;
      if (left >= width) {
        store(to, load(to) + squares[i][v]);
      } else {
        for (int64_t k = 0; k < left; ++k) to[k] += squares[i][v][k];
      }
    }
}

template <class T, int MR = segment_height>
void segments_add(T* out, int64_t ld, const Segment<T>* segments, int64_t count, const T* a, int64_t a_column,
                  int height, const T* b, int64_t columns) {
  if (height == MR) {
    if (columns > Vector<T>::width) return some_segments<T, MR, 2>(out, ld, segments, count, a, a_column, b, columns);
    return some_segments<T, MR, 1>(out, ld, segments, count, a, a_column, b, columns);
  }
  if constexpr (MR > 1) segments_add<T, MR - 1>(out, ld, segments, count, a, a_column, height, b, columns);
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

// Takes columns as the vectors: nothing is transposed, and vectors are full even where positions are few.
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
  // The last columns are computed as a whole vector, so that rounding does not depend on where a worker's share ends.
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

// Transposes blocks of width x width in registers by exchanging halves, quarters and so on of pairs of rows.
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
  // The last block of each axis ends where the axis ends, so it may overlap the block before.
  for (int64_t r0 = 0; r0 < rows; r0 += width)
    for (int64_t c0 = 0; c0 < columns; c0 += width) {
      const int64_t r = r0 + width <= rows ? r0 : rows - width, c = c0 + width <= columns ? c0 : columns - width;
      V<T> block[width];
      for (int k = 0; k < width; ++k) block[k] = load(from + (r + k) * from_stride + c);
      exchange<T, width / 2>(block);
      for (int k = 0; k < width; ++k) store(to + (c + k) * to_stride + r, block[k]);
    }
}

// Four independent sums hide the latency of the additions.
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

// Sums of the first `count` of NV vectors of channels from c on. input(s, c) is the factor of g at position s.
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

// The sums of all channels. The last vector ends with the last channel, so it may overlap the vector before.
template <class T, class S, class Input>
inline void norm_sums(T* sums, T* plain, const S* g, int64_t g_stride, int64_t positions, int64_t channels,
                      const Input& input) {
  constexpr int width = Vector<T>::width, some = max_height == 12 ? 4 : 2;
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
  return {winograd_input<T, S>, winograd_kernel<T>, winograd_outputs<S, T, T>};
}

// Fills in the kernels for bfloat16, and for bfloat16 pairs where the instruction set has them.
constexpr Kernels<float> with_bfloat16(Kernels<float> table) {
  table.wide_winograd_steps = winograd_steps<uint16_t, float>();
  table.wide_norm_sums = {sums_by_channel<float, uint16_t>, sums_by_position<float, uint16_t>};
#ifdef T2V_PAIRS
  table.pair_square_sum = square_sum<float, Pair>;
  table.pair_square_add = square_add<float, Pair>;
  table.pair_store = store_tile<float, Pair>;
#endif
#ifdef __AVX512BF16__
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
          segments_add<T>,
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
