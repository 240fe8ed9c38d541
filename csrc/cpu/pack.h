// Copies of one example in the layouts that the tiles read, converted to the type of the sums.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "../checks.h"
#include "../geometry.h"
#include "library.h"
#include "tile.h"

namespace t2v {

// float64 sums for float64, float32 sums for everything narrower.
template <class S>
using SumOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The type that the kernels read values as: they have no torch types.
template <class S>
struct BitsOf {
  using type = S;
};
template <>
struct BitsOf<BFloat16> {
  using type = uint16_t;
};
template <class S>
const typename BitsOf<S>::type* bits(const S* values) {
  return reinterpret_cast<const typename BitsOf<S>::type*>(values);
}

// Memory that a thread keeps and uses again, aligned to cache lines. Fresh pages from the system would cost more than
// the products that are computed in them.
class Memory {
 public:
  struct Block {
    void* data;
    size_t bytes;
  };

  static Block take(size_t bytes) {
    std::vector<Block>& kept = free_blocks().blocks;
    auto best = kept.end();
    for (auto block = kept.begin(); block != kept.end(); ++block)
      if (block->bytes >= bytes && (best == kept.end() || block->bytes < best->bytes)) best = block;
    if (best == kept.end() || best->bytes > 2 * bytes + 4096) {
      bytes = (bytes + 63) / 64 * 64;
      void* data = std::aligned_alloc(64, bytes);
      if (!data) throw std::bad_alloc();
      return {data, bytes};
    }
    const Block block = *best;
    kept.erase(best);
    return block;
  }

  static void give_back(const Block& block) {
    Blocks& kept = free_blocks();
    kept.blocks.push_back(block);
    size_t total = 0;
    for (const Block& other : kept.blocks) total += other.bytes;
    while (total > most) {  // the longest unused blocks are freed first
      total -= kept.blocks.front().bytes;
      std::free(kept.blocks.front().data);
      kept.blocks.erase(kept.blocks.begin());
    }
  }

 private:
  static constexpr size_t most = size_t(32) << 20;  // bytes kept by a thread
  struct Blocks {
    std::vector<Block> blocks;
    ~Blocks() {
      for (const Block& block : blocks) std::free(block.data);
    }
  };
  static Blocks& free_blocks() {
    thread_local Blocks blocks;
    return blocks;
  }
};

// Uninitialised memory for one worker's share of the work. Up to `slack` elements may be read beyond its end.
template <class T>
class Scratch {
 public:
  static constexpr int64_t slack = 64;
  explicit Scratch(int64_t size) : block_(Memory::take((size + slack) * sizeof(T))) {}
  ~Scratch() { Memory::give_back(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  const Memory::Block block_;
};

// Consecutive filters of one group that are computed in one register tile.
struct FilterTile {
  int64_t group, first;  // `first` counts from the first filter of the group
  int height;
};

// All filters in tiles of nearly equal height: 64 are 6 tiles of 10 or 11, not 5 of 12 and one of 4.
inline std::vector<FilterTile> filter_tiles(int64_t groups, int64_t group_filters, int max_height) {
  std::vector<FilterTile> tiles;
  const int64_t count = (group_filters + max_height - 1) / max_height;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t first = k * group_filters / count, end = (k + 1) * group_filters / count;
      tiles.push_back({group, first, static_cast<int>(end - first)});
    }
  return tiles;
}

// A strided [outer, inner, columns] view of one example's positions.
template <class S>
struct Positions {
  const S* data;
  int64_t outer, inner;
  int64_t outer_stride, inner_stride, column_stride;

  Positions from_column(int64_t first) const {
    Positions later = *this;
    later.data += first * column_stride;
    return later;
  }

  // The same positions as a single loop, where the strides allow it.
  Positions merged() const {
    if (outer == 1 || outer_stride != inner * inner_stride) return *this;
    return {data, 1, outer * inner, 0, inner_stride, column_stride};
  }
};

// to[c * to_stride + r] = from[r * row_stride + c]. Values narrower than T are widened a block at a time.
template <class T, class S>
void transpose(T* to, int64_t to_stride, const S* from, int64_t row_stride, int64_t rows, int64_t columns) {
  if constexpr (std::is_same_v<S, T>) return kernels<T>().transpose(to, to_stride, from, row_stride, rows, columns);
  constexpr int64_t height = 16, width = 128;
  T block[height * width];
  for (int64_t r = 0; r < rows; r += height)
    for (int64_t c = 0; c < columns; c += width) {
      const int64_t h = std::min(height, rows - r), w = std::min(width, columns - c);
      for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < w; ++j) block[i * width + j] = static_cast<T>(from[(r + i) * row_stride + c + j]);
      kernels<T>().transpose(to + c * to_stride + r, to_stride, block, width, h, w);
    }
}

// to[position][c] = from[position, c], rows `stride` apart
template <class T, class S>
void pack_columns_last(T* to, int64_t stride, const Positions<S>& strided, int64_t columns) {
  const Positions<S> from = strided.merged();
  for (int64_t y = 0; y < from.outer; ++y) {
    const S* row = from.data + y * from.outer_stride;
    T* out = to + y * from.inner * stride;
    if (from.inner_stride == 1 && from.column_stride != 1) {
      transpose(out, stride, row, from.column_stride, columns, from.inner);
      continue;
    }
    for (int64_t z = 0; z < from.inner; ++z, row += from.inner_stride, out += stride)
      for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<T>(row[c * from.column_stride]);
  }
}

// to[c][position] = from[position, c], rows `stride` apart
template <class T, class S>
void pack_positions_last(T* to, int64_t stride, const Positions<S>& strided, int64_t columns) {
  const Positions<S> from = strided.merged();
  for (int64_t y = 0; y < from.outer; ++y) {
    const S* row = from.data + y * from.outer_stride;
    T* out = to + y * from.inner;
    if (from.column_stride == 1 && from.inner_stride != 1) {
      transpose(out, stride, row, from.inner_stride, from.inner, columns);
      continue;
    }
    for (int64_t c = 0; c < columns; ++c, row += from.column_stride, out += stride)
      for (int64_t z = 0; z < from.inner; ++z) out[z] = static_cast<T>(row[z * from.inner_stride]);
  }
}

// Whether columns compete for the same few cache lines, as those a multiple of half a page apart do.
template <class T>
bool crowded(int64_t stride) {
  return stride * sizeof(T) % 2048 == 0;
}
template <class T>
int64_t spread(int64_t stride) {
  return crowded<T>(stride) ? stride + 16 : stride;
}

// The operand a of one example's products: the tensor's own memory where one stride leads through the positions, else
// a copy.
template <class T, class S>
struct Broadcast {
  const T* data;
  int64_t stride, column;

  static int64_t size(int64_t positions, int64_t columns) { return spread<T>(positions) * columns; }

  Broadcast(const Positions<S>& strided, int64_t columns, const Scratch<T>& scratch) {
    const Positions<S> from = strided.merged();
    if constexpr (std::is_same_v<S, T>)
      if (from.outer == 1 && !crowded<T>(from.column_stride)) {
        data = from.data;
        stride = from.inner_stride;
        column = from.column_stride;
        return;
      }
    data = scratch.get();
    if (from.column_stride == 1) {
      stride = columns;
      column = 1;
      pack_columns_last(scratch.get(), columns, from, columns);
    } else {
      stride = 1;
      column = spread<T>(from.outer * from.inner);
      pack_positions_last(scratch.get(), column, from, columns);
    }
  }
};

// Whether the instruction set in use multiplies values of dtype S as bfloat16 pairs.
template <class S>
bool uses_pairs() {
  if constexpr (std::is_same_v<S, BFloat16>) return kernels<float>().pair_square_sum != nullptr;
  return false;
}

// to[c][r] = from[r][c] for pairs, which are moved as floats of the same size.
inline void transpose_pairs(Pair* to, int64_t to_stride, const Pair* from, int64_t from_stride, int64_t rows,
                            int64_t columns) {
  kernels<float>().transpose(reinterpret_cast<float*>(to), to_stride, reinterpret_cast<const float*>(from), from_stride,
                             rows, columns);
}

// to[c / 2][position] = {from[position, c], from[position, c + 1]}, rows `stride` apart. An odd last column is
// paired with 0.
inline void pack_column_pairs(Pair* to, int64_t stride, const Positions<BFloat16>& strided, int64_t columns) {
  const Positions<BFloat16> from = strided.merged();
  for (int64_t y = 0; y < from.outer; ++y, to += from.inner) {
    const uint16_t* row = bits(from.data) + y * from.outer_stride;
    if (from.column_stride == 1 && columns % 2 == 0 && from.inner_stride % 2 == 0) {
      transpose_pairs(to, stride, reinterpret_cast<const Pair*>(row), from.inner_stride / 2, from.inner, columns / 2);
      continue;
    }
    for (int64_t c = 0; c < columns; c += 2) {
      Pair* out = to + c / 2 * stride;
      const uint16_t *a = row + c * from.column_stride, *b = c + 1 < columns ? a + from.column_stride : nullptr;
      if (b && from.inner_stride == 1) {
        kernels<float>().interleave(out, a, b, from.inner);
        continue;
      }
      for (int64_t z = 0; z < from.inner; ++z)
        out[z] = {a[z * from.inner_stride], b ? b[z * from.inner_stride] : uint16_t(0)};
    }
  }
}

// One zero-padded row of an image, [width][channels], as pairs of pixels `step` apart. `row` has 1 x inner positions,
// and the first of them is pixel `left` of the padded row. `buffer` and `pairs` hold (width + step) * channels
// elements.
inline void pack_pixel_pairs(Pair* to, const Positions<BFloat16>& row, int64_t left, int64_t width, int64_t step,
                             int64_t channels, uint16_t* buffer, Pair* pairs) {
  // No position sees the pixels beyond `width`. They are zero because an odd last position is paired with one of them.
  const int64_t wide = width + step, begin = std::min(left, width), count = std::min(row.inner, width - begin);
  const uint16_t* from = bits(row.data);
  std::fill(buffer, buffer + wide * channels, uint16_t(0));
  if (row.inner_stride == 1 && row.column_stride != 1) {
    for (int64_t c = 0; c < channels; ++c) {
      std::copy(from + c * row.column_stride, from + c * row.column_stride + count, buffer + begin);
      kernels<float>().interleave(pairs + c * width, buffer, buffer + step, width);
    }
    return transpose_pairs(to, channels, pairs, width, channels, width);
  }
  for (int64_t z = 0; z < count; ++z)
    for (int64_t c = 0; c < channels; ++c)
      buffer[(begin + z) * channels + c] = from[z * row.inner_stride + c * row.column_stride];
  kernels<float>().interleave(to, buffer, buffer + step * channels, width * channels);
}

// The cotangent of one example as pairs of adjacent positions in a row. In rows of odd length the last position is
// paired with 0.
struct PairBroadcast {
  const Pair* data;
  int64_t stride, column;

  static int64_t size(const ConvGeometry& s) {
    return spread<float>(s.out_height * ((s.out_width + 1) / 2)) * s.filters;
  }

  PairBroadcast(const Positions<BFloat16>& from, int64_t columns, const Scratch<Pair>& scratch) {
    const int64_t half = (from.inner + 1) / 2;
    const bool even = from.inner % 2 == 0;
    if (even && from.inner_stride == 1 && from.outer_stride == from.inner && from.column_stride % 2 == 0 &&
        !crowded<float>(from.column_stride / 2)) {
      data = reinterpret_cast<const Pair*>(from.data);
      stride = 1;
      column = from.column_stride / 2;
      return;
    }
    data = scratch.get();
    Pair* to = scratch.get();
    if (from.column_stride == 1) {
      stride = columns;
      column = 1;
      for (int64_t y = 0; y < from.outer; ++y)
        for (int64_t j = 0; j < half; ++j, to += columns) {
          const uint16_t* a = bits(from.data) + y * from.outer_stride + 2 * j * from.inner_stride;
          if (2 * j + 1 < from.inner)
            kernels<float>().interleave(to, a, a + from.inner_stride, columns);
          else
            for (int64_t c = 0; c < columns; ++c) to[c] = {a[c], 0};
        }
      return;
    }
    stride = 1;
    column = spread<float>(from.outer * half);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t y = 0; y < from.outer; ++y) {
        const uint16_t* a = bits(from.data) + c * from.column_stride + y * from.outer_stride;
        Pair* row = to + c * column + y * half;
        for (int64_t j = 0; j < half; ++j)
          row[j] = {a[2 * j * from.inner_stride],
                    2 * j + 1 < from.inner ? a[(2 * j + 1) * from.inner_stride] : uint16_t(0)};
      }
  }
};

// gram[p][p'] = sum_r rows[r][p] rows[r][p'] for p' >= p, from rows [count][stride].
template <class T>
void upper_gram(T* gram, int64_t ld, const T* rows, int64_t stride, int64_t count, int64_t positions) {
  const Kernels<T>& k = kernels<T>();
  for (const FilterTile& tile : filter_tiles(1, positions, k.max_height))
    k.store(gram + tile.first * ld + tile.first, ld, rows + tile.first, tile.height, {1, count, 0, stride, stride},
            rows + tile.first, positions - tile.first);
}

inline void upper_gram(float* gram, int64_t ld, const Pair* rows, int64_t stride, int64_t count, int64_t positions) {
  const Kernels<float>& k = kernels<float>();
  for (const FilterTile& tile : filter_tiles(1, positions, k.max_height))
    k.pair_store(gram + tile.first * ld + tile.first, ld, rows + tile.first, tile.height, {1, count, 0, stride, stride},
                 rows + tile.first, positions - tile.first);
}

// Doubles the entries above the diagonal and clears those below, which changes no quadratic form.
template <class T>
void fold_symmetric(T* gram, int64_t ld, int64_t positions) {
  for (int64_t p = 0; p < positions; ++p) {
    T* row = gram + p * ld;
    std::fill(row, row + p, T(0));
    for (int64_t r = p + 1; r < positions; ++r) row[r] *= 2;
  }
}

// q[i] = d_i^T gram d_i for `height` filters with a folded gram; d is [height][positions] with rows `ld` apart.
template <class T>
void quadratic_form(T* q, const T* gram, const T* d, int64_t ld, int height, int64_t positions) {
  const Kernels<T>& k = kernels<T>();
  const int64_t step = 2 * k.width;
  for (int64_t c = 0; c < positions; c += step) {
    const int64_t rows = std::min(c + step, positions);  // entries below the diagonal are zero
    k.dot(q, d + c, ld, d, height, {1, rows, 0, positions, 1, ld}, gram + c, std::min(step, positions - c));
  }
}

// Evaluates sums of squares as quadratic forms of folded Gram matrices.
template <class S>
class QuadraticForms {
 public:
  using T = SumOf<S>;
  QuadraticForms(int64_t positions, int64_t columns)
      : positions_(positions),
        ld_(spread<T>(positions)),
        d_(positions <= few_positions ? positions * columns : kernels<T>().max_height * ld_) {}

  // q[k] += d_k^T K d_k for `count` columns of the cotangent
  void add(T* q, const T* gram, const Positions<S>& cotangent, int64_t count) const {
    if (positions_ <= few_positions) return along_columns(q, gram, cotangent.merged(), count);
    for (const FilterTile& tile : filter_tiles(1, count, kernels<T>().max_height)) {
      pack_positions_last(d_.get(), ld_, cotangent.from_column(tile.first), tile.height);
      quadratic_form(q + tile.first, gram, d_.get(), ld_, tile.height, positions_);
    }
  }

 private:
  void along_columns(T* q, const T* gram, const Positions<S>& cotangent, int64_t count) const {
    if constexpr (std::is_same_v<S, T>)
      if (cotangent.outer == 1 && cotangent.column_stride == 1)
        return kernels<T>().form(q, gram, positions_, cotangent.data, cotangent.inner_stride, count);
    pack_columns_last(d_.get(), count, cotangent, count);
    kernels<T>().form(q, gram, positions_, d_.get(), count, count);
  }

  const int64_t positions_, ld_;
  const Scratch<T> d_;
};

// Calls work(example, first tile, last tile) in parallel. Where examples are fewer than threads, workers also share the
// tiles of an example. The division of the work changes no result.
template <class Work>
void parallel_examples(int64_t examples, int64_t tiles, const Work& work) {
  const int64_t threads = num_threads();
  const int64_t shares =
      examples >= threads ? 1 : std::min(tiles, (threads + examples - 1) / std::max<int64_t>(examples, 1));
  parallel_for(0, examples * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t share = unit % shares;
      work(unit / shares, share * tiles / shares, (share + 1) * tiles / shares);
    }
  });
}

}  // namespace t2v
