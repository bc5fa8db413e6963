// Results from their sizes alone: what a meta kernel said of a call, kept, and made into tensors again.
#include "without_data.h"

namespace trn {

namespace {

const c10::StorageImpl* const_storage_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

Origin origin_from(const OpInfo& info, const at::Tensor& tensor) {
  return {info.name.c_str(), tensor.scalar_type(), tensor.sizes().vec()};
}

class LayoutMaker {
 public:
  LayoutMaker(const OpInfo& info, const std::vector<MetaOperand>& operands) : info_(info), operands_(operands) {}

  ResultLayout result(const at::Tensor& tensor) {
    ResultLayout layout;
    layout.defined = tensor.defined();
    if (!layout.defined) return layout;
    layout.origin = origin_from(info_, tensor);
    layout.strides = tensor.strides().vec();
    layout.offset = tensor.storage_offset();
    layout.conj = tensor.is_conj();
    layout.neg = tensor.is_neg();
    for (size_t i = 0; i < operands_.size(); ++i) {
      const at::Tensor& operand = operands_[i].tensor;
      const bool same = operand.is_same(tensor);
      if (!same && const_storage_of(operand) != const_storage_of(tensor)) continue;
      layout.operand = static_cast<int32_t>(i);
      layout.same = same;
      if (same) return layout;
    }
    if (layout.operand < 0) layout.fresh = fresh(const_storage_of(tensor));
    return layout;
  }

 private:
  int32_t fresh(const c10::StorageImpl* storage) {
    const auto found = std::find(fresh_.begin(), fresh_.end(), storage);
    const auto index = static_cast<int32_t>(found - fresh_.begin());
    if (found == fresh_.end()) fresh_.push_back(storage);
    return index;
  }

  const OpInfo& info_;
  const std::vector<MetaOperand>& operands_;
  std::vector<const c10::StorageImpl*> fresh_;
};

}  // namespace

std::shared_ptr<CallLayout> make_layout(const OpInfo& info, const std::vector<MetaOperand>& operands,
                                        const torch::jit::Stack& results) {
  auto layout = std::make_shared<CallLayout>();
  LayoutMaker maker(info, operands);
  for (const auto& value : results) {
    if (value.isTensor()) {
      layout->returns.push_back({ReturnLayout::Kind::Tensor, 1, {}});
      layout->results.push_back(maker.result(value.toTensor()));
    } else if (value.isTensorList()) {
      const auto items = value.toListRef();
      layout->returns.push_back({ReturnLayout::Kind::List, items.size(), {}});
      for (const auto& item : items) layout->results.push_back(maker.result(item.toTensor()));
    } else {
      layout->returns.push_back({ReturnLayout::Kind::Value, 0, value});
    }
  }
  for (size_t i = 0; i < operands.size(); ++i) {
    if (!operands[i].written) continue;
    const at::Tensor& tensor = operands[i].tensor;
    layout->written.push_back({origin_from(info, tensor), tensor.strides().vec(), static_cast<int32_t>(i)});
  }
  return layout;
}

}  // namespace trn
