// The emulator's controls for Python, for the module of any emulated kernels.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "control.h"
#include "error.h"

namespace longlora::simt {

inline void bind_control(pybind11::module_& module) {
  using namespace pybind11::literals;
  pybind11::register_exception<Error>(module, "Error", PyExc_RuntimeError);
  module.def(
      "configure", [](uint64_t seed, std::optional<std::string> drop) { configure(seed, drop.value_or("")); },
      "seed"_a = 0, "drop"_a = pybind11::none(),
      "Order blocks, warps and lanes by `seed`, leave out the site named `drop`, clear counters and sites.");
  module.def("counters", [] { return counters().named(); }, "What was issued since `configure`, counted once a warp.");
  module.def("sites", &sites,
             "The barriers, commits and waits met since `configure`, like 'mainloop_fwd.h:96 sync_block'.");
}

}  // namespace longlora::simt
