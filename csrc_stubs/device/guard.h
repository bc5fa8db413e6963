// The current device and stream of a thread, and the device guard that torch asks for them.
#pragma once

#include <c10/core/Stream.h>

namespace trn {

int current_device();
void set_device(int64_t index);
int current_stream(int device);
void synchronize_device(int device);

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
