#include "bindings.hpp"
#include "uvm_kv/probes.cuh"

namespace uvm_kv::bindings {
namespace {

void fill_span(std::uintptr_t address, std::size_t bytes, int kind, std::uint32_t seed, float scale,
               std::uintptr_t stream) {
  probe_fill(address, bytes, static_cast<FillKind>(kind), seed, scale, stream);
}

}  // namespace

void bind_probes(nb::module_& m) {
  using namespace nb::literals;
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.attr("max_delay_ns") = kMaxDelayNs;
  m.def("probe_read", &probe_read, "address"_a, "num_bytes"_a, nb::kw_only(), "total"_a, "stream"_a, Release(),
        "Adds the sum of all 32-bit words to the 64-bit word at the address `total`. In multiples of 16 bytes.");
  m.def("probe_add_one", &probe_add_one, "address"_a, "num_bytes"_a, nb::kw_only(), "stream"_a, Release(),
        "Adds one to every 32-bit word, grid-stride and ascending.");
  m.def("probe_add_one_pages", &probe_add_one_pages, "address"_a, "num_bytes"_a, nb::kw_only(), "order"_a,
        "words_per_page"_a, "stream"_a, Release(),
        "Adds one to the first words of each 4 KiB page, one thread a page; order: address of uint32 [pages].");
  m.def("probe_fill", &fill_span, "address"_a, "num_bytes"_a, nb::kw_only(), "kind"_a, "seed"_a, "scale"_a, "stream"_a,
        Release(), "Random contents. kind: 0 words, 1 fp16, 2 bf16, 3 fp32, uniform in [-scale, scale).");
  m.def("probe_delay", &probe_delay, "ns"_a, nb::kw_only(), "stream"_a, Release(),
        "Holds the stream for about ns, at most max_delay_ns.");
}

}  // namespace uvm_kv::bindings
