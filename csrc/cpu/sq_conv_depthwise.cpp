// The explicit path of sq_conv for depthwise convolutions, whose filters see one input channel each.
#include "sq_conv.h"

namespace t2v {
namespace {

template <class S>
class Depthwise {
 public:
  using T = SumOf<S>;

  explicit Depthwise(const Conv<S>& conv) : conv_(conv), s(conv.s) {}

  void sums(T* q) const {
    parallel_examples(conv_.examples, channel_blocks(), [&](int64_t n, int64_t first, int64_t last) {
      first *= kernels<T>().width;
      const int64_t count = std::min(last * kernels<T>().width, s.channels) - first;
      gradients(n, first, count, [&](int64_t m, int64_t j, const T* gradient) {
        for (int64_t t = 0; t < conv_.gradient_size(); ++t)
          for (int64_t c = 0; c < count; ++c) {
            const T value = gradient[t * count + c];
            q[m * s.filters + (first + c) * s.group_filters() + j] += value * value;
          }
      });
    });
  }

  void accumulate(T* sums, const T* weight) const {
    parallel_for(0, channel_blocks(), 1, [&](int64_t first, int64_t last) {
      first *= kernels<T>().width;
      const int64_t count = std::min(last * kernels<T>().width, s.channels) - first;
      for (int64_t n = 0; n < conv_.examples; ++n)
        gradients(n, first, count, [&](int64_t m, int64_t j, const T* gradient) {
          for (int64_t c = 0; c < count; ++c)
            for (int64_t t = 0; t < conv_.gradient_size(); ++t) {
              const T value = gradient[t * count + c];
              sums[((first + c) * s.group_filters() + j) * conv_.gradient_size() + t] += weight[m] * value * value;
            }
        });
    });
  }

 private:
  // Calls use(m, multiple, G) with the gradients G [kernel size][channels] of the `multiple`-th filter of each of
  // `channels` channels. Channels are the vectors, and taps are the registers of a tile.
  template <class Use>
  void gradients(int64_t n, int64_t first, int64_t channels, const Use& use) const {
    const int64_t taps = s.kernel_h * s.kernel_w, multiples = s.group_filters(), width = s.padded_width();
    const Scratch<T> padded(s.padded_height() * width * channels), cotangents(s.positions() * channels);
    const Scratch<T> gradient(taps * channels);
    std::vector<int64_t> offsets;
    for (int64_t h = 0; h < s.kernel_h; ++h)
      for (int64_t w = 0; w < s.kernel_w; ++w)
        offsets.push_back((h * s.dilation_h * width + w * s.dilation_w) * channels);
    const Rows window{s.out_height, s.out_width, s.stride_h * width * channels, s.stride_w * channels, channels};
    conv_.embed(padded.get(), s.padded_height(), width, channels, conv_.input(n).from_column(first), s.pad_h, s.pad_w,
                channels);
    for (int64_t m = n; m < conv_.rows; m += conv_.examples)
      for (int64_t j = 0; j < multiples; ++j) {
        Positions<S> from =
            conv_.cotangent(m).from_column(first * multiples + j);  // of filter c * multiples + j, column c
        from.column_stride *= multiples;
        pack_columns_last(cotangents.get(), channels, from, channels);
        kernels<T>().taps(gradient.get(), channels, cotangents.get(), window, padded.get(), offsets.data(),
                          static_cast<int>(taps), channels);
        use(m, j, gradient.get());
      }
  }

  // Vectors of channels, which workers share like the tiles of the other paths.
  int64_t channel_blocks() const { return (s.channels + kernels<T>().width - 1) / kernels<T>().width; }

  const Conv<S>& conv_;
  const ConvGeometry& s;
};

}  // namespace

template <class S>
void depthwise_sums(const Conv<S>& conv, SumOf<S>* q) {
  Depthwise<S>(conv).sums(q);
}

template <class S>
void depthwise_accumulate(const Conv<S>& conv, SumOf<S>* sums, const SumOf<S>* weight) {
  Depthwise<S>(conv).accumulate(sums, weight);
}

#define T2V_INSTANTIATE(T)                                 \
  template void depthwise_sums(const Conv<T>&, SumOf<T>*); \
  template void depthwise_accumulate(const Conv<T>&, SumOf<T>*, const SumOf<T>*);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v
