// Append: new K and V rows (RoPE already applied) into their slots. A byte copy in units of 16, whatever the dtype.
#pragma once

#include "uvm_kv/paged_kv.cuh"

struct CUstream_st;  // cudaStream_t without the CUDA headers

namespace uvm_kv {

struct AppendParams {
  PagedKV kv;  // at_layer()
  BlockTable table;
  std::int32_t num_tokens = 0;
  const std::int32_t* seqs = nullptr;       // [num_tokens]: row of the block table; negative: skip this token
  const std::int32_t* positions = nullptr;  // [num_tokens]: position in the sequence
  const std::byte* key = nullptr;           // [num_tokens, num_kv_heads, head_dim], rows key_stride_bytes apart
  const std::byte* value = nullptr;
  std::int64_t key_stride_bytes = 0;
  std::int64_t value_stride_bytes = 0;
};

// 16-byte units of one token: K of all heads, then V of all heads.
UVM_KV_HD int append_units_per_token(const PagedKV& kv) {
  return static_cast<int>(2 * kv.num_kv_heads * (kv.row_bytes() / 16));
}

// Consecutive units lie side by side in the source row, and row by row side by side in the slot.
UVM_KV_HD void append_unit(const AppendParams& params, int unit) {
  const PagedKV& kv = params.kv;
  const int per_token = append_units_per_token(kv);
  const int per_row = static_cast<int>(kv.row_bytes() / 16);
  const int token = unit / per_token;
  const int in_token = unit - token * per_token;
  const int seq = params.seqs[token];
  if (seq < 0) {
    return;
  }
  const int which = in_token >= per_token / 2 ? 1 : 0;
  const int in_half = in_token - which * (per_token / 2);
  const int head = in_half / per_row;
  const int position = params.positions[token];
  const int block = params.table.row(seq)[position >> kv.log2_block_size];
  const int slot = position & (kv.block_size - 1);
  const std::byte* source = which != 0 ? params.value + token * params.value_stride_bytes
                                       : params.key + token * params.key_stride_bytes;
  std::byte* target = kv.block(block) + kv.slot_offset(which, head, slot);
  const int in_row = in_half - head * per_row;
  *(reinterpret_cast<Chunk16*>(target) + in_row) = *(reinterpret_cast<const Chunk16*>(source) + in_half);
}

// Launches on `stream`; capturable.
//   kInvalidArgument: a null or unaligned pointer, strides that are no multiple of 16 bytes or shorter than a row
//   kNotSupported: the block size; rows of more than 16 GiB
//   kCudaError: what the launch said
Status append_kv(const AppendParams& params, CUstream_st* stream);

}  // namespace uvm_kv
