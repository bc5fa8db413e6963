#include "call.h"

#include <ATen/core/op_registration/adaption.h>

#include <cstring>

#include "guard.h"

namespace trn {

namespace {

void add_metadata(Key& key, const c10::TensorImpl* tensor) {
  const auto sizes = tensor->sizes();
  const auto strides = tensor->strides();
  key.add((static_cast<uint64_t>(sizes.size()) << 16) |
          static_cast<uint64_t>(c10::typeMetaToScalarType(tensor->dtype())) |
          (tensor->is_wrapped_number() ? uint64_t{1} << 8 : 0));
  for (size_t i = 0; i < sizes.size(); ++i) {
    key.add(static_cast<uint64_t>(sizes[i]));
    key.add(static_cast<uint64_t>(strides[i]));
  }
}

void add_list(Key& key, c10::ArrayRef<c10::IValue> list, bool numbers_matter) {
  key.add(list.size());
  for (const auto& item : list) add_value(key, item, numbers_matter);
}

[[noreturn]] void device_mismatch(const OpInfo& info, const ArgInfo& arg, const at::Tensor& tensor,
                                  c10::Device common) {
  const std::string& base = info.op.schema().name();
  const std::string method = "wrapper_trn_" + base.substr(base.rfind(':') + 1);
  c10::impl::common_device_check_failure(common, tensor, method.c_str(), arg.name.c_str());
  TORCH_INTERNAL_ASSERT(false);  // not reached: the line above raises
}

void join_device(Call& call, const OpInfo& info, const ArgInfo& arg, const at::Tensor& tensor) {
  const int device = tensor.device().index();
  if (call.device < 0) {
    call.device = device;
    if (call.first.defined()) device_mismatch(info, arg, tensor, call.first.device());
  } else if (call.device != device) {
    device_mismatch(info, arg, tensor, c10::Device(kTrn, static_cast<c10::DeviceIndex>(call.device)));
  }
}

// Reserves HBM for what the kernel will need, so that an operator that does not fit changes nothing.
void reserve(Call& call, const std::vector<uint64_t>& fresh_bytes, const std::vector<Growth>& growth) {
  for (uint64_t bytes : fresh_bytes) call.reserved.push_back(allocate_block(call.device, bytes));
  for (const Growth& grown : growth) {
    for (const Operand& operand : call.operands) {
      if (operand.position != grown.argument) continue;
      if (operand.tensor->unsafeGetTensorImpl()->unsafe_storage().nbytes() < grown.bytes) {
        call.growth.emplace_back(&operand, allocate_block(call.device, grown.bytes));
      }
    }
  }
}

// The alias was given another storage (as set_ does): the trn tensor gets one over the same bytes.
void follow_storage(Call& call, c10::TensorImpl* tensor, c10::StorageImpl* cpu) {
  hbm::Block* block = allocate_block(call.device, cpu->nbytes());
  tensor->set_storage_keep_dtype(c10::Storage(
      make_storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(cpu), cpu->nbytes(), call.device, block)));
}

void sync_operand(Call& call, const Operand& operand) {
  c10::TensorImpl* impl = operand.tensor->unsafeGetTensorImpl();
  const c10::TensorImpl* alias = operand.alias.unsafeGetTensorImpl();
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  c10::StorageImpl* cpu = alias->unsafe_storage().unsafeGetStorageImpl();
  StorageContext* context = context_of(storage);
  if (context != nullptr && cpu != context->cpu.get()) {
    follow_storage(call, impl, cpu);
  } else if (context != nullptr && (cpu->nbytes() != context->cpu_nbytes || cpu->data() != context->cpu_data)) {
    hbm::Block* none = nullptr;
    hbm::Block** reserved = &none;
    for (auto& [grown, block] : call.growth) {
      if (grown == &operand) reserved = &block;
    }
    sync_storage(storage, claim(call.device, *reserved, cpu->nbytes()));
  }
  if (impl->sizes() != alias->sizes() || impl->strides() != alias->strides() ||
      impl->storage_offset() != alias->storage_offset()) {
    impl->set_sizes_and_strides(alias->sizes(), alias->strides(), alias->storage_offset());
  }
}

// The trn storage of a result with memory of its own.
c10::Storage fresh_storage(Call& call, const c10::TensorImpl* result) {
  c10::StorageImpl* cpu = result->unsafe_storage().unsafeGetStorageImpl();
  const uint64_t bytes = bytes_needed(result);
  hbm::Block* none = nullptr;
  const bool foreseen = call.next_reserved < call.reserved.size();
  hbm::Block* block = claim(call.device, foreseen ? call.reserved[call.next_reserved++] : none, bytes);
  return make_storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(cpu), bytes, call.device, block);
}

// The same for a result that others may share it with.
c10::Storage shared_storage(Call& call, const c10::TensorImpl* result) {
  const c10::StorageImpl* cpu = result->unsafe_storage().unsafeGetStorageImpl();
  for (auto& [known, storage] : call.fresh) {
    if (known == cpu) return c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
  }
  c10::Storage storage = fresh_storage(call, result);
  call.fresh.emplace_back(cpu, storage.unsafeGetStorageImpl());
  return storage;
}

const c10::DispatchKeySet kExcluded =
    c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;

}  // namespace

hbm::Block* claim(int device, hbm::Block*& reserved, uint64_t bytes) {
  hbm::Block* block = std::exchange(reserved, nullptr);
  if (block != nullptr && block->requested == bytes) return block;
  release_block(device, block);
  return allocate_block(device, bytes);
}

std::vector<bool> on_device(const Call& call) {
  std::vector<bool> flags(static_cast<size_t>(call.tensors), false);
  for (const Operand& operand : call.operands) flags[static_cast<size_t>(operand.position)] = true;
  return flags;
}

Call::Call() {
  check_usable();
  prepare_thread();
}

Call::~Call() {
  for (hbm::Block* block : reserved) release_block(device, block);
  for (auto& [operand, block] : growth) release_block(device, block);
  for (Operand& operand : operands) {
    const c10::TensorImpl* impl = operand.tensor->unsafeGetTensorImpl();
    keep_alias(impl->unsafe_storage().unsafeGetStorageImpl(), std::move(operand.alias));
  }
}

CpuScope::CpuScope(int device) : below(kExcluded), pool(device) {}

void add_value(Key& key, const c10::IValue& value, bool numbers_matter) {
  if (value.isNone()) {
    key.add(1);
  } else if (value.isBool()) {
    key.add(value.toBool() ? 3 : 2);
  } else if (value.isInt()) {
    key.add(4);
    key.add(static_cast<uint64_t>(value.toInt()));
  } else if (value.isDouble()) {
    key.add(5);
    if (numbers_matter) {
      uint64_t bits;
      const double number = value.toDouble();
      std::memcpy(&bits, &number, sizeof bits);
      key.add(bits);
    }
  } else if (value.isIntList()) {
    const auto list = value.toIntList();
    key.add(list.size());
    for (int64_t item : list) key.add(static_cast<uint64_t>(item));
  } else if (value.isString()) {
    key.add(std::hash<std::string>{}(value.toStringRef()));
  } else if (value.isList()) {
    add_list(key, value.toListRef(), numbers_matter);
  } else {
    key.add(6);  // devices, layouts as ints, generators: no part of the cost
  }
}

// The alias to put in the place of a tensor argument.
at::Tensor take_tensor(Call& call, const OpInfo& info, const ArgInfo& arg, c10::MaybeOwned<at::Tensor> tensor) {
  const c10::TensorImpl* impl = tensor->unsafeGetTensorImpl();
  if (C10_LIKELY(impl->device_type() == kTrn)) {
    join_device(call, info, arg, *tensor);
    add_metadata(call.key, impl);
    if (C10_UNLIKELY(!call.aliased)) {
      call.operands.emplace_back(std::move(tensor), at::Tensor(), call.tensors++, arg);
      return *call.operands.back().tensor;
    }
    at::Tensor alias = cpu_alias(*tensor);
    call.operands.emplace_back(std::move(tensor), alias, call.tensors++, arg);
    return alias;
  }
  const bool scalar = info.allows_cpu_scalars && impl->dim() == 0 && !arg.written;
  if (!(impl->device_type() == c10::DeviceType::CPU && (scalar || arg.cpu_allowed))) {
    if (call.device >= 0) {
      device_mismatch(info, arg, *tensor, c10::Device(kTrn, static_cast<c10::DeviceIndex>(call.device)));
    }
    if (!call.first.defined()) call.first = *tensor;
  }
  call.tensors += 1;
  call.key.add(7);
  add_metadata(call.key, impl);
  return *tensor;
}

void settle_device(Call& call) {
  // Decides the dtype of results: integers divided, an arange without one.
  call.key.add(static_cast<uint64_t>(c10::get_default_dtype_as_scalartype()));
  if (call.device < 0) {
    call.device = current_device();
    check_device_index(call.device);
  }
}

CostEntry* prepare(Call& call, OpInfo& info, c10::function_ref<torch::jit::Stack()> args, std::exception_ptr* why) {
  if (CostEntry* known = info.costs.find(call.key)) {
    check_strict(info, known->host);
    reserve(call, known->fresh_bytes, known->growth);
    return known;
  }
  const auto keep = [&](const Prediction& prediction) { reserve(call, prediction.fresh_bytes, prediction.growth); };
  CostEntry* entry = price_before(info, args(), on_device(call), keep, why);
  return entry == nullptr ? nullptr : info.costs.insert(call.key, entry);
}

CostEntry* price_results(Call& call, OpInfo& info, const torch::jit::Stack& args, const torch::jit::Stack& results) {
  for (const auto& value : results) {
    if (value.isTensor()) check_result(info, value.toTensor());
  }
  return info.costs.insert(call.key, price_after(info, args, on_device(call), results));
}

void check_result(const OpInfo& info, const at::Tensor& result) {
  if (!result.defined()) return;
  const c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  if (C10_LIKELY(impl->layout() == c10::kStrided && impl->device_type() == c10::DeviceType::CPU &&
                 !c10::isQIntType(c10::typeMetaToScalarType(impl->dtype())))) {
    return;
  }
  TORCH_CHECK(false, info.name, " gives a ", result.is_quantized() ? "quantized" : c10::str(impl->layout()),
              " tensor, which trn does not have; run it on the CPU: move its inputs with .cpu() first.");
}

at::Tensor give_tensor(Call& call, const OpInfo& info, at::Tensor&& result) {
  if (!result.defined()) return result;
  const c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  if (C10_LIKELY(result.use_count() == 1 && impl->has_storage() && impl->unsafe_storage().use_count() == 1)) {
    // Nothing else has it or its memory: it is no operand and shares with none, nor with another result.
    check_result(info, result);
    at::Tensor given = wrap(result, fresh_storage(call, impl));
    keep_alias(given.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl(), std::move(result));
    return given;
  }
  for (const Operand& operand : call.operands) {
    if (operand.alias.unsafeGetTensorImpl() == impl) return *operand.tensor;
  }
  check_result(info, result);
  const c10::StorageImpl* cpu = impl->unsafe_storage().unsafeGetStorageImpl();
  for (const Operand& operand : call.operands) {
    if (operand.alias.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl() == cpu) {
      return wrap(result, operand.tensor->storage());
    }
  }
  return wrap(result, shared_storage(call, impl));
}

void sync_operands(Call& call) {
  for (const Operand& operand : call.operands) {
    if (operand.written) sync_operand(call, operand);
  }
}

}  // namespace trn
