// Lists that stay in C++ between the call that makes them and the calls that use them.
#pragma once

#include <vector>

#include "uvm_kv/block_runs.hpp"

namespace uvm_kv::bindings {

struct Ranges {
  std::vector<ByteRange> list;
};

struct Runs {
  std::vector<CopyRun> list;
};

template <class List>
std::size_t num_bytes(const List& list) {
  std::size_t sum = 0;
  for (const auto& item : list.list) sum += item.bytes;
  return sum;
}

template <class List>
std::size_t length(const List& list) {
  return list.list.size();
}

}  // namespace uvm_kv::bindings
