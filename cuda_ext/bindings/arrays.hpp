// Arrays of other libraries, borrowed for the length of a call: by DLPack, else by __cuda_array_interface__.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace uvm_kv::bindings {

/// Strides are in bytes. The object it came from keeps the memory alive.
struct DeviceArray {
  std::byte* data;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  std::string dtype;
  int device;     ///< -1: not told
  bool pageable;  ///< In ordinary host memory, which few devices reach.
};

/// `name` stands in the error of an object that is no array, or lies where no kernel reaches.
DeviceArray device_array(nanobind::handle object, const char* name);

/// Bytes from one row to the next; libraries leave the stride of an axis of one element undefined.
std::int64_t row_stride(const DeviceArray& array);

/// Raises ValueError unless the array has this dtype and shape (-1: any), and every axis but the first is contiguous.
void require_rows(const DeviceArray& array, const char* name, const std::string& dtype,
                  const std::vector<std::int64_t>& shape);

}  // namespace uvm_kv::bindings
