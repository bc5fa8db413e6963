// Runs a Program in the order in which it ran elsewhere.
#pragma once

#include <vector>

#include "program.h"
#include "scheduler.h"

namespace trn {

// Gives `scheduler` what another core's schedule placed, in the order of its start there: every
// engine, every queue and the DMA engines among the queues do the same one after the other. With
// all orders fixed, each start is the latest of some ends before it, so that a shorter instruction
// can delay none. `program` has the scheduler's costs, `placed_for` those of the other core.
void RunInOrder(const Program& program, const Program& placed_for, const std::vector<Placement>& placements,
                Scheduler& scheduler);

}  // namespace trn
