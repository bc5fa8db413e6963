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

// Moves a trn generator on as if so many numbers had been drawn. The engine follows when somebody draws from it.
void skip_draws(at::Generator generator, uint64_t draws);

// While alive, the process's default CPU generator is the engine of a trn generator: for the CPU kernels that draw and
// take no generator argument.
class DefaultGeneratorSwap {
 public:
  explicit DefaultGeneratorSwap(const at::Generator& generator);
  ~DefaultGeneratorSwap();

 private:
  at::Generator engine_;
};

}  // namespace trn
