#include "bindings.hpp"
#include "uvm_kv/cuda_check.hpp"
#include "uvm_kv/errors.hpp"

namespace uvm_kv::bindings {

void bind_errors(nb::module_& m) {
  const auto cuda = nb::exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  nb::exception<OutOfMemory>(m, "OutOfMemoryError", cuda.ptr());
  nb::exception<OversubscriptionError>(m, "OversubscriptionError", PyExc_RuntimeError);
  nb::exception<MissingCapability>(m, "MissingCapabilityError", PyExc_RuntimeError);
  nb::exception<CapturingStreamError>(m, "CapturingStreamError", PyExc_RuntimeError);
}

}  // namespace uvm_kv::bindings
