// Host memory behind the results of kernels, kept for the next result of the same size.
//
// A fresh large buffer costs a page fault per 4 KiB when it is first written, which the many temporaries of a foreach
// optimizer step feel most. Real accelerators cache device memory; this does the same for the bytes that stand for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace trn {

class HostPool {
 public:
  static HostPool& instance();
  // 64-byte aligned memory of at least `bytes`, or nullptr when the host has none.
  void* allocate(size_t bytes);
  // Takes back what allocate() gave; any other pointer from malloc is freed.
  void release(void* pointer);
  void trim();  // frees what is cached
  size_t cached_bytes();

  static constexpr size_t kMinimum = 64 << 10;               // smaller blocks are malloc's own business
  static constexpr size_t kMaximumCached = size_t{2} << 30;  // above it, blocks go back to the host at once
  static size_t rounded(size_t bytes);

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;
  std::unordered_map<void*, size_t> live_;
  size_t cached_ = 0;
};

}  // namespace trn
