// What the operators of the CPU backend do with whole tensors.
#pragma once

#include <cstring>

#include "../stable.h"

namespace t2v {

// An uninitialised CPU tensor. Its axes are dense in the given order, the outermost first.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, std::initializer_list<int> order = {}) {
  const int64_t axes = static_cast<int64_t>(sizes.size());
  int64_t strides[8], next = 1;
  for (int64_t k = axes; k-- > 0;) {
    const int64_t axis = order.size() ? order.begin()[k] : k;
    strides[axis] = next;
    next *= std::max<int64_t>(sizes.begin()[axis], 1);
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(axes, sizes.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// Zeros, for sums.
template <class T = void>
Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType type) {
  const Tensor t = empty(sizes, type);
  const size_t bytes = t.numel() * (type == ScalarType::Double ? sizeof(double) : sizeof(float));
  if (bytes > 0) std::memset(t.mutable_data_ptr<void>(), 0, bytes);
  return t;
}

inline Tensor channels_last(const Tensor& t) {
  if (t.is_dense({0, 2, 3, 1})) return t;
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }
using torch::stable::parallel_for;

}  // namespace t2v
