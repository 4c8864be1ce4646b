// A list of tensors as kernel arguments, so that one launch steps all of them: nothing to allocate, copy or keep alive,
// and a CUDA graph holds it. Parameters of a kernel may take 32764 bytes (sm_70 and newer, CUDA 12.1).
//
// A tensor's pointers are written as 32-bit offsets from the lowest pointer of their column, in units of the largest
// power of two that divides all differences: allocations of torch are 512-byte aligned, which reaches 2 TB. 36 bytes a
// tensor for seven columns: 899 tensors a launch. The step takes another launch for what does not fit, in number or in
// reach.
//
// Work is counted in tiles, what a warp holds at a time: whole blocks, 256 elements or a little less, or one large
// block.
#pragma once

#include "cuda/optim_tile.cuh"

namespace slk::cuda {

constexpr int kMaxKernelArguments = 32764;

inline int64_t tile_elements(int block) {
  return block >= kChunkElements ? block : kChunkElements / block * block;
}

constexpr int64_t kMaxTiles = int64_t(1) << 27;  // a lane's place in a tensor, 32 times its tile, fits 32 bits

enum TensorFlags : uint16_t {
  kFloatStates = 0x8000,
  kAligned = 0x4000,
  kMissingMask = 0x3fff
};  // at most 16383 = kNormChunk - 1

template <int kColumns, int kCapacity>
struct TensorTable {
  uint64_t base[kColumns];
  uint32_t shift[kColumns];
  int count;
  uint32_t first[kCapacity + 1];  // a tensor's first tile; first[count] = all tiles
  uint32_t offset[kColumns][kCapacity];
  uint16_t missing[kCapacity];  // elements that the last tile lacks, and TensorFlags
  uint16_t index[kCapacity];    // the tensor's place in the caller's list

  template <class T>
  __device__ T* pointer(int column, int i) const {
    return reinterpret_cast<T*>(base[column] + (uint64_t(offset[column][i]) << shift[column]));
  }
  // The tensor that holds `tile`, which is not below tensor i.
  __device__ int find(int i, uint32_t tile) const {
    if (tile < first[i + 1]) return i;
    int low = i + 1, high = count;  // first[low] <= tile < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Collects tensors until one does not fit.
template <int kColumns, int kCapacity>
class TableBuilder {
 public:
  struct Entry {
    uint64_t address[kColumns];  // 0: the tensor has none
    int64_t n;
    uint16_t index, flags;
  };

  explicit TableBuilder(int64_t tile) : tile_(tile) { clear(); }
  int count() const { return count_; }
  void clear() {
    count_ = 0;
    tiles_ = 0;
    for (Column& c : columns_) c = {};
  }

  bool add(const Entry& e) {
    const int64_t tiles = ceil_div(e.n, tile_);
    if (count_ == kCapacity || tiles_ + tiles > kMaxTiles) return false;
    Column next[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      next[c] = columns_[c];
      if (e.address[c] && !next[c].include(e.address[c])) return false;
    }
    for (int c = 0; c < kColumns; ++c) columns_[c] = next[c];
    entries_[count_++] = e;
    tiles_ += tiles;
    return true;
  }

  int64_t tiles() const { return tiles_; }
  template <int kTableCapacity>
  void write(TensorTable<kColumns, kTableCapacity>& table) const {
    table.count = count_;
    for (int c = 0; c < kColumns; ++c) {
      table.base[c] = columns_[c].low;
      table.shift[c] = columns_[c].shift();
    }
    uint32_t first = 0;
    for (int i = 0; i < count_; ++i) {
      const Entry& e = entries_[i];
      const int64_t tiles = ceil_div(e.n, tile_);
      table.first[i] = first;
      first += uint32_t(tiles);
      table.missing[i] = uint16_t(uint16_t(tiles * tile_ - e.n) | e.flags);
      table.index[i] = e.index;
      for (int c = 0; c < kColumns; ++c)
        table.offset[c][i] = e.address[c] ? uint32_t((e.address[c] - columns_[c].low) >> columns_[c].shift()) : 0;
    }
    table.first[count_] = first;
  }

 private:
  struct Column {
    uint64_t low = 0, high = 0, differing = 0;  // bits in which pointers differ
    uint32_t shift() const {
      uint32_t s = 0;
      while (s < 63 && !(differing >> s & 1)) ++s;
      return differing ? s : 0;
    }
    bool include(uint64_t address) {
      if (low == 0) low = high = address;
      differing |= address ^ low;
      low = address < low ? address : low;
      high = address > high ? address : high;
      return (high - low) >> shift() <= UINT32_MAX;
    }
  };

  int64_t tile_, tiles_;
  int count_;
  Column columns_[kColumns];
  Entry entries_[kCapacity];
};

}  // namespace slk::cuda
