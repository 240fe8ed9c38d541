// The Winograd path of sq_conv: 3x3 gradients of stride 1 by F(3x3, 4x4), squared and reduced like the explicit ones.
#include "sq_conv.h"

namespace t2v {
namespace {

template <class S>
class WinogradPath {
 public:
  using T = SumOf<S>;

  explicit WinogradPath(const Conv<S>& conv) : conv_(conv), s(conv.s), tiles(conv.tiles) {}

  void sums(T* q) const {
    parallel_examples(conv_.examples, tiles.size(), [&](int64_t n, int64_t first, int64_t last) {
      const WinogradExample example(conv_);
      example.load_input(n);
      for (int64_t m = n; m < conv_.rows; m += conv_.examples) {
        example.load_cotangent(m);
        for (int64_t t = first; t < last; ++t)
          kernels<T>().winograd_sum(q + m * s.filters + tiles[t].first, example.operands(), tiles[t].first,
                                    tiles[t].height, s.channels);
      }
    });
  }

  void accumulate(T* sums, const T* weight) const {
    parallel_for(0, tiles.size(), 1, [&](int64_t first, int64_t last) {
      const WinogradExample example(conv_);
      for (int64_t n = 0; n < conv_.examples; ++n) {
        example.load_input(n);
        for (int64_t m = n; m < conv_.rows; m += conv_.examples) {
          example.load_cotangent(m);
          for (int64_t t = first; t < last; ++t)
            kernels<T>().winograd_add(sums + tiles[t].first * conv_.gradient_size(), conv_.gradient_size(), weight[m],
                                      example.operands(), tiles[t].first, tiles[t].height, s.channels);
        }
      }
    });
  }

 private:
  // One example in tiles of 4x4 positions. Its operands are transformed once for all filters.
  class WinogradExample {
   public:
    explicit WinogradExample(const Conv<S>& conv)
        : conv_(conv),
          high_((conv.s.out_height + 3) / 4),
          wide_((conv.s.out_width + 3) / 4),
          x_stride_(whole(conv.s.channels)),
          g_stride_(whole(conv.s.filters)),
          image_(std::max((4 * high_ + 2) * (4 * wide_ + 2) * x_stride_, 16 * high_ * wide_ * g_stride_)),
          x_(36 * high_ * wide_ * x_stride_),
          g_(36 * high_ * wide_ * g_stride_) {}

    void load_input(int64_t n) const {
      const ConvGeometry& s = conv_.s;
      conv_.embed(image_.get(), 4 * high_ + 2, 4 * wide_ + 2, x_stride_, conv_.input(n), s.pad_h, s.pad_w, s.channels);
      for_tiles(4 * wide_ + 2, x_stride_, x_, kernels<T>().winograd_input, s.channels);
    }
    void load_cotangent(int64_t m) const {
      const ConvGeometry& s = conv_.s;
      conv_.embed(image_.get(), 4 * high_, 4 * wide_, g_stride_, conv_.cotangent(m), 0, 0, s.filters);
      for_tiles(4 * wide_, g_stride_, g_, kernels<T>().winograd_cotangent, s.filters);
    }
    Winograd<T> operands() const { return {high_ * wide_, x_.get(), x_stride_, g_.get(), g_stride_}; }

   private:
    static int64_t whole(int64_t count) {
      const int64_t width = kernels<T>().width;
      return (count + width - 1) / width * width;
    }
    template <class Transform>
    void for_tiles(int64_t image_width, int64_t pixel, const Scratch<T>& to, Transform transform,
                   int64_t channels) const {
      for (int64_t y = 0; y < high_; ++y)
        for (int64_t x = 0; x < wide_; ++x)
          transform(to.get() + (y * wide_ + x) * pixel, high_ * wide_ * pixel,
                    image_.get() + 4 * (y * image_width + x) * pixel, image_width * pixel, pixel, channels);
    }

    const Conv<S>& conv_;
    const int64_t high_, wide_, x_stride_, g_stride_;
    const Scratch<T> image_, x_, g_;
  };

  const Conv<S>& conv_;
  const ConvGeometry& s;
  const std::vector<FilterTile>& tiles;
};

}  // namespace

template <class S>
void winograd_sums(const Conv<S>& conv, SumOf<S>* q) {
  WinogradPath<S>(conv).sums(q);
}

template <class S>
void winograd_accumulate(const Conv<S>& conv, SumOf<S>* sums, const SumOf<S>* weight) {
  WinogradPath<S>(conv).accumulate(sums, weight);
}

#define T2V_INSTANTIATE(T)                                \
  template void winograd_sums(const Conv<T>&, SumOf<T>*); \
  template void winograd_accumulate(const Conv<T>&, SumOf<T>*, const SumOf<T>*);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v
