// The Python module t2v_fast._C: information about the build, and settings. Importing it registers the operators'
// kernels.
#include <pybind11/pybind11.h>
#include <torch/version.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <stdexcept>
#include <string>

#include "cpu/tile.h"

namespace py = pybind11;

namespace {

// Sets whether freed memory stays with the process, so that later allocations reuse its pages. Returns false where the
// allocator has no such setting.
bool keep_freed_memory([[maybe_unused]] bool keep) {
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of t2v-fast.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["cpu"] = T2V_CPU_ISAS;
        info["cuda"] = T2V_CUDA;
        return info;
      },
      "What this extension was built with.");
  m.def(
      "vector_width",
      [](bool double_precision) {
        return double_precision ? t2v::kernels<double>().width : t2v::kernels<float>().width;
      },
      py::arg("double_precision"), "Elements of a vector in the instruction set in use.");
  m.def("keep_freed_memory", keep_freed_memory, py::arg("keep"),
        "Whether freed memory stays with the process; returns whether this allocator can be told.");
  m.attr("few_positions") = t2v::few_positions;
  m.def("cpu_capability", &t2v::cpu_capability, "The instruction set in use.");
  m.def(
      "set_cpu_capability",
      [](const std::string& name) {
        if (!t2v::set_cpu_capability(name.c_str()))
          throw std::invalid_argument("instruction set '" + name +
                                      "' is not in this build (" T2V_CPU_ISAS ") or not on this processor");
      },
      py::arg("name"), "Force one of the instruction sets of build_info()['cpu'].");
}
