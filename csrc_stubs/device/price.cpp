#include "price.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "call.h"
#include "eager.h"
#include "predict.h"
#include "storage.h"
#include "without_data.h"

namespace py = pybind11;

namespace trn {

namespace {

using torch::jit::Stack;

// Python objects that outlive the interpreter's end on purpose: tensors may still die after it.
py::object* lower_callback = nullptr;
py::object* has_lowering_callback = nullptr;

const c10::DispatchKeySet kMetaKeys(c10::DispatchKey::Meta);

// The arguments of a call as meta tensors: same sizes, strides and dtypes, no values.
class MetaArguments {
 public:
  MetaArguments(const OpInfo& info, const Stack& args, const std::vector<bool>& on_device) : on_device_(on_device) {
    for (size_t i = 0; i < args.size(); ++i) {
      if (info.args[i].kind == ArgKind::Device && !args[i].isNone()) {
        stack.emplace_back(c10::Device(c10::DeviceType::Meta));
      } else if (info.args[i].kind == ArgKind::Generator) {
        stack.emplace_back();
      } else {
        stack.push_back(convert(args[i], info.args[i].written));
      }
    }
  }

  // The arguments for Python. A number that torch has wrapped into a 0-dim CPU tensor is a number again: 1 of its kind,
  // since what it costs does not depend on its value.
  Stack for_python() const {
    Stack values = stack;
    for (auto& value : values) {
      if (!value.isTensor() || !value.toTensor().defined() || !value.toTensor().is_cpu()) continue;
      const at::Tensor number = value.toTensor();
      if (number.is_floating_point() || number.is_complex()) {
        value = 1.0;
      } else if (number.scalar_type() == at::kBool) {
        value = at::empty_strided({}, {}, number.options().device(c10::kMeta));
      } else {
        value = int64_t{1};
      }
    }
    return values;
  }

  std::vector<c10::StorageImpl*> storages() const {
    std::vector<c10::StorageImpl*> all;
    for (const auto& operand : operands) {
      all.push_back(operand.tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    }
    return all;
  }

  Stack stack;
  std::vector<MetaOperand> operands;  // in the order in which the eager path numbers them

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
    at::Tensor meta = tensor;
    // A CPU number stays one: Python meta kernels ask for its value.
    if (on_device_.at(operands.size()) || tensor.dim() > 0) {
      meta = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
      if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) meta.unsafeGetTensorImpl()->set_wrapped_number(true);
      if (tensor.is_conj()) meta._set_conj(true);
      if (tensor.is_neg()) meta._set_neg(true);
    }
    operands.push_back({meta, written});
    return meta;
  }

  const std::vector<bool>& on_device_;
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

CostEntry* make_entry(OpInfo& info, const Stack& args, const Stack& results,
                      const std::vector<c10::StorageImpl*>& inputs) {
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

// The result of a pointwise operator that allocates it, as a meta tensor. torch's own meta kernels of these are in
// Python and import its compiler on their first call, which takes seconds. The dtype is that of the operator on tensors
// without elements; the sizes are the broadcast ones, the strides those that TensorIterator gives.
std::optional<Stack> pointwise_results(const OpInfo& info, const MetaArguments& meta) {
  if (info.num_returns != 1 || !info.op.hasTag(at::Tag::pointwise) || info.draws_unasked) return std::nullopt;
  // In place: what is written keeps its sizes. Without data no kernel will look whether the others fit: torch's does.
  if (info.args[0].written && meta.stack[0].isTensor()) {
    if (without_data()) return std::nullopt;
    return Stack{meta.stack[0]};
  }
  Stack small = meta.stack;
  auto config = at::TensorIteratorConfig();
  config.set_check_mem_overlap(false).check_all_same_dtype(false).check_all_same_device(false);
  at::Tensor out;
  std::vector<at::Tensor> inputs;
  for (size_t i = 0; i < small.size(); ++i) {
    const ArgInfo& arg = info.args[i];
    if (arg.written || arg.kind == ArgKind::TensorList || arg.kind == ArgKind::Generator) return std::nullopt;
    if (arg.name == "memory_format" && !small[i].isNone()) return std::nullopt;
    if (!small[i].isTensor() || !small[i].toTensor().defined()) continue;
    const at::Tensor tensor = small[i].toTensor();
    if (tensor.is_conj() || tensor.is_neg()) return std::nullopt;
    inputs.push_back(tensor.is_cpu() ? at::empty_strided({}, {}, tensor.options().device(c10::kMeta)) : tensor);
    if (tensor.is_cpu()) continue;
    at::Tensor none =
        at::empty(std::vector<int64_t>(static_cast<size_t>(tensor.dim()), 0), tensor.options().device(c10::kCPU));
    if (tensor.dim() == 0) none.zero_();
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) none.unsafeGetTensorImpl()->set_wrapped_number(true);
    small[i] = none;
  }
  info.op.redispatchBoxed(kCpuKeys, &small);
  if (!small.back().isTensor() || small.back().toTensor().layout() != c10::kStrided) return std::nullopt;
  config.add_output(out).declare_static_dtype(small.back().toTensor().scalar_type()).declare_static_device(c10::kMeta);
  for (const auto& input : inputs) config.add_const_input(input);
  auto iterator = config.build();
  return Stack{iterator.output()};
}

// `out=` of a pointwise operator, where it has the sizes of the result or is empty and will get them.
std::optional<Stack> pointwise_out(const OpInfo& info, const MetaArguments& meta) {
  if (!info.op.hasTag(at::Tag::pointwise) || !info.args.back().written || !meta.stack.back().isTensor()) {
    return std::nullopt;
  }
  if (without_data()) return std::nullopt;  // torch's looks at the dtype of `out`, and no other kernel will
  std::vector<int64_t> sizes;
  bool contiguous = true;
  for (size_t i = 0; i + 1 < meta.stack.size(); ++i) {
    if (info.args[i].written || info.args[i].kind == ArgKind::TensorList) return std::nullopt;
    if (!meta.stack[i].isTensor() || !meta.stack[i].toTensor().defined()) continue;
    sizes = at::infer_size(sizes, meta.stack[i].toTensor().sizes());
    contiguous = contiguous && meta.stack[i].toTensor().is_contiguous();
  }
  const at::Tensor out = meta.stack.back().toTensor();
  if (out.sizes() != sizes) {
    if (out.numel() > 0 || !contiguous) return std::nullopt;
    out.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
  return Stack{out};
}

// The results as meta tensors, or nothing (and the reason) when their sizes cannot be told from those of the arguments.
std::optional<Stack> meta_results(const OpInfo& info, const MetaArguments& meta, std::exception_ptr* why) {
  const auto keep_reason = [why] {
    if (why != nullptr) *why = std::current_exception();
  };
  try {
    if (auto pointwise = pointwise_results(info, meta)) return pointwise;
    if (auto out = pointwise_out(info, meta)) return out;
    if (auto predicted = predict(info, meta.stack)) return predicted;
    Stack results = meta.stack;
    info.op.redispatchBoxed(kMetaKeys, &results);
    correct_results(info, meta.stack, results);
    return results;
  } catch (python_error& error) {
    py::gil_scoped_acquire gil;
    if (PyErr_GivenExceptionMatches(error.type, PyExc_KeyboardInterrupt)) throw;
    keep_reason();
  } catch (py::error_already_set& error) {
    py::gil_scoped_acquire gil;
    if (error.matches(PyExc_KeyboardInterrupt)) throw;
    keep_reason();
  } catch (const std::exception&) {
    // No meta kernel, sizes that depend on values, or a wrong call: the CPU kernel will tell.
    keep_reason();
  }
  return std::nullopt;
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

bool lacks_meta(const std::exception_ptr& why) {
  const auto asks_for_values = [](const std::string& text) {
    return text.find("meta tensor") != std::string::npos || text.find("Meta") != std::string::npos;
  };
  try {
    std::rethrow_exception(why);
  } catch (const c10::NotImplementedError&) {
    return true;
  } catch (python_error& error) {
    py::gil_scoped_acquire gil;
    if (PyErr_GivenExceptionMatches(error.type, PyExc_NotImplementedError)) return true;
    return asks_for_values(py::str(py::handle(error.value)));
  } catch (py::error_already_set& error) {
    py::gil_scoped_acquire gil;
    return error.matches(PyExc_NotImplementedError) || asks_for_values(error.what());
  } catch (const std::exception& error) {
    return asks_for_values(error.what());
  }
}

CostEntry* price_before(OpInfo& info, const Stack& args, const std::vector<bool>& on_device, Reserve reserve,
                        std::exception_ptr* why) {
  if (settings().strict && !has_lowering(info)) check_strict(info, true);
  at::DisableRecordFunctionGuard unseen;  // a profile shows the user's operators, not those of pricing
  const MetaArguments meta(info, args, on_device);
  const std::optional<Stack> results = meta_results(info, meta, why);
  if (!results.has_value()) return nullptr;
  const std::vector<c10::StorageImpl*> inputs = meta.storages();
  Prediction prediction;
  prediction.fresh_bytes = fresh_bytes(inputs, *results);
  for (size_t i = 0; i < meta.operands.size(); ++i) {
    if (!meta.operands[i].written) continue;
    const uint64_t bytes = bytes_needed(meta.operands[i].tensor.unsafeGetTensorImpl());
    prediction.growth.push_back({static_cast<int32_t>(i), bytes});
  }
  reserve(prediction);
  CostEntry* entry = make_entry(info, meta.for_python(), *results, inputs);
  check_strict(info, entry->host);
  entry->fresh_bytes = std::move(prediction.fresh_bytes);
  entry->growth = std::move(prediction.growth);
  if (without_data()) entry->layout = make_layout(info, meta.operands, *results);
  return entry;
}

CostEntry* price_after(OpInfo& info, const Stack& args, const std::vector<bool>& on_device, const Stack& results) {
  at::DisableRecordFunctionGuard unseen;
  const MetaArguments meta(info, args, on_device);
  std::vector<c10::StorageImpl*> inputs;
  for_each_tensor(args, [&](const at::Tensor& tensor) {
    inputs.push_back(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  });
  CostEntry* entry = make_entry(info, meta.for_python(), results, inputs);
  entry->awaited = true;
  return entry;
}

}  // namespace trn
