// CUDA, or its emulation on the host, which runs the same sources in the tests; and helpers of every kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifdef T2V_EMULATED
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>
#endif

namespace t2v::cuda {

#ifndef T2V_EMULATED

// The block's shared memory. Every call in a kernel returns the same memory.
template <size_t Bytes>
__device__ inline unsigned char* shared_memory() {
  __shared__ __align__(128) unsigned char bytes[Bytes];
  return bytes;
}

// Starts a copy of 4, 8 or 16 bytes from global to shared memory, or of zeros if not `inside`.
template <int Bytes>
__device__ inline void copy_async(void* to, const void* from, bool inside) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  // A size of zero reads nothing, but the address must still be in global memory.
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(address), "l"(from), "n"(Bytes),
                 "r"(inside ? Bytes : 0)
                 : "memory");
}

// Makes a group of the copies that this thread has started since the last group.
__device__ inline void group_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until all but the last `Pending` groups of this thread's copies are complete.
template <int Pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            std::type_identity_t<Parameters>... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(op) + ": too large for one launch");
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the launch failed: " + cudaGetErrorString(error));
}

#endif

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }

// Division by a number that is known at launch, as a multiplication. Dividends are from 0 to 2^31 - 1.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    magic_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor_) << 32) / divisor_ + 1);
  }
  __device__ int quotient(int n) const {
    const auto dividend = static_cast<uint32_t>(n);
    return static_cast<int>((__umulhi(dividend, magic_) + dividend) >> shift_);
  }
  __device__ int remainder(int n, int quotient) const { return n - quotient * static_cast<int>(divisor_); }

 private:
  uint32_t divisor_ = 1, magic_ = 1, shift_ = 0;
};

template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// V values that are read with one instruction: 16 bytes, or one value.
template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T values[V];
};

// The number of values in 16 bytes.
template <class T>
inline constexpr int kWide = 16 / sizeof(T);

// Whether reads of 16 bytes may start at this address.
template <class T>
bool aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// A block's share of the work, decoded from the block's number one axis at a time.
class Share {
 public:
  __device__ int of(int count) {
    const int mine = block_ % count;
    block_ /= count;
    return mine;
  }
  __device__ int rest() const { return block_; }

 private:
  int block_ = blockIdx.x;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace t2v::cuda
