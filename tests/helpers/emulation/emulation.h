// The part of CUDA that csrc/cuda uses, on the host: blocks run in a loop, and threads are fibers. Kernels run as
// written, in the most extreme orders that a GPU may choose: a thread runs as far as it can before the next one starts,
// in either order, and asynchronous copies complete at once or only when they are waited for. Shared memory starts as
// NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <source_location>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;

namespace emulation {

struct Index {
  unsigned x;
};

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "emulation: %s\n", message.c_str());
  std::abort();
}

inline std::string place(const std::source_location& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

// The settings of a run, and the barriers that it reached.
struct Settings {
  bool backwards = false;       // whether the last thread runs first
  bool eager = false;           // whether copies complete at once
  std::string left_out;         // the barrier or wait, as file:line, that is skipped
  std::set<std::string> sites;  // all barriers and waits that were reached
};
inline Settings settings;

// Records a barrier or wait, and returns whether it is obeyed.
inline bool obeyed(const std::source_location& where) {
  std::string site = place(where);
  const bool kept = site != settings.left_out;
  settings.sites.insert(std::move(site));
  return kept;
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  void run() const { from ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes); }
};

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  State state;
  std::string where;
  std::deque<std::vector<Copy>> groups;  // groups of copies in progress; the last group is still open
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
};

// The values that the lanes of a warp exchange.
struct Warp {
  double a[256], b[256];
};

struct Grid {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;  // exactly the requested size, so that AddressSanitizer detects accesses beyond it
  size_t shared_size = 0;
  const std::function<void()>* body = nullptr;
  int current = 0;
  ucontext_t context;
  jmp_buf jump;
};
inline Grid* grid = nullptr;

inline Fiber& self() { return grid->fibers[grid->current]; }
inline Warp& warp() { return grid->warps[grid->current / 32]; }
inline int lane() { return grid->current % 32; }

// Contexts make and start fibers; after that, jumps switch between them without the kernel's help. AddressSanitizer
// does not follow jumps to other stacks.
#ifdef __SANITIZE_ADDRESS__
inline void leave() { swapcontext(&self().context, &grid->context); }
inline void enter(Fiber& fiber) { swapcontext(&grid->context, &fiber.context); }
#else
inline void leave() {
  if (!_setjmp(self().jump)) _longjmp(grid->jump, 1);
}
inline void enter(Fiber& fiber) {
  if (_setjmp(grid->jump)) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}
#endif

inline void fiber_main() {
  for (;;) {
    (*grid->body)();
    self().state = State::done;
    leave();
  }
}

inline void wait(State state, const std::source_location& where) {
  self().state = state;
  self().where = place(where);
  leave();
}

inline void warp_barrier(const std::source_location& where) { wait(State::at_warp_barrier, where); }

// Resumes the fibers if all of them wait in one place; returns false otherwise.
inline bool release(int first, int last, State state) {
  for (int k = first; k < last; ++k) {
    const Fiber& fiber = grid->fibers[k];
    if (fiber.state != state || fiber.where != grid->fibers[first].where) return false;
  }
  for (int k = first; k < last; ++k) grid->fibers[k].state = State::ready;
  return true;
}

inline Index thread_index, block_index;

inline void run_block() {
  const int threads = static_cast<int>(grid->fibers.size());
  if (grid->shared) std::memset(grid->shared, 0xff, grid->shared_size);
  for (Fiber& fiber : grid->fibers) {
    fiber.state = State::ready;
    fiber.groups.assign(1, {});
  }
  for (;;) {
    bool ran = false;
    int done = 0;
    for (int k = 0; k < threads; ++k) {
      grid->current = settings.backwards ? threads - 1 - k : k;
      Fiber& fiber = self();
      if (fiber.state == State::ready) {
        thread_index = {static_cast<unsigned>(grid->current)};
        enter(fiber);
        ran = true;
      }
      done += fiber.state == State::done;
    }
    if (done == threads) return;
    for (int first = 0; first < threads; first += 32)
      ran |= release(first, std::min(first + 32, threads), State::at_warp_barrier);
    ran |= release(0, threads, State::at_block_barrier);
    if (ran) continue;
    std::set<std::string> places;
    for (const Fiber& fiber : grid->fibers) places.insert(fiber.state == State::done ? "the end" : fiber.where);
    std::string all;
    for (const std::string& one : places) all += " " + one;
    fail("the threads of a block wait for each other in different places:" + all);
  }
}

inline unsigned char* shared_memory(size_t bytes) {
  if (!grid->shared) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes)) fail("out of memory");
    std::memset(memory, 0xff, bytes);
    grid->shared = static_cast<unsigned char*>(memory);
    grid->shared_size = bytes;
  }
  if (bytes != grid->shared_size) fail("a kernel asks for shared memory of two sizes");
  return grid->shared;
}

inline void run(int64_t blocks, int threads, const std::function<void()>& body) {
  if (threads < 1 || threads > 1024 || threads % 32) fail("no GPU would launch this");
  Grid mine;
  mine.fibers.resize(threads);
  mine.warps.resize(threads / 32);
  mine.body = &body;
  grid = &mine;
  constexpr size_t stack = 1 << 18;
  static const auto stacks = std::make_unique_for_overwrite<unsigned char[]>(1024 * stack);  // for all launches
  for (int k = 0; k < threads; ++k) {
    Fiber& fiber = mine.fibers[k];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &stacks[k * stack];
    fiber.context.uc_stack.ss_size = stack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    block_index = {static_cast<unsigned>(block)};
    run_block();
  }
  grid = nullptr;
  std::free(mine.shared);
}

}  // namespace emulation

// For the tests, through ctypes.
extern "C" inline __attribute__((used, visibility("default"))) void emulation_set(bool backwards, bool eager,
                                                                                  const char* left_out) {
  emulation::settings.backwards = backwards;
  emulation::settings.eager = eager;
  emulation::settings.left_out = left_out;
}
extern "C" inline __attribute__((used, visibility("default"))) const char* emulation_sites() {
  static std::string all;
  all.clear();
  for (const std::string& site : emulation::settings.sites) all += site + " ";
  return all.c_str();
}

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  if (emulation::obeyed(where)) emulation::wait(emulation::State::at_block_barrier, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, std::source_location where = std::source_location::current()) {
  if (mask != 0xffffffffu) emulation::fail("only whole warps are emulated");
  emulation::warp().a[emulation::lane()] = static_cast<double>(value);
  emulation::warp_barrier(where);
  const T other = static_cast<T>(emulation::warp().a[emulation::lane() ^ offset]);
  emulation::warp_barrier(where);
  return other;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }

namespace t2v::cuda {

template <size_t Bytes>
unsigned char* shared_memory() {
  static_assert(Bytes <= 48 * 1024, "more than every GPU grants a block");
  return emulation::shared_memory(Bytes);
}

template <int Bytes>
void copy_async(void* to, const void* from, bool inside) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if (reinterpret_cast<uintptr_t>(to) % Bytes || reinterpret_cast<uintptr_t>(from) % Bytes)
    emulation::fail("a copy of " + std::to_string(Bytes) + " bytes is not aligned");
  if (!from) emulation::fail("a copy reads from null, which no GPU accepts");
  const emulation::Copy copy{to, inside ? from : nullptr, Bytes};
  if (emulation::settings.eager)
    copy.run();
  else
    emulation::self().groups.back().push_back(copy);
}

inline void group_copies() { emulation::self().groups.emplace_back(); }

template <int Pending>
void wait_for_copies(std::source_location where = std::source_location::current()) {
  if (!emulation::obeyed(where)) return;
  auto& groups = emulation::self().groups;
  for (; static_cast<int>(groups.size()) - 1 > Pending; groups.pop_front())
    for (const emulation::Copy& copy : groups.front()) copy.run();
}

template <class... Parameters>
void launch(const char*, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
            std::type_identity_t<Parameters>... arguments) {
  emulation::run(blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace t2v::cuda

// Matrix fragments. The hardware does not document which lane holds which element, so a kernel must not rely on it.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32;
}

inline float rounded(float value, uint32_t half) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + half) & ~0x1fffu;  // ten bits of mantissa
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __float_to_tf32(float value) { return rounded(value, 0x1000); }

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr bool tf32 = std::is_same_v<T, precision::tf32>;
  static_assert(M == 16 && N == 16 && (std::is_same_v<Use, accumulator> || K == (tf32 ? 8 : 16)));
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M, columns = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = rows * columns / 32;
  std::conditional_t<tf32, float, T> x[num_elements];

  // The place of the lane's e-th element in the matrix, by rows.
  static int at(int e) { return e * 32 + (emulation::lane() ^ 21); }
};

template <class T>
void check_matrix(const T* at, unsigned pitch) {
  if (reinterpret_cast<uintptr_t>(at) % 32 || pitch * sizeof(T) % 16) emulation::fail("a matrix is not aligned");
}

template <class Use, int M, int N, int K, class T>
void fill_fragment(fragment<Use, M, N, K, T>& f, float value) {
  for (auto& x : f.x) x = value;
}

template <class Use, int M, int N, int K, class T, class Layout, class S>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const S* from, unsigned pitch) {
  check_matrix(from, pitch);
  using F = fragment<Use, M, N, K, T, Layout>;
  for (int e = 0; e < F::num_elements; ++e) {
    const int row = F::at(e) / F::columns, column = F::at(e) % F::columns;
    f.x[e] = std::is_same_v<Layout, row_major> ? from[row * pitch + column] : from[column * pitch + row];
  }
}

template <int K>
void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, K, float>& f, unsigned pitch, layout_t layout) {
  check_matrix(to, pitch);
  using F = fragment<accumulator, 16, 16, K, float>;
  for (int e = 0; e < F::num_elements; ++e) {
    const int row = F::at(e) / 16, column = F::at(e) % 16;
    to[layout == mem_row_major ? row * pitch + column : column * pitch + row] = f.x[e];
  }
}

template <int K, class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, K, float>& d, const fragment<matrix_a, 16, 16, K, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, K, T, LayoutB>& b, const fragment<accumulator, 16, 16, K, float>& c,
              std::source_location where = std::source_location::current()) {
  const auto show = [](double* to, const auto& f) {
    using F = std::remove_cvref_t<decltype(f)>;
    for (int e = 0; e < F::num_elements; ++e) {
      const auto value = static_cast<float>(f.x[e]);
      to[F::at(e)] = F::tf32 ? rounded(value, 0) : value;  // tensor cores ignore the lower bits
    }
  };
  show(emulation::warp().a, a);
  show(emulation::warp().b, b);
  emulation::warp_barrier(where);
  using F = fragment<accumulator, 16, 16, K, float>;
  for (int e = 0; e < F::num_elements; ++e) {
    const int row = F::at(e) / 16, column = F::at(e) % 16;
    float sum = c.x[e];
    for (int k = 0; k < K; ++k)
      sum += static_cast<float>(emulation::warp().a[row * K + k]) *
             static_cast<float>(emulation::warp().b[k * 16 + column]);
    d.x[e] = sum;
  }
  emulation::warp_barrier(where);
}

}  // namespace nvcuda::wmma
