// Kernel ladder of paged decode attention: each version is checked against a float64 reference on the CPU before it is
// timed. One query token for each sequence, fp16.
//
//   1  one CTA for each query head; a thread walks whole rows, scores in shared memory       what the formula says
//   2  one warp for each query head, lanes side by side in a row, online softmax             coalesced, one pass
//   3  version 2 over splits of the context, then a merge                                    fills the card
//   4  the product's pieces, copied synchronously                                            K and V once for a group
//   5  the product: an asynchronous ring                                                     bytes in flight
//
//   nvcc -std=c++20 -O3 -arch=native -Iinclude -o attention_ladder dev/attention_ladder.cu src/paged_attention.cu
//   ./attention_ladder [--batch 32] [--context 4096] [--q-heads 32] [--kv-heads 8] [--head-dim 128] [--block-size 16]
//                      [--host-percent 0] [--repeats 20] [--check-only 1]
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "uvm_kv/paged_attention.cuh"

namespace uvm_kv {
namespace {

constexpr int kNumVersions = 5;
constexpr int kLayers = 2;  // launches take turns, so that none finds its K and V in the L2 cache
constexpr int kNaiveTokens = 8192;
constexpr int kLaunches = 8;  // between two events: the CPU's part of a launch hides behind the GPU's part of the last

// ---- CUDA resources

void cuda_try(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
  }
}

void try_status(const Status& status) {
  if (!status.ok()) {
    throw std::runtime_error(status.text);
  }
}

class Buffer {
 public:
  Buffer(std::size_t bytes, bool on_host) : bytes_(std::max<std::size_t>(bytes, 256)), on_host_(on_host) {
    cuda_try(on_host ? cudaMallocHost(&data_, bytes_) : cudaMalloc(&data_, bytes_), "allocation");
  }
  ~Buffer() { on_host_ ? cudaFreeHost(data_) : cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t bytes() const { return bytes_; }

  template <class T>
  void upload(const std::vector<T>& values) {
    cuda_try(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyDefault), "upload");
  }
  template <class T>
  std::vector<T> download(std::size_t count) const {
    std::vector<T> values(count);
    cuda_try(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDefault), "download");
    return values;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
  bool on_host_;
};

class Event {
 public:
  Event() { cuda_try(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record() { cuda_try(cudaEventRecord(event_), "cudaEventRecord"); }
  float milliseconds_since(const Event& start) const {
    cuda_try(cudaEventSynchronize(event_), "cudaEventSynchronize");
    float ms = 0.0f;
    cuda_try(cudaEventElapsedTime(&ms, start.event_, event_), "cudaEventElapsedTime");
    return ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// ---- version 1

template <int kHeadDim>
__global__ void naive_kernel(const __grid_constant__ AttentionParams params, const std::int32_t* context_lens) {
  __shared__ float scores[kNaiveTokens];
  __shared__ float sum;
  const int seq = blockIdx.x;
  const int head = blockIdx.y;
  const int kv_head = head / params.group();
  const int context = context_lens[seq];
  const std::int32_t* blocks = params.table.row(seq);
  const PagedKV& kv = params.kv;
  const Fp16* query = reinterpret_cast<const Fp16*>(params.query + seq * params.query_stride_bytes) + head * kHeadDim;
  for (int token = threadIdx.x; token < context; token += blockDim.x) {
    const int slot = token % kv.block_size;
    const std::byte* block = kv.block(blocks[token / kv.block_size]);
    const Fp16* key = reinterpret_cast<const Fp16*>(block + kv.slot_offset(0, kv_head, slot));
    float score = 0.0f;
    for (int d = 0; d < kHeadDim; ++d) {
      score += to_float(query[d]) * to_float(key[d]);
    }
    scores[token] = score * params.scale_log2;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float highest = kLowestScore;
    for (int token = 0; token < context; ++token) {
      highest = fmaxf(highest, scores[token]);
    }
    sum = 0.0f;
    for (int token = 0; token < context; ++token) {
      scores[token] = exp2f(scores[token] - highest);
      sum += scores[token];
    }
  }
  __syncthreads();
  Fp16* out = reinterpret_cast<Fp16*>(params.out + seq * params.out_stride_bytes) + head * kHeadDim;
  for (int d = threadIdx.x; d < kHeadDim; d += blockDim.x) {
    float acc = 0.0f;
    for (int token = 0; token < context; ++token) {
      const int slot = token % kv.block_size;
      const std::byte* block = kv.block(blocks[token / kv.block_size]);
      acc += scores[token] * to_float(reinterpret_cast<const Fp16*>(block + kv.slot_offset(1, kv_head, slot))[d]);
    }
    out[d] = from_float<Fp16>(acc / sum);
  }
}

// ---- versions 2 and 3: a warp for each (sequence, query head, split)

template <int kHeadDim>
struct WarpRow {
  static constexpr int kElements = kHeadDim / kWarpLanes;

  float values[kElements];

  __device__ void load(const std::byte* row) {
    const Fp16* mine = reinterpret_cast<const Fp16*>(row) + threadIdx.x * kElements;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      values[e] = to_float(mine[e]);
    }
  }
};

__device__ float sum_warp(float value) {
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

template <int kHeadDim>
__global__ void warp_kernel(const __grid_constant__ AttentionParams params, const std::int32_t* context_lens,
                            int split_tokens, float* stats, float* partial_acc) {
  constexpr int kElements = WarpRow<kHeadDim>::kElements;
  const int seq = blockIdx.x;
  const int head = blockIdx.y;
  const int kv_head = head / params.group();
  const int begin = blockIdx.z * split_tokens;
  const int end = min(begin + split_tokens, context_lens[seq]);
  const std::int32_t* blocks = params.table.row(seq);
  const PagedKV& kv = params.kv;
  WarpRow<kHeadDim> query, key, value;
  query.load(params.query + seq * params.query_stride_bytes + head * kv.row_bytes());
  float m = kLowestScore;
  float l = 0.0f;
  float acc[kElements] = {};
  for (int token = begin; token < end; ++token) {
    const int slot = token % kv.block_size;
    const std::byte* block = kv.block(blocks[token / kv.block_size]);
    key.load(block + kv.slot_offset(0, kv_head, slot));
    value.load(block + kv.slot_offset(1, kv_head, slot));
    float score = 0.0f;
    for (int e = 0; e < kElements; ++e) {
      score += query.values[e] * key.values[e];
    }
    const MergeWeights weights = merge_weights(m, sum_warp(score) * params.scale_log2);
    m = weights.m;
    l = l * weights.a + weights.b;
    for (int e = 0; e < kElements; ++e) {
      acc[e] = merge_sum(weights, acc[e], value.values[e]);
    }
  }
  const std::int64_t row = (std::int64_t{seq} * gridDim.y + head) * gridDim.z + blockIdx.z;
  if (threadIdx.x == 0) {
    stats[2 * row] = m;
    stats[2 * row + 1] = l;
  }
  for (int e = 0; e < kElements; ++e) {
    partial_acc[row * kHeadDim + threadIdx.x * kElements + e] = acc[e];
  }
}

template <int kHeadDim>
__global__ void warp_merge_kernel(const __grid_constant__ AttentionParams params, int num_splits, const float* stats,
                                  const float* partial_acc) {
  const int head = blockIdx.y;
  const std::int64_t first = (std::int64_t{blockIdx.x} * gridDim.y + head) * num_splits;
  float m = stats[2 * first];
  float l = stats[2 * first + 1];
  float acc = partial_acc[first * kHeadDim + threadIdx.x];
  for (std::int64_t row = first + 1; row < first + num_splits; ++row) {
    const MergeWeights weights = merge_weights(m, stats[2 * row]);
    m = weights.m;
    l = merge_sum(weights, l, stats[2 * row + 1]);
    acc = merge_sum(weights, acc, partial_acc[row * kHeadDim + threadIdx.x]);
  }
  std::byte* out = params.out + blockIdx.x * params.out_stride_bytes;
  reinterpret_cast<Fp16*>(out)[head * kHeadDim + threadIdx.x] = from_float<Fp16>(acc / l);
}

// ---- version 4: the same pieces, but every copy is waited for where it is issued

class SynchronousLane : public DeviceLane {
 public:
  using DeviceLane::DeviceLane;
  __device__ void copy_chunk(Chunk16* target, const std::byte* source, bool valid) {
    *target = valid ? *reinterpret_cast<const Chunk16*>(source) : Chunk16{};
  }
  __device__ void commit() {}
  template <int kGroups>
  __device__ void wait_all_but() {}
};

template <int kHeadDim, int kRows, bool kWide>
__global__ void __launch_bounds__(kCtaWarps* kWarpLanes)
    synchronous_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ Chunk16 ring[];
  __shared__ int cta_slot;
  SynchronousLane lane(&cta_slot);
  run_worker<Fp16, kHeadDim, kRows, kWide>(lane, params, ring);
}

// ---- a problem

struct Shape {
  int q_heads = 32;
  int kv_heads = 8;
  int head_dim = 128;
  int block_size = 16;
  int host_percent = 0;
};

// Slots that no token uses hold NaN, which is 0xffff.
__global__ void fill_kernel(const __grid_constant__ PagedKV kv, const __grid_constant__ BlockTable table,
                            const std::int32_t* context_lens, int layer) {
  const int seq = blockIdx.x;
  const int row_elements = kv.num_kv_heads * kv.head_dim;
  for (int token = blockIdx.y; token < context_lens[seq]; token += gridDim.y) {
    const int slot = token % kv.block_size;
    std::byte* block = kv.block(layer, table.row(seq)[token / kv.block_size]);
    for (int i = threadIdx.x; i < 2 * row_elements; i += blockDim.x) {
      const int which = i / row_elements;
      const int head = i % row_elements / kv.head_dim;
      std::uint32_t hash = ((layer * 131u + seq) * 1000003u + token) * 2u * row_elements + i;
      hash = (hash ^ (hash >> 16)) * 0x7feb352du;
      hash = (hash ^ (hash >> 15)) * 0x846ca68bu;
      const float value = (hash >> 8) * 0x1p-23f - 1.0f;
      reinterpret_cast<Fp16*>(block + kv.slot_offset(which, head, slot))[i % kv.head_dim] = from_float<Fp16>(value);
    }
  }
}

class Problem {
 public:
  Problem(const Shape& shape, std::vector<std::int32_t> context_lens)
      : shape_(shape),
        context_lens_(std::move(context_lens)),
        geometry_{kLayers, shape.kv_heads, shape.head_dim, 2, shape.block_size} {
    lay_table();
    slabs_.push_back(std::make_unique<Buffer>(geometry_.block_bytes() * num_device_, false));
    slabs_.push_back(std::make_unique<Buffer>(geometry_.block_bytes() * (num_blocks_ - num_device_), true));
    for (const auto& slab : slabs_) {
      cuda_try(cudaMemset(slab->as<void>(), 0xff, slab->bytes()), "poison");
    }
    table_buffer_ = std::make_unique<Buffer>(table_.size() * sizeof(std::int32_t), false);
    table_buffer_->upload(table_);
    lens_buffer_.upload(context_lens_);
    std::vector<std::uint16_t> query(query_elements());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::generate(query.begin(), query.end(), [&] { return float_to_fp16_on_host(normal(random)); });
    query_.upload(query);
    for (int layer = 0; layer < kLayers; ++layer) {
      fill_kernel<<<dim3(num_seqs(), 64), 256>>>(kv(), device_table(), lens_buffer_.as<std::int32_t>(), layer);
    }
    cuda_try(cudaDeviceSynchronize(), "fill");
    make_plan();
  }

  int num_seqs() const { return static_cast<int>(context_lens_.size()); }
  int longest() const { return *std::max_element(context_lens_.begin(), context_lens_.end()); }
  double kv_bytes() const {
    return std::accumulate(context_lens_.begin(), context_lens_.end(), 0.0) * 2 * shape_.kv_heads * shape_.head_dim * 2;
  }

  template <int kHeadDim>
  void launch(int version, int layer) {
    AttentionParams params = make_params(layer);
    const std::int32_t* lens = lens_buffer_.as<std::int32_t>();
    const dim3 heads(num_seqs(), shape_.q_heads);
    const int split = default_split_tokens(kHeadDim, 2);
    if (version == 1) {
      naive_kernel<kHeadDim><<<heads, 128>>>(params, lens);
    } else if (version == 2 || version == 3) {
      const int splits = version == 2 ? 1 : (longest() - 1) / split + 1;
      const int tokens = version == 2 ? longest() : split;
      float* stats = scratch(std::size_t{heads.x} * heads.y * splits * (kHeadDim + 2));
      float* acc = stats + std::size_t{heads.x} * heads.y * splits * 2;
      warp_kernel<kHeadDim><<<dim3(heads.x, heads.y, splits), kWarpLanes>>>(params, lens, tokens, stats, acc);
      warp_merge_kernel<kHeadDim><<<heads, kHeadDim>>>(params, splits, stats, acc);
    } else if (version == 4) {
      launch_synchronous<kHeadDim>(params);
    } else {
      try_status(paged_attention(make_args(layer), nullptr));
    }
    cuda_try(cudaGetLastError(), "launch");
  }

  void poison_output() { cuda_try(cudaMemset(out_.as<void>(), 0xff, out_.bytes()), "poison"); }

  // Norm of the error over the norm of the result, of every sequence and head of one layer.
  double error(int layer) const {
    const auto device = slabs_[0]->download<std::byte>(slabs_[0]->bytes());
    const auto host = slabs_[1]->download<std::byte>(slabs_[1]->bytes());
    const auto query = query_.download<std::uint16_t>(query_elements());
    const auto out = out_.download<std::uint16_t>(query_elements());
    const PagedKV view = view_over(const_cast<std::byte*>(device.data()), const_cast<std::byte*>(host.data()));
    double wrong = 0.0;
    double right = 0.0;
    for (int seq = 0; seq < num_seqs(); ++seq) {
      for (int head = 0; head < shape_.q_heads; ++head) {
        const std::size_t first = (std::size_t{1} * seq * shape_.q_heads + head) * shape_.head_dim;
        const std::vector<double> expected = reference_row(view, layer, seq, head, query.data() + first);
        for (int d = 0; d < shape_.head_dim; ++d) {
          wrong += std::pow(fp16_to_float_on_host(out[first + d]) - expected[d], 2);
          right += expected[d] * expected[d];
        }
      }
    }
    return std::sqrt(wrong / right);
  }

 private:
  std::size_t query_elements() const { return std::size_t{1} * num_seqs() * shape_.q_heads * shape_.head_dim; }

  // Blocks in a random order; those with the highest numbers lie on the host.
  void lay_table() {
    std::vector<std::int32_t> indptr{0};
    for (const int context : context_lens_) {
      indptr.push_back(indptr.back() + (context - 1) / shape_.block_size + 1);
    }
    num_blocks_ = indptr.back();
    num_device_ = std::max(1, static_cast<int>(std::int64_t{num_blocks_} * (100 - shape_.host_percent) / 100));
    table_.resize(num_blocks_);
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), std::mt19937(2));
    num_table_blocks_ = table_.size();
    table_.insert(table_.end(), indptr.begin(), indptr.end());
  }

  PagedKV view_over(std::byte* device, std::byte* host) const {
    return make_paged_kv(make_slab_view(device, Layout::kLayerMajor, geometry_, num_device_),
                         make_slab_view(host, Layout::kLayerMajor, geometry_, num_blocks_ - num_device_), num_device_,
                         geometry_);
  }
  PagedKV kv() const { return view_over(slabs_[0]->as<std::byte>(), slabs_[1]->as<std::byte>()); }

  static BlockTable table_at(const std::int32_t* words, std::size_t num_blocks) {
    return {words, words + num_blocks, 0};
  }
  BlockTable device_table() const { return table_at(table_buffer_->as<std::int32_t>(), num_table_blocks_); }

  void make_plan() {
    const std::vector<std::int32_t> ones(context_lens_.size(), 1);
    PlanInput input;
    input.num_q_heads = shape_.q_heads;
    input.num_kv_heads = shape_.kv_heads;
    input.head_dim = shape_.head_dim;
    input.element_bytes = 2;
    input.block_size = shape_.block_size;
    input.query_lens = ones;
    input.context_lens = context_lens_;
    input.table = table_at(table_.data(), num_table_blocks_);
    input.first_host_block = num_device_;
    try_status(count_plan(input, &capacity_));
    std::vector<std::byte> plan(capacity_.bytes());
    try_status(fill_plan(input, capacity_, plan));
    plan_ = std::make_unique<Buffer>(plan.size(), false);
    plan_->upload(plan);
    workspace_ = std::make_unique<Buffer>(attention_workspace_bytes(capacity_, shape_.head_dim), false);
    try_status(init_attention_workspace(workspace_->as<std::byte>(), nullptr));
  }

  AttentionArgs make_args(int layer) const {
    AttentionArgs args;
    args.kv = kv().at_layer(layer);
    args.table = device_table();
    args.num_q_heads = shape_.q_heads;
    args.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    args.query = query_.as<void>();
    args.out = out_.as<void>();
    args.query_stride_bytes = args.out_stride_bytes = std::int64_t{shape_.q_heads} * shape_.head_dim * 2;
    args.plan = plan_->as<std::byte>();
    args.capacity = capacity_;
    args.workspace = workspace_->as<std::byte>();
    args.workspace_bytes = static_cast<std::int64_t>(workspace_->bytes());
    return args;
  }

  AttentionParams make_params(int layer) const {
    const AttentionArgs args = make_args(layer);
    AttentionParams params;
    params.kv = args.kv;
    params.table = args.table;
    params.num_q_heads = args.num_q_heads;
    params.query = query_.as<std::byte>();
    params.out = out_.as<std::byte>();
    params.query_stride_bytes = params.out_stride_bytes = args.query_stride_bytes;
    params.scale_log2 = args.scale * kLog2E;
    params.num_host_workers = kWarpLanes;
    set_plan(&params, capacity_, args.plan, args.workspace);
    return params;
  }

  template <int kHeadDim>
  void launch_synchronous(const AttentionParams& params) {
    switch (capacity_.items[1] > 0 ? 0 : narrow_rows(kHeadDim, params.group())) {
      case 0:
        return launch_workers<kHeadDim>(synchronous_kernel<kHeadDim, kWideWarpRows, true>, params);
      case 1:
        return launch_workers<kHeadDim>(synchronous_kernel<kHeadDim, 1, false>, params);
      case 4:
        return launch_workers<kHeadDim>(synchronous_kernel<kHeadDim, 4, false>, params);
      default:
        return launch_workers<kHeadDim>(synchronous_kernel<kHeadDim, 8, false>, params);
    }
  }

  template <int kHeadDim, class Kernel>
  void launch_workers(Kernel kernel, const AttentionParams& params) {
    constexpr int kBytes = kCtaWarps * ring_bytes_per_warp<Fp16, kHeadDim>();
    int num_sms = 0;
    int per_sm = 0;
    cuda_try(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "attribute");
    cuda_try(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0), "attribute");
    cuda_try(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kCtaWarps * kWarpLanes, kBytes),
             "occupancy");
    kernel<<<num_sms * per_sm, kCtaWarps * kWarpLanes, kBytes>>>(params);
    if (capacity_.merges > 0) {
      merge_kernel<Fp16, kHeadDim><<<1024, kMergeParts * kHeadDim / 4>>>(params);
    }
  }

  float* scratch(std::size_t count) {
    if (scratch_ == nullptr || scratch_->bytes() < count * sizeof(float)) {
      scratch_ = std::make_unique<Buffer>(count * sizeof(float), false);
    }
    return scratch_->as<float>();
  }

  std::vector<double> reference_row(const PagedKV& view, int layer, int seq, int head,
                                    const std::uint16_t* query) const {
    const std::int32_t* blocks = table_at(table_.data(), num_table_blocks_).row(seq);
    const int kv_head = head / (shape_.q_heads / shape_.kv_heads);
    const int context = context_lens_[seq];
    const auto element = [&](int which, int token, int d) {
      const std::byte* block = view.block(layer, blocks[token / shape_.block_size]);
      const std::byte* row = block + view.slot_offset(which, kv_head, token % shape_.block_size);
      return static_cast<double>(to_float(reinterpret_cast<const Fp16*>(row)[d]));
    };
    std::vector<double> weights(context);
    for (int token = 0; token < context; ++token) {
      for (int d = 0; d < shape_.head_dim; ++d) {
        weights[token] += fp16_to_float_on_host(query[d]) * element(0, token, d);
      }
      weights[token] /= std::sqrt(static_cast<double>(shape_.head_dim));
    }
    const double highest = *std::max_element(weights.begin(), weights.end());
    double sum = 0.0;
    std::vector<double> out(shape_.head_dim);
    for (int token = 0; token < context; ++token) {
      const double weight = std::exp(weights[token] - highest);
      sum += weight;
      for (int d = 0; d < shape_.head_dim; ++d) {
        out[d] += weight * element(1, token, d);
      }
    }
    std::transform(out.begin(), out.end(), out.begin(), [sum](double x) { return x / sum; });
    return out;
  }

  Shape shape_;
  std::vector<std::int32_t> context_lens_;
  KVGeometry geometry_;
  std::vector<std::int32_t> table_;  // blocks, then indptr
  std::size_t num_table_blocks_ = 0;
  int num_blocks_ = 0;
  int num_device_ = 0;
  PlanCapacity capacity_;
  std::vector<std::unique_ptr<Buffer>> slabs_;  // device, host
  std::unique_ptr<Buffer> table_buffer_;
  std::unique_ptr<Buffer> plan_;
  std::unique_ptr<Buffer> workspace_;
  std::unique_ptr<Buffer> scratch_;
  Buffer lens_buffer_{context_lens_.size() * sizeof(std::int32_t), false};
  Buffer query_{query_elements() * 2, false};
  Buffer out_{query_elements() * 2, false};
};

// ---- check, then time

std::vector<std::int32_t> ragged_lens() { return {1, 7, 130, 1000, 256, 513, 777}; }

template <int kHeadDim>
bool check_version(int version, Shape shape) {
  bool good = true;
  for (const int host_percent : {0, 50, 90}) {
    shape.host_percent = host_percent;
    Problem problem(shape, ragged_lens());
    for (int layer = 0; layer < kLayers; ++layer) {
      problem.poison_output();
      problem.launch<kHeadDim>(version, layer);
      const double error = problem.error(layer);
      good = good && error < 1e-3;  // false for NaN
      std::printf("version %d  host %2d %%  layer %d  error %.2e  %s\n", version, host_percent, layer, error,
                  error < 1e-3 ? "ok" : "WRONG");
    }
  }
  return good;
}

template <class Launch>
double median_seconds(int repeats, Launch launch) {
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; ++i) {
    Event start;
    Event stop;
    start.record();
    for (int j = 0; j < kLaunches; ++j) {
      launch(j);
    }
    stop.record();
    times.push_back(stop.milliseconds_since(start) / kLaunches);
  }
  std::sort(times.begin() + 3, times.end());  // the first three warm up
  return times[3 + repeats / 2] * 1e-3;
}

// Bytes read and written a second by a large copy within the device.
double copy_bandwidth(int repeats) {
  const std::size_t bytes = std::size_t{1} << 30;
  Buffer from(bytes, false);
  Buffer to(bytes, false);
  cuda_try(cudaMemset(from.as<void>(), 0x5a, bytes), "fill");
  const auto copy = [&](int) {
    cuda_try(cudaMemcpyAsync(to.as<void>(), from.as<void>(), bytes, cudaMemcpyDefault), "copy");
  };
  return 2.0 * static_cast<double>(bytes) / median_seconds(repeats, copy);
}

template <int kHeadDim>
int climb(const Shape& shape, std::vector<std::int32_t> context_lens, int repeats, bool check_only) {
  std::vector<int> good;
  for (int version = 1; version <= kNumVersions; ++version) {
    if (check_version<kHeadDim>(version, shape)) {
      good.push_back(version);
    }
  }
  if (!check_only) {
    const double copy = copy_bandwidth(repeats);
    Problem problem(shape, std::move(context_lens));
    std::printf("device copy %.1f GB/s; KV %.1f MB a launch\nversion        ms      GB/s   of copy\n", copy * 1e-9,
                problem.kv_bytes() * 1e-6);
    for (const int version : good) {
      if (version == 1 && problem.longest() > kNaiveTokens) {
        continue;
      }
      const double seconds =
          median_seconds(repeats, [&](int i) { problem.launch<kHeadDim>(version, i % kLayers); });
      const double rate = problem.kv_bytes() / seconds;
      std::printf("%7d %9.3f %9.1f %8.1f %%\n", version, seconds * 1e3, rate * 1e-9, 100 * rate / copy);
    }
  }
  return good.size() == kNumVersions ? 0 : 1;
}

int run(std::map<std::string, int> options) {
  const Shape shape{options["--q-heads"], options["--kv-heads"], options["--head-dim"], options["--block-size"],
                    options["--host-percent"]};
  std::vector<std::int32_t> context_lens(options["--batch"], options["--context"]);
  const bool check_only = options["--check-only"] != 0;
  switch (shape.head_dim) {
    case 64:
      return climb<64>(shape, std::move(context_lens), options["--repeats"], check_only);
    case 128:
      return climb<128>(shape, std::move(context_lens), options["--repeats"], check_only);
    default:
      throw std::runtime_error("--head-dim: the ladder takes 64 or 128");
  }
}

}  // namespace
}  // namespace uvm_kv

int main(int argc, char** argv) {
  std::map<std::string, int> options{{"--batch", 32},      {"--context", 4096},  {"--q-heads", 32},
                                     {"--kv-heads", 8},    {"--head-dim", 128},  {"--block-size", 16},
                                     {"--host-percent", 0}, {"--repeats", 20},   {"--check-only", 0}};
  for (int i = 1; i < argc; i += 2) {
    if (options.count(argv[i]) == 0 || i + 1 == argc) {
      std::fprintf(stderr, "%s: unknown, or without a value; the head of the source lists the options\n", argv[i]);
      return 2;
    }
    options[argv[i]] = std::atoi(argv[i + 1]);
  }
  try {
    return uvm_kv::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
