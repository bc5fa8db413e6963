// Storages without bytes: an address of their own, a block of HBM, and bytes when an operator has values for them.
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <mutex>

#include "../core/address_space.h"
#include "values.h"

namespace trn {

namespace {

std::mutex& values_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

// Gives the context of a storage another pointer.
void point_to(c10::StorageImpl* storage, StorageContext* context, void* pointer) {
  c10::DataPtr old = storage->set_data_ptr(owned_by(context, pointer));
  old.release_context();
}

}  // namespace

c10::intrusive_ptr<c10::StorageImpl> empty_cpu_storage() {
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0,
                                               c10::GetCPUAllocator()->allocate(0), c10::GetCPUAllocator(), true);
}

void check_readable(const void* pointer) {
  AddressSpace& space = AddressSpace::instance();
  if (!space.contains(pointer)) return;
  const char* owner = space.owner(pointer);
  TORCH_CHECK(false, "trn: the bytes of a storage are asked for, but it has none: numerics is \"none\" and ",
              owner == nullptr ? "aten::empty" : owner, " made it without computing values. ", way_out());
}

c10::DataPtr hollow_data_ptr(uint64_t bytes, int device, hbm::Block* block, const Origin* origin) {
  AddressSpace& space = AddressSpace::instance();
  hbm::Block* range = space.allocate(bytes, origin == nullptr ? "aten::empty" : origin->op);
  TORCH_CHECK(
      range != nullptr, "trn: no address is left for a tensor of ", bytes,
      " bytes without data: the process could reserve ", space.size_bytes(),
      " bytes of addresses and live tensors hold them. Free tensors, or raise the limit that `ulimit -v` shows.");
  auto* context = new StorageContext;
  context->block = block;
  context->device = device;
  context->values = origin == nullptr ? Values::Virgin : Values::Valueless;
  context->origin = origin;
  context->range = range;
  return owned_by(context, space.pointer(range));
}

c10::intrusive_ptr<c10::StorageImpl> make_hollow_storage(uint64_t bytes, int device, hbm::Block* block,
                                                         const Origin* origin) {
  if (bytes == 0) return make_storage(empty_cpu_storage(), 0, device, block);
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                               hollow_data_ptr(bytes, device, block, origin), allocator(), true);
}

void make_valued(c10::StorageImpl* storage) {
  StorageContext* context = context_of(storage);
  if (context == nullptr || context->values == Values::Valued) return;
  std::lock_guard<std::mutex> lock(values_mutex());
  if (context->cpu == nullptr) {
    const size_t bytes = storage->nbytes();
    PoolScope pool(context->device);
    context->cpu =
        c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                              c10::GetCPUAllocator()->allocate(bytes), c10::GetCPUAllocator(), true);
    context->cpu_data = context->cpu->mutable_data();
    context->cpu_nbytes = bytes;
    std::memset(context->cpu_data, 0, bytes);
    point_to(storage, context, context->cpu_data);
    AddressSpace::instance().release(std::exchange(context->range, nullptr));
  }
  context->origin = nullptr;
  context->values = Values::Valued;
}

void grow_hollow(c10::StorageImpl* storage, uint64_t bytes, hbm::Block* block, const Origin* origin) {
  const int device = context_of(storage)->device;
  try {
    storage->set_data_ptr(hollow_data_ptr(bytes, device, block, origin));
  } catch (...) {
    release_block(device, block);
    throw;
  }
  storage->set_nbytes(bytes);
}

bool resize_hollow(c10::StorageImpl* storage, const StorageContext* context, uint64_t nbytes, hbm::Block* block,
                   c10::ScalarType dtype) {
  const bool valued = context->values == Values::Valued;
  if (nbytes == 0 || (valued && storage->nbytes() > 0 && nbytes <= data_limit_bytes(dtype))) return false;
  // What was empty has never been written.
  const bool virgin = context->values == Values::Virgin || storage->nbytes() == 0;
  static const Origin cut{"aten::resize_", c10::kByte, {}};
  grow_hollow(storage, nbytes, block, virgin ? nullptr : valued ? &cut : context->origin);
  return true;
}

}  // namespace trn
