#include "hbm.h"

#include <algorithm>
#include <unordered_map>

namespace trn::hbm {

namespace {

uint64_t round_up(uint64_t value, uint64_t granule) { return (value + granule - 1) / granule * granule; }

}  // namespace

Allocator::Allocator(uint64_t capacity_bytes) : capacity_(capacity_bytes) {
  // The range starts above zero so that no block has address 0; capacity is checked by bytes, so the range may be wide.
  ranges_[kSegmentGranule] = UINT64_MAX / 2;
}

Allocator::~Allocator() {
  for (auto& [address, segment] : segments_) delete segment;
}

Block* Allocator::new_block() {
  if (!spare_.empty()) {
    Block* block = spare_.back();
    spare_.pop_back();
    *block = Block{};
    return block;
  }
  return &storage_.emplace_back();
}

// Blocks that are free but tied to a segment with live blocks cannot go back to the free range: fragmentation.
void Allocator::track_inactive(const Block* block, int sign) {
  if (block->previous == nullptr && block->next == nullptr) return;
  if (sign > 0) {
    stats_.inactive_split.increase(1);
    stats_.inactive_split_bytes.increase(static_cast<int64_t>(block->size));
  } else {
    stats_.inactive_split.decrease(1);
    stats_.inactive_split_bytes.decrease(static_cast<int64_t>(block->size));
  }
}

void Allocator::insert_free(Block* block) {
  track_inactive(block, +1);
  if (!block->segment->small) {
    large_free_.insert(block);
    return;
  }
  // A whole free small segment (2 MiB) is larger than any small request: it shares the last class.
  const uint64_t index = std::min<uint64_t>(block->size / kGranule, kClasses - 1);
  block->free_previous = nullptr;
  block->free_next = small_free_[index];
  if (block->free_next != nullptr) block->free_next->free_previous = block;
  small_free_[index] = block;
  small_bits_[index / 64] |= uint64_t{1} << (index % 64);
  small_words_ |= uint64_t{1} << (index / 64);
}

void Allocator::remove_free(Block* block) {
  track_inactive(block, -1);
  if (!block->segment->small) {
    large_free_.erase(block);
    return;
  }
  const uint64_t index = std::min<uint64_t>(block->size / kGranule, kClasses - 1);
  if (block->free_next != nullptr) block->free_next->free_previous = block->free_previous;
  if (block->free_previous != nullptr) {
    block->free_previous->free_next = block->free_next;
  } else {
    small_free_[index] = block->free_next;
    if (block->free_next == nullptr) {
      small_bits_[index / 64] &= ~(uint64_t{1} << (index % 64));
      if (small_bits_[index / 64] == 0) small_words_ &= ~(uint64_t{1} << (index / 64));
    }
  }
}

// Best fit: the smallest free block that holds `size`.
Block* Allocator::take_free(uint64_t size, bool small) {
  if (!small) {
    Block probe;
    probe.size = size;
    auto found = large_free_.lower_bound(&probe);
    if (found == large_free_.end()) return nullptr;
    Block* block = *found;
    remove_free(block);
    return block;
  }
  const uint64_t index = size / kGranule;
  uint64_t word = index / 64;
  uint64_t bits = small_bits_[word] & (~uint64_t{0} << (index % 64));
  if (bits == 0) {
    const uint64_t words = small_words_ & (~uint64_t{1} << word);  // the words above
    if (words == 0) return nullptr;
    word = static_cast<uint64_t>(__builtin_ctzll(words));
    bits = small_bits_[word];
  }
  const uint64_t found = word * 64 + static_cast<uint64_t>(__builtin_ctzll(bits));
  Block* block = small_free_[found];
  if (found == kClasses - 1) {
    // The last class mixes sizes from 1 MiB up: choose the smallest that fits.
    for (Block* other = block; other != nullptr; other = other->free_next) {
      if (other->size < block->size) block = other;
    }
  }
  remove_free(block);
  return block;
}

Block* Allocator::new_segment(uint64_t size, bool small) {
  if (static_cast<uint64_t>(stats_.reserved_bytes.current) + size > capacity_) return nullptr;
  auto best = ranges_.end();
  for (auto range = ranges_.begin(); range != ranges_.end(); ++range) {
    if (range->second >= size && (best == ranges_.end() || range->second < best->second)) best = range;
  }
  if (best == ranges_.end()) return nullptr;
  const uint64_t address = best->first;
  const uint64_t rest = best->second - size;
  ranges_.erase(best);
  if (rest > 0) ranges_[address + size] = rest;

  auto* segment = new Segment{address, size, small, 0, nullptr};
  segments_[address] = segment;
  Block* block = new_block();
  block->address = address;
  block->size = size;
  block->segment = segment;
  segment->first = block;
  stats_.segment.increase(1);
  stats_.reserved_bytes.increase(static_cast<int64_t>(size));
  return block;
}

Block* Allocator::grow(uint64_t size, bool small) {
  uint64_t wanted = small ? kSmallSegment : size < kLargeDirect ? kLargeSegment : round_up(size, kSegmentGranule);
  if (Block* block = new_segment(wanted, small)) return block;
  stats_.num_alloc_retries += 1;
  release_cached();
  if (Block* block = new_segment(wanted, small)) return block;
  return new_segment(size, small);  // the last bytes of the memory: a segment that fits exactly
}

void Allocator::release_cached() {
  for (auto entry = segments_.begin(); entry != segments_.end();) {
    Segment* segment = entry->second;
    if (segment->blocks_allocated > 0) {
      ++entry;
      continue;
    }
    remove_free(segment->first);  // without live blocks, merging has left one free block
    spare_.push_back(segment->first);
    stats_.segment.decrease(1);
    stats_.reserved_bytes.decrease(static_cast<int64_t>(segment->size));
    auto [range, inserted] = ranges_.emplace(segment->address, segment->size);
    auto after = std::next(range);
    if (after != ranges_.end() && range->first + range->second == after->first) {
      range->second += after->second;
      ranges_.erase(after);
    }
    if (range != ranges_.begin()) {
      auto before = std::prev(range);
      if (before->first + before->second == range->first) {
        before->second += range->second;
        ranges_.erase(range);
      }
    }
    delete segment;
    entry = segments_.erase(entry);
  }
}

void Allocator::split(Block* block, uint64_t size) {
  const uint64_t rest = block->size - size;
  const uint64_t worth = block->segment->small ? kGranule : kSmallLimit + 1;
  if (rest < worth) return;
  Block* tail = new_block();
  tail->address = block->address + size;
  tail->size = rest;
  tail->segment = block->segment;
  tail->previous = block;
  tail->next = block->next;
  if (tail->next != nullptr) tail->next->previous = tail;
  block->next = tail;
  block->size = size;
  insert_free(tail);
}

Block* Allocator::merge(Block* left, Block* right) {
  left->size += right->size;
  left->next = right->next;
  if (left->next != nullptr) left->next->previous = left;
  spare_.push_back(right);
  return left;
}

Block* Allocator::allocate(uint64_t bytes, const char* holder, OutOfMemory* oom) {
  std::lock_guard<SpinLock> lock(mutex_);
  Block* block = nullptr;
  // A size near 2^64 must not wrap when it is rounded up.
  if (bytes <= capacity_) {
    const uint64_t size = round_up(std::max<uint64_t>(bytes, 1), kGranule);
    const bool small = size <= kSmallLimit;
    block = take_free(size, small);
    if (block == nullptr) block = grow(size, small);
    if (block != nullptr) split(block, size);
  }
  if (block == nullptr) {
    stats_.num_ooms += 1;
    if (oom != nullptr) fill(oom, bytes);
    return nullptr;
  }
  block->allocated = true;
  block->requested = bytes;
  block->holder = holder;
  block->segment->blocks_allocated += 1;
  stats_.allocation.increase(1);
  stats_.allocated_bytes.increase(static_cast<int64_t>(block->size));
  stats_.requested_bytes.increase(static_cast<int64_t>(bytes));
  return block;
}

OutOfMemory Allocator::refuse(uint64_t bytes) {
  std::lock_guard<SpinLock> lock(mutex_);
  stats_.num_ooms += 1;
  OutOfMemory oom;
  fill(&oom, bytes);
  return oom;
}

void Allocator::release(Block* block) {
  std::lock_guard<SpinLock> lock(mutex_);
  block->allocated = false;
  block->segment->blocks_allocated -= 1;
  stats_.allocation.decrease(1);
  stats_.allocated_bytes.decrease(static_cast<int64_t>(block->size));
  stats_.requested_bytes.decrease(static_cast<int64_t>(block->requested));
  block->holder = nullptr;
  if (block->next != nullptr && !block->next->allocated) {
    remove_free(block->next);
    merge(block, block->next);
  }
  if (block->previous != nullptr && !block->previous->allocated) {
    Block* left = block->previous;
    remove_free(left);
    block = merge(left, block);
  }
  insert_free(block);
}

void Allocator::empty_cache() {
  std::lock_guard<SpinLock> lock(mutex_);
  release_cached();
}

void Allocator::fill(OutOfMemory* oom, uint64_t bytes) const {
  oom->requested = bytes;
  oom->capacity = capacity_;
  oom->allocated = static_cast<uint64_t>(stats_.allocated_bytes.current);
  oom->reserved = static_cast<uint64_t>(stats_.reserved_bytes.current);
  oom->largest_free = capacity_ - oom->reserved;
  std::map<std::string, Holder> holders;
  for (const auto& [address, segment] : segments_) {
    for (const Block* block = segment->first; block != nullptr; block = block->next) {
      if (!block->allocated) {
        oom->largest_free = std::max(oom->largest_free, block->size);
        continue;
      }
      Holder& holder = holders[block->holder == nullptr ? "unknown" : block->holder];
      holder.bytes += block->size;
      holder.blocks += 1;
    }
  }
  for (auto& [name, holder] : holders) {
    holder.name = name;
    oom->holders.push_back(holder);
  }
  std::stable_sort(oom->holders.begin(), oom->holders.end(),
                   [](const Holder& a, const Holder& b) { return a.bytes > b.bytes; });
  if (oom->holders.size() > 5) oom->holders.resize(5);
}

Stats Allocator::stats() const {
  std::lock_guard<SpinLock> lock(mutex_);
  return stats_;
}

namespace {

template <typename F>
void for_each_stat(Stats& stats, F&& change) {
  for (Stat* stat : {&stats.allocation, &stats.segment, &stats.inactive_split, &stats.allocated_bytes,
                     &stats.reserved_bytes, &stats.requested_bytes, &stats.inactive_split_bytes}) {
    change(*stat);
  }
}

}  // namespace

void Allocator::reset_peak() {
  std::lock_guard<SpinLock> lock(mutex_);
  for_each_stat(stats_, [](Stat& stat) { stat.peak = stat.current; });
}

void Allocator::reset_accumulated() {
  std::lock_guard<SpinLock> lock(mutex_);
  for_each_stat(stats_, [](Stat& stat) { stat.allocated = stat.freed = 0; });
  stats_.num_alloc_retries = stats_.num_ooms = 0;
}

std::vector<SegmentView> Allocator::snapshot() const {
  std::lock_guard<SpinLock> lock(mutex_);
  std::vector<SegmentView> views;
  for (const auto& [address, segment] : segments_) {
    SegmentView view{address, segment->size, 0, {}};
    for (const Block* block = segment->first; block != nullptr; block = block->next) {
      if (block->allocated) view.allocated += block->size;
      view.blocks.push_back(*block);
    }
    views.push_back(std::move(view));
  }
  return views;
}

const char* Allocator::holder_at(uint64_t address) const {
  std::lock_guard<SpinLock> lock(mutex_);
  auto after = segments_.upper_bound(address);
  if (after == segments_.begin()) return nullptr;
  for (const Block* block = std::prev(after)->second->first; block != nullptr; block = block->next) {
    if (address < block->address + block->size) return block->allocated ? block->holder : nullptr;
  }
  return nullptr;
}

uint64_t Allocator::capacity() const {
  std::lock_guard<SpinLock> lock(mutex_);
  return capacity_;
}

bool Allocator::set_capacity(uint64_t bytes) {
  std::lock_guard<SpinLock> lock(mutex_);
  if (bytes < static_cast<uint64_t>(stats_.reserved_bytes.current)) {
    release_cached();
    if (bytes < static_cast<uint64_t>(stats_.reserved_bytes.current)) return false;
  }
  capacity_ = bytes;
  return true;
}

}  // namespace trn::hbm
