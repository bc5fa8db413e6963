// The simulated system as a process sees it: its logical NeuronCores with their HBM, streams and clocks.
//
// Simulated time is integer picoseconds and never reads the host's clock. There is one host clock per host thread (it
// advances by the dispatch cost of each operator and by waiting), one clock per stream, and one for the core itself,
// since a core runs one Program at a time. Torch-free.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cost.h"
#include "hbm.h"

namespace trn {

constexpr int kMaxDevices = 127;  // c10::DeviceIndex is a signed byte
constexpr int kMaxStreams = 33;   // the default stream and a pool of 32, as with CUDA

struct Timing {
  int64_t launch_ps = 0;
  int64_t dispatch_ps = 0;
  int64_t host_link_bytes_per_s = 1;
  int64_t host_link_fixed_ps = 0;
  int64_t device_link_bytes_per_s = 1;
  int64_t device_link_fixed_ps = 0;
};

struct Span {
  int64_t start_ps = 0;
  int64_t end_ps = 0;
};

struct Record {
  const CostEntry* entry;
  int64_t start_ps;
  int64_t duration_ps;  // launch and kernel
  int64_t module;
  int64_t stack;
  uint64_t correlation;
  int32_t device;
  int32_t stream;
};

struct MemoryEvent {
  int64_t time_ps;
  int32_t device;
  int64_t allocated_bytes;
};

class Device {
 public:
  Device(int index, uint64_t hbm_bytes) : hbm(hbm_bytes), index_(index) {}

  // One kernel of `entry` on a stream, issued by this thread. Returns when it ran.
  Span launch(int stream, const CostEntry& entry, bool host_waits);
  int64_t stream_ready_ps(int stream);
  void wait_until(int stream, int64_t time_ps);
  int64_t latest_ps();
  int next_stream();

  hbm::Allocator hbm;

 private:
  int index_;
  SpinLock mutex_;
  int64_t core_free_ps_ = 0;
  int next_stream_ = 0;
  std::array<int64_t, kMaxStreams> stream_ready_ps_{};
};

class System {
 public:
  static System& instance();
  // Sets up the devices; called before first use only.
  void configure(int devices, uint64_t hbm_bytes, const Timing& timing);
  int device_count() const { return static_cast<int>(devices_.size()); }
  Device& device(int index) { return *devices_[static_cast<size_t>(index)]; }
  const Timing& timing() const { return timing_; }
  // Picoseconds that `bytes` take between host and device.
  int64_t host_transfer_ps(int64_t bytes) const;
  int64_t device_transfer_ps(int64_t bytes) const;

  std::atomic<bool> used{false};     // a tensor, stream or kernel exists: the process must not fork with it
  std::atomic<bool> counted{false};  // the device count was read: it must not change any more

 private:
  std::vector<std::unique_ptr<Device>> devices_;
  Timing timing_;
};

// The host clock of the calling thread. A thread starts at the main thread's time (it waits in join or in a queue while
// its threads work, so that is the same on every run). No thread is behind the start of the latest profile: one that
// was idle then is brought up to it, or what it does next would have started before the profile.
struct HostClock {
  static int64_t now_ps();
  static void advance_ps(int64_t amount_ps);
  static void wait_until(int64_t time_ps);
};

// What a profiler asked to have recorded.
class Recorder {
 public:
  static Recorder& instance();
  static bool active() { return active_.load(std::memory_order_relaxed); }
  void start_profile(bool modules, bool stacks);
  void stop_profile(std::vector<Record>* records, std::vector<MemoryEvent>* memory);
  void start_trace();
  std::vector<Record> stop_trace();
  bool profiling() const { return profiling_; }
  bool tracing() const { return tracing_; }
  bool wants_modules() const { return modules_; }
  bool wants_stacks() const { return stacks_; }
  void add(const Record& record);
  void add_memory(const MemoryEvent& event);

 private:
  static std::atomic<bool> active_;
  std::mutex mutex_;
  std::atomic<bool> profiling_{false}, tracing_{false}, modules_{false}, stacks_{false};
  std::vector<Record> records_, trace_;
  std::vector<MemoryEvent> memory_;
};

}  // namespace trn
