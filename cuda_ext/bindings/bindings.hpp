// One function for each topic; module.cpp calls them all. Names, functions and docstrings only: logic is in include/.
#pragma once

#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace uvm_kv::bindings {

void bind_errors(nb::module_& m);
void bind_device(nb::module_& m);
void bind_stream(nb::module_& m);
void bind_resources(nb::module_& m);
void bind_layout(nb::module_& m);
void bind_residency(nb::module_& m);
void bind_copy(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_probes(nb::module_& m);

}  // namespace uvm_kv::bindings
