#include "storage.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <cstring>
#include <sstream>

#include "../core/address_space.h"
#include "../core/host_pool.h"
#include "../core/memory_log.h"
#include "eager.h"
#include "guard.h"
#include "values.h"

namespace trn {

namespace {

thread_local const char* current_holder = nullptr;
thread_local int pool_device = -1;  // -1: not in a scope
std::atomic<bool> bad_fork{false};

std::string readable(uint64_t bytes) {
  const char* unit[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes);
  int index = 0;
  while (value >= 1024 && index < 6) value /= 1024, ++index;
  char text[48];
  if (index == 0) {
    snprintf(text, sizeof text, "%llu bytes", static_cast<unsigned long long>(bytes));
  } else {
    snprintf(text, sizeof text, "%.2f %s", value, unit[index]);
  }
  return text;
}

[[noreturn]] void raise_out_of_memory(int device, const hbm::OutOfMemory& oom) {
  std::ostringstream text;
  text << "trn:" << device << " is out of memory: tried to allocate " << readable(oom.requested)
       << " of HBM. The NeuronCore has " << readable(oom.capacity) << ": " << readable(oom.capacity - oom.allocated)
       << " free (largest free range " << readable(oom.largest_free) << "), " << readable(oom.allocated)
       << " allocated, " << readable(oom.reserved) << " reserved.";
  if (!oom.holders.empty()) {
    text << " Largest holders by operator:";
    const char* separator = " ";
    for (const auto& holder : oom.holders) {
      text << separator << holder.name << " " << readable(holder.bytes) << " in " << holder.blocks
           << (holder.blocks == 1 ? " block" : " blocks");
      separator = ", ";
    }
    text << ".";
  }
  text << " Free tensors, use smaller ones, or shard the model over more NeuronCores; TRN_HBM_BYTES sets another "
          "capacity.";
  TORCH_CHECK_WITH(OutOfMemoryError, false, text.str());
}

const char* holder_name() { return current_holder == nullptr ? "aten::empty" : current_holder; }

void log_block(MemoryKind kind, int device, uint64_t address, uint64_t bytes) {
  const Place place = place_of_this_thread();
  MemoryLog::instance().add({.kind = kind,
                             .backward = place.backward,
                             .device = device,
                             .address = address,
                             .bytes = bytes,
                             .module = place.module,
                             .holder = holder_name()});
}

// Whether a full device was given more HBM than it has, because an estimate wants to know how much the program needs.
bool grow_device(int device, uint64_t bytes) {
  if (!MemoryLog::active() || !MemoryLog::instance().grows() || bytes > MemoryLog::kPretendBytes) return false;
  hbm::Allocator& memory = System::instance().device(device).hbm;
  if (memory.capacity() >= MemoryLog::kPretendBytes) return false;
  memory.set_capacity(MemoryLog::kPretendBytes);
  log_block(MemoryKind::Refused, device, 0, bytes);
  return true;
}

void record_memory(int device) {
  Recorder& recorder = Recorder::instance();
  if (!Recorder::active() || !recorder.profiling()) return;
  Device& core = System::instance().device(device);
  recorder.add_memory(
      {std::max(HostClock::now_ps(), core.latest_ps()), device, core.hbm.stats().allocated_bytes.current});
}

// Drops the reference that a context's idle alias is.
void drop(c10::TensorImpl* alias) {
  if (alias != nullptr) c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim(alias);
}

void delete_context(void* pointer) {
  auto* context = static_cast<StorageContext*>(pointer);
  release_block(context->device, context->block);
  if (context->range != nullptr && !bad_fork) AddressSpace::instance().release(context->range);
  delete context;
}

// A forked child shares nothing with its parent's pool, whose lock another thread may have held: it lets the block go.
void delete_pooled(void* pointer) {
  if (!bad_fork) HostPool::instance().release(pointer);
}

// The process's CPU allocator: the pool for large blocks of trn results, torch's own for everything else.
class PooledCpuAllocator final : public c10::Allocator {
 public:
  explicit PooledCpuAllocator(c10::Allocator* wrapped) : wrapped_(wrapped) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (pool_device < 0 || bytes < HostPool::kMinimum) return wrapped_->allocate(bytes);
    hbm::Allocator& memory = System::instance().device(pool_device).hbm;
    if (bytes > memory.capacity() && !grow_device(pool_device, bytes))
      raise_out_of_memory(pool_device, memory.refuse(bytes));
    void* pointer = HostPool::instance().allocate(bytes);
    TORCH_CHECK(pointer != nullptr, "trn: the host cannot provide ", readable(bytes),
                " of memory for the values of a trn tensor; use smaller tensors or a host with more memory.");
    return {pointer, pointer, &delete_pooled, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return wrapped_->raw_deleter(); }
  void copy_data(void* destination, const void* source, size_t count) const override {
    std::memcpy(destination, source, count);
  }

 private:
  c10::Allocator* wrapped_;
};

c10::CachingAllocator::StatArray stat_array(const hbm::Stat& stat) {
  c10::CachingAllocator::StatArray array;
  auto& all = array[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  all.current = stat.current;
  all.peak = stat.peak;
  all.allocated = stat.allocated;
  all.freed = stat.freed;
  return array;
}

class TrnAllocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const int device = current_device();
    hbm::Block* block = allocate_block(device, bytes);  // first: an impossible size must not reach the host
    try {
      if (C10_UNLIKELY(without_data()) && bytes > 0) return hollow_data_ptr(bytes, device, block, nullptr);
      PoolScope pool(device);
      auto cpu =
          c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                c10::GetCPUAllocator()->allocate(bytes), c10::GetCPUAllocator(), true);
      return data_ptr(std::move(cpu), device, block);
    } catch (...) {
      release_block(device, block);
      throw;
    }
  }

  static c10::DataPtr data_ptr(c10::intrusive_ptr<c10::StorageImpl> cpu, int device, hbm::Block* block) {
    auto* context = new StorageContext;
    context->cpu_data = cpu->mutable_data();
    context->cpu_nbytes = cpu->nbytes();
    context->cpu = std::move(cpu);
    context->block = block;
    context->device = device;
    return owned_by(context, context->cpu_data);
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* destination, const void* source, size_t count) const override {
    if (without_data()) check_readable(source);
    std::memcpy(destination, source, count);
  }
  bool initialized() override { return System::instance().used; }
  void emptyCache(c10::MempoolId_t) override {
    for (int index = 0; index < System::instance().device_count(); ++index) {
      System::instance().device(index).hbm.empty_cache();
    }
    HostPool::instance().trim();
  }
  // Work on one core is serial in simulated time, so a freed block may be reused at once.
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    check_device_index(device);
    const hbm::Stats stats = System::instance().device(device).hbm.stats();
    c10::CachingDeviceAllocator::DeviceStats result;
    result.allocation = stat_array(stats.allocation);
    result.active = stat_array(stats.allocation);
    result.segment = stat_array(stats.segment);
    result.inactive_split = stat_array(stats.inactive_split);
    result.allocated_bytes = stat_array(stats.allocated_bytes);
    result.active_bytes = stat_array(stats.allocated_bytes);
    result.reserved_bytes = stat_array(stats.reserved_bytes);
    result.requested_bytes = stat_array(stats.requested_bytes);
    result.inactive_split_bytes = stat_array(stats.inactive_split_bytes);
    result.num_alloc_retries = stats.num_alloc_retries;
    result.num_ooms = stats.num_ooms;
    return result;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    check_device_index(device);
    System::instance().device(device).hbm.reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    check_device_index(device);
    System::instance().device(device).hbm.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    check_device_index(device);
    auto& memory = System::instance().device(device).hbm;
    const uint64_t capacity = memory.capacity();
    return {capacity - static_cast<uint64_t>(memory.stats().reserved_bytes.current), capacity};
  }
};

TrnAllocator trn_allocator;

}  // namespace

HolderScope::HolderScope(const char* name) : previous(current_holder) { current_holder = name; }
HolderScope::~HolderScope() { current_holder = previous; }
PoolScope::PoolScope(int device) : previous(std::exchange(pool_device, device)) {}
PoolScope::~PoolScope() { pool_device = previous; }

StorageContext::~StorageContext() { drop(idle.load(std::memory_order_acquire)); }

bool in_bad_fork() { return bad_fork; }

void check_not_forked() {
  TORCH_CHECK(
      !bad_fork.load(std::memory_order_relaxed),
      "Cannot re-initialize trn in forked subprocess. To use trn with multiprocessing, you must use the 'spawn' "
      "start method, and a DataLoader worker must return CPU tensors");
}

void check_usable() {
  check_not_forked();
  System::instance().used.store(true, std::memory_order_relaxed);
}

void check_device_index(int64_t index) {
  const int count = System::instance().device_count();
  TORCH_CHECK(
      index >= 0 && index < count, "Invalid trn device index ", index, ": this process has ", count,
      " logical NeuronCore", count == 1 ? "" : "s", count > 0 ? c10::str(", trn:0 to trn:", count - 1) : std::string(),
      index < 0 ? c10::str(" (torch keeps an index in 8 bits, so that ", index + 256, " becomes ", index, ")")
                : std::string(),
      ". Larger systems are reached through ranks; TRN_SYSTEM, TRN_LNC and NEURON_RT_VISIBLE_CORES set the count.");
}

c10::DeviceIndex device_index_of(std::optional<c10::Device> device) {
  check_usable();
  if (!device.has_value() || !device->has_index()) return static_cast<c10::DeviceIndex>(current_device());
  check_device_index(device->index());
  return device->index();
}

hbm::Block* allocate_block(int device, uint64_t bytes) {
  if (bytes == 0) return nullptr;
  std::unique_lock<std::recursive_mutex> in_order;
  if (C10_UNLIKELY(MemoryLog::active())) in_order = MemoryLog::instance().lock();
  hbm::OutOfMemory oom;
  hbm::Allocator& memory = System::instance().device(device).hbm;
  hbm::Block* block = memory.allocate(bytes, holder_name(), &oom);
  if (block == nullptr && grow_device(device, bytes)) block = memory.allocate(bytes, holder_name(), &oom);
  if (block == nullptr) raise_out_of_memory(device, oom);
  if (MemoryLog::active()) log_block(MemoryKind::Allocated, device, block->address, block->size);
  if (Recorder::active()) record_memory(device);
  return block;
}

void release_block(int device, hbm::Block* block) {
  if (block == nullptr || bad_fork) return;
  std::unique_lock<std::recursive_mutex> in_order;
  if (C10_UNLIKELY(MemoryLog::active())) {
    in_order = MemoryLog::instance().lock();
    log_block(MemoryKind::Freed, device, block->address, block->size);
  }
  System::instance().device(device).hbm.release(block);
  if (Recorder::active()) record_memory(device);
}

c10::DeviceAllocator* allocator() { return &trn_allocator; }

c10::DataPtr owned_by(StorageContext* context, void* pointer) {
  return {pointer, context, &delete_context, c10::Device(kTrn, static_cast<c10::DeviceIndex>(context->device))};
}

StorageContext* context_of(const c10::StorageImpl* storage) {
  return storage->data_ptr().cast_context<StorageContext>(&delete_context);
}

c10::intrusive_ptr<c10::StorageImpl> make_storage(c10::intrusive_ptr<c10::StorageImpl> cpu, uint64_t bytes, int device,
                                                  hbm::Block* block) {
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                               TrnAllocator::data_ptr(std::move(cpu), device, block), &trn_allocator,
                                               true);
}

namespace {

void copy_flags(c10::TensorImpl* to, const c10::TensorImpl* from) {
  if (from->is_wrapped_number()) to->set_wrapped_number(true);
  if (from->is_conj()) to->_set_conj(true);
  if (from->is_neg()) to->_set_neg(true);
}

bool has_flags(const c10::TensorImpl* tensor) {
  return tensor->is_wrapped_number() || tensor->is_conj() || tensor->is_neg() || tensor->_is_zerotensor();
}

// The idle alias of a storage with the sizes and strides of `impl`; undefined when there is none that can be used.
at::Tensor idle_alias(StorageContext* context, const c10::TensorImpl* impl) {
  if (context->idle.load(std::memory_order_relaxed) == nullptr) return {};
  c10::TensorImpl* idle = context->idle.exchange(nullptr, std::memory_order_acquire);
  if (idle == nullptr) return {};
  at::Tensor alias(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim(idle));
  // A kernel may have kept a reference to its result, or given it another storage or a flag since.
  if (alias.use_count() != 1 || !idle->allow_tensor_metadata_change() || idle->dtype() != impl->dtype() ||
      has_flags(idle) || has_flags(impl) || idle->unsafe_storage().unsafeGetStorageImpl() != context->cpu.get()) {
    return {};
  }
  if (idle->sizes() != impl->sizes() || idle->strides() != impl->strides() ||
      idle->storage_offset() != impl->storage_offset()) {
    idle->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  }
  return alias;
}

}  // namespace

at::Tensor cpu_alias(const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  TORCH_CHECK(impl->has_storage() && impl->layout() == c10::kStrided, "trn: a tensor of layout ", impl->layout(),
              " has no dense memory that this operator could work on; call to_dense() or move it to the CPU first.");
  // Zeros that have no memory: the kernel gets some to read.
  if (C10_UNLIKELY(impl->_is_zerotensor())) {
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU)).zero_();
  }
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  StorageContext* context = context_of(storage);
  c10::intrusive_ptr<c10::StorageImpl> cpu;
  if (C10_LIKELY(context != nullptr)) {
    if (C10_UNLIKELY(context->values != Values::Valued)) {
      if (impl->numel() == 0) return hollow_alias(tensor);
      if (!has_values(tensor)) raise_no_value(tensor, "a kernel asks for");
      make_valued(storage);
    }
    if (at::Tensor alias = idle_alias(context, impl); alias.defined()) return alias;
    cpu = context->cpu;
  } else {
    if (without_data()) check_readable(storage->data());
    // Not our memory (serialisation wraps raw pointers): plain host bytes, which the original storage keeps alive.
    cpu = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), storage->nbytes(),
        c10::DataPtr(const_cast<void*>(storage->data()), c10::Device(c10::DeviceType::CPU)), nullptr, false);
  }
  // As a view without autograd's keys it has no version counter to allocate: only kernels below autograd ever see it.
  auto alias = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(std::move(cpu)),
                                                    c10::DispatchKeySet(c10::DispatchKey::CPU), impl->dtype());
  // A new TensorImpl is one-dimensional, empty and contiguous.
  if (impl->dim() != 1 || impl->numel() != 0 || impl->storage_offset() != 0 || impl->strides()[0] != 1) {
    alias->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  }
  copy_flags(alias.get(), impl);
  return at::Tensor(std::move(alias));
}

void keep_alias(const c10::StorageImpl* storage, at::Tensor&& alias) {
  StorageContext* context = context_of(storage);
  if (context == nullptr || !alias.defined() ||
      alias.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl() != context->cpu.get()) {
    return;
  }
  drop(context->idle.exchange(alias.unsafeReleaseTensorImpl(), std::memory_order_acq_rel));
}

at::Tensor wrap(const at::Tensor& cpu, c10::Storage storage) {
  const c10::TensorImpl* impl = cpu.unsafeGetTensorImpl();
  auto result = c10::make_intrusive<c10::TensorImpl>(std::move(storage),
                                                     c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), impl->dtype());
  result->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  copy_flags(result.get(), impl);
  return at::Tensor(std::move(result));
}

uint64_t bytes_needed(const c10::TensorImpl* tensor) {
  if (tensor->numel() == 0) return 0;
  if (C10_LIKELY(tensor->is_contiguous() && tensor->storage_offset() == 0)) {
    return static_cast<uint64_t>(tensor->numel()) * tensor->itemsize();
  }
  return at::detail::computeStorageNbytes(tensor->sizes(), tensor->strides(), tensor->itemsize(),
                                          static_cast<size_t>(tensor->storage_offset()));
}

void sync_storage(c10::StorageImpl* storage, hbm::Block* block) {
  StorageContext* context = context_of(storage);
  if (context == nullptr) return;
  c10::StorageImpl* cpu = context->cpu.get();
  if (cpu->nbytes() == context->cpu_nbytes && cpu->data() == context->cpu_data) return;
  if (block == nullptr) block = allocate_block(context->device, cpu->nbytes());
  const int device = context->device;
  c10::intrusive_ptr<c10::StorageImpl> owner = context->cpu;
  // The old DataPtr frees its own block and its reference to the CPU storage; `owner` keeps the bytes.
  storage->set_data_ptr(TrnAllocator::data_ptr(std::move(owner), device, block));
  storage->set_nbytes(cpu->nbytes());
}

void resize_storage(c10::StorageImpl* storage, size_t nbytes, c10::ScalarType dtype) {
  check_usable();
  StorageContext* context = context_of(storage);
  TORCH_CHECK(context != nullptr && storage->resizable(), "Trying to resize storage that is not resizable");
  if (nbytes == storage->nbytes()) return;
  hbm::Block* block = allocate_block(context->device, nbytes);
  if (C10_UNLIKELY(without_data()) && resize_hollow(storage, context, nbytes, block, dtype)) return;
  if (context->cpu == nullptr) context->cpu = empty_cpu_storage();
  c10::StorageImpl* cpu = context->cpu.get();
  try {
    PoolScope pool(context->device);
    c10::DataPtr fresh = c10::GetCPUAllocator()->allocate(nbytes);
    const size_t kept = std::min(nbytes, storage->nbytes());
    if (kept > 0) std::memcpy(fresh.mutable_get(), cpu->data(), kept);
    cpu->set_data_ptr(std::move(fresh));
    cpu->set_nbytes(nbytes);
  } catch (...) {
    release_block(context->device, block);
    throw;
  }
  const int device = context->device;
  c10::intrusive_ptr<c10::StorageImpl> owner = context->cpu;
  storage->set_data_ptr(TrnAllocator::data_ptr(std::move(owner), device, block));
  storage->set_nbytes(nbytes);
}

void resize_tensor(c10::TensorImpl* self, c10::IntArrayRef sizes, c10::OptionalIntArrayRef strides) {
  if (self->sizes() == sizes && (!strides || self->strides() == *strides)) return;
  size_t needed = 0;
  const auto offset = static_cast<size_t>(self->storage_offset());
  if (strides) {
    needed = at::detail::computeStorageNbytes(sizes, *strides, self->itemsize(), offset);
  } else {
    needed = at::detail::computeStorageNbytesContiguous(sizes, self->itemsize(), offset);
  }
  if (c10::multiply_integers(sizes) > 0) {
    c10::StorageImpl* storage = self->unsafe_storage().unsafeGetStorageImpl();
    TORCH_CHECK(storage != nullptr, "Tensor: invalid null storage");
    if (needed > storage->nbytes()) resize_storage(storage, needed, c10::typeMetaToScalarType(self->dtype()));
  }
  if (strides) {
    self->set_sizes_and_strides(sizes, *strides);
  } else {
    self->set_sizes_contiguous(sizes);
  }
}

void install_allocators() {
  c10::SetAllocator(kTrn, &trn_allocator);
  c10::SetCPUAllocator(new PooledCpuAllocator(c10::GetCPUAllocator()));
  pthread_atfork(nullptr, nullptr, [] {
    if (System::instance().used) bad_fork = true;
  });
}

}  // namespace trn
