// Information about the build, and settings, as C functions. t2v_fast/ops/extension.py calls them through ctypes, so
// that the library needs no Python of its own. Loading the library registers the operators' kernels.
#include <cstdint>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "tile.h"

#define T2V_EXPORT extern "C" __attribute__((visibility("default")))

T2V_EXPORT const char* t2v_compiler() { return __VERSION__; }

// The instruction sets of this build, separated by spaces.
T2V_EXPORT const char* t2v_cpu_isas() { return T2V_CPU_ISAS; }

T2V_EXPORT const char* t2v_cpu_capability() { return t2v::cpu_capability(); }

T2V_EXPORT bool t2v_set_cpu_capability(const char* name) { return t2v::set_cpu_capability(name); }

// Elements of a vector in the instruction set in use.
T2V_EXPORT int t2v_vector_width(bool double_precision) {
  return double_precision ? t2v::kernels<double>().width : t2v::kernels<float>().width;
}

T2V_EXPORT int64_t t2v_few_positions() { return t2v::few_positions; }

// Sets whether freed memory stays with the process, so that later allocations reuse its pages. Returns false where the
// allocator has no such setting.
T2V_EXPORT bool t2v_keep_freed_memory([[maybe_unused]] bool keep) {
#ifdef __GLIBC__
  constexpr int largest_threshold = 4 * 1024 * 1024 * sizeof(long);  // the upper limit of glibc's own adaptation
  mallopt(M_MMAP_MAX, keep ? 0 : 65536);
  mallopt(M_MMAP_THRESHOLD, largest_threshold);
  mallopt(M_TRIM_THRESHOLD, keep ? -1 : 2 * largest_threshold);
  if (!keep) malloc_trim(0);
  return true;
#else
  return false;
#endif
}
