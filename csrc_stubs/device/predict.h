// The results of frequent operators as meta tensors, without their Python Meta kernels.
#pragma once

#include <ATen/core/stack.h>

#include <optional>

#include "eager.h"

namespace trn {

// What an operator gives for meta arguments in schema order (`args`), or nothing when it is not one of those foreseen
// here: then its Meta kernel tells. Raises as the operator does when the arguments do not fit together.
std::optional<torch::jit::Stack> predict(const OpInfo& info, const torch::jit::Stack& args);

}  // namespace trn
