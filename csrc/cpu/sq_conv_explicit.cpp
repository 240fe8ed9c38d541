// The explicit path of sq_conv: each gradient in register tiles, which are squared and reduced at once.
#include "sq_conv.h"

namespace t2v {
namespace {

// Contiguous columns of a tile in the zero-padded channels-last image: `offset` is where they start, and `result` is
// their place in a gradient laid out [kernel_h, kernel_w, channels].
struct Block {
  int64_t offset, columns, result;
};

std::vector<Block> column_blocks(const ConvGeometry& s) {
  const int64_t channels = s.group_channels(), row = s.padded_width() * s.channels;
  std::vector<Block> blocks;
  for (int64_t h = 0; h < s.kernel_h; ++h) {
    if (s.groups == 1 && s.dilation_w == 1) {
      // A kernel row and its channels are contiguous: a stem of 3 channels and width 7 is one block of 21 columns.
      blocks.push_back({h * s.dilation_h * row, s.kernel_w * channels, h * s.kernel_w * channels});
      continue;
    }
    for (int64_t w = 0; w < s.kernel_w; ++w)
      blocks.push_back(
          {h * s.dilation_h * row + w * s.dilation_w * s.channels, channels, (h * s.kernel_w + w) * channels});
  }
  return blocks;
}

template <class S>
class Explicit {
 public:
  using T = SumOf<S>;

  explicit Explicit(const Conv<S>& conv) : conv_(conv), s(conv.s), tiles(conv.tiles), blocks(column_blocks(conv.s)) {}

  // q [M, O]
  void sums(T* q) const {
    if (filters_are_vectors()) {
      const int64_t step = s.stride_w * s.channels;
      if constexpr (std::is_same_v<S, T>)
        return sums_by_filters<T, Broadcast<T, S>>(
            q, cotangent_size(), s.out_width, step, [&](T* to, int64_t n) { conv_.pad(to, n); },
            kernels<T>().square_add);
      if constexpr (std::is_same_v<S, BFloat16>)
        return sums_by_filters<Pair, PairBroadcast>(
            q, PairBroadcast::size(s), (s.out_width + 1) / 2, 2 * step, [&](Pair* to, int64_t n) { pad_pairs(to, n); },
            kernels<T>().pair_square_add);
    }
    if constexpr (std::is_same_v<S, BFloat16>)
      if (uses_pairs<S>()) return pair_sums(q);
    parallel_examples(conv_.examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<T> padded(conv_.padded_size()), scratch(cotangent_size());
      conv_.pad(padded.get(), n);
      for (int64_t m = n; m < conv_.rows; m += conv_.examples) {
        const Broadcast<T, S> g(conv_.cotangent(m), s.filters, scratch);
        for (int64_t t = first; t < last; ++t)
          for (const Block& block : blocks)
            kernels<T>().square_sum(q + m * s.filters + conv_.filter(tiles[t]),
                                    g.data + conv_.filter(tiles[t]) * g.column, tiles[t].height, window_rows(g),
                                    padded.get() + block.offset + tiles[t].group * s.group_channels(), block.columns);
      }
    });
  }

  // sums [O, kernel_h, kernel_w, C / groups] += sum_m weight[m] G_m^2; each worker owns a share of the filters.
  void accumulate(T* sums, const T* weight) const {
    parallel_for(0, tiles.size(), 1, [&](int64_t first, int64_t last) {
      const Scratch<T> padded(conv_.padded_size()), scratch(cotangent_size());
      for (int64_t n = 0; n < conv_.examples; ++n) {
        conv_.pad(padded.get(), n);
        for (int64_t m = n; m < conv_.rows; m += conv_.examples) {
          const Broadcast<T, S> g(conv_.cotangent(m), s.filters, scratch);
          for (int64_t t = first; t < last; ++t)
            for (const Block& block : blocks)
              kernels<T>().square_add(sums + conv_.filter(tiles[t]) * conv_.gradient_size() + block.result,
                                      conv_.gradient_size(), weight[m], g.data + conv_.filter(tiles[t]) * g.column,
                                      tiles[t].height, window_rows(g),
                                      padded.get() + block.offset + tiles[t].group * s.group_channels(), block.columns);
        }
      }
    });
  }

 private:
  int64_t cotangent_size() const { return Broadcast<T, S>::size(s.positions(), s.filters); }

  Rows window_rows(const Broadcast<T, S>& g) const {
    const int64_t pixel = s.channels;
    return {s.out_height, s.out_width, s.stride_h * s.padded_width() * pixel, s.stride_w * pixel, g.stride, g.column};
  }

  // One example's input as pairs of the pixels that two adjacent positions see, in the layout of Conv::pad.
  void pad_pairs(Pair* to, int64_t n) const {
    const int64_t longest = (s.padded_width() + s.stride_w) * s.channels;
    const Scratch<uint16_t> buffer(longest);
    const Scratch<Pair> pairs(longest);
    const Positions<S> from = conv_.input(n);
    const int64_t width = s.padded_width();
    for (int64_t y = 0; y < s.padded_height(); ++y, to += width * s.channels) {
      const int64_t row = y - s.pad_h;
      if (row < 0 || row >= from.outer)
        std::fill(to, to + width * s.channels, Pair{0, 0});
      else
        pack_pixel_pairs(to,
                         {from.data + row * from.outer_stride, 1, from.inner, 0, from.inner_stride, from.column_stride},
                         s.pad_w, width, s.stride_w, s.channels, buffer.get(), pairs.get());
    }
  }

  void pair_sums(T* q) const {
    parallel_examples(conv_.examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<Pair> padded(conv_.padded_size()), scratch(PairBroadcast::size(s));
      pad_pairs(padded.get(), n);
      for (int64_t m = n; m < conv_.rows; m += conv_.examples) {
        const PairBroadcast g(conv_.cotangent(m), s.filters, scratch);
        const Rows window{s.out_height,
                          (s.out_width + 1) / 2,
                          s.stride_h * s.padded_width() * s.channels,
                          2 * s.stride_w * s.channels,
                          g.stride,
                          g.column};
        for (int64_t t = first; t < last; ++t)
          for (const Block& block : blocks)
            kernels<T>().pair_square_sum(
                q + m * s.filters + conv_.filter(tiles[t]), g.data + conv_.filter(tiles[t]) * g.column, tiles[t].height,
                window, padded.get() + block.offset + tiles[t].group * s.group_channels(), block.columns);
      }
    });
  }

  // Whether to take filters as the vectors and to broadcast columns of the image. The usual order takes columns as the
  // vectors, but a stem's 21 columns fill only two thirds of two vectors.
  bool filters_are_vectors() const {
    if (!(std::is_same_v<S, T> || uses_pairs<S>()) || s.groups != 1 || !conv_.filters_are_contiguous()) return false;
    const int64_t width = kernels<T>().width, columns = blocks[0].columns;
    return s.filters % width == 0 && columns % width != 0 && columns >= 8 && columns < 4 * width;
  }

  // q [M, O] with filters as vectors. Operands E are values, or pairs of adjacent positions. A row of positions has
  // `wide` operands, which are `step` elements apart in the padded image. G is the layout of one example's cotangent.
  template <class E, class G, class Pad, class Add>
  void sums_by_filters(T* q, int64_t scratch_size, int64_t wide, int64_t step, const Pad& pad, const Add& add) const {
    const int64_t vectors = 2 * kernels<T>().width, row = s.padded_width() * s.channels;
    const std::vector<FilterTile> columns =
        filter_tiles(1, blocks[0].columns, kernels<T>().max_height);  // all blocks are equal
    parallel_examples(conv_.examples, (s.filters + vectors - 1) / vectors, [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<E> padded(conv_.padded_size()), scratch(scratch_size);
      pad(padded.get(), n);
      for (int64_t m = n; m < conv_.rows; m += conv_.examples) {
        const G g(conv_.cotangent(m), s.filters, scratch);
        const Rows window{s.out_height, wide, wide * g.stride, g.stride, step, 1, s.stride_h * row - wide * step};
        for (int64_t o = first * vectors; o < std::min(last * vectors, s.filters); o += vectors)
          for (const Block& block : blocks)
            for (const FilterTile& tile : columns)
              add(q + m * s.filters + o, 0, T(1), padded.get() + block.offset + tile.first, tile.height, window,
                  g.data + o, std::min(vectors, s.filters - o));
      }
    });
  }

  const Conv<S>& conv_;
  const ConvGeometry& s;
  const std::vector<FilterTile>& tiles;
  const std::vector<Block> blocks;
};

}  // namespace

template <class S>
void explicit_sums(const Conv<S>& conv, SumOf<S>* q) {
  Explicit<S>(conv).sums(q);
}

template <class S>
void explicit_accumulate(const Conv<S>& conv, SumOf<S>* sums, const SumOf<S>* weight) {
  Explicit<S>(conv).accumulate(sums, weight);
}

#define T2V_INSTANTIATE(T)                                \
  template void explicit_sums(const Conv<T>&, SumOf<T>*); \
  template void explicit_accumulate(const Conv<T>&, SumOf<T>*, const SumOf<T>*);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v
