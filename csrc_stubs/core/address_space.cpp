#include "address_space.h"

#include <sys/mman.h>

namespace trn {

namespace {

constexpr uint64_t kWanted = uint64_t{16} << 40;   // some 700 NeuronCores of 24 GiB
constexpr uint64_t kSmallest = uint64_t{1} << 30;  // with less than this there is no point in going on

}  // namespace

AddressSpace& AddressSpace::instance() {
  static auto* space = new AddressSpace;  // never unmapped: tensors may die after static destructors ran
  return *space;
}

AddressSpace::AddressSpace() : ranges_(0) {
  for (uint64_t bytes = kWanted; bytes >= kSmallest; bytes /= 2) {
    void* start = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) continue;
    base_ = static_cast<uint8_t*>(start);
    size_ = bytes;
    break;
  }
  ranges_.set_capacity(size_);
}

hbm::Block* AddressSpace::allocate(uint64_t bytes, const char* owner) {
  hbm::OutOfMemory ignored;
  hbm::Block* range = ranges_.allocate(bytes, owner, &ignored);
  if (range == nullptr || fits(range)) return range;
  // The free ranges are in pieces: joined, they may do.
  ranges_.release(range);
  ranges_.empty_cache();
  range = ranges_.allocate(bytes, owner, &ignored);
  if (range == nullptr || fits(range)) return range;
  ranges_.release(range);
  return nullptr;
}

void AddressSpace::release(hbm::Block* range) { ranges_.release(range); }

bool AddressSpace::contains(const void* pointer) const {
  const auto* address = static_cast<const uint8_t*>(pointer);
  return address >= base_ && address < base_ + size_;
}

const char* AddressSpace::owner(const void* pointer) {
  return ranges_.holder_at(static_cast<uint64_t>(static_cast<const uint8_t*>(pointer) - base_));
}

}  // namespace trn
