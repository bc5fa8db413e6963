// Random numbers on trn: a trn generator draws what a CPU generator with the same seed draws.
#pragma once

#include <ATen/core/Generator.h>

namespace trn {

const at::Generator& default_generator(int64_t device);
at::Generator new_generator(int64_t device);
void manual_seed_all(uint64_t seed);
// The CPU generator that CPU kernels draw from on behalf of a trn generator. It is the trn generator's own engine, not
// a copy: what a kernel draws is drawn from both.
at::Generator engine_of(const at::Generator& generator);

// While alive, the process's default CPU generator is the engine of a device's default generator: for the CPU kernels
// that draw and take no generator argument.
class DefaultGeneratorSwap {
 public:
  explicit DefaultGeneratorSwap(int device);
  ~DefaultGeneratorSwap();

 private:
  int device_;
};

}  // namespace trn
