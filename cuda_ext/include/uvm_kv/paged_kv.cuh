// A paged KV cache as the kernels see it: plain pointers and strides, no ownership. Compiles with and without CUDA.
//
// A slab holds blocks of all layers in one of two orders, packed into chunks that no piece straddles where asked:
//
//   layer_major   layer 0: |b0|b1|b2|..   layer 1: |b0|b1|b2|..         piece = one block of one layer
//   block_major   b0: |layer 0|layer 1|..   b1: |layer 0|layer 1|..     piece = one block of all layers
//
// One block of one layer is the same in both:
//
//   |<------------------- K ------------------->|<------------------- V ------------------->|
//   |      head 0       |      head 1       |...|      head 0       |      head 1       |...|
//   |slot 0|slot 1|.. B |slot 0|slot 1|.. B |   |slot 0|slot 1|.. B |slot 0|slot 1|.. B |   |
//
// A slot of a head is head_dim elements. Decode reads one head's K of a block as one contiguous run (4 KiB for 16 slots
// of 128 fp16), and append writes whole 128-byte lines from head_dim * element_bytes = 128 on.
//
// Two tiers: blocks [0, split_block) lie in the device slab, blocks [split_block, staged_block) in the host slab, from
// index 0. Managed memory is one range: split_block = kNoSplit and no host slab. From staged_block on they are copies of
// host blocks in device memory, a ring with room for staged_layers layers: layer l has place (staged_first + l) %
// staged_layers. The first place moves on from step to step, so that the layers of two steps follow one another in it.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>

#if defined(__CUDACC__)
#define UVM_KV_HD __host__ __device__ __forceinline__
#else
#define UVM_KV_HD inline
#endif

namespace uvm_kv {

// What a launcher answers: a code and a text, no exception.
struct Status {
  enum class Code : int { kOk = 0, kInvalidArgument = 1, kNotSupported = 2, kCudaError = 3 };

  Code code = Code::kOk;
  char text[240] = {};

  bool ok() const { return code == Code::kOk; }
};

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline Status make_status(Status::Code code, const char* format, ...) {
  Status status;
  status.code = code;
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.text, sizeof(status.text), format, arguments);
  va_end(arguments);
  return status;
}

// Element type of K, V, query and output. The last two are named so that a caller can ask; no kernel serves them yet.
enum class DType : int { kFp16 = 0, kBf16 = 1, kFp32 = 2, kFp8E4M3 = 3, kInt8 = 4 };

constexpr int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFp16:
    case DType::kBf16:
      return 2;
    case DType::kFp32:
      return 4;
    default:
      return 1;
  }
}

// The unit of every load and store of K and V.
struct alignas(16) Chunk16 {
  std::uint32_t words[4];
};

enum class Layout : int { kLayerMajor = 0, kBlockMajor = 1 };

inline constexpr std::int32_t kNoSplit = std::numeric_limits<std::int32_t>::max();
inline constexpr int kMinBlockSize = 8;
inline constexpr int kMaxBlockSize = 128;

struct SlabView {
  std::byte* base = nullptr;
  std::int64_t layer_stride_bytes = 0;
  std::int64_t block_stride_bytes = 0;  // between blocks of one group
  std::int64_t group_stride_bytes = 0;  // between groups; a group is what one chunk holds
  std::int32_t blocks_per_group = 1;    // 1 where blocks lie at an even stride

  void move_to(int layer) {
    if (base != nullptr) {
      base += layer * layer_stride_bytes;
    }
  }

  UVM_KV_HD std::int64_t block_offset(int block) const {
    if (blocks_per_group == 1) {  // uniform over a launch: spares the division
      return block * group_stride_bytes;
    }
    const int group = block / blocks_per_group;
    return group * group_stride_bytes + (block - group * blocks_per_group) * block_stride_bytes;
  }
};

struct KVGeometry {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int element_bytes = 0;
  int block_size = 0;  // slots in a block

  UVM_KV_HD std::int64_t row_bytes() const { return std::int64_t{head_dim} * element_bytes; }
  UVM_KV_HD std::int64_t layer_block_bytes() const { return 2 * num_kv_heads * block_size * row_bytes(); }
  UVM_KV_HD std::int64_t block_bytes() const { return num_layers * layer_block_bytes(); }
};

// The strides of a slab of `num_blocks` blocks. With chunk_bytes > 0 whole pieces are packed into chunks of that size,
// and a piece larger than a chunk starts at one; with 0 pieces follow each other.
inline SlabView make_slab_view(std::byte* base, Layout layout, const KVGeometry& geometry, std::int64_t num_blocks,
                               std::int64_t chunk_bytes = 0) {
  const bool layer_major = layout == Layout::kLayerMajor;
  const std::int64_t piece = layer_major ? geometry.layer_block_bytes() : geometry.block_bytes();
  SlabView slab{base, 0, piece, piece, 1};
  if (chunk_bytes > 0 && piece > chunk_bytes) {
    slab.group_stride_bytes = (piece + chunk_bytes - 1) / chunk_bytes * chunk_bytes;
  } else if (chunk_bytes > 0 && chunk_bytes % piece != 0) {
    slab.blocks_per_group = static_cast<std::int32_t>(chunk_bytes / piece);
    slab.group_stride_bytes = chunk_bytes;
  }
  const std::int64_t num_groups = (num_blocks + slab.blocks_per_group - 1) / slab.blocks_per_group;
  std::int64_t layer_bytes = num_groups * slab.group_stride_bytes;
  if (chunk_bytes > 0) {  // the next layer starts at a chunk
    layer_bytes = (layer_bytes + chunk_bytes - 1) / chunk_bytes * chunk_bytes;
  }
  slab.layer_stride_bytes = layer_major ? layer_bytes : geometry.layer_block_bytes();
  return slab;
}

struct PagedKV {
  SlabView device;
  SlabView host;    // base == nullptr: there is none
  SlabView staged;  // the same
  std::int32_t split_block = kNoSplit;
  std::int32_t staged_block = kNoSplit;
  std::int32_t staged_layers = 1;
  std::int32_t staged_first = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t element_bytes = 0;
  std::int32_t block_size = 0;         // a power of two
  std::int32_t log2_block_size = 0;

  UVM_KV_HD std::int64_t row_bytes() const { return std::int64_t{head_dim} * element_bytes; }

  // What a kernel is given: bases moved to one layer.
  PagedKV at_layer(int layer) const {
    PagedKV view = *this;
    view.device.move_to(layer);
    view.host.move_to(layer);
    view.staged.move_to((staged_first + layer) % staged_layers);
    return view;
  }

  // K of head 0, slot 0 of one block, in the layer that this view was moved to.
  UVM_KV_HD std::byte* block(int block) const {
    if (block < split_block) {
      return device.base + device.block_offset(block);
    }
    const bool is_staged = block >= staged_block;
    const SlabView& slab = is_staged ? staged : host;
    return slab.base + slab.block_offset(block - (is_staged ? staged_block : split_block));
  }

  // From there to a slot of K (which = 0) or V (which = 1) of a head.
  UVM_KV_HD std::int64_t slot_offset(int which, int head, int slot) const {
    return ((std::int64_t{which} * num_kv_heads + head) * block_size + slot) * row_bytes();
  }
};

constexpr bool is_power_of_two(int value) { return value > 0 && (value & (value - 1)) == 0; }

constexpr int log2_exact(int value) {
  int bits = 0;
  while ((1 << bits) < value) {
    ++bits;
  }
  return bits;
}

inline PagedKV make_paged_kv(const SlabView& device, const SlabView& host, std::int32_t split_block,
                             const KVGeometry& geometry) {
  return PagedKV{.device = device,
                 .host = host,
                 .staged = {},
                 .split_block = host.base == nullptr ? kNoSplit : split_block,
                 .num_kv_heads = geometry.num_kv_heads,
                 .head_dim = geometry.head_dim,
                 .element_bytes = geometry.element_bytes,
                 .block_size = geometry.block_size,
                 .log2_block_size = log2_exact(geometry.block_size)};
}

// Blocks of each sequence in the order of its tokens.
//   padded: indptr == nullptr, blocks [num_seqs, row_stride]    CSR: sequence s has blocks[indptr[s] .. indptr[s + 1])
struct BlockTable {
  const std::int32_t* blocks = nullptr;
  const std::int32_t* indptr = nullptr;
  std::int64_t row_stride = 0;

  UVM_KV_HD const std::int32_t* row(int seq) const {
    return blocks + (indptr != nullptr ? std::int64_t{indptr[seq]} : seq * row_stride);
  }
};

inline bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

inline Status check_slab(const SlabView& slab, const char* name) {
  const bool strides_fit =
      slab.layer_stride_bytes % 16 == 0 && slab.block_stride_bytes % 16 == 0 && slab.group_stride_bytes % 16 == 0;
  if (slab.base == nullptr || !is_aligned(slab.base, 16) || !strides_fit) {
    return make_status(Status::Code::kInvalidArgument,
                       "%s slab at %p: base and strides must be multiples of 16 bytes, and the base not null", name,
                       static_cast<const void*>(slab.base));
  }
  if (slab.blocks_per_group < 1) {
    return make_status(Status::Code::kInvalidArgument, "%s slab: blocks_per_group=%d; it must be at least 1", name,
                       slab.blocks_per_group);
  }
  return {};
}

inline Status check_paged_kv(const PagedKV& kv) {
  if (!is_power_of_two(kv.block_size) || kv.block_size < kMinBlockSize || kv.block_size > kMaxBlockSize ||
      kv.log2_block_size != log2_exact(kv.block_size)) {
    return make_status(Status::Code::kNotSupported, "block_size=%d; the kernels take 8, 16, 32, 64 or 128",
                       kv.block_size);
  }
  if (kv.num_kv_heads < 1 || kv.head_dim < 1 || kv.row_bytes() % 16 != 0) {
    return make_status(Status::Code::kInvalidArgument,
                       "num_kv_heads=%d, head_dim=%d, element_bytes=%d: a row must be a multiple of 16 bytes",
                       kv.num_kv_heads, kv.head_dim, kv.element_bytes);
  }
  Status status = check_slab(kv.device, "device");
  if (status.ok() && kv.split_block != kNoSplit) {
    status = check_slab(kv.host, "host");
  }
  if (status.ok() && kv.staged_block != kNoSplit) {
    status = check_slab(kv.staged, "staged");
  }
  return status;
}

}  // namespace uvm_kv
