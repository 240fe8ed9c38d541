// The launchers of the CUDA kernels. They take raw pointers and a stream, so that any compiler can call them;
// bindings.cpp makes operators of them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "../geometry.h"

#ifdef T2V_EMULATED
using cudaStream_t = void*;
#else
#include <cuda_runtime_api.h>
#endif

namespace t2v::cuda {

// The type of sums over T, as reference.accumulate_dtype in Python.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Launch {
  cudaStream_t stream;
  int processors;  // of the device; a launch has several blocks for each
  bool tf32;       // whether products of float values may be rounded to TF32
};

// Images [N, H, W, C]. The channels of a pixel lie side by side, and pixels are equally far apart.
template <class T>
struct Pixels {
  const T* data;
  int64_t example;  // from one image to the next
  int pixel;        // from one pixel to the next
};

// A convolution's input and cotangent; M is a multiple of N.
template <class T>
struct Convolution {
  ConvGeometry geometry;
  Pixels<T> x;  // [N, H, W, C]
  Pixels<T> g;  // [M, Ho, Wo, O]
  int64_t examples, rows;
};

// Where a function takes `parts`, that many blocks share the work of one output, and each writes a partial result. The
// caller adds the partial results in a fixed order. The `*_parts` functions return how many parts keep the device busy.
int64_t filter_parts(const ConvGeometry& s, int64_t rows, const Launch& l);
int64_t element_parts(const ConvGeometry& s, int64_t rows, const Launch& l);

// sums [parts, M, O]: the squares of the gradients G_m [O, D], summed over D
template <class T>
void conv_filter_sums(SumOf<T>* sums, int64_t parts, const Convolution<T>& c, const Launch& l);

// gradients [parts, M, O, kh, kw, C / groups], to be summed over parts: each has some of the positions. More than one
// part is worth while if there are few examples, of large images.
int64_t gradient_parts(const ConvGeometry& s, int64_t rows, int64_t itemsize, const Launch& l);
template <class T>
void conv_gradients(SumOf<T>* gradients, int64_t parts, const Convolution<T>& c, const Launch& l);

// sums [parts, O, kh, kw, C / groups]: the squares of the gradients times weight [M], summed over m
template <class T>
void conv_element_sums(SumOf<T>* sums, int64_t parts, const SumOf<T>* weight, const Convolution<T>& c, const Launch& l);

// gradients [parts, M, kh kw, O], to be summed over parts, for a convolution with one input channel per group
int64_t depthwise_parts(const ConvGeometry& s, int64_t rows, const Launch& l);
template <class T>
void depthwise_gradients(SumOf<T>* gradients, int64_t parts, const Convolution<T>& c, const Launch& l);

// The type of the terms that a Gram matrix is a sum of in quadratic forms of T values. Each bfloat16 term holds 8 bits
// of a value. float16 values are multiplied in TF32, and each TF32 term holds 11.
template <class T>
using TermOf = std::conditional_t<std::is_same_v<T, c10::Half>, float, T>;

// gram [N, groups, terms, P, pitch]: the patches' Gram matrix, folded: entries above the diagonal are doubled, and
// those below are zero. Padding is zero. More than one term needs a `pitch` that is a multiple of 16 bytes of sums.
// Tiles of Term that are below the diagonal are not written, and quadratic_forms does not read them.
template <class T, class Term>
void conv_grams(Term* gram, int64_t terms, int64_t pitch, const Convolution<T>& c, const Launch& l);

// The same from the folded Gram matrix of the pixels, pixels [N, groups, H W, H W]. All entries are written.
template <class T, class Term>
void shifted_grams(Term* gram, int64_t terms, int64_t pitch, const SumOf<T>* pixels, const ConvGeometry& s,
                   int64_t examples, const Launch& l);

// Gram matrices [N, groups, terms, P, P] whose rows lie `pitch` apart; each matrix is the sum of its terms.
template <class T>
struct Grams {
  const T* data;
  int64_t examples, groups, terms, positions, pitch;
};

// to [matrices, terms, P, pitch]: gram [matrices, P, P] as a sum of terms. Padding is zero.
template <class T>
void split_grams(TermOf<T>* to, int64_t terms, int64_t pitch, const float* gram, int64_t matrices, int64_t positions,
                 const Launch& l);

// sums [parts, M, O]: g_o^T gram g_o; g [M, P, O]. plain [parts, M, O]: the sums of g_o, unless plain is null.
int64_t form_parts(int64_t positions, int64_t filters, int64_t groups, int64_t rows, const Launch& l);
template <class T>
void quadratic_forms(SumOf<T>* sums, SumOf<T>* plain, int64_t parts, const Grams<T>& gram, const Pixels<T>& g,
                     int64_t filters, int64_t rows, const Launch& l);

// A tensor [rows, positions, channels] with any strides, also zero for broadcasting; or null.
template <class T>
struct Tokens {
  const T* data = nullptr;
  int64_t row = 0, position = 0, channel = 0;  // strides
};

// The sums over positions of g (x - shift) scale, and of g alone.
template <class T>
struct Products {
  Tokens<T> g, x;
  Tokens<SumOf<T>> shift, scale;
  int64_t positions, channels, examples, rows;
  bool plain;  // whether the sum of g is wanted besides the other, which there is if there is x

  int64_t kinds() const { return x.data && plain ? 2 : 1; }
};

// q [kinds, M, C]: the squares of the sums, first those with x. `sums` [parts, kinds, M, C] is written if there is more
// than one part.
template <class T>
int64_t product_parts(const Products<T>& p, const Launch& l);
template <class T>
void products(SumOf<T>* q, SumOf<T>* sums, const Products<T>& p, const Launch& l);

// out [C] += weight [M] q [M, C]
template <class Sum>
void add_weighted(Sum* out, const Sum* q, const Sum* weight, int64_t rows, int64_t channels, const Launch& l);

// The look-ups of a table, sorted by row and then by place n S + s. Rows of look-ups that are left out are negative.
struct Lookups {
  const int64_t *row, *place;
  int count, positions, examples, rows;
};

// sums [M, V], zero before the call
template <class T>
void scatter_filter_sums(SumOf<T>* sums, const Lookups& lookups, const Tokens<T>& g, int64_t table, int64_t channels,
                         const Launch& l);

// adds to out [V, O]
template <class T>
void scatter_element_sums(SumOf<T>* out, const Lookups& lookups, const Tokens<T>& g, const SumOf<T>* weight,
                          int64_t channels, const Launch& l);

#define T2V_FOR_EACH_TYPE(USE) USE(double) USE(float) USE(c10::BFloat16) USE(c10::Half)

}  // namespace t2v::cuda
