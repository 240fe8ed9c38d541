// Squared gradients of matrices that each see some of the rows: an expert and an example have the rows from one offset
// to the next.
#include <atomic>

#include "segments.h"

namespace t2v {
namespace {

// The gram path takes about 4/3 times as long for a flop as the explicit path (measured).
bool gram_is_faster(int64_t count, int64_t inputs, int64_t outputs) {
  return 4 * count * (inputs + outputs) <= 3 * 2 * inputs * outputs;
}

void check_offsets(const char* op, const char* name, const View& offsets, int64_t last) {
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  for (int64_t k = 0, before = 0; k < offsets.size(0); before = at[k++])
    if (at[k] < before || at[k] > last)
      throw std::out_of_range(text(op, ": ", name, "[", k, "] is ", at[k], " after ", before,
                                   ", which is out of range: expected growing numbers up to ", last));  // IndexError
}

// Calls work(unit) for all units. Each worker takes the next unit, because some take much longer than others.
template <class Work>
void parallel_units(int64_t units, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(units, num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t unit = next++; unit < units; unit = next++) work(unit);
  });
}

template <class S>
class Grouped {
 public:
  using T = SumOf<S>;

  Grouped(const View& x, const View& g, const View& offsets)
      : rows(x.size(0)),
        inputs(x.size(1)),
        outputs(g.size(1)),
        segments(offsets.size(0) - 1),
        cotangents(rows ? g.size(0) / rows : 0),
        tiles(filter_tiles(1, outputs, kernels<T>().max_height)),
        offsets_(offsets.const_data_ptr<int64_t>()),
        x_(x),
        g_(g) {}

  void sums(T* q) const {
    const int64_t shares = std::min<int64_t>(tiles.size(), segments < 4 * num_threads() ? num_threads() : 1);
    parallel_units(segments * shares, [&](int64_t unit) {
      const int64_t b = unit / shares, share = unit % shares, count = size(b);
      const int64_t first = share * tiles.size() / shares, last = (share + 1) * tiles.size() / shares;
      if (count == 0) return;
      if (gram_is_faster(count, inputs, outputs))
        gram_sums(q, b, first, last);
      else
        explicit_sums(q, b, first, last);
    });
  }

  // out [E, O, I] += sum over the segments b of each group of weight[b] G_b^2
  void accumulate(T* out, const int64_t* groups, int64_t count, const T* weight) const {
    // With few registers, no tile is higher than those that leave room for squares, and only the packed input counts.
    const bool has_higher_tiles = kernels<T>().max_height > segment_height;
    int64_t longest = 0;
    for (int64_t b = 0; b < segments; ++b) longest = std::max(longest, size(b));
    const int64_t step = tiles_together<T>(tiles.size(), longest, count), blocks = (tiles.size() + step - 1) / step;
    parallel_units(count * blocks, [&](int64_t unit) {
      const int64_t e = unit / blocks, first = unit % blocks * step;
      const int64_t last = std::min<int64_t>(first + step, tiles.size());
      Segments<T> some;
      for (int64_t b = groups[e], end; b < groups[e + 1]; b = end) {
        if (size(b) >= rows_together && has_higher_tiles) {
          add_squares(out + e * outputs * inputs, b, weight, first, last);
          end = b + 1;
          continue;
        }
        for (end = b + 1; end < groups[e + 1] && offsets_[end + 1] - offsets_[b] <= rows_together;) ++end;
        if (offsets_[end] == offsets_[b]) continue;
        for (int64_t k = 0; k < cotangents; ++k) {
          some.clear();
          for (int64_t s = b; s < end; ++s) some.add(size(s), weight[k * segments + s]);
          some.add_squares(out + e * outputs * inputs, part(x_, b, end, 0), inputs, part(g_, b, end, k), &tiles[first],
                           &tiles[first] + last - first);
        }
      }
    });
  }

  const int64_t rows, inputs, outputs, segments, cotangents;
  const std::vector<FilterTile> tiles;

 private:
  int64_t size(int64_t b) const { return offsets_[b + 1] - offsets_[b]; }
  // The rows of the segments from b to `end` in t, in its k-th part of `rows` rows.
  Positions<S> part(const View& t, int64_t b, int64_t end, int64_t k) const {
    const S* data = t.const_data_ptr<S>() + (k * rows + offsets_[b]) * t.stride(0);
    return {data, 1, offsets_[end] - offsets_[b], 0, t.stride(0), t.stride(1)};
  }
  static Rows with(Rows order, int64_t stride) {
    order.inner_stride = stride;
    return order;
  }

  // The input of a segment as the vector operand: the tensor's own memory where whole vectors are read from it.
  struct Columns {
    Columns(const Grouped& of, int64_t b) : scratch(in_place(of) ? 0 : of.size(b) * of.inputs) {
      const Positions<S> from = of.part(of.x_, b, b + 1, 0);
      if constexpr (std::is_same_v<S, T>)
        if (in_place(of)) {
          data = from.data;
          stride = from.inner_stride;
          return;
        }
      data = scratch.get();
      stride = of.inputs;
      pack_columns_last(scratch.get(), of.inputs, from, of.inputs);
    }
    static bool in_place(const Grouped& of) {
      return std::is_same_v<S, T> && of.x_.stride(1) == 1 && of.inputs % kernels<T>().width == 0;
    }
    const Scratch<T> scratch;
    const T* data;
    int64_t stride;
  };

  // Calls use(tile, first value of g, order of its rows) for tiles of the k-th cotangent of a segment.
  template <class Use>
  void for_tiles(int64_t b, int64_t k, int64_t first, int64_t last, const Use& use) const {
    const int64_t from = tiles[first].first, columns = tiles[last - 1].first + tiles[last - 1].height - from;
    const Scratch<T> scratch(Broadcast<T, S>::size(size(b), columns));
    const Broadcast<T, S> g(part(g_, b, b + 1, k).from_column(from), columns, scratch);
    for (int64_t t = first; t < last; ++t)
      use(tiles[t], g.data + (tiles[t].first - from) * g.column, Rows{1, size(b), 0, 0, g.stride, g.column});
  }

  void explicit_sums(T* q, int64_t b, int64_t first, int64_t last) const {
    const Columns input(*this, b);
    for (int64_t k = 0; k < cotangents; ++k)
      for_tiles(b, k, first, last, [&](const FilterTile& tile, const T* g, const Rows& order) {
        kernels<T>().square_sum(q + (k * segments + b) * outputs + tile.first, g, tile.height,
                                with(order, input.stride), input.data, inputs);
      });
  }

  // out [O, I] += weight[b] G_b^2 for a long segment. Reading and writing the squares takes little of its time, so that
  // all registers hold the gradient.
  void add_squares(T* out, int64_t b, const T* weight, int64_t first, int64_t last) const {
    const Columns input(*this, b);
    for (int64_t k = 0; k < cotangents; ++k)
      for_tiles(b, k, first, last, [&](const FilterTile& tile, const T* g, const Rows& order) {
        kernels<T>().square_add(out + tile.first * inputs, inputs, weight[k * segments + b], g, tile.height,
                                with(order, input.stride), input.data, inputs);
      });
  }

  // q[b, o] = g_o^T (x x^T) g_o
  void gram_sums(T* q, int64_t b, int64_t first, int64_t last) const {
    const int64_t count = size(b), begin = tiles[first].first, end = tiles[last - 1].first + tiles[last - 1].height;
    const Scratch<T> input(inputs * count), gram(count * count);
    const QuadraticForms<S> forms(count, end - begin);
    pack_positions_last(input.get(), count, part(x_, b, b + 1, 0), inputs);
    upper_gram(gram.get(), count, input.get(), count, inputs, count);
    fold_symmetric(gram.get(), count, count);
    for (int64_t k = 0; k < cotangents; ++k)
      forms.add(q + (k * segments + b) * outputs + begin, gram.get(), part(g_, b, b + 1, k).from_column(begin),
                end - begin);
  }

  const int64_t* offsets_;
  const View &x_, &g_;
};

Tensor sq_grouped(const Tensor& x, const Tensor& g, const Tensor& offsets) {
  const int64_t cotangents = check_grouped("sq_grouped", x, g, offsets);
  const Tensor at = contiguous(offsets);
  check_offsets("sq_grouped", "offsets", at, x.size(0));
  const Tensor q = zeros({cotangents * (offsets.size(0) - 1), g.size(1)}, sum_type(g));
  if (q.numel() == 0 || x.numel() == 0) return q;
  with_type("sq_grouped", g.scalar_type(),
            [&]<class scalar_t>() { Grouped<scalar_t>(x, g, at).sums(q.mutable_data_ptr<SumOf<scalar_t>>()); });
  return q;
}

void sq_grouped_acc_(const Tensor& out, const Tensor& x, const Tensor& g, const Tensor& offsets, const Tensor& groups,
                     const Tensor& weight) {
  check_grouped_acc(out, x, g, offsets, groups, weight);
  const Tensor at = contiguous(offsets), of = contiguous(groups), w = contiguous(weight);
  check_offsets("sq_grouped_acc_", "offsets", at, x.size(0));
  check_offsets("sq_grouped_acc_", "groups", of, offsets.size(0) - 1);
  if (g.numel() == 0 || x.numel() == 0) return;
  with_type("sq_grouped_acc_", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    Grouped<scalar_t>(x, g, at).accumulate(out.mutable_data_ptr<T>(), of.const_data_ptr<int64_t>(), out.size(0),
                                           w.const_data_ptr<T>());
  });
}

STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  T2V_IMPL(sq_grouped);
  T2V_IMPL(sq_grouped_acc_);
}

}  // namespace
}  // namespace t2v
