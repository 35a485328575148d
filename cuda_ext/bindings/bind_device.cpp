#include <nanobind/stl/string.h>

#include "bindings.hpp"
#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/numa.hpp"

namespace uvm_kv::bindings {
namespace {

std::string device_name(int device) {
  cudaDeviceProp properties{};
  UVM_KV_CUDA(cudaGetDeviceProperties(&properties, device));
  return properties.name;
}

std::string pci_bus_id(int device) {
  char id[32] = {};
  UVM_KV_CUDA(cudaDeviceGetPCIBusId(id, sizeof(id), device));
  return id;
}

int num_multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }
int l2_bytes(int device) { return attribute(cudaDevAttrL2CacheSize, device); }

void synchronize(int device) {
  const DeviceScope scope(device);
  UVM_KV_CUDA(cudaDeviceSynchronize());
}

}  // namespace

void bind_device(nb::module_& m) {
  using namespace nb::literals;
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("cuda_architectures") = UVM_KV_CUDA_ARCHITECTURES;
  m.attr("sources_sha256") = UVM_KV_SOURCES_SHA256;
  m.def("num_devices", &num_devices, "Visible devices. Raises CudaError where there is no driver or no device.");
  m.def("driver_version", &driver_version, "1000 * major + 10 * minor of the driver's CUDA; 0 without a driver.");
  m.def("num_numa_nodes", &num_numa_nodes, "NUMA nodes of the host; needs no device.");
  m.def("free_bytes", &free_bytes, "device"_a, "Free bytes of the card at this moment.");
  m.def("total_bytes", &total_bytes, "device"_a, "Bytes of the card.");
  m.def("device_name", &device_name, "device"_a);
  m.def("pci_bus_id", &pci_bus_id, "device"_a);
  m.def("num_multiprocessors", &num_multiprocessors, "device"_a);
  m.def("l2_bytes", &l2_bytes, "device"_a);
  m.def("compute_capability", &compute_capability, "device"_a, "10 * major + minor.");
  m.def("managed_memory", &managed_memory, "device"_a);
  m.def("concurrent_managed_access", &concurrent_managed_access, "device"_a, "GPU page faults and hints.");
  m.def("pageable_memory_access", &pageable_memory_access, "device"_a, "The GPU reads plain malloc memory.");
  m.def("mapped_host_memory", &mapped_host_memory, "device"_a);
  m.def("virtual_memory_management", &virtual_memory_management, "device"_a);
  m.def("host_virtual_memory", &host_virtual_memory, "device"_a, "Virtual memory management on a host NUMA node.");
  m.def("host_virtual_memory_of_any_node", &host_virtual_memory_of_any_node, "device"_a,
        "Virtual memory management of host memory wherever the driver puts it.");
  m.def("batch_copy", &batch_copy, "cudaMemcpyBatchAsync is there.");
  m.def("batch_prefetch", &batch_prefetch, "Batched prefetch and discard are there.");
  m.def("host_numa_node", &host_numa_node, "device"_a, "Node next to the device; -1 without NUMA.");
  m.def("synchronize", &synchronize, "device"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace uvm_kv::bindings
