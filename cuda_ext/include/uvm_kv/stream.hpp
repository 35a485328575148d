// Streams, events and captured graphs, and the rule that what cannot be captured refuses a capturing stream.
//
// CUDA 13.0 has no prefetch node, and a batch copy during capture fails or vanishes. So hints and batch copies are
// issued outside capture, and captured work meets them through external event nodes:
//
//   copy stream    [batch copy] record(e)
//   graph               wait(e, external) -> [kernels]          replayed at will: waits for the latest record
//
// `external` makes a node of a graph, and is an error outside of a capture. A graph does not keep its events alive.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <utility>

#include "uvm_kv/checks.hpp"
#include "uvm_kv/cuda_check.hpp"
#include "uvm_kv/device.hpp"
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

/// The flag of an external node, which only a capture takes.
inline unsigned external_flag(cudaStream_t stream, bool external, unsigned flag) {
  if (!external) return 0;
  require(is_capturing(stream),
          "external=True makes a node of a graph, and this stream is not capturing: leave it out");
  return flag;
}

/// A captured graph, ready to launch. The events it meets must live as long as it does.
class Graph final {
 public:
  explicit Graph(cudaGraph_t captured) : graph_(captured) {
    const cudaError_t status = cudaGraphInstantiate(&executable_, captured, 0);
    if (status != cudaSuccess) succeeded(cudaGraphDestroy(captured));
    detail::check(status, "cudaGraphInstantiate", 0, __FILE__, __LINE__);
  }
  ~Graph() {
    succeeded(cudaGraphExecDestroy(executable_));
    succeeded(cudaGraphDestroy(graph_));
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
  explicit Stream(int device) {
    const DeviceScope scope(device);
    UVM_KV_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Stream() { succeeded(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  std::uintptr_t handle() const { return reinterpret_cast<std::uintptr_t>(stream_); }
  void synchronize() const { UVM_KV_CUDA(cudaStreamSynchronize(stream_)); }
  bool capturing() const { return is_capturing(stream_); }

  /// Relaxed: other threads and streams continue as before, which is what lets copies be issued beside a capture.
  void begin_capture() const { UVM_KV_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed)); }
  cudaGraph_t end_capture() const {
    cudaGraph_t graph = nullptr;
    UVM_KV_CUDA(cudaStreamEndCapture(stream_, &graph));
    return graph;
  }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Is recorded on streams of its own device, and waited for on any.
class Event final {
 public:
  Event(bool timing, int device) {
    const DeviceScope scope(device);
    UVM_KV_CUDA(cudaEventCreateWithFlags(&event_, timing ? cudaEventDefault : cudaEventDisableTiming));
  }
  ~Event() {
    if (event_ != nullptr) succeeded(cudaEventDestroy(event_));
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  /// `external`: of a capturing stream, a node that records anew on each replay, not an edge of the graph.
  void record(std::uintptr_t stream, bool external) const {
    const cudaStream_t on = to_stream(stream);
    UVM_KV_CUDA(cudaEventRecordWithFlags(event_, on, external_flag(on, external, cudaEventRecordExternal)));
  }
  /// Work issued to `stream` after this call waits for the event. `external`: of a capturing stream, a node.
  void wait(std::uintptr_t stream, bool external) const {
    const cudaStream_t on = to_stream(stream);
    UVM_KV_CUDA(cudaStreamWaitEvent(on, event_, external_flag(on, external, cudaEventWaitExternal)));
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
