// The pybind11 module bigmodel_fast._C: what is not a tensor operator. Importing it also loads the operator library,
// which registers torch.ops.bigmodel_fast.*; `import torch` must have come first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/isa.h"
#include "core/packed_weights.h"
#include "core/scratch.h"
#include "mlp_trainer_module.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native side of bigmodel_fast: instruction sets and build information.";
  bmf::active_isa();  // a wrong BMF_CPU_ISA is an error now, not at the first operator
  m.def("cpu_isa", [] { return bmf::isa_name(bmf::active_isa()); }, "Instruction set the CPU kernels use.");
  m.def("set_cpu_isa", &bmf::set_isa, py::arg("name"),
        "Force an instruction set; ValueError if this machine lacks it.");
  m.def(
      "supported_cpu_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < bmf::kIsaCount; ++i)
          if (auto isa = static_cast<bmf::Isa>(i); bmf::isa_supported(isa)) names.push_back(bmf::isa_name(isa));
        return names;
      },
      "Instruction sets compiled in that this machine has, slowest first.");
  m.def("scratch_kept_bytes", &bmf::scratch_kept_bytes, "Bytes of working memory kept for later calls.");
  m.def(
      "hold_weights",
      [](uintptr_t data, size_t bytes) { bmf::hold_weights(reinterpret_cast<const void*>(data), bytes); },
      py::arg("data"), py::arg("bytes"), "Keep packed copies of weights in this memory until they are released.");
  m.def(
      "release_weights", [](uintptr_t data) { bmf::release_weights(reinterpret_cast<const void*>(data)); },
      py::arg("data"), "End one hold of the memory that begins here.");
  m.def("packed_weights_bytes", &bmf::packed_weights_bytes, "Bytes of all packed copies of held weights.");
  m.attr("scratch_kept_limit") = bmf::kScratchKeptLimit;
  bind_mlp_trainer(m);
  py::dict build;
  build["compiler"] = BMF_COMPILER;
  build["torch_built_with"] = BMF_TORCH_VERSION;
  build["torch_target"] = BMF_TORCH_TARGET;
  build["cuda"] = BMF_HAS_CUDA != 0;
  m.attr("build_info") = build;
}
