// Checks the kernels of the CPU backend against plain loops in double precision, without torch, so that they can also
// be checked for another processor under emulation. Prints one line for each instruction set, and exits with 1 if a
// kernel is wrong. Values outside of what a kernel may use are NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../../csrc/cpu/tile.h"

namespace {

using namespace t2v;

int checks = 0, wrong = 0;
std::mt19937 generator(0);

template <class T>
std::vector<T> random(size_t n) {
  std::normal_distribution<double> normal;
  std::vector<T> values(n);
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

template <class T>
std::vector<T> nans(size_t n) {
  return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN());
}

// `size` is the sum of the sizes of the terms.
template <class T>
void expect(const char* what, double got, double want, double size, double tolerance = 0) {
  if (tolerance == 0) tolerance = 64 * std::numeric_limits<T>::epsilon();
  ++checks;
  if (std::abs(got - want) <= tolerance * (size + 1e-30)) return;  // false for NaN
  if (++wrong < 10) std::printf("%s: got %.9g, expected %.9g\n", what, got, want);
}

uint16_t narrow(float value) {  // the value must be one of bfloat16
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits >> 16;
}
float rounded(double value) { return std::round(value * 64) / 64; }  // a few bits, which bfloat16 holds exactly
float limited(double value) { return rounded(std::fmax(-2, std::fmin(2, value))); }

// The products of a tile: every height and numbers of columns around the width of a vector.
template <class T>
void products() {
  const Kernels<T>& k = kernels<T>();
  for (int height = 1; height <= k.max_height; ++height)
    for (int64_t columns : {1, k.width - 1, k.width, k.width + 1, 2 * k.width, 4 * k.width + 3}) {
      const int64_t outer = 3, inner = 5, ld = columns + 2;
      const int64_t stride = (columns + 2 * k.width - 1) / k.width * k.width;
      const Rows rows{outer, inner, inner * stride + 7, stride, height + 1};
      std::vector<T> a = random<T>(outer * inner * (height + 1)), b = nans<T>(outer * rows.outer_stride + stride);
      for (int64_t y = 0; y < outer; ++y)
        for (int64_t z = 0; z < inner; ++z)
          for (int64_t c = 0; c < columns; ++c) b[y * rows.outer_stride + z * stride + c] = random<T>(1)[0];
      std::vector<double> g(height * columns), size(height * columns);
      for (int i = 0; i < height; ++i)
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t y = 0; y < outer; ++y)
            for (int64_t z = 0; z < inner; ++z) {
              const double term =
                  double(a[(y * inner + z) * (height + 1) + i]) * double(b[y * rows.outer_stride + z * stride + c]);
              g[i * columns + c] += term;
              size[i * columns + c] += std::abs(term);
            }
      const std::vector<T> d = random<T>(height * ld), before = random<T>(height * ld);
      std::vector<T> sums(height, T(1)), dots(height, T(1)), added = before, stored = before;
      k.square_sum(sums.data(), a.data(), height, rows, b.data(), columns);
      k.dot(dots.data(), d.data(), ld, a.data(), height, rows, b.data(), columns);
      k.square_add(added.data(), ld, T(0.5), a.data(), height, rows, b.data(), columns);
      k.store(stored.data(), ld, a.data(), height, rows, b.data(), columns);
      for (int i = 0; i < height; ++i) {
        double sum = 1, dot = 1, sum_size = 1, dot_size = 1;
        for (int64_t c = 0; c < columns; ++c) {
          const double value = g[i * columns + c], most = size[i * columns + c];
          sum += value * value;
          sum_size += most * most;
          dot += value * d[i * ld + c];
          dot_size += most * std::abs(d[i * ld + c]);
          expect<T>("store", stored[i * ld + c], value, most);
          expect<T>("square_add", added[i * ld + c], before[i * ld + c] + 0.5 * value * value,
                    std::abs(before[i * ld + c]) + most * most);
        }
        expect<T>("square_sum", sums[i], sum, sum_size);
        expect<T>("dot", dots[i], dot, dot_size);
        for (int64_t c = columns; c < ld; ++c) {  // nothing beyond the columns is written
          expect<T>("store beyond", stored[i * ld + c], before[i * ld + c], 0, 1);
          expect<T>("square_add beyond", added[i * ld + c], before[i * ld + c], 0, 1);
        }
      }
    }
}

// The same for bfloat16 pairs, where the instruction set has dot products of them.
void pairs() {
  const Kernels<float>& k = kernels<float>();
  if (!k.pair_store) return;
  for (int height = 1; height <= k.max_height; ++height)
    for (int64_t columns : {1, k.width, 2 * k.width + 1}) {
      const int64_t positions = 6, stride = (columns + 2 * k.width - 1) / k.width * k.width;
      const Rows rows{1, positions, 0, stride, height};
      std::vector<Pair> a(positions * height), b((positions + 1) * stride, Pair{0x7fc0, 0x7fc0});
      std::vector<double> g(height * columns);
      std::vector<float> values[2] = {random<float>(2 * a.size()), random<float>(2 * positions * columns)};
      for (auto& side : values)
        for (float& value : side) value = limited(value);
      for (size_t n = 0; n < a.size(); ++n) a[n] = {narrow(values[0][2 * n]), narrow(values[0][2 * n + 1])};
      for (int64_t s = 0; s < positions; ++s)
        for (int64_t c = 0; c < columns; ++c) {
          const float* two = &values[1][2 * (s * columns + c)];
          b[s * stride + c] = {narrow(two[0]), narrow(two[1])};
          for (int i = 0; i < height; ++i)
            for (int half : {0, 1}) g[i * columns + c] += double(values[0][2 * (s * height + i) + half]) * two[half];
        }
      std::vector<float> stored(height * columns), added(height * columns), sums(height);
      k.pair_store(stored.data(), columns, a.data(), height, rows, b.data(), columns);
      k.pair_square_add(added.data(), columns, 2, a.data(), height, rows, b.data(), columns);
      k.pair_square_sum(sums.data(), a.data(), height, rows, b.data(), columns);
      for (int i = 0; i < height; ++i) {
        double sum = 0;
        for (int64_t c = 0; c < columns; ++c) {
          const double value = g[i * columns + c];
          sum += value * value;
          expect<float>("pair_store", stored[i * columns + c], value, 48);
          expect<float>("pair_square_add", added[i * columns + c], 2 * value * value, 48 * 48);
        }
        expect<float>("pair_square_sum", sums[i], sum, 48. * 48 * columns);
      }
    }
}

template <class T>
void forms_and_sums() {
  const Kernels<T>& k = kernels<T>();
  for (int64_t positions : {1, 2, 7, 64})
    for (int64_t columns : {1, k.width, 5 * k.width + 2}) {
      const std::vector<T> gram = random<T>(positions * positions), d = random<T>(positions * columns);
      std::vector<T> q(columns, T(1));
      k.form(q.data(), gram.data(), positions, d.data(), columns, columns);
      for (int64_t c = 0; c < columns; ++c) {
        double want = 1, size = 1;
        for (int64_t p = 0; p < positions; ++p)
          for (int64_t r = p; r < positions; ++r) {
            const double term = double(d[p * columns + c]) * gram[p * positions + r] * d[r * columns + c];
            want += term;
            size += std::abs(term);
          }
        expect<T>("form", q[c], want, size);
      }
    }
  for (int64_t n : {1, k.width, 9 * k.width + 1}) {
    const std::vector<T> g = random<T>(n), x = random<T>(n);
    double sum = 0, dot = 0, size = 0;
    for (int64_t s = 0; s < n; ++s) {
      sum += g[s];
      dot += double(g[s]) * (double(x[s]) - 0.25);
      size += std::abs(g[s]) * (std::abs(x[s]) + 1.25);
    }
    expect<T>("sum", k.sum(g.data(), n), sum, size);
    expect<T>("shifted_dot", k.shifted_dot(g.data(), x.data(), T(0.25), n), dot, size);
  }
  for (int64_t rows : {3, k.width, 3 * k.width + 1})
    for (int64_t columns : {2, k.width + 3}) {
      const std::vector<T> from = random<T>(rows * columns);
      std::vector<T> to(rows * columns);
      k.transpose(to.data(), rows, from.data(), columns, rows, columns);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) expect<T>("transpose", to[c * rows + r], from[r * columns + c], 0);
    }
  for (int64_t channels : {k.width, 3 * k.width + 1, 9 * k.width}) {
    const int64_t positions = 5;
    const std::vector<T> g = random<T>(positions * channels), x = random<T>(positions * channels);
    const std::vector<T> shift = random<T>(channels), shifts = random<T>(positions), scales = random<T>(positions);
    std::vector<T> sums(channels), plain(channels), by_position(channels);
    k.norm_sums.by_channel(sums.data(), plain.data(), g.data(), channels, x.data(), channels, shift.data(), positions,
                           channels);
    k.norm_sums.by_position(by_position.data(), nullptr, g.data(), channels, x.data(), channels, shifts.data(), 1,
                            scales.data(), 1, positions, channels);
    for (int64_t c = 0; c < channels; ++c) {
      double all = 0, centred = 0, scaled = 0;
      for (int64_t s = 0; s < positions; ++s) {
        const double value = g[s * channels + c], input = x[s * channels + c];
        all += value;
        centred += value * (input - shift[c]);
        scaled += value * (input - shifts[s]) * scales[s];
      }
      expect<T>("plain sums", plain[c], all, 50);
      expect<T>("sums by channel", sums[c], centred, 50);
      expect<T>("sums by position", by_position[c], scaled, 250);
    }
  }
}

template <class T>
void depthwise() {
  const Kernels<T>& k = kernels<T>();
  for (int count = 1; count <= 9; ++count) {
    const int64_t columns = 2 * k.width + 1, stride = 3 * k.width, inner = 4, outer = 2;
    const Rows rows{outer, inner, 9 * stride, stride, stride};
    const std::vector<T> a = random<T>(outer * inner * stride), b = random<T>(30 * stride);
    std::vector<int64_t> offsets;
    for (int n = 0; n < count; ++n) offsets.push_back(n * stride);
    std::vector<T> r(count * columns);
    k.taps(r.data(), columns, a.data(), rows, b.data(), offsets.data(), count, columns);
    for (int n = 0; n < count; ++n)
      for (int64_t c = 0; c < columns; ++c) {
        double want = 0;
        for (int64_t y = 0; y < outer; ++y)
          for (int64_t z = 0; z < inner; ++z)
            want += double(a[(y * inner + z) * stride + c]) * b[(y * 9 + z + n) * stride + c];
        expect<T>("taps", r[n * columns + c], want, 50);
      }
  }
}

// A 3x3 gradient over one tile of 4x4 positions by Winograd, against the sum that it stands for.
template <class T>
void winograd() {
  const Kernels<T>& k = kernels<T>();
  const int64_t channels = k.width + 1, filters = 5, step = 4 * k.width;
  std::vector<T> image = random<T>(36 * step), cotangent = random<T>(16 * step);
  std::vector<T> x(36 * step), g(36 * step);
  k.winograd_input(x.data(), step, image.data(), 6 * step, step, channels);
  k.winograd_cotangent(g.data(), step, cotangent.data(), 4 * step, step, filters);
  const Winograd<T> operands{1, x.data(), step, g.data(), step};
  std::vector<T> sums(filters), added(filters * 9 * channels);
  for (int64_t first = 0; first < filters; first += k.max_height) {
    const int height = static_cast<int>(std::min<int64_t>(k.max_height, filters - first));
    k.winograd_sum(sums.data() + first, operands, first, height, channels);
    k.winograd_add(added.data() + first * 9 * channels, 9 * channels, T(1), operands, first, height, channels);
  }
  for (int64_t i = 0; i < filters; ++i) {
    double sum = 0;
    for (int tap = 0; tap < 9; ++tap)
      for (int64_t c = 0; c < channels; ++c) {
        double want = 0;
        for (int y = 0; y < 4; ++y)
          for (int z = 0; z < 4; ++z)
            want += double(cotangent[(4 * y + z) * step + i]) * image[(6 * (y + tap / 3) + z + tap % 3) * step + c];
        sum += want * want;
        expect<T>("winograd_add", added[(i * 9 + tap) * channels + c], want * want, 400);
      }
    expect<T>("winograd_sum", sums[i], sum, 400. * 9 * channels);
  }
}

}  // namespace

int main(int count, char** names) {
  for (int n = 1; n < count; ++n) {
    if (!set_cpu_capability(names[n])) {
      std::printf("%s: not here\n", names[n]);
      continue;
    }
    const int before = checks;
    products<float>();
    products<double>();
    pairs();
    forms_and_sums<float>();
    forms_and_sums<double>();
    depthwise<float>();
    depthwise<double>();
    winograd<float>();
    winograd<double>();
    std::printf("%s: %d checks\n", cpu_capability(), checks - before);
  }
  if (wrong) std::printf("%d of %d checks failed\n", wrong, checks);
  return wrong != 0;
}
