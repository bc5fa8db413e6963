// Leaves out iterations of loops whose effect is known: once all state repeats itself, shifted in
// time, from one iteration to a later one, what follows repeats too.
//
// Exact, not an estimate: iterations are left out only if everything that a further instruction
// could read is equal or lies too far in the past to matter, and the state after them is the one
// that running them would have left.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "loop_info.h"
#include "program.h"
#include "scheduler.h"
#include "state.h"
#include "window.h"

namespace trn {

class LoopWatch {
 public:
  // `window` is the issue pass's, or null where instructions are issued in program order.
  LoopWatch(const Program& program, Scheduler& scheduler, Window* window);

  // A loop at `depth` starts; its kLoop is at `position`.
  void Enter(int64_t depth, int64_t position);
  // How many iterations to leave out after `done` of `trips`.
  int64_t Skip(int64_t depth, int64_t done, int64_t trips);

 private:
  struct Anchor {
    int64_t done;
    Registers registers;
    bool has_weights;
    std::vector<Slot> slots;  // Of the loop's pools, one after the other.
    std::vector<Window::Key> pending;
    size_t first_part_access;
  };

  struct Level {
    const LoopInfo* info = nullptr;
    bool looking = false;
    int64_t patience = 1;         // Periods until the next anchor.
    int64_t comparisons = 0;      // That found a difference,
    int64_t next_comparison = 0;  // and the iteration before which there is no other.
    std::optional<Anchor> anchor;
  };

  const LoopInfo& InfoOf(int64_t position, int64_t depth);
  void Stop(Level& level);
  bool HasAnchorOutside(const Level& level) const;
  void SetAnchor(int64_t depth, int64_t done);
  int64_t ShiftSince(const Level& level) const;
  int64_t LimitOf(const Level& level) const;
  std::vector<int64_t> Rotation(const Level& level, int64_t iterations) const;
  bool Repeats(const Level& level, int64_t shift_ps, int64_t span) const;
  bool SlotsRepeat(const Level& level, int64_t shift_ps, int64_t span) const;
  void Advance(Level& level, int64_t shift_ps, int64_t span, int64_t times);
  void AdvanceSlots(const Level& level, int64_t shift_ps, int64_t span, int64_t times);
  void RepeatParts(const Level& level, const std::vector<int64_t>& rotation, bool parts_move, int64_t shift_ps,
                   int64_t times);
  int64_t Moved(int64_t slot, const Level& level, int64_t iterations) const;
  void RepeatAccess(PartAccess& access, int64_t moved);

  const Program& program_;
  Scheduler& scheduler_;
  State& state_;
  Window* window_;
  const bool has_parts_;                        // Whether a tensor in HBM is tracked by parts.
  std::vector<std::optional<LoopInfo>> infos_;  // By position of the loop's kLoop.
  std::vector<Level> levels_;
};

}  // namespace trn
