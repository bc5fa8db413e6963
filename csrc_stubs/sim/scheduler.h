// Times a stream of instructions on one NeuronCore, in integer picoseconds.
//
// Each engine and each DMA queue runs strictly in the order in which it is given instructions; what
// it is given when is the issue pass's decision. An instruction starts when its queue is free and
// its tiles allow it: a read waits for the slot's last write, a write for the slot's last write and
// for all reads since. All these point backwards in the stream, so one pass over it suffices.
#pragma once

#include <cstdint>
#include <vector>

#include "dma.h"
#include "expand.h"
#include "program.h"

namespace trn {

// Why an instruction did not start earlier.
enum class Reason : int64_t { kNothing = 0, kQueue = 1, kTile = 2, kSlot = 3, kBandwidth = 4 };

struct Wait {
  Reason reason = Reason::kNothing;
  int64_t pool = -1;  // For kTile (data not there yet) and kSlot (slot still in use).
};

// A run of one instruction that kept one engine busy without a break.
struct Span {
  int64_t instruction;
  int64_t start_ps;
  int64_t end_ps;
  Wait wait;
  int64_t count;
};

struct Constants {
  int64_t semaphore_ps;
  int64_t dma_packet_ps;
};

class Scheduler {
 public:
  Scheduler(const Program& program, Constants constants, bool spans);

  void Schedule(const Issued& issued);

  int64_t duration_ps() const { return duration_ps_; }
  const int64_t* busy_ps() const { return busy_ps_; }
  int64_t num_scheduled() const { return num_scheduled_; }
  // Idle time by cause: [engine][0: tile, 1: slot][pool], and DMA work delayed by other DMA work.
  const std::vector<int64_t>& waits_ps() const { return waits_ps_; }
  int64_t bandwidth_wait_ps() const { return bandwidth_wait_ps_; }
  const std::vector<Span>& spans() const { return spans_; }

 private:
  // An actor is what runs in order: one of the four compute engines, or one DMA queue.
  struct Reader {
    int64_t actor = -1;
    int64_t done_ps = 0;
  };

  struct Slot {
    int64_t writer = -1;
    int64_t written_ps = 0;  // When the writer itself may read it.
    int64_t visible_ps = 0;  // When others may.
    Reader first, second;    // The two latest readers; never the same actor twice.
  };

  struct Ready {
    int64_t ps = 0;
    Wait wait;
    void Until(int64_t time_ps, Reason reason, int64_t pool) {
      if (time_ps > ps) *this = {time_ps, {reason, pool}};
    }
  };

  Ready ReadyAt(const Instruction& what, const Issued& issued, int64_t actor) const;
  int64_t Occupancy(const Instruction& what, const Issued& issued);
  void RunCompute(const Instruction& what, const Issued& issued);
  void RunDma(const Instruction& what, const Issued& issued);
  void Touch(const Instruction& what, const Issued& issued, int64_t actor, int64_t read_ps, int64_t written_ps,
             int64_t visible_ps);
  void AddReader(Slot& slot, int64_t actor, int64_t done_ps);
  void AddWait(int64_t engine, const Wait& wait, int64_t ps);
  void AddSpan(const Issued& issued, int64_t actor, Interval when, Wait wait, bool new_instruction);

  const Program& program_;
  const Constants constants_;
  const bool want_spans_;
  std::vector<Slot> slots_;
  std::vector<int64_t> free_ps_;  // By actor.
  DmaServer dma_;
  int64_t weights_slot_ = -1;  // What the PE array holds: the tile in this slot,
  int64_t weights_ps_ = -1;    // as it was written at this time.
  int64_t duration_ps_ = 0;
  int64_t busy_ps_[kEngines] = {};
  int64_t num_scheduled_ = 0;
  std::vector<int64_t> waits_ps_;
  int64_t bandwidth_wait_ps_ = 0;
  std::vector<Span> spans_;
  std::vector<int64_t> last_span_;  // By actor.
};

}  // namespace trn
