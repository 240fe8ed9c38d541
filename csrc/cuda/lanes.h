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

// The sums of one thread lie this far apart in shared memory, in different banks.
constexpr int kWalkerPitch = kLaneThreads + 1;

// The bytes of shared memory that add_walkers needs.
template <int Count, class T>
constexpr size_t walkers_bytes() {
  return sizeof(T) * kWalkerPitch * Count;
}

// Adds the sums of the walkers in order, and calls write(lane, e, sum) for each lane's sum number e. All threads add,
// and neighbouring threads write neighbouring sums.
template <int Count, class T, class Write>
__device__ inline void add_walkers(const T* sums, int lanes, T* shared, const Write& write) {
#pragma unroll
  for (int e = 0; e < Count; ++e) shared[e * kWalkerPitch + thread()] = sums[e];
  __syncthreads();
  for (int k = thread(); k < lanes * Count; k += kLaneThreads) {
    const int lane = k / Count, e = k % Count;
    T sum = 0;
#pragma unroll 4
    for (int other = lane; other < kLaneThreads; other += lanes) sum += shared[e * kWalkerPitch + other];
    write(lane, e, sum);
  }
}

}  // namespace t2v::cuda
