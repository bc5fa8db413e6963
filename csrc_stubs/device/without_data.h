// The eager path with numerics "none".
#pragma once

#include "eager.h"
#include "values.h"

namespace trn {

// Computes where all inputs have values and the results are small; everything else is made from its layout.
void run_without_data(OpInfo& info, torch::jit::Stack* stack);

// A tensor of a call as the meta kernel saw it, before and after.
struct MetaOperand {
  at::Tensor tensor;
  bool written;
};

// Changes the results of a meta kernel (for arguments that are meta tensors) to what the CPU kernel gives.
void correct_results(const OpInfo& info, const torch::jit::Stack& args, torch::jit::Stack& results);

// What a call gives and changes, from the results of its meta kernel.
std::shared_ptr<CallLayout> make_layout(const OpInfo& info, const std::vector<MetaOperand>& operands,
                                        const torch::jit::Stack& results);

// How many random numbers the CPU kernel of a call would draw. Raises when that depends on values.
uint64_t count_draws(const OpInfo& info, const torch::jit::Stack& args, const CallLayout& layout);

}  // namespace trn
