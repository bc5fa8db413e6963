// How many random numbers a CPU kernel would draw: its own answer for a few elements, carried on to many.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <unordered_set>

#include "call.h"
#include "generator.h"
#include "without_data.h"

namespace trn {

namespace {

using torch::jit::Stack;

// Kernels that draw for each element of what they write, whatever the values: in blocks of 16, or one by one.
const std::unordered_set<std::string> kByElement = {
    "aten::normal_",      "aten::uniform_",   "aten::random_",        "aten::bernoulli_",
    "aten::exponential_", "aten::geometric_", "aten::log_normal_",    "aten::cauchy_",
    "aten::normal",       "aten::bernoulli",  "aten::native_dropout", "aten::randperm",
};
constexpr int64_t kBlock = 16;

bool flag(const OpInfo& info, const Stack& args, const char* name, bool otherwise) {
  for (size_t i = 0; i < args.size(); ++i) {
    if (info.args[i].name == name) return args[i].isBool() ? args[i].toBool() : otherwise;
  }
  return otherwise;
}

// `count` elements of the same kind as `tensor`: a probability and a deviation that every kernel takes.
at::Tensor sample(const at::Tensor& tensor, int64_t count) {
  const auto options = at::dtype(tensor.scalar_type()).device(c10::kCPU);
  if (tensor.is_contiguous()) return at::full({count}, c10::isFloatingType(tensor.scalar_type()) ? 0.5 : 1.0, options);
  return at::full({count, 2}, c10::isFloatingType(tensor.scalar_type()) ? 0.5 : 1.0, options).select(1, 0);
}

// The draws of the call's kernel on `count` elements.
uint64_t drawn(const OpInfo& info, const Stack& args, int64_t count, int64_t elements) {
  const at::Generator scratch = new_generator(0);
  Stack stack;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto& value = args[i];
    if (info.args[i].kind == ArgKind::Generator) {
      stack.emplace_back(engine_of(scratch));
    } else if (value.isTensor() && value.toTensor().defined()) {
      stack.emplace_back(sample(value.toTensor(), count));
    } else if (value.isInt() && value.toInt() == elements && info.args[i].name == "n") {
      stack.emplace_back(count);  // randperm
    } else if (value.isIntList() && info.args[i].name == "size") {
      stack.emplace_back(std::vector<int64_t>{count});
    } else {
      stack.push_back(value);
    }
  }
  CpuScope scope(0);
  std::optional<DefaultGeneratorSwap> swap;
  if (info.draws_unasked) swap.emplace(scratch);
  info.op.redispatchBoxed(kCpuKeys, &stack);
  swap.reset();
  return scratch.get_offset();
}

uint64_t by_element(const OpInfo& info, const Stack& args, int64_t elements) {
  if (elements < 4 * kBlock) return drawn(info, args, elements, elements);
  const int64_t rest = elements % kBlock;
  const uint64_t fewer = drawn(info, args, 2 * kBlock + rest, elements);
  const uint64_t block = drawn(info, args, 3 * kBlock + rest, elements) - fewer;
  return fewer + block * static_cast<uint64_t>((elements - rest) / kBlock - 2);
}

// With one sample a category, or without replacement, it is a race of exponential times, one for each probability;
// else a uniform double for each sample.
uint64_t multinomial(const OpInfo& info, const Stack& args) {
  const at::Tensor probabilities = args[0].toTensor();
  const int64_t samples = args[1].toInt();
  const int64_t rows = probabilities.dim() == 2 ? probabilities.size(0) : 1;
  if (flag(info, args, "replacement", false) && samples > 1) return static_cast<uint64_t>(2 * rows * samples);
  static OpInfo& exponential = operator_info(c10::Dispatcher::singleton().findSchemaOrThrow("aten::exponential_", ""));
  const at::Tensor times = at::empty(probabilities.sizes(), probabilities.options().device(c10::kMeta));
  return by_element(exponential, {times, 1.0, c10::IValue()}, probabilities.numel());
}

bool draws_nothing(const OpInfo& info, const Stack& args) {
  if (!flag(info, args, "training", true) || !flag(info, args, "train", true)) return true;
  for (size_t i = 0; i < args.size(); ++i) {
    if (info.args[i].name == "dropout_p") return args[i].toDouble() == 0;
  }
  return false;
}

}  // namespace

uint64_t count_draws(const OpInfo& info, const Stack& args, const CallLayout& layout) {
  at::DisableRecordFunctionGuard unseen;
  const std::string& base = info.op.schema().name();
  if (draws_nothing(info, args)) return 0;
  if (base == "aten::multinomial") return multinomial(info, args);
  TORCH_CHECK(kByElement.count(base) > 0, "trn: ", info.name,
              " draws a number of random values that depends on the values of its arguments, and they, or its results, "
              "have none: numerics is \"none\". ",
              way_out());
  const Origin& drawn_for = layout.written.empty() ? layout.results.at(0).origin : layout.written[0].origin;
  return by_element(info, args, c10::multiply_integers(drawn_for.sizes));
}

}  // namespace trn
