// The choice of the instruction set at run time.
#include <atomic>
#include <cstring>

#if defined(T2V_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(T2V_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "tile.h"

namespace t2v {

#define T2V_DECLARE(isa)                     \
  namespace isa {                            \
  extern const Kernels<float> single_table;  \
  extern const Kernels<double> double_table; \
  }

#if defined(T2V_X86)
T2V_DECLARE(avx512bf16)
T2V_DECLARE(avx512)
T2V_DECLARE(avx2)
T2V_DECLARE(portable)
#elif defined(T2V_ARM)
T2V_DECLARE(neonbf16)
T2V_DECLARE(neon)
#else
T2V_DECLARE(portable)
#endif

namespace {

struct Capability {
  const Kernels<float>* single;
  const Kernels<double>* both;
  bool available;
};

#if defined(T2V_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#elif defined(T2V_ARM)
// Whether the processor has dot products of bfloat16 pairs (BFDOT).
bool has_bf16() {
#if defined(__linux__)
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, which older system headers lack
  return getauxval(AT_HWCAP2) & bf16;
#elif defined(__APPLE__)
  int found = 0;
  size_t bytes = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &bytes, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}
#endif

// The instruction sets of this build, the best one first.
const Capability* capabilities(int& count) {
  static const Capability all[] = {
#if defined(T2V_X86)
      {&avx512bf16::single_table, &avx512bf16::double_table,
       has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
      {&avx512::single_table, &avx512::double_table, has_avx512()},
      {&avx2::single_table, &avx2::double_table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&portable::single_table, &portable::double_table, true},
#elif defined(T2V_ARM)
      {&neonbf16::single_table, &neonbf16::double_table, has_bf16()},
      {&neon::single_table, &neon::double_table, true},
#else
      {&portable::single_table, &portable::double_table, true},
#endif
  };
  count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Capability* best() {
  int count;
  const Capability* all = capabilities(count);
  while (!all->available) ++all;
  return all;
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> value{best()};
  return value;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *current().load()->single;
}

template <>
const Kernels<double>& kernels<double>() {
  return *current().load()->both;
}

bool set_cpu_capability(const char* name) {
  int count;
  const Capability* all = capabilities(count);
  for (int k = 0; k < count; ++k)
    if (all[k].available && std::strcmp(all[k].single->name, name) == 0) {
      current() = &all[k];
      return true;
    }
  return false;
}

const char* cpu_capability() { return current().load()->single->name; }

}  // namespace t2v
