// What happens to the HBM of all devices while a profile watches it, in order: which block was taken or returned, by
// which operator of which module, and what Python knew of some blocks. Torch-free.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

namespace trn {

// The values are those of `torch_trn.profiler.memory.EventKind`.
enum class MemoryKind : int8_t {
  Found,      // was allocated when the log started
  Allocated,  // by `holder`
  Freed,
  Marked,      // the live block at `address` is of category `mark`
  ModuleLeft,  // a call of `module` has ended
  Refused,     // the device had no room for `bytes`; it was given more and the program went on
};

struct BlockEvent {
  MemoryKind kind;
  bool backward = false;  // by an autograd node, outside the modules it recomputes
  int32_t device = 0;
  int32_t mark = 0;
  uint64_t address = 0;
  uint64_t bytes = 0;  // of the block; of a refusal, what was asked for
  int64_t module = 0;
  const char* holder = "";  // a string that lives for ever
};

class MemoryLog {
 public:
  static MemoryLog& instance();
  static bool active() { return active_.load(std::memory_order_relaxed); }
  // Starts with the blocks that are allocated now. With `grows`, a device that is full is given `kPretendBytes`.
  void start(bool grows);
  std::vector<BlockEvent> stop();
  bool grows() const { return grows_.load(std::memory_order_relaxed); }
  // Held around a change of an allocator and its event, so that the log has the allocator's order.
  std::unique_lock<std::recursive_mutex> lock() { return std::unique_lock<std::recursive_mutex>(mutex_); }
  void add(const BlockEvent& event);

  static constexpr uint64_t kPretendBytes = 1ull << 46;

 private:
  static std::atomic<bool> active_;
  std::recursive_mutex mutex_;
  std::atomic<bool> grows_{false};
  std::vector<BlockEvent> events_;
};

}  // namespace trn
