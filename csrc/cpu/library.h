// The operators of the CPU backend for the dispatcher, through the stable interface of LibTorch: C functions and
// headers that stay the same from torch 2.10 on. One compiled library serves every later torch and every Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

#include "../tensor.h"

// The headers of LibTorch call dlsym. This is the oldest version of it, so that the library also loads with glibc 2.28.
#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
#elif defined(__aarch64__) && defined(__GLIBC__)
__asm__(".symver dlsym,dlsym@GLIBC_2.17");
#endif

namespace t2v {

// A view that keeps its tensor.
class Tensor : public View {
 public:
  Tensor(torch::stable::Tensor tensor) : View(read(tensor)), tensor_(std::move(tensor)) {}
  operator const torch::stable::Tensor&() const { return tensor_; }

  template <class T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(tensor_.mutable_data_ptr());
  }

 private:
  // The same as View(tensor), which makes several times as many calls.
  static View read(const torch::stable::Tensor& tensor) {
    const AtenTensorHandle handle = tensor.get();
    const void* data;
    int64_t *sizes, *strides, axes;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &axes));
    return View(data, sizes, strides, axes, type_of(tensor));
  }
  static ScalarType type_of(const torch::stable::Tensor& tensor) {
    static const std::pair<int32_t, ScalarType> known[] = {{aoti_torch_dtype_float32(), ScalarType::Float},
                                                           {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
                                                           {aoti_torch_dtype_float64(), ScalarType::Double},
                                                           {aoti_torch_dtype_float16(), ScalarType::Half},
                                                           {aoti_torch_dtype_int64(), ScalarType::Long}};
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
    for (const auto& [number, name] : known)
      if (type == number) return name;
    return tensor.scalar_type();
  }

  torch::stable::Tensor tensor_;
};

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

inline Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : Tensor(torch::stable::contiguous(t)); }
inline Tensor channels_last(const Tensor& t) {
  if (t.is_dense({0, 2, 3, 1})) return t;
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}
inline Tensor converted(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : Tensor(torch::stable::to(t, type));
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }
using torch::stable::parallel_for;

// An operator as torch calls it: torch::stable::Tensor for each Tensor, and vectors for each Sizes.
template <class T>
struct Argument {
  using type = T;
};
template <>
struct Argument<const Tensor&> {
  using type = torch::stable::Tensor;
};
template <>
struct Argument<const std::optional<Tensor>&> {
  using type = std::optional<torch::stable::Tensor>;
};
template <>
struct Argument<Sizes> {
  using type = std::vector<int64_t>;
};

template <auto Function>
struct Operator;
template <class Result, class... Arguments, Result (*Function)(Arguments...)>
struct Operator<Function> {
  using Returned = std::conditional_t<std::is_same_v<Result, Tensor>, torch::stable::Tensor, Result>;
  static Returned call(typename Argument<Arguments>::type... arguments) { return Function(std::move(arguments)...); }
};

// Registers a function as the kernel of an operator, in STABLE_TORCH_LIBRARY_IMPL(t2v_fast, CPU, m).
#define T2V_IMPL(NAME) m.impl(#NAME, TORCH_BOX(&Operator<NAME>::call))

}  // namespace t2v
