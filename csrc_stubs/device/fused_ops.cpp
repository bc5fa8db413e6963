// Operators that torch sends to accelerators only: fused attention, overrideable convolution, and the RNN cells.
#include <ATen/Functions.h>
#include <ATen/SDPBackend.h>
#include <ATen/TensorOperators.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include "storage.h"
#include "values.h"

namespace trn {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The choice that the CPU makes for the same shapes, so that both devices compute the same way: its flash kernel, or
// the operator's parts.
int64_t choose_attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                         double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  const bool mask_gradient = mask.has_value() && mask->defined() && mask->requires_grad();
  if (mask_gradient) return static_cast<int64_t>(at::SDPBackend::math);
  // The fused form here is the CPU's flash kernel: sdpa_kernel(OVERRIDEABLE) asks for it by the name it has on trn.
  const bool flash = at::globalContext().userEnabledFlashSDP();
  const bool fused = at::globalContext().userEnabledOverrideableSDP();
  if (fused && !flash) at::globalContext().setSDPUseFlash(true);
  struct Restore {
    bool flash;
    ~Restore() { at::globalContext().setSDPUseFlash(flash); }
  } restore{flash};
  if (!fused) return static_cast<int64_t>(at::SDPBackend::math);
  // The choice goes by sizes and dtypes alone.
  auto alias = [](const Tensor& tensor) {
    if (tensor.device().type() != kTrn) return tensor;
    return without_data() ? hollow_alias(tensor) : cpu_alias(tensor);
  };
  OptionalTensor mask_alias;
  if (mask.has_value() && mask->defined()) mask_alias = alias(*mask);
  const int64_t choice = at::_fused_sdp_choice(alias(query), alias(key), alias(value), mask_alias, dropout_p, is_causal,
                                               scale, enable_gqa);
  return choice == static_cast<int64_t>(at::SDPBackend::flash_attention)
             ? static_cast<int64_t>(at::SDPBackend::overrideable)
             : static_cast<int64_t>(at::SDPBackend::math);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias, double dropout_p,
    bool is_causal, bool, std::optional<double> scale) {
  auto [output, logsumexp] =
      at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, bias, scale);
  // The random state of dropout: torch sends dropout to the operator's parts, so there is none.
  Tensor seed = at::empty({0}, at::dtype(at::kLong).device(query.device()));
  return {output, logsumexp, Tensor(), Tensor(), query.sym_size(2), key.sym_size(2), seed, seed, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
    std::array<bool, 4>, const Tensor& out, const Tensor& logsumexp, const Tensor&, const Tensor&, c10::SymInt,
    c10::SymInt, double dropout_p, bool is_causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  OptionalTensor mask;
  if (bias.defined()) mask = bias;
  auto [grad_query, grad_key, grad_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, mask, scale);
  return {grad_query, grad_key, grad_value, Tensor()};
}

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  return at::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, at::IntArrayRef stride,
                                                        at::IntArrayRef padding, at::IntArrayRef dilation,
                                                        bool transposed, at::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> output_mask) {
  const std::vector<int64_t> bias_sizes{grad_output.size(1)};
  return at::convolution_backward(grad_output, input, weight, at::OptionalIntArrayRef(bias_sizes), stride, padding,
                                  dilation, transposed, output_padding, groups, output_mask);
}

// The cells that RNNs use on accelerators have no CPU kernel. Given one here (the CPU never calls them itself), they
// take the eager path like every other operator.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
                                             const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  Tensor gates = input_gates + hidden_gates;
  if (input_bias.has_value() && input_bias->defined()) gates.add_(*input_bias);
  if (hidden_bias.has_value() && hidden_bias->defined()) gates.add_(*hidden_bias);
  auto parts = gates.unsafe_chunk(4, 1);  // input, forget, cell, output
  Tensor in = parts[0].sigmoid_(), forget = parts[1].sigmoid_(), cell = parts[2].tanh_(), out = parts[3].sigmoid_();
  Tensor cy = forget * cx + in * cell;
  Tensor hy = out * cy.tanh();
  return {hy, cy, gates};  // the chunks are views: `gates` now holds the activations that backward needs
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_hy, const OptionalTensor& grad_cy,
                                                      const Tensor& cx, const Tensor& cy, const Tensor& workspace,
                                                      bool has_bias) {
  const bool has_hy = grad_hy.has_value() && grad_hy->defined();
  const bool has_cy = grad_cy.has_value() && grad_cy->defined();
  if (!has_hy && !has_cy) return {};
  auto parts = workspace.unsafe_chunk(4, 1);
  const Tensor &in = parts[0], &forget = parts[1], &cell = parts[2], &out = parts[3];
  const Tensor tanh_cy = cy.tanh();
  const Tensor ghy = has_hy ? *grad_hy : at::zeros_like(cx);
  Tensor gcy = ghy * out * (1 - tanh_cy * tanh_cy);
  if (has_cy) gcy = gcy + *grad_cy;
  Tensor grad_gates = at::cat({gcy * cell * in * (1 - in), gcy * cx * forget * (1 - forget),
                               gcy * in * (1 - cell * cell), ghy * tanh_cy * out * (1 - out)},
                              1);
  Tensor grad_bias = has_bias ? grad_gates.sum(0) : Tensor();
  return {grad_gates, gcy * forget, grad_bias};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx,
                                    const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  const bool biased = input_bias.has_value() && input_bias->defined();
  const Tensor igates = biased ? input_gates + *input_bias : input_gates;
  const Tensor hgates = biased ? hidden_gates + *hidden_bias : hidden_gates;
  auto i = igates.unsafe_chunk(3, 1);  // reset, update, new
  auto h = hgates.unsafe_chunk(3, 1);
  const Tensor reset = (i[0] + h[0]).sigmoid();
  const Tensor update = (i[1] + h[1]).sigmoid();
  const Tensor fresh = (i[2] + reset * h[2]).tanh();
  const Tensor hy = fresh + update * (hx - fresh);
  return {hy, at::cat({reset, update, fresh, hx, h[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_hy, const Tensor& workspace,
                                                                     bool has_bias) {
  auto parts = workspace.unsafe_chunk(5, 1);
  const Tensor &reset = parts[0], &update = parts[1], &fresh = parts[2], &hx = parts[3], &hidden_new = parts[4];
  const Tensor grad_update = grad_hy * (hx - fresh) * update * (1 - update);
  const Tensor grad_fresh = grad_hy * (1 - update) * (1 - fresh * fresh);
  const Tensor grad_reset = grad_fresh * hidden_new * reset * (1 - reset);
  Tensor grad_input = at::cat({grad_reset, grad_update, grad_fresh}, 1);
  Tensor grad_hidden = at::cat({grad_reset, grad_update, grad_fresh * reset}, 1);
  return {grad_input, grad_hidden, grad_hy * update, has_bias ? grad_input.sum(0) : Tensor(),
          has_bias ? grad_hidden.sum(0) : Tensor()};
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
}

// Of these torch has no meta kernel.
TORCH_LIBRARY_IMPL(aten, Meta, m) {
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

}  // namespace

}  // namespace trn

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &trn::choose_attention)
}  // namespace at::native
