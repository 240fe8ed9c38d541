// The inner loops of the CPU backend: plain C++, compiled once for each instruction set and chosen at run time.
//
// This header, tile.cpp and the headers of tile.cpp must not include anything of torch. An inline function compiled
// with AVX-512 flags could otherwise be the copy that the linker keeps for the whole process.
#pragma once

#include <cstdint>

namespace t2v {

// The summed positions of a product, as two nested loops. The columns of the vector operand b are contiguous. The
// broadcast operand a may have its positions or its columns contiguous.
struct Rows {
  int64_t outer, inner;
  int64_t outer_stride, inner_stride;  // of b, in elements
  int64_t a_stride;                    // of a, from each position to the next
  int64_t a_column = 1;                // of a, from each of its columns to the next
  int64_t a_skip = 0;                  // of a, after each inner loop
};

// Consecutive rows of both operands that form one gradient. Where the operands hold squares already, as they do for
// gradients of rank one, rows of several gradients form a segment: the square of a product is a product of squares.
template <class T>
struct Segment {
  int64_t rows;
  T weight;
  bool squares;
};

// The largest height of a tile of squares of segments. With the gradients of one segment, it fits into 32 registers.
constexpr int segment_height = 6;

// The transformed operands of Winograd's F(3x3, 4x4): 36 matrices [tiles][stride] each.
template <class T>
struct Winograd {
  int64_t tiles;
  const T* x;
  int64_t x_stride;
  const T* g;
  int64_t g_stride;
};

// The place of a tile of 4x4 output positions, and how many of its rows and columns are inside the output.
template <class S>
struct OutputTile {
  S* to;
  int high, wide;
};

// Up to this number of positions, quadratic forms are evaluated column by column. Above it, the tiles' reuse of
// registers is worth a transposed copy (measured). The planner reads this number from the extension.
constexpr int64_t few_positions = 64;

// Two bfloat16 values that are adjacent along the summed axis: the operand of the processor's dot products.
struct Pair {
  uint16_t first, second;
};

// Two adjacent 16-bit integers. Their products are summed in 32 bits over at most `fixed_operands` operands. The values
// are scaled so that their norm over these operands is at most the largest 16-bit integer, so no sum overflows.
struct Fixed {
  int16_t first, second;
};
constexpr int64_t fixed_operands = 32;

// The type of the one or two values in an operand of a product.
template <class E>
struct ValueOf {
  using type = E;
};
template <>
struct ValueOf<Fixed> {
  using type = int16_t;
};

// The steps of Winograd's F(4x4, 3x3) for images of type S, with products of operands E and sums of type T.
template <class S, class T, class E>
struct WinogradSteps {
  using X = typename ValueOf<E>::type;
  // The 36 transformed values of 6x6 pixels for `channels` channels (rounded up to whole vectors): to[f * to_stride +
  // c] from from[y * row + x * pixel + c]. Returns the unit of the fixed-point values; other types have none.
  T (*input)(X* to, int64_t to_stride, const S* from, int64_t row, int64_t pixel, int64_t channels);
  // The same for the 3x3 taps from[k][c][o] of kernels with 2 * width outputs o: to[f * to_stride + c * 2 * width + o].
  // Pairs hold two channels each, and the number of channels is even then. The units go to units[o].
  void (*kernel)(E* to, int64_t to_stride, T* units, const T* from, int64_t channels);
  // Output tiles: the inverse transform of sum_c x[f][i][c] kernels[f][c][o], plus bias[o], for `height` tiles i and
  // `columns` <= 2 * width outputs o. Frequencies f are x_stride and kernels_stride operands apart, and tiles are
  // x_pixel operands apart. kernels and bias have 2 * width outputs. Rows and pixels of the output are `row` and
  // `pixel` elements apart.
  void (*outputs)(const OutputTile<S>* to, int64_t row, int64_t pixel, const E* x, int64_t x_stride, int64_t x_pixel,
                  const E* kernels, int64_t kernels_stride, int64_t operands, const T* x_units, const T* kernel_units,
                  const T* bias, int height, int64_t columns);
};

// Sums over positions s of g[s * g_stride + c] and of its products with an input x, for `channels` channels c that fill
// at least one vector.
template <class S, class T>
struct NormSums {
  // sums[c] = sum g (x - shift[c]), or sum g if x is null. plain[c] = sum g, unless plain is null.
  void (*by_channel)(T* sums, T* plain, const S* g, int64_t g_stride, const S* x, int64_t x_stride, const T* shift,
                     int64_t positions, int64_t channels);
  // sums[c] = sum g (x - shift[s * shift_stride]) scale[s * scale_stride], plain as above
  void (*by_position)(T* sums, T* plain, const S* g, int64_t g_stride, const S* x, int64_t x_stride, const T* shift,
                      int64_t shift_stride, const T* scale, int64_t scale_stride, int64_t positions, int64_t channels);
};

// A register tile G[i, c] = sum over rows of a[row, i] * b[row, c], for `height` <= max_height values of i.
// Columns beyond `columns` may be read, up to the next multiple of `width`, but no value there, NaN included, reaches a
// result.
template <class T>
struct Kernels {
  const char* name;
  int width;       // elements of a vector
  int max_height;  // largest height of a tile

  // q[i] += sum_c G[i, c]^2
  void (*square_sum)(T* q, const T* a, int height, Rows rows, const T* b, int64_t columns);
  // out[i * ld + c] += weight * G[i, c]^2
  void (*square_add)(T* out, int64_t ld, T weight, const T* a, int height, Rows rows, const T* b, int64_t columns);
  // out[i * ld + c] += sum over the segments of weight * G[i, c]^2, or of G[i, c] where the operands hold squares. Rows
  // of b are 2 * width apart, which is the largest number of columns. Columns of a are a_column apart.
  void (*segments_add)(T* out, int64_t ld, const Segment<T>* segments, int64_t count, const T* a, int64_t a_column,
                       int height, const T* b, int64_t columns);
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
  // The same for bfloat16 images, with products in the precision of the sums and in fixed point. Only for T = float,
  // and fixed_winograd_steps is null where the instruction set has no dot products of 16-bit integers.
  WinogradSteps<uint16_t, T, T> wide_winograd_steps;
  WinogradSteps<uint16_t, T, Fixed> fixed_winograd_steps;

  // r[k * ld + c] = sum over rows of a[row * a_stride + c] * b[row, offsets[k] + c]: depthwise taps
  void (*taps)(T* r, int64_t ld, const T* a, Rows rows, const T* b, const int64_t* offsets, int count, int64_t columns);

  // The same for bfloat16 pairs, with rows that count pairs. Null where the instruction set has no dot products of
  // them.
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
  NormSums<uint16_t, T> wide_norm_sums;  // for bfloat16 values, with T = float
};

// The kernels of the best instruction set of this processor, or of the one that was forced.
template <class T>
const Kernels<T>& kernels();

// Force "avx512bf16", "avx512", "avx2", "neonbf16", "neon" or "portable"; false if this build or processor does not
// have it.
bool set_cpu_capability(const char* name);
const char* cpu_capability();

}  // namespace t2v
