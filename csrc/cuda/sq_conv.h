// What the tiled kernels of sq_conv share: the factors of their products, the arithmetic, and the number of blocks.
#pragma once

#include <algorithm>

#include "shape.h"
#include "tile.h"

namespace t2v::cuda {

// The patches U [P, D] of one group of an image. The depth of a product is D for Gram matrices, and P for gradients.
template <class T, int V, bool DepthIsColumns>
struct Patches {
  using Value = T;
  static constexpr int vector = V;
  static constexpr bool along_depth = DepthIsColumns;

  __device__ auto outer(int i) const {
    if constexpr (DepthIsColumns)
      return position_at(shape, i);
    else
      return tap_at(shape, i);
  }
  __device__ auto inner(int k) const {
    if constexpr (DepthIsColumns)
      return tap_at(shape, k);
    else
      return position_at(shape, k);
  }
  __device__ const T* at(const Position& position, const Tap& tap) const {
    const int pixel = pixel_at(shape, position, tap);
    return pixel < 0 ? nullptr : image + (static_cast<int64_t>(pixel) * shape.channels + tap.channel);
  }
  __device__ const T* at(const Tap& tap, const Position& position) const { return at(position, tap); }

  const Shape& shape;
  const T* image;  // starts at the group's first channel
};

// A matrix [outer, inner] or [inner, outer] whose rows lie `pitch` apart.
template <class T, int V, bool AlongDepth>
struct Matrix {
  using Value = T;
  static constexpr int vector = V;
  static constexpr bool along_depth = AlongDepth;

  __device__ int outer(int i) const { return i < outer_size ? i : -1; }
  __device__ int inner(int k) const { return k < inner_size ? k : -1; }
  __device__ const T* at(int i, int k) const {
    if (i < 0 || k < 0) return nullptr;
    return data + (AlongDepth ? static_cast<int64_t>(i) * pitch + k : static_cast<int64_t>(k) * pitch + i);
  }

  const T* data;
  int pitch, outer_size, inner_size;
};

// Calls use(Math, V) with the arithmetic that the caller asked for; V makes reads of 16 bytes where they are possible.
template <class T, class Use>
void choose(bool wide, bool tf32, const Use& use) {
  const auto with = [&](auto math) {
    if (wide)
      use(math, std::integral_constant<int, kWide<T>>());
    else
      use(math, std::integral_constant<int, 1>());
  };
  if constexpr (std::is_same_v<T, double>)
    with(Exact<double>());
  else if constexpr (std::is_same_v<T, float>)
    tf32 ? with(TensorCores<float>()) : with(Exact<float>());
  else
    with(TensorCores<T>());
}

// Rows and columns of a tile in every arithmetic but float64. They serve only to estimate the number of blocks.
constexpr int kRows = 64, kColumns = 128;

inline int64_t parts_for(int64_t blocks, int64_t most, const Launch& l) {
  constexpr int64_t each = 4;  // blocks that a processor runs at the same time
  return std::clamp<int64_t>(ceil_div(each * l.processors, std::max<int64_t>(blocks, 1)), 1,
                             std::max<int64_t>(most, 1));
}

}  // namespace t2v::cuda
