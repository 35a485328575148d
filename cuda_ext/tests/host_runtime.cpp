// A CUDA runtime in host memory, so that the extension's own objects and the whole of tests/cuda run without a GPU.
//
// What it shows: bindings, argument order, offsets, plans, graphs, and the tests themselves. What it cannot show:
// anything about the driver, the hardware or time. No number from here is a measurement; its clock counts operations.
//
// It is stricter than the documentation of CUDA 13.0 asks, never more lenient:
//   memory     filled with 0xCD, never at the same address twice, without access once freed; every range of a copy,
//              fill or hint lies in one live allocation of one kind; discarded pages hold 0xDD
//   streams    queues that run only when something waits for them, so that a missing event or synchronize is seen:
//              UVM_KV_HOST_RUNTIME_ORDER=needed    only what is waited for runs (default)
//              UVM_KV_HOST_RUNTIME_ORDER=others    all other streams run first
//   the CPU    UVM_KV_HOST_RUNTIME_PAGEABLE=1      kernels reach ordinary host memory too (HMM), torch's on the CPU
//   batches    run backwards: they have no order
//   graphs     the nodes of one captured stream, in order; a capture that forks into other streams is refused
//   kernels    the shared __host__ __device__ code, lane by lane, found by the name that nvcc registered
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "host_lanes.hpp"
#include "uvm_kv/append.cuh"
#include "uvm_kv/block_runs.hpp"
#include "uvm_kv/paged_attention.cuh"
#include "uvm_kv/probes.cuh"

namespace {

constexpr std::size_t kTotalBytes = std::size_t{4} << 30;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kChunk = std::size_t{2} << 20;
constexpr std::size_t kFilledBytes = std::size_t{64} << 20;  // of an allocation; filling more would take too long
constexpr int kMultiprocessors = 2;
constexpr int kMostShared = 227 << 10;
constexpr int kPlainShared = 48 << 10;

// ---- calls

std::recursive_mutex& mutex() {
  static std::recursive_mutex made;
  return made;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local bool has_context = false;
bool initialized = false;
cudaError_t fault = cudaSuccess;  // what a kernel did wrong: every call answers it from then on

[[gnu::format(printf, 1, 2)]] void say(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("host runtime: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

template <class Body>
cudaError_t call(Body&& body) {
  const std::lock_guard lock(mutex());
  initialized = true;
  cudaError_t status = body();
  if (status == cudaSuccess) status = fault;
  if (status != cudaSuccess) last_error = status;
  return status;
}

void illegal_address(const std::string& what) {
  say("%s", what.c_str());
  fault = cudaErrorIllegalAddress;
}

// ---- memory

enum class Kind { device, managed, pinned, vmm_device, vmm_host };

struct PageState {
  cudaMemLocation preferred{};
  cudaMemLocation prefetched{};
  bool read_mostly = false;
  bool by_device = false;
  bool by_host = false;
};

struct Memory {
  std::size_t bytes = 0;
  Kind kind = Kind::device;
  bool device_access = true;
  std::vector<PageState> pages;  // of managed memory
};

struct Physical {
  std::size_t bytes;
  CUmemLocation location;
  bool mapped;
  bool released;
};

struct Space {
  std::map<std::uintptr_t, Memory> live;
  std::map<std::uintptr_t, std::size_t> reserved;              // by cuMemAddressReserve
  std::map<CUmemGenericAllocationHandle, Physical> physical;   // by cuMemCreate
  std::map<std::uintptr_t, CUmemGenericAllocationHandle> of_mapping;
  CUmemGenericAllocationHandle next_handle = 1;
  std::size_t used = 0;  // of the card

  ~Space() {
    for (const auto& [at, memory] : live)
      say("never freed: %zu B of kind %d", memory.bytes, static_cast<int>(memory.kind));
    for (const auto& range : reserved) say("never freed: %zu B of addresses", range.second);
    for (const auto& handle : physical) say("never released: %zu B", handle.second.bytes);
  }
};

Space& space() {
  static Space made;
  return made;
}

std::uintptr_t to_address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// The one allocation that holds all of the range; null where there is none.
Memory* find(const void* pointer, std::size_t bytes, std::uintptr_t* begin = nullptr) {
  auto at = space().live.upper_bound(to_address(pointer));
  if (at == space().live.begin()) return nullptr;
  --at;
  const std::size_t offset = to_address(pointer) - at->first;
  if (offset >= at->second.bytes || bytes > at->second.bytes - offset) return nullptr;
  if (begin != nullptr) *begin = at->first;
  return &at->second;
}

// Addresses that are never used again: whoever still holds one after the end of its memory meets a page without access.
void* addresses(std::size_t bytes, std::size_t alignment) {
  void* all = mmap(nullptr, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  return reinterpret_cast<void*>((to_address(all) + alignment - 1) / alignment * alignment);
}

void* open_pages(void* at, std::size_t bytes) {
  void* data = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  madvise(data, bytes, MADV_HUGEPAGE);
  std::memset(data, 0xcd, std::min(bytes, kFilledBytes));
  return data;
}

void close_pages(void* at, std::size_t bytes) {
  mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

std::size_t whole_pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

cudaError_t allocate(void** out, std::size_t bytes, Kind kind) {
  if (out == nullptr || bytes == 0) return cudaErrorInvalidValue;
  if (kind == Kind::device && bytes > kTotalBytes - space().used) return cudaErrorMemoryAllocation;
  void* at = addresses(whole_pages(bytes), kChunk);
  if (at == nullptr || open_pages(at, whole_pages(bytes)) == nullptr) return cudaErrorMemoryAllocation;
  Memory memory{bytes, kind, true, {}};
  if (kind == Kind::managed) memory.pages.resize(whole_pages(bytes) / kPage);
  if (kind == Kind::device) space().used += bytes;
  space().live.emplace(to_address(at), std::move(memory));
  *out = at;
  return cudaSuccess;
}

// ---- streams, events, captures

using Work = std::function<void()>;

struct Stream;

// One record of an event.
struct Mark {
  std::shared_ptr<Stream> on;
  bool done = false;
  std::uint64_t at_ns = 0;
};

struct Task {
  Work run;
  std::shared_ptr<Mark> after;  // the work waits for it
  std::shared_ptr<Mark> mark;   // and completes this one
};

struct Event {
  bool timing;
  std::shared_ptr<Mark> latest;
  bool captured = false;  // its latest record is an edge of a capture
};

struct Node {
  Work run;
  cudaEvent_t wait = nullptr;
  cudaEvent_t record = nullptr;
};

struct Graph {
  std::vector<Node> nodes;
  std::shared_ptr<Mark> last;  // of an executable graph: its launches follow each other
};

struct Stream {
  std::deque<Task> queue;
  std::unique_ptr<Graph> capture;
  bool invalidated = false;
  bool destroyed = false;
};

struct Machine {
  std::vector<std::shared_ptr<Stream>> streams;
  std::map<cudaEvent_t, std::shared_ptr<Event>> events;
  std::map<void*, std::unique_ptr<Graph>> graphs;  // and executable ones
  std::uint64_t now_ns = 1000;
};

Machine& machine() {
  static Machine made;
  return made;
}

bool others_first() {
  static const bool found = [] {
    const char* order = std::getenv("UVM_KV_HOST_RUNTIME_ORDER");
    return order != nullptr && std::strcmp(order, "others") == 0;
  }();
  return found;
}

bool reads_pageable_memory() {
  static const bool found = std::getenv("UVM_KV_HOST_RUNTIME_PAGEABLE") != nullptr;
  return found;
}

void complete(const std::shared_ptr<Mark>& mark);

void step(Stream& stream) {
  if (const std::shared_ptr<Mark> after = stream.queue.front().after) complete(after);
  const Task task = std::move(stream.queue.front());
  stream.queue.pop_front();
  machine().now_ns += 1000;
  if (task.run) task.run();
  if (task.mark) {
    task.mark->done = true;
    task.mark->at_ns = machine().now_ns;
    task.mark->on = nullptr;
  }
}

void complete(const std::shared_ptr<Mark>& mark) {
  const std::shared_ptr<Stream> on = mark->on;
  while (!mark->done) step(*on);
}

void drain(Stream& stream) {
  while (!stream.queue.empty()) step(stream);
}

// The newest first: the order in which they were made is the likeliest accident.
void drain_all_but(const Stream* kept) {
  const std::vector<std::shared_ptr<Stream>> streams = machine().streams;
  std::for_each(streams.rbegin(), streams.rend(), [kept](const auto& stream) {
    if (stream.get() != kept) drain(*stream);
  });
  std::erase_if(machine().streams, [](const auto& stream) { return stream->destroyed && stream->queue.empty(); });
}

// Null where the handle is none of ours. The legacy streams are none: the extension never uses them.
std::shared_ptr<Stream> to_stream(cudaStream_t handle) {
  for (const auto& stream : machine().streams)
    if (reinterpret_cast<cudaStream_t>(stream.get()) == handle && !stream->destroyed) return stream;
  return nullptr;
}

std::shared_ptr<Event> to_event(cudaEvent_t handle) {
  const auto found = machine().events.find(handle);
  return found == machine().events.end() ? nullptr : found->second;
}

cudaError_t enqueue(cudaStream_t handle, Work run) {
  const std::shared_ptr<Stream> stream = to_stream(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream->invalidated) return cudaErrorStreamCaptureInvalidated;
  if (stream->capture) {
    stream->capture->nodes.push_back({std::move(run), nullptr, nullptr});
  } else {
    stream->queue.push_back({std::move(run), nullptr, nullptr});
  }
  return cudaSuccess;
}

cudaError_t invalidate(Stream& stream, cudaError_t why) {
  stream.invalidated = true;
  return why;
}

// For what no capture takes, and what refuses the legacy stream.
cudaError_t outside_capture(cudaStream_t handle) {
  const std::shared_ptr<Stream> stream = to_stream(handle);
  if (stream == nullptr) return to_address(handle) <= 2 ? cudaErrorInvalidValue : cudaErrorInvalidResourceHandle;
  return stream->capture ? invalidate(*stream, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

std::shared_ptr<Mark> record(const std::shared_ptr<Stream>& stream) {
  auto mark = std::make_shared<Mark>();
  mark->on = stream;
  stream->queue.push_back({nullptr, nullptr, mark});
  return mark;
}

void wait_for(Stream& stream, const std::shared_ptr<Mark>& mark) {
  if (mark && !mark->done) stream.queue.push_back({nullptr, mark, nullptr});
}

// ---- kernels

struct Launch {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes;
};

using Binder = std::function<Work(const Launch&, void** arguments)>;

struct Kernel {
  std::string name;
  Binder bind;
  int most_shared = kPlainShared;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> made;
  return made;
}

void need(bool holds, const char* what) {
  if (!holds) illegal_address(what);
}

bool reachable(const void* pointer, std::size_t bytes = 1) {
  const Memory* memory = find(pointer, bytes);
  return memory != nullptr ? memory->device_access : reads_pageable_memory();
}

// Parameters are copied at the launch, as CUDA does.
template <class... Arguments>
Binder bound(void (*body)(const Launch&, Arguments...)) {
  return [body](const Launch& launch, void** arguments) -> Work {
    return [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) -> Work {
      std::tuple<Arguments...> kept{*static_cast<Arguments*>(arguments[kIndex])...};
      return [body, launch, kept] { std::apply([&](auto&... each) { body(launch, each...); }, kept); };
    }(std::index_sequence_for<Arguments...>{});
  };
}

bool reachable(const uvm_kv::BlockTable& table) {
  return reachable(table.blocks) && (table.indptr == nullptr || reachable(table.indptr));
}

bool reachable(const uvm_kv::PagedKV& kv) {
  return reachable(kv.device.base) && (kv.split_block == uvm_kv::kNoSplit || reachable(kv.host.base)) &&
         (kv.staged_block == uvm_kv::kNoSplit || reachable(kv.staged.base));
}

void append(const Launch& launch, uvm_kv::AppendParams p) {
  need(reachable(p.kv) && reachable(p.table) && reachable(p.key) && reachable(p.value) &&
           reachable(p.seqs, sizeof(int) * p.num_tokens) && reachable(p.positions, sizeof(int) * p.num_tokens),
       "append: an array that no kernel reaches");
  need(launch.block.x == 256 && launch.grid.x > 0, "append: the shape of the launch");
  if (fault != cudaSuccess) return;
  std::int64_t unit = std::int64_t{p.num_tokens} * uvm_kv::append_units_per_token(p.kv);
  while (unit-- > 0) uvm_kv::append_unit(p, unit);
}

bool sound(const uvm_kv::AttentionParams& p) {
  return reachable(p.kv) && reachable(p.table) && reachable(p.query) && reachable(p.out) && reachable(p.plan) &&
         reachable(p.queues) && reachable(p.partials.stats) && reachable(p.merges);
}

template <class T, int kHeadDim, int kRows, bool kWide>
void attend(const Launch& launch, uvm_kv::AttentionParams p) {
  need(sound(p), "attention: an array that no kernel reaches");
  need(launch.block.x == uvm_kv::kCtaWarps * uvm_kv::kWarpLanes &&
           launch.shared_bytes == uvm_kv::kCtaWarps * uvm_kv::ring_bytes_per_warp<T, kHeadDim>(),
       "attention: the shape of the launch");
  if (fault != cudaSuccess) return;
  need((uvm_kv::run_pass<T, kHeadDim, kRows, kWide>(p, static_cast<int>(launch.grid.x))) == 0,
       "attention: a copy to a target that had one in flight");
}

template <class T, int kHeadDim>
void merge(const Launch& launch, uvm_kv::AttentionParams p) {
  need(sound(p), "merge: an array that no kernel reaches");
  need(launch.block.x == uvm_kv::kMergeParts * kHeadDim / 4 && launch.grid.x > 0, "merge: the shape of the launch");
  if (fault == cudaSuccess) uvm_kv::run_merge<T>(p);
}

// The list of runs is read as far as the grid says: its length is the launcher's own.
template <int kWordBytes>
Work copy_runs(const Launch& launch, void** arguments) {
  char* target = *static_cast<char**>(arguments[0]);
  const char* source = *static_cast<const char**>(arguments[1]);
  const auto* first = static_cast<const uvm_kv::CopyRun*>(arguments[2]);
  const std::vector<uvm_kv::CopyRun> runs(first, first + launch.grid.y);
  return [target, source, runs] {
    for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
      char* to = target + run->target;
      const char* from = source + run->source;
      need(find(to, 1) != nullptr && find(from, 1) != nullptr, "copy kernel: a run that no kernel reaches");
      need((to_address(to) | to_address(from)) % kWordBytes == 0, "copy kernel: words that are not aligned");
      if (fault == cudaSuccess) std::memcpy(to, from, run->bytes / kWordBytes * kWordBytes);
    }
  };
}

void read_words(const Launch&, const uint4* data, std::size_t count, unsigned long long* total) {
  need(reachable(data, count * 16) && reachable(total, 8), "read probe: a range that no kernel reaches");
  if (fault != cudaSuccess) return;
  const auto* words = reinterpret_cast<const std::uint32_t*>(data);
  for (std::size_t i = 0; i < count * 4; ++i) *total += words[i];
}

void add_one(const Launch&, std::uint32_t* data, std::size_t count) {
  need(reachable(data, count * 4), "add_one probe: a range that no kernel reaches");
  for (std::size_t i = 0; fault == cudaSuccess && i < count; ++i) data[i] += 1;
}

void add_one_pages(const Launch& launch, std::uint32_t* data, std::size_t pages, const std::uint32_t* order,
                   int words) {
  need(reachable(data, pages * kPage) && reachable(order, pages * 4), "page probe: a range that no kernel reaches");
  const std::size_t threads = std::size_t{launch.grid.x} * launch.block.x;
  for (std::size_t i = 0; fault == cudaSuccess && i < std::min(pages, threads); ++i)
    for (int word = 0; word < words; ++word) data[order[i] * uvm_kv::kProbePageWords + word] += 1;
}

void fill_words(const Launch&, std::uint32_t* data, std::size_t count, uvm_kv::FillKind kind, std::uint32_t seed,
                float scale) {
  need(reachable(data, count * 4), "fill probe: a range that no kernel reaches");
  for (std::size_t i = 0; fault == cudaSuccess && i < count; ++i) data[i] = uvm_kv::fill_word(kind, seed, i, scale);
}

void delay(const Launch&, std::uint64_t ns) { machine().now_ns += ns; }

template <class T, int kHeadDim>
void add_attention(std::map<std::string, Binder>& all, const std::string& type) {
  const std::string shape = "<" + type + ", " + std::to_string(kHeadDim);
  all["uvm_kv::merge_kernel" + shape + ">"] = bound(merge<T, kHeadDim>);
  all["uvm_kv::attention_kernel" + shape + ", 4, false>"] = bound(attend<T, kHeadDim, 4, false>);
  constexpr int kWideRows = uvm_kv::kWideWarpRows;
  all["uvm_kv::attention_kernel" + shape + ", " + std::to_string(kWideRows) + ", true>"] =
      bound(attend<T, kHeadDim, kWideRows, true>);
  if constexpr (kHeadDim == 64 || kHeadDim == 128) {
    all["uvm_kv::attention_kernel" + shape + ", 1, false>"] = bound(attend<T, kHeadDim, 1, false>);
    all["uvm_kv::attention_kernel" + shape + ", 8, false>"] = bound(attend<T, kHeadDim, 8, false>);
  }
}

template <class T>
void add_attention(std::map<std::string, Binder>& all, const std::string& type) {
  add_attention<T, 64>(all, type);
  add_attention<T, 80>(all, type);
  add_attention<T, 96>(all, type);
  add_attention<T, 128>(all, type);
  add_attention<T, 256>(all, type);
}

// By demangled name without parameters.
const std::map<std::string, Binder>& bodies() {
  static const std::map<std::string, Binder> made = [] {
    const std::string inner = "uvm_kv::(anonymous namespace)::";
    std::map<std::string, Binder> all;
    all[inner + "append_kernel"] = bound(append);
    all[inner + "copy_kernel<uint4>"] = copy_runs<16>;
    all[inner + "copy_kernel<char>"] = copy_runs<1>;
    all[inner + "read_kernel"] = bound(read_words);
    all[inner + "add_one_kernel"] = bound(add_one);
    all[inner + "add_one_pages_kernel"] = bound(add_one_pages);
    all[inner + "fill_kernel"] = bound(fill_words);
    all[inner + "delay_kernel"] = bound(delay);
    add_attention<uvm_kv::Fp16>(all, "uvm_kv::Fp16");
    add_attention<uvm_kv::Bf16>(all, "uvm_kv::Bf16");
    add_attention<float>(all, "float");
    return all;
  }();
  return made;
}

std::string plain_name(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(mangled, nullptr, nullptr, &status),
                                                         &std::free);
  std::string name = text ? text.get() : mangled;
  if (name.starts_with("void ")) name.erase(0, 5);
  const std::string hidden = "(anonymous namespace)";
  const std::size_t after = name.find(hidden) == std::string::npos ? 0 : name.find(hidden) + hidden.size();
  return name.substr(0, name.find('(', after));
}

struct Configuration {
  dim3 grid, block;
  std::size_t shared_bytes;
  cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;

// ---- copies and hints

bool on_device(Kind kind) { return kind == Kind::device || kind == Kind::vmm_device; }

cudaError_t check_copy(const void* target, const void* source, std::size_t bytes) {
  const Memory* to = find(target, bytes);
  const Memory* from = find(source, bytes);
  return bytes > 0 && to != nullptr && from != nullptr ? cudaSuccess : cudaErrorInvalidValue;
}

void copy_now(void* target, const void* source, std::size_t bytes) {
  if (check_copy(target, source, bytes) != cudaSuccess) return illegal_address("a copy of memory that has been freed");
  std::memmove(target, source, bytes);
}

bool direction_fits(cudaMemcpyKind kind, const void* target, const void* source) {
  const Kind to = find(target, 1)->kind;
  const Kind from = find(source, 1)->kind;
  switch (kind) {
    case cudaMemcpyDefault:
      return true;
    case cudaMemcpyHostToDevice:
      return (from == Kind::managed || !on_device(from)) && (to == Kind::managed || on_device(to));
    case cudaMemcpyDeviceToHost:
      return (from == Kind::managed || on_device(from)) && (to == Kind::managed || !on_device(to));
    case cudaMemcpyDeviceToDevice:
      return (from == Kind::managed || on_device(from)) && (to == Kind::managed || on_device(to));
    default:
      return false;
  }
}

// Pages of a managed range, rounded outwards.
std::pair<std::vector<PageState>::iterator, std::vector<PageState>::iterator> pages_of(const void* data,
                                                                                       std::size_t bytes) {
  std::uintptr_t begin = 0;
  Memory& memory = *find(data, bytes, &begin);
  const std::size_t offset = to_address(data) - begin;
  const auto first = memory.pages.begin() + static_cast<std::ptrdiff_t>(offset / kPage);
  return {first, memory.pages.begin() + static_cast<std::ptrdiff_t>((offset + bytes + kPage - 1) / kPage)};
}

cudaError_t check_managed(const void* data, std::size_t bytes) {
  const Memory* memory = find(data, bytes);
  return bytes > 0 && memory != nullptr && memory->kind == Kind::managed ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t check_place(cudaMemLocation place) {
  switch (place.type) {
    case cudaMemLocationTypeDevice:
      return place.id == 0 ? cudaSuccess : cudaErrorInvalidDevice;
    case cudaMemLocationTypeHost:
    case cudaMemLocationTypeHostNumaCurrent:
      return cudaSuccess;
    case cudaMemLocationTypeHostNuma:
      return place.id == 0 ? cudaSuccess : cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

bool same(cudaMemLocation a, cudaMemLocation b) { return a.type == b.type && a.id == b.id; }

cudaMemLocation kept(cudaMemLocation place) {
  if (place.type == cudaMemLocationTypeHostNumaCurrent) place = {cudaMemLocationTypeHostNuma, 0};
  if (place.type == cudaMemLocationTypeHost) place.id = 0;
  return place;
}

void note_prefetch(const void* data, std::size_t bytes, cudaMemLocation place) {
  const auto [first, last] = pages_of(data, bytes);
  std::for_each(first, last, [place](PageState& page) { page.prefetched = kept(place); });
}

// Indices start at 0, rise, and stay below count.
bool rising(const std::size_t* starts, std::size_t num_starts, std::size_t count) {
  if (starts == nullptr || num_starts == 0 || num_starts > count || starts[0] != 0) return false;
  for (std::size_t i = 1; i < num_starts; ++i)
    if (starts[i] <= starts[i - 1] || starts[i] >= count) return false;
  return true;
}

struct HintBatch {
  void** data;
  std::size_t* sizes;
  std::size_t count;
  cudaMemLocation* places;  // null: a discard alone
  std::size_t* starts;
  std::size_t num_places;
  bool discards;
};

cudaError_t check_batch(const HintBatch& batch) {
  if (batch.data == nullptr || batch.sizes == nullptr || batch.count == 0) return cudaErrorInvalidValue;
  if (batch.places != nullptr && !rising(batch.starts, batch.num_places, batch.count)) return cudaErrorInvalidValue;
  for (std::size_t i = 0; i < batch.num_places; ++i)
    if (const cudaError_t status = check_place(batch.places[i])) return status;
  for (std::size_t i = 0; i < batch.count; ++i) {
    if (const cudaError_t status = check_managed(batch.data[i], batch.sizes[i])) return status;
    if (batch.discards && (to_address(batch.data[i]) | batch.sizes[i]) % kPage != 0) return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t hint(const HintBatch& batch, unsigned long long flags, cudaStream_t stream) {
  if (const cudaError_t status = outside_capture(stream)) return status;
  if (flags != 0) return cudaErrorInvalidValue;
  if (const cudaError_t status = check_batch(batch)) return status;
  std::size_t place = 0;
  for (std::size_t i = 0; batch.places != nullptr && i < batch.count; ++i) {
    if (place + 1 < batch.num_places && batch.starts[place + 1] == i) ++place;
    note_prefetch(batch.data[i], batch.sizes[i], batch.places[place]);
  }
  const std::vector<void*> data(batch.data, batch.data + batch.count);
  const std::vector<std::size_t> sizes(batch.sizes, batch.sizes + batch.count);
  return enqueue(stream, [data, sizes, discards = batch.discards] {
    for (std::size_t i = data.size(); i-- > 0;) {
      if (find(data[i], sizes[i]) == nullptr) return illegal_address("a hint on memory that has been freed");
      if (discards) std::memset(data[i], 0xdd, sizes[i]);
    }
  });
}

}  // namespace

// ---- the runtime: device

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  return call([&] { return *count = 1, cudaSuccess; });
}

cudaError_t cudaGetDevice(int* device) {
  return call([&] { return *device = 0, cudaSuccess; });
}

cudaError_t cudaSetDevice(int device) {
  return call([&] {
    has_context = has_context || device == 0;
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  return *version = 13000, cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  static const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrManagedMemory, 1},
      {cudaDevAttrConcurrentManagedAccess, 1},
      {cudaDevAttrPageableMemoryAccess, reads_pageable_memory()},
      {cudaDevAttrCanMapHostMemory, 1},
      {cudaDevAttrHostRegisterSupported, 1},
      {cudaDevAttrCanUseHostPointerForRegisteredMem, 1},
      {cudaDevAttrHostNumaId, 0},
      {cudaDevAttrMultiProcessorCount, kMultiprocessors},
      {cudaDevAttrL2CacheSize, 1 << 20},
  };
  return call([&] {
    const auto found = known.find(which);
    if (found == known.end()) say("attribute %d is not played", static_cast<int>(which));
    if (found == known.end()) return cudaErrorInvalidValue;
    *value = found->second;
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return call([&] {
    *properties = {};
    std::strcpy(properties->name, "no GPU: host memory behind a test double of the CUDA runtime");
    properties->totalGlobalMem = kTotalBytes;
    properties->major = 9;
    properties->multiProcessorCount = kMultiprocessors;
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
  });
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  return call([&] {
    std::snprintf(id, static_cast<std::size_t>(length), "ffff:ff:ff.0");
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call([] {
    has_context = true;
    cudaError_t status = cudaSuccess;
    for (const auto& stream : machine().streams)
      if (stream->capture) status = invalidate(*stream, cudaErrorStreamCaptureUnsupported);
    drain_all_but(nullptr);
    return status;
  });
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  return call([&] {
    *free = kTotalBytes - space().used;
    *total = kTotalBytes;
    return cudaSuccess;
  });
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, fault); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidMemcpyDirection: return "cudaErrorInvalidMemcpyDirection";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorIllegalState: return "cudaErrorIllegalState";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorHostMemoryAlreadyRegistered: return "cudaErrorHostMemoryAlreadyRegistered";
    case cudaErrorHostMemoryNotRegistered: return "cudaErrorHostMemoryNotRegistered";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    default: return "an error that the test double has no name for";
  }
}

const char* cudaGetErrorString(cudaError_t) { return "said by the test double"; }

// ---- the runtime: memory

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  return call([&] { return has_context = true, allocate(data, bytes, Kind::device); });
}

cudaError_t cudaMallocManaged(void** data, std::size_t bytes, unsigned flags) {
  return call([&] {
    has_context = true;
    if (flags != cudaMemAttachGlobal) return cudaErrorInvalidValue;
    return allocate(data, bytes, Kind::managed);
  });
}

// Waits for all work, as every driver so far does ("may perform implicit synchronization"), and ends no capture.
cudaError_t cudaFree(void* data) {
  return call([&] {
    if (data == nullptr) return cudaSuccess;
    drain_all_but(nullptr);
    const auto found = space().live.find(to_address(data));
    if (found == space().live.end()) return cudaErrorInvalidValue;
    if (found->second.kind != Kind::device && found->second.kind != Kind::managed) return cudaErrorInvalidValue;
    if (found->second.kind == Kind::device) space().used -= found->second.bytes;
    close_pages(data, whole_pages(found->second.bytes));
    space().live.erase(found);
    return cudaSuccess;
  });
}

cudaError_t cudaHostRegister(void* data, std::size_t bytes, unsigned flags) {
  return call([&] {
    has_context = true;
    if (data == nullptr || bytes == 0 || (flags & ~(cudaHostRegisterMapped | cudaHostRegisterPortable)) != 0)
      return cudaErrorInvalidValue;
    auto next = space().live.lower_bound(to_address(data));
    const bool overlaps = find(data, 1) != nullptr ||
                          (next != space().live.end() && next->first < to_address(data) + bytes);
    if (overlaps) return cudaErrorHostMemoryAlreadyRegistered;
    space().live.emplace(to_address(data), Memory{bytes, Kind::pinned, (flags & cudaHostRegisterMapped) != 0, {}});
    return cudaSuccess;
  });
}

cudaError_t cudaHostUnregister(void* data) {
  return call([&] {
    const auto found = space().live.find(to_address(data));
    if (found == space().live.end() || found->second.kind != Kind::pinned) return cudaErrorHostMemoryNotRegistered;
    space().live.erase(found);
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return call([&] {
    if (const cudaError_t status = check_copy(target, source, bytes)) return status;
    if (!direction_fits(kind, target, source)) return cudaErrorInvalidMemcpyDirection;
    return enqueue(stream, [=] { copy_now(target, source, bytes); });
  });
}

cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t stream) {
  return call([&] {
    if (bytes == 0 || find(data, bytes) == nullptr) return cudaErrorInvalidValue;
    return enqueue(stream, [=] {
      if (find(data, bytes) == nullptr) return illegal_address("a fill of memory that has been freed");
      std::memset(data, value, bytes);
    });
  });
}

cudaError_t cudaMemcpyBatchAsync(void* const* targets, const void* const* sources, const std::size_t* sizes,
                                 std::size_t count, cudaMemcpyAttributes* attributes, std::size_t* starts,
                                 std::size_t num_attributes, cudaStream_t stream) {
  return call([&] {
    if (const cudaError_t status = outside_capture(stream)) return status;
    if (targets == nullptr || sources == nullptr || sizes == nullptr || count == 0) return cudaErrorInvalidValue;
    if (!rising(starts, num_attributes, count)) return cudaErrorInvalidValue;
    for (std::size_t i = 0; i < num_attributes; ++i) {
      const bool ordered = attributes[i].srcAccessOrder >= cudaMemcpySrcAccessOrderStream &&
                           attributes[i].srcAccessOrder <= cudaMemcpySrcAccessOrderAny;
      if (!ordered || attributes[i].flags > cudaMemcpyFlagPreferOverlapWithCompute) return cudaErrorInvalidValue;
    }
    for (std::size_t i = 0; i < count; ++i)
      if (const cudaError_t status = check_copy(targets[i], sources[i], sizes[i])) return status;
    struct One {
      void* target;
      const void* source;
      std::size_t bytes;
    };
    std::vector<One> copies;
    for (std::size_t i = count; i-- > 0;) copies.push_back({targets[i], sources[i], sizes[i]});
    return enqueue(stream, [copies] {
      for (const One& copy : copies) copy_now(copy.target, copy.source, copy.bytes);
    });
  });
}

// ---- the runtime: hints

cudaError_t cudaMemAdvise(const void* data, std::size_t bytes, cudaMemoryAdvise advice, cudaMemLocation place) {
  return call([&] {
    if (const cudaError_t status = check_managed(data, bytes)) return status;
    const bool placed = advice == cudaMemAdviseSetPreferredLocation || advice == cudaMemAdviseSetAccessedBy ||
                        advice == cudaMemAdviseUnsetAccessedBy;
    if (const cudaError_t status = placed ? check_place(place) : cudaSuccess) return status;
    const bool by_device = place.type == cudaMemLocationTypeDevice;
    const bool by = advice == cudaMemAdviseSetAccessedBy || advice == cudaMemAdviseUnsetAccessedBy;
    if (by && !by_device && place.type != cudaMemLocationTypeHost) return cudaErrorInvalidValue;
    const auto [first, last] = pages_of(data, bytes);
    for (auto page = first; page != last; ++page) {
      switch (advice) {
        case cudaMemAdviseSetReadMostly:
        case cudaMemAdviseUnsetReadMostly:
          page->read_mostly = advice == cudaMemAdviseSetReadMostly;
          break;
        case cudaMemAdviseSetPreferredLocation:
        case cudaMemAdviseUnsetPreferredLocation:
          page->preferred = advice == cudaMemAdviseSetPreferredLocation ? kept(place) : cudaMemLocation{};
          break;
        case cudaMemAdviseSetAccessedBy:
        case cudaMemAdviseUnsetAccessedBy:
          (by_device ? page->by_device : page->by_host) = advice == cudaMemAdviseSetAccessedBy;
          break;
        default:
          return cudaErrorInvalidValue;
      }
    }
    return cudaSuccess;
  });
}

cudaError_t cudaMemPrefetchAsync(const void* data, std::size_t bytes, cudaMemLocation place, unsigned flags,
                                 cudaStream_t stream) {
  void* one = const_cast<void*>(data);
  std::size_t start = 0;
  return call([&] { return hint({&one, &bytes, 1, &place, &start, 1, false}, flags, stream); });
}

cudaError_t cudaMemPrefetchBatchAsync(void** data, std::size_t* sizes, std::size_t count, cudaMemLocation* places,
                                      std::size_t* starts, std::size_t num_places, unsigned long long flags,
                                      cudaStream_t stream) {
  return call([&] {
    if (places == nullptr) return cudaErrorInvalidValue;
    return hint({data, sizes, count, places, starts, num_places, false}, flags, stream);
  });
}

cudaError_t cudaMemDiscardBatchAsync(void** data, std::size_t* sizes, std::size_t count, unsigned long long flags,
                                     cudaStream_t stream) {
  return call([&] { return hint({data, sizes, count, nullptr, nullptr, 0, true}, flags, stream); });
}

cudaError_t cudaMemDiscardAndPrefetchBatchAsync(void** data, std::size_t* sizes, std::size_t count,
                                                cudaMemLocation* places, std::size_t* starts, std::size_t num_places,
                                                unsigned long long flags, cudaStream_t stream) {
  return call([&] {
    if (places == nullptr) return cudaErrorInvalidValue;
    return hint({data, sizes, count, places, starts, num_places, true}, flags, stream);
  });
}

cudaError_t cudaMemRangeGetAttribute(void* out, std::size_t out_bytes, cudaMemRangeAttribute which, const void* data,
                                     std::size_t bytes) {
  return call([&] {
    if (const cudaError_t status = check_managed(data, bytes)) return status;
    const auto [first, last] = pages_of(data, bytes);
    const auto all = [&](auto&& holds) { return std::all_of(first, last, holds); };
    const auto common = [&](cudaMemLocation PageState::* place) {
      const cudaMemLocation one = (*first).*place;
      return all([&](const PageState& p) { return same(p.*place, one); }) ? one : cudaMemLocation{};
    };
    int* ints = static_cast<int*>(out);
    if (which == cudaMemRangeAttributeAccessedBy) {
      if (out_bytes == 0 || out_bytes % sizeof(int) != 0) return cudaErrorInvalidValue;
      std::vector<int> found;
      if (all([](const PageState& p) { return p.by_device; })) found.push_back(0);
      if (all([](const PageState& p) { return p.by_host; })) found.push_back(cudaCpuDeviceId);
      found.resize(out_bytes / sizeof(int), cudaInvalidDeviceId);
      std::copy(found.begin(), found.end(), ints);
      return cudaSuccess;
    }
    if (out_bytes != sizeof(int)) return cudaErrorInvalidValue;
    switch (which) {
      case cudaMemRangeAttributeReadMostly:
        *ints = all([](const PageState& p) { return p.read_mostly; }) ? 1 : 0;
        return cudaSuccess;
      case cudaMemRangeAttributePreferredLocationType:
        return *ints = common(&PageState::preferred).type, cudaSuccess;
      case cudaMemRangeAttributePreferredLocationId:
        return *ints = common(&PageState::preferred).id, cudaSuccess;
      case cudaMemRangeAttributeLastPrefetchLocationType:
        return *ints = common(&PageState::prefetched).type, cudaSuccess;
      case cudaMemRangeAttributeLastPrefetchLocationId:
        return *ints = common(&PageState::prefetched).id, cudaSuccess;
      default:
        return cudaErrorInvalidValue;
    }
  });
}

// ---- the runtime: streams and events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return call([&] {
    has_context = true;
    if (flags != cudaStreamNonBlocking) return cudaErrorInvalidValue;
    machine().streams.push_back(std::make_shared<Stream>());
    *out = reinterpret_cast<cudaStream_t>(machine().streams.back().get());
    return cudaSuccess;
  });
}

// What is enqueued still runs, when something waits for it.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    stream->destroyed = true;
    stream->capture = nullptr;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
    if (others_first()) drain_all_but(stream.get());
    drain(*stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *status = !stream->capture       ? cudaStreamCaptureStatusNone
              : stream->invalidated ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  return call([&] {
    has_context = true;
    if ((flags & ~(cudaEventDisableTiming | cudaEventBlockingSync)) != 0) return cudaErrorInvalidValue;
    const auto event = std::make_shared<Event>(Event{(flags & cudaEventDisableTiming) == 0, nullptr});
    *out = reinterpret_cast<cudaEvent_t>(event.get());
    machine().events[*out] = event;
    return cudaSuccess;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return call([&] { return machine().events.erase(handle) == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle; });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned flags) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(on);
    const std::shared_ptr<Event> event = to_event(handle);
    if (stream == nullptr || event == nullptr) return cudaErrorInvalidResourceHandle;
    const bool external = flags == cudaEventRecordExternal;
    if (flags != 0 && !(external && stream->capture)) return cudaErrorInvalidValue;
    if (stream->invalidated) return cudaErrorStreamCaptureInvalidated;
    if (external) {
      stream->capture->nodes.push_back({nullptr, nullptr, handle});
    } else if (stream->capture) {
      event->captured = true;
    } else {
      event->captured = false;
      event->latest = record(stream);
    }
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t on, cudaEvent_t handle, unsigned flags) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(on);
    const std::shared_ptr<Event> event = to_event(handle);
    if (stream == nullptr || event == nullptr) return cudaErrorInvalidResourceHandle;
    const bool external = flags == cudaEventWaitExternal;
    if (flags != 0 && !(external && stream->capture)) return cudaErrorInvalidValue;
    if (stream->invalidated) return cudaErrorStreamCaptureInvalidated;
    if (external) {
      stream->capture->nodes.push_back({nullptr, handle, nullptr});
    } else if (stream->capture) {
      return event->captured ? cudaSuccess : invalidate(*stream, cudaErrorStreamCaptureIsolation);
    } else if (event->captured) {
      say("a capture that forks into another stream is not played");
      return cudaErrorStreamCaptureUnsupported;
    } else {
      wait_for(*stream, event->latest);
    }
    return cudaSuccess;
  });
}

// Something has run by the next query, so that polling ends.
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return call([&] {
    const std::shared_ptr<Event> event = to_event(handle);
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->captured) return cudaErrorCapturedEvent;
    if (event->latest == nullptr || event->latest->done) return cudaSuccess;
    step(*event->latest->on);
    return cudaErrorNotReady;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return call([&] {
    const std::shared_ptr<Event> event = to_event(handle);
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->captured) return cudaErrorCapturedEvent;
    if (event->latest == nullptr) return cudaSuccess;
    if (others_first() && !event->latest->done) drain_all_but(event->latest->on.get());
    complete(event->latest);
    return cudaSuccess;
  });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  return call([&] {
    const std::array<std::shared_ptr<Event>, 2> events = {to_event(begin), to_event(end)};
    for (const auto& event : events)
      if (event == nullptr || !event->timing || event->latest == nullptr) return cudaErrorInvalidResourceHandle;
    for (const auto& event : events)
      if (!event->latest->done) return cudaErrorNotReady;
    const auto at = [&](int i) { return static_cast<double>(events[static_cast<std::size_t>(i)]->latest->at_ns); };
    *milliseconds = static_cast<float>((at(1) - at(0)) * 1e-6);
    return cudaSuccess;
  });
}

// ---- the runtime: graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return cudaErrorIllegalState;
    stream->capture = std::make_unique<Graph>();
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (!stream->capture) return cudaErrorStreamCaptureUnmatched;
    std::unique_ptr<Graph> graph = std::move(stream->capture);
    *out = nullptr;
    if (std::exchange(stream->invalidated, false)) return cudaErrorStreamCaptureInvalidated;
    *out = reinterpret_cast<cudaGraph_t>(graph.get());
    machine().graphs[graph.get()] = std::move(graph);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  return call([&] {
    const auto found = machine().graphs.find(graph);
    if (found == machine().graphs.end()) return cudaErrorInvalidValue;
    auto executable = std::make_unique<Graph>(*found->second);
    *out = reinterpret_cast<cudaGraphExec_t>(executable.get());
    machine().graphs[executable.get()] = std::move(executable);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call([&] { return machine().graphs.erase(graph) == 1 ? cudaSuccess : cudaErrorInvalidValue; });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return call([&] { return machine().graphs.erase(graph) == 1 ? cudaSuccess : cudaErrorInvalidValue; });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count) {
  return call([&] {
    const auto found = machine().graphs.find(graph);
    if (found == machine().graphs.end() || nodes != nullptr) return cudaErrorInvalidValue;
    *count = found->second->nodes.size();
    return cudaSuccess;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t handle) {
  return call([&] {
    const std::shared_ptr<Stream> stream = to_stream(handle);
    const auto found = machine().graphs.find(graph);
    if (stream == nullptr || found == machine().graphs.end()) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
    for (const Node& node : found->second->nodes)
      for (const cudaEvent_t event : {node.wait, node.record})
        if (event != nullptr && to_event(event) == nullptr) {
          say("a graph's event has ended");
          return cudaErrorInvalidValue;
        }
    wait_for(*stream, found->second->last);
    for (const Node& node : found->second->nodes) {
      if (node.run) stream->queue.push_back({node.run, nullptr, nullptr});
      if (node.wait != nullptr) wait_for(*stream, to_event(node.wait)->latest);
      if (node.record != nullptr) to_event(node.record)->latest = record(stream);
    }
    found->second->last = record(stream);
    return cudaSuccess;
  });
}

// ---- the runtime: kernels

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  return call([&] {
    const auto found = kernels().find(function);
    if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
    if (which == cudaFuncAttributePreferredSharedMemoryCarveout)
      return value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue;
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kMostShared)
      return cudaErrorInvalidValue;
    found->second.most_shared = value;
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   std::size_t shared_bytes, unsigned flags) {
  return call([&] {
    const auto found = kernels().find(function);
    if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
    if (threads < 1 || threads > 1024 || flags != 0) return cudaErrorInvalidValue;
    *blocks = shared_bytes <= static_cast<std::size_t>(found->second.most_shared) ? 1 : 0;
    return cudaSuccess;
  });
}

void** __cudaRegisterFatBinary(void* binary) { return reinterpret_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const std::lock_guard lock(mutex());
  Kernel kernel{plain_name(name), nullptr};
  const auto found = bodies().find(kernel.name);
  if (found != bodies().end()) kernel.bind = found->second;
  kernels()[function] = std::move(kernel);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared_bytes, CUstream_st* stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared_bytes, void* stream) {
  if (configurations.empty()) return cudaErrorInvalidValue;
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared_bytes = top.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  return call([&] {
    const auto found = kernels().find(function);
    if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
    *out = reinterpret_cast<cudaKernel_t>(&found->second);
    return cudaSuccess;
  });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes,
                               cudaStream_t stream) {
  return call([&] {
    has_context = true;
    const auto* kernel = reinterpret_cast<const Kernel*>(handle);
    if (kernel == nullptr || !kernel->bind) {
      say("no host code for kernel %s", kernel == nullptr ? "null" : kernel->name.c_str());
      return cudaErrorInvalidDeviceFunction;
    }
    const bool fits = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 && grid.z == 1 &&
                      block.x > 0 && block.y * block.z == 1 && block.x <= 1024;
    if (!fits) return cudaErrorInvalidConfiguration;
    if (shared_bytes > static_cast<std::size_t>(kernel->most_shared)) return cudaErrorInvalidValue;
    return enqueue(stream, kernel->bind({grid, block, shared_bytes}, arguments));
  });
}

}  // extern "C"

// ---- the driver API: virtual memory

namespace {

CUresult ready() {
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  return has_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

template <class Body>
CUresult drive(Body&& body) {
  const std::lock_guard lock(mutex());
  const CUresult status = ready();
  return status == CUDA_SUCCESS ? body() : status;
}

CUresult error_name(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE     ? "CUDA_ERROR_INVALID_VALUE"
          : error == CUDA_ERROR_OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == CUDA_ERROR_NOT_INITIALIZED ? "CUDA_ERROR_NOT_INITIALIZED"
          : error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                                : "an error that the test double has no name for";
  return CUDA_SUCCESS;
}

CUresult error_string(CUresult, const char** text) {
  *text = "said by the test double";
  return CUDA_SUCCESS;
}

CUresult device_get(CUdevice* device, int ordinal) {
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  *device = 0;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult device_attribute(int* value, CUdevice_attribute which, CUdevice) {
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  *value = which == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED ||
           which == CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED ||
           which == CU_DEVICE_ATTRIBUTE_HOST_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
  if (*value == 0) say("driver attribute %d is not played", static_cast<int>(which));
  return *value != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

bool sound(const CUmemAllocationProp& p) {
  const CUmemLocationType type = p.location.type;
  const bool placed = type == CU_MEM_LOCATION_TYPE_DEVICE || type == CU_MEM_LOCATION_TYPE_HOST_NUMA ||
                      type == CU_MEM_LOCATION_TYPE_HOST;
  return p.type == CU_MEM_ALLOCATION_TYPE_PINNED && placed && p.location.id == 0;
}

CUresult granularity(std::size_t* out, const CUmemAllocationProp* p, CUmemAllocationGranularity_flags) {
  return drive([&] { return *out = kChunk, sound(*p) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; });
}

CUresult reserve(CUdeviceptr* out, std::size_t bytes, std::size_t alignment, CUdeviceptr wish,
                 unsigned long long flags) {
  return drive([&] {
    if (bytes == 0 || bytes % kChunk != 0 || wish != 0 || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    void* at = addresses(bytes, std::max(alignment, kChunk));
    if (at == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    space().reserved[to_address(at)] = bytes;
    *out = to_address(at);
    return CUDA_SUCCESS;
  });
}

CUresult free_addresses(CUdeviceptr at, std::size_t bytes) {
  return drive([&] {
    const auto found = space().reserved.find(at);
    const auto mapped = space().live.lower_bound(at);
    if (found == space().reserved.end() || found->second != bytes) return CUDA_ERROR_INVALID_VALUE;
    if (mapped != space().live.end() && mapped->first < at + bytes) return CUDA_ERROR_INVALID_VALUE;
    space().reserved.erase(found);
    return CUDA_SUCCESS;
  });
}

void drop_if_unused(CUmemGenericAllocationHandle handle) {
  const auto found = space().physical.find(handle);
  if (!found->second.released || found->second.mapped) return;
  if (found->second.location.type == CU_MEM_LOCATION_TYPE_DEVICE) space().used -= found->second.bytes;
  space().physical.erase(found);
}

CUresult create(CUmemGenericAllocationHandle* out, std::size_t bytes, const CUmemAllocationProp* p,
                unsigned long long flags) {
  return drive([&] {
    if (bytes == 0 || bytes % kChunk != 0 || !sound(*p) || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    const bool on_card = p->location.type == CU_MEM_LOCATION_TYPE_DEVICE;
    if (on_card && bytes > kTotalBytes - space().used) return CUDA_ERROR_OUT_OF_MEMORY;
    space().used += on_card ? bytes : 0;
    *out = space().next_handle++;
    space().physical[*out] = {bytes, p->location, false, false};
    return CUDA_SUCCESS;
  });
}

CUresult release(CUmemGenericAllocationHandle handle) {
  return drive([&] {
    const auto found = space().physical.find(handle);
    if (found == space().physical.end() || found->second.released) return CUDA_ERROR_INVALID_VALUE;
    found->second.released = true;
    drop_if_unused(handle);
    return CUDA_SUCCESS;
  });
}

// Memory is mapped as a whole, and once.
CUresult map(CUdeviceptr at, std::size_t bytes, std::size_t offset, CUmemGenericAllocationHandle handle,
             unsigned long long flags) {
  return drive([&] {
    const auto found = space().physical.find(handle);
    auto range = space().reserved.upper_bound(at);
    if (found == space().physical.end() || range == space().reserved.begin()) return CUDA_ERROR_INVALID_VALUE;
    --range;
    const auto next = space().live.lower_bound(at);
    const bool fits = at + bytes <= range->first + range->second && at % kChunk == 0 && offset == 0 && flags == 0 &&
                      bytes == found->second.bytes && !found->second.mapped && !found->second.released &&
                      find(reinterpret_cast<void*>(at), 1) == nullptr &&
                      (next == space().live.end() || next->first >= at + bytes);
    if (!fits) return CUDA_ERROR_INVALID_VALUE;
    const bool on_card = found->second.location.type == CU_MEM_LOCATION_TYPE_DEVICE;
    found->second.mapped = true;
    space().of_mapping[at] = handle;
    space().live.emplace(at, Memory{bytes, on_card ? Kind::vmm_device : Kind::vmm_host, false, {}});
    return CUDA_SUCCESS;
  });
}

CUresult unmap(CUdeviceptr at, std::size_t bytes) {
  return drive([&] {
    const auto found = space().of_mapping.find(at);
    if (found == space().of_mapping.end() || space().live.at(at).bytes != bytes) return CUDA_ERROR_INVALID_VALUE;
    close_pages(reinterpret_cast<void*>(at), bytes);
    space().live.erase(at);
    space().physical.at(found->second).mapped = false;
    drop_if_unused(found->second);
    space().of_mapping.erase(found);
    return CUDA_SUCCESS;
  });
}

// Pages open with the device's access; the CPU's is remembered by nobody, since both are this process.
CUresult set_access(CUdeviceptr at, std::size_t bytes, const CUmemAccessDesc* whom, std::size_t count) {
  return drive([&] {
    Memory* memory = find(reinterpret_cast<void*>(at), bytes);
    if (memory == nullptr || memory->bytes != bytes || count == 0) return CUDA_ERROR_INVALID_VALUE;
    for (std::size_t i = 0; i < count; ++i) {
      const bool device = whom[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE;
      if (whom[i].location.id != 0 || whom[i].flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE ||
          (!device && memory->kind != Kind::vmm_host))
        return CUDA_ERROR_INVALID_VALUE;
      if (device && !std::exchange(memory->device_access, true)) open_pages(reinterpret_cast<void*>(at), bytes);
    }
    return CUDA_SUCCESS;
  });
}

template <class Function>
void* entry(Function* function) {
  return reinterpret_cast<void*>(function);
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> known = {
      {"cuGetErrorName", entry<std::remove_pointer_t<PFN_cuGetErrorName_v6000>>(error_name)},
      {"cuGetErrorString", entry<std::remove_pointer_t<PFN_cuGetErrorString_v6000>>(error_string)},
      {"cuDeviceGet", entry<std::remove_pointer_t<PFN_cuDeviceGet_v2000>>(device_get)},
      {"cuDeviceGetAttribute", entry<std::remove_pointer_t<PFN_cuDeviceGetAttribute_v2000>>(device_attribute)},
      {"cuMemGetAllocationGranularity",
       entry<std::remove_pointer_t<PFN_cuMemGetAllocationGranularity_v10020>>(granularity)},
      {"cuMemAddressReserve", entry<std::remove_pointer_t<PFN_cuMemAddressReserve_v10020>>(reserve)},
      {"cuMemAddressFree", entry<std::remove_pointer_t<PFN_cuMemAddressFree_v10020>>(free_addresses)},
      {"cuMemCreate", entry<std::remove_pointer_t<PFN_cuMemCreate_v10020>>(create)},
      {"cuMemRelease", entry<std::remove_pointer_t<PFN_cuMemRelease_v10020>>(release)},
      {"cuMemMap", entry<std::remove_pointer_t<PFN_cuMemMap_v10020>>(map)},
      {"cuMemUnmap", entry<std::remove_pointer_t<PFN_cuMemUnmap_v10020>>(unmap)},
      {"cuMemSetAccess", entry<std::remove_pointer_t<PFN_cuMemSetAccess_v10020>>(set_access)},
  };
  return call([&] {
    const auto found = known.find(name);
    *out = found == known.end() ? nullptr : found->second;
    *result = *out == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
  });
}
