// The extension module uvm_kv.memory._C. Importing it touches neither the driver nor a device.
#include "bindings.hpp"

NB_MODULE(_C, m) {
  using namespace uvm_kv::bindings;
  m.doc() = "Memory of the KV slabs: resources, hints, copies, kernels. Use it through uvm_kv.memory.";
  bind_errors(m);
  bind_device(m);
  bind_stream(m);
  bind_resources(m);
  bind_layout(m);
  bind_residency(m);
  bind_copy(m);
  bind_attention(m);
  bind_probes(m);
}
