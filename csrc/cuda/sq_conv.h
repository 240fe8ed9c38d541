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
  static constexpr int terms = 1, apart = 0;

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
  __device__ Read<T> at(const Position& position, const Tap& tap) const {
    const Pixel pixel = pixel_at(shape, position, tap);
    return {image + (static_cast<uint64_t>(pixel.at) * static_cast<uint32_t>(pitch) + tap.channel), pixel.inside};
  }
  __device__ Read<T> at(const Tap& tap, const Position& position) const { return at(position, tap); }

  const Shape& shape;
  const T* image;  // starts at the group's first channel
  int pitch;       // between pixels
};

// A matrix [outer, inner] or [inner, outer] whose rows lie `pitch` apart, or the sum of several such matrices.
template <class T, int V, bool AlongDepth, int Terms = 1>
struct Matrix {
  using Value = T;
  static constexpr int vector = V;
  static constexpr bool along_depth = AlongDepth;
  static constexpr int terms = Terms;

  struct Place {
    uint32_t at;
    bool inside;
  };

  __device__ Place outer(int i) const { return place(i, outer_size); }
  __device__ Place inner(int k) const { return place(k, inner_size); }
  __device__ Read<T> at(const Place& i, const Place& k) const {
    const Place &row = AlongDepth ? i : k, &column = AlongDepth ? k : i;
    return {data + (static_cast<uint64_t>(row.at) * static_cast<uint32_t>(pitch) + column.at), i.inside && k.inside};
  }

  const T* data;
  int pitch, outer_size, inner_size;
  int64_t apart = 0;

 private:
  __device__ static Place place(int at, int size) {
    const bool inside = at < size;
    return {inside ? static_cast<uint32_t>(at) : 0, inside};
  }
};

// Calls use(Math) with the arithmetic that the caller asked for.
template <class T, class Use>
void choose_math(bool tf32, const Use& use) {
  if constexpr (std::is_same_v<T, double>)
    use(Exact<double>());
  else if constexpr (std::is_same_v<T, float>)
    tf32 ? use(TensorCores<float>()) : use(Exact<float>());
  else
    use(TensorCores<T>());
}

// Calls use(Math, V). V makes reads of 16 bytes where they are possible.
template <class T, class Use>
void choose(bool wide, bool tf32, const Use& use) {
  choose_math<T>(tf32, [&](auto math) {
    if (wide)
      use(math, std::integral_constant<int, kWide<T>>());
    else
      use(math, std::integral_constant<int, 1>());
  });
}

// Rows and columns of a tile in every arithmetic but float64. They serve only to estimate the number of blocks.
constexpr int kRows = 64, kColumns = 128;

inline int64_t parts_for(int64_t blocks, int64_t most, const Launch& l) {
  constexpr int64_t each = 4;  // blocks that a processor runs at the same time
  return std::clamp<int64_t>(ceil_div(each * l.processors, std::max<int64_t>(blocks, 1)), 1,
                             std::max<int64_t>(most, 1));
}

}  // namespace t2v::cuda
