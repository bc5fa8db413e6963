// Typed kernels for the operators that small programs spend their time in. They take the same steps as the boxed
// kernel, without putting arguments and results on a stack, which costs most where there are lists of
// sizes.
#include <ATen/Operators.h>
#include <ATen/core/boxing/impl/boxing.h>
#include <torch/library.h>

#include "call.h"
#include "values.h"

namespace trn {

namespace {

// What stands for an argument in the CPU call. Values go into the key.
at::Tensor take(Call& call, const OpInfo& info, const ArgInfo& arg, const at::Tensor& tensor) {
  if (tensor.defined()) return take_tensor(call, info, arg, c10::MaybeOwned<at::Tensor>::borrowed(tensor));
  call.key.add(1);
  return tensor;
}
std::optional<at::Tensor> take(Call& call, const OpInfo& info, const ArgInfo& arg,
                               const std::optional<at::Tensor>& tensor) {
  if (tensor.has_value()) return take(call, info, arg, *tensor);
  call.key.add(1);
  return std::nullopt;
}
c10::SymIntArrayRef take(Call& call, const OpInfo&, const ArgInfo&, c10::SymIntArrayRef sizes) {
  call.key.add(sizes.size());
  for (const auto& size : sizes) call.key.add(static_cast<uint64_t>(size.guard_int(__FILE__, __LINE__)));
  return sizes;
}
const at::Scalar& take(Call& call, const OpInfo&, const ArgInfo&, const at::Scalar& number) {
  call.key.add(number.isIntegral(false) ? 4 : number.isFloatingPoint() ? 5 : number.isBoolean() ? 2 : 6);
  return number;
}
double take(Call& call, const OpInfo&, const ArgInfo&, double value) {
  call.key.add(5);
  return value;
}
int64_t take(Call& call, const OpInfo&, const ArgInfo&, int64_t value) {
  call.key.add(4);
  call.key.add(static_cast<uint64_t>(value));
  return value;
}
c10::SymInt take(Call& call, const OpInfo&, const ArgInfo&, c10::SymInt value) {
  call.key.add(4);
  call.key.add(static_cast<uint64_t>(value.guard_int(__FILE__, __LINE__)));
  return value;
}
bool take(Call& call, const OpInfo&, const ArgInfo&, bool value) {
  call.key.add(value ? 3 : 2);
  return value;
}
c10::string_view take(Call& call, const OpInfo&, const ArgInfo&, c10::string_view text) {
  call.key.add(std::hash<std::string_view>{}(text));
  return text;
}
std::optional<at::ScalarType> take(Call& call, const OpInfo&, const ArgInfo&, std::optional<at::ScalarType> dtype) {
  call.key.add(dtype.has_value() ? static_cast<uint64_t>(*dtype) + 8 : 1);
  return dtype;
}
std::array<bool, 3> take(Call& call, const OpInfo&, const ArgInfo&, std::array<bool, 3> mask) {
  call.key.add(static_cast<uint64_t>(mask[0] | mask[1] << 1 | mask[2] << 2));
  return mask;
}

template <typename T>
using Taken = decltype(take(std::declval<Call&>(), std::declval<const OpInfo&>(), std::declval<const ArgInfo&>(),
                            std::declval<T>()));

at::Tensor give(Call& call, const OpInfo& info, at::Tensor&& result) {
  return give_tensor(call, info, std::move(result));
}
template <typename... T>
std::tuple<T...> give(Call& call, const OpInfo& info, std::tuple<T...>&& results) {
  return std::apply([&](T&... result) { return std::tuple<T...>{give_tensor(call, info, std::move(result))...}; },
                    results);
}

torch::jit::Stack boxed(const at::Tensor& result) { return {result}; }
template <typename... T>
torch::jit::Stack boxed(const std::tuple<T...>& results) {
  return std::apply([](const T&... result) { return torch::jit::Stack{result...}; }, results);
}

template <typename Op, typename = typename Op::schema>
struct Typed;

template <typename Op, typename Result, typename... Args>
struct Typed<Op, Result(Args...)> {
  static Result run(Args... args) {
    static OpInfo& info = operator_info(c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name));
    if (C10_UNLIKELY(without_data() || settings().tile.load(std::memory_order_relaxed))) {
      return run_boxed(info, args...);
    }
    HolderScope holder(info.name.c_str());
    Call call;
    const ArgInfo* arg = info.args.data();
    std::tuple<Taken<Args>...> taken{take(call, info, *arg++, args)...};  // braces: from left to right
    settle_device(call);
    torch::jit::Stack kept;
    CostEntry* entry = prepare(call, info, [&] {
      return kept = std::apply([](auto&... value) { return c10::impl::boxArgs<Args...>(static_cast<Args>(value)...); },
                               taken);
    });
    if constexpr (std::is_reference_v<Result>) {
      compute(call.device, taken);
      finish(call, info, entry, kept, {call.operands.front().alias});
      return std::get<0>(std::forward_as_tuple(args...));
    } else {
      Result computed = compute(call.device, taken);
      if (C10_UNLIKELY(entry == nullptr)) entry = price_results(call, info, kept, boxed(computed));
      Result result = give(call, info, std::move(computed));
      account(*entry, call.device, entry->host || entry->awaited);
      return result;
    }
  }

 private:
  // The boxed kernel, for what is not done in a hurry.
  static Result run_boxed(OpInfo& info, Args... args) {
    torch::jit::Stack stack = c10::impl::boxArgs<Args...>(args...);
    run_operator(info, &stack);
    if constexpr (std::is_reference_v<Result>) {
      return std::get<0>(std::forward_as_tuple(args...));
    } else {
      return c10::impl::PopResult<Result>::call(stack);
    }
  }
  static Result compute(int device, std::tuple<Taken<Args>...>& taken) {
    CpuScope scope(device);
    return std::apply([](auto&... value) -> Result { return Op::redispatch(kCpuKeys, value...); }, taken);
  }
  static void finish(Call& call, OpInfo& info, CostEntry* entry, const torch::jit::Stack& kept,
                     const torch::jit::Stack& results) {
    if (C10_UNLIKELY(entry == nullptr)) entry = price_results(call, info, kept, results);
    sync_operands(call);
    account(*entry, call.device, entry->host || entry->awaited);
  }
};

template <typename Op>
void add(torch::Library& library) {
  std::string name = std::string(Op::name).substr(6);  // without "aten::"
  if (Op::overload_name[0] != '\0') name = name + "." + Op::overload_name;
  library.impl(name.c_str(), TORCH_FN((Typed<Op>::run)));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  add<at::_ops::add_Tensor>(m);
  add<at::_ops::add__Tensor>(m);
  add<at::_ops::sub_Tensor>(m);
  add<at::_ops::mul_Tensor>(m);
  add<at::_ops::mul__Tensor>(m);
  add<at::_ops::div_Tensor>(m);
  add<at::_ops::div__Tensor>(m);
  add<at::_ops::neg>(m);
  add<at::_ops::exp>(m);
  add<at::_ops::sqrt>(m);
  add<at::_ops::rsqrt>(m);
  add<at::_ops::relu>(m);
  add<at::_ops::gelu>(m);
  add<at::_ops::gelu_backward>(m);
  add<at::_ops::silu>(m);
  add<at::_ops::sigmoid>(m);
  add<at::_ops::tanh>(m);
  add<at::_ops::threshold_backward>(m);
  add<at::_ops::mm>(m);
  add<at::_ops::bmm>(m);
  add<at::_ops::addmm>(m);
  add<at::_ops::baddbmm>(m);
  add<at::_ops::_softmax>(m);
  add<at::_ops::_log_softmax>(m);
  add<at::_ops::native_layer_norm>(m);
  add<at::_ops::native_layer_norm_backward>(m);
  add<at::_ops::embedding>(m);
  add<at::_ops::zero_>(m);
}

}  // namespace

}  // namespace trn
