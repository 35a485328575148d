#include "arrays.hpp"

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <utility>

#include "uvm_kv/checks.hpp"

namespace nb = nanobind;

namespace uvm_kv::bindings {
namespace {

std::string dtype_name(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  const std::string bits = std::to_string(dtype.bits);
  switch (static_cast<Code>(dtype.code)) {
    case Code::Int:
      return "int" + bits;
    case Code::UInt:
      return "uint" + bits;
    case Code::Float:
      return "float" + bits;
    case Code::Bfloat:
      return "bfloat" + bits;
    default:
      return "DLPack type " + std::to_string(dtype.code) + " of " + bits + " bits";
  }
}

/// __cuda_array_interface__ says "<f2"; what we do not know stays as it is and is refused by name.
std::string dtype_name(const std::string& typestr) {
  if (typestr.size() < 3 || typestr[0] == '>') return typestr;
  const std::string bits = std::to_string(8 * std::stoi(typestr.substr(2)));
  switch (typestr[1]) {
    case 'i':
      return "int" + bits;
    case 'u':
      return "uint" + bits;
    case 'f':
      return "float" + bits;
    default:
      return typestr;
  }
}

std::vector<std::int64_t> packed_strides(const std::vector<std::int64_t>& shape, std::int64_t item_bytes) {
  std::vector<std::int64_t> strides(shape.size());
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = item_bytes;
    item_bytes *= shape[i];
  }
  return strides;
}

DeviceArray from_dlpack(nb::ndarray<> array, const char* name) {
  const int where = array.device_type();
  const bool pageable = where == nb::device::cpu::value;
  const bool reachable = pageable || where == nb::device::cuda::value || where == nb::device::cuda_managed::value ||
                         where == nb::device::cuda_host::value;
  require(reachable, std::string(name) + " lies on device type " + std::to_string(where) +
                         " (DLPack); a kernel needs CUDA memory");
  DeviceArray out{static_cast<std::byte*>(array.data()), {}, {}, dtype_name(array.dtype()), -1, pageable};
  if (where == nb::device::cuda::value) out.device = array.device_id();
  const auto item_bytes = static_cast<std::int64_t>(array.itemsize());
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    out.shape.push_back(static_cast<std::int64_t>(array.shape(i)));
    out.strides.push_back(array.stride(i) * item_bytes);
  }
  return out;
}

DeviceArray from_interface(const nb::dict& interface) {
  DeviceArray out{};
  out.data = reinterpret_cast<std::byte*>(nb::cast<std::uintptr_t>(interface["data"][0]));
  for (const nb::handle extent : nb::borrow<nb::tuple>(interface["shape"]))
    out.shape.push_back(nb::cast<std::int64_t>(extent));
  const std::string typestr = nb::cast<std::string>(interface["typestr"]);
  out.dtype = dtype_name(typestr);
  const nb::object strides = interface.contains("strides") ? nb::object(interface["strides"]) : nb::none();
  if (strides.is_none()) {
    out.strides = packed_strides(out.shape, typestr.size() < 3 ? 1 : std::stoi(typestr.substr(2)));
  } else {
    for (const nb::handle stride : nb::borrow<nb::tuple>(strides))
      out.strides.push_back(nb::cast<std::int64_t>(stride));
  }
  out.device = -1;
  return out;
}

}  // namespace

DeviceArray device_array(nb::handle object, const char* name) {
  nb::ndarray<> array;
  if (nb::try_cast(object, array)) return from_dlpack(std::move(array), name);
  const nb::object interface = nb::getattr(object, "__cuda_array_interface__", nb::none());
  if (nb::isinstance<nb::dict>(interface)) return from_interface(nb::borrow<nb::dict>(interface));
  throw nb::type_error((std::string(name) + " is no device array: it has neither DLPack nor __cuda_array_interface__")
                           .c_str());
}

std::int64_t row_stride(const DeviceArray& array) {
  if (array.shape[0] > 1) return array.strides[0];
  return packed_strides(array.shape, array.dtype.ends_with("32") ? 4 : 2)[0];
}

void require_rows(const DeviceArray& array, const char* name, const std::string& dtype,
                  const std::vector<std::int64_t>& shape) {
  const auto list = [](const std::vector<std::int64_t>& extents) {
    std::string out;
    for (const std::int64_t extent : extents) out += (out.empty() ? "" : ", ") + (extent < 0 ? "*" : std::to_string(extent));
    return "[" + out + "]";
  };
  bool fits = array.dtype == dtype && array.shape.size() == shape.size();
  for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || array.shape[i] == shape[i];
  require(fits, std::string(name) + " is " + array.dtype + " " + list(array.shape) + "; it must be " + dtype + " " +
                    list(shape));
  const std::int64_t item_bytes = dtype.ends_with("32") ? 4 : 2;
  const std::vector<std::int64_t> packed = packed_strides(array.shape, item_bytes);
  for (std::size_t i = array.shape.size() == 1 ? 0 : 1; i < array.shape.size(); ++i) {
    require(array.shape[i] <= 1 || array.strides[i] == packed[i],
            std::string(name) + " has strides of " + list(array.strides) +
                " bytes; every axis but the first must be contiguous");
  }
}

}  // namespace uvm_kv::bindings
