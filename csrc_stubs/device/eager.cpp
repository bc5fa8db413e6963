#include "eager.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/Generator.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/native/Resize.h>
#include <c10/core/AutogradState.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>

#include <cstdio>
#include <cstring>
#include <shared_mutex>
#include <unordered_set>

#include "generator.h"
#include "guard.h"
#include "kineto.h"
#include "storage.h"

namespace trn {

namespace {

using torch::jit::Stack;

thread_local int64_t current_module = 0;
std::atomic<StackCallback> stack_callback{nullptr};
std::mutex sequence_mutex;
std::unordered_map<uint64_t, int64_t> module_of_sequence;

const c10::DispatchKeySet kCpuKeys(c10::DispatchKey::CPU);
// What must not act a second time on the CPU calls that a kernel makes.
const c10::DispatchKeySet kExcluded = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;

// A backward operator belongs to the module whose forward operator made its autograd node.
int64_t module_of_this_operator() {
  if (auto node = torch::autograd::get_current_node()) {
    std::lock_guard<std::mutex> lock(sequence_mutex);
    auto found = module_of_sequence.find(node->sequence_nr());
    return found == module_of_sequence.end() ? current_module : found->second;
  }
  if (current_module != 0 && at::sequence_number::peek() > 0) {
    std::lock_guard<std::mutex> lock(sequence_mutex);
    module_of_sequence[at::sequence_number::peek() - 1] = current_module;
  }
  return current_module;
}

void record(const CostEntry& entry, int device, int stream, const Span& span) {
  Recorder& recorder = Recorder::instance();
  const int64_t module = recorder.wants_modules() ? module_of_this_operator() : 0;
  StackCallback callback = stack_callback;
  const int64_t stack = recorder.wants_stacks() && callback != nullptr ? callback() : 0;
  recorder.add({&entry, span.start_ps, span.end_ps - span.start_ps, module, stack, correlation_id(), device, stream});
}

// The state of one call through the eager path.
struct Call {
  c10::SmallVector<Operand, 6> operands;
  c10::SmallVector<hbm::Block*, 4> reserved;          // for results, in order of appearance
  c10::SmallVector<std::pair<int, hbm::Block*>, 2> growth;  // for operands whose storage grows
  c10::SmallVector<std::pair<c10::StorageImpl*, c10::Storage>, 2> fresh;
  size_t next_reserved = 0;
  int device = -1;
  bool single = false;  // one result: no other can share its storage
  at::Tensor first;  // first tensor met that must not be mixed with trn ones
  Key key;

  ~Call() {
    for (hbm::Block* block : reserved) release_block(device, block);
    for (auto& [operand, block] : growth) release_block(device, block);
  }
};

void add_metadata(Key& key, const c10::TensorImpl* tensor) {
  const auto sizes = tensor->sizes();
  const auto strides = tensor->strides();
  key.add((static_cast<uint64_t>(sizes.size()) << 16) |
          static_cast<uint64_t>(c10::typeMetaToScalarType(tensor->dtype())));
  for (size_t i = 0; i < sizes.size(); ++i) {
    key.add(static_cast<uint64_t>(sizes[i]));
    key.add(static_cast<uint64_t>(strides[i]));
  }
}

void add_value(Key& key, const c10::IValue& value, bool numbers_matter);

void add_list(Key& key, c10::ArrayRef<c10::IValue> list, bool numbers_matter) {
  key.add(list.size());
  for (const auto& item : list) add_value(key, item, numbers_matter);
}

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

[[noreturn]] void device_mismatch(const OpInfo& info, const ArgInfo& arg, const at::Tensor& tensor, c10::Device common) {
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

// The alias to put in the place of a tensor argument.
at::Tensor take_tensor(Call& call, const OpInfo& info, const ArgInfo& arg, at::Tensor tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (C10_LIKELY(impl->device_type() == kTrn)) {
    join_device(call, info, arg, tensor);
    at::Tensor alias = cpu_alias(tensor);
    add_metadata(call.key, impl);
    call.operands.emplace_back(std::move(tensor), alias, arg.written);
    return alias;
  }
  const bool scalar = info.allows_cpu_scalars && impl->dim() == 0 && !arg.written;
  if (!(impl->device_type() == c10::DeviceType::CPU && (scalar || arg.cpu_allowed))) {
    if (call.device >= 0) {
      device_mismatch(info, arg, tensor, c10::Device(kTrn, static_cast<c10::DeviceIndex>(call.device)));
    }
    if (!call.first.defined()) call.first = tensor;
  }
  call.key.add(7);
  add_metadata(call.key, impl);
  return tensor;
}

c10::IValue take_list(Call& call, const OpInfo& info, const ArgInfo& arg, const c10::IValue& value) {
  const auto items = value.toListRef();
  call.key.add(items.size());
  const bool optional = value.isOptionalTensorList();
  c10::List<at::Tensor> tensors;
  c10::List<std::optional<at::Tensor>> optionals;
  if (optional) {
    optionals.reserve(items.size());
  } else {
    tensors.reserve(items.size());
  }
  for (const auto& item : items) {
    if (!item.isTensor() || !item.toTensor().defined()) {
      call.key.add(1);
      if (optional) {
        optionals.push_back(std::nullopt);
      } else {
        tensors.push_back(at::Tensor());
      }
      continue;
    }
    at::Tensor alias = take_tensor(call, info, arg, item.toTensor());
    if (optional) {
      optionals.push_back(std::move(alias));
    } else {
      tensors.push_back(std::move(alias));
    }
  }
  if (optional) return optionals;
  return tensors;
}

// Replaces every trn tensor on the stack by its alias, building the key and checking devices in the same pass.
void take_arguments(Call& call, OpInfo& info, c10::IValue* args) {
  int generator = -1;
  for (size_t i = 0; i < info.args.size(); ++i) {
    const ArgInfo& arg = info.args[i];
    c10::IValue& value = args[i];
    switch (arg.kind) {
      case ArgKind::Tensor:
        if (value.isTensor() && value.toTensor().defined()) {
          value = take_tensor(call, info, arg, std::move(value).toTensor());
        } else {
          call.key.add(1);
        }
        break;
      case ArgKind::TensorList:
        if (value.isNone()) {
          call.key.add(1);
        } else {
          value = take_list(call, info, arg, value);
        }
        break;
      case ArgKind::Number:
        if (info.numbers_matter) {
          add_value(call.key, value, true);
        } else {
          call.key.add(value.isInt() ? 4 : value.isDouble() ? 5 : value.isBool() ? 2 : 6);
        }
        break;
      case ArgKind::Generator:
        generator = static_cast<int>(i);
        break;
      case ArgKind::Device:
        if (value.isDevice() && value.toDevice().type() == kTrn) {
          if (call.device < 0) call.device = device_index_of(value.toDevice());
          value = c10::Device(c10::DeviceType::CPU);
        }
        break;
      case ArgKind::Value:
        add_value(call.key, value, false);
        break;
    }
  }
  if (call.device < 0) call.device = current_device();
  check_device_index(call.device);
  if (generator >= 0) {
    c10::IValue& value = args[generator];
    TORCH_CHECK(!call.first.defined(), "Expected a '", call.first.device().type(),
                "' device type for generator but found 'trn'");
    value = engine_of(value.isNone() ? default_generator(call.device) : value.toGenerator());
  }
}

void reserve(Call& call, const CostEntry& entry) {
  for (uint64_t bytes : entry.fresh_bytes) call.reserved.push_back(allocate_block(call.device, bytes));
  for (const Growth& growth : entry.growth) {
    const Operand& operand = call.operands[static_cast<size_t>(growth.argument)];
    const auto& storage = operand.tensor.unsafeGetTensorImpl()->unsafe_storage();
    if (storage.nbytes() < growth.bytes) {
      call.growth.emplace_back(growth.argument, allocate_block(call.device, growth.bytes));
    }
  }
}

// Brings what a kernel did to the alias of a written operand back to the trn tensor.
void sync_operand(Call& call, size_t index) {
  Operand& operand = call.operands[index];
  c10::TensorImpl* impl = operand.tensor.unsafeGetTensorImpl();
  const c10::TensorImpl* alias = operand.alias.unsafeGetTensorImpl();
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  StorageContext* context = context_of(storage);
  if (context != nullptr && alias->unsafe_storage().unsafeGetStorageImpl() != context->cpu.get()) {
    hbm::Block* block = allocate_block(call.device, alias->unsafe_storage().nbytes());
    auto* cpu = alias->unsafe_storage().unsafeGetStorageImpl();
    impl->set_storage_keep_dtype(c10::Storage(make_storage(
        c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(cpu), cpu->nbytes(), call.device, block)));
  } else if (context != nullptr &&
             (context->cpu->nbytes() != context->cpu_nbytes || context->cpu->data() != context->cpu_data)) {
    hbm::Block* block = nullptr;
    for (auto& [operand_index, reserved] : call.growth) {
      if (operand_index == static_cast<int>(index)) std::swap(block, reserved);
    }
    if (block != nullptr && block->requested != context->cpu->nbytes()) {
      release_block(call.device, block);
      block = nullptr;
    }
    sync_storage(storage, block);
  }
  if (impl->sizes() != alias->sizes() || impl->strides() != alias->strides() ||
      impl->storage_offset() != alias->storage_offset()) {
    impl->set_sizes_and_strides(alias->sizes(), alias->strides(), alias->storage_offset());
  }
}

c10::Storage adopt(Call& call, const at::Tensor& result) {
  const c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  c10::StorageImpl* cpu = impl->unsafe_storage().unsafeGetStorageImpl();
  for (auto& [known, storage] : call.fresh) {
    if (known == cpu) return storage;
  }
  const uint64_t bytes = bytes_needed(impl);
  hbm::Block* block = nullptr;
  if (call.next_reserved < call.reserved.size()) std::swap(block, call.reserved[call.next_reserved++]);
  if (block != nullptr && block->requested != bytes) {
    release_block(call.device, block);
    block = nullptr;
  }
  if (block == nullptr) block = allocate_block(call.device, bytes);
  c10::Storage storage(make_storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(cpu), bytes, call.device, block));
  if (!call.single) call.fresh.emplace_back(cpu, storage);
  return storage;
}

at::Tensor give_tensor(Call& call, const OpInfo& info, const at::Tensor& result) {
  if (!result.defined()) return result;
  const c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  for (const Operand& operand : call.operands) {
    if (operand.alias.unsafeGetTensorImpl() == impl) return operand.tensor;
  }
  TORCH_CHECK(impl->device_type() == c10::DeviceType::CPU && impl->layout() == c10::kStrided && !result.is_quantized(),
              info.name, " gives a ", result.is_quantized() ? "quantized" : c10::str(impl->layout()),
              " tensor, which trn does not have; run it on the CPU: move its inputs with .cpu() first.");
  const c10::StorageImpl* cpu = impl->unsafe_storage().unsafeGetStorageImpl();
  for (const Operand& operand : call.operands) {
    if (operand.alias.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl() == cpu) {
      return wrap(result, operand.tensor.storage());
    }
  }
  return wrap(result, adopt(call, result));
}

void give_results(Call& call, OpInfo& info, Stack* stack) {
  call.single = info.num_returns == 1 && stack->back().isTensor();
  for (size_t i = stack->size() - info.num_returns; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = give_tensor(call, info, value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      const auto items = value.toListRef();
      tensors.reserve(items.size());
      for (const auto& item : items) tensors.push_back(give_tensor(call, info, item.toTensor()));
      value = tensors;
    }
  }
}

void call_cpu(OpInfo& info, Stack* stack, int device) {
  c10::impl::ExcludeDispatchKeyGuard below(kExcluded);
  PoolScope pool;
  if (C10_UNLIKELY(info.draws_unasked)) {
    DefaultGeneratorSwap swap(device);
    info.op.redispatchBoxed(kCpuKeys, stack);
  } else {
    info.op.redispatchBoxed(kCpuKeys, stack);
  }
}

}  // namespace

void check_strict(const OpInfo& info, bool host) {
  TORCH_CHECK(!(host && settings().strict.load(std::memory_order_relaxed)), info.name,
              " has no lowering to a NeuronCore and would run on the host, which TRN_STRICT=1 forbids. Unset TRN_STRICT to "
              "let it run there (a Host span shows its cost), or use an operator that has one.");
}

void account(const CostEntry& entry, int device, bool host_waits) {
  const int stream = current_stream(device);
  const Span span = System::instance().device(device).launch(stream, entry, host_waits);
  if (C10_UNLIKELY(Recorder::active())) record(entry, device, stream, span);
  if (C10_UNLIKELY(settings().debug.load(std::memory_order_relaxed) > 0)) {
    std::fprintf(stderr, "[trn:%d] %-48s %12.3f us at %.3f us%s\n", device, entry.name.c_str(),
                 static_cast<double>(span.end_ps - span.start_ps) / 1e6, static_cast<double>(span.start_ps) / 1e6,
                 entry.host ? " Host" : "");
  }
}

namespace {

// torch runs backward on a thread per device, whose order among devices is that of arrival. On the calling thread it has
// one order, so simulated times are the same on every run, and values take the same path (one OpenMP team) as on the CPU.
// Set once for each thread that uses trn; torch.autograd.set_multithreading_enabled(True) afterwards still holds.
void keep_backward_on_this_thread() {
  thread_local bool done = false;
  if (C10_LIKELY(done)) return;
  done = true;
  c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
}

}  // namespace

void run_operator(OpInfo& info, Stack* stack) {
  check_usable();
  keep_backward_on_this_thread();
  HolderScope holder(info.name.c_str());
  Call call;
  c10::IValue* args = stack->data() + (stack->size() - info.args.size());
  take_arguments(call, info, args);

  CostEntry* entry = info.costs.find(call.key);
  Stack kept;
  if (C10_UNLIKELY(entry == nullptr)) {
    kept.assign(args, args + info.args.size());
    entry = price_before(info, kept);
    if (entry != nullptr) entry = info.costs.insert(call.key, entry);
  }
  if (entry != nullptr) {
    check_strict(info, entry->host);
    reserve(call, *entry);
  }
  call_cpu(info, stack, call.device);
  if (C10_UNLIKELY(entry == nullptr)) {
    const Stack results(stack->end() - static_cast<std::ptrdiff_t>(info.num_returns), stack->end());
    entry = info.costs.insert(call.key, price_after(info, kept, results));
  }
  for (size_t i = 0; i < call.operands.size(); ++i) {
    if (call.operands[i].written) sync_operand(call, i);
  }
  give_results(call, info, stack);
  account(*entry, call.device, entry->host || info.returns_value);
}

void EagerKernel::operator()(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) { run_operator(info_, stack); }

Settings& settings() {
  static auto* value = new Settings;
  return *value;
}

int64_t exchange_module(int64_t module) {
  std::swap(current_module, module);
  return module;
}

void forget_modules() {
  std::lock_guard<std::mutex> lock(sequence_mutex);
  module_of_sequence.clear();
}

void set_stack_callback(StackCallback callback) { stack_callback = callback; }

}  // namespace trn
