#include "values.h"

#include <ATen/EmptyTensor.h>

#include <map>
#include <mutex>
#include <sstream>

#include "../core/address_space.h"

namespace trn {

Numerics numerics;

namespace {

std::string tuple_text(c10::IntArrayRef sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

std::string shape_text(c10::IntArrayRef sizes, c10::ScalarType dtype) {
  return c10::str("shape ", tuple_text(sizes), " and dtype torch.", c10::getDtypeNames(dtype).first);
}

c10::ScalarType dtype_of(const at::Tensor& tensor) { return c10::typeMetaToScalarType(tensor.dtype()); }

c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

bool covers_storage(const at::Tensor& tensor) {
  return tensor.storage_offset() == 0 && tensor.nbytes() == storage_of(tensor)->nbytes() &&
         tensor.is_non_overlapping_and_dense();
}

}  // namespace

uint64_t data_limit_bytes(c10::ScalarType dtype) {
  return c10::isIntegralType(dtype, true) ? numerics.integer_data_bytes : numerics.data_bytes;
}

bool has_values(const at::Tensor& tensor) {
  if (tensor._is_zerotensor()) return tensor.nbytes() <= data_limit_bytes(dtype_of(tensor));
  const c10::StorageImpl* storage = storage_of(tensor);
  const StorageContext* context = context_of(storage);
  if (context == nullptr) return !AddressSpace::instance().contains(storage->data());
  if (context->values == Values::Valued || tensor.numel() == 0) return true;
  return context->values == Values::Virgin && storage->nbytes() <= data_limit_bytes(dtype_of(tensor));
}

bool can_take_values(const at::Tensor& tensor) {
  const c10::StorageImpl* storage = storage_of(tensor);
  const StorageContext* context = context_of(storage);
  if (context == nullptr || context->values == Values::Valued || tensor.numel() == 0) return true;
  if (storage->nbytes() > data_limit_bytes(dtype_of(tensor))) return false;
  return context->values == Values::Virgin || covers_storage(tensor);
}

void make_valueless(const at::Tensor& tensor, const Origin* origin) {
  if (tensor.numel() == 0) return;
  StorageContext* context = context_of(storage_of(tensor));
  if (context == nullptr) return;
  context->values = Values::Valueless;
  context->origin = origin;
  if (context->range != nullptr) context->range->holder = origin->op;
}

const Origin* origin_of(const char* op, const at::Tensor& tensor) {
  static auto* mutex = new std::mutex;
  static auto* known = new std::map<std::tuple<const char*, c10::ScalarType, std::vector<int64_t>>, Origin*>;
  std::lock_guard<std::mutex> lock(*mutex);
  Origin*& origin = (*known)[{op, dtype_of(tensor), tensor.sizes().vec()}];
  if (origin == nullptr) origin = new Origin{op, dtype_of(tensor), tensor.sizes().vec()};
  return origin;
}

std::string described(const at::Tensor& tensor) {
  return c10::str("a tensor of ", shape_text(tensor.sizes(), dtype_of(tensor)), " on ", tensor.device());
}

std::string way_out() {
  return c10::str("Run with TRN_NUMERICS=host to have every value, or raise TRN_DATA_BYTES (",
                  numerics.data_bytes.load(), " now; TRN_INTEGER_DATA_BYTES, ", numerics.integer_data_bytes.load(),
                  " now, is for integers and bools): tensors up to it keep theirs.");
}

std::string why_no_value(const at::Tensor& tensor) {
  const StorageContext* context = context_of(storage_of(tensor));
  if (context == nullptr) {
    const char* owner = AddressSpace::instance().owner(storage_of(tensor)->data());
    return c10::str("numerics is \"none\" and ", owner == nullptr ? "an operator" : owner,
                    " gave it its content without computing values");
  }
  if (context->origin == nullptr) return "numerics is \"none\" and nothing has been written to it";
  const Origin& origin = *context->origin;
  const bool other =
      !origin.sizes.empty() && (c10::IntArrayRef(origin.sizes) != tensor.sizes() || origin.dtype != dtype_of(tensor));
  return c10::str("numerics is \"none\" and ", origin.op, " gave it its content",
                  other ? ", as a tensor of " + shape_text(origin.sizes, origin.dtype) + "," : std::string(),
                  " without computing values");
}

void raise_no_value(const at::Tensor& tensor, const std::string& wanted, const char* advice) {
  TORCH_CHECK(false, "trn: ", wanted, " the value of ", described(tensor), ", which has none: ", why_no_value(tensor),
              ". ", advice, way_out());
}

at::Tensor hollow_alias(const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  c10::DataPtr address(const_cast<void*>(storage->data()), c10::Device(c10::DeviceType::CPU));
  c10::Storage same(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(address), nullptr, false);
  auto alias = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(same),
                                                    c10::DispatchKeySet(c10::DispatchKey::CPU), impl->dtype());
  alias->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  return at::Tensor(std::move(alias));
}

}  // namespace trn
