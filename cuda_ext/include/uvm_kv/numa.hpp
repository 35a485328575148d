// NUMA placement of host pages, by system call: no libnuma needed.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <string>

#include "uvm_kv/checks.hpp"
#include "uvm_kv/errors.hpp"

namespace uvm_kv {

/// Nodes this kernel shows; 1 where it shows none.
inline int num_numa_nodes() {
  int nodes = 0;
  std::error_code failed;
  while (std::filesystem::exists("/sys/devices/system/node/node" + std::to_string(nodes), failed)) ++nodes;
  return nodes > 0 ? nodes : 1;
}

/// Pages of [data, data + bytes) will come from `node` and from nowhere else. They must not have been touched yet.
inline void bind_to_node(void* data, std::size_t bytes, int node) {
  constexpr int kBind = 2;  // MPOL_BIND
  constexpr std::size_t kMaskBits = 1024;
  unsigned long mask[kMaskBits / (8 * sizeof(unsigned long))] = {};
  const auto word = static_cast<std::size_t>(node) / (8 * sizeof(unsigned long));
  mask[word] = 1UL << (static_cast<std::size_t>(node) % (8 * sizeof(unsigned long)));
  if (syscall(SYS_mbind, data, bytes, kBind, mask, kMaskBits, 0) != 0)
    throw MissingCapability("NUMA placement: mbind of " + text(bytes) + " to node " + std::to_string(node) + ": " +
                            std::strerror(errno) + "; numa_node=-1 lets the kernel choose");
}

}  // namespace uvm_kv
