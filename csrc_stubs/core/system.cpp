#include "system.h"

#include <algorithm>
#include <thread>

namespace trn {

CostStore& CostStore::instance() {
  static auto* store = new CostStore;  // never destroyed: tensors may die after static destructors ran
  return *store;
}

CostEntry* CostStore::create(std::string name) {
  std::lock_guard<std::mutex> lock(mutex_);
  entries_.push_back(std::make_unique<CostEntry>());
  CostEntry* entry = entries_.back().get();
  entry->id = static_cast<int32_t>(entries_.size()) - 1;
  entry->name = std::move(name);
  return entry;
}

CostEntry* CostStore::at(int32_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (id < 0 || id >= static_cast<int32_t>(entries_.size())) return nullptr;
  return entries_[static_cast<size_t>(id)].get();
}

int32_t CostStore::size() {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int32_t>(entries_.size());
}

namespace {

const std::thread::id main_thread = std::this_thread::get_id();  // the thread that loads the extension
std::atomic<int64_t> main_clock_ps{0};
std::atomic<int64_t> profile_start_ps{0};  // of the latest profile: no thread's clock is behind it

struct ThreadClock {
  int64_t ps;
  bool main;
  ThreadClock() : ps(main_clock_ps.load()), main(std::this_thread::get_id() == main_thread) {}
};

void set_clock(ThreadClock& clock, int64_t ps) {
  clock.ps = ps;
  if (clock.main) main_clock_ps.store(ps, std::memory_order_relaxed);
}

ThreadClock& thread_clock() {
  thread_local ThreadClock clock;
  const int64_t start_ps = profile_start_ps.load(std::memory_order_relaxed);
  if (start_ps > clock.ps) set_clock(clock, start_ps);
  return clock;
}

// ceil(bytes / rate) in picoseconds, exact in 128 bits.
int64_t transfer_ps(int64_t bytes, int64_t bytes_per_s) {
  const __int128 scaled = static_cast<__int128>(bytes) * 1'000'000'000'000;
  return static_cast<int64_t>((scaled + bytes_per_s - 1) / bytes_per_s);
}

}  // namespace

int64_t HostClock::now_ps() { return thread_clock().ps; }

void HostClock::advance_ps(int64_t amount_ps) {
  ThreadClock& clock = thread_clock();
  set_clock(clock, clock.ps + amount_ps);
}

void HostClock::wait_until(int64_t time_ps) {
  ThreadClock& clock = thread_clock();
  if (time_ps > clock.ps) set_clock(clock, time_ps);
}

Span Device::launch(int stream, const CostEntry& entry, bool host_waits) {
  ThreadClock& clock = thread_clock();
  set_clock(clock, clock.ps + System::instance().timing().dispatch_ps);
  Span span;
  {
    std::lock_guard<SpinLock> lock(mutex_);
    int64_t& ready = stream_ready_ps_[static_cast<size_t>(stream)];
    span.start_ps = std::max({clock.ps, ready, core_free_ps_});
    span.end_ps = span.start_ps + entry.launch_ps + entry.duration_ps;
    ready = core_free_ps_ = span.end_ps;
  }
  if (host_waits) HostClock::wait_until(span.end_ps);
  return span;
}

int64_t Device::stream_ready_ps(int stream) {
  std::lock_guard<SpinLock> lock(mutex_);
  return stream_ready_ps_[static_cast<size_t>(stream)];
}

void Device::wait_until(int stream, int64_t time_ps) {
  std::lock_guard<SpinLock> lock(mutex_);
  int64_t& ready = stream_ready_ps_[static_cast<size_t>(stream)];
  ready = std::max(ready, time_ps);
}

int64_t Device::latest_ps() {
  std::lock_guard<SpinLock> lock(mutex_);
  return *std::max_element(stream_ready_ps_.begin(), stream_ready_ps_.end());
}

int Device::next_stream() {
  std::lock_guard<SpinLock> lock(mutex_);
  next_stream_ = next_stream_ % (kMaxStreams - 1) + 1;
  return next_stream_;
}

System& System::instance() {
  static auto* system = new System;
  return *system;
}

void System::configure(int devices, uint64_t hbm_bytes, const Timing& timing) {
  timing_ = timing;
  devices_.clear();
  for (int index = 0; index < devices; ++index) {
    devices_.push_back(std::make_unique<Device>(index, hbm_bytes));
  }
}

int64_t System::host_transfer_ps(int64_t bytes) const {
  return timing_.host_link_fixed_ps + transfer_ps(bytes, timing_.host_link_bytes_per_s);
}

int64_t System::device_transfer_ps(int64_t bytes) const {
  return timing_.device_link_fixed_ps + transfer_ps(bytes, timing_.device_link_bytes_per_s);
}

std::atomic<bool> Recorder::active_{false};

Recorder& Recorder::instance() {
  static auto* recorder = new Recorder;
  return *recorder;
}

void Recorder::start_profile(bool modules, bool stacks) {
  std::lock_guard<std::mutex> lock(mutex_);
  profile_start_ps = HostClock::now_ps();
  records_.clear();
  memory_.clear();
  modules_ = modules;
  stacks_ = stacks;
  profiling_ = true;
  active_ = true;
}

void Recorder::stop_profile(std::vector<Record>* records, std::vector<MemoryEvent>* memory) {
  std::lock_guard<std::mutex> lock(mutex_);
  profiling_ = modules_ = stacks_ = false;
  active_ = tracing_.load();
  records->swap(records_);
  memory->swap(memory_);
  records_.clear();
  memory_.clear();
}

void Recorder::start_trace() {
  std::lock_guard<std::mutex> lock(mutex_);
  profile_start_ps = HostClock::now_ps();
  trace_.clear();
  tracing_ = true;
  active_ = true;
}

std::vector<Record> Recorder::stop_trace() {
  std::lock_guard<std::mutex> lock(mutex_);
  tracing_ = false;
  active_ = profiling_.load();
  std::vector<Record> records;
  records.swap(trace_);
  return records;
}

void Recorder::add(const Record& record) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (profiling_) records_.push_back(record);
  if (tracing_) trace_.push_back(record);
}

void Recorder::add_memory(const MemoryEvent& event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (profiling_) memory_.push_back(event);
}

}  // namespace trn
