// Registers the eager path for every ATen operator that the CPU can run.
//
// A mere fallback would be asked last, after the composite kernels, which take operators apart: layer_norm and
// _foreach_* would never arrive whole and torch.profiler would count aten::mm twice. So each operator is registered by
// name.
#include <torch/library.h>

#include <unordered_map>
#include <unordered_set>

#include "eager.h"

namespace trn {

namespace {

// Composite operators that are worth more as a whole than as their parts: one lowering, one line in a profile.
const std::unordered_set<std::string> kWhole = {
    "aten::convolution",
    "aten::convolution_backward",
    "aten::embedding",
    "aten::clone",
    "aten::constant_pad_nd",
    "aten::repeat",
    "aten::mode",
    "aten::soft_margin_loss",
    "aten::soft_margin_loss_backward",
    "aten::_fused_rms_norm",
    "aten::_fused_rms_norm_backward",
};

// Operators whose number arguments decide the sizes of results or the instructions used.
bool numbers_matter(const std::string& base) {
  return base.rfind("aten::arange", 0) == 0 || base.rfind("aten::range", 0) == 0 || base.rfind("aten::pow", 0) == 0 ||
         base.rfind("aten::_foreach_pow", 0) == 0 || base == "aten::histc";
}

// In-place operators that do not look at what they write over.
const std::unordered_set<std::string> kOverwriting = {
    "aten::zero_",   "aten::fill_",          "aten::copy_",          "aten::normal_",    "aten::uniform_",
    "aten::random_", "aten::bernoulli_",     "aten::exponential_",   "aten::geometric_", "aten::log_normal_",
    "aten::cauchy_", "aten::_foreach_zero_", "aten::_foreach_copy_",
};

const std::unordered_set<std::string>& cpu_scalar_operators() {
  static const auto* names = new std::unordered_set<std::string>{
#include "cpu_scalar_operators.inc"
  };
  return *names;
}

bool is_tensor(const c10::TypePtr& type) {
  if (type->kind() == c10::TypeKind::OptionalType) {
    return is_tensor(type->expectRef<c10::OptionalType>().getElementType());
  }
  return type->kind() == c10::TypeKind::TensorType;
}

const c10::Type& without_optional(const c10::Type& type) {
  if (type.kind() == c10::TypeKind::OptionalType) {
    return without_optional(*type.expectRef<c10::OptionalType>().getElementType());
  }
  return type;
}

ArgKind kind_of(const c10::TypePtr& type) {
  if (is_tensor(type)) return ArgKind::Tensor;
  const c10::Type& bare = without_optional(*type);
  switch (bare.kind()) {
    case c10::TypeKind::ListType:
      return is_tensor(bare.expectRef<c10::ListType>().getElementType()) ? ArgKind::TensorList : ArgKind::Value;
    case c10::TypeKind::NumberType:
      return ArgKind::Number;
    case c10::TypeKind::GeneratorType:
      return ArgKind::Generator;
    case c10::TypeKind::DeviceObjType:
      return ArgKind::Device;
    default:
      return ArgKind::Value;
  }
}

bool may_be_on_cpu(const std::string& base, const c10::Argument& argument) {
  // As on CUDA: index tensors, and the step counts of optimizers.
  const bool indexing = base == "aten::index" || base == "aten::index_put" || base == "aten::index_put_" ||
                        base == "aten::_index_put_impl_" || base == "aten::_unsafe_index" ||
                        base == "aten::_unsafe_index_put";
  return (indexing && argument.name() == "indices") || argument.name() == "state_steps" ||
         (base.rfind("aten::_fused_", 0) == 0 && argument.name() == "lr") ||
         (base == "aten::tensor_split" && argument.name() == "tensor_indices_or_sections");
}

bool wanted(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  if (name.rfind("aten::", 0) != 0 || op.hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) return false;
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CPU)) return true;
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) return false;
  return kWhole.count(name) > 0 || name.rfind("aten::_foreach_", 0) == 0;
}

std::mutex& registry_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::unordered_map<c10::OperatorName, OpInfo*>& registry() {
  static auto* operators = new std::unordered_map<c10::OperatorName, OpInfo*>;
  return *operators;
}

void run_unregistered(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  TORCH_CHECK_NOT_IMPLEMENTED(op.hasKernelForDispatchKey(c10::DispatchKey::CPU), op.schema().operator_name(),
                              " has no kernel for dense tensors on trn: torch has none for dense CPU tensors either.");
  run_operator(operator_info(op), stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_unregistered>()); }

}  // namespace

OpInfo::OpInfo(const c10::OperatorHandle& handle) : op(handle) {
  const c10::FunctionSchema& schema = handle.schema();
  name = schema.name();
  if (!schema.overload_name().empty()) name += "." + schema.overload_name();
  bool has_generator = false;
  for (const c10::Argument& argument : schema.arguments()) {
    ArgInfo arg;
    arg.kind = kind_of(argument.type());
    arg.written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    arg.overwritten = arg.written && (argument.is_out() || (args.empty() && kOverwriting.count(schema.name()) > 0));
    arg.cpu_allowed = may_be_on_cpu(schema.name(), argument);
    arg.name = argument.name();
    has_generator = has_generator || arg.kind == ArgKind::Generator;
    args.push_back(std::move(arg));
  }
  num_returns = schema.returns().size();
  in_place = true;
  for (const c10::Argument& result : schema.returns()) {
    in_place = in_place && result.alias_info() != nullptr && result.alias_info()->isWrite();
    for (size_t i = 0; in_place && i < args.size(); ++i) {
      const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
      if (alias != nullptr && *alias == *result.alias_info()) returned_args.push_back(i);
    }
  }
  in_place = in_place && returned_args.size() == num_returns;
  for (const c10::Argument& result : schema.returns()) {
    const ArgKind kind = kind_of(result.type());
    returns_value = returns_value || (kind != ArgKind::Tensor && kind != ArgKind::TensorList);
  }
  foreach
    = schema.name().rfind("aten::_foreach_", 0) == 0;
  numbers_matter = trn::numbers_matter(schema.name());
  allows_cpu_scalars = cpu_scalar_operators().count(name) > 0 || foreach;
  own_values = own_values_of(schema.name(), schema.overload_name());
  writes_unsaid = name == "aten::native_batch_norm" || name == "aten::batch_norm_update_stats";
  draws_unasked = !has_generator && handle.hasTag(at::Tag::nondeterministic_seeded);
  tells_finite = schema.name() == "aten::_amp_foreach_non_finite_check_and_unscale_";
  draws = has_generator || draws_unasked;
  needs_values = handle.hasTag(at::Tag::data_dependent_output) || handle.hasTag(at::Tag::dynamic_output_shape);
}

OpInfo& operator_info(const c10::OperatorHandle& op) {
  std::lock_guard<std::mutex> lock(registry_mutex());
  OpInfo*& info = registry()[op.operator_name()];
  if (info == nullptr) info = new OpInfo(op);
  return *info;
}

void register_operators() {
  static auto* library =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (!op.has_value() || !wanted(*op)) continue;
    std::string key = name.name;
    if (!name.overload_name.empty()) key += "." + name.overload_name;
    library->impl(key.c_str(),
                  torch::CppFunction::makeFromBoxedFunctor(std::make_unique<EagerKernel>(operator_info(*op))));
  }
}

}  // namespace trn
