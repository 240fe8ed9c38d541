// The inner loops of the CPU backend: plain C++, compiled once for each instruction set, chosen at run time.
//
// Nothing of torch may be included here, in tile.cpp or in its headers: inline functions compiled with AVX-512 flags
// could otherwise be the copies that the linker keeps for the whole process.
#pragma once

#include <cstdint>

namespace t2v {

// The summed positions of a product, as two nested loops. The columns of the vector operand b are contiguous; the
// broadcast operand a may lie either way round.
struct Rows {
  int64_t outer, inner;
  int64_t outer_stride, inner_stride;  // of b, in elements
  int64_t a_stride;                    // of a, from each position to the next
  int64_t a_column = 1;                // of a, from each of its columns to the next
  int64_t a_skip = 0;                  // of a, after each inner loop
};

// The operands of Winograd's F(3x3, 4x4) after their transforms: 36 matrices [tiles][stride] each.
template <class T>
struct Winograd {
  int64_t tiles;
  const T* x;
  int64_t x_stride;
  const T* g;
  int64_t g_stride;
};

// Where a tile of 4x4 output positions goes, and how many of its rows and columns exist.
template <class S>
struct OutputTile {
  S* to;
  int high, wide;
};

// Positions up to which quadratic forms go column by column; above, the tiles' reuse of registers is worth a transposed
// copy (measured).
constexpr int64_t few_positions = 64;

// Two bfloat16 values that are summed over one after the other: what the processor's dot products take.
struct Pair {
  uint16_t first, second;
};

// Two 16-bit integers, likewise. Products of them are sums of 32 bits, of so many operands at most: what is multiplied
// is scaled so that its norm over these is no larger than the largest such integer, and then no sum overflows.
struct Fixed {
  int16_t first, second;
};
constexpr int64_t fixed_operands = 32;

// The type of the values that an operand of a product has one or two of.
template <class E>
struct ValueOf {
  using type = E;
};
template <>
struct ValueOf<Fixed> {
  using type = int16_t;
};

// Winograd's F(4x4, 3x3) of images of type S, by products of operands E with sums of type T.
template <class S, class T, class E>
struct WinogradSteps {
  using X = typename ValueOf<E>::type;
  // The 36 transformed values of 6x6 pixels for `channels` channels (rounded up to whole vectors): to[f * to_stride +
  // c] from from[y * row + x * pixel + c]. Returns its unit, which only
  // fixed point needs.
  T (*input)(X* to, int64_t to_stride, const S* from, int64_t row, int64_t pixel, int64_t channels);
  // The same of the 3x3 taps from[k][c][o] of kernels with 2 * width outputs o: to[f * to_stride + c * 2 * width + o],
  // a pair for two channels, of which there is an even number then. Their units to units[o].
  void (*kernel)(E* to, int64_t to_stride, T* units, const T* from, int64_t channels);
  // Output tiles: the transform back of sum_c x[f][i][c] kernels[f][c][o], plus bias[o], for `height` tiles i and
  // `columns` <= 2 * width outputs o. Frequencies f are x_stride and kernels_stride apart, tiles x_pixel, all in
  // operands; kernels and bias have 2 * width outputs. Rows and pixels of the output are `row` and `pixel` apart.
  void (*outputs)(const OutputTile<S>* to, int64_t row, int64_t pixel, const E* x, int64_t x_stride, int64_t x_pixel,
                  const E* kernels, int64_t kernels_stride, int64_t operands, const T* x_units, const T* kernel_units,
                  const T* bias, int height, int64_t columns);
};

// Sums over positions s of g[s * g_stride + c] and of its products with an input x, for `channels` channels c, which
// fill at least one vector.
template <class S, class T>
struct NormSums {
  // sums[c] = sum g (x - shift[c]); x null: sum g. plain[c] = sum g, where it is not null.
  void (*by_channel)(T* sums, T* plain, const S* g, int64_t g_stride, const S* x, int64_t x_stride, const T* shift,
                     int64_t positions, int64_t channels);
  // sums[c] = sum g (x - shift[s * shift_stride]) scale[s * scale_stride], plain as above
  void (*by_position)(T* sums, T* plain, const S* g, int64_t g_stride, const S* x, int64_t x_stride, const T* shift,
                      int64_t shift_stride, const T* scale, int64_t scale_stride, int64_t positions, int64_t channels);
};

// A register tile G[i, c] = sum over rows of a[row, i] * b[row, c], for `height` <= max_height values of i.
// Columns beyond `columns` may be read, up to the next multiple of `width`, but never count: whatever lies there, NaN
// included, does not reach a result.
template <class T>
struct Kernels {
  const char* name;
  int width;       // elements of a vector
  int max_height;  // largest height of a tile

  // q[i] += sum_c G[i, c]^2
  void (*square_sum)(T* q, const T* a, int height, Rows rows, const T* b, int64_t columns);
  // out[i * ld + c] += weight * G[i, c]^2
  void (*square_add)(T* out, int64_t ld, T weight, const T* a, int height, Rows rows, const T* b, int64_t columns);
  // out[i * ld + c] = G[i, c]
  void (*store)(T* out, int64_t ld, const T* a, int height, Rows rows, const T* b, int64_t columns);
  // q[i] += sum_c G[i, c] * d[i * ld + c]
  void (*dot)(T* q, const T* d, int64_t ld, const T* a, int height, Rows rows, const T* b, int64_t columns);

  // q[c] += sum over p <= p' of d[p * stride + c] gram[p * positions + p'] d[p' * stride + c], for few positions
  void (*form)(T* q, const T* gram, int64_t positions, const T* d, int64_t stride, int64_t columns);

  // The 36 transformed values of 6x6 input pixels, and of 4x4 cotangent pixels, for `channels` channels (rounded up to
  // whole vectors): to[f * to_stride + c] from from[y * row + x * pixel + c].
  void (*winograd_input)(T* to, int64_t to_stride, const T* from, int64_t row, int64_t pixel, int64_t channels);
  void (*winograd_cotangent)(T* to, int64_t to_stride, const T* from, int64_t row, int64_t pixel, int64_t channels);
  // For the 3x3 gradients G[i, k, c] of filters first..first + height: q[i] += sum G^2, and
  // out[i * ld + k * columns + c] += weight * G^2.
  void (*winograd_sum)(T* q, const Winograd<T>& operands, int64_t first, int height, int64_t columns);
  void (*winograd_add)(T* out, int64_t ld, T weight, const Winograd<T>& operands, int64_t first, int height,
                       int64_t columns);

  WinogradSteps<T, T, T> winograd_steps;
  // The same of bfloat16 images, by products as exact as the sums, and in fixed point: for T = float, the latter null
  // where the instruction set has no dot products for it.
  WinogradSteps<uint16_t, T, T> wide_winograd_steps;
  WinogradSteps<uint16_t, T, Fixed> fixed_winograd_steps;

  // r[k * ld + c] = sum over rows of a[row * a_stride + c] * b[row, offsets[k] + c]: depthwise taps
  void (*taps)(T* r, int64_t ld, const T* a, Rows rows, const T* b, const int64_t* offsets, int count, int64_t columns);

  // The same of bfloat16 pairs, where rows count pairs; null where the instruction set has no dot products for them.
  void (*pair_square_sum)(T* q, const Pair* a, int height, Rows rows, const Pair* b, int64_t columns);
  void (*pair_square_add)(T* out, int64_t ld, T weight, const Pair* a, int height, Rows rows, const Pair* b,
                          int64_t columns);
  void (*pair_store)(T* out, int64_t ld, const Pair* a, int height, Rows rows, const Pair* b, int64_t columns);

  // to[k] = {a[k], b[k]}
  void (*interleave)(Pair* to, const uint16_t* a, const uint16_t* b, int64_t n);

  // to[c * to_stride + r] = from[r * from_stride + c]
  void (*transpose)(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows, int64_t columns);

  // sum_s g[s] * (x[s] - shift); sum_s g[s]
  T (*shifted_dot)(const T* g, const T* x, T shift, int64_t n);
  T (*sum)(const T* g, int64_t n);
  NormSums<T, T> norm_sums;
  NormSums<uint16_t, T> wide_norm_sums;  // of bfloat16, for T = float
};

// The kernels of the best instruction set that this processor has, or of the one that was forced.
template <class T>
const Kernels<T>& kernels();

// Force "avx512bf16", "avx512", "avx2" or "portable"; false if this build or processor does not have it.
bool set_cpu_capability(const char* name);
const char* cpu_capability();

}  // namespace t2v
