// Operators that are native to trn: making tensors, views (a new TensorImpl on the trn storage, no cost), resizing,
// copies between devices, and reading a value.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "eager.h"
#include "guard.h"
#include "storage.h"
#include "values.h"

namespace trn {

namespace {

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

void check_factory(std::optional<c10::Layout> layout, std::optional<bool> pin_memory) {
  TORCH_CHECK(
      !layout.has_value() || *layout == c10::kStrided, "trn: tensors of layout ", *layout,
      " are not supported: a NeuronCore has dense memory only. Use a strided tensor, or keep this one on the CPU.");
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<c10::Layout> layout,
                 std::optional<c10::Device> device, std::optional<bool> pin_memory,
                 std::optional<c10::MemoryFormat> memory_format) {
  check_factory(layout, pin_memory);
  DeviceScope scope(device_index_of(device));
  return at::detail::empty_generic(size, allocator(), kKeys, c10::dtype_or_default(dtype), memory_format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                         std::optional<bool> pin_memory) {
  check_factory(layout, pin_memory);
  DeviceScope scope(device_index_of(device));
  return at::detail::empty_strided_generic(size, stride, allocator(), kKeys, c10::dtype_or_default(dtype));
}

// Zeros without memory: autograd uses them for gradients that are zero, and torch makes them real where they are read.
at::Tensor efficient_zeros(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                           std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                           std::optional<bool> pin_memory) {
  check_factory(layout, pin_memory);
  static auto* allocators = [] {
    auto* made = new std::vector<at::native::ZeroTensorAllocator>;
    for (int i = 0; i < kMaxDevices; ++i) made->emplace_back(c10::Device(kTrn, static_cast<c10::DeviceIndex>(i)));
    return made;
  }();
  return at::detail::empty_generic(size, &(*allocators)[static_cast<size_t>(device_index_of(device))],
                                   kKeys | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor),
                                   c10::dtype_or_default(dtype), std::nullopt);
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                      std::optional<int64_t> storage_offset) {
  note_module();
  return at::native::as_strided_tensorimpl(self, size, stride, storage_offset);
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) {
  note_module();
  return at::native::view(self, size);
}
at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  note_module();
  return at::native::unfold(self, dimension, size, step);
}
at::Tensor view_as_real(const at::Tensor& self) { return at::native::view_as_real(self); }
at::Tensor view_as_complex(const at::Tensor& self) { return at::native::view_as_complex(self); }

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  note_module();
  return at::native::as_strided_tensorimpl(self, size, stride, self.storage_offset());
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size,
                          std::optional<c10::MemoryFormat> memory_format) {
  HolderScope holder("aten::resize_");
  resize_tensor(self.unsafeGetTensorImpl(), size, std::nullopt);
  if (memory_format.has_value()) {
    TORCH_CHECK(*memory_format != c10::MemoryFormat::Preserve, "Unsupported memory format ", *memory_format);
    self.unsafeGetTensorImpl()->empty_tensor_restride(*memory_format);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t storage_offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  TORCH_CHECK(source.device().type() == kTrn, "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(),
              "\".  This is no longer allowed; the devices must match.");
  at::native::checkSetStorage(self, std::move(source), storage_offset, size, stride);
  self.unsafeGetTensorImpl()->set_storage_offset(storage_offset);
  resize_tensor(self.unsafeGetTensorImpl(), size, stride.data() != nullptr ? std::make_optional(stride) : std::nullopt);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {size}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  if (self.is_same(source)) return self;
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_empty(at::Tensor& self) {
  DeviceScope scope(self.device().index());
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, allocator()->allocate(0), allocator(), true);
  return set_storage(self, std::move(storage), 0, {0}, {});
}

// Copies across the host link or between cores have a price by bytes alone, so they need no lowering.
enum class Route { HostToDevice, DeviceToHost, DeviceToDevice };

const CostEntry& copy_cost(Route route, int64_t bytes) {
  static auto* tables = new std::array<CostTable, 3>;
  static const char* const names[] = {"aten::copy_ (host to device)", "aten::copy_ (device to host)",
                                      "aten::copy_ (device to device)"};
  const auto index = static_cast<size_t>(route);
  Key key;
  key.add(static_cast<uint64_t>(bytes));
  CostTable& table = (*tables)[index];
  if (CostEntry* known = table.find(key)) return *known;
  const System& system = System::instance();
  CostEntry* entry = CostStore::instance().create(names[index]);
  entry->duration_ps =
      route == Route::DeviceToDevice ? system.device_transfer_ps(bytes) : system.host_transfer_ps(bytes);
  entry->busy_ps[kDma] = entry->duration_ps;
  entry->hbm_bytes = route == Route::DeviceToDevice ? 2 * bytes : bytes;
  entry->bound = Bound::Dma;
  return *table.insert(key, entry);
}

int64_t bytes_of(const at::Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.itemsize()); }

void copy_between_devices(const at::Tensor& self, const at::Tensor& src) {
  const int from = src.device().index();
  const int to = self.device().index();
  System& system = System::instance();
  // Both ends are busy: the copy starts when both streams are ready.
  system.device(to).wait_until(current_stream(to), system.device(from).stream_ready_ps(current_stream(from)));
  account(copy_cost(Route::DeviceToDevice, bytes_of(src)), to, false);
  system.device(from).wait_until(current_stream(from), system.device(to).stream_ready_ps(current_stream(to)));
}

// The values of a copy; everything about autograd and autocast was settled above the backend.
void copy_values(const at::Tensor& destination, const at::Tensor& source) {
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                           c10::autocast_dispatch_keyset);
  destination.copy_(source);
}

void copy_on_device(const at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  static OpInfo& info = operator_info(c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", ""));
  torch::jit::Stack stack;
  torch::jit::push(stack, self, src, non_blocking);
  run_operator(info, &stack);
}

void warn_of_nan(const at::Tensor& tensor) {
  TORCH_WARN_ONCE("trn: nan stands for the value of ", described(tensor),
                  ", and of all others without one: ", why_no_value(tensor), ". ", way_out());
}

// Whether a copy between devices moves values, or else what it leaves behind: no values on trn, nan on the CPU (if the
// user chose so, and it is one number).
bool can_copy_values(const at::Tensor& destination, const at::Tensor& source) {
  const bool valued = source.is_cpu() || has_values(source);
  if (destination.is_cpu()) {
    if (valued) return true;
    const bool number = source.numel() == 1 && (source.is_floating_point() || source.is_complex());
    if (!number || !numerics.nan_items) raise_no_value(source, "a copy to the CPU asks for");
    warn_of_nan(source);
    destination.fill_(std::numeric_limits<double>::quiet_NaN());
    return false;
  }
  if (valued && can_take_values(destination)) {
    make_valued(destination.storage().unsafeGetStorageImpl());
    return true;
  }
  at::inferExpandGeometry(source.sizes(), source.strides(), destination.sizes());  // raises when they do not fit
  make_valueless(destination, origin_of("aten::copy_", destination));
  return false;
}

void transfer(const at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  check_usable();
  if (self.is_same(src)) return;
  TORCH_CHECK(!self._is_zerotensor(),
              "ZeroTensors are immutable. Please materialize the tensor using `.clone()`, if you want a "
              "mutable zero tensor.");
  if (src._is_zerotensor()) {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    self.zero_();
    return;
  }
  const bool to_trn = self.device().type() == kTrn;
  const bool from_trn = src.device().type() == kTrn;
  if (to_trn && from_trn && self.device() == src.device()) return copy_on_device(self, src, non_blocking);
  TORCH_CHECK((to_trn || self.device().is_cpu()) && (from_trn || src.device().is_cpu()), "trn: cannot copy from ",
              src.device(), " to ", self.device(), "; copy through the CPU.");
  if (C10_LIKELY(!without_data()) || can_copy_values(self, src)) {
    copy_values(to_trn ? cpu_alias(self) : self, from_trn ? cpu_alias(src) : src);
  }
  if (self.numel() == 0) return;
  if (to_trn && from_trn) return copy_between_devices(self, src);
  if (to_trn) {
    account(copy_cost(Route::HostToDevice, bytes_of(src)), self.device().index(), !non_blocking);
  } else {
    account(copy_cost(Route::DeviceToHost, bytes_of(src)), src.device().index(), !non_blocking);
  }
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  transfer(self, src, non_blocking);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  transfer(dst, self, non_blocking);
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  if (dst.sizes() != self.sizes()) dst.resize_(self.sizes());
  transfer(dst, self, false);
  return dst;
}

at::Scalar local_scalar(const at::Tensor& self) {
  check_usable();
  at::Scalar value;
  if (C10_UNLIKELY(without_data()) && !has_values(self)) {
    const bool has_nan = self.is_floating_point() || self.is_complex();
    if (!numerics.nan_items || !has_nan) {
      raise_no_value(self, "a conversion to a Python number asks for",
                     has_nan ? "TRN_NONE_ITEM=nan gives nan instead. " : "");
    }
    warn_of_nan(self);
    value = std::numeric_limits<double>::quiet_NaN();
  } else {
    value = at::_local_scalar_dense(cpu_alias(self));
  }
  account(copy_cost(Route::DeviceToHost, bytes_of(self)), self.device().index(), true);
  return value;
}

// A freed block may be reused at once in simulated time, so nothing has to remember the stream.
void record_stream(at::Tensor&, at::Stream) {}

// What makes compressed sparse tensors. torch chooses their kernel by the layout asked for, SparseCsrPrivateUse1, where
// its composite would come before a fallback; without one for PrivateUse1, autograd would run it even before.
constexpr const char* kCompressedFactories[] = {
    "_sparse_compressed_tensor_unsafe", "_sparse_csr_tensor_unsafe", "_sparse_csc_tensor_unsafe",
    "_sparse_bsr_tensor_unsafe",        "_sparse_bsc_tensor_unsafe", "_sparse_compressed_tensor_with_dims"};

// Layouts that the device does not have: the name of the operator, and what to do instead.
void refuse_layout(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().operator_name(),
      ": sparse, nested and quantized tensors are not supported on trn, since a NeuronCore has "
      "dense memory only. Keep this tensor on the CPU, or call to_dense() (dequantize()) first.");
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_efficientzerotensor", &efficient_zeros);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("view_as_real", &view_as_real);
  m.impl("view_as_complex", &view_as_complex);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_empty);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("record_stream", &record_stream);
  for (const char* name : kCompressedFactories) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_layout>());
  }
  for (const char* name : {"_nested_tensor_from_tensor_list", "_nested_view_from_buffer", "_nested_tensor_from_mask"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_layout>());
  }
}

// The copies resolve these bits themselves (a CPU alias carries them); torch's fallbacks would come back here for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
  m.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
  m.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&refuse_layout>()); }
TORCH_LIBRARY_IMPL(_, SparseCsrPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&refuse_layout>());
}
TORCH_LIBRARY_IMPL(aten, SparseCsrPrivateUse1, m) {
  for (const char* name : kCompressedFactories) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_layout>());
  }
}
TORCH_LIBRARY_IMPL(_, QuantizedPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&refuse_layout>());
}
TORCH_LIBRARY_IMPL(_, NestedTensorPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&refuse_layout>());
}

}  // namespace

}  // namespace trn
