// Values of operators for arguments that torch's CPU kernels refuse but accelerators take: histc of integers.
#include <ATen/Dispatch.h>
#include <ATen/core/stack.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/zeros.h>

#include "eager.h"

namespace trn {

namespace {

// As CUDA counts integers: the bin is (x - low) * bins / (high - low) in 64 bits, the last one holds `high` too, and
// what lies outside counts for nothing. Without a range it is that of the data, widened by 1 on each side if empty.
at::Tensor count_integers(const at::Tensor& self, int64_t bins, int64_t low, int64_t high) {
  TORCH_CHECK(bins > 0, "bins must be > 0");
  if (low == high && self.numel() > 0) {
    const auto [least, most] = at::aminmax(self);
    low = least.item().toLong();
    high = most.item().toLong();
  }
  if (low == high) {
    low -= 1;
    high += 1;
  }
  TORCH_CHECK(low < high, "max must be larger than min");
  at::Tensor counts = at::zeros({bins}, self.options());
  const at::Tensor given = self.contiguous();
  AT_DISPATCH_INTEGRAL_TYPES(self.scalar_type(), "histc", [&] {
    const scalar_t* values = given.const_data_ptr<scalar_t>();
    scalar_t* result = counts.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < given.numel(); ++i) {
      const auto value = static_cast<int64_t>(values[i]);
      if (value < low || value > high) continue;
      const int64_t bin = (value - low) * bins / (high - low);
      result[bin == bins ? bins - 1 : bin] += 1;
    }
  });
  return counts;
}

bool histc(torch::jit::Stack* stack, size_t count) {
  const auto args = torch::jit::last(*stack, count);
  const at::Tensor self = args[0].toTensor();
  if (!at::isIntegralType(self.scalar_type(), false)) return false;
  at::Tensor result = count_integers(self, args[1].toInt(), args[2].toScalar().toLong(), args[3].toScalar().toLong());
  if (count > 4) {
    at::Tensor out = args[4].toTensor();
    TORCH_CHECK(out.scalar_type() == self.scalar_type(),
                "torch.histogram: input tensor and hist tensor should have the ", "same dtype, but got input ",
                self.scalar_type(), " and hist ", out.scalar_type());
    result = out.resize_(result.sizes()).copy_(result);
  }
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(result));
  return true;
}

}  // namespace

OwnValues own_values_of(const std::string& name, const std::string& overload) {
  if (name != "aten::histc") return nullptr;
  return overload.empty() ? +[](torch::jit::Stack* stack) { return histc(stack, 4); }
                          : +[](torch::jit::Stack* stack) { return histc(stack, 5); };
}

}  // namespace trn
