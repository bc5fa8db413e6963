#include "host_pool.h"

#include <cstdlib>

namespace trn {

HostPool& HostPool::instance() {
  static auto* pool = new HostPool;
  return *pool;
}

// Eight sizes per power of two, so that at most an eighth is wasted and sizes that are close share blocks.
size_t HostPool::rounded(size_t bytes) {
  size_t step = kMinimum / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* HostPool::allocate(size_t bytes) {
  const size_t size = rounded(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<void*>& cached = free_[size];
  void* pointer = nullptr;
  if (!cached.empty()) {
    pointer = cached.back();
    cached.pop_back();
    cached_ -= size;
  } else if (posix_memalign(&pointer, 64, size) != 0) {
    return nullptr;
  }
  live_[pointer] = size;
  return pointer;
}

void HostPool::release(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = live_.find(pointer);
    if (found != live_.end()) {
      const size_t size = found->second;
      live_.erase(found);
      if (cached_ + size <= kMaximumCached) {
        free_[size].push_back(pointer);
        cached_ += size;
        return;
      }
    }
  }
  std::free(pointer);
}

void HostPool::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [size, pointers] : free_) {
    for (void* pointer : pointers) std::free(pointer);
    pointers.clear();
  }
  cached_ = 0;
}

size_t HostPool::cached_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  return cached_;
}

}  // namespace trn
