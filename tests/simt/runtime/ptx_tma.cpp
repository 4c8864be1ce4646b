// TMA copies of tiles. Contract: slkernels/ptx/tma.h.
//
// A load happens when the schedule wants it: under `forward` as late as it can (no thread can go on without one; the
// newest first), under `reverse` at once, under `shuffled` either way and in any order. It is the access of an agent
// that knows what the issuing thread knew, so that a stage that is overwritten while others may still read it is a race
// whenever the copy happens. A store reads shared memory when its group is waited for, and writes global memory when
// the wait is not the .read form, or when the thread ends.
#include <cstring>
#include <deque>
#include <map>
#include <random>

#include "internal.h"
#include "simt/ptx_mbarrier.h"
#include "simt/ptx_tma.h"
#include "tensor_map.h"

namespace simt {
namespace {

EncodedMap decode(const CUtensorMap* map, const char* what, void* pc) {
  EncodedMap encoded;
  std::memcpy(&encoded, map, sizeof encoded);
  if (reinterpret_cast<uintptr_t>(map) % 64 || encoded.magic != EncodedMap::kMagic)
    fault(std::string(what) + ": not a tensor map (64-byte aligned, made by cuTensorMapEncodeTiled)", pc);
  return encoded;
}

struct Tile {
  EncodedMap map;
  TileAt at;
  char* shared;

  Tile(const CUtensorMap* m, TileAt where, const void* in_shared, const char* what, void* pc)
      : map(decode(m, what, pc)), at(where), shared(const_cast<char*>(static_cast<const char*>(in_shared))) {
    if (map.rank != at.dimensions)
      fault(std::string(what) + ": " + std::to_string(at.dimensions) + " coordinates for a tensor map of rank " +
                std::to_string(map.rank),
            pc);
    if (reinterpret_cast<uintptr_t>(shared) % 128)
      fault(std::string(what) + ": " + name_of_shared(shared) + " is not 128-byte aligned", pc);
    if (!is_shared(shared, map.tile_bytes()))
      fault(std::string(what) + ": a tile of " + std::to_string(map.tile_bytes()) + " bytes at " +
                name_of_shared(shared) + " reaches outside shared memory",
            pc);
    if (map.swizzle_bits && map.row_bytes() != 16u << map.swizzle_bits)
      fault(std::string(what) + ": rows narrower than the swizzle are not modelled", pc);
  }

  // For every row of the box: f(global address of its first element inside, byte offset of that in the row, bytes
  // inside, tile offset of the row); bytes inside is 0 where the row lies outside the tensor.
  template <class F>
  void for_each_row(F f) const {
    for (uint32_t outer = 0; outer < map.box[3] * map.box[2]; ++outer)
      for (uint32_t y = 0; y < map.box[1]; ++y) {
        const int64_t gw = int64_t(at.w) + outer / map.box[2], gz = int64_t(at.z) + outer % map.box[2];
        const int64_t gy = int64_t(at.y) + y;
        const int64_t first = std::max<int64_t>(at.x, 0);
        const int64_t last = std::min<int64_t>(int64_t(at.x) + map.box[0], int64_t(map.size[0]));
        const bool inside = gw >= 0 && gw < int64_t(map.size[3]) && gz >= 0 && gz < int64_t(map.size[2]) && gy >= 0 &&
                            gy < int64_t(map.size[1]) && first < last;
        const int64_t at_row = gw * int64_t(map.stride[3]) + gz * int64_t(map.stride[2]) + gy * int64_t(map.stride[1]);
        const char* global = map.base + (inside ? at_row + first * map.element : 0);
        f(const_cast<char*>(global), inside ? size_t(first - at.x) * map.element : 0,
          inside ? size_t(last - first) * map.element : 0, (size_t(outer) * map.box[1] + y) * map.row_bytes());
      }
  }

  // Where the 16-byte unit at `offset` of the packed tile lies.
  char* unit(size_t offset) const {
    if (!map.swizzle_bits) return shared + offset;
    const uint32_t linear = shared_address(shared) + uint32_t(offset);
    const uint32_t place = linear ^ ((linear >> 7 & ((1u << map.swizzle_bits) - 1)) << 4);
    return shared + offset + (int64_t(place) - int64_t(linear));
  }
};

struct Load {
  Tile tile;
  uint64_t* bar;
  int agent;
  Clock knows;
  void* pc;

  void happen() {
    run_agent(agent, knows, [&] {
      access(tile.shared, tile.map.tile_bytes(), true, pc, Proxy::async);
      tile.for_each_row([&](char* global, size_t skip, size_t bytes, size_t row) {
        std::vector<char> line(tile.map.row_bytes(), 0);
        if (bytes) {
          access(global, bytes, false, pc, Proxy::async);
          std::memcpy(line.data() + skip, global, bytes);
        }
        for (size_t i = 0; i < line.size(); i += 16) std::memcpy(tile.unit(row + i), line.data() + i, 16);
      });
    });
    mbarrier_complete_tx(bar, tile.map.tile_bytes(), knows, pc);
  }
};

struct Loads {
  std::vector<Load> in_flight;
  std::mt19937_64 random{options().seed};

  ~Loads() {
    if (!in_flight.empty())
      fault("the block ended with " + std::to_string(in_flight.size()) + " TMA loads in flight, the first",
            in_flight[0].pc);
  }
};

bool finish_a_load() {
  Loads& loads = block_state<Loads>();
  if (loads.in_flight.empty()) return false;
  size_t pick = loads.in_flight.size() - 1;
  if (options().schedule == Schedule::shuffled) pick = loads.random() % loads.in_flight.size();
  Load load = std::move(loads.in_flight[pick]);
  loads.in_flight.erase(loads.in_flight.begin() + ptrdiff_t(pick));
  load.happen();
  return true;
}

struct Store {
  Tile tile;
  Clock knows;
  void* pc;
  bool read = false;
  std::vector<char> data;  // the packed tile, once read

  void read_shared(int agent) {
    if (read) return;
    read = true;
    data.resize(tile.map.tile_bytes());
    run_agent(agent, knows, [&] {
      access(tile.shared, data.size(), false, pc, Proxy::async);
      for (size_t i = 0; i < data.size(); i += 16) std::memcpy(&data[i], tile.unit(i), 16);
    });
    acquire(knows);
  }
  void write_global() const {
    tile.for_each_row([&](char* global, size_t skip, size_t bytes, size_t row) {
      if (!bytes) return;
      access(global, bytes, true, pc, Proxy::async);
      std::memcpy(global, &data[row + skip], bytes);
    });
  }
};

struct Stores {
  int agent = -1;
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
};
struct AllStores {
  std::map<int, Stores> of;  // by thread
};
Stores& my_stores() {
  return block_state<AllStores>().of[running->view.linear];
}

void check_stores_at_exit() {
  auto& of = block_state<AllStores>().of;
  const auto it = of.find(running->view.linear);
  if (it == of.end()) return;
  Stores& stores = it->second;
  if (!stores.open.empty())
    fault("the thread ends with a TMA store that cp.async.bulk.commit_group never committed", stores.open[0].pc);
  for (const auto& group : stores.groups)
    for (const Store& s : group)
      if (!s.read)
        fault(
            "the thread ends with a TMA store in flight: no cp.async.bulk.wait_group waits until it has read shared "
            "memory",
            s.pc);
  for (const auto& group : stores.groups)
    for (const Store& s : group) s.write_global();
}

}  // namespace

void tma_prefetch(const CUtensorMap* map, void* pc) {
  decode(map, "prefetch.tensormap", pc);
}

void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, TileAt at, void* pc) {
  Load load = {Tile(map, at, to, "TMA load", pc), bar, mbarrier_agent(bar, pc), {}, pc};
  release(load.knows);
  Loads& loads = block_state<Loads>();
  at_idle(finish_a_load);
  const Schedule schedule = options().schedule;
  if (schedule == Schedule::reverse || (schedule == Schedule::shuffled && loads.random() % 2))
    load.happen();
  else
    loads.in_flight.push_back(std::move(load));
}

void tma_store(const CUtensorMap* map, const void* from, TileAt at, void* pc) {
  at_thread_exit(check_stores_at_exit);
  Stores& stores = my_stores();
  if (stores.agent < 0) stores.agent = new_agent("the TMA stores of thread " + std::to_string(running->view.linear));
  stores.open.push_back({Tile(map, at, from, "TMA store", pc), {}, pc, false, {}});
  release(stores.open.back().knows);
}

void tma_store_commit() {
  Stores& stores = my_stores();
  stores.groups.push_back(std::move(stores.open));
  stores.open.clear();
}

void tma_store_wait(size_t pending, bool read_only) {
  Stores& stores = my_stores();
  const size_t done = stores.groups.size() > pending ? stores.groups.size() - pending : 0;
  for (size_t i = 0; i < done; ++i)
    for (Store& s : stores.groups[i]) s.read_shared(stores.agent);
  if (read_only) return;
  for (size_t i = 0; i < done; ++i) {
    for (const Store& s : stores.groups[0]) s.write_global();
    stores.groups.pop_front();
  }
}

}  // namespace simt
