// Copies of one example in the layouts that the tiles want, converted to the type of the sums.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../checks.h"
#include "../geometry.h"
#include "tile.h"

namespace t2v {

// float64 sums for float64, float32 sums for everything narrower.
template <class S>
using SumOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Uninitialised memory that lives as long as one worker's share; `slack` elements may be read beyond its end.
template <class T>
class Scratch {
 public:
  static constexpr int64_t slack = 64;
  explicit Scratch(int64_t size) : data_(new T[size + slack]) {}
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

// Consecutive filters of one group that share a register tile.
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

  int64_t count() const { return outer * inner; }
};

// to[position][i] = from[position, first + i]
template <class T, class S>
void pack_panel(T* to, const Positions<S>& from, int64_t first, int height) {
  for (int64_t y = 0; y < from.outer; ++y) {
    const S* p = from.data + y * from.outer_stride + first * from.column_stride;
    for (int64_t z = 0; z < from.inner; ++z, p += from.inner_stride, to += height)
      for (int i = 0; i < height; ++i) to[i] = static_cast<T>(p[i * from.column_stride]);
  }
}

// to[position][c] = from[position, first + c], rows `stride` apart
template <class T, class S>
void pack_columns_last(T* to, int64_t stride, const Positions<S>& from, int64_t first, int64_t columns) {
  constexpr int64_t block = 16;  // columns that are read together, where they are far apart
  for (int64_t y = 0; y < from.outer; ++y) {
    const S* row = from.data + y * from.outer_stride + first * from.column_stride;
    T* out = to + y * from.inner * stride;
    if (from.column_stride == 1) {
      for (int64_t z = 0; z < from.inner; ++z)
        for (int64_t c = 0; c < columns; ++c) out[z * stride + c] = static_cast<T>(row[z * from.inner_stride + c]);
      continue;
    }
    for (int64_t c0 = 0; c0 < columns; c0 += block) {
      const int64_t end = std::min(c0 + block, columns);
      for (int64_t z = 0; z < from.inner; ++z)
        for (int64_t c = c0; c < end; ++c)
          out[z * stride + c] = static_cast<T>(row[z * from.inner_stride + c * from.column_stride]);
    }
  }
}

// to[c][position] = from[position, first + c], rows `stride` apart
template <class T, class S>
void pack_positions_last(T* to, int64_t stride, const Positions<S>& from, int64_t first, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t y = 0; y < from.outer; ++y) {
      const S* p = from.data + y * from.outer_stride + (first + c) * from.column_stride;
      T* out = to + c * stride + y * from.inner;
      for (int64_t z = 0; z < from.inner; ++z) out[z] = static_cast<T>(p[z * from.inner_stride]);
    }
}

// gram[p][p'] = sum_r rows[r][p] rows[r][p'] for p' >= p, from rows [count][stride]; `panel` holds count * max_height.
template <class T>
void upper_gram(T* gram, int64_t ld, const T* rows, int64_t stride, int64_t count, int64_t positions, T* panel) {
  const Kernels<T>& k = kernels<T>();
  const Positions<T> source{rows, 1, count, 0, stride, 1};
  for (const FilterTile& tile : filter_tiles(1, positions, k.max_height)) {
    pack_panel(panel, source, tile.first, tile.height);
    k.store(gram + tile.first * ld + tile.first, ld, panel, tile.height, {1, count, 0, stride}, rows + tile.first,
            positions - tile.first);
  }
}

// Doubles what is above the diagonal and clears what is below, so that the upper half stands for the whole.
template <class T>
void fold_symmetric(T* gram, int64_t ld, int64_t positions) {
  for (int64_t p = 0; p < positions; ++p) {
    T* row = gram + p * ld;
    std::fill(row, row + p, T(0));
    for (int64_t r = p + 1; r < positions; ++r) row[r] *= 2;
  }
}

// q[i] = d_i^T gram d_i for the filters of a tile, gram folded; d [.., positions] of the group and its panel.
template <class T>
void quadratic_form(T* q, const T* gram, int64_t ld, const T* d, int64_t d_ld, const T* panel, int height,
                    int64_t positions) {
  const Kernels<T>& k = kernels<T>();
  const int64_t step = 2 * k.width;
  for (int64_t c = 0; c < positions; c += step) {
    const int64_t rows = std::min(c + step, positions);  // below the diagonal there are zeros
    k.dot(q, d + c, d_ld, panel, height, {1, rows, 0, ld}, gram + c, std::min(step, positions - c));
  }
}

// Work on n examples in parallel, and on shares of each example's tiles where examples are fewer than threads:
// work(example, first tile, last tile). Which worker does a tile changes no result.
template <class Work>
void parallel_examples(int64_t examples, int64_t tiles, const Work& work) {
  const int64_t threads = at::get_num_threads();
  const int64_t shares =
      examples >= threads ? 1 : std::min(tiles, (threads + examples - 1) / std::max<int64_t>(examples, 1));
  at::parallel_for(0, examples * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t share = unit % shares;
      work(unit / shares, share * tiles / shares, (share + 1) * tiles / shares);
    }
  });
}

#define T2V_DISPATCH(TYPE, NAME, ...) AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, TYPE, NAME, __VA_ARGS__)

}  // namespace t2v
