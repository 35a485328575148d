#include <nanobind/stl/unique_ptr.h>

#include <memory>

#include "bindings.hpp"
#include "uvm_kv/stream.hpp"

namespace uvm_kv::bindings {

void bind_stream(nb::module_& m) {
  using namespace nb::literals;
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Graph>(m, "Graph", "A captured CUDA graph. The events it meets must be kept as long as it is.")
      .def("launch", &Graph::launch, nb::kw_only(), "stream"_a)
      .def_prop_ro("num_nodes", &Graph::num_nodes);
  nb::class_<Stream>(m, "Stream", "A CUDA stream that does not wait for the legacy stream.")
      .def(nb::init<int>(), nb::kw_only(), "device"_a = 0)
      .def_prop_ro("handle", &Stream::handle)
      .def_prop_ro("capturing", &Stream::capturing)
      .def("synchronize", &Stream::synchronize, Release())
      .def("begin_capture", &Stream::begin_capture, "What is issued from now on is captured, not run.")
      .def("end_capture", [](const Stream& s) { return std::make_unique<Graph>(s.end_capture()); });
  nb::class_<Event>(m, "Event", "A CUDA event.")
      .def(nb::init<bool, int>(), nb::kw_only(), "timing"_a = false, "device"_a = 0)
      .def("record", &Event::record, nb::kw_only(), "stream"_a, "external"_a = false,
           "external: of a capturing stream, a node that records anew on each replay.")
      .def("wait", &Event::wait, nb::kw_only(), "stream"_a, "external"_a = false,
           "Later work of the stream waits. external: of a capturing stream, a node that waits for the latest record.")
      .def("done", &Event::done)
      .def("synchronize", &Event::synchronize, Release())
      .def("ns_since", &Event::ns_since, "begin"_a, "Nanoseconds from another event; both need timing=True.");
}

}  // namespace uvm_kv::bindings
