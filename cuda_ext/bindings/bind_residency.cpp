#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "bindings.hpp"
#include "lists.hpp"
#include "uvm_kv/residency.hpp"

namespace uvm_kv::bindings {
namespace {

using namespace nb::literals;
using Release = nb::call_guard<nb::gil_scoped_release>;
using Place = std::pair<int, int>;

Location to(Place place) { return checked_location(place.first, place.second); }
Place from(Location location) { return {static_cast<int>(location.type), location.id}; }

void give_advice(const Slab& slab, const Ranges& ranges, int advice, Place place, std::uintptr_t stream) {
  advise(slab, ranges.list, to_advice(advice), to(place), stream);
}
void bring(const Slab& slab, const Ranges& ranges, Place place, std::uintptr_t stream) {
  prefetch(slab, ranges.list, to(place), stream);
}
void bring_batch(const Slab& slab, const Ranges& ranges, Place place, std::uintptr_t stream) {
  prefetch_batch(slab, ranges.list, to(place), stream);
}
void drop(const Slab& slab, const Ranges& ranges, std::uintptr_t stream) { discard(slab, ranges.list, stream); }
void drop_and_bring(const Slab& slab, const Ranges& ranges, Place place, std::uintptr_t stream) {
  discard_and_prefetch(slab, ranges.list, to(place), stream);
}

}  // namespace

void bind_residency(nb::module_& m) {
  nb::class_<RangeState>(m, "RangeState", "What the driver says of a range; type 0 is none or mixed.")
      .def_ro("read_mostly", &RangeState::read_mostly)
      .def_prop_ro(
          "preferred", [](const RangeState& s) { return from(s.preferred); }, "(type, id)")
      .def_prop_ro(
          "last_prefetch", [](const RangeState& s) { return from(s.last_prefetch); }, "(type, id)")
      .def_ro("accessed_by", &RangeState::accessed_by, "Device ordinals; -1 is the CPU.");
  m.def("advise", &give_advice, "slab"_a, "ranges"_a, "advice"_a, "location"_a, nb::kw_only(), "stream"_a, Release(),
        "advice: cudaMemoryAdvise, 1 to 6. location: (cudaMemLocationType, id).");
  m.def("prefetch", &bring, "slab"_a, "ranges"_a, "to"_a, nb::kw_only(), "stream"_a, Release(),
        "One cudaMemPrefetchAsync a range.");
  m.def("prefetch_batch", &bring_batch, "slab"_a, "ranges"_a, "to"_a, nb::kw_only(), "stream"_a, Release(),
        "One cudaMemPrefetchBatchAsync.");
  m.def("discard", &drop, "slab"_a, "ranges"_a, nb::kw_only(), "stream"_a, Release(),
        "The bytes are no longer needed. Ranges must be whole pages.");
  m.def("discard_and_prefetch", &drop_and_bring, "slab"_a, "ranges"_a, "to"_a, nb::kw_only(), "stream"_a, Release(),
        "Room at a place without moving the old bytes there.");
  m.def(
      "query", [](const Slab& slab, std::size_t offset, std::size_t bytes) { return query(slab, {offset, bytes}); },
      "slab"_a, nb::kw_only(), "offset"_a, "num_bytes"_a, "Asks the driver.");
}

}  // namespace uvm_kv::bindings
