// A trn tensor's storage: host bytes that CPU kernels work on, and a block of simulated HBM.
//
// The DataPtr of a trn StorageImpl owns a StorageContext, which owns the CPU StorageImpl over the same bytes. So a CPU
// alias of a trn tensor is one TensorImpl and no copy, and a kernel's fresh result becomes a trn tensor by wrapping.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/StorageImpl.h>

#include "../core/system.h"

namespace trn {

constexpr auto kTrn = c10::DeviceType::PrivateUse1;

struct Origin;

enum class Values : uint8_t {
  Valued,     // has bytes that mean something: always so with numerics "host"
  Virgin,     // allocated, no bytes, never written
  Valueless,  // written by an operator that had no values to write
};

struct StorageContext {
  ~StorageContext();
  c10::intrusive_ptr<c10::StorageImpl> cpu;  // null without bytes
  hbm::Block* block = nullptr;               // none when the storage is empty
  int device = 0;
  // What the CPU storage was when last looked at: a kernel that resized it has left something else.
  size_t cpu_nbytes = 0;
  void* cpu_data = nullptr;
  Values values = Values::Valued;
  const Origin* origin = nullptr;  // of a valueless storage
  hbm::Block* range = nullptr;     // of AddressSpace, when there are no bytes
  // An alias (or the kernel's own result) that no call uses: the next call on this storage takes it instead of making
  // one. Two threads may read one tensor, so whoever exchanges it owns it.
  std::atomic<c10::TensorImpl*> idle{nullptr};
};

// Names the operator that allocates, for the holders in an out-of-memory message.
struct HolderScope {
  explicit HolderScope(const char* name);
  ~HolderScope();
  const char* previous;
};

// While alive on a thread, large CPU allocations come from the pool that recycles them, and one that is larger than the
// device's whole HBM raises OutOfMemoryError: it could never become a tensor there.
struct PoolScope {
  explicit PoolScope(int device);
  ~PoolScope();
  int previous;
};

// Errors with a clear text when this process was forked after trn was used, or when the index has no device.
void check_usable();
void check_not_forked();  // the first half of it: asks without using
void check_device_index(int64_t index);
bool in_bad_fork();
// Resolves an absent index to the current device.
c10::DeviceIndex device_index_of(std::optional<c10::Device> device);

hbm::Block* allocate_block(int device, uint64_t bytes);  // nullptr for 0 bytes; raises OutOfMemoryError
void release_block(int device, hbm::Block* block);

c10::DeviceAllocator* allocator();
// The pointer of a storage to `pointer`, with its context.
c10::DataPtr owned_by(StorageContext* context, void* pointer);
StorageContext* context_of(const c10::StorageImpl* storage);  // nullptr when the storage is not ours

// The trn storage over a CPU storage. Takes `block` over (it may be null only when bytes is 0).
c10::intrusive_ptr<c10::StorageImpl> make_storage(c10::intrusive_ptr<c10::StorageImpl> cpu, uint64_t bytes, int device,
                                                  hbm::Block* block);
// A CPU tensor over the bytes, sizes and strides of a trn tensor. Raises when it has no values.
at::Tensor cpu_alias(const at::Tensor& tensor);
// Leaves a CPU tensor over the bytes of `storage` for the next alias, whatever its sizes.
void keep_alias(const c10::StorageImpl* storage, at::Tensor&& alias);
// A trn tensor with the metadata of a CPU tensor, on `storage`.
at::Tensor wrap(const at::Tensor& cpu, c10::Storage storage);
// Bytes that a result of these sizes and strides is charged for.
uint64_t bytes_needed(const c10::TensorImpl* tensor);

// Gives the trn storage the bytes that a kernel left in its CPU storage. `block` is HBM reserved before the kernel ran,
// or null, in which case it is allocated here.
void sync_storage(c10::StorageImpl* storage, hbm::Block* block);
// Resizes a trn storage, keeping its content up to the smaller size. Without data, `dtype` sets the limit of what is
// kept; a storage by itself has bytes.
void resize_storage(c10::StorageImpl* storage, size_t nbytes, c10::ScalarType dtype = c10::kByte);
// Sizes and strides set, and the storage grown when they need more bytes.
void resize_tensor(c10::TensorImpl* self, c10::IntArrayRef sizes, c10::OptionalIntArrayRef strides);

void install_allocators();

}  // namespace trn
