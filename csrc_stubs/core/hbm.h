// The HBM of one logical NeuronCore: an allocator of simulated addresses.
//
// No host memory is behind an address here. What is modelled is what a program can observe of device memory: capacity,
// segments taken from it and cached, best-fit with splitting and merging, fragmentation, and statistics that are exact.
// Torch-free, so that it builds in seconds and can run under ThreadSanitizer.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "spin_lock.h"

namespace trn::hbm {

// Granularity of a block, and the segment sizes that requests are served from. All four are assumed: the Neuron runtime
// documents 64 MB and 512 MB scratchpad pages but no granularity for tensors, so these follow the caching allocators
// that PyTorch users know.
constexpr uint64_t kGranule = 512;
constexpr uint64_t kSmallLimit = 1 << 20;
constexpr uint64_t kSmallSegment = 2 << 20;
constexpr uint64_t kLargeSegment = 20 << 20;
constexpr uint64_t kLargeDirect = 10 << 20;
constexpr uint64_t kSegmentGranule = 2 << 20;

struct Segment;

// A range of addresses inside a segment. `holder` names the operator that asked for it (a string that lives for ever).
struct Block {
  uint64_t address = 0;
  uint64_t size = 0;
  uint64_t requested = 0;
  const char* holder = nullptr;
  Segment* segment = nullptr;
  Block* previous = nullptr;  // neighbours by address within the segment
  Block* next = nullptr;
  Block* free_previous = nullptr;  // neighbours in a list of free blocks of one size
  Block* free_next = nullptr;
  bool allocated = false;
};

struct Segment {
  uint64_t address = 0;
  uint64_t size = 0;
  bool small = false;
  uint64_t blocks_allocated = 0;
  Block* first = nullptr;
};

struct Stat {
  int64_t current = 0;
  int64_t peak = 0;
  int64_t allocated = 0;
  int64_t freed = 0;
  void increase(int64_t amount) {
    current += amount;
    allocated += amount;
    if (current > peak) peak = current;
  }
  void decrease(int64_t amount) {
    current -= amount;
    freed += amount;
  }
};

struct Stats {
  Stat allocation, segment, inactive_split;
  Stat allocated_bytes, reserved_bytes, requested_bytes, inactive_split_bytes;
  int64_t num_alloc_retries = 0;
  int64_t num_ooms = 0;
};

struct Holder {
  std::string name;
  uint64_t bytes = 0;
  uint64_t blocks = 0;
};

// What an out-of-memory message needs to say.
struct OutOfMemory {
  uint64_t requested = 0;
  uint64_t capacity = 0;
  uint64_t allocated = 0;
  uint64_t reserved = 0;
  uint64_t largest_free = 0;
  std::vector<Holder> holders;  // the largest first, at most five
};

struct SegmentView {
  uint64_t address, size, allocated;
  std::vector<Block> blocks;
};

class Allocator {
 public:
  explicit Allocator(uint64_t capacity_bytes);
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // The block for `bytes` (> 0), or nullptr with `*oom` filled in. A refused request changes nothing but num_ooms and
  // num_alloc_retries (and returns cached segments to the free range, as on a device).
  Block* allocate(uint64_t bytes, const char* holder, OutOfMemory* oom);
  void release(Block* block);
  // What allocate() says of a request that it refuses; counted as one.
  OutOfMemory refuse(uint64_t bytes);
  // Gives the segments without a live block back.
  void empty_cache();

  Stats stats() const;
  void reset_peak();
  void reset_accumulated();
  std::vector<SegmentView> snapshot() const;
  // The holder of the live block around an address, or nullptr.
  const char* holder_at(uint64_t address) const;
  uint64_t capacity() const;
  // False when more than `bytes` is reserved now; the capacity then stays.
  bool set_capacity(uint64_t bytes);

 private:
  static constexpr int kClasses = kSmallLimit / kGranule + 1;  // exact sizes of small blocks, in granules
  struct BySize {
    bool operator()(const Block* a, const Block* b) const {
      return a->size != b->size ? a->size < b->size : a->address < b->address;
    }
  };

  Block* take_free(uint64_t size, bool small);
  void insert_free(Block* block);
  void remove_free(Block* block);
  Block* new_segment(uint64_t size, bool small);
  Block* grow(uint64_t size, bool small);
  void release_cached();
  void split(Block* block, uint64_t size);
  Block* merge(Block* left, Block* right);
  Block* new_block();
  void fill(OutOfMemory* oom, uint64_t bytes) const;
  void track_inactive(const Block* block, int sign);

  mutable SpinLock mutex_;
  uint64_t capacity_;
  Stats stats_;
  std::array<Block*, kClasses> small_free_{};
  std::array<uint64_t, (kClasses + 63) / 64> small_bits_{};  // which classes have a free block
  uint64_t small_words_ = 0;                                 // which words of small_bits_ are not zero
  std::set<Block*, BySize> large_free_;
  std::map<uint64_t, uint64_t> ranges_;  // free addresses outside segments: address -> size
  std::map<uint64_t, Segment*> segments_;
  std::list<Block> storage_;  // owns every Block; unused ones wait in spare_
  std::vector<Block*> spare_;
};

}  // namespace trn::hbm
