// The Python module t2v_fast._C: build information. Importing it registers the operators' kernels.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <stdexcept>
#include <string>

#include "cpu/tile.h"

namespace py = pybind11;

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
