// The current device and stream of a thread, and the device guard that torch asks for them.
#pragma once

#include <c10/core/Stream.h>

namespace trn {

int current_device();
void set_device(int64_t index);
int current_stream(int device);
void synchronize_device(int device);

// What a thread needs before its first trn operator: backward on the thread itself, and autocast to bfloat16.
void prepare_thread();

// Makes a device (already checked) current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();

 private:
  int previous_;
};

void install_guard();

}  // namespace trn
