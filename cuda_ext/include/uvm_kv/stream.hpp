// Streams, events and captured graphs, and the rule that what cannot be captured refuses a capturing stream.
//
// CUDA 13.0 has no prefetch node, and a batch copy during capture fails or vanishes. So hints and batch copies are
// issued outside capture, and captured work meets them through external event nodes:
//
//   copy stream    [batch copy] record(e, external)
//   graph               wait(e, external) -> [kernels]          replayed any number of times
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <utility>

#include "uvm_kv/checks.hpp"
#include "uvm_kv/cuda_check.hpp"
#include "uvm_kv/errors.hpp"

namespace uvm_kv {

inline cudaStream_t to_stream(std::uintptr_t handle) {
  require_stream(handle);
  return reinterpret_cast<cudaStream_t>(handle);
}

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  UVM_KV_CUDA(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

inline void require_not_capturing(cudaStream_t stream, const char* what) {
  if (!is_capturing(stream)) return;
  throw CapturingStreamError(std::string(what) +
                             " cannot be captured into a CUDA graph: issue it on another stream, and let the graph "
                             "wait for an event (Event.wait(..., external=True))");
}

/// A captured graph, ready to launch.
class Graph final {
 public:
  explicit Graph(cudaGraph_t captured) : graph_(captured) {
    const cudaError_t status = cudaGraphInstantiate(&executable_, captured, 0);
    if (status != cudaSuccess) cudaGraphDestroy(captured);
    detail::check(status, "cudaGraphInstantiate", 0, __FILE__, __LINE__);
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch(std::uintptr_t stream) const { UVM_KV_CUDA(cudaGraphLaunch(executable_, to_stream(stream))); }

  std::size_t num_nodes() const {
    std::size_t count = 0;
    UVM_KV_CUDA(cudaGraphGetNodes(graph_, nullptr, &count));
    return count;
  }

 private:
  cudaGraph_t graph_;
  cudaGraphExec_t executable_ = nullptr;
};

/// A stream that does not wait for the legacy stream.
class Stream final {
 public:
  Stream() { UVM_KV_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  std::uintptr_t handle() const { return reinterpret_cast<std::uintptr_t>(stream_); }
  void synchronize() const { UVM_KV_CUDA(cudaStreamSynchronize(stream_)); }
  bool capturing() const { return is_capturing(stream_); }

  /// Relaxed: other threads and streams go on as before, which is what lets copies be issued beside a capture.
  void begin_capture() const { UVM_KV_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed)); }
  cudaGraph_t end_capture() const {
    cudaGraph_t graph = nullptr;
    UVM_KV_CUDA(cudaStreamEndCapture(stream_, &graph));
    return graph;
  }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event final {
 public:
  explicit Event(bool timing) {
    UVM_KV_CUDA(cudaEventCreateWithFlags(&event_, timing ? cudaEventDefault : cudaEventDisableTiming));
  }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  /// `external`: while capturing, a node that records anew on each replay, not an edge of the graph.
  void record(std::uintptr_t stream, bool external) const {
    const unsigned flags = external ? cudaEventRecordExternal : cudaEventRecordDefault;
    UVM_KV_CUDA(cudaEventRecordWithFlags(event_, to_stream(stream), flags));
  }
  /// Work issued to `stream` after this call waits for the event.
  void wait(std::uintptr_t stream, bool external) const {
    const unsigned flags = external ? cudaEventWaitExternal : cudaEventWaitDefault;
    UVM_KV_CUDA(cudaStreamWaitEvent(to_stream(stream), event_, flags));
  }
  bool done() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    detail::check(status, "cudaEventQuery", 0, __FILE__, __LINE__);
    return true;
  }
  void synchronize() const { UVM_KV_CUDA(cudaEventSynchronize(event_)); }
  /// Nanoseconds from `begin` to this event; both were recorded with timing on.
  std::int64_t ns_since(const Event& begin) const {
    float milliseconds = 0;
    UVM_KV_CUDA(cudaEventElapsedTime(&milliseconds, begin.event_, event_));
    return static_cast<std::int64_t>(static_cast<double>(milliseconds) * 1e6);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace uvm_kv
