#include "scheduler.h"

#include <algorithm>

namespace trn {

int64_t Scheduler::Schedule(const Issued& issued, const Ready& ready) {
  const Choice& cost = program_.choices[issued.choice];
  const Instruction& what = program_.instructions[issued.instruction];
  return cost.engine == kDma ? RunDma(cost, issued, ready) : RunCompute(cost, what, issued, ready);
}

Ready Scheduler::ReadyAt(const Issued& issued, int64_t actor) const {
  const Instruction& what = program_.instructions[issued.instruction];
  Ready ready;
  const Ref* ref = &program_.refs[what.first_ref];
  // Reads first: where an instruction works in place, what it waits for is its data.
  for (int64_t i = what.num_writes; i < what.num_writes + what.num_reads; ++i) {
    const Slot& slot = state_.slots[issued.slots[i]];
    const int64_t when = slot.writer == actor ? slot.written_ps : slot.visible_ps;
    ready.Until(when, Reason::kTile, ref[i].pool);
  }
  for (int64_t i = 0; i < what.num_writes; ++i) {
    const Slot& slot = state_.slots[issued.slots[i]];
    // Two writes to one HBM tensor go to different places; two writes to a tile may not.
    if (slot.writer != actor && !program_.pools[ref[i].pool].hbm) {
      ready.Until(slot.visible_ps, Reason::kSlot, ref[i].pool);
    }
    const Reader& reader = slot.first.actor != actor ? slot.first : slot.second;
    ready.Until(reader.done_ps, Reason::kSlot, ref[i].pool);
  }
  return ready;
}

void Scheduler::Choose(Issued& issued) {
  const Instruction& what = program_.instructions[issued.instruction];
  int64_t best = what.first_choice;
  Ready ready[kEngines];
  int64_t best_end = 0;
  for (int64_t i = 0; i < what.num_choices; ++i) {
    const Choice& choice = program_.choices[what.first_choice + i];
    ready[i] = ReadyAt(issued, choice.engine);
    const int64_t end = std::max(state_.free_ps[choice.engine], ready[i].ps) + choice.occupancy_ps;
    if (i == 0 || end < best_end) {
      best_end = end;
      best = what.first_choice + i;
    }
  }
  // An engine that lost by when it was free, or while it could have started before the winner was
  // free, may win when the same comes again later: a loop that does this cannot be extrapolated
  // without that engine taking part.
  const int64_t winner_free_ps = state_.free_ps[program_.choices[best].engine];
  for (int64_t i = 0; i < what.num_choices; ++i) {
    const int64_t engine = program_.choices[what.first_choice + i].engine;
    state_.undecided[engine] += ready[i].ps < state_.free_ps[engine] || ready[i].ps <= winner_free_ps;
  }
  issued.choice = static_cast<int32_t>(best);
}

int64_t Scheduler::Occupancy(const Choice& cost, const Instruction& what, const Issued& issued, int64_t start_ps) {
  int64_t occupancy = cost.occupancy_ps, lost = cost.lost_ps;
  if (what.weights == Weights::kReplaced) {
    state_.weights_slot = -1;
  } else if (what.weights == Weights::kReusable) {
    const int64_t slot = issued.slots[what.num_writes];
    if (state_.weights_slot == slot && state_.has_weights()) {
      occupancy = cost.reuse_ps;
      lost = cost.reuse_lost_ps;
    }
    state_.weights_slot = slot;
    state_.weights_version = state_.slots[slot].version;
  }
  if (cost.engine == kTensor) {
    if (constants_.ramp.ramp_ps) {
      const int64_t taken = state_.ramp.Occupancy(constants_.ramp, start_ps, occupancy);
      lost += taken - occupancy;
      occupancy = taken;
    }
    state_.totals.limiter() += lost;
  }
  return occupancy;
}

int64_t Scheduler::RunCompute(const Choice& cost, const Instruction& what, const Issued& issued, const Ready& ready) {
  const int64_t actor = cost.engine;
  const int64_t free_ps = state_.free_ps[actor];
  const int64_t start = std::max(free_ps, ready.ps);
  const int64_t occupancy = Occupancy(cost, what, issued, start);
  const int64_t end = start + occupancy;
  const int64_t done = end + cost.latency_ps;
  state_.free_ps[actor] = end;
  state_.done_ps[actor] = std::max(state_.done_ps[actor], done);
  ++state_.totals.scheduled();
  ++num_run_;
  state_.totals.busy(actor) += occupancy;
  if (start > free_ps) state_.totals.wait(actor, CauseOf(ready.wait)) += start - free_ps;
  if (want_spans_) {
    const Wait queue{free_ps > 0 ? Reason::kQueue : Reason::kNothing, -1};
    AddSpan(issued, actor, {start, end}, start > free_ps ? ready.wait : queue, true);
  }
  if (placements) placements->push_back({issued, start, {}});
  const int64_t semaphore = constants_.semaphore_ps;
  Touch(what, issued, actor, end + semaphore, done, done + semaphore);
  return start;
}

int64_t Scheduler::RunDma(const Choice& cost, const Issued& issued, const Ready& ready) {
  const Transfer transfer = Begin(issued, ready);
  state_.dma.Reserve(transfer.earliest_ps, cost.occupancy_ps, transfer.cause, state_.totals.dma_idle());
  // A transfer's own engines need queue_ps for it: from the start of each piece on, their share of
  // what is then left.
  int64_t held = 0, left = cost.occupancy_ps;
  for (const Interval& piece : state_.dma.pieces()) {
    held = std::max(held, piece.start_ps + ShareOf(cost.queue_ps, left, cost.occupancy_ps));
    left -= piece.end_ps - piece.start_ps;
  }
  if (placements) placements->push_back({issued, transfer.earliest_ps, state_.dma.pieces()});
  End(issued, transfer, held, state_.dma.pieces());
  return transfer.earliest_ps;
}

Transfer Scheduler::Begin(const Issued& issued, const Ready& ready) const {
  const int64_t actor = ActorOf(program_, issued);
  const int64_t free_ps = state_.free_ps[actor];
  if (ready.ps > free_ps) return {actor, free_ps, ready.ps, ready.wait, CauseOf(ready.wait)};
  const Wait queue{free_ps > 0 ? Reason::kQueue : Reason::kNothing, -1};
  return {actor, free_ps, free_ps, queue, state_.totals.queue_cause()};
}

Interval Scheduler::Place(int64_t ready_ps, int64_t work_ps, int64_t cause) {
  state_.dma.Clear();
  state_.dma.Append(ready_ps, work_ps, cause, state_.totals.dma_idle());
  return state_.dma.pieces().back();
}

void Scheduler::End(const Issued& issued, const Transfer& transfer, int64_t held_ps,
                    const std::vector<Interval>& pieces) {
  const Choice& cost = program_.choices[issued.choice];
  // Its semaphore is part of the start latency, so whoever waits for a DMA sees it when it is done.
  const int64_t done = held_ps + cost.latency_ps - (cost.queue_ps - cost.occupancy_ps);
  state_.free_ps[transfer.actor] = held_ps;
  state_.done_ps[transfer.actor] = std::max(state_.done_ps[transfer.actor], done);
  Totals& totals = state_.totals;
  ++totals.scheduled();
  ++num_run_;
  int64_t work_ps = 0;
  for (const Interval& piece : pieces) work_ps += piece.end_ps - piece.start_ps;
  totals.busy(kDma) += work_ps;
  totals.bandwidth() += pieces.back().end_ps - transfer.earliest_ps - work_ps;
  const int64_t waited_ps = transfer.earliest_ps - transfer.free_ps;
  if (waited_ps) totals.wait(kDma, transfer.cause) += waited_ps;
  if (want_spans_) {
    const bool shared = pieces.front().start_ps > transfer.earliest_ps;
    AddDmaSpans(issued, transfer.actor, pieces, shared ? Wait{Reason::kBandwidth, -1} : transfer.wait);
  }
  Touch(program_.instructions[issued.instruction], issued, transfer.actor, done, done, done);
}

void Scheduler::Touch(const Instruction& what, const Issued& issued, int64_t actor, int64_t read_ps, int64_t written_ps,
                      int64_t visible_ps) {
  const Ref* ref = &program_.refs[what.first_ref];
  for (int64_t i = what.num_writes; i < what.num_writes + what.num_reads; ++i) {
    state_.slots[issued.slots[i]].AddReader(actor, read_ps);
  }
  for (int64_t i = 0; i < what.num_writes; ++i) {
    state_.slots[issued.slots[i]].Write(actor, written_ps, visible_ps, program_.pools[ref[i].pool].hbm);
  }
  if (!log_parts) return;
  const auto log = [&](int64_t i, PartAccess access) {
    const Pool& pool = program_.pools[ref[i].pool];
    if (pool.hbm && pool.slots > 1) state_.part_accesses.push_back(access);
  };
  for (int64_t i = what.num_writes; i < what.num_writes + what.num_reads; ++i) {
    log(i, {ref[i].pool, issued.slots[i], actor, read_ps, 0, false});
  }
  for (int64_t i = 0; i < what.num_writes; ++i) {
    log(i, {ref[i].pool, issued.slots[i], actor, written_ps, visible_ps, true});
  }
}

int64_t Scheduler::CauseOf(const Wait& wait) const {
  return wait.reason == Reason::kSlot ? state_.totals.slot_cause(wait.pool) : wait.pool;
}

void Scheduler::AddDmaSpans(const Issued& issued, int64_t actor, const std::vector<Interval>& pieces, Wait wait) {
  bool first = true;
  for (const Interval& piece : pieces) {
    AddSpan(issued, actor, piece, first ? wait : Wait{Reason::kBandwidth, -1}, first);
    first = false;
  }
}

void Scheduler::AddSpan(const Issued& issued, int64_t actor, Interval when, Wait wait, bool new_instruction) {
  int64_t& last = last_span_[actor];
  if (last >= 0) {
    Span& span = spans_[last];
    if (span.instruction == issued.instruction && span.choice == issued.choice && span.end_ps == when.start_ps) {
      span.end_ps = when.end_ps;
      span.count += new_instruction;
      return;
    }
  }
  last = static_cast<int64_t>(spans_.size());
  spans_.push_back({issued.instruction, issued.choice, when.start_ps, when.end_ps, wait, new_instruction});
}

}  // namespace trn
