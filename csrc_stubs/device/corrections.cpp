// Where torch's meta kernels and its CPU kernels disagree about sizes or strides. HBM and later operators go by what
// the CPU gives. tests/test_none_sweep.py finds what is missing here.
#include <ATen/Context.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <numeric>
#include <unordered_map>

#include "without_data.h"

namespace trn {

namespace {

using torch::jit::Stack;
using Correction = void (*)(const OpInfo& info, const Stack& args, Stack& results);

const c10::IValue& argument(const OpInfo& info, const Stack& args, const char* name) {
  for (size_t i = 0; i < info.args.size(); ++i) {
    if (info.args[i].name == name) return args[i];
  }
  TORCH_INTERNAL_ASSERT(false, "trn: ", info.name, " has no argument ", name);
}

// The tensor in another order of memory: `order` from the outermost dimension to the innermost.
at::Tensor in_order(const at::Tensor& tensor, c10::IntArrayRef order) {
  std::vector<int64_t> strides(order.size());
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[static_cast<size_t>(order[i])] = stride;
    stride *= std::max<int64_t>(tensor.size(order[i]), 1);
  }
  return at::empty_strided(tensor.sizes(), strides, tensor.options());
}

at::Tensor column_major(const at::Tensor& tensor) {
  const int64_t dim = tensor.dim();
  if (dim < 2) return tensor;
  std::vector<int64_t> order(static_cast<size_t>(dim));
  std::iota(order.begin(), order.end(), 0);
  std::swap(order[static_cast<size_t>(dim) - 1], order[static_cast<size_t>(dim) - 2]);
  return in_order(tensor, order);
}

void correct_svd(const OpInfo&, const Stack&, Stack& results) { results[2] = column_major(results[2].toTensor()); }
// Without elements its strides are those of torch's own empty tensors.
void correct_nonzero_static(const OpInfo&, const Stack&, Stack& results) {
  const at::Tensor result = results[0].toTensor();
  results[0] = at::empty(result.sizes(), result.options());
}

void correct_eig(const OpInfo&, const Stack&, Stack& results) { results[1] = column_major(results[1].toTensor()); }

// In evaluation the CPU saves no statistics.
void correct_batch_norm(const OpInfo& info, const Stack& args, Stack& results) {
  if (argument(info, args, "training").toBool()) return;
  for (size_t i : {size_t{1}, size_t{2}}) results[i] = at::empty({0}, results[i].toTensor().options());
}

// Its memory is (batch, sequence, head, feature).
void correct_attention(const OpInfo&, const Stack&, Stack& results) {
  results[0] = in_order(results[0].toTensor(), {0, 2, 1, 3});
}

// The bag of each index is needed only where the sum is not taken in one pass; outside mode max (2), the indices of
// the maxima are a copy of the sizes of the bags.
void correct_embedding_bag(const OpInfo& info, const Stack& args, Stack& results) {
  const at::Tensor weight = argument(info, args, "weight").toTensor();
  const int64_t mode = argument(info, args, "mode").toInt();
  if (mode == 2) return;
  const auto options = results[1].toTensor().options();
  const auto& weights = argument(info, args, "per_sample_weights");
  const bool weighted = weights.isTensor() && weights.toTensor().defined();
  const auto dtype = weight.scalar_type();
  const bool fast = mode == 0 && (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) &&
                    weight.stride(1) == 1 && argument(info, args, "padding_idx").toInt() < 0 &&
                    (!weighted || weights.toTensor().stride(0) == 1);
  if (fast) results[1] = at::empty({0}, options);
  results[3] = at::empty(results[2].toTensor().sizes(), options);
}

// MKL leaves the transformed dimensions innermost, in the order in which it took them.
void correct_fft_r2c(const OpInfo& info, const Stack& args, Stack& results) {
  if (!at::hasMKL()) return;
  const at::Tensor self = argument(info, args, "self").toTensor();
  std::vector<int64_t> dims = argument(info, args, "dim").toIntVector();
  const auto by_stride = [&](int64_t a, int64_t b) { return self.stride(a) > self.stride(b); };
  std::sort(dims.begin(), dims.end() - 1, by_stride);
  std::vector<int64_t> order;
  for (int64_t i = 0; i < self.dim(); ++i) {
    if (std::find(dims.begin(), dims.end(), i) == dims.end()) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), by_stride);
  order.insert(order.end(), dims.begin(), dims.end());
  results[0] = in_order(results[0].toTensor(), order);
}

// A CPU tensor of these sizes and strides without memory, for those who look at nothing else.
at::Tensor without_memory(const at::Tensor& meta) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, c10::Device(c10::DeviceType::CPU)),
                    nullptr, false);
  auto tensor =
      c10::make_intrusive<c10::TensorImpl>(std::move(none), c10::DispatchKeySet(c10::DispatchKey::CPU), meta.dtype());
  tensor->set_sizes_and_strides(meta.sizes(), meta.strides(), meta.storage_offset());
  return at::Tensor(std::move(tensor));
}

// The CPU's memory format goes by the kernel that it chooses.
void correct_convolution(const OpInfo& info, const Stack& args, Stack& results) {
  const at::Tensor result = results[0].toTensor();
  if (result.dim() != 4 && result.dim() != 5) return;
  const auto list = [&](const char* name) { return argument(info, args, name).toIntVector(); };
  const at::Tensor input = without_memory(argument(info, args, "input").toTensor());
  const at::Tensor weight = without_memory(argument(info, args, "weight").toTensor());
  const auto& bias = argument(info, args, "bias");
  const bool biased = bias.isTensor() && bias.toTensor().defined();
  const std::optional<at::Tensor> bias_like =
      biased ? std::make_optional(without_memory(bias.toTensor())) : std::nullopt;
  const auto stride = list("stride"), padding = list("padding"), dilation = list("dilation"),
             output_padding = list("output_padding");
  const auto backend = at::native::select_conv_backend(
      input, weight, bias_like, c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(padding),
      c10::fromIntArrayRefSlow(dilation), argument(info, args, "transposed").toBool(),
      c10::fromIntArrayRefSlow(output_padding), argument(info, args, "groups").toInt(), std::nullopt);
  results[0] =
      at::empty(result.sizes(), result.options(), at::native::_determine_backend_memory_format(input, weight, backend));
}

const std::unordered_map<std::string, Correction>& corrections() {
  static const auto* table = new std::unordered_map<std::string, Correction>{
      {"aten::_linalg_svd", correct_svd},
      {"aten::convolution", correct_convolution},
      {"aten::linalg_eig", correct_eig},
      {"aten::native_batch_norm", correct_batch_norm},
      {"aten::_native_batch_norm_legit", correct_batch_norm},
      {"aten::_scaled_dot_product_flash_attention_for_cpu", correct_attention},
      {"aten::_embedding_bag", correct_embedding_bag},
      {"aten::nonzero_static", correct_nonzero_static},
      {"aten::_fft_r2c", correct_fft_r2c},
  };
  return *table;
}

}  // namespace

void correct_results(const OpInfo& info, const Stack& args, Stack& results) {
  const auto found = corrections().find(info.name);
  if (found != corrections().end()) found->second(info, args, results);
}

}  // namespace trn
