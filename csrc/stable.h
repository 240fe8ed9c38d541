// Tensors and operators of every compiled backend, through the stable interface of LibTorch: C functions and headers
// that stay the same from torch 2.10 on. One compiled library serves every later torch and every Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "tensor.h"

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
  // torch::stable::Tensor's own functions would make several times as many calls.
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

inline Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : Tensor(torch::stable::contiguous(t)); }
inline Tensor converted(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : Tensor(torch::stable::to(t, type));
}

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

// Registers a function as the kernel of an operator, in STABLE_TORCH_LIBRARY_IMPL(t2v_fast, DEVICE, m).
#define T2V_IMPL(NAME) m.impl(#NAME, TORCH_BOX(&Operator<NAME>::call))

}  // namespace t2v
