// The issue pass that reorders: list scheduling with a look-ahead of some instructions per engine.
//
// Instructions arrive in program order and wait for those that they depend on. Of what is next in
// program order for each engine and each DMA queue, as many as the look-ahead says may be issued:
// time by time, the one that can start first is, and it is timed at once. Orders and engines are
// fixed that way; the scheduler then only ever runs queues in order.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "program.h"
#include "scheduler.h"

namespace trn {

class Window {
 public:
  Window(const Program& program, Scheduler& scheduler, int64_t look_ahead);

  // Takes the next instruction in program order.
  void Add(Issued& issued);
  // Issues all that is left.
  void Drain();

  // One pending instruction; `age` counts the instructions that arrived since.
  struct Key {
    Issued issued;
    int64_t age;
  };
  std::vector<Key> Pending() const;
  // Whether what is pending is `earlier` again, its slots moved on by rotation[pool], and nothing
  // but instructions from `first` to before `end`.
  bool Repeats(const std::vector<Key>& earlier, const std::vector<int64_t>& rotation, int64_t first, int64_t end) const;
  // After the state was shifted: moves the slots of what is pending on by rotation[pool].
  void Advance(const std::vector<int64_t>& rotation);

 private:
  // So many times the look-ahead may be pending in all: an engine with much to do must not keep
  // another from seeing its own next instructions.
  static constexpr int64_t kDepth = 32;

  struct Node {
    int32_t actor;
    int32_t unmet;  // Instructions that must be issued before.
    Ready ready;    // Known when none is.
    std::vector<int32_t> dependents;
    Issued issued;
  };

  using Access = std::pair<int32_t, int64_t>;  // Node, and its number when it was entered.

  struct SlotAccesses {
    std::vector<Access> writes, reads;
  };

  struct Queue {
    std::vector<int32_t> nodes;  // Pending ones of an actor, in program order, from `head` on.
    size_t head = 0;
    size_t best = 0;        // Of the window, the one to issue first; valid unless stale.
    int64_t start_ps = -1;  // When it can start; -1: none can.
    bool stale = true;
    size_t size() const { return nodes.size() - head; }
  };

  bool Full() const;
  void Choose(Issued& issued) const;
  int32_t NewNode(const Issued& issued);
  void Depend(int32_t node);
  void DependOn(const std::vector<Access>& accesses, int32_t node);
  void Enter(int32_t node);
  void Push(std::vector<Access>& accesses, int32_t node);
  void FindBest(Queue& queue, int64_t free_ps);
  void IssueOne();
  void Remove(Queue& queue, size_t at);
  void Rotate(Issued& issued, const std::vector<int64_t>& rotation) const;

  const Program& program_;
  Scheduler& scheduler_;
  const int64_t look_ahead_;
  std::vector<Node> nodes_;
  std::vector<int64_t> numbers_;  // Of each node, in program order; -1: not in use.
  std::vector<int32_t> unused_;
  std::vector<SlotAccesses> slots_;
  std::vector<Queue> queues_;        // By actor.
  std::vector<int64_t> backlog_ps_;  // By actor.
  int64_t pending_ = 0;
  int64_t arrived_ = 0;
};

}  // namespace trn
