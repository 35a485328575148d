#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "bindings.hpp"
#include "uvm_kv/device_resource.hpp"
#include "uvm_kv/managed_resource.hpp"
#include "uvm_kv/pinned_resource.hpp"
#include "uvm_kv/statistics_resource.hpp"
#include "uvm_kv/vmm_resource.hpp"

namespace uvm_kv::bindings {
namespace {

using namespace nb::literals;
using Release = nb::call_guard<nb::gil_scoped_release>;

nb::dlpack::dtype to_dtype(const std::string& name) {
  using Code = nb::dlpack::dtype_code;
  const auto dtype = [](Code code, int bits) {
    return nb::dlpack::dtype{static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
  };
  if (name == "uint8") return dtype(Code::UInt, 8);
  if (name == "int32") return dtype(Code::Int, 32);
  if (name == "int64") return dtype(Code::Int, 64);
  if (name == "float16") return dtype(Code::Float, 16);
  if (name == "bfloat16") return dtype(Code::Bfloat, 16);
  if (name == "float32") return dtype(Code::Float, 32);
  throw std::invalid_argument("dtype " + name + "; it is one of uint8, int32, int64, float16, bfloat16, float32");
}

/// What a view owns: its share of the slab's memory, which may be the last one.
nb::capsule owner_of(const Slab& slab) {
  auto share = std::make_unique<std::shared_ptr<void>>(slab.hold());
  nb::capsule owner(share.get(), [](void* held) noexcept {
    const nb::gil_scoped_release release;  // Giving memory back waits for the device.
    delete static_cast<std::shared_ptr<void>*>(held);
  });
  share.release();
  return owner;
}

/// Always tagged as plain CUDA memory, managed memory too: torch refuses the managed tag.
nb::ndarray<nb::array_api> device_view(const Slab& slab, std::size_t offset, const std::vector<std::size_t>& shape,
                                       const std::string& dtype_name) {
  const nb::dlpack::dtype dtype = to_dtype(dtype_name);
  const std::size_t bytes = array_bytes(shape, dtype.bits / 8);
  require_aligned(offset, dtype.bits / 8, "a view of " + dtype_name);
  return nb::ndarray<nb::array_api>(slab.part({offset, bytes}), shape.size(), shape.data(), owner_of(slab), nullptr,
                                    dtype, nb::device::cuda::value, slab.resource().device());
}

nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>> host_view(const Slab& slab, std::size_t offset, std::size_t bytes) {
  return nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(slab.host_part({offset, bytes}), {bytes}, owner_of(slab));
}

void bind_slab(nb::module_& m) {
  nb::class_<Slab>(m, "Slab", "One allocation, aligned to 2 MiB. Freed when it and its views have ended.")
      .def(nb::init<std::shared_ptr<MemoryResource>, std::size_t>(), "resource"_a, "num_bytes"_a, Release())
      .def("close", &Slab::close, Release(), "Frees now, or with the last view of it.")
      .def_prop_ro("closed", &Slab::closed)
      .def_prop_ro("address", &Slab::address)
      .def_prop_ro("num_bytes", &Slab::bytes)
      .def_prop_ro("kind", [](const Slab& s) { return s.resource().kind(); })
      .def_prop_ro("device", [](const Slab& s) { return s.resource().device(); })
      .def_prop_ro("host_accessible", [](const Slab& s) { return s.resource().properties().host_accessible; })
      .def_prop_ro("device_accessible", [](const Slab& s) { return s.resource().properties().device_accessible; })
      .def_prop_ro("managed", [](const Slab& s) { return s.resource().properties().managed; })
      .def_prop_ro("host_offset", &Slab::host_offset, "The CPU may touch [host_offset, num_bytes).")
      .def("device_view", &device_view, nb::kw_only(), "offset"_a, "shape"_a, "dtype"_a,
           "A DLPack producer over part of the slab, tagged as CUDA memory. Keeps the memory alive.")
      .def("host_view", &host_view, nb::kw_only(), "offset"_a, "num_bytes"_a,
           "The bytes as a NumPy array over the same memory. Keeps the memory alive.");
}

void bind_kinds(nb::module_& m) {
  nb::class_<MemoryResource>(m, "MemoryResource", "How memory is allocated; see Slab.")
      .def_prop_ro("kind", &MemoryResource::kind)
      .def_prop_ro("device", &MemoryResource::device);
  nb::class_<DeviceResource, MemoryResource>(m, "DeviceResource", "cudaMalloc.")
      .def(nb::init<int>(), nb::kw_only(), "device"_a);
  nb::class_<PinnedResource, MemoryResource>(m, "PinnedResource", "Pinned host memory, mapped for the device.")
      .def(nb::init<int, int>(), nb::kw_only(), "device"_a, "numa_node"_a, "numa_node: -1 lets the kernel choose.")
      .def_prop_ro("numa_node", &PinnedResource::numa_node);
  nb::class_<ManagedResource, MemoryResource>(m, "ManagedResource", "cudaMallocManaged behind the guard.")
      .def(
          "__init__",
          [](ManagedResource* self, int device, std::size_t reserve_bytes, bool allow) {
            new (self) ManagedResource(device, {reserve_bytes, allow});
          },
          nb::kw_only(), "device"_a, "reserve_bytes"_a = kDefaultReserveBytes, "allow_oversubscription"_a = false);
  nb::class_<VmmResource, MemoryResource>(m, "VmmResource", "One range: device memory first, host memory after it.")
      .def(nb::init<int, std::size_t, int>(), nb::kw_only(), "device"_a, "device_bytes"_a, "numa_node"_a,
           "numa_node: -1 lets the driver choose.")
      .def_prop_ro("granularity", &VmmResource::granularity)
      .def_prop_ro("device_bytes", &VmmResource::device_bytes);
}

}  // namespace

void bind_resources(nb::module_& m) {
  nb::class_<Statistics>(m, "Statistics")
      .def_ro("held_bytes", &Statistics::held_bytes)
      .def_ro("peak_bytes", &Statistics::peak_bytes)
      .def_ro("total_bytes", &Statistics::total_bytes)
      .def_ro("num_held", &Statistics::num_held)
      .def_ro("num_allocations", &Statistics::num_allocations);
  bind_kinds(m);
  nb::class_<StatisticsResource, MemoryResource>(m, "StatisticsResource", "Counts what the wrapped resource does.")
      .def(nb::init<std::shared_ptr<MemoryResource>>(), "inner"_a)
      .def_prop_ro("statistics", &StatisticsResource::statistics);
  bind_slab(m);
  nb::class_<Booking>(m, "Booking", "Managed memory of another library, counted by the guard until it ends.")
      .def(
          "__init__",
          [](Booking* self, int device, std::size_t bytes, std::size_t reserve, bool allow) {
            new (self) Booking(bytes, [device] { return free_bytes(device); }, {reserve, allow});
          },
          nb::kw_only(), "device"_a, "num_bytes"_a, "reserve_bytes"_a = kDefaultReserveBytes,
          "allow_oversubscription"_a = false, "Before that library allocates; raises OversubscriptionError.")
      .def("end", &Booking::end, "When that library has freed it.");
  m.attr("default_reserve_bytes") = kDefaultReserveBytes;
  m.def(
      "managed_bytes_held", [] { return ManagedLedger::of_process().held(); },
      "Bytes of managed memory over all slabs and bookings of this process.");
  m.def(
      "require_fits",
      [](std::size_t held, std::size_t asked, std::size_t free, std::size_t reserve, bool allow) {
        require_fits(held, asked, free, {reserve, allow});
      },
      nb::kw_only(), "held_bytes"_a, "asked_bytes"_a, "free_bytes"_a, "reserve_bytes"_a,
      "allow_oversubscription"_a = false, "The guard's inequality by itself; raises OversubscriptionError.");
}

}  // namespace uvm_kv::bindings
