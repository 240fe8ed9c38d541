// What the CUDA operators do with whole tensors: torch's own operators, called through the dispatcher, and where and
// how kernels are launched.
#pragma once

#include <string>

#include "../checks.h"
#include "../stable.h"
#include "kernels.h"

#ifndef T2V_EMULATED
#include <torch/csrc/stable/accelerator.h>
#endif

namespace t2v {

template <class T>
StableIValue passed(const T& value) {
  return torch::stable::detail::from(value);
}
inline StableIValue passed(const Tensor& t) {
  return torch::stable::detail::from(static_cast<const torch::stable::Tensor&>(t));
}
inline StableIValue passed(const Sizes& numbers) {
  return torch::stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(numbers.data(), numbers.size()));
}

// Torch's words for the error of its last call. Torch before 2.13 does not hand them out.
inline std::string last_error() {
#ifdef TORCH_DYNAMIC_VERSION_CALL_2_13_0
  const char* words = TORCH_DYNAMIC_VERSION_CALL_2_13_0(torch_exception_get_what_without_backtrace,
                                                        torch::stable::detail::torch_shim_bc_const_char_ptr);
  if (words) return words;
#endif
  return "torch before 2.13 does not tell why; often the device is out of memory";
}

// Calls an operator of torch with all of its arguments, and leaves its results on the stack. Returns whether it
// succeeded. Numbers of the schema's type Scalar cannot be passed.
template <size_t Size>
bool dispatch(const char* op, const char* overload, StableIValue (&stack)[Size]) {
  return torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION) == TORCH_SUCCESS;
}

// The same for an operator with one result.
template <class... Arguments>
Tensor call(const char* op, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {passed(arguments)...};
  if (!dispatch(op, overload, stack)) throw std::runtime_error(text(op, " failed: ", last_error()));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline Tensor permuted(const Tensor& t, Sizes order) { return call("aten::permute", "", t, order); }
inline Tensor viewed(const Tensor& t, Sizes sizes) { return call("aten::view", "", t, sizes); }
inline Tensor narrowed(const Tensor& t, int64_t axis, int64_t first, int64_t length) {
  return call("aten::narrow", "", t, axis, first, length);
}
inline Tensor selected(const Tensor& t, int64_t axis, int64_t place) {
  return call("aten::select", "int", t, axis, place);
}
inline Tensor inserted(const Tensor& t, int64_t axis) { return call("aten::unsqueeze", "", t, axis); }
inline Tensor transposed(const Tensor& t) { return call("aten::t", "", t); }
inline Tensor product(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b); }
inline Tensor squared(const Tensor& t) { return call("aten::square", "", t); }
inline Tensor squared_in_place(const Tensor& t) { return call("aten::square_", "", t); }
inline Tensor total(const Tensor& t, int64_t axis, bool keep_axis = false) {
  const std::optional<torch::headeronly::IntHeaderOnlyArrayRef> axes(
      torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
  return call("aten::sum", "dim_IntList", t, axes, keep_axis, std::nullopt);
}
inline void copy_to(const Tensor& to, const Tensor& from) { call("aten::copy_", "", to, from, false); }

// out += t. The operator add_ takes a Scalar, and subtract, which the interface has, does not write in place.
inline void add_to(const Tensor& out, const Tensor& t) { copy_to(out, torch::stable::subtract(out, t, -1.0)); }

inline Tensor new_tensor(const char* op, Sizes sizes, ScalarType type, const Tensor& like) {
  return call(op, "", like, sizes, std::optional(type), std::nullopt, std::nullopt, std::nullopt);
}
inline Tensor empty_like(const Tensor& like, Sizes sizes, ScalarType type) {
  return new_tensor("aten::new_empty", sizes, type, like);
}
inline Tensor empty_sums(Sizes sizes, const Tensor& like) { return empty_like(like, sizes, sum_type(like)); }
inline Tensor zero_sums(Sizes sizes, const Tensor& like) {
  return new_tensor("aten::new_zeros", sizes, sum_type(like), like);
}

// [parts, ...] -> [...]
inline Tensor add_parts(const Tensor& parts) { return parts.size(0) == 1 ? selected(parts, 0, 0) : total(parts, 0); }

// [M, ...] -> [M / examples, examples, ...]
inline Tensor by_cotangent(const Tensor& t, int64_t examples) {
  std::vector<int64_t> sizes{t.size(0) / examples, examples};
  for (int64_t axis = 1; axis < t.dim(); ++axis) sizes.push_back(t.size(axis));
  return call("aten::reshape", "", t, Sizes(sizes));
}
// and back
inline Tensor by_row(const Tensor& t) {
  std::vector<int64_t> sizes{t.size(0) * t.size(1)};
  for (int64_t axis = 2; axis < t.dim(); ++axis) sizes.push_back(t.size(axis));
  return call("aten::reshape", "", t, Sizes(sizes));
}

// How far the pixels of images [N, H, W, C] are apart, if they are equally far apart.
inline int64_t pixel_pitch(const Tensor& images) {
  return images.size(2) > 1 ? images.stride(2) : images.size(1) > 1 ? images.stride(1) : images.size(3);
}

// Images [N, H, W, C] that the kernels can read by 16 bytes wherever a dense copy could be read so: either the images
// themselves, or a dense copy.
inline Tensor by_pixels(const Tensor& images) {
  const ScalarType type = images.scalar_type();
  const int64_t wide = type == ScalarType::Double ? 2 : type == ScalarType::Float ? 4 : 8;  // values in 16 bytes
  const int64_t pitch = pixel_pitch(images);
  const bool even = images.size(1) == 1 || images.size(2) == 1 || images.stride(1) == images.size(2) * pitch;
  const bool whole = images.stride(3) == 1 || images.size(3) == 1;
  const bool fits = pitch % wide == 0 && images.stride(0) % wide == 0 && pitch <= INT32_MAX;
  const bool starts = reinterpret_cast<uintptr_t>(images.const_data_ptr<char>()) % 16 == 0;
  return even && whole && fits && starts ? images : contiguous(images);
}

// [N, C, H, W] -> [N, H, W, C]
inline Tensor pixels_first(const Tensor& images) { return by_pixels(permuted(images, {0, 2, 3, 1})); }

// [N, S, C] -> images [N, S, 1, C]
inline Tensor tokens_first(const Tensor& tokens) { return by_pixels(inserted(tokens, 2)); }

// Whether torch allows products of float32 values to be rounded to TF32. The interface cannot tell, so that Python's
// t2v_fast::allows_tf32 does.
inline bool allows_tf32(const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float) return false;
  StableIValue stack[1] = {};
  if (!dispatch("t2v_fast::allows_tf32", "", stack))
    throw std::runtime_error(text("t2v_fast::allows_tf32 failed: ", last_error()));
  return torch::stable::detail::to<bool>(stack[0]);
}

// Makes the tensor's device the current one for its own lifetime.
class OnDevice {
 public:
#ifdef T2V_EMULATED
  explicit OnDevice(const Tensor&, bool tf32 = false) : launch_{nullptr, 3, tf32} {}
#else
  explicit OnDevice(const Tensor& t, bool tf32 = false) : OnDevice(index(t), tf32) {}
#endif
  const cuda::Launch& operator*() const { return launch_; }

 private:
#ifndef T2V_EMULATED
  OnDevice(int device, bool tf32) : guard_(device), launch_{stream(device), processors(device), tf32} {}

  static int index(const torch::stable::Tensor& t) { return t.get_device_index(); }

  static cudaStream_t stream(int device) {
    void* current;
    if (aoti_torch_get_current_cuda_stream(device, &current) != TORCH_SUCCESS)
      throw std::runtime_error(text("torch has no current stream on CUDA device ", device, ": ", last_error()));
    return static_cast<cudaStream_t>(current);
  }

  // Torch's guard speaks to torch's own CUDA runtime, and this library has another. Both use the device's one context.
  static int processors(int device) {
    int count = 0;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess)
      throw std::runtime_error(text("CUDA device ", device, " cannot be used: ", cudaGetErrorString(error)));
    return count;
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cuda::Launch launch_;
};

}  // namespace t2v
