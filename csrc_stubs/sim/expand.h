// Runs a Program's loops and hands out its instructions, one by one, in program order.
//
// Between two iterations of a loop it asks how many of the next ones to leave out.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace trn {

class Expander {
 public:
  explicit Expander(const Program& program) : program_(program) {}

  // Calls sink(Issued&) for each instruction. `loops` has Enter(depth, position) for each loop that
  // starts, and Skip(depth, done, trips): iterations to leave out after `done` of `trips`.
  template <class Sink, class Loops>
  void Run(Sink&& sink, Loops&& loops) {
    const auto end = static_cast<int64_t>(program_.ops.size());
    for (int64_t position = 0; position < end;) {
      const Op& op = program_.ops[position];
      switch (op.opcode) {
        case Opcode::kStep:
          sink(Resolve(op.argument));
          ++position;
          break;
        case Opcode::kLoop:
          position = Enter(op, position, loops);
          break;
        case Opcode::kEnd:
          position = Next(op, position, loops);
          break;
      }
    }
  }

 private:
  template <class Loops>
  int64_t Enter(const Op& loop, int64_t position, Loops& loops) {
    if (loop.argument <= 0) return loop.target;
    loops.Enter(static_cast<int64_t>(counters_.size()), position);
    counters_.push_back(0);
    trips_.push_back(loop.argument);
    return position + 1;
  }

  template <class Loops>
  int64_t Next(const Op& end, int64_t position, Loops& loops) {
    int64_t& done = counters_.back();
    if (++done < trips_.back()) {
      done += loops.Skip(static_cast<int64_t>(counters_.size()) - 1, done, trips_.back());
      if (done < trips_.back()) return end.target;
    }
    counters_.pop_back();
    trips_.pop_back();
    return position + 1;
  }

  Issued& Resolve(int64_t instruction) {
    const Instruction& what = program_.instructions[instruction];
    const Ref* ref = &program_.refs[what.first_ref];
    const int64_t operands = what.num_writes + what.num_reads;
    issued_.instruction = static_cast<int32_t>(instruction);
    issued_.choice = static_cast<int32_t>(what.first_choice);
    for (int64_t i = 0; i < operands; ++i) issued_.slots[i] = static_cast<int32_t>(SlotOf(ref[i]));
    return issued_;
  }

  int64_t SlotOf(const Ref& ref) const {
    const Pool& pool = program_.pools[ref.pool];
    if (pool.slots == 1) return pool.first_slot;
    int64_t index = ref.constant;
    for (int64_t i = ref.first_term; i < ref.end_term; ++i) {
      const Term& term = program_.terms[i];
      index += term.coefficient * counters_[term.depth];
    }
    // Most indices are small and many pools a power of two deep; a 64-bit division would cost more
    // than the rest of the expansion.
    if (static_cast<uint64_t>(index) < static_cast<uint64_t>(pool.slots)) {
      return pool.first_slot + index;
    }
    if ((pool.slots & (pool.slots - 1)) == 0) return pool.first_slot + (index & (pool.slots - 1));
    const int64_t rest = index % pool.slots;
    return pool.first_slot + (rest < 0 ? rest + pool.slots : rest);
  }

  const Program& program_;
  std::vector<int64_t> counters_;
  std::vector<int64_t> trips_;
  Issued issued_{};
};

}  // namespace trn
