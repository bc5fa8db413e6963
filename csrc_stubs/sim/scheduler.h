// Times a stream of instructions on one NeuronCore, in integer picoseconds.
//
// Each engine and each DMA queue runs strictly in the order in which it is given instructions; what
// it is given when is the issue pass's decision. An instruction starts when its queue is free and
// its tiles allow it: a read waits for the slot's last write, a write for the slot's last write and
// for all reads since. All these point backwards in the stream, so one pass over it suffices.
#pragma once

#include <cstdint>
#include <vector>

#include "expand.h"
#include "program.h"
#include "state.h"

namespace trn {

// Why an instruction did not start earlier.
enum class Reason : int64_t { kNothing = 0, kQueue = 1, kTile = 2, kSlot = 3, kBandwidth = 4 };

struct Wait {
  Reason reason = Reason::kNothing;
  int64_t pool = -1;  // For kTile (data not there yet) and kSlot (slot still in use).
};

struct Ready {
  int64_t ps = 0;
  Wait wait;
  void Until(int64_t time_ps, Reason reason, int64_t pool) {
    if (time_ps > ps) *this = {time_ps, {reason, pool}};
  }
};

// A run of one instruction that kept one engine busy without a break.
struct Span {
  int64_t instruction;
  int64_t choice;
  int64_t start_ps;
  int64_t end_ps;
  Wait wait;
  int64_t count;
};

// What was placed where, for a second run that keeps the order of the first.
struct Placement {
  Issued issued;
  int64_t start_ps;
  std::vector<Interval> pieces;  // Of a DMA.
};

// A DMA between its first piece and its last.
struct Transfer {
  int64_t actor;
  int64_t free_ps;      // When its queue had got to it,
  int64_t earliest_ps;  // and when its tiles were ready as well.
  Wait wait;
  int64_t cause;
};

class Scheduler {
 public:
  Scheduler(const Program& program, Constants constants, bool spans)
      : program_(program),
        constants_(constants),
        want_spans_(spans),
        state_(program, constants),
        last_span_(program.num_actors(), -1) {}

  // Times an instruction; returns when it started. The second saves asking again what ReadyAt said.
  int64_t Schedule(const Issued& issued) { return Schedule(issued, ReadyAt(issued, ActorOf(program_, issued))); }
  int64_t Schedule(const Issued& issued, const Ready& ready);
  // The same in steps, for a DMA whose pieces the caller places one after the other.
  Transfer Begin(const Issued& issued, const Ready& ready) const;
  Interval Place(int64_t ready_ps, int64_t work_ps, int64_t cause);
  void End(const Issued& issued, const Transfer& transfer, int64_t held_ps, const std::vector<Interval>& pieces);
  // When the tiles of an instruction allow it to start on `actor`.
  Ready ReadyAt(const Issued& issued, int64_t actor) const;
  // Gives an instruction that is next in order to the engine on which it would be done first.
  void Choose(Issued& issued);

  State& state() { return state_; }
  bool has_ramp() const { return constants_.ramp.ramp_ps > 0; }
  const std::vector<Span>& spans() const { return spans_; }
  int64_t num_run() const { return num_run_; }
  std::vector<Placement>* placements = nullptr;  // Filled if set.
  bool log_parts = false;                        // Whether to keep State::part_accesses.

 private:
  int64_t Occupancy(const Choice& cost, const Instruction& what, const Issued& issued, int64_t start_ps);
  int64_t RunCompute(const Choice& cost, const Instruction& what, const Issued& issued, const Ready& ready);
  int64_t RunDma(const Choice& cost, const Issued& issued, const Ready& ready);
  void Touch(const Instruction& what, const Issued& issued, int64_t actor, int64_t read_ps, int64_t written_ps,
             int64_t visible_ps);
  void AddDmaSpans(const Issued& issued, int64_t actor, const std::vector<Interval>& pieces, Wait wait);
  void AddSpan(const Issued& issued, int64_t actor, Interval when, Wait wait, bool new_instruction);
  int64_t CauseOf(const Wait& wait) const;

  const Program& program_;
  const Constants constants_;
  const bool want_spans_;
  State state_;
  int64_t num_run_ = 0;
  std::vector<Span> spans_;
  std::vector<int64_t> last_span_;  // By actor.
};

}  // namespace trn
