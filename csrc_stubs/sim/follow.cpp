#include "follow.h"

#include <algorithm>
#include <unordered_map>

namespace trn {
namespace {

struct Event {
  int64_t start_ps;
  size_t placement;
  size_t piece;
};

std::vector<Event> InOrderOfTime(const std::vector<Placement>& placements) {
  std::vector<Event> events;
  for (size_t i = 0; i < placements.size(); ++i) {
    const std::vector<Interval>& pieces = placements[i].pieces;
    if (pieces.empty()) events.push_back({placements[i].start_ps, i, 0});
    for (size_t p = 0; p < pieces.size(); ++p) events.push_back({pieces[p].start_ps, i, p});
  }
  std::stable_sort(events.begin(), events.end(),
                   [](const Event& a, const Event& b) { return a.start_ps < b.start_ps; });
  return events;
}

// A DMA of which some pieces were placed.
struct Open {
  Transfer transfer;
  std::vector<Interval> pieces;
  int64_t held_ps = 0;
  int64_t left_ps;  // Of the other core's work.
};

}  // namespace

void RunInOrder(const Program& program, const Program& placed_for, const std::vector<Placement>& placements,
                Scheduler& scheduler) {
  std::unordered_map<size_t, Open> open;
  for (const Event& event : InOrderOfTime(placements)) {
    const Placement& placement = placements[event.placement];
    const Issued& issued = placement.issued;
    if (placement.pieces.empty()) {
      scheduler.Schedule(issued);
      continue;
    }
    const Choice& cost = program.choices[issued.choice];
    const int64_t there_ps = placed_for.choices[issued.choice].occupancy_ps;
    if (event.piece == 0) {
      const Ready ready = scheduler.ReadyAt(issued, ActorOf(program, issued));
      open.insert({event.placement, {scheduler.Begin(issued, ready), {}, 0, there_ps}});
    }
    Open& dma = open.at(event.placement);
    const Interval there = placement.pieces[event.piece];
    const int64_t ready_ps = dma.pieces.empty() ? dma.transfer.earliest_ps : dma.pieces.back().end_ps;
    const int64_t work_ps = ShareOf(cost.occupancy_ps, there.end_ps - there.start_ps, there_ps);
    const Interval piece = scheduler.Place(ready_ps, work_ps, dma.transfer.cause);
    dma.pieces.push_back(piece);
    dma.held_ps = std::max(dma.held_ps, piece.start_ps + ShareOf(cost.queue_ps, dma.left_ps, there_ps));
    dma.left_ps -= there.end_ps - there.start_ps;
    if (dma.left_ps) continue;
    scheduler.End(issued, dma.transfer, dma.held_ps, dma.pieces);
    open.erase(event.placement);
  }
}

}  // namespace trn
