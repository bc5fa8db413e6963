#include "price.h"

#include <ATen/ops/empty_strided.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "eager.h"
#include "storage.h"

namespace py = pybind11;

namespace trn {

namespace {

using torch::jit::Stack;

// Python objects that outlive the interpreter's end on purpose: tensors may still die after it.
py::object* lower_callback = nullptr;
py::object* has_lowering_callback = nullptr;

const c10::DispatchKeySet kMetaKeys(c10::DispatchKey::Meta);

class MetaArguments {
 public:
  // The stack with every tensor replaced by a meta tensor of the same sizes, strides and dtype.
  Stack convert(const OpInfo& info, const Stack& args) {
    Stack stack;
    for (size_t i = 0; i < args.size(); ++i) {
      if (info.args[i].kind == ArgKind::Device && !args[i].isNone()) {
        stack.emplace_back(c10::Device(c10::DeviceType::Meta));
      } else if (info.args[i].kind == ArgKind::Generator) {
        stack.emplace_back();
      } else {
        stack.push_back(convert(args[i], info.args[i].written));
      }
    }
    return stack;
  }

  // The stack for Python: tensors that stay on the CPU as the number 1 of their kind (only 0-dim ones may, and what a
  // scalar costs does not depend on its value), indices as they are.
  static Stack for_python(Stack stack, const std::vector<bool>& on_device) {
    size_t position = 0;
    for (auto& value : stack) {
      if (value.isTensorList() || value.isOptionalTensorList()) {
        for (const auto& item : value.toListRef()) position += item.isTensor() && item.toTensor().defined() ? 1 : 0;
      }
      if (!value.isTensor() || !value.toTensor().defined()) continue;
      const at::Tensor tensor = value.toTensor();
      // torch hands wrapped numbers to Python as numbers, which it cannot do without a value.
      auto* impl = tensor.unsafeGetTensorImpl();
      if (impl->is_wrapped_number()) impl->set_wrapped_number(false);
      if (!on_device.at(position++) && tensor.dim() == 0) {
        if (tensor.is_floating_point() || tensor.is_complex()) {
          value = 1.0;
        } else {
          value = int64_t{1};
        }
      }
    }
    return stack;
  }

  struct Operand {
    c10::StorageImpl* storage;
    at::Tensor tensor;
    bool written;
  };
  std::vector<Operand> operands;  // in the order in which the eager path numbers them

 private:
  c10::IValue convert(const c10::IValue& value, bool written) {
    if (value.isTensor()) return convert(value.toTensor(), written);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& item : value.toListRef()) list.push_back(convert(item.toTensor(), written));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& item : value.toListRef()) {
        if (item.isNone()) {
          list.push_back(std::nullopt);
        } else {
          list.push_back(convert(item.toTensor(), written));
        }
      }
      return list;
    }
    return value;
  }

  at::Tensor convert(const at::Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    at::Tensor meta = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) meta.unsafeGetTensorImpl()->set_wrapped_number(true);
    if (tensor.is_conj()) meta._set_conj(true);
    if (tensor.is_neg()) meta._set_neg(true);
    operands.push_back({meta.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl(), meta, written});
    return meta;
  }
};

bool is_known(const std::vector<c10::StorageImpl*>& storages, const c10::StorageImpl* storage) {
  return std::find(storages.begin(), storages.end(), storage) != storages.end();
}

template <typename F>
void for_each_tensor(const Stack& values, F&& visit) {
  for (const auto& value : values) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) visit(value.toTensor());
    } else if (value.isTensorList()) {
      for (const auto& item : value.toListRef()) {
        if (item.toTensor().defined()) visit(item.toTensor());
      }
    }
  }
}

// Results that get memory of their own, in order of appearance.
std::vector<uint64_t> fresh_bytes(const std::vector<c10::StorageImpl*>& inputs, const Stack& results) {
  std::vector<uint64_t> bytes;
  std::vector<c10::StorageImpl*> seen = inputs;
  for_each_tensor(results, [&](const at::Tensor& tensor) {
    auto* storage = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    if (is_known(seen, storage)) return;
    seen.push_back(storage);
    bytes.push_back(bytes_needed(tensor.unsafeGetTensorImpl()));
  });
  return bytes;
}

py::object to_python(const c10::IValue& value) { return torch::jit::toPyObject(value); }

CostEntry* make_entry(OpInfo& info, const Stack& args, const Stack& results, const std::vector<c10::StorageImpl*>& inputs) {
  TORCH_CHECK(Py_IsInitialized(), "trn: ", info.name, " was called after the Python interpreter ended");
  py::gil_scoped_acquire gil;
  py::list py_args, py_outs, py_fresh;
  for (const auto& value : args) py_args.append(to_python(value));
  for_each_tensor(results, [&](const at::Tensor& tensor) {
    py_outs.append(py::cast(tensor));
    py_fresh.append(!is_known(inputs, tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()));
  });
  CostEntry* entry = CostStore::instance().create(info.name);
  py::tuple cost;
  try {
    cost = (*lower_callback)(entry->id, info.name, py_args, py_outs, py_fresh);
  } catch (py::error_already_set& error) {
    error.restore();
    python_error raised;  // crosses C++ frames and comes out in Python as the exception it was
    raised.persist();
    throw raised;
  }
  entry->launch_ps = cost[0].cast<int64_t>();
  entry->duration_ps = cost[1].cast<int64_t>();
  const auto busy = cost[2].cast<std::vector<int64_t>>();
  for (size_t i = 0; i < kEngines; ++i) entry->busy_ps[i] = busy.at(i);
  entry->flops = cost[3].cast<double>();
  entry->hbm_bytes = cost[4].cast<int64_t>();
  entry->bound = static_cast<Bound>(cost[5].cast<int>());
  entry->host = cost[6].cast<bool>();
  return entry;
}

bool has_lowering(OpInfo& info) {
  py::gil_scoped_acquire gil;
  return (*has_lowering_callback)(info.name).cast<bool>();
}

}  // namespace

void set_lowering(py::object lower, py::object has_lowering) {
  lower_callback = new py::object(std::move(lower));
  has_lowering_callback = new py::object(std::move(has_lowering));
}

CostEntry* price_before(OpInfo& info, const Stack& args, const std::vector<bool>& on_device, Reserve reserve) {
  if (settings().strict && !has_lowering(info)) check_strict(info, true);
  at::DisableRecordFunctionGuard unseen;  // a profile shows the user's operators, not those of pricing
  MetaArguments meta;
  const Stack meta_args = meta.convert(info, args);
  std::vector<c10::StorageImpl*> inputs;
  for (const auto& operand : meta.operands) inputs.push_back(operand.storage);
  Stack results = meta_args;
  try {
    info.op.redispatchBoxed(kMetaKeys, &results);
  } catch (python_error& error) {
    py::gil_scoped_acquire gil;
    if (PyErr_GivenExceptionMatches(error.type, PyExc_KeyboardInterrupt)) throw;
    return nullptr;
  } catch (py::error_already_set& error) {
    py::gil_scoped_acquire gil;
    if (error.matches(PyExc_KeyboardInterrupt)) throw;
    return nullptr;
  } catch (const std::exception&) {
    // No meta kernel, sizes that depend on values, or a wrong call: the CPU kernel will tell.
    return nullptr;
  }
  Prediction prediction;
  prediction.fresh_bytes = fresh_bytes(inputs, results);
  for (size_t i = 0; i < meta.operands.size(); ++i) {
    if (!meta.operands[i].written) continue;
    const uint64_t bytes = bytes_needed(meta.operands[i].tensor.unsafeGetTensorImpl());
    prediction.growth.push_back({static_cast<int32_t>(i), bytes});
  }
  reserve(prediction);
  CostEntry* entry = make_entry(info, MetaArguments::for_python(meta_args, on_device), results, inputs);
  entry->fresh_bytes = std::move(prediction.fresh_bytes);
  entry->growth = std::move(prediction.growth);
  return entry;
}

CostEntry* price_after(OpInfo& info, const Stack& args, const std::vector<bool>& on_device, const Stack& results) {
  at::DisableRecordFunctionGuard unseen;
  MetaArguments meta;
  std::vector<c10::StorageImpl*> inputs;
  for_each_tensor(args, [&](const at::Tensor& tensor) {
    inputs.push_back(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  });
  return make_entry(info, MetaArguments::for_python(meta.convert(info, args), on_device), results, inputs);
}

}  // namespace trn
