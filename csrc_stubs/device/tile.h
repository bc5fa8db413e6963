// numerics="tile": the values of an operator come from its Program.
#pragma once

#include <pybind11/pybind11.h>

#include "call.h"

namespace trn {

// `execute(name, args, outs, before)`: arguments and results as CPU tensors over the bytes of the trn ones, and what
// the written arguments held before the CPU kernel ran, as (tensor, copy) pairs.
void set_executor(pybind11::object execute);

// What an operator overwrites, kept while its CPU kernel finds out sizes and aliases.
class TileValues {
 public:
  TileValues(const OpInfo& info, const Call& call, const torch::jit::Stack& args);
  // Puts the Program's values in the place of the CPU kernel's.
  void compute(const OpInfo& info, const torch::jit::Stack& results);

 private:
  torch::jit::Stack args_;
  std::vector<bool> on_device_;
  std::vector<std::pair<at::Tensor, at::Tensor>> before_;
};

}  // namespace trn
