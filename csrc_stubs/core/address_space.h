// Addresses for storages that have no bytes.
//
// One reservation that nothing can read or write: an address costs no memory, every live storage has its own, and a
// stray access traps at once instead of reading rubbish. Freed ranges are used again. Torch-free.
#pragma once

#include <cstdint>

#include "hbm.h"

namespace trn {

class AddressSpace {
 public:
  static AddressSpace& instance();

  // A range of `bytes` (> 0), or nullptr when the reservation is full. `owner` names who asks (a string that lives for
  // ever).
  hbm::Block* allocate(uint64_t bytes, const char* owner);
  void release(hbm::Block* range);
  void* pointer(const hbm::Block* range) const { return base_ + range->address; }

  bool contains(const void* pointer) const;
  // Who asked for the range around an address of the reservation; nullptr when it is free.
  const char* owner(const void* pointer);
  uint64_t size_bytes() const { return size_; }

 private:
  AddressSpace();
  bool fits(const hbm::Block* range) const { return range->address + range->size <= size_; }

  uint8_t* base_ = nullptr;
  uint64_t size_ = 0;
  hbm::Allocator ranges_;
};

}  // namespace trn
