// A lock for critical sections of some tens of nanoseconds, of which an operator enters several.
#pragma once

#include <atomic>
#include <thread>

namespace trn {

class SpinLock {
 public:
  void lock() {
    for (int tries = 0; busy_.exchange(true, std::memory_order_acquire); ++tries) {
      // The holder may have lost its core: let it have this one.
      if (tries > 64) std::this_thread::yield();
    }
  }
  void unlock() { busy_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> busy_{false};
};

}  // namespace trn
