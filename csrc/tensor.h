// What the checks and the kernels read of a tensor. Only headers that are the same in every supported torch are used
// here.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace t2v {

using c10::BFloat16;
using c10::Half;
using torch::headeronly::ScalarType;

struct Sizes : std::span<const int64_t> {
  using span::span;
  Sizes(std::span<const int64_t> sizes) : span(sizes) {}
  Sizes(std::initializer_list<int64_t> sizes) : span(sizes.begin(), sizes.size()) {}
  bool operator==(const Sizes& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
};

// A tensor's memory, sizes, strides and dtype. A view owns nothing, so the tensor must outlive it.
class View {
 public:
  View() = default;
  View(const void* data, const int64_t* sizes, const int64_t* strides, int64_t axes, ScalarType type)
      : data_(data), sizes_(sizes), strides_(strides), axes_(axes), type_(type) {}

  int64_t dim() const { return axes_; }
  int64_t size(int64_t axis) const { return sizes_[axis]; }
  int64_t stride(int64_t axis) const { return strides_[axis]; }
  Sizes sizes() const { return {sizes_, static_cast<size_t>(axes_)}; }
  ScalarType scalar_type() const { return type_; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes()) count *= size;
    return count;
  }
  // Whether the elements are dense in the given order of the axes, the outermost first.
  bool is_dense(std::initializer_list<int> order) const {
    int64_t next = 1;
    for (const int* axis = order.end(); axis-- != order.begin();) {
      if (sizes_[*axis] != 1 && strides_[*axis] != next) return false;
      next *= sizes_[*axis];
    }
    return true;
  }
  bool is_contiguous() const {
    int64_t next = 1;
    for (int64_t axis = axes_; axis-- > 0; next *= sizes_[axis])
      if (sizes_[axis] != 1 && strides_[axis] != next) return numel() == 0;
    return true;
  }
  // The caller has checked the dtype.
  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(data_);
  }

 private:
  const void* data_ = nullptr;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int64_t axes_ = 0;
  ScalarType type_ = ScalarType::Undefined;
};

inline void write(std::ostream& to, Sizes sizes) {
  const char* separator = "[";
  for (const int64_t size : sizes) {
    to << separator << size;
    separator = ", ";
  }
  to << (sizes.empty() ? "[]" : "]");
}
inline void write(std::ostream& to, ScalarType type) { to << torch::headeronly::toString(type); }
template <class T>
  requires(!std::is_same_v<T, Sizes> && !std::is_same_v<T, ScalarType>)
void write(std::ostream& to, const T& value) {
  to << value;
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (write(out, parts), ...);
  return out.str();
}

// Raises ValueError (RuntimeError from torch 2.15 on) with a message that is composed of the remaining arguments.
#define T2V_CHECK_VALUE(CONDITION, ...) \
  if (!(CONDITION)) [[unlikely]]        \
  throw std::invalid_argument(t2v::text(__VA_ARGS__))

// Returns run<S>() with the C++ type S of a floating-point dtype.
template <class Run>
auto with_type(const char* op, ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Double:
      return run.template operator()<double>();
    case ScalarType::Float:
      return run.template operator()<float>();
    case ScalarType::BFloat16:
      return run.template operator()<BFloat16>();
    case ScalarType::Half:
      return run.template operator()<Half>();
    default:
      throw std::invalid_argument(text(op, ": expected a floating-point dtype, got ", type));
  }
}

}  // namespace t2v
