// All that the times of further instructions depend on, and the sums that a schedule adds up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dma.h"
#include "limiter.h"
#include "program.h"

namespace trn {

// whole_ps x part / all, rounded up.
inline int64_t ShareOf(int64_t whole_ps, int64_t part, int64_t all) {
  return part == all ? whole_ps : static_cast<int64_t>((static_cast<__int128>(whole_ps) * part + all - 1) / all);
}

struct Constants {
  int64_t semaphore_ps;
  int64_t dma_packet_ps;
  int64_t dma_horizon_ps;
  Ramp ramp;
};

struct Reader {
  int64_t actor = -1;
  int64_t done_ps = 0;
};

struct Slot {
  int64_t writer = -1;
  int64_t version = 0;     // How often it was written.
  int64_t written_ps = 0;  // When the writer itself may read it.
  int64_t visible_ps = 0;  // When others may.
  Reader first, second;    // The two latest readers; never the same actor twice.

  // Keeps the latest reader and the latest one of another actor: whoever writes next waits for the
  // later of those that are not itself, and times of one actor never go back.
  void AddReader(int64_t actor, int64_t done_ps) {
    if (first.actor == actor) {
      first.done_ps = std::max(first.done_ps, done_ps);
      return;
    }
    if (done_ps >= first.done_ps) {
      second = first;
      first = {actor, done_ps};
    } else if (second.actor == actor || done_ps > second.done_ps) {
      second = {actor, std::max(second.actor == actor ? second.done_ps : 0, done_ps)};
    }
  }

  // A write to a tile waited for its readers, so no later write has to. Writes to HBM do not wait
  // for each other, so there the next one still must.
  void Write(int64_t actor, int64_t own_ps, int64_t others_ps, bool hbm) {
    writer = actor;
    ++version;
    written_ps = std::max(written_ps, own_ps);
    visible_ps = std::max(visible_ps, others_ps);
    if (!hbm) first = second = Reader{};
  }
};

// Sums by what they are of. Idle time has one entry per cause: the data of a tile of each pool, the
// slots of each pool, and for DMA last its queue, whose own engines were still at work.
class Totals {
 public:
  explicit Totals(int64_t pools) : pools_(pools), sums_(kHead + (kEngines + 1) * 2 * pools + 1, 0) {}

  int64_t& busy(int64_t engine) { return sums_[engine]; }
  int64_t& limiter() { return sums_[kEngines]; }
  int64_t& bandwidth() { return sums_[kEngines + 1]; }
  int64_t& scheduled() { return sums_[kEngines + 2]; }
  // Waits of an engine's instructions, of DMA summed over its queues.
  int64_t& wait(int64_t engine, int64_t cause) { return sums_[kHead + engine * 2 * pools_ + cause]; }
  // Idle time of the DMA engines together.
  int64_t* dma_idle() { return &sums_[kHead + kEngines * 2 * pools_]; }

  int64_t slot_cause(int64_t pool) const { return pools_ + pool; }
  int64_t queue_cause() const { return 2 * pools_; }
  const std::vector<int64_t>& sums() const { return sums_; }

  // Adds `times` what was added since `earlier`.
  void Repeat(const Totals& earlier, int64_t times) {
    for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += times * (sums_[i] - earlier.sums_[i]);
  }

  static constexpr int64_t kHead = kEngines + 3;

 private:
  int64_t pools_;
  std::vector<int64_t> sums_;
};

// One access of a transfer to a tensor in HBM that dependencies track by parts.
struct PartAccess {
  int64_t pool;
  int64_t slot;
  int64_t actor;
  int64_t own_ps;  // As in Slot::AddReader or Slot::Write.
  int64_t others_ps;
  bool write;
};

// What changes with every instruction, apart from the slots.
struct Registers {
  Registers(const Program& program, const Constants& constants)
      : free_ps(program.num_actors(), 0),
        done_ps(program.num_actors(), 0),
        undecided(program.num_actors(), 0),
        dma(constants.dma_packet_ps, constants.dma_horizon_ps),
        totals(static_cast<int64_t>(program.pools.size())) {}

  std::vector<int64_t> free_ps;    // By actor: when it may start its next instruction,
  std::vector<int64_t> done_ps;    // and when all its results are there.
  std::vector<int64_t> undecided;  // How often it was left idle by a choice that may change in time.
  DmaServer dma;
  RampState ramp;
  int64_t weights_slot = -1;     // What the PE array holds: the tile in this slot,
  int64_t weights_version = -1;  // as it was written this many times.
  int64_t now_ps = 0;            // Latest start of what the issue pass has issued.
  Totals totals;
};

struct State : Registers {
  State(const Program& program, const Constants& constants) : Registers(program, constants), slots(program.num_slots) {}

  bool has_weights() const { return weights_slot >= 0 && slots[weights_slot].version == weights_version; }

  std::vector<Slot> slots;
  std::vector<PartAccess> part_accesses;  // In order; kept only while loops are watched.
};

}  // namespace trn
