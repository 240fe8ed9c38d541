// Sums over positions of cotangents, and of cotangents times normalised inputs: biases and norm weights. The kernels
// are bound by memory: each thread starts several reads before it uses the first.
#include "lanes.h"

namespace t2v::cuda {
namespace {

// What cotangents are multiplied by: nothing, or x with a shift and a scale that are the same at all positions or not.
enum class Factor { none, by_channel, by_position };

// The vectors of V values that a thread reads: `first`, `first` + `step`, ... below `count`. They lie along channels or
// along positions.
struct Walk {
  int first, step, count;
};

// For each tensor, how far its next vector is, and the next one that the thread reads. The compiler would multiply in
// the loop.
struct Strides {
  int64_t g, x, shift, scale;
};

template <class T, int V, Factor kFactor>
struct Sums {
  using Sum = SumOf<T>;
  static constexpr bool kWithX = kFactor != Factor::none, kMoving = kFactor == Factor::by_position;
  static constexpr int kKinds = kWithX ? 2 : 1;

  // Vectors of 16 bytes are copied through shared memory, so that many of them are on their way at once, whatever the
  // compiler makes of the loop. A thread reads only what it copied itself, which takes no barrier. There is a place for
  // each thread, stage and tensor, and then for each shift and scale.
  static constexpr bool kStaged = V * sizeof(T) == 16;
  static constexpr int kStages = kWithX ? 4 : 8, kPlaces = kStages * kLaneThreads;
  static constexpr size_t kBytes = kStaged ? kPlaces * (16 * kKinds + (kMoving ? 2 * sizeof(Sum) : 0)) : 0;

  // Adds the products of vectors. Pointers are to vector 0. The shift of a norm by channels is in `by`, and its scale
  // is left to the caller.
  __device__ void add(const T* g, const T* x, const Sum* shift, const Sum* scale, const Strides& next,
                      const Strides& step, const Sum* by, const Walk& walk, unsigned char* shared) {
    if constexpr (!kStaged) {
#pragma unroll 2
      for (int at = walk.first; at < walk.count; at += walk.step)
        add_one(*reinterpret_cast<const Vector<T, V>*>(g + at * next.g),
                kWithX ? *reinterpret_cast<const Vector<T, V>*>(x + at * next.x) : Vector<T, V>{}, by,
                kMoving && shift ? shift[at * next.shift] : Sum(0), kMoving && scale ? scale[at * next.scale] : Sum(1));
      return;
    }
    const bool shifted = shift, scaled = scale;
    auto* const from_g = reinterpret_cast<Vector<T, V>*>(shared) + thread();
    auto* const from_x = from_g + kPlaces;
    Sum* const from_shift = reinterpret_cast<Sum*>(shared + kPlaces * 16 * kKinds) + thread();
    Sum* const from_scale = from_shift + kPlaces;
    int ahead = walk.first, to = 0;
    g += ahead * next.g, x += ahead * next.x, shift += ahead * next.shift, scale += ahead * next.scale;
    const auto start_copies = [&] {
      if (ahead < walk.count) {
        copy_async<16>(from_g + to, g, true);
        if constexpr (kWithX) copy_async<16>(from_x + to, x, true);
        if constexpr (kMoving) {
          if (shifted) copy_async<sizeof(Sum)>(from_shift + to, shift, true);
          if (scaled) copy_async<sizeof(Sum)>(from_scale + to, scale, true);
        }
      }
      group_copies();
      ahead += walk.step, to = (to + kLaneThreads) & (kPlaces - 1);
      g += step.g, x += step.x, shift += step.shift, scale += step.scale;
    };
    for (int k = 0; k < kStages - 1; ++k) start_copies();
    int place = 0;
    for (int at = walk.first; at < walk.count; at += walk.step) {
      wait_for_copies<kStages - 2>();
      start_copies();  // to where the last vector was
      add_one(from_g[place], kWithX ? from_x[place] : Vector<T, V>{}, by,
              kMoving && shifted ? from_shift[place] : Sum(0), kMoving && scaled ? from_scale[place] : Sum(1));
      place = (place + kLaneThreads) & (kPlaces - 1);
    }
  }

  __device__ void add_one(Vector<T, V> g, Vector<T, V> x, const Sum* by, Sum shift, Sum scale) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Sum value = static_cast<Sum>(g.values[v]), from_x = static_cast<Sum>(x.values[v]);
      if constexpr (kMoving)
        product()[v] += value * ((from_x - shift) * scale);
      else if constexpr (kWithX)
        product()[v] += value * (from_x - by[v]);
      plain()[v] += value;
    }
  }

  __device__ Sum* product() { return all; }
  __device__ Sum* plain() { return all + (kKinds - 1) * V; }

  Sum all[kKinds * V] = {};
};

// The arguments of both kernels. If there is one part, `to` [kinds, M, C] takes squares; otherwise `to` [parts, kinds,
// M, C] takes sums.
template <class T>
struct Work {
  Tokens<T> g, x;
  Tokens<SumOf<T>> shift, scale;
  Strides next, step;
  SumOf<T>* to;
  int positions, channels, rows, parts, lane_bits;  // there are 2^lane_bits lanes
  Divisor by_chunks, by_parts, by_examples;         // chunks of channels, one for each block
  int64_t kinds;                                    // of sums that are wanted: with x, without x, or both

  // Where row m of a tensor begins, at position s and channel c, or null.
  template <class S>
  static __device__ const S* at(const Tokens<S>& t, int64_t row, int64_t s, int64_t c) {
    return t.data ? t.data + row * t.row + s * t.position + c * t.channel : nullptr;
  }
  // The block's share.
  struct Mine {
    int chunk, part, m, n;  // n is the example of row m
  };
  __device__ Mine mine() const {
    const int block = Share().rest(), others = by_chunks.quotient(block), m = by_parts.quotient(others);
    return {by_chunks.remainder(block, others), by_parts.remainder(others, m), m,
            by_examples.remainder(m, by_examples.quotient(m))};
  }
  __device__ void write(int part, int kind, int m, int c, SumOf<T> sum) const {
    to[((part * kinds + kind) * rows + m) * channels + c] = parts == 1 ? sum * sum : sum;
  }
};

// Reads along channels where channels are contiguous: each lane computes V neighbouring channels.
template <class T, int V, Factor kFactor>
__global__ void __launch_bounds__(kLaneThreads) along_channels_kernel(Work<T> w) {
  using Sum = SumOf<T>;
  using Total = Sums<T, V, kFactor>;
  const int lanes = 1 << w.lane_bits, walker = thread() >> w.lane_bits, walkers = kLaneThreads >> w.lane_bits;
  const auto mine = w.mine();
  const int part = mine.part, m = mine.m, n = mine.n;
  const int first = mine.chunk * lanes * V, c = first + (thread() & (lanes - 1)) * V;
  constexpr size_t of_walkers = walkers_bytes<Total::kKinds * V, Sum>();
  unsigned char* const shared = shared_memory<Total::kBytes + of_walkers>();
  Total total;
  if (c < w.channels) {
    Sum by[V], times[V];
    const Sum* const shift = w.at(w.shift, n, 0, c);
    const Sum* const scale = w.at(w.scale, n, 0, c);
    if constexpr (kFactor == Factor::by_channel)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        by[v] = shift ? shift[v * w.shift.channel] : Sum(0);
        times[v] = scale ? scale[v * w.scale.channel] : Sum(1);
      }
    total.add(w.at(w.g, m, 0, c), w.at(w.x, n, 0, c), shift, scale, w.next, w.step, by,
              {part * walkers + walker, w.parts * walkers, w.positions}, shared);
    if constexpr (kFactor == Factor::by_channel)
#pragma unroll
      for (int v = 0; v < V; ++v) total.product()[v] *= times[v];
  }
  add_walkers<Total::kKinds * V>(total.all, lanes, reinterpret_cast<Sum*>(shared + Total::kBytes),
                                 [&](int of, int e, Sum sum) {
                                   const int at = first + of * V + e % V, kind = e / V;
                                   if (at < w.channels && kind < w.kinds) w.write(part, kind, m, at, sum);
                                 });
}

// Reads along positions where positions are contiguous, or with any strides where V is 1: each warp computes one
// channel.
template <class T, int V, Factor kFactor>
__global__ void __launch_bounds__(kLaneThreads) along_positions_kernel(Work<T> w) {
  using Sum = SumOf<T>;
  using Total = Sums<T, V, kFactor>;
  constexpr int warps = kLaneThreads / 32;
  const auto mine = w.mine();
  const int part = mine.part, m = mine.m, n = mine.n, c = mine.chunk * warps + thread() / 32;
  if (c >= w.channels) return;  // true for the whole warp
  unsigned char* shared = nullptr;
  if constexpr (Total::kStaged) shared = shared_memory<Total::kBytes>();
  Total total;
  Sum by[V] = {};
  const Sum* const shift = w.at(w.shift, n, 0, c);
  const Sum* const scale = w.at(w.scale, n, 0, c);
  if constexpr (kFactor == Factor::by_channel)
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (shift) by[v] = *shift;
  total.add(w.at(w.g, m, 0, c), w.at(w.x, n, 0, c), shift, scale, w.next, w.step, by,
            {part * 32 + thread() % 32, w.parts * 32, w.positions / V}, shared);
#pragma unroll
  for (int kind = 0; kind < Total::kKinds; ++kind) {
    Sum sum = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) sum += total.all[kind * V + v];
    if (kFactor == Factor::by_channel && kind == 0 && scale) sum *= *scale;
    sum = warp_sum(sum);
    if (thread() % 32 == 0 && kind < w.kinds) w.write(part, kind, m, c, sum);
  }
}

// Adds parts [parts, count], and squares the sums.
template <class Sum>
__global__ void __launch_bounds__(kLaneThreads) square_kernel(const Sum* sums, int64_t count, int parts, Sum* q) {
  const int64_t k = int64_t{Share().rest()} * kLaneThreads + thread();
  if (k >= count) return;
  Sum sum = 0;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) sum += sums[part * count + k];
  q[k] = sum * sum;
}

constexpr int kWeighLanes = 8;  // which read at least 32 bytes together

// Adds the sums over rows of q [M, C] times weight [M] to out [C].
template <class Sum>
__global__ void __launch_bounds__(kLaneThreads)
    weigh_kernel(const Sum* q, const Sum* weight, int rows, int channels, Sum* out) {
  Sum* const shared = reinterpret_cast<Sum*>(shared_memory<walkers_bytes<1, Sum>()>());
  const int first = Share().rest() * kWeighLanes, c = first + thread() % kWeighLanes;
  Sum sum = 0;
  if (c < channels)
#pragma unroll 4
    for (int m = thread() / kWeighLanes; m < rows; m += kLaneThreads / kWeighLanes)
      sum += weight[m] * q[static_cast<int64_t>(m) * channels + c];
  add_walkers<1>(&sum, kWeighLanes, shared, [&](int lane, int, Sum total) {
    if (first + lane < channels) out[first + lane] += total;
  });
}

// Whether vectors may be read along the axis with stride `along` and the given size.
template <class T>
bool wide_along(const Tokens<T>& t, int64_t Tokens<T>::* along, int64_t size) {
  if (!t.data) return true;
  const bool others = t.row % kWide<T> == 0 && (along == &Tokens<T>::channel ? t.position : t.channel) % kWide<T> == 0;
  return t.*along == 1 && size % kWide<T> == 0 && others && aligned(t.data);
}

// How a sum is launched.
struct Plan {
  bool by_channels;  // whether threads read along channels
  bool wide;
  Factor factor;
  int lanes;
  int64_t blocks, parts;  // blocks for each part
};

template <class T>
Plan plan_of(const Products<T>& p, const Launch& l) {
  using Of = Tokens<T>;
  Plan plan{};
  const bool moving = p.shift.position != 0 || p.scale.position != 0;
  plan.factor = !p.x.data ? Factor::none : moving ? Factor::by_position : Factor::by_channel;
  // A thread reads one shift and one scale for each vector.
  const bool along_channels = !moving || (p.shift.channel == 0 && p.scale.channel == 0);
  const auto all_wide = [&](auto along, int64_t size) {
    return wide_along(p.g, along, size) && wide_along(p.x, along, size);
  };
  if (along_channels && all_wide(&Of::channel, p.channels))
    plan.by_channels = plan.wide = true;
  else if (!moving && all_wide(&Of::position, p.positions))
    plan.wide = true;
  else
    plan.by_channels = p.g.channel == 1 && (!p.x.data || p.x.channel == 1);

  // Several blocks for each processor are busy at once. To have as many, blocks take fewer channels first, down to
  // kFewestLanes, which still read 128 bytes together. Then they take some of the positions, which costs a launch more.
  constexpr int64_t kBlocks = 3, kFewestLanes = 8, kBatches = 4;
  const int vector = plan.wide ? kWide<T> : 1;
  const int64_t ahead = plan.factor == Factor::none ? 8 : 4, wanted = kBlocks * l.processors;
  int64_t walkers = 32;  // the threads that share the positions
  if (plan.by_channels) {
    const int64_t vectors = ceil_div(p.channels, vector);
    const auto blocks = [&] { return p.rows * ceil_div(vectors, plan.lanes); };
    plan.lanes = lanes_for(vectors);
    while (plan.lanes > kFewestLanes && blocks() < wanted && p.positions > kLaneThreads / plan.lanes) plan.lanes /= 2;
    plan.blocks = blocks();
    walkers = kLaneThreads / plan.lanes;
  } else {
    plan.blocks = p.rows * ceil_div(p.channels, kLaneThreads / 32);
    walkers *= vector;
  }
  const int64_t most = std::max<int64_t>(p.positions / (walkers * ahead * kBatches), 1);
  plan.parts = plan.blocks >= wanted ? 1 : std::min(ceil_div((kBlocks + 1) * l.processors, plan.blocks), most);
  return plan;
}

}  // namespace

template <class T>
int64_t product_parts(const Products<T>& p, const Launch& l) {
  return plan_of(p, l).parts;
}

template <class T>
void products(SumOf<T>* q, SumOf<T>* sums, const Products<T>& p, const Launch& l) {
  const Plan plan = plan_of(p, l);
  const int64_t kinds = p.kinds();
  Work<T> work{p.g, p.x, p.shift, p.scale, {}, {}, plan.parts == 1 ? q : sums, 0, 0, 0, 0, 0, {}, {}, {}, kinds};
  const auto strides = [&](int64_t positions) -> Strides {
    return {positions * p.g.position, positions * p.x.position, positions * p.shift.position,
            positions * p.scale.position};
  };
  const int64_t together = plan.by_channels || !plan.wide ? 1 : kWide<T>;  // the positions of a vector
  work.next = strides(together);
  work.step = strides(together * plan.parts * (plan.by_channels ? kLaneThreads / plan.lanes : 32));
  const auto number = [](int64_t size) { return static_cast<int>(size); };
  work.positions = number(p.positions), work.channels = number(p.channels), work.rows = number(p.rows);
  work.parts = number(plan.parts), work.kinds = kinds;
  while (1 << work.lane_bits < plan.lanes) ++work.lane_bits;
  work.by_chunks = Divisor(plan.blocks / p.rows), work.by_parts = Divisor(plan.parts);
  work.by_examples = Divisor(p.examples);
  const auto run = [&](auto vector, auto factor) {
    launch("sq_prod",
           plan.by_channels ? along_channels_kernel<T, vector, factor> : along_positions_kernel<T, vector, factor>,
           plan.blocks * plan.parts, kLaneThreads, l.stream, work);
  };
  const auto with = [&](auto factor) {
    if (plan.wide)
      run(std::integral_constant<int, kWide<T>>(), factor);
    else
      run(std::integral_constant<int, 1>(), factor);
  };
  if (plan.factor == Factor::none)
    with(std::integral_constant<Factor, Factor::none>());
  else if (plan.factor == Factor::by_channel)
    with(std::integral_constant<Factor, Factor::by_channel>());
  else
    with(std::integral_constant<Factor, Factor::by_position>());
  if (plan.parts == 1) return;
  const int64_t count = kinds * p.rows * p.channels;
  launch("sq_prod", square_kernel<SumOf<T>>, ceil_div(count, kLaneThreads), kLaneThreads, l.stream, sums, count,
         plan.parts, q);
}

template <class Sum>
void add_weighted(Sum* out, const Sum* q, const Sum* weight, int64_t rows, int64_t channels, const Launch& l) {
  launch("sq_prod_acc_", weigh_kernel<Sum>, ceil_div(channels, kWeighLanes), kLaneThreads, l.stream, q, weight, rows,
         channels, out);
}

template void add_weighted<float>(float*, const float*, const float*, int64_t, int64_t, const Launch&);
template void add_weighted<double>(double*, const double*, const double*, int64_t, int64_t, const Launch&);

#define T2V_INSTANTIATE(T)                                              \
  template int64_t product_parts<T>(const Products<T>&, const Launch&); \
  template void products<T>(SumOf<T>*, SumOf<T>*, const Products<T>&, const Launch&);
T2V_FOR_EACH_TYPE(T2V_INSTANTIATE)
#undef T2V_INSTANTIATE

}  // namespace t2v::cuda
