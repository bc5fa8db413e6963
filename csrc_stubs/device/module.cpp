// torch_trn._C: what Python sees of the device.
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include "../core/host_pool.h"
#include "../core/memory_log.h"
#include "eager.h"
#include "generator.h"
#include "guard.h"
#include "price.h"
#include "storage.h"
#include "tile.h"
#include "values.h"

namespace py = pybind11;

namespace trn {

namespace {

void configure(int devices, uint64_t hbm_bytes, const py::dict& timing) {
  TORCH_CHECK_VALUE(devices >= 0 && devices <= kMaxDevices, "trn: ", devices, " devices, but a process has 0 to ",
                    kMaxDevices);
  System& system = System::instance();
  TORCH_CHECK_VALUE(!system.used && !system.counted, "trn: the device is in use; its system cannot change any more");
  Timing values;
  values.launch_ps = timing["launch_ps"].cast<int64_t>();
  values.dispatch_ps = timing["dispatch_ps"].cast<int64_t>();
  values.host_link_bytes_per_s = timing["host_link_bytes_per_s"].cast<int64_t>();
  values.host_link_fixed_ps = timing["host_link_fixed_ps"].cast<int64_t>();
  values.device_link_bytes_per_s = timing["device_link_bytes_per_s"].cast<int64_t>();
  values.device_link_fixed_ps = timing["device_link_fixed_ps"].cast<int64_t>();
  system.configure(devices, hbm_bytes, values);
}

Device& device_at(int64_t index) {
  check_device_index(index);
  check_not_forked();
  return System::instance().device(static_cast<int>(index));
}

void put(py::dict& into, const std::string& name, const hbm::Stat& stat) {
  into[py::str(name + ".all.current")] = stat.current;
  into[py::str(name + ".all.peak")] = stat.peak;
  into[py::str(name + ".all.allocated")] = stat.allocated;
  into[py::str(name + ".all.freed")] = stat.freed;
}

py::dict memory_stats(int64_t index) {
  const hbm::Stats stats = device_at(index).hbm.stats();
  py::dict result;
  put(result, "allocation", stats.allocation);
  put(result, "active", stats.allocation);
  put(result, "segment", stats.segment);
  put(result, "inactive_split", stats.inactive_split);
  put(result, "allocated_bytes", stats.allocated_bytes);
  put(result, "active_bytes", stats.allocated_bytes);
  put(result, "reserved_bytes", stats.reserved_bytes);
  put(result, "requested_bytes", stats.requested_bytes);
  put(result, "inactive_split_bytes", stats.inactive_split_bytes);
  result["num_alloc_retries"] = stats.num_alloc_retries;
  result["num_ooms"] = stats.num_ooms;
  return result;
}

py::list memory_snapshot(int64_t index) {
  py::list segments;
  for (const auto& view : device_at(index).hbm.snapshot()) {
    py::list blocks;
    for (const auto& block : view.blocks) {
      py::dict entry;
      entry["address"] = block.address;
      entry["size"] = block.size;
      entry["requested_size"] = block.allocated ? block.requested : 0;
      entry["state"] = block.allocated ? "active_allocated" : "inactive";
      entry["operator"] = block.allocated && block.holder != nullptr ? block.holder : "";
      blocks.append(entry);
    }
    py::dict segment;
    segment["device"] = index;
    segment["address"] = view.address;
    segment["total_size"] = view.size;
    segment["allocated_size"] = view.allocated;
    segment["blocks"] = blocks;
    segments.append(segment);
  }
  return segments;
}

py::tuple profile_stop() {
  std::vector<Record> records;
  std::vector<MemoryEvent> memory;
  Recorder::instance().stop_profile(&records, &memory);
  forget_modules();
  py::list py_records(records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    const Record& r = records[i];
    py_records[i] = py::make_tuple(r.entry->id, r.device, r.stream, r.start_ps, r.duration_ps, r.entry->launch_ps,
                                   r.module, r.stack, i);
  }
  py::list py_memory(memory.size());
  for (size_t i = 0; i < memory.size(); ++i) {
    py_memory[i] = py::make_tuple(memory[i].time_ps, memory[i].device, memory[i].allocated_bytes);
  }
  return py::make_tuple(py_records, py_memory);
}

// Says what the block of a tensor is, from its allocation to its end. A tensor without HBM is let pass.
void mark_memory(const at::Tensor& tensor, int32_t mark) {
  if (!MemoryLog::active() || tensor.device().type() != kTrn || !tensor.has_storage()) return;
  const StorageContext* context = context_of(tensor.storage().unsafeGetStorageImpl());
  if (context == nullptr || context->block == nullptr) return;
  MemoryLog::instance().add({.kind = MemoryKind::Marked,
                             .device = context->device,
                             .mark = mark,
                             .address = context->block->address,
                             .bytes = context->block->size});
}

// The call of the module that is running on this thread ends.
void leave_module() {
  MemoryLog::instance().add({.kind = MemoryKind::ModuleLeft, .module = place_of_this_thread().module});
}

py::list memory_log_stop() {
  const std::vector<BlockEvent> events = MemoryLog::instance().stop();
  py::list result(events.size());
  for (size_t i = 0; i < events.size(); ++i) {
    const BlockEvent& e = events[i];
    result[i] =
        py::make_tuple(static_cast<int>(e.kind), e.backward, e.device, e.mark, e.address, e.bytes, e.module, e.holder);
  }
  return result;
}

py::dict entry(int32_t id) {
  const CostEntry* cost = CostStore::instance().at(id);
  TORCH_CHECK_INDEX(cost != nullptr, "trn: there is no cost entry ", id);
  py::dict result;
  result["name"] = cost->name;
  result["duration_ps"] = cost->duration_ps;
  result["busy_ps"] = py::tuple(py::cast(cost->busy_ps));
  result["flops"] = cost->flops;
  result["hbm_bytes"] = cost->hbm_bytes;
  result["bound"] = bound_name(cost->bound);
  result["host"] = cost->host;
  return result;
}

py::object* stack_function = nullptr;

int64_t call_stack_function() {
  py::gil_scoped_acquire gil;
  return (*stack_function)().cast<int64_t>();
}

void set_stack_function(py::object function) {
  delete stack_function;
  stack_function = function.is_none() ? nullptr : new py::object(std::move(function));
  set_stack_callback(stack_function == nullptr ? nullptr : &call_stack_function);
}

// HBM address and size of a tensor's storage, or None when it has none.
py::object block_of(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device().type() == kTrn, "trn: a tensor on ", tensor.device(), " is not in HBM");
  const StorageContext* context = context_of(tensor.storage().unsafeGetStorageImpl());
  if (context == nullptr || context->block == nullptr) return py::none();
  return py::make_tuple(context->block->address, context->block->size);
}

// Access to what TensorImpl does where it allows `x.data = y`.
struct TensorData : c10::TensorImpl {
  static void copy(const c10::TensorImpl* from, c10::TensorImpl* to) {
    copy_tensor_metadata(from, to, to->version_counter(), to->allow_tensor_metadata_change());
  }
};

// `tensor.data = data` across devices, which torch does for its own backends only: whoever holds the tensor
// (optimizers, tied modules) holds the moved one.
void set_data(const at::Tensor& tensor, const at::Tensor& data) {
  TORCH_CHECK(tensor.layout() == c10::kStrided && data.layout() == c10::kStrided, "trn: set_data is for dense tensors");
  TensorData::copy(data.unsafeGetTensorImpl(), tensor.unsafeGetTensorImpl());
  // The node that accumulates its gradient belongs to the old device.
  if (auto* meta = torch::autograd::impl::get_autograd_meta(tensor)) {
    std::lock_guard<std::mutex> lock(meta->mutex_);
    meta->grad_accumulator_.reset();
  }
}

void install() {
  static bool installed = false;
  if (installed) return;
  installed = true;
  c10::register_privateuse1_backend("trn");
  install_allocators();
  install_guard();
  register_operators();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("install", &install);
  m.def("configure", &configure);
  m.def("set_lowering", &set_lowering);
  m.def("set_executor", &set_executor);
  m.def("set_tile", [](bool tile) { settings().tile = tile; });
  m.def("set_strict", [](bool strict) { settings().strict = strict; });
  m.def("set_debug", [](int level) { settings().debug = level; });
  m.def("set_numerics", [](bool none, uint64_t data_bytes, uint64_t integer_data_bytes, bool nan_items) {
    TORCH_CHECK_VALUE(none == numerics.none || !System::instance().used,
                      "trn: the device is in use; its numerics cannot change any more");
    numerics.none = none;
    numerics.data_bytes = data_bytes;
    numerics.integer_data_bytes = integer_data_bytes;
    numerics.nan_items = nan_items;
  });
  m.def("has_values", [](const at::Tensor& tensor) {
    return tensor.device().type() != kTrn || !tensor.has_storage() || has_values(tensor);
  });
  m.def("can_take_values", [](const at::Tensor& tensor) {
    return tensor.device().type() != kTrn || !tensor.has_storage() || can_take_values(tensor);
  });
  m.def("set_hbm_bytes", [](uint64_t bytes) {
    System& system = System::instance();
    // All or none: what was changed before a device refuses is put back.
    for (int i = 0; i < system.device_count(); ++i) {
      const uint64_t before = system.device(i).hbm.capacity();
      if (system.device(i).hbm.set_capacity(bytes)) continue;
      for (int j = 0; j < i; ++j) system.device(j).hbm.set_capacity(before);
      return i;
    }
    return -1;
  });

  m.def("device_count", [] {
    System::instance().counted = true;
    return System::instance().device_count();
  });
  m.def("current_device", &current_device);
  m.def("set_device", [](int64_t index) {
    check_device_index(index);
    set_device(index);
  });
  m.def("exchange_device", [](int64_t index) {
    const int old = current_device();
    set_device(index);
    return old;
  });
  m.def("synchronize", [](int64_t index) {
    check_device_index(index);
    check_not_forked();
    synchronize_device(static_cast<int>(index));
  });
  m.def("is_initialized", [] { return System::instance().used.load(); });
  m.def("is_in_use", [] { return System::instance().used.load() || System::instance().counted.load(); });
  m.def("init", &check_usable);
  m.def("is_in_bad_fork", &in_bad_fork);
  m.def("host_clock_ps", &HostClock::now_ps);
  m.def("stream_clock_ps",
        [](int64_t index) { return device_at(index).stream_ready_ps(current_stream(static_cast<int>(index))); });

  m.def("memory_stats", &memory_stats);
  m.def("memory_snapshot", &memory_snapshot);
  m.def("empty_cache", [] { allocator()->emptyCache(); });
  m.def("reset_peak_memory_stats", [](int64_t index) { device_at(index).hbm.reset_peak(); });
  m.def("reset_accumulated_memory_stats", [](int64_t index) { device_at(index).hbm.reset_accumulated(); });
  m.def("mem_get_info", [](int64_t index) {
    check_device_index(index);
    return allocator()->getMemoryInfo(static_cast<c10::DeviceIndex>(index));
  });
  m.def("block_of", &block_of);
  m.def("set_data", &set_data);
  m.def("host_cached_bytes", [] { return HostPool::instance().cached_bytes(); });

  m.def("manual_seed_all", &manual_seed_all);
  m.def("default_generator", [](int64_t index) { return default_generator(index); });

  m.def("profile_start", [](bool modules, bool stacks) { Recorder::instance().start_profile(modules, stacks); });
  m.def("profile_stop", &profile_stop);
  m.def("memory_log_start", [](bool grows) { MemoryLog::instance().start(grows); });
  m.def("memory_log_stop", &memory_log_stop);
  m.def("mark_memory", &mark_memory);
  m.def("leave_module", &leave_module);
  m.def("entry", &entry);
  m.attr("BOUNDS") = py::tuple(py::cast(kBoundNames));
  m.def("entry_count", [] { return CostStore::instance().size(); });
  m.def("set_module", &exchange_module);
  m.def("set_stack_callback", &set_stack_function);
}

}  // namespace trn
