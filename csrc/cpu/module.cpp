// The extension module skyrl_mega_kernels._C. Importing it registers the operators of all sources here as
// torch.ops.skyrl_mega_cpu.*; the module itself has no attributes.
#include <Python.h>
#include <torch/library.h>

#include <string>

#include "isa.h"

// Which variant of the kernels runs on this CPU: "avx512", "avx2" or "portable".
static std::string isa() { return skyrl_mega::isa_name(skyrl_mega::active_isa()); }

TORCH_LIBRARY(skyrl_mega_cpu, library) { library.def("isa() -> str", &isa); }

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
