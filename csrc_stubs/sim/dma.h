// The DMA engines of one core as one server, shared by all queues.
//
// Engines switch between queues at packet boundaries, so a transfer that became ready later in
// program order but earlier in time runs while an older one of another queue still waits for its
// data. Work is therefore placed into what is left idle before the server's end, in pieces if need
// be, and only then at its end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace trn {

struct Interval {
  int64_t start_ps;
  int64_t end_ps;
};

class DmaServer {
 public:
  // A piece shorter than packet_ps is no transfer of its own: hardware never splits a packet.
  explicit DmaServer(int64_t packet_ps) : packet_ps_(packet_ps) { gaps_.reserve(kMaxGaps + 2); }

  // Reserves work_ps at or after ready_ps; pieces() then holds where, in order of time.
  void Reserve(int64_t ready_ps, int64_t work_ps) {
    pieces_.clear();
    if (ready_ps < end_ps_) work_ps = FillGaps(ready_ps, work_ps);
    if (work_ps == 0) return;
    const int64_t start = std::max(ready_ps, end_ps_);
    if (start - end_ps_ >= packet_ps_) AddGap({end_ps_, start});
    end_ps_ = start + work_ps;
    if (!pieces_.empty() && pieces_.back().end_ps == start) {
      pieces_.back().end_ps = end_ps_;
    } else {
      pieces_.push_back({start, end_ps_});
    }
  }

  const std::vector<Interval>& pieces() const { return pieces_; }

 private:
  // Remembered idle intervals: a bound on memory and search, far above what tile pools allow a
  // Program to run ahead.
  static constexpr size_t kMaxGaps = 64;

  void AddGap(Interval gap) {
    if (gaps_.size() == kMaxGaps) gaps_.erase(gaps_.begin());
    gaps_.push_back(gap);
  }

  // Returns the work left over.
  int64_t FillGaps(int64_t ready_ps, int64_t work_ps) {
    size_t i = gaps_.size();
    while (i > 0 && gaps_[i - 1].end_ps > ready_ps) --i;
    while (i < gaps_.size() && work_ps > 0) {
      const Interval gap = gaps_[i];
      const int64_t start = std::max(ready_ps, gap.start_ps);
      const int64_t room = gap.end_ps - start;
      if (room < std::min(work_ps, packet_ps_)) {
        ++i;
        continue;
      }
      const int64_t taken = std::min(room, work_ps);
      pieces_.push_back({start, start + taken});
      work_ps -= taken;
      i = Shrink(i, {start, start + taken});
    }
    return work_ps;
  }

  // Takes `used` out of gap i; returns the position of the first gap after it.
  size_t Shrink(size_t i, Interval used) {
    const Interval gap = gaps_[i];
    const Interval before{gap.start_ps, used.start_ps};
    const Interval after{used.end_ps, gap.end_ps};
    const bool keep_before = before.end_ps - before.start_ps >= packet_ps_;
    const bool keep_after = after.end_ps - after.start_ps >= packet_ps_;
    if (keep_before && keep_after) {
      gaps_[i] = before;
      gaps_.insert(gaps_.begin() + static_cast<int64_t>(i) + 1, after);
      return i + 2;
    }
    if (keep_before || keep_after) {
      gaps_[i] = keep_before ? before : after;
      return i + 1;
    }
    gaps_.erase(gaps_.begin() + static_cast<int64_t>(i));
    return i;
  }

  int64_t packet_ps_;
  int64_t end_ps_ = 0;
  std::vector<Interval> gaps_;  // Sorted, disjoint, all before end_ps_.
  std::vector<Interval> pieces_;
};

}  // namespace trn
