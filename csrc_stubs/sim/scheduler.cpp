#include "scheduler.h"

#include <algorithm>

namespace trn {

Scheduler::Scheduler(const Program& program, Constants constants, bool spans)
    : program_(program),
      constants_(constants),
      want_spans_(spans),
      slots_(program.num_slots),
      free_ps_(kDma + program.num_queues, 0),
      dma_(constants.dma_packet_ps),
      waits_ps_(kEngines * 2 * program.pools.size(), 0),
      last_span_(kDma + program.num_queues, -1) {}

void Scheduler::Schedule(const Issued& issued) {
  const Instruction& what = program_.instructions[issued.instruction];
  ++num_scheduled_;
  if (what.engine == kDma) {
    RunDma(what, issued);
  } else {
    RunCompute(what, issued);
  }
}

Scheduler::Ready Scheduler::ReadyAt(const Instruction& what, const Issued& issued, int64_t actor) const {
  Ready ready;
  const Ref* ref = &program_.refs[what.first_ref];
  // Reads first: where an instruction works in place, what it waits for is its data.
  for (int64_t i = what.num_writes; i < what.num_writes + what.num_reads; ++i) {
    const Slot& slot = slots_[issued.slots[i]];
    const int64_t when = slot.writer == actor ? slot.written_ps : slot.visible_ps;
    ready.Until(when, Reason::kTile, ref[i].pool);
  }
  for (int64_t i = 0; i < what.num_writes; ++i) {
    const Slot& slot = slots_[issued.slots[i]];
    // Two writes to one HBM tensor go to different places; two writes to a tile may not.
    if (slot.writer != actor && !program_.pools[ref[i].pool].hbm) {
      ready.Until(slot.visible_ps, Reason::kSlot, ref[i].pool);
    }
    const Reader& reader = slot.first.actor != actor ? slot.first : slot.second;
    ready.Until(reader.done_ps, Reason::kSlot, ref[i].pool);
  }
  return ready;
}

int64_t Scheduler::Occupancy(const Instruction& what, const Issued& issued) {
  if (what.weights == Weights::kUntouched) return what.occupancy_ps;
  if (what.weights == Weights::kReplaced) {
    weights_slot_ = -1;
    return what.occupancy_ps;
  }
  const int64_t slot = issued.slots[what.num_writes];
  const int64_t written_ps = slots_[slot].written_ps;
  if (slot == weights_slot_ && written_ps == weights_ps_) return what.reuse_ps;
  weights_slot_ = slot;
  weights_ps_ = written_ps;
  return what.occupancy_ps;
}

void Scheduler::RunCompute(const Instruction& what, const Issued& issued) {
  const int64_t actor = what.engine;
  const int64_t free_ps = free_ps_[actor];
  const Ready ready = ReadyAt(what, issued, actor);
  const int64_t start = std::max(free_ps, ready.ps);
  const int64_t occupancy = Occupancy(what, issued);
  const int64_t end = start + occupancy;
  const int64_t done = end + what.latency_ps;
  free_ps_[actor] = end;
  busy_ps_[actor] += occupancy;
  duration_ps_ = std::max(duration_ps_, done);
  if (start > free_ps) AddWait(actor, ready.wait, start - free_ps);
  if (want_spans_) {
    const Wait queue{free_ps > 0 ? Reason::kQueue : Reason::kNothing, -1};
    AddSpan(issued, actor, {start, end}, start > free_ps ? ready.wait : queue, true);
  }
  const int64_t semaphore = constants_.semaphore_ps;
  Touch(what, issued, actor, end + semaphore, done, done + semaphore);
}

void Scheduler::RunDma(const Instruction& what, const Issued& issued) {
  const int64_t actor = kDma + what.queue;
  const int64_t free_ps = free_ps_[actor];
  const Ready ready = ReadyAt(what, issued, actor);
  const int64_t earliest = std::max(free_ps, ready.ps);
  dma_.Reserve(earliest, what.occupancy_ps);
  const int64_t end = dma_.pieces().back().end_ps;
  // Its semaphore is part of the start latency, so whoever waits for a DMA sees it when it is done.
  const int64_t done = end + what.latency_ps;
  const int64_t delay = end - earliest - what.occupancy_ps;
  free_ps_[actor] = end + (what.queue_ps - what.occupancy_ps);
  busy_ps_[kDma] += what.occupancy_ps;
  bandwidth_wait_ps_ += delay;
  duration_ps_ = std::max(duration_ps_, done);
  if (earliest > free_ps) AddWait(kDma, ready.wait, earliest - free_ps);
  if (want_spans_) {
    const bool shared = dma_.pieces().front().start_ps > earliest;
    Wait wait{free_ps > 0 ? Reason::kQueue : Reason::kNothing, -1};
    if (earliest > free_ps) wait = ready.wait;
    if (shared) wait = {Reason::kBandwidth, -1};
    bool first = true;
    for (const Interval& piece : dma_.pieces()) {
      AddSpan(issued, actor, piece, first ? wait : Wait{Reason::kBandwidth, -1}, first);
      first = false;
    }
  }
  Touch(what, issued, actor, done, done, done);
}

void Scheduler::Touch(const Instruction& what, const Issued& issued, int64_t actor, int64_t read_ps, int64_t written_ps,
                      int64_t visible_ps) {
  for (int64_t i = what.num_writes; i < what.num_writes + what.num_reads; ++i) {
    AddReader(slots_[issued.slots[i]], actor, read_ps);
  }
  const Ref* ref = &program_.refs[what.first_ref];
  for (int64_t i = 0; i < what.num_writes; ++i) {
    Slot& slot = slots_[issued.slots[i]];
    slot.writer = actor;
    slot.written_ps = std::max(slot.written_ps, written_ps);
    slot.visible_ps = std::max(slot.visible_ps, visible_ps);
    // The write waited for these reads, so no later one has to. Writes to HBM do not wait for each
    // other, so there the next one still must.
    if (!program_.pools[ref[i].pool].hbm) slot.first = slot.second = Reader{};
  }
}

// Keeps the latest reader and the latest one of another actor: whoever writes next waits for the
// later of those that are not itself, and times of one actor never go back.
void Scheduler::AddReader(Slot& slot, int64_t actor, int64_t done_ps) {
  if (slot.first.actor == actor) {
    slot.first.done_ps = std::max(slot.first.done_ps, done_ps);
    return;
  }
  if (done_ps >= slot.first.done_ps) {
    slot.second = slot.first;
    slot.first = {actor, done_ps};
  } else if (slot.second.actor == actor || done_ps > slot.second.done_ps) {
    slot.second = {actor, std::max(slot.second.actor == actor ? slot.second.done_ps : 0, done_ps)};
  }
}

void Scheduler::AddWait(int64_t engine, const Wait& wait, int64_t ps) {
  const int64_t slot = wait.reason == Reason::kSlot ? 1 : 0;
  const auto pools = static_cast<int64_t>(program_.pools.size());
  waits_ps_[(engine * 2 + slot) * pools + wait.pool] += ps;
}

void Scheduler::AddSpan(const Issued& issued, int64_t actor, Interval when, Wait wait, bool new_instruction) {
  int64_t& last = last_span_[actor];
  if (last >= 0) {
    Span& span = spans_[last];
    if (span.instruction == issued.instruction && span.end_ps == when.start_ps) {
      span.end_ps = when.end_ps;
      span.count += new_instruction;
      return;
    }
  }
  last = static_cast<int64_t>(spans_.size());
  spans_.push_back({issued.instruction, when.start_ps, when.end_ps, wait, new_instruction});
}

}  // namespace trn
