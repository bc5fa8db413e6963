#include "window.h"

#include <algorithm>

namespace trn {

Window::Window(const Program& program, Scheduler& scheduler, int64_t look_ahead)
    : program_(program),
      scheduler_(scheduler),
      look_ahead_(look_ahead),
      slots_(program.num_slots),
      queues_(program.num_actors()),
      backlog_ps_(program.num_actors(), 0) {}

void Window::Add(Issued& issued) {
  if (program_.instructions[issued.instruction].num_choices > 1) Choose(issued);
  const int32_t node = NewNode(issued);
  Depend(node);
  Enter(node);
  Queue& queue = queues_[nodes_[node].actor];
  queue.nodes.push_back(node);
  backlog_ps_[nodes_[node].actor] += program_.choices[issued.choice].occupancy_ps;
  ++pending_;
  if (nodes_[node].unmet == 0) {
    nodes_[node].ready = scheduler_.ReadyAt(issued, nodes_[node].actor);
    queue.stale = true;
  }
  while (Full()) IssueOne();
}

void Window::Drain() {
  while (pending_) IssueOne();
}

bool Window::Full() const {
  if (pending_ >= kDepth * look_ahead_) return true;
  for (const Queue& queue : queues_) {
    if (static_cast<int64_t>(queue.size()) < look_ahead_) return false;
  }
  return true;
}

// When an instruction arrives, its data may be far away: the engine is chosen that would be done
// first with all that waits for it.
void Window::Choose(Issued& issued) const {
  const Instruction& what = program_.instructions[issued.instruction];
  int64_t best = what.first_choice, best_end = 0;
  const State& state = scheduler_.state();
  for (int64_t i = what.first_choice; i < what.first_choice + what.num_choices; ++i) {
    const Choice& choice = program_.choices[i];
    const int64_t free_ps = std::max(state.free_ps[choice.engine], state.now_ps);
    const int64_t end = free_ps + backlog_ps_[choice.engine] + choice.occupancy_ps;
    if (i == what.first_choice || end < best_end) {
      best_end = end;
      best = i;
    }
  }
  issued.choice = static_cast<int32_t>(best);
}

int32_t Window::NewNode(const Issued& issued) {
  if (unused_.empty()) {
    unused_.push_back(static_cast<int32_t>(nodes_.size()));
    nodes_.emplace_back();
    numbers_.push_back(-1);
  }
  const int32_t index = unused_.back();
  unused_.pop_back();
  Node& node = nodes_[index];
  node.issued = issued;
  numbers_[index] = arrived_++;
  node.actor = static_cast<int32_t>(ActorOf(program_, issued));
  node.unmet = 0;
  node.dependents.clear();
  return index;
}

// A read depends on the writes before it, a write on the reads before it, and a write to a tile on
// the write before it; two writes to one HBM tensor go to different places.
void Window::Depend(int32_t node) {
  const Issued& issued = nodes_[node].issued;
  const Instruction& what = program_.instructions[issued.instruction];
  for (int64_t i = what.num_writes; i < what.num_writes + what.num_reads; ++i) {
    DependOn(slots_[issued.slots[i]].writes, node);
  }
  for (int64_t i = 0; i < what.num_writes; ++i) {
    const SlotAccesses& slot = slots_[issued.slots[i]];
    DependOn(slot.reads, node);
    if (!program_.pools[program_.refs[what.first_ref + i].pool].hbm) DependOn(slot.writes, node);
  }
}

void Window::DependOn(const std::vector<Access>& accesses, int32_t node) {
  for (const auto& [other, number] : accesses) {
    if (numbers_[other] != number) continue;
    nodes_[other].dependents.push_back(node);
    ++nodes_[node].unmet;
  }
}

// Makes later instructions depend on this one.
void Window::Enter(int32_t node) {
  const Issued& issued = nodes_[node].issued;
  const Instruction& what = program_.instructions[issued.instruction];
  for (int64_t i = what.num_writes; i < what.num_writes + what.num_reads; ++i) {
    Push(slots_[issued.slots[i]].reads, node);
  }
  for (int64_t i = 0; i < what.num_writes; ++i) {
    SlotAccesses& slot = slots_[issued.slots[i]];
    if (!program_.pools[program_.refs[what.first_ref + i].pool].hbm) {
      slot.writes.clear();
      slot.reads.clear();
    }
    Push(slot.writes, node);
  }
}

void Window::Push(std::vector<Access>& accesses, int32_t node) {
  if (accesses.size() == accesses.capacity()) {
    std::erase_if(accesses, [&](const Access& access) { return numbers_[access.first] != access.second; });
  }
  accesses.emplace_back(node, numbers_[node]);
}

void Window::FindBest(Queue& queue, int64_t free_ps) {
  queue.stale = false;
  queue.start_ps = -1;
  const size_t end = std::min(queue.nodes.size(), queue.head + static_cast<size_t>(look_ahead_));
  for (size_t i = queue.head; i < end; ++i) {
    const Node& node = nodes_[queue.nodes[i]];
    if (node.unmet) continue;
    const int64_t start_ps = std::max(free_ps, node.ready.ps);
    if (queue.start_ps >= 0 && start_ps >= queue.start_ps) continue;
    queue.start_ps = start_ps;
    queue.best = i;
    if (start_ps == free_ps) return;
  }
}

void Window::IssueOne() {
  State& state = scheduler_.state();
  Queue* first = nullptr;
  for (size_t actor = 0; actor < queues_.size(); ++actor) {
    Queue& queue = queues_[actor];
    if (queue.stale) FindBest(queue, state.free_ps[actor]);
    if (queue.start_ps < 0) continue;
    const auto number = [&](const Queue& of) { return numbers_[of.nodes[of.best]]; };
    if (!first || queue.start_ps < first->start_ps ||
        (queue.start_ps == first->start_ps && number(queue) < number(*first))) {
      first = &queue;
    }
  }
  const int32_t index = first->nodes[first->best];
  Node& node = nodes_[index];
  state.now_ps = std::max(state.now_ps, scheduler_.Schedule(node.issued, node.ready));
  backlog_ps_[node.actor] -= program_.choices[node.issued.choice].occupancy_ps;
  Remove(*first, first->best);
  numbers_[index] = -1;
  unused_.push_back(index);
  --pending_;
  for (const int32_t dependent : node.dependents) {
    Node& next = nodes_[dependent];
    if (--next.unmet) continue;
    next.ready = scheduler_.ReadyAt(next.issued, next.actor);
    queues_[next.actor].stale = true;
  }
}

void Window::Remove(Queue& queue, size_t at) {
  for (size_t i = at; i > queue.head; --i) queue.nodes[i] = queue.nodes[i - 1];
  queue.stale = true;
  if (++queue.head == queue.nodes.size()) {
    queue.nodes.clear();
    queue.head = 0;
  } else if (queue.head >= 4096) {
    queue.nodes.erase(queue.nodes.begin(), queue.nodes.begin() + static_cast<int64_t>(queue.head));
    queue.head = 0;
  }
}

std::vector<Window::Key> Window::Pending() const {
  std::vector<Key> keys;
  for (const Queue& queue : queues_) {
    for (size_t i = queue.head; i < queue.nodes.size(); ++i) {
      const Node& node = nodes_[queue.nodes[i]];
      keys.push_back({node.issued, arrived_ - numbers_[queue.nodes[i]]});
    }
  }
  return keys;
}

bool Window::Repeats(const std::vector<Key>& earlier, const std::vector<int64_t>& rotation, int64_t first,
                     int64_t end) const {
  if (static_cast<int64_t>(earlier.size()) != pending_) return false;
  auto key = earlier.begin();
  for (const Queue& queue : queues_) {
    for (size_t i = queue.head; i < queue.nodes.size(); ++i, ++key) {
      const Node& node = nodes_[queue.nodes[i]];
      const Issued& now = node.issued;
      if (now.instruction < first || now.instruction >= end) return false;
      if (now.instruction != key->issued.instruction || now.choice != key->issued.choice) return false;
      if (arrived_ - numbers_[queue.nodes[i]] != key->age) return false;
      Issued moved = key->issued;
      Rotate(moved, rotation);
      const Instruction& what = program_.instructions[now.instruction];
      if (!std::equal(moved.slots, moved.slots + what.num_writes + what.num_reads, now.slots)) return false;
    }
  }
  return true;
}

void Window::Rotate(Issued& issued, const std::vector<int64_t>& rotation) const {
  const Instruction& what = program_.instructions[issued.instruction];
  for (int64_t i = 0; i < what.num_writes + what.num_reads; ++i) {
    const int64_t pool_index = program_.refs[what.first_ref + i].pool;
    if (!rotation[pool_index]) continue;
    const Pool& pool = program_.pools[pool_index];
    const int64_t moved = (issued.slots[i] - pool.first_slot + rotation[pool_index]) % pool.slots;
    issued.slots[i] = static_cast<int32_t>(pool.first_slot + moved);
  }
}

void Window::Advance(const std::vector<int64_t>& rotation) {
  std::vector<int32_t> order;
  for (Queue& queue : queues_) {
    queue.stale = true;
    order.insert(order.end(), queue.nodes.begin() + static_cast<int64_t>(queue.head), queue.nodes.end());
  }
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return numbers_[a] < numbers_[b]; });
  for (const int32_t index : order) Rotate(nodes_[index].issued, rotation);
  for (SlotAccesses& slot : slots_) {
    slot.writes.clear();
    slot.reads.clear();
  }
  for (const int32_t index : order) Enter(index);
  for (const int32_t index : order) {
    Node& node = nodes_[index];
    if (node.unmet == 0) node.ready = scheduler_.ReadyAt(node.issued, node.actor);
  }
}

}  // namespace trn
