// What an operator costs, found by a key of everything that the cost depends on.
//
// A hit is one hash lookup and never enters Python. Keys are 128 bits: with a well mixed key, two different calls of
// one operator meeting is less likely than a memory error, so the entry does not repeat the arguments.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "spin_lock.h"

namespace trn {

enum Engine { kTensorE, kVectorE, kScalarE, kGpSimdE, kDma, kEngines };
enum class Bound : int8_t { TensorE, VectorE, ScalarE, GpSimdE, Dma, Launch, Collective, Host };
// By Bound; `runtime.BOUNDS` are the same.
constexpr std::array<const char*, 8> kBoundNames = {"TensorE", "VectorE", "ScalarE",    "GpSimdE",
                                                    "DMA",     "Launch",  "Collective", "Host"};
inline const char* bound_name(Bound bound) { return kBoundNames[static_cast<size_t>(bound)]; }

// One argument of a call that the kernel will write with more bytes than its storage may have (out= that grows).
struct Growth {
  int32_t argument;  // position among the tensors of the call, those in lists counted one by one
  uint64_t bytes;
};

struct CallLayout;  // of tensors, which this file knows nothing of: device/values.h

struct CostEntry {
  int32_t id = 0;
  std::string name;
  int64_t launch_ps = 0;
  int64_t duration_ps = 0;  // of the kernel, launch not included
  std::array<int64_t, kEngines> busy_ps{};
  double flops = 0;
  int64_t hbm_bytes = 0;
  Bound bound = Bound::Dma;
  bool awaited = false;  // sizes of results depend on values: the host waits for them
  bool host = false;     // runs on the host: bytes cross the host link both ways and the host waits
  // Known before the kernel runs, unless sizes depend on values:
  std::vector<uint64_t> fresh_bytes;  // of results with memory of their own
  std::vector<Growth> growth;
  std::shared_ptr<CallLayout> layout;  // with numerics "none": what the results are, to make them without a kernel
};

struct Key {
  uint64_t a = 0x9e3779b97f4a7c15ull;
  uint64_t b = 0xc2b2ae3d27d4eb4full;
  void add(uint64_t value) {
    const __uint128_t x = static_cast<__uint128_t>(a ^ value) * 0xd6e8feb86659fd93ull;
    a = static_cast<uint64_t>(x) ^ static_cast<uint64_t>(x >> 64);
    b = (b + value) * 0x9fb21c651e98df25ull;
    b ^= b >> 29;
  }
  bool operator==(const Key& other) const { return a == other.a && b == other.b; }
};

struct KeyHash {
  size_t operator()(const Key& key) const { return key.a; }
};

// The entries of one operator. Entries live until the process ends: records and traces point at them.
class CostTable {
 public:
  CostEntry* find(const Key& key) {
    std::lock_guard<SpinLock> lock(mutex_);
    if (last_ != nullptr && last_key_ == key) return last_;
    auto found = entries_.find(key);
    if (found == entries_.end()) return nullptr;
    last_key_ = key;
    return last_ = found->second;
  }
  // The entry of the key: `entry`, or the one that another thread has put there first.
  CostEntry* insert(const Key& key, CostEntry* entry) {
    std::lock_guard<SpinLock> lock(mutex_);
    return entries_.emplace(key, entry).first->second;
  }

 private:
  SpinLock mutex_;
  Key last_key_;
  CostEntry* last_ = nullptr;
  std::unordered_map<Key, CostEntry*, KeyHash> entries_;
};

// Owner of all entries, in the order of their making; `id` is the index.
class CostStore {
 public:
  static CostStore& instance();
  CostEntry* create(std::string name);
  CostEntry* at(int32_t id);
  int32_t size();

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<CostEntry>> entries_;
};

}  // namespace trn
