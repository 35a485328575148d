// The host-only logic of the memory half behind a C interface, for tests/memory/test_memory_host.py (ctypes).
// Every check returns the text of its error, or "" where it passes.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "uvm_kv/block_runs.hpp"
#include "uvm_kv/checks.hpp"
#include "uvm_kv/guard.hpp"
#include "uvm_kv/memory_resource.hpp"
#include "uvm_kv/numa.hpp"

namespace {

template <class Check>
const char* said(Check&& check) {
  static thread_local std::string message;
  message.clear();
  try {
    check();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

template <class T>
void give(const std::vector<T>& found, T* out, std::size_t* count) {
  std::copy(found.begin(), found.end(), out);
  *count = found.size();
}

/// Memory that is never touched, and a count of what was given back.
class CountingResource final : public uvm_kv::MemoryResource {
 public:
  void* allocate(std::size_t) override { return reinterpret_cast<void*>(uvm_kv::kChunkBytes); }
  void deallocate(void*, std::size_t) noexcept override { ++given_back; }
  uvm_kv::Properties properties() const override { return {}; }
  std::string kind() const override { return "counting"; }
  int device() const override { return 0; }
  int given_back = 0;
};

}  // namespace

extern "C" {

using namespace uvm_kv;

const char* host_slab_bytes(std::size_t bytes) {
  return said([&] { require_slab_bytes(bytes); });
}
const char* host_aligned(std::uintptr_t address, std::size_t alignment) {
  return said([&] { require_aligned(address, alignment, "a slab"); });
}
const char* host_range(std::size_t offset, std::size_t bytes, std::size_t slab_bytes) {
  return said([&] { require_inside(ByteRange{offset, bytes}, slab_bytes); });
}
const char* host_whole_pages(std::size_t offset, std::size_t bytes) {
  const ByteRange range{offset, bytes};
  return said([&] { require_whole_pages({&range, 1}); });
}
const char* host_advice(int value) {
  return said([&] { to_advice(value); });
}
const char* host_location(int type, int id, int num_devices, int num_nodes) {
  return said([&] { to_location(type, id, num_devices, num_nodes); });
}
const char* host_advice_location(int advice, int type) {
  return said([&] { require_location_fits(to_advice(advice), {static_cast<LocationType>(type), 0}); });
}
const char* host_stream(std::uintptr_t stream) {
  return said([&] { require_stream(stream); });
}
const char* host_parts(std::size_t device_bytes, std::size_t total_bytes, std::size_t granularity) {
  return said([&] { require_parts(device_bytes, total_bytes, granularity); });
}

const char* host_array_bytes(const std::size_t* shape, std::size_t rank, std::size_t item_bytes, std::size_t* bytes) {
  return said([&] { *bytes = array_bytes({shape, rank}, item_bytes); });
}

/// How often memory was given back: by close with no view, with a view, after that view; by a forked child.
void host_slab_ends(int* counts) {
  const auto resource = std::make_shared<CountingResource>();
  Slab plain(resource, kChunkBytes);
  plain.close();
  plain.close();
  counts[0] = std::exchange(resource->given_back, 0);
  Slab viewed(resource, kChunkBytes);
  std::shared_ptr<void> view = viewed.hold();
  viewed.close();
  counts[1] = resource->given_back;
  view.reset();
  counts[2] = std::exchange(resource->given_back, 0);
  Slab inherited(resource, kChunkBytes);
  const pid_t child = fork();
  if (child == 0) {
    inherited.close();
    _exit(resource->given_back);
  }
  int status = -1;
  waitpid(child, &status, 0);
  counts[3] = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

HostPages* host_pages(std::size_t bytes) { return new HostPages(bytes); }
std::uintptr_t host_pages_address(const HostPages* pages) { return reinterpret_cast<std::uintptr_t>(pages->data()); }
void host_pages_end(HostPages* pages) { delete pages; }
std::size_t host_available_bytes(const char* meminfo) { return available_host_bytes(meminfo); }

const char* host_copy_runs(const SlabLayout* source, const SlabLayout* target, const BlockPair* pairs,
                           std::size_t num_pairs, LayerRange layers, std::size_t target_layer, CopyRun* out,
                           std::size_t* count) {
  return said([&] { give(copy_runs(*source, *target, {pairs, num_pairs}, layers, target_layer), out, count); });
}
const char* host_block_ranges(const SlabLayout* layout, const std::size_t* blocks, std::size_t num_blocks,
                              LayerRange layers, ByteRange* out, std::size_t* count) {
  return said([&] { give(block_ranges(*layout, {blocks, num_blocks}, layers), out, count); });
}
const char* host_cut(const CopyRun* runs, std::size_t num_runs, std::size_t source_at, std::size_t target_at,
                     CopyRun* out, std::size_t* count) {
  return said([&] { give(cut({runs, num_runs}, source_at, target_at), out, count); });
}
const char* host_independent(const CopyRun* runs, std::size_t num_runs, std::uintptr_t source, std::uintptr_t target) {
  return said([&] { require_independent({runs, num_runs}, source, target); });
}
const char* host_runs_inside(const CopyRun* runs, std::size_t num_runs, std::size_t source, std::size_t target) {
  return said([&] { require_inside({runs, num_runs}, source, target); });
}

ManagedLedger* host_ledger() { return new ManagedLedger; }
void host_ledger_end(ManagedLedger* ledger) { delete ledger; }
std::size_t host_ledger_held(const ManagedLedger* ledger) { return ledger->held(); }
void host_ledger_release(ManagedLedger* ledger, std::size_t bytes) { ledger->release(bytes); }
const char* host_ledger_book(ManagedLedger* ledger, std::size_t bytes, std::size_t free, std::size_t reserve,
                             bool allow) {
  return said([&] { ledger->book(bytes, [free] { return free; }, {reserve, allow}); });
}

/// Held while a booking lives, after it moved, after it ended twice, and after one that was kept.
const char* host_bookings(ManagedLedger* ledger, std::size_t* held) {
  return said([&] {
    const auto room = [] { return std::size_t{100}; };
    {
      Booking first(60, room, {0, false}, *ledger);
      held[0] = ledger->held();
      Booking second(std::move(first));
      held[1] = ledger->held();
      second.end();
      second.end();
    }
    held[2] = ledger->held();
    Booking(40, room, {0, false}, *ledger).keep();
    held[3] = ledger->held();
    Booking too_much(61, room, {0, false}, *ledger);
  });
}

}  // extern "C"
