#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <utility>

#include "bindings.hpp"
#include "lists.hpp"

namespace uvm_kv::bindings {
namespace {

using namespace nb::literals;
using Layers = std::pair<std::size_t, std::size_t>;
using Pairs = std::vector<std::pair<std::size_t, std::size_t>>;

void make_ranges(Ranges* self, const Pairs& given) {
  new (self) Ranges;
  for (const auto& [offset, bytes] : given) self->list.push_back({offset, bytes});
}

Pairs listed(const Ranges& ranges) {
  Pairs out;
  for (const ByteRange range : ranges.list) out.emplace_back(range.offset, range.bytes);
  return out;
}

std::vector<std::tuple<std::size_t, std::size_t, std::size_t>> listed_runs(const Runs& runs) {
  std::vector<std::tuple<std::size_t, std::size_t, std::size_t>> out;
  for (const CopyRun& run : runs.list) out.emplace_back(run.source, run.target, run.bytes);
  return out;
}

Runs runs_between(const SlabLayout& source, const SlabLayout& target, const Pairs& blocks, Layers layers,
                  std::optional<std::size_t> target_layer) {
  std::vector<BlockPair> pairs;
  for (const auto& [from, to] : blocks) pairs.push_back({from, to});
  return {copy_runs(source, target, pairs, {layers.first, layers.second}, target_layer.value_or(layers.first))};
}

Ranges ranges_of(const SlabLayout& layout, const std::vector<std::size_t>& blocks, Layers layers) {
  return {block_ranges(layout, blocks, {layers.first, layers.second})};
}

}  // namespace

void bind_layout(nb::module_& m) {
  m.attr("chunk_bytes") = kChunkBytes;
  nb::class_<Ranges>(m, "Ranges", "Parts of a slab.")
      .def("__init__", &make_ranges, "ranges"_a, "A list of (offset, bytes).")
      .def("__len__", &length<Ranges>)
      .def_prop_ro("num_bytes", &num_bytes<Ranges>)
      .def("as_list", &listed, "[(offset, bytes), ...]");
  nb::class_<Runs>(m, "Runs", "Bytes to copy between two slabs.")
      .def("__len__", &length<Runs>)
      .def_prop_ro("num_bytes", &num_bytes<Runs>)
      .def("as_list", &listed_runs, "[(source offset, target offset, bytes), ...]");
  nb::class_<SlabLayout>(m, "SlabLayout", "Where blocks lie in a slab.")
      .def(
          "__init__",
          [](SlabLayout* self, std::size_t num_blocks, std::size_t num_layers, std::size_t layer_block_bytes,
             bool layer_major, std::size_t pieces_per_group, std::size_t group_bytes, std::size_t base_bytes) {
            const SlabLayout layout{num_blocks,       num_layers,  layer_block_bytes, layer_major,
                                    pieces_per_group, group_bytes, base_bytes};
            require_sound(layout);
            new (self) SlabLayout(layout);
          },
          nb::kw_only(), "num_blocks"_a, "num_layers"_a, "layer_block_bytes"_a, "layer_major"_a, "pieces_per_group"_a,
          "group_bytes"_a, "base_bytes"_a)
      .def_ro("num_blocks", &SlabLayout::num_blocks)
      .def_ro("num_layers", &SlabLayout::num_layers)
      .def_ro("layer_block_bytes", &SlabLayout::layer_block_bytes)
      .def_ro("layer_major", &SlabLayout::layer_major)
      .def_ro("pieces_per_group", &SlabLayout::pieces_per_group)
      .def_ro("group_bytes", &SlabLayout::group_bytes)
      .def_ro("base_bytes", &SlabLayout::base_bytes)
      .def_prop_ro("end_bytes", &SlabLayout::end_bytes, "Bytes of slab it needs.")
      .def_prop_ro("layer_stride_bytes", &SlabLayout::layer_stride_bytes)
      .def("offset", &SlabLayout::offset, "block"_a, "layer"_a)
      .def("ranges", &ranges_of, "blocks"_a, nb::kw_only(), "layers"_a,
           "Parts that hold the blocks, neighbours joined.");
  m.def("copy_runs", &runs_between, nb::kw_only(), "source"_a, "target"_a, "blocks"_a, "layers"_a,
        "target_layer"_a = nb::none(),
        "Runs that copy (source block, target block) pairs in layers [first, last), neighbours joined. target_layer: the "
        "target's layer of the first, by default the same.");
}

}  // namespace uvm_kv::bindings
