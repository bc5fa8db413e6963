// The eager path: one boxed kernel that runs an ATen operator on CPU aliases of its trn tensors and accounts for its
// time.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/FunctionRef.h>

#include "../core/system.h"

namespace trn {

enum class ArgKind : uint8_t { Tensor, TensorList, Number, Generator, Device, Value };

struct ArgInfo {
  ArgKind kind = ArgKind::Value;
  bool written = false;
  bool overwritten = false;  // written without being read, all of it
  bool cpu_allowed = false;  // CPU tensors of any size may stand here (indices, optimizer steps)
  std::string name;
};

using OwnValues = bool (*)(torch::jit::Stack* stack);

// What the eager path knows about one operator.
struct OpInfo {
  explicit OpInfo(const c10::OperatorHandle& op);

  c10::OperatorHandle op;
  std::string name;  // "aten::add.Tensor", or "aten::mm" without an overload
  std::vector<ArgInfo> args;
  size_t num_returns = 0;
  bool returns_value = false;         // a bool or number: the host has to wait for it
  bool numbers_matter = false;        // number arguments decide sizes or cost, so they are part of the key
  bool allows_cpu_scalars = false;    // 0-dim CPU tensors may mix with trn ones, as on CUDA
  bool draws = false;                 // draws random numbers
  bool draws_unasked = false;         // draws them without a generator argument
  bool needs_values = false;          // what it gives, or its size, depends on values
  bool in_place = false;              // all that it gives are arguments that it changes
  std::vector<size_t> returned_args;  // these, by number
  bool writes_unsaid = false;         // writes arguments (running statistics) that its schema does not mark
  bool tells_finite = false;          // its last written argument says whether the others are finite
  bool foreach = false;               // lists of tensors that may be on several devices, as on CUDA
  // Computes the results of arguments that the CPU kernel refuses though accelerators take them; false for others.
  OwnValues own_values = nullptr;
  CostTable costs;
};

class EagerKernel final : public c10::OperatorKernel {
 public:
  explicit EagerKernel(OpInfo& info) : info_(info) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

 private:
  OpInfo& info_;  // lives as long as the process
};

// Runs an operator through the eager path.
void run_operator(OpInfo& info, torch::jit::Stack* stack);
// The kernel of an operator by name; made on first use.
OpInfo& operator_info(const c10::OperatorHandle& op);

// Accounts for a kernel that was priced as `entry`: clocks, records, debug line.
void account(const CostEntry& entry, int device, bool host_waits);

// What is known of a call before its kernel runs.
struct Prediction {
  std::vector<uint64_t> fresh_bytes;
  std::vector<Growth> growth;
};
using Reserve = c10::function_ref<void(const Prediction&)>;

// Prices a call that the cache does not hold. `args` are its aliases in schema order, `on_device` says which of their
// tensors (by position) stand for trn ones. Before the kernel runs: the entry, or nullptr when the sizes of the results
// cannot be told from those of the arguments. `reserve` is called with the prediction before anything is lowered.
// A meta kernel that raised leaves its error in `*why`.
CostEntry* price_before(OpInfo& info, const torch::jit::Stack& args, const std::vector<bool>& on_device,
                        Reserve reserve, std::exception_ptr* why);
// Whether that error says that there is no such kernel, or that it would need values, and not that the call is wrong.
bool lacks_meta(const std::exception_ptr& why);
CostEntry* price_after(OpInfo& info, const torch::jit::Stack& args, const std::vector<bool>& on_device,
                       const torch::jit::Stack& results);

// Raises under TRN_STRICT=1 when an operator would run on the host.
void check_strict(const OpInfo& info, bool host);

struct Settings {
  std::atomic<bool> strict{false};
  std::atomic<bool> tile{false};  // values come from the executor
  std::atomic<int> debug{0};
};
Settings& settings();

// Module that operators of this thread belong to (0 is none).
int64_t exchange_module(int64_t module);
// Where in the program this thread is.
struct Place {
  int64_t module;  // as recorded for operators; 0 when modules are not
  bool backward;   // an autograd node runs, and no module that it calls (to recompute what a checkpoint left out)
};
Place place_of_this_thread();
// Remembers the module of an operator that costs nothing (a view), for its backward.
void note_module();
void forget_modules();
using StackCallback = int64_t (*)();
void set_stack_callback(StackCallback callback);

// See OpInfo::own_values; nullptr for an operator without any.
OwnValues own_values_of(const std::string& name, const std::string& overload);

void register_operators();

}  // namespace trn
