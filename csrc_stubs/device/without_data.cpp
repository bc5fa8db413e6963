#include "without_data.h"

#include <ATen/EmptyTensor.h>

#include "call.h"
#include "generator.h"

namespace trn {

namespace {

using torch::jit::Stack;

const Operand* without_values(const Call& call) {
  for (const Operand& operand : call.operands) {
    if (!operand.overwritten && !has_values(*operand.tensor)) return &operand;
  }
  return nullptr;
}

const Operand& operand_at(const Call& call, int32_t position) {
  const Operand* found =
      std::lower_bound(call.operands.begin(), call.operands.end(), position,
                       [](const Operand& operand, int32_t wanted) { return operand.position < wanted; });
  TORCH_INTERNAL_ASSERT(found != call.operands.end() && found->position == position,
                        "trn: a call has no trn tensor at position ", position);
  return *found;
}

uint64_t bytes_after(const at::Tensor& tensor, const WrittenLayout& after) {
  return at::detail::computeStorageNbytes(after.origin.sizes, after.strides, tensor.itemsize(),
                                          static_cast<size_t>(tensor.storage_offset()));
}

bool changes_sizes(const at::Tensor& tensor, const WrittenLayout& after) {
  return tensor.sizes() != c10::IntArrayRef(after.origin.sizes) || tensor.strides() != c10::IntArrayRef(after.strides);
}

// Whether what the call gives and overwrites is small enough to have values.
bool results_are_small(const Call& call, const CostEntry* entry) {
  for (const Operand& operand : call.operands) {
    if (operand.overwritten && !can_take_values(*operand.tensor)) return false;
  }
  if (entry == nullptr || entry->layout == nullptr) return true;
  for (const ResultLayout& result : entry->layout->results) {
    if (result.fresh < 0) continue;
    const uint64_t bytes = entry->fresh_bytes[static_cast<size_t>(result.fresh)];
    if (bytes > data_limit_bytes(result.origin.dtype)) return false;
  }
  for (const WrittenLayout& after : entry->layout->written) {
    const at::Tensor& tensor = *operand_at(call, after.operand).tensor;
    if (!changes_sizes(tensor, after)) continue;
    const uint64_t bytes = bytes_after(tensor, after);
    if (bytes > tensor.storage().nbytes() && bytes > data_limit_bytes(after.origin.dtype)) return false;
  }
  return true;
}

[[noreturn]] void raise_needs_values(const OpInfo& info, const Operand& operand) {
  int32_t position = operand.position;
  TORCH_CHECK(false, "trn: ", info.name, " needs the values of its arguments, but ", described(*operand.tensor),
              " (tensor ", position, " of the call) has none: ", why_no_value(*operand.tensor), ". ", way_out());
}

// Puts the aliases of the call's operands, taken in order, in the place of its trn tensors.
class AliasStack {
 public:
  AliasStack(Call& call, const OpInfo& info, c10::IValue* args) : call_(call) {
    for (size_t i = 0; i < info.args.size(); ++i) {
      if (info.args[i].kind == ArgKind::Tensor || info.args[i].kind == ArgKind::TensorList) replace(args[i]);
      if (info.args[i].kind == ArgKind::Generator) args[i] = engine_of(call.generator);
    }
  }

 private:
  at::Tensor alias(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kTrn) return tensor;
    return call_.operands[next_++].alias;
  }
  void replace(c10::IValue& value) {
    if (value.isTensor()) {
      value = alias(value.toTensor());
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& item : value.toListRef()) {
        list.push_back(item.isNone() ? std::nullopt : std::make_optional(alias(item.toTensor())));
      }
      value = list;
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& item : value.toListRef()) list.push_back(alias(item.toTensor()));
      value = list;
    }
  }

  Call& call_;
  size_t next_ = 0;
};

// Storages that a call is about to overwrite get bytes; when its kernel raises, they are as valueless as before.
class Overwrite {
 public:
  explicit Overwrite(Call& call) {
    for (const Operand& operand : call.operands) {
      if (!operand.overwritten) continue;
      c10::StorageImpl* storage = operand.tensor->storage().unsafeGetStorageImpl();
      const StorageContext* context = context_of(storage);
      if (context == nullptr || context->values == Values::Valued) continue;
      if (context->values == Values::Valueless) before_.emplace_back(*operand.tensor, context->origin);
      make_valued(storage);
    }
  }
  ~Overwrite() {
    for (const auto& [tensor, origin] : before_) make_valueless(tensor, origin);
  }
  void done() { before_.clear(); }

 private:
  c10::SmallVector<std::pair<at::Tensor, const Origin*>, 1> before_;
};

void compute(Call& call, OpInfo& info, CostEntry* entry, Stack* stack) {
  c10::IValue* args = stack->data() + (stack->size() - info.args.size());
  Overwrite overwrite(call);
  for (Operand& operand : call.operands) operand.alias = cpu_alias(*operand.tensor);
  AliasStack replaced(call, info, args);
  Stack kept;
  if (entry == nullptr) kept.assign(args, args + info.args.size());
  call_cpu(info, stack, call.device);
  if (entry == nullptr) {
    const Stack results(stack->end() - static_cast<std::ptrdiff_t>(info.num_returns), stack->end());
    entry = price_results(call, info, kept, results);
  }
  overwrite.done();
  sync_operands(call);
  give_results(call, info, stack);
  account(*entry, call.device, entry->host || entry->awaited || info.returns_value);
}

// The trn tensor that a result foretells.
at::Tensor make_tensor(const ResultLayout& layout, c10::Storage storage, int64_t base) {
  auto result =
      c10::make_intrusive<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::scalarTypeToTypeMeta(layout.origin.dtype));
  result->set_sizes_and_strides(layout.origin.sizes, layout.strides, base + layout.offset);
  if (C10_UNLIKELY(layout.conj)) result->_set_conj(true);
  if (C10_UNLIKELY(layout.neg)) result->_set_neg(true);
  return at::Tensor(std::move(result));
}

class Results {
 public:
  Results(Call& call, const CostEntry& entry) : call_(call), entry_(entry) {}

  at::Tensor next() {
    const ResultLayout& layout = entry_.layout->results[next_++];
    if (!layout.defined) return {};
    if (layout.operand >= 0) {
      const at::Tensor& operand = *operand_at(call_, layout.operand).tensor;
      return layout.same ? operand : make_tensor(layout, operand.storage(), operand.storage_offset());
    }
    const auto index = static_cast<size_t>(layout.fresh);
    if (index == storages_.size()) storages_.push_back(fresh(layout, index));
    return make_tensor(layout, storages_[index], 0);
  }

 private:
  c10::Storage fresh(const ResultLayout& layout, size_t index) {
    hbm::Block*& reserved = call_.reserved[index];
    c10::Storage storage(make_hollow_storage(entry_.fresh_bytes[index], call_.device, reserved, &layout.origin));
    reserved = nullptr;
    return storage;
  }

  Call& call_;
  const CostEntry& entry_;
  size_t next_ = 0;
  c10::SmallVector<c10::Storage, 4> storages_;
};

void leave_written(Call& call, const WrittenLayout& after) {
  const Operand& operand = operand_at(call, after.operand);
  const at::Tensor& tensor = *operand.tensor;
  if (C10_UNLIKELY(changes_sizes(tensor, after))) {
    c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    const uint64_t bytes = bytes_after(tensor, after);
    c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    if (bytes > storage->nbytes()) {
      hbm::Block* none = nullptr;
      hbm::Block** reserved = &none;
      for (auto& [grown, block] : call.growth) {
        if (grown == &operand) reserved = &block;
      }
      grow_hollow(storage, bytes, claim(call.device, *reserved, bytes), &after.origin);
    }
    impl->set_sizes_and_strides(after.origin.sizes, after.strides);
  }
  make_valueless(tensor, &after.origin);
}

void make_results(Call& call, OpInfo& info, const CostEntry& entry, Stack* stack) {
  const auto& written = entry.layout->written;
  // Gradients without values count as finite: what a GradScaler looks at stays as it is.
  const size_t left = written.size() - (info.tells_finite ? 1 : 0);
  for (size_t i = 0; i < left; ++i) leave_written(call, written[i]);
  Results results(call, entry);
  torch::jit::drop(*stack, info.args.size());
  for (const ReturnLayout& value : entry.layout->returns) {
    switch (value.kind) {
      case ReturnLayout::Kind::Tensor:
        stack->emplace_back(results.next());
        break;
      case ReturnLayout::Kind::List: {
        c10::List<at::Tensor> list;
        list.reserve(value.length);
        for (size_t i = 0; i < value.length; ++i) list.push_back(results.next());
        stack->emplace_back(std::move(list));
        break;
      }
      case ReturnLayout::Kind::Value:
        stack->push_back(value.value);
        break;
    }
  }
}

// An operator that only changes tensors in place, and has no meta kernel: nothing changes its sizes.
CostEntry* price_in_place(Call& call, OpInfo& info, CostEntry* entry, const Stack& args) {
  Stack results;
  std::vector<MetaOperand> operands(static_cast<size_t>(call.tensors));
  for (const Operand& operand : call.operands) {
    operands[static_cast<size_t>(operand.position)] = {*operand.tensor, operand.written};
  }
  for (const auto& index : info.returned_args) results.push_back(args[index]);
  if (entry == nullptr) entry = info.costs.insert(call.key, price_after(info, args, on_device(call), results));
  entry->layout = make_layout(info, operands, results);
  return entry;
}

}  // namespace

void run_without_data(OpInfo& info, Stack* stack) {
  Call call;
  call.aliased = false;
  c10::IValue* args = stack->data() + (stack->size() - info.args.size());
  take_arguments(call, info, args);
  std::exception_ptr why;
  CostEntry* entry = prepare(call, info, [&] { return Stack(args, args + info.args.size()); }, &why);
  const Operand* missing = without_values(call);
  const bool foreseen = entry != nullptr && entry->layout != nullptr;
  if (missing == nullptr && (!foreseen || info.needs_values || results_are_small(call, entry))) {
    return compute(call, info, entry, stack);
  }
  if (missing != nullptr && info.needs_values) raise_needs_values(info, *missing);
  if (!foreseen) {
    if (why != nullptr && !lacks_meta(why)) std::rethrow_exception(why);
    if (!info.in_place) raise_needs_values(info, *missing);
    entry = price_in_place(call, info, entry, Stack(args, args + info.args.size()));
  }
  if (info.draws) {
    std::atomic<int64_t>& draws = entry->layout->draws;
    if (draws < 0)
      draws = static_cast<int64_t>(count_draws(info, Stack(args, args + info.args.size()), *entry->layout));
    skip_draws(call.generator.defined() ? call.generator : default_generator(call.device),
               static_cast<uint64_t>(draws));
  }
  make_results(call, info, *entry, stack);
  account(*entry, call.device, entry->host || entry->awaited || info.returns_value);
}

}  // namespace trn
