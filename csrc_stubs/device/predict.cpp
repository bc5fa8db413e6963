// torch registers Python functions as Meta kernels of many operators, even where it has native ones. Several of them
// import its compiler on their first call, which takes seconds. The operators that models spend their time in are
// predicted here: by torch's native shape functions where they exist (at::meta), by hand where not.
#include "predict.h"

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/boxing/impl/boxing.h>
#include <ATen/ops/_log_softmax_backward_data_meta_dispatch.h>
#include <ATen/ops/_log_softmax_meta_dispatch.h>
#include <ATen/ops/_softmax_backward_data_meta_dispatch.h>
#include <ATen/ops/_softmax_meta_dispatch.h>
#include <ATen/ops/addmm_meta_dispatch.h>
#include <ATen/ops/all_meta_dispatch.h>
#include <ATen/ops/any_meta_dispatch.h>
#include <ATen/ops/baddbmm_meta_dispatch.h>
#include <ATen/ops/bmm_meta_dispatch.h>
#include <ATen/ops/cat_meta_dispatch.h>
#include <ATen/ops/cumsum_meta_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm_meta_dispatch.h>
#include <ATen/ops/mean_meta_dispatch.h>
#include <ATen/ops/mm_meta_dispatch.h>
#include <ATen/ops/mse_loss_meta_dispatch.h>
#include <ATen/ops/nll_loss_backward_meta_dispatch.h>
#include <ATen/ops/nll_loss_forward_meta_dispatch.h>
#include <ATen/ops/sum_meta_dispatch.h>
#include <ATen/ops/tril_meta_dispatch.h>
#include <ATen/ops/triu_meta_dispatch.h>

#include <unordered_map>

#include "values.h"

namespace trn {

namespace {

using at::Tensor;
using torch::jit::Stack;
using Predictor = std::optional<Stack> (*)(const Stack&);

Tensor fresh(c10::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, at::TensorOptions().dtype(dtype).device(c10::kMeta));
}

Tensor fresh_like(const Tensor& tensor) { return fresh(tensor.sizes(), tensor.scalar_type()); }

Tensor tensor_or_none(const c10::IValue& value) { return value.isTensor() ? value.toTensor() : Tensor(); }

// Statistics of a normalization are kept in fp32 where 16-bit data comes with fp32 parameters.
at::ScalarType statistics_dtype(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const bool mixed =
      (weight.defined() && weight.scalar_type() == at::kFloat) || (bias.defined() && bias.scalar_type() == at::kFloat);
  return at::isReducedFloatingType(x.scalar_type()) && mixed ? at::kFloat : x.scalar_type();
}

std::optional<Stack> layer_norm(const Stack& args) {
  const Tensor x = args[0].toTensor();
  const auto normalized = static_cast<int64_t>(args[1].toIntVector().size());
  if (normalized < 1 || normalized > x.dim()) return std::nullopt;
  // What does not fit is for torch's kernel to name: without data no other looks.
  const c10::IntArrayRef inner = x.sizes().slice(static_cast<size_t>(x.dim() - normalized));
  if (inner != c10::IntArrayRef(args[1].toIntVector())) return std::nullopt;
  for (const Tensor& parameter : {tensor_or_none(args[2]), tensor_or_none(args[3])}) {
    if (parameter.defined() && parameter.sizes() != inner) return std::nullopt;
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  std::fill(sizes.end() - normalized, sizes.end(), 1);
  const at::ScalarType dtype = statistics_dtype(x, tensor_or_none(args[2]), tensor_or_none(args[3]));
  return Stack{fresh_like(x), fresh(sizes, dtype), fresh(sizes, dtype)};
}

std::optional<Stack> layer_norm_backward(const Stack& args) {
  const auto mask = args[7].toBoolList();
  const Tensor weight = tensor_or_none(args[5]), bias = tensor_or_none(args[6]);
  return Stack{mask[0] ? fresh_like(args[1].toTensor()) : Tensor(),
               mask[1] && weight.defined() ? fresh_like(weight) : Tensor(),
               mask[2] && bias.defined() ? fresh_like(bias) : Tensor()};
}

// Whether the tensors among the arguments 1 to `end` have one element for each channel of `x`.
bool are_of_channels(const Tensor& x, const Stack& args, size_t end) {
  if (x.dim() < 2) return false;
  for (size_t i = 1; i < end; ++i) {
    const Tensor parameter = tensor_or_none(args[i]);
    if (parameter.defined() && (parameter.dim() != 1 || parameter.size(0) != x.size(1))) return false;
  }
  return true;
}

std::optional<Stack> group_norm(const Stack& args) {
  const Tensor x = args[0].toTensor();
  if (x.suggest_memory_format() != at::MemoryFormat::Contiguous || !are_of_channels(x, args, 3)) return std::nullopt;
  const int64_t groups = args[6].toInt();
  if (groups < 1 || x.size(1) % groups != 0 || args[4].toInt() != x.size(1)) return std::nullopt;
  const std::vector<int64_t> sizes{args[3].toInt(), args[6].toInt()};
  const at::ScalarType dtype = statistics_dtype(x, tensor_or_none(args[1]), tensor_or_none(args[2]));
  return Stack{fresh_like(x), fresh(sizes, dtype), fresh(sizes, dtype)};
}

std::optional<Stack> batch_norm(const Stack& args) {
  const Tensor x = args[0].toTensor();
  if (x.dim() < 2 || !x.is_contiguous() || !are_of_channels(x, args, 5)) return std::nullopt;
  const at::ScalarType dtype = statistics_dtype(x, tensor_or_none(args[1]), tensor_or_none(args[2]));
  const int64_t channels = args[5].toBool() ? x.size(1) : 0;
  return Stack{fresh_like(x), fresh({channels}, dtype), fresh({channels}, dtype)};
}

std::optional<Stack> dropout(const Stack& args) {
  const Tensor x = args[0].toTensor();
  if (!x.is_contiguous()) return std::nullopt;
  return Stack{fresh_like(x), fresh(x.sizes(), at::kBool)};
}

std::optional<Stack> mean_of_all(const Stack& args) {
  const at::ScalarType dtype = args[1].isNone() ? args[0].toTensor().scalar_type() : args[1].toScalarType();
  if (at::isIntegralType(dtype, true)) return std::nullopt;  // an error, which torch's kernel raises
  return Stack{fresh({}, dtype)};
}

template <auto* function>
std::optional<Stack> native(const Stack& args) {
  static const c10::KernelFunction kernel = c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(function));
  static const auto any = c10::Dispatcher::singleton().findSchemaOrThrow("aten::empty", "memory_format");
  Stack stack = args;
  kernel.callBoxed(any, c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  return stack;
}

// One of several overloads of a shape function.
template <typename F>
constexpr F* overload(F* function) {
  return function;
}

const std::unordered_map<std::string, Predictor>& predictors() {
  using Dims = at::OptionalIntArrayRef;
  using Dtype = std::optional<at::ScalarType>;
  using Reduction = Tensor(const Tensor&, Dims, bool, Dtype);
  using Test = Tensor(const Tensor&);
  using TestDim = Tensor(const Tensor&, int64_t, bool);
  using TestDims = Tensor(const Tensor&, Dims, bool);
  static const auto* table = new std::unordered_map<std::string, Predictor>{
      {"aten::addmm", &native<&at::meta::addmm>},
      {"aten::mm", &native<&at::meta::mm>},
      {"aten::bmm", &native<&at::meta::bmm>},
      {"aten::baddbmm", &native<&at::meta::baddbmm>},
      {"aten::cat", &native<&at::meta::cat>},
      {"aten::mean", &mean_of_all},
      {"aten::mean.dim", &native<overload<Reduction>(&at::meta::mean)>},
      {"aten::sum.dim_IntList", &native<overload<Reduction>(&at::meta::sum)>},
      {"aten::any", &native<overload<Test>(&at::meta::any)>},
      {"aten::any.dim", &native<overload<TestDim>(&at::meta::any)>},
      {"aten::any.dims", &native<overload<TestDims>(&at::meta::any)>},
      {"aten::all", &native<overload<Test>(&at::meta::all)>},
      {"aten::all.dim", &native<overload<TestDim>(&at::meta::all)>},
      {"aten::all.dims", &native<overload<TestDims>(&at::meta::all)>},
      {"aten::linalg_vector_norm", &native<&at::meta::linalg_vector_norm>},
      {"aten::cumsum", &native<overload<Tensor(const Tensor&, int64_t, Dtype)>(&at::meta::cumsum)>},
      {"aten::tril", &native<&at::meta::tril>},
      {"aten::triu", &native<&at::meta::triu>},
      {"aten::_softmax", &native<&at::meta::_softmax>},
      {"aten::_log_softmax", &native<&at::meta::_log_softmax>},
      {"aten::_softmax_backward_data", &native<&at::meta::_softmax_backward_data>},
      {"aten::_log_softmax_backward_data", &native<&at::meta::_log_softmax_backward_data>},
      {"aten::mse_loss", &native<&at::meta::mse_loss>},
      {"aten::nll_loss_forward", &native<&at::meta::nll_loss_forward>},
      {"aten::nll_loss_backward", &native<&at::meta::nll_loss_backward>},
      {"aten::native_layer_norm", &layer_norm},
      {"aten::native_layer_norm_backward", &layer_norm_backward},
      {"aten::native_dropout", &dropout},
      {"aten::native_group_norm", &group_norm},
      {"aten::native_batch_norm", &batch_norm},
  };
  return *table;
}

// Writes its one tensor, whose sizes stay: random numbers, tril_, cumsum_...
bool only_writes_self(const OpInfo& info) {
  if (info.num_returns != 1 || info.args.empty() || info.op.hasTag(at::Tag::inplace_view)) return false;
  const c10::FunctionSchema& schema = info.op.schema();
  if (schema.name().back() != '_' || !info.args[0].written || info.args[0].kind != ArgKind::Tensor) return false;
  for (size_t i = 1; i < info.args.size(); ++i) {
    if (info.args[i].kind == ArgKind::Tensor || info.args[i].kind == ArgKind::TensorList) return false;
  }
  return true;
}

}  // namespace

std::optional<Stack> predict(const OpInfo& info, const Stack& args) {
  // Without data no kernel checks the other arguments afterwards, unless it draws from a distribution.
  if ((!without_data() || info.draws) && only_writes_self(info)) return Stack{args[0]};
  const auto found = predictors().find(info.name);
  return found == predictors().end() ? std::nullopt : found->second(args);
}

}  // namespace trn
