// A failing CUDA call becomes an exception that carries the call, its bytes, file and line.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace uvm_kv {

struct CudaError : std::runtime_error {
  CudaError(const std::string& message, int status) : std::runtime_error(message), code(status) {}
  int code;
};

/// The device or the host has no room: a kind of its own, since a caller may ask for less.
struct OutOfMemory : CudaError {
  using CudaError::CudaError;
};

namespace detail {

/// Only the file's name: the folder it was built in is nobody's business.
constexpr const char* base_name(const char* path) {
  const char* name = path;
  for (const char* at = path; *at != '\0'; ++at)
    if (*at == '/') name = at + 1;
  return name;
}

[[noreturn]] inline void fail(const std::string& what, int code, bool no_memory, const char* call, std::size_t bytes,
                              const char* file, int line) {
  std::string message = std::string(call) + ": " + what;
  if (bytes > 0) message += ", " + std::to_string(bytes) + " B";
  message += " (" + std::string(base_name(file)) + ":" + std::to_string(line) + ")";
  if (no_memory) throw OutOfMemory(message, code);
  throw CudaError(message, code);
}

inline void check(cudaError_t status, const char* call, std::size_t bytes, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // The error is reported here; the next call must not report it again.
  const std::string what = std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status);
  fail(what, status, status == cudaErrorMemoryAllocation, call, bytes, file, line);
}

}  // namespace detail

/// For calls in destructors, where nobody can answer a failure: the next launch must not be blamed for it.
inline bool succeeded(cudaError_t status) noexcept {
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess;
}

}  // namespace uvm_kv

#define UVM_KV_CUDA(call) ::uvm_kv::detail::check((call), #call, 0, __FILE__, __LINE__)
#define UVM_KV_CUDA_BYTES(call, bytes) ::uvm_kv::detail::check((call), #call, (bytes), __FILE__, __LINE__)
