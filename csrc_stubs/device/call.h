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
  Operand(c10::MaybeOwned<at::Tensor> tensor, at::Tensor alias, int position, bool written)
      : tensor(std::move(tensor)), alias(std::move(alias)), position(position), written(written) {}
  c10::MaybeOwned<at::Tensor> tensor;
  at::Tensor alias;
  int position;  // among all tensors of the call
  bool written;
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
  at::Tensor first;  // first tensor met that must not be mixed with trn ones
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
// The device of a call whose arguments have been taken.
void settle_device(Call& call);

// The entry of the call with HBM for its results reserved, or nullptr when the results tell their sizes only after the
// kernel ran. `args` gives the aliases in schema order; it is called on a miss.
CostEntry* prepare(Call& call, OpInfo& info, c10::function_ref<torch::jit::Stack()> args);

// The entry of a call that prepare() could not price, from its results.
CostEntry* price_results(Call& call, OpInfo& info, const torch::jit::Stack& args, const torch::jit::Stack& results);

// The trn tensor for a result of the kernel.
at::Tensor give_tensor(Call& call, const OpInfo& info, at::Tensor&& result);
// Raises when a kernel gave a tensor that trn cannot have.
void check_result(const OpInfo& info, const at::Tensor& result);
// Brings what the kernel did to its operands back to the trn tensors.
void sync_operands(Call& call);

}  // namespace trn
