#include "memory_log.h"

#include "system.h"

namespace trn {

std::atomic<bool> MemoryLog::active_{false};

MemoryLog& MemoryLog::instance() {
  static auto* log = new MemoryLog;
  return *log;
}

void MemoryLog::start(bool grows) {
  const auto held = lock();
  events_.clear();
  System& system = System::instance();
  for (int device = 0; device < system.device_count(); ++device) {
    for (const auto& segment : system.device(device).hbm.snapshot()) {
      for (const hbm::Block& block : segment.blocks) {
        if (!block.allocated) continue;
        events_.push_back({.kind = MemoryKind::Found,
                           .device = device,
                           .address = block.address,
                           .bytes = block.size,
                           .holder = block.holder});
      }
    }
  }
  grows_ = grows;
  active_ = true;
}

std::vector<BlockEvent> MemoryLog::stop() {
  const auto held = lock();
  active_ = grows_ = false;
  std::vector<BlockEvent> events;
  events.swap(events_);
  return events;
}

void MemoryLog::add(const BlockEvent& event) {
  const auto held = lock();
  if (active()) events_.push_back(event);
}

}  // namespace trn
