// Host pages and their NUMA placement, by system call: no libnuma needed. Host only: no CUDA header here.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

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

/// Bytes that the kernel can hand out without swapping, as it prints them; no limit where it does not say.
inline std::size_t available_host_bytes(const char* meminfo = "/proc/meminfo") {
  std::ifstream lines(meminfo);
  for (std::string name; lines >> name; lines.ignore(std::numeric_limits<std::streamsize>::max(), '\n')) {
    std::size_t kib = 0;
    if (name == "MemAvailable:" && lines >> kib) return kib * 1024;
  }
  return std::numeric_limits<std::size_t>::max();
}

/// Pinned pages are all taken at once and never given up, so where they do not fit the kernel would end processes.
inline bool host_has_room(std::size_t bytes) { return bytes <= available_host_bytes(); }

/// Anonymous pages, aligned to 2 MiB. A forked child does not get them: a copy-on-write of pinned pages would leave the
/// device with one copy and the parent with the other.
class HostPages {
 public:
  explicit HostPages(std::size_t bytes) : bytes_(bytes) {
    void* all = mmap(nullptr, bytes + kChunkBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
      throw std::system_error(errno, std::generic_category(),
                              "mmap of " + text(bytes + kChunkBytes) + " of host pages");
    const auto address = reinterpret_cast<std::uintptr_t>(all);
    const std::uintptr_t begin = (address + kChunkBytes - 1) / kChunkBytes * kChunkBytes;
    if (begin > address) munmap(all, begin - address);
    munmap(reinterpret_cast<void*>(begin + bytes), address + kChunkBytes - begin);
    data_ = reinterpret_cast<void*>(begin);
    madvise(data_, bytes, MADV_DONTFORK);
    madvise(data_, bytes, MADV_HUGEPAGE);  // Fewer and larger pages to map; a kernel without them changes nothing.
  }
  ~HostPages() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  HostPages(const HostPages&) = delete;
  HostPages& operator=(const HostPages&) = delete;

  void* data() const { return data_; }
  void* release() { return std::exchange(data_, nullptr); }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

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
