// What is known of a loop without running it.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace trn {

struct LoopInfo {
  struct UsedPool {
    int64_t pool;
    int64_t rotation;  // An iteration period later, slot s is what slot s - rotation was.
  };

  bool watched = false;  // Whether it is worth looking for a repetition.
  int64_t period = 1;    // After so many iterations every index into a tile pool is the same again.
  int64_t first_instruction = 0;
  int64_t end_instruction = 0;
  std::vector<int64_t> actors;
  std::vector<UsedPool> pools;
};

// The loop at `depth` whose kLoop is at `position`; not watched if it runs fewer instructions than
// `worthwhile`, or too few iterations to repeat.
LoopInfo Analyse(const Program& program, int64_t position, int64_t depth, int64_t worthwhile);

}  // namespace trn
