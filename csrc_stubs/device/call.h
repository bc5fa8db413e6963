// One call through the eager path, from taking its arguments to giving its results. The boxed kernel and the typed ones
// share these steps.
#pragma once

#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>

#include "eager.h"
#include "storage.h"

namespace trn {

inline const c10::DispatchKeySet kCpuKeys(c10::DispatchKey::CPU);

// One trn tensor of a call, with the alias that stands for it.
struct Operand {
  Operand(c10::MaybeOwned<at::Tensor> tensor, at::Tensor alias, int position, const ArgInfo& arg)
      : tensor(std::move(tensor)),
        alias(std::move(alias)),
        position(position),
        written(arg.written),
        overwritten(arg.overwritten) {}
  c10::MaybeOwned<at::Tensor> tensor;
  at::Tensor alias;
  int position;  // among all tensors of the call
  bool written;
  bool overwritten;
};

struct Call {
  c10::SmallVector<Operand, 6> operands;
  c10::SmallVector<hbm::Block*, 4> reserved;                           // for results, in order of appearance
  c10::SmallVector<std::pair<const Operand*, hbm::Block*>, 2> growth;  // for operands whose storage grows
  // Storages that results share: the CPU's, and trn's.
  c10::SmallVector<std::pair<const c10::StorageImpl*, c10::StorageImpl*>, 2> fresh;
  size_t next_reserved = 0;
  int tensors = 0;  // met so far
  int device = -1;
  bool aliased = true;      // aliases are taken at once; without data only when it is known that a kernel will run
  at::Generator generator;  // not aliased: the trn generator of the call
  at::Tensor first;         // first tensor met that must not be mixed with trn ones
  Key key;

  Call();
  ~Call();
};

// Runs CPU kernels for the values: what was settled above the backend must not act a second time.
struct CpuScope {
  explicit CpuScope(int device);
  c10::impl::ExcludeDispatchKeyGuard below;
  PoolScope pool;
};

// The alias to put in the place of a tensor argument. Adds it to the key and checks its device.
at::Tensor take_tensor(Call& call, const OpInfo& info, const ArgInfo& arg, c10::MaybeOwned<at::Tensor> tensor);
void add_value(Key& key, const c10::IValue& value, bool numbers_matter);
// Replaces every trn tensor on the stack by its alias, building the key and checking devices in the same pass.
void take_arguments(Call& call, OpInfo& info, c10::IValue* args);
// The device of a call whose arguments have been taken.
void settle_device(Call& call);

// The entry of the call with HBM for its results reserved, or nullptr when the results tell their sizes only after the
// kernel ran. `args` gives the aliases in schema order; it is called on a miss. `*why` gets the error of the meta
// kernel.
CostEntry* prepare(Call& call, OpInfo& info, c10::function_ref<torch::jit::Stack()> args,
                   std::exception_ptr* why = nullptr);

// The entry of a call that prepare() could not price, from its results.
CostEntry* price_results(Call& call, OpInfo& info, const torch::jit::Stack& args, const torch::jit::Stack& results);

// The trn tensor for a result of the kernel.
at::Tensor give_tensor(Call& call, const OpInfo& info, at::Tensor&& result);
// Raises when a kernel gave a tensor that trn cannot have.
void check_result(const OpInfo& info, const at::Tensor& result);
// Runs the CPU kernel on a stack of aliases.
void call_cpu(OpInfo& info, torch::jit::Stack* stack, int device);
// Replaces the CPU results on the stack by trn tensors.
void give_results(Call& call, OpInfo& info, torch::jit::Stack* stack);
// Which tensors of the call, by position, are trn ones.
std::vector<bool> on_device(const Call& call);
// Takes over the HBM that was reserved for this many bytes, or gets it now.
hbm::Block* claim(int device, hbm::Block*& reserved, uint64_t bytes);
// Brings what the kernel did to its operands back to the trn tensors.
void sync_operands(Call& call);

}  // namespace trn
