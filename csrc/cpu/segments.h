// Weighted squares of the gradients of many segments of rows, added up by entry of the weight.
#pragma once

#include "pack.h"

namespace t2v {

// Segments are taken together up to this number of rows. Two vectors of so many rows fit into half of the first-level
// cache.
constexpr int64_t rows_together = 128;

// How many tiles of the outputs a worker takes at a time, where `others` other things share them out: the copies of
// their operands stay in the second-level cache, and every thread has several shares.
template <class T>
int64_t tiles_together(int64_t tiles, int64_t rows, int64_t others) {
  constexpr int64_t bytes = int64_t(1) << 18;
  const int64_t cached = bytes / (std::max(rows, rows_together) * kernels<T>().max_height * sizeof(T));
  const int64_t shares = 4 * num_threads();
  return std::max<int64_t>(1, std::min(std::max<int64_t>(4, cached), (tiles * others + shares - 1) / shares));
}

// Consecutive segments, and which of their rows are squared before they are multiplied.
template <class T>
class Segments {
 public:
  void clear() {
    segments_.clear();
    weights_.clear();
  }
  int64_t rows() const { return static_cast<int64_t>(weights_.size()); }

  void add(int64_t rows, T weight) {
    if (rows == 0) return;
    weights_.insert(weights_.end(), rows, weight);
    if (rows == 1 && !segments_.empty() && segments_.back().squares)
      ++segments_.back().rows;
    else
      segments_.push_back({rows, weight, rows == 1});
  }

  // out [O, I] += sum over the segments of weight * G^2 for the rows `x` [rows, I] and `g` [rows, O] and the outputs
  // of some tiles.
  template <class S>
  void add_squares(T* out, const Positions<S>& x, int64_t inputs, const Positions<S>& g, const FilterTile* first,
                   const FilterTile* last) const {
    const int64_t from = first->first, outputs = last[-1].first + last[-1].height - from;
    const int64_t step = 2 * kernels<T>().width, ld = spread<T>(rows());
    const Scratch<T> a(ld * outputs), b(rows() * step);
    const std::vector<FilterTile> tiles = filter_tiles(1, outputs, segment_height);
    pack_positions_last(a.get(), ld, g.from_column(from), outputs);
    for_squares([&](int64_t begin, int64_t end) {
      for (int64_t o = 0; o < outputs; ++o)
        for (T *row = a.get() + o * ld, *at = row + begin; at < row + end; ++at) *at *= *at * weights_[at - row];
    });
    for (int64_t column = 0; column < inputs; column += step) {
      const int64_t columns = std::min(step, inputs - column);
      pack_columns_last(b.get(), step, x.from_column(column), columns);
      for_squares([&](int64_t begin, int64_t end) {
        for (T* at = b.get() + begin * step; at < b.get() + end * step; at += step)
          for (int64_t c = 0; c < columns; ++c) at[c] *= at[c];
      });
      for (const FilterTile& tile : tiles)
        kernels<T>().segments_add(out + (from + tile.first) * inputs + column, inputs, segments_.data(),
                                  static_cast<int64_t>(segments_.size()), a.get() + tile.first * ld, ld, tile.height,
                                  b.get(), columns);
    }
  }

 private:
  // Calls use(first row, row after the last) for rows that are squared before they are multiplied.
  template <class Use>
  void for_squares(const Use& use) const {
    int64_t row = 0;
    for (const Segment<T>& segment : segments_) {
      if (segment.squares) use(row, row + segment.rows);
      row += segment.rows;
    }
  }

  std::vector<Segment<T>> segments_;
  std::vector<T> weights_;  // of each row
};

}  // namespace t2v
