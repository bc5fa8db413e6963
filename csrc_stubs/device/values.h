// Whether a storage has values. With numerics "none" large tensors have none: operators on them cost what they cost and
// compute nothing. It is a state of the storage, set by operators, never guessed from a size.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <atomic>
#include <string>
#include <vector>

#include "storage.h"

namespace trn {

// What decides how the device treats values; all but `none` may change at any time.
struct Numerics {
  bool none = false;  // settled before the first trn tensor
  std::atomic<uint64_t> data_bytes{64 << 10};
  std::atomic<uint64_t> integer_data_bytes{16 << 20};
  std::atomic<bool> nan_items{false};
};
extern Numerics numerics;

inline bool without_data() { return numerics.none; }

// The tensor that an operator last gave a storage without values, for the errors that ask for them.
struct Origin {
  const char* op;  // lives for ever
  c10::ScalarType dtype;
  std::vector<int64_t> sizes;
};

// A result of a call as its arguments' sizes foretell it.
struct ResultLayout {
  Origin origin;
  std::vector<int64_t> strides;
  int64_t offset = 0;    // in its storage; for a view of an operand, from where the operand starts
  int32_t operand = -1;  // the operand (by position) that it is, or whose storage it shares
  int32_t fresh = -1;    // or which of the fresh storages
  bool same = false;     // it is the operand itself
  bool defined = true;
  bool conj = false;
  bool neg = false;
};

// An operand as the call leaves it.
struct WrittenLayout {
  Origin origin;
  std::vector<int64_t> strides;
  int32_t operand = -1;  // position
};

struct ReturnLayout {
  enum class Kind : uint8_t { Tensor, List, Value } kind;
  size_t length = 0;  // of a list
  c10::IValue value;
};

// All that a call gives and changes, so that it can be given and changed without any kernel.
struct CallLayout {
  std::vector<ReturnLayout> returns;
  std::vector<ResultLayout> results;  // tensors, those of lists one by one
  std::vector<WrittenLayout> written;
  std::atomic<int64_t> draws{-1};  // random numbers that the kernel would draw; -1 while unknown
};

// The most bytes that a storage of this dtype may have and still get values.
uint64_t data_limit_bytes(c10::ScalarType dtype);

// Whether the values of a tensor can be read (also of a small one that was only allocated: it reads as zeros).
bool has_values(const at::Tensor& tensor);
// Whether an operator that overwrites all of a tensor leaves its storage with values.
bool can_take_values(const at::Tensor& tensor);
// Gives a storage its bytes (zeros, if it had none) and counts it as valued.
void make_valued(c10::StorageImpl* storage);
void make_valueless(const at::Tensor& tensor, const Origin* origin);
// An origin that lives for ever.
const Origin* origin_of(const char* op, const at::Tensor& tensor);

// Raises: somebody wants values of a tensor that has none. `wanted` says who, `advice` more of what to do.
[[noreturn]] void raise_no_value(const at::Tensor& tensor, const std::string& wanted, const char* advice = "");
// Its parts: "a tensor of shape (2, 3) and dtype torch.float32 on trn:0"; why it has none; what to do.
std::string described(const at::Tensor& tensor);
std::string why_no_value(const at::Tensor& tensor);
std::string way_out();

c10::intrusive_ptr<c10::StorageImpl> empty_cpu_storage();
// Raises when an address that somebody has kept of a storage (serialisation does) is one without bytes.
void check_readable(const void* pointer);

// The pointer of a storage without bytes, to an address of its own. Takes `block` over once it returns.
c10::DataPtr hollow_data_ptr(uint64_t bytes, int device, hbm::Block* block, const Origin* origin);
// A storage without bytes, made by the operator of `origin` (or only allocated, when that is null).
c10::intrusive_ptr<c10::StorageImpl> make_hollow_storage(uint64_t bytes, int device, hbm::Block* block,
                                                         const Origin* origin);
// Gives a storage more bytes, none of which has a value. Takes `block` over.
void grow_hollow(c10::StorageImpl* storage, uint64_t bytes, hbm::Block* block, const Origin* origin);
// Resizes a storage that has no values, or has none afterwards. False when it keeps values, which the caller copies.
bool resize_hollow(c10::StorageImpl* storage, const StorageContext* context, uint64_t bytes, hbm::Block* block,
                   c10::ScalarType dtype);
// A CPU tensor that tells sizes, strides and dtype and whose memory traps: for those who ask for these alone.
at::Tensor hollow_alias(const at::Tensor& tensor);

}  // namespace trn
