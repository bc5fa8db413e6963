#include "loops.h"

#include <algorithm>

namespace trn {
namespace {

// Below so many instructions running a loop costs less than watching it; more where what is pending
// in the issue pass has to be compared as well.
constexpr int64_t kWorthwhile = 256;
constexpr int64_t kWorthwhileReordered = 4096;

// A loop that touches more parts of HBM before it repeats is run to its end.
constexpr size_t kMostPartAccesses = 1 << 16;

// Whether two accesses of one slot, one shift_ps after the other, are the same for everything that
// starts after their limits.
bool SameTime(int64_t then_ps, int64_t then_limit_ps, int64_t now_ps, int64_t shift_ps) {
  const int64_t limit_ps = then_limit_ps + shift_ps;
  return now_ps == then_ps + shift_ps || (then_ps <= then_limit_ps && now_ps <= limit_ps);
}

bool SameReader(const Reader& then, int64_t limit_ps, const Reader& now, int64_t shift_ps) {
  const bool past = then.done_ps <= limit_ps && now.done_ps <= limit_ps + shift_ps;
  return past || (then.actor == now.actor && now.done_ps == then.done_ps + shift_ps);
}

bool SameSlot(const Slot& then, int64_t limit_ps, const Slot& now, int64_t shift_ps) {
  const bool past = then.visible_ps <= limit_ps && now.visible_ps <= limit_ps + shift_ps;
  return (past || then.writer == now.writer) && SameTime(then.visible_ps, limit_ps, now.visible_ps, shift_ps) &&
         SameTime(then.written_ps, limit_ps, now.written_ps, shift_ps) &&
         SameReader(then.first, limit_ps, now.first, shift_ps) &&
         SameReader(then.second, limit_ps, now.second, shift_ps);
}

// The same without a limit: all of the slot is as it was, later.
bool ExactlyLater(const Slot& then, const Slot& now, int64_t shift_ps) {
  const auto reader = [&](const Reader& a, const Reader& b) {
    return a.actor == b.actor && (a.actor < 0 || b.done_ps == a.done_ps + shift_ps);
  };
  if (then.writer != now.writer || !reader(then.first, now.first) || !reader(then.second, now.second)) return false;
  return then.writer < 0 ||
         (now.written_ps == then.written_ps + shift_ps && now.visible_ps == then.visible_ps + shift_ps);
}

Slot Later(Slot slot, int64_t shift_ps) {
  if (slot.writer >= 0) {
    slot.written_ps += shift_ps;
    slot.visible_ps += shift_ps;
  }
  for (Reader* reader : {&slot.first, &slot.second}) {
    if (reader->actor >= 0) reader->done_ps += shift_ps;
  }
  return slot;
}

// Moves on what changed between `then` and `now`; what did not will not change either.
void ShiftReader(const Slot& then, Reader& reader, int64_t shift_ps) {
  for (const Reader& old : {then.first, then.second}) {
    if (old.actor == reader.actor && old.done_ps == reader.done_ps) return;
  }
  reader.done_ps += shift_ps;
}

void ShiftSlot(const Slot& then, Slot& now, int64_t shift_ps) {
  if (now.visible_ps != then.visible_ps) {
    now.written_ps += shift_ps;
    now.visible_ps += shift_ps;
  }
  ShiftReader(then, now.first, shift_ps);
  ShiftReader(then, now.second, shift_ps);
}

}  // namespace

LoopWatch::LoopWatch(const Program& program, Scheduler& scheduler, Window* window)
    : program_(program),
      scheduler_(scheduler),
      state_(scheduler.state()),
      window_(window),
      has_parts_(std::any_of(program.pools.begin(), program.pools.end(),
                             [](const Pool& pool) { return pool.hbm && pool.slots > 1; })),
      infos_(program.ops.size()) {}

const LoopInfo& LoopWatch::InfoOf(int64_t position, int64_t depth) {
  std::optional<LoopInfo>& info = infos_[position];
  if (!info) info = Analyse(program_, position, depth, window_ ? kWorthwhileReordered : kWorthwhile);
  return *info;
}

void LoopWatch::Enter(int64_t depth, int64_t position) {
  if (static_cast<int64_t>(levels_.size()) <= depth) levels_.resize(depth + 1);
  Level& level = levels_[depth];
  level.info = &InfoOf(position, depth);
  level.looking = level.info->watched;
  level.patience = 1;
  level.comparisons = level.next_comparison = 0;
  level.anchor.reset();
}

// As in Brent's search for cycles: compare with one anchor, and move it on at growing distances, so
// that it leaves the start-up behind and any period fits at last.
int64_t LoopWatch::Skip(int64_t depth, int64_t done, int64_t trips) {
  Level& level = levels_[depth];
  if (!level.looking || done % level.info->period) return 0;
  if (level.anchor) {
    const int64_t span = done - level.anchor->done;
    const int64_t times = (trips - done) / span;
    if (times == 0 || state_.part_accesses.size() - level.anchor->first_part_access > kMostPartAccesses) {
      Stop(level);
      return 0;
    }
    const int64_t shift_ps = done < level.next_comparison ? 0 : ShiftSince(level);
    if (shift_ps > 0) {
      if (Repeats(level, shift_ps, span)) {
        Advance(level, shift_ps, span, times);
        Stop(level);
        return times * span;
      }
      // Where comparing leads to nothing it is done less and less often.
      level.next_comparison = done + level.info->period * ++level.comparisons;
    }
    if (span < level.patience * level.info->period) return 0;
    level.patience *= 2;
  }
  SetAnchor(depth, done);
  return 0;
}

void LoopWatch::Stop(Level& level) {
  level.looking = false;
  level.anchor.reset();
  // Loops further in are over; those around this one may still need what is logged.
  scheduler_.log_parts = scheduler_.log_parts && HasAnchorOutside(level);
}

bool LoopWatch::HasAnchorOutside(const Level& level) const {
  for (const Level* outer = levels_.data(); outer != &level; ++outer) {
    if (outer->anchor) return true;
  }
  return false;
}

void LoopWatch::SetAnchor(int64_t depth, int64_t done) {
  Level& level = levels_[depth];
  level.anchor.reset();
  if (!HasAnchorOutside(level)) state_.part_accesses.clear();
  Anchor anchor{done, state_, state_.has_weights(), {}, {}, state_.part_accesses.size()};
  for (const auto& [index, rotation] : level.info->pools) {
    const Pool& pool = program_.pools[index];
    const auto first = state_.slots.begin() + pool.first_slot;
    anchor.slots.insert(anchor.slots.end(), first, first + pool.slots);
  }
  if (window_) anchor.pending = window_->Pending();
  level.anchor = std::move(anchor);
  scheduler_.log_parts = has_parts_;
}

// By how much all that ran since the anchor moved on; 0 if not all by the same time.
int64_t LoopWatch::ShiftSince(const Level& level) const {
  const Registers& then = level.anchor->registers;
  int64_t shift_ps = 0;
  for (size_t actor = 0; actor < then.free_ps.size(); ++actor) {
    const int64_t moved_ps = state_.free_ps[actor] - then.free_ps[actor];
    if (moved_ps == 0) continue;
    if (shift_ps && moved_ps != shift_ps) return 0;
    shift_ps = moved_ps;
  }
  return shift_ps;
}

bool LoopWatch::Repeats(const Level& level, int64_t shift_ps, int64_t span) const {
  const Registers& then = level.anchor->registers;
  bool dma = false, tensor = false;
  for (const int64_t actor : level.info->actors) {
    if (state_.free_ps[actor] == then.free_ps[actor]) {
      // An engine that an instruction could have been given to, and was not.
      const int64_t limit_ps = window_ ? then.now_ps : LimitOf(level);
      if (then.free_ps[actor] > limit_ps || state_.undecided[actor] != then.undecided[actor]) return false;
      continue;
    }
    if (state_.done_ps[actor] != then.done_ps[actor] + shift_ps) return false;
    dma |= actor >= kDma;
    tensor |= actor == kTensor;
  }
  if (dma && !state_.dma.Repeats(then.dma, shift_ps)) return false;
  if (tensor && scheduler_.has_ramp() && !state_.ramp.Repeats(then.ramp, shift_ps)) return false;
  const bool weights = state_.has_weights();
  if (weights != level.anchor->has_weights) return false;
  if (weights && state_.weights_slot != Moved(then.weights_slot, level, span)) return false;
  if (window_) {
    if (state_.now_ps != then.now_ps + shift_ps) return false;
    const LoopInfo& info = *level.info;
    if (!window_->Repeats(level.anchor->pending, Rotation(level, span), info.first_instruction, info.end_instruction)) {
      return false;
    }
  }
  return SlotsRepeat(level, shift_ps, span);
}

bool LoopWatch::SlotsRepeat(const Level& level, int64_t shift_ps, int64_t span) const {
  const int64_t limit_ps = LimitOf(level);
  const std::vector<int64_t> rotation = Rotation(level, span);
  const Slot* then = level.anchor->slots.data();
  for (const auto& [index, _] : level.info->pools) {
    const Pool& pool = program_.pools[index];
    const Slot* now = &state_.slots[pool.first_slot];
    for (int64_t s = 0; s < pool.slots; ++s) {
      const int64_t moved = s + rotation[index] < pool.slots ? s + rotation[index] : s + rotation[index] - pool.slots;
      const bool same = rotation[index] && !pool.hbm ? ExactlyLater(then[s], now[moved], shift_ps)
                                                     : SameSlot(then[s], limit_ps, now[moved], shift_ps);
      if (!same) return false;
    }
    then += pool.slots;
  }
  return true;
}

// No instruction of the loop started before this after the anchor.
int64_t LoopWatch::LimitOf(const Level& level) const {
  const Registers& then = level.anchor->registers;
  int64_t limit_ps = INT64_MAX;
  for (const int64_t actor : level.info->actors) {
    if (state_.free_ps[actor] != then.free_ps[actor]) limit_ps = std::min(limit_ps, then.free_ps[actor]);
  }
  return limit_ps;
}

// How far the slots of each pool move on in `iterations`.
std::vector<int64_t> LoopWatch::Rotation(const Level& level, int64_t iterations) const {
  std::vector<int64_t> rotation(program_.pools.size(), 0);
  for (const auto& [index, each] : level.info->pools) {
    const int64_t slots = program_.pools[index].slots;
    rotation[index] = each * (iterations / level.info->period % slots) % slots;
  }
  return rotation;
}

// The slot that does in `iterations` what `slot` does now.
int64_t LoopWatch::Moved(int64_t slot, const Level& level, int64_t iterations) const {
  const std::vector<int64_t> rotation = Rotation(level, iterations);
  for (const auto& [index, _] : level.info->pools) {
    const Pool& pool = program_.pools[index];
    const int64_t at = slot - pool.first_slot;
    if (at >= 0 && at < pool.slots) return pool.first_slot + (at + rotation[index]) % pool.slots;
  }
  return slot;
}

// The state after `times` more of what ran since the anchor.
void LoopWatch::Advance(Level& level, int64_t shift_ps, int64_t span, int64_t times) {
  const Anchor& anchor = *level.anchor;
  const Registers& then = anchor.registers;
  const int64_t all_ps = shift_ps * times;
  state_.weights_slot = state_.has_weights() ? Moved(state_.weights_slot, level, span * times) : -1;
  AdvanceSlots(level, shift_ps, span, times);
  bool dma = false;
  for (const int64_t actor : level.info->actors) {
    if (state_.free_ps[actor] == then.free_ps[actor]) continue;
    state_.free_ps[actor] += all_ps;
    state_.done_ps[actor] += all_ps;
    dma |= actor >= kDma;
    if (actor == kTensor) state_.ramp.Shift(all_ps);
  }
  if (dma) state_.dma.Shift(all_ps);
  state_.now_ps += state_.now_ps == then.now_ps ? 0 : all_ps;
  state_.totals.Repeat(then.totals, times);
  if (window_) window_->Advance(Rotation(level, span * times));
}

void LoopWatch::AdvanceSlots(const Level& level, int64_t shift_ps, int64_t span, int64_t times) {
  const std::vector<int64_t> rotation = Rotation(level, span);
  const Slot* then = level.anchor->slots.data();
  bool parts_move = false;
  for (const auto& [index, _] : level.info->pools) {
    const Pool& pool = program_.pools[index];
    parts_move |= pool.hbm && rotation[index];
    const auto now = state_.slots.begin() + pool.first_slot;
    if (!rotation[index]) {
      for (int64_t s = 0; s < pool.slots; ++s) ShiftSlot(then[s], now[s], shift_ps * times);
    } else if (!pool.hbm) {
      std::rotate(now, now + (pool.slots - times % pool.slots * rotation[index] % pool.slots) % pool.slots,
                  now + pool.slots);
      for (int64_t s = 0; s < pool.slots; ++s) now[s] = Later(now[s], shift_ps * times);
    }
    then += pool.slots;
  }
  if (scheduler_.log_parts) RepeatParts(level, rotation, parts_move, shift_ps, times);
}

void LoopWatch::RepeatParts(const Level& level, const std::vector<int64_t>& rotation, bool parts_move, int64_t shift_ps,
                            int64_t times) {
  const size_t first = level.anchor->first_part_access, end = state_.part_accesses.size();
  // Where parts stay, the last time decides.
  for (int64_t time = parts_move ? 1 : times; time <= times; ++time) {
    for (size_t i = first; i < end; ++i) {
      PartAccess access = state_.part_accesses[i];
      if (!rotation[access.pool] && time < times) continue;
      access.own_ps += time * shift_ps;
      access.others_ps += time * shift_ps;
      if (rotation[access.pool]) RepeatAccess(access, time * rotation[access.pool]);
      state_.part_accesses.push_back(access);
    }
  }
}

void LoopWatch::RepeatAccess(PartAccess& access, int64_t moved) {
  const Pool& pool = program_.pools[access.pool];
  access.slot = pool.first_slot + (access.slot - pool.first_slot + moved) % pool.slots;
  Slot& slot = state_.slots[access.slot];
  if (access.write) {
    slot.Write(access.actor, access.own_ps, access.others_ps, true);
  } else {
    slot.AddReader(access.actor, access.own_ps);
  }
}

}  // namespace trn
