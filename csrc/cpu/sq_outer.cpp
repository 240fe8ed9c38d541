// Squared per-example gradients of a linear layer, summed over tokens.
#include "segments.h"

namespace t2v {
namespace {

template <class S>
class Outer {
 public:
  using T = SumOf<S>;

  Outer(const View& x, const View& g)
      : examples(x.size(0)),
        rows(g.size(0)),
        positions(x.size(1)),
        inputs(x.size(2)),
        outputs(g.size(2)),
        tiles(filter_tiles(1, outputs, kernels<T>().max_height)),
        x_(x),
        g_(g) {}

  static Positions<S> of(const View& t, int64_t row, int64_t count = 1) {
    return {t.const_data_ptr<S>() + row * t.stride(0), count, t.size(1), t.stride(0), t.stride(1), t.stride(2)};
  }

  // For one token the gradient has rank one, so q = g^2 |x|^2.
  void single_sums(T* q) const {
    parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> input(inputs);
      for (int64_t n = begin; n < end; ++n) {
        pack_columns_last(input.get(), inputs, of(x_, n), inputs);
        const T norm = kernels<T>().shifted_dot(input.get(), input.get(), T(0), inputs);
        for (int64_t m = n; m < rows; m += examples) {
          const Positions<S> g = of(g_, m);
          for (int64_t o = 0; o < outputs; ++o) {
            const T value = static_cast<T>(g.data[o * g.column_stride]);
            q[m * outputs + o] = value * value * norm;
          }
        }
      }
    });
  }

  void explicit_sums(T* q) const {
    parallel_examples(examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<T> input(positions * inputs), scratch(Broadcast<T, S>::size(positions, outputs));
      pack_columns_last(input.get(), inputs, of(x_, n), inputs);
      for (int64_t m = n; m < rows; m += examples) {
        const Broadcast<T, S> g(of(g_, m), outputs, scratch);
        for (int64_t t = first; t < last; ++t)
          kernels<T>().square_sum(q + m * outputs + tiles[t].first, g.data + tiles[t].first * g.column, tiles[t].height,
                                  token_rows(g), input.get(), inputs);
      }
    });
  }

  // q[m, o] = g_o^T (x x^T) g_o
  void gram_sums(T* q) const {
    parallel_examples(examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const Scratch<T> input(inputs * positions), gram(positions * positions);
      const QuadraticForms<S> forms(positions, outputs);
      pack_positions_last(input.get(), positions, of(x_, n), inputs);
      upper_gram(gram.get(), positions, input.get(), positions, inputs, positions);
      fold_symmetric(gram.get(), positions, positions);
      const int64_t begin = tiles[first].first, end = tiles[last - 1].first + tiles[last - 1].height;
      for (int64_t m = n; m < rows; m += examples)
        forms.add(q + m * outputs + begin, gram.get(), of(g_, m).from_column(begin), end - begin);
    });
  }

  // out [O, I] += sum_m weight[m] G_m^2; each worker owns a share of the filters.
  void accumulate(T* out, const T* weight) const {
    positions < rows_together ? accumulate_together(out, weight) : accumulate_each(out, weight);
  }

  // With many tokens, reading and writing the squares takes little of the time of an example.
  void accumulate_each(T* out, const T* weight) const {
    parallel_for(0, tiles.size(), 1, [&](int64_t first, int64_t last) {
      const Scratch<T> input(positions * inputs), scratch(Broadcast<T, S>::size(positions, outputs));
      for (int64_t n = 0; n < examples; ++n) {
        pack_columns_last(input.get(), inputs, of(x_, n), inputs);
        for (int64_t m = n; m < rows; m += examples) {
          const Broadcast<T, S> g(of(g_, m), outputs, scratch);
          for (int64_t t = first; t < last; ++t)
            kernels<T>().square_add(out + tiles[t].first * inputs, inputs, weight[m],
                                    g.data + tiles[t].first * g.column, tiles[t].height, token_rows(g), input.get(),
                                    inputs);
        }
      }
    });
  }

  void accumulate_together(T* out, const T* weight) const {
    const int64_t step = tiles_together<T>(tiles.size(), positions, 1), blocks = (tiles.size() + step - 1) / step;
    const int64_t together = std::max<int64_t>(1, rows_together / positions);
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Segments<T> some;
      for (int64_t block = begin; block < end; ++block) {
        const FilterTile* first = tiles.data() + block * step;
        const FilterTile* last = tiles.data() + std::min<int64_t>((block + 1) * step, tiles.size());
        for (int64_t n = 0; n < examples; n += together) {
          const int64_t count = std::min(together, examples - n);
          for (int64_t m = n; m < rows; m += examples) {
            some.clear();
            for (int64_t k = 0; k < count; ++k) some.add(positions, weight[m + k]);
            some.add_squares(out, of(x_, n, count), inputs, of(g_, m, count), first, last);
          }
        }
      }
    });
  }

  const int64_t examples, rows, positions, inputs, outputs;
  const std::vector<FilterTile> tiles;

 private:
  Rows token_rows(const Broadcast<T, S>& g) const { return {1, positions, 0, inputs, g.stride, g.column}; }

  const View &x_, &g_;
};

Tensor sq_outer(const Tensor& x, const Tensor& g, std::string_view path) {
  check_path("sq_outer", path, {"explicit", "gram"});
  check_outer("sq_outer", x, g);
  const Tensor q = zeros({g.size(0), g.size(2)}, sum_type(g));
  if (q.numel() == 0 || x.numel() == 0) return q;
  with_type("sq_outer", g.scalar_type(), [&]<class scalar_t>() {
    const Outer<scalar_t> outer(x, g);
    auto* sums = q.mutable_data_ptr<SumOf<scalar_t>>();
    if (path == "gram")
      outer.gram_sums(sums);
    else if (outer.positions == 1)
      outer.single_sums(sums);
    else
      outer.explicit_sums(sums);
  });
  return q;
}

void sq_outer_acc_(const Tensor& out, const Tensor& x, const Tensor& g, const Tensor& weight) {
  check_outer("sq_outer_acc_", x, g);
  check_accumulator("sq_outer_acc_", out, {g.size(2), x.size(2)}, g, weight);
  if (g.numel() == 0 || x.numel() == 0) return;
  const Tensor w = contiguous(weight);
  with_type("sq_outer_acc_", g.scalar_type(), [&]<class scalar_t>() {
    using T = SumOf<scalar_t>;
    Outer<scalar_t>(x, g).accumulate(out.mutable_data_ptr<T>(), w.const_data_ptr<T>());
  });
}

STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m) {
  T2V_IMPL(sq_outer);
  T2V_IMPL(sq_outer_acc_);
}

}  // namespace
}  // namespace t2v
