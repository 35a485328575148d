#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <utility>

#include "bindings.hpp"
#include "lists.hpp"
#include "uvm_kv/block_copy.hpp"
#include "uvm_kv/residency.hpp"
#include "uvm_kv/transfer_counters.hpp"

namespace uvm_kv::bindings {
namespace {

using namespace nb::literals;
using Release = nb::call_guard<nb::gil_scoped_release>;

int copy_blocks(const Slab& source, const Slab& target, const Runs& runs, int method, std::uintptr_t stream) {
  return static_cast<int>(copy(target, source, runs.list, static_cast<CopyMethod>(method), stream));
}

int measured_copy(TransferCounters& counters, const std::string& label, const Slab& source, const Slab& target,
                  const Runs& runs, int method, std::uintptr_t stream) {
  int used = method;
  counters.measure(label, num_bytes(runs), stream, [&] { used = copy_blocks(source, target, runs, method, stream); });
  return used;
}

void measured_prefetch(TransferCounters& counters, const std::string& label, const Slab& slab, const Ranges& ranges,
                       std::pair<int, int> to, bool batched, std::uintptr_t stream) {
  const Location place = checked_location(to.first, to.second);
  const auto bring = batched ? prefetch_batch : prefetch;
  counters.measure(label, num_bytes(ranges), stream, [&] { bring(slab, ranges.list, place, stream); });
}

void fill_range(const Slab& slab, std::size_t offset, std::size_t bytes, unsigned char value, std::uintptr_t stream) {
  fill(slab, {offset, bytes}, value, stream);
}

}  // namespace

void bind_copy(nb::module_& m) {
  m.def("copy", &copy_blocks, nb::kw_only(), "source"_a, "target"_a, "runs"_a, "method"_a, "stream"_a, Release(),
        "Enqueues the runs. method: 0 automatic, 1 batch, 2 each, 3 kernel. Returns the one used.");
  m.def("fill", &fill_range, "slab"_a, nb::kw_only(), "offset"_a, "num_bytes"_a, "value"_a, "stream"_a, Release(),
        "Sets every byte of a range.");
  nb::class_<TransferTotals>(m, "TransferTotals")
      .def_ro("num_calls", &TransferTotals::num_calls)
      .def_ro("num_bytes", &TransferTotals::bytes)
      .def_ro("ns", &TransferTotals::ns);
  nb::class_<TransferCounters>(m, "TransferCounters", "Bytes and device time of our own transfers, by label.")
      .def(nb::init<int>(), nb::kw_only(), "device"_a = 0, "device: of the streams that will be measured.")
      .def("copy", &measured_copy, "label"_a, nb::kw_only(), "source"_a, "target"_a, "runs"_a, "method"_a, "stream"_a,
           Release(), "copy() between two events.")
      .def("prefetch", &measured_prefetch, "label"_a, nb::kw_only(), "slab"_a, "ranges"_a, "to"_a, "batched"_a,
           "stream"_a, Release(), "prefetch() or prefetch_batch() between two events.")
      .def("totals", &TransferCounters::totals, nb::kw_only(), "wait"_a, Release(),
           "By label, of transfers that ended. wait: for those that have not.")
      .def_prop_ro("num_pending", &TransferCounters::num_pending);
}

}  // namespace uvm_kv::bindings
