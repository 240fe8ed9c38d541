// Sums over positions, which are bound by memory. The threads of a block form rows of lanes. Neighbouring lanes compute
// neighbouring channels, and the rows, called walkers, share the positions.
#pragma once

#include <algorithm>

#include "device.h"

namespace t2v::cuda {

constexpr int kLaneThreads = 128;

// The number of lanes for a number of vectors of channels.
inline int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < vectors && lanes < 32) lanes *= 2;
  return lanes;
}

// The number of blocks that share the positions of one output: enough blocks for all processors, and enough work for
// each block.
inline int64_t lane_parts(int64_t blocks, int64_t positions, const Launch& l) {
  constexpr int64_t each = 8, fewest_positions = 64;
  return std::clamp<int64_t>(ceil_div(each * l.processors, std::max<int64_t>(blocks, 1)), 1,
                             ceil_div(std::max<int64_t>(positions, 1), fewest_positions));
}

// Adds the sums of the walkers to those of the first walker, in order.
template <int Count, class T>
__device__ inline void add_walkers(T* sums, int lanes) {
  T* const shared = reinterpret_cast<T*>(shared_memory<sizeof(T) * kLaneThreads * Count>());
#pragma unroll
  for (int e = 0; e < Count; ++e) shared[e * kLaneThreads + thread()] = sums[e];
  __syncthreads();
  if (thread() >= lanes) return;
#pragma unroll
  for (int e = 0; e < Count; ++e)
    for (int other = thread() + lanes; other < kLaneThreads; other += lanes)
      sums[e] += shared[e * kLaneThreads + other];
}

}  // namespace t2v::cuda
