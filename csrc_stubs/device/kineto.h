// Simulated device time in torch.profiler, through kineto's registry for PrivateUse1 backends.
#pragma once

#include <cstdint>

namespace trn {

// Correlation of the host operator that is running on this thread in a torch.profiler session (0 when there is none).
uint64_t correlation_id();

}  // namespace trn
