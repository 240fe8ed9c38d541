// A tile of a matrix product C[i, j] = sum_k A(k, i) B(k, j), computed by one block.
//
// Factors are read from sources, which know the addresses of values, so nothing is unfolded. A source has
//   Value                     the type of its values
//   vector                    how many values are copied at once: they are contiguous, or all zero
//   along_depth               whether they are contiguous along k, or along i (or j)
//   outer(i), inner(k)        what `at` needs of a place on either axis, computed once for many values
//   at(outer, inner)          where the values from there on are, or that they are zero
//   terms, apart              how many matrices the factor is the sum of, and how far apart their values are
#pragma once

#include <utility>

#include "device.h"
#include "fragment.h"

namespace t2v::cuda {

constexpr int kThreads = 128;
constexpr size_t kStaticShared = 48 << 10;  // what every GPU grants a block that does not ask for more

// Where values are read, in global memory; or zeros, if not inside. The address is one that may be read in either case.
template <class T>
struct Read {
  const T* from;
  bool inside;
};

// The tile of one factor in shared memory: `extent` values of i by `depth` values of k. The pitch is 16 bytes longer
// than a row, so that rows start in different banks.
template <class Source, int Extent>
struct Factor {
  using T = typename Source::Value;
  static constexpr bool along_depth = Source::along_depth;
  static constexpr int extent = Extent, depth = 64 / sizeof(T), vector = Source::vector;
  static constexpr int pitch = (along_depth ? depth : extent) + kWide<T>;
  static constexpr int terms = Source::terms, of_term = (along_depth ? extent : depth) * pitch, size = terms * of_term;

  // Threads fill a row side by side, as many rows as there are threads for at the same time.
  static constexpr int across = (along_depth ? depth : extent) / vector, together = kThreads / across;
  static constexpr int rows = along_depth ? extent : depth;
  static_assert(kThreads % across == 0 && rows % together == 0);
  // Reads of single values have so many rows that their places would not fit the registers.
  static constexpr bool keeps_rows = along_depth && rows / together <= 8;

  // What a thread needs of its places on the axis that is not summed, which it visits again at every step.
  using Outer = decltype(std::declval<const Source&>().outer(0));
  struct Places {
    Outer at[keeps_rows ? rows / together : 1];
  };
  __device__ static Places places(const Source& source, int i0) {
    Places found;
    if constexpr (keeps_rows) {
#pragma unroll
      for (int r = 0; r < rows / together; ++r) found.at[r] = source.outer(i0 + first() + r * together);
    } else {
      found.at[0] = source.outer(i0 + column());
    }
    return found;
  }

  __device__ static void fill(T* to, const Source& source, const Places& outer, int i0, int k0) {
    to += first() * pitch + column();
    if constexpr (along_depth) {
      const auto inner = source.inner(k0 + column());
#pragma unroll
      for (int r = 0; r < rows / together; ++r)
        copy(to + r * together * pitch, source,
             source.at(keeps_rows ? outer.at[r] : source.outer(i0 + first() + r * together), inner));
    } else {
#pragma unroll
      for (int r = 0; r < rows / together; ++r)
        copy(to + r * together * pitch, source, source.at(outer.at[0], source.inner(k0 + first() + r * together)));
    }
  }

 private:
  __device__ static int column() { return thread() % across * vector; }
  __device__ static int first() { return thread() / across; }

  __device__ static void copy(T* to, const Source& source, const Read<T>& values) {
#pragma unroll
    for (int t = 0; t < terms; ++t) {
      const T* const from = values.from + t * source.apart;
      if constexpr (vector * sizeof(T) >= 4)
        copy_async<vector * sizeof(T)>(to + t * of_term, from, values.inside);
      else
        to[t * of_term] = values.inside ? *from : T(0.0f);
    }
  }
};

// Fused multiply-adds: each thread holds side x side elements in registers.
template <class T>
struct Exact {
  using Value = T;
  using Sum = T;
  static constexpr int side = sizeof(T) == 8 ? 4 : 8;  // elements per thread along each axis
  static constexpr int down = 8, across = 16;          // threads along an axis
  static constexpr int rows = down * side, columns = across * side;

  template <class A, class B>
  class Product {
   public:
    __device__ void clear() {
      each([](T& c) { c = 0; });
    }

    __device__ void multiply(const T* a, const T* b) {
      static_assert(A::terms == 1 && B::terms == 1);
      constexpr int chunk = kWide<T>;
      for (int k = 0; k < A::depth; k += chunk) {
        T from_a[chunk][side], from_b[chunk][side];
        read<A, down>(from_a, a, k, i());
        read<B, across>(from_b, b, k, j());
#pragma unroll
        for (int step = 0; step < chunk; ++step)
#pragma unroll
          for (int r = 0; r < side; ++r)
#pragma unroll
            for (int c = 0; c < side; ++c) c_[r][c] += from_a[step][r] * from_b[step][c];
      }
    }

    __device__ void add_squares(const Product& of, T weight) {
#pragma unroll
      for (int r = 0; r < side; ++r)
#pragma unroll
        for (int c = 0; c < side; ++c) c_[r][c] += weight * (of.c_[r][c] * of.c_[r][c]);
    }

    __device__ void store(T* to, int pitch) const {
#pragma unroll
      for (int r = 0; r < side; ++r)
#pragma unroll
        for (int c = 0; c < side; ++c) to[place<A, down>(i(), r) * pitch + place<B, across>(j(), c)] = c_[r][c];
    }

   private:
    __device__ static int i() { return thread() / across; }
    __device__ static int j() { return thread() % across; }

    // The i of a thread's r-th element, chosen so that neighbouring threads read neighbouring banks.
    template <class F, int Threads>
    __device__ static int place(int thread, int r) {
      if constexpr (F::along_depth) return thread + Threads * r;
      constexpr int wide = kWide<T>;
      return r / wide * (wide * Threads) + thread * wide + r % wide;
    }

    template <class F, int Threads>
    __device__ static void read(T (*to)[side], const T* from, int k, int thread) {
      constexpr int wide = kWide<T>;
#pragma unroll
      for (int step = 0; step < (F::along_depth ? 1 : wide); ++step)
#pragma unroll
        for (int r = 0; r < side; r += F::along_depth ? 1 : wide) {
          const int i = place<F, Threads>(thread, r),
                    at = F::along_depth ? i * F::pitch + k : (k + step) * F::pitch + i;
          const auto values = *reinterpret_cast<const Vector<T, wide>*>(from + at);
#pragma unroll
          for (int v = 0; v < wide; ++v) (F::along_depth ? to[v][r] : to[step][r + v]) = values.values[v];
        }
    }

    template <class Use>
    __device__ void each(const Use& use) {
#pragma unroll
      for (auto& row : c_)
#pragma unroll
        for (T& c : row) use(c);
    }

    T c_[side][side];
  };
};

// Tensor cores with float32 sums. Products of bfloat16 and float16 are exact; float operands are rounded to TF32.
template <class T>
struct TensorCores {
  using Value = T;
  using Sum = float;
  static constexpr int rows = 64, columns = 128;

  template <class A, class B>
  class Product {
    static constexpr bool tf32 = std::is_same_v<T, float>;
    static constexpr int depth = tf32 ? 8 : 16, down = 2, across = 4;  // fragments per warp: 32 rows, 64 columns
    using Element = std::conditional_t<tf32, nvcuda::wmma::precision::tf32,
                                       std::conditional_t<std::is_same_v<T, c10::Half>, __half, __nv_bfloat16>>;
    using Stored = std::conditional_t<tf32, float, Element>;

   public:
    __device__ void clear() {
#pragma unroll
      for (auto& row : c_)
#pragma unroll
        for (auto& c : row) nvcuda::wmma::fill_fragment(c, 0.0f);
    }

    // The fragments of B are loaded once for all terms of A.
    __device__ void multiply(const T* a, const T* b) {
      using namespace nvcuda::wmma;
      static_assert(B::terms == 1);
      // [k][i] in memory is a matrix [i, k] by columns, and a matrix [k, j] by rows.
      fragment<matrix_a, 16, 16, depth, Element, std::conditional_t<A::along_depth, row_major, col_major>> from_a;
      fragment<matrix_b, 16, 16, depth, Element, std::conditional_t<B::along_depth, col_major, row_major>>
          from_b[across];
#pragma unroll
      for (int k = 0; k < A::depth; k += depth) {
#pragma unroll
        for (int c = 0; c < across; ++c) load<B>(from_b[c], b, column() + 16 * c, k);
#pragma unroll
        for (int r = 0; r < down * A::terms; ++r) {
          auto& sums = c_[r % down];
          load<A>(from_a, a + r / down * A::of_term, row() + 16 * (r % down), k);
#pragma unroll
          for (int c = 0; c < across; ++c) mma_sync(sums[c], from_a, from_b[c], sums[c]);
        }
      }
    }

    // All fragments of one kind have their elements in the same order.
    __device__ void add_squares(const Product& of, float weight) {
#pragma unroll
      for (int r = 0; r < down; ++r)
#pragma unroll
        for (int c = 0; c < across; ++c)
#pragma unroll
          for (int e = 0; e < c_[r][c].num_elements; ++e)
            c_[r][c].x[e] += weight * (of.c_[r][c].x[e] * of.c_[r][c].x[e]);
    }

    __device__ void store(float* to, int pitch) const {
#pragma unroll
      for (int r = 0; r < down; ++r)
#pragma unroll
        for (int c = 0; c < across; ++c)
          store_shared(to + (row() + 16 * r) * pitch + column() + 16 * c, c_[r][c], pitch);
    }

   private:
    __device__ static int row() { return thread() / 64 * 32; }
    __device__ static int column() { return thread() / 32 % 2 * 64; }

    template <class F, class Fragment>
    __device__ static void load(Fragment& fragment, const T* from, int i, int k) {
      const T* at = from + (F::along_depth ? i * F::pitch + k : k * F::pitch + i);
      load_shared(fragment, reinterpret_cast<const Stored*>(at), F::pitch);
      if constexpr (tf32)
#pragma unroll
        for (int e = 0; e < fragment.num_elements; ++e) fragment.x[e] = nvcuda::wmma::__float_to_tf32(fragment.x[e]);
    }

    nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, depth, float> c_[down][across];
  };
};

// Computes tiles with one block. While the block multiplies the factors of one step, those of the next steps are
// copied.
template <class Math, class SourceA, class SourceB>
class Tiles {
 public:
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  using A = Factor<SourceA, Math::rows>;
  using B = Factor<SourceB, Math::columns>;
  using Product = typename Math::template Product<A, B>;
  static_assert(std::is_same_v<T, typename A::T> && std::is_same_v<T, typename B::T>);
  static constexpr int rows = Math::rows, columns = Math::columns, depth = A::depth;
  // Between the rows of a stored tile: 32 bytes longer than a row, so that the rows of a fragment are in other banks.
  static constexpr int pitch = columns + 2 * kWide<Sum>;
  static constexpr size_t stored = sizeof(Sum) * rows * pitch, stage = sizeof(T) * (A::size + B::size);
  static constexpr int stages = 3 * stage <= kStaticShared ? 3 : 2;
  static constexpr size_t factors = stages * stage;
  static constexpr size_t shared = stored > factors ? stored : factors;

  // Adds to the tile from (i0, j0) on the products with k from k0, a multiple of the depth, to k1.
  __device__ static void add(Product& product, const SourceA& a, const SourceB& b, int i0, int j0, int k0, int k1) {
    T* const buffers = reinterpret_cast<T*>(shared_memory<shared>());
    const int steps = (k1 - k0 + depth - 1) / depth;
    const auto places_a = A::places(a, i0);
    const auto places_b = B::places(b, j0);
    const auto fill = [&](int step) {
      if (step < steps) {
        T* const to = buffers + step % stages * (A::size + B::size);
        A::fill(to, a, places_a, i0, k0 + step * depth);
        B::fill(to + A::size, b, places_b, j0, k0 + step * depth);
      }
      group_copies();
    };
    __syncthreads();  // no thread reads the buffers any more: the last product's factors, or a stored tile
    for (int step = 0; step < stages - 1; ++step) fill(step);
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<stages - 2>();
      __syncthreads();  // all threads' copies for this step are complete, and no thread reads the last step's buffer
      fill(step + stages - 1);
      const T* const from = buffers + step % stages * (A::size + B::size);
      product.multiply(from, from + A::size);
    }
  }

  // Stores the tile where every thread can read it, with rows `pitch` apart.
  __device__ static const Sum* store(const Product& product) {
    return exchanged([&](Sum* to) { product.store(to, pitch); });
  }

  // What write(Sum*), which every thread calls, writes where every thread can read it.
  template <class Write>
  __device__ static const Sum* exchanged(const Write& write) {
    Sum* const to = reinterpret_cast<Sum*>(shared_memory<shared>());
    __syncthreads();  // no thread reads the factors, or what was written before, which are in this memory, any more
    write(to);
    __syncthreads();
    return to;
  }
};

}  // namespace t2v::cuda
