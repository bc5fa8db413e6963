#include "eager.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/Generator.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function.h>

#include <cstdio>
#include <map>

#include "call.h"
#include "generator.h"
#include "guard.h"
#include "kineto.h"
#include "tile.h"
#include "values.h"
#include "without_data.h"

namespace trn {

namespace {

using torch::jit::Stack;

thread_local int64_t current_module = 0;
std::atomic<StackCallback> stack_callback{nullptr};
std::mutex sequence_mutex;
// Autograd nodes are numbered by the thread that makes them.
std::map<std::pair<uint64_t, uint64_t>, int64_t> module_of_node;

// The module that is running (which in a recomputed block also goes for backward), or the one whose forward operator
// made the autograd node that is running.
int64_t module_of_this_operator() {
  if (current_module == 0) return place_of_this_thread().module;
  const uint64_t next = at::sequence_number::peek();
  if (next > 0) {
    std::lock_guard<std::mutex> lock(sequence_mutex);
    module_of_node[{at::RecordFunction::currentThreadId(), next - 1}] = current_module;
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
    at::Tensor alias = take_tensor(call, info, arg, c10::MaybeOwned<at::Tensor>::owned(at::Tensor(item.toTensor())));
    if (optional) {
      optionals.push_back(std::move(alias));
    } else {
      tensors.push_back(std::move(alias));
    }
  }
  if (optional) return optionals;
  return tensors;
}

}  // namespace

void take_arguments(Call& call, OpInfo& info, c10::IValue* args) {
  int generator = -1;
  for (size_t i = 0; i < info.args.size(); ++i) {
    const ArgInfo& arg = info.args[i];
    c10::IValue& value = args[i];
    switch (arg.kind) {
      case ArgKind::Tensor:
        if (value.isTensor() && value.toTensor().defined()) {
          value = take_tensor(call, info, arg, c10::MaybeOwned<at::Tensor>::owned(std::move(value).toTensor()));
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
  settle_device(call);
  if (generator >= 0) {
    c10::IValue& value = args[generator];
    TORCH_CHECK(!call.first.defined(), "Expected a '", call.first.device().type(),
                "' device type for generator but found 'trn'");
    call.generator = value.isNone() ? default_generator(call.device) : value.toGenerator();
    if (C10_LIKELY(call.aliased)) value = engine_of(call.generator);
  }
}

void give_results(Call& call, OpInfo& info, Stack* stack) {
  for (size_t i = stack->size() - info.num_returns; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = give_tensor(call, info, std::move(value).toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      std::vector<at::Tensor> items = value.toTensorVector();
      value = c10::IValue();  // the list's references go, so that each item is held once
      tensors.reserve(items.size());
      for (at::Tensor& item : items) tensors.push_back(give_tensor(call, info, std::move(item)));
      value = tensors;
    }
  }
}

void call_cpu(OpInfo& info, Stack* stack, int device) {
  CpuScope scope(device);
  std::optional<DefaultGeneratorSwap> swap;
  if (C10_UNLIKELY(info.draws_unasked)) swap.emplace(default_generator(device));
  if (C10_UNLIKELY(info.own_values != nullptr) && info.own_values(stack)) return;
  info.op.redispatchBoxed(kCpuKeys, stack);
}

namespace {

// Lists whose tensors are on several devices: torch's own kernel takes them one by one, as on CUDA.
bool is_spread(const OpInfo& info, const c10::IValue* args) {
  int device = -1;
  for (size_t i = 0; i < info.args.size(); ++i) {
    if (info.args[i].kind != ArgKind::TensorList || !args[i].isList()) continue;
    for (const auto& item : args[i].toListRef()) {
      if (!item.isTensor() || !item.toTensor().defined()) continue;
      const auto where = item.toTensor().device();
      const int index = where.type() == kTrn ? where.index() : kMaxDevices;
      if (device >= 0 && device != index) return true;
      device = index;
    }
  }
  return false;
}

}  // namespace

void check_strict(const OpInfo& info, bool host) {
  TORCH_CHECK(
      !(host && settings().strict.load(std::memory_order_relaxed)), info.name,
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

void run_operator(OpInfo& info, Stack* stack) {
  c10::IValue* args = stack->data() + (stack->size() - info.args.size());
  if (C10_UNLIKELY(info.foreach) && is_spread(info, args)) return info.op.redispatchBoxed(kCpuKeys, stack);
  HolderScope holder(info.name.c_str());
  if (C10_UNLIKELY(without_data())) return run_without_data(info, stack);
  Call call;
  take_arguments(call, info, args);
  Stack kept;
  CostEntry* entry = prepare(call, info, [&] { return kept = Stack(args, args + info.args.size()); });
  std::optional<TileValues> tile;
  if (C10_UNLIKELY(settings().tile.load(std::memory_order_relaxed))) {
    tile.emplace(info, call, Stack(args, args + info.args.size()));
  }
  call_cpu(info, stack, call.device);
  if (C10_UNLIKELY(entry == nullptr)) {
    const Stack results(stack->end() - static_cast<std::ptrdiff_t>(info.num_returns), stack->end());
    entry = price_results(call, info, kept, results);
  }
  if (C10_UNLIKELY(tile.has_value()) && !entry->host) {
    tile->compute(info, Stack(stack->end() - static_cast<std::ptrdiff_t>(info.num_returns), stack->end()));
  }
  sync_operands(call);
  give_results(call, info, stack);
  account(*entry, call.device, entry->host || entry->awaited || info.returns_value);
}

void EagerKernel::operator()(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
  run_operator(info_, stack);
}

Settings& settings() {
  static auto* value = new Settings;
  return *value;
}

int64_t exchange_module(int64_t module) {
  std::swap(current_module, module);
  return module;
}

Place place_of_this_thread() {
  if (current_module != 0) return {current_module, false};
  const auto node = torch::autograd::get_current_node();
  if (node == nullptr) return {0, false};
  std::lock_guard<std::mutex> lock(sequence_mutex);
  const auto found = module_of_node.find({node->thread_id(), node->sequence_nr()});
  return {found == module_of_node.end() ? 0 : found->second, true};
}

void note_module() {
  if (C10_UNLIKELY(Recorder::active()) && Recorder::instance().wants_modules()) module_of_this_operator();
}

void forget_modules() {
  std::lock_guard<std::mutex> lock(sequence_mutex);
  module_of_node.clear();
}

void set_stack_callback(StackCallback callback) { stack_callback = callback; }

}  // namespace trn
