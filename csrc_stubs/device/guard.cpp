#include "guard.h"

#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/AutogradState.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "generator.h"
#include "storage.h"

namespace trn {

namespace {

struct ThreadState {
  int device = 0;
  std::array<int, kMaxDevices> stream{};  // current stream of each device
};

ThreadState& state() {
  thread_local ThreadState value;
  return value;
}

struct Event {
  int64_t time_ps = 0;
  bool timing = false;
};

c10::Stream make_stream(int device, int stream) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kTrn, static_cast<c10::DeviceIndex>(device)), stream);
}

int index_of(c10::Device device) {
  if (!device.has_index()) return state().device;
  check_device_index(device.index());
  return device.index();
}

struct TrnGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kTrn; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device old = getDevice();
    if (device.index() != old.index()) setDevice(device);
    return old;
  }
  c10::Device getDevice() const override { return {kTrn, static_cast<c10::DeviceIndex>(state().device)}; }
  void setDevice(c10::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < System::instance().device_count()) state().device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    const int index = index_of(device);
    return make_stream(index, state().stream[static_cast<size_t>(index)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return make_stream(index_of(device), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    check_usable();
    const int index = index_of(device);
    return make_stream(index, System::instance().device(index).next_stream());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const int index = index_of(stream.device());
    int& current = state().stream[static_cast<size_t>(index)];
    const int old = current;
    TORCH_CHECK(stream.id() >= 0 && stream.id() < kMaxStreams, "trn: ", stream.id(), " is not the id of a trn stream");
    current = static_cast<int>(stream.id());
    return make_stream(index, old);
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(static_cast<intptr_t>(stream.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    System::instance().counted = true;
    return static_cast<c10::DeviceIndex>(System::instance().device_count());
  }

  // An event is a point of simulated time: that at which its stream has done what was issued before.
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag flag) const override {
    check_usable();
    if (*event == nullptr) *event = new Event;
    auto* point = static_cast<Event*>(*event);
    point->timing = flag == c10::EventFlag::BACKEND_DEFAULT;
    point->time_ps = std::max(HostClock::now_ps(), ready_ps(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    System::instance()
        .device(index_of(stream.device()))
        .wait_until(static_cast<int>(stream.id()), static_cast<Event*>(event)->time_ps);
  }
  bool queryEvent(void* event) const override { return event == nullptr || poll(static_cast<Event*>(event)->time_ps); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) HostClock::wait_until(static_cast<Event*>(event)->time_ps);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    auto* begin = static_cast<Event*>(first);
    auto* end = static_cast<Event*>(second);
    TORCH_CHECK(begin != nullptr && end != nullptr, "Both events must be recorded before calculating elapsed time.");
    TORCH_CHECK(begin->timing && end->timing,
                "Both events must be created with argument 'enable_timing=True' to calculate elapsed time.");
    return static_cast<double>(end->time_ps - begin->time_ps) / 1e9;
  }

  bool queryStream(const c10::Stream& stream) const override { return poll(ready_ps(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override { HostClock::wait_until(ready_ps(stream)); }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    check_device_index(device);
    synchronize_device(device);
  }

 private:
  static int64_t ready_ps(const c10::Stream& stream) {
    return System::instance().device(index_of(stream.device())).stream_ready_ps(static_cast<int>(stream.id()));
  }
  // Asking costs the host a dispatch, so that a loop that polls comes to its end.
  static bool poll(int64_t time_ps) {
    HostClock::advance_ps(System::instance().timing().dispatch_ps);
    return HostClock::now_ps() >= time_ps;
  }
};

// Ordinary host memory whose addresses are remembered: what a pinned allocation means for a device that shares it.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    check_usable();
    void* pointer = nullptr;
    TORCH_CHECK(posix_memalign(&pointer, 4096, std::max<size_t>(bytes, 1)) == 0, "trn: cannot pin ", bytes,
                " bytes of host memory");
    std::lock_guard<std::mutex> lock(mutex());
    ranges()[reinterpret_cast<uintptr_t>(pointer)] = std::max<size_t>(bytes, 1);
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* destination, const void* source, size_t count) const override {
    default_copy_data(destination, source, count);
  }
  static bool owns(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex());
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto after = ranges().upper_bound(address);
    if (after == ranges().begin()) return false;
    const auto& range = *std::prev(after);
    return address < range.first + range.second;
  }

 private:
  static void release(void* pointer) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      ranges().erase(reinterpret_cast<uintptr_t>(pointer));
    }
    std::free(pointer);
  }
  static std::mutex& mutex() {
    static auto* value = new std::mutex;
    return *value;
  }
  static std::map<uintptr_t, size_t>& ranges() {
    static auto* value = new std::map<uintptr_t, size_t>;
    return *value;
  }
};

PinnedAllocator pinned_allocator;

struct TrnHooks final : at::PrivateUse1HooksInterface {
  void init() const override { check_usable(); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return System::instance().device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return System::instance().used; }
  c10::DeviceIndex deviceCount() const override {
    System::instance().counted = true;
    return static_cast<c10::DeviceIndex>(System::instance().device_count());
  }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(state().device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const int old = state().device;
    if (device >= 0) set_device(device);
    return static_cast<c10::DeviceIndex>(old);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device < 0 ? state().device : device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return new_generator(device < 0 ? state().device : device);
  }
  at::Device getDeviceFromPtr(void*) const override { return {kTrn, static_cast<c10::DeviceIndex>(state().device)}; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::owns(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace

int current_device() { return state().device; }

void prepare_thread() {
  thread_local bool done = false;
  if (C10_LIKELY(done)) return;
  done = true;
  // torch runs backward on a thread per device, whose order among devices is that of arrival. On the calling thread it
  // has one order, so simulated times are the same on every run, and values take the same path (one OpenMP team) as on
  // the CPU. torch.autograd.set_multithreading_enabled(True) afterwards still holds.
  c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
  at::autocast::set_autocast_dtype(kTrn, at::kBFloat16);
}

DeviceScope::DeviceScope(int device) : previous_(state().device) { state().device = device; }
DeviceScope::~DeviceScope() { state().device = previous_; }

void set_device(int64_t index) {
  if (index < 0) return;  // "no change", as everywhere in torch
  check_device_index(index);
  state().device = static_cast<int>(index);
}

int current_stream(int device) { return state().stream[static_cast<size_t>(device)]; }

void synchronize_device(int device) { HostClock::wait_until(System::instance().device(device).latest_ps()); }

void install_guard() {
  static const TrnGuard guard;
  c10::impl::DeviceGuardImplRegistrar registrar(kTrn, &guard);
  at::RegisterPrivateUse1HooksInterface(new TrnHooks);
  prepare_thread();
}

}  // namespace trn
