#include "tile.h"

#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "eager.h"

namespace py = pybind11;

namespace trn {

namespace {

py::object* execute_callback = nullptr;

// All bytes of a tensor's storage, as they lie.
at::Tensor bytes_of(const at::Tensor& tensor) {
  const c10::Storage storage = tensor.storage();
  return at::from_blob(storage.mutable_data(), {static_cast<int64_t>(storage.nbytes())}, at::dtype(at::kByte));
}

// A number that torch has wrapped into a 0-dim CPU tensor is a number again, as for the lowerings.
c10::IValue unwrapped(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kBool) return tensor;
  if (tensor.is_floating_point()) return tensor.item().toDouble();
  if (tensor.is_complex()) return tensor;
  return tensor.item().toLong();
}

}  // namespace

void set_executor(py::object execute) { execute_callback = new py::object(std::move(execute)); }

TileValues::TileValues(const OpInfo& info, const Call& call, const torch::jit::Stack& args) : args_(args) {
  on_device_.assign(static_cast<size_t>(call.tensors), false);
  for (const Operand& operand : call.operands) {
    on_device_[static_cast<size_t>(operand.position)] = true;
    if ((operand.written || info.writes_unsaid) && operand.alias.storage().nbytes() > 0) {
      before_.emplace_back(operand.alias, bytes_of(operand.alias).clone());
    }
  }
}

void TileValues::compute(const OpInfo& info, const torch::jit::Stack& results) {
  at::DisableRecordFunctionGuard unseen;
  py::gil_scoped_acquire gil;
  py::list args, outs, before;
  size_t position = 0;
  for (const auto& value : args_) {
    if (value.isTensor() && value.toTensor().defined()) {
      const at::Tensor tensor = value.toTensor();
      const bool number = !on_device_.at(position++) && tensor.dim() == 0;
      args.append(torch::jit::toPyObject(number ? unwrapped(tensor) : value));
      continue;
    }
    if (value.isTensorList() || value.isOptionalTensorList()) {
      for (const auto& item : value.toListRef()) position += item.isTensor() && item.toTensor().defined();
    }
    args.append(torch::jit::toPyObject(value));
  }
  for (const auto& value : results) {
    if (value.isTensor() && value.toTensor().defined()) {
      outs.append(py::cast(value.toTensor()));
    } else if (value.isTensorList()) {
      for (const auto& item : value.toListRef()) outs.append(py::cast(item.toTensor()));
    }
  }
  for (const auto& [tensor, copy] : before_) {
    // A kernel that resized the storage has left the old bytes behind.
    if (tensor.storage().nbytes() == static_cast<size_t>(copy.numel())) {
      before.append(py::make_tuple(bytes_of(tensor), copy));
    }
  }
  try {
    (*execute_callback)(info.name, args, outs, before);
  } catch (py::error_already_set& error) {
    error.restore();
    python_error raised;
    raised.persist();
    throw raised;
  }
}

}  // namespace trn
