// The DMA engines of one core as one server, shared by all queues.
//
// Engines switch between queues at packet boundaries, so a transfer that became ready later in
// issue order but earlier in time runs while an older one of another queue still waits for its
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
  // A piece shorter than packet_ps is no transfer of its own: hardware never splits a packet. Idle
  // time more than horizon_ps before the server's end is forgotten.
  DmaServer(int64_t packet_ps, int64_t horizon_ps) : packet_ps_(packet_ps), horizon_ps_(horizon_ps) {}

  // Reserves work_ps at or after ready_ps; pieces() then holds where, in order of time. The server's
  // idle time before it is booked in idle_ps, by the cause of the transfer that ended it.
  void Reserve(int64_t ready_ps, int64_t work_ps, int64_t cause, int64_t* idle_ps) {
    pieces_.clear();
    if (ready_ps < end_ps_) work_ps = FillGaps(ready_ps, work_ps, cause, idle_ps);
    if (work_ps) Append(ready_ps, work_ps, cause, idle_ps);
  }

  // Adds work_ps to pieces(), at or after ready_ps and after all work so far.
  void Append(int64_t ready_ps, int64_t work_ps, int64_t cause, int64_t* idle_ps) {
    const int64_t start = std::max(ready_ps, end_ps_);
    idle_ps[cause] += start - end_ps_;
    if (start - end_ps_ >= packet_ps_) gaps_.push_back({end_ps_, start, cause});
    end_ps_ = start + work_ps;
    if (!pieces_.empty() && pieces_.back().end_ps == start) {
      pieces_.back().end_ps = end_ps_;
    } else {
      pieces_.push_back({start, end_ps_});
    }
    Forget();
  }

  void Clear() { pieces_.clear(); }
  const std::vector<Interval>& pieces() const { return pieces_; }
  int64_t end_ps() const { return end_ps_; }

  // Whether this is `earlier`, shift_ps later.
  bool Repeats(const DmaServer& earlier, int64_t shift_ps) const {
    if (end_ps_ != earlier.end_ps_ + shift_ps || gaps_.size() != earlier.gaps_.size()) return false;
    for (size_t i = 0; i < gaps_.size(); ++i) {
      const Gap &now = gaps_[i], &then = earlier.gaps_[i];
      if (now.start_ps != then.start_ps + shift_ps || now.end_ps != then.end_ps + shift_ps || now.cause != then.cause) {
        return false;
      }
    }
    return true;
  }

  void Shift(int64_t shift_ps) {
    end_ps_ += shift_ps;
    for (Gap& gap : gaps_) {
      gap.start_ps += shift_ps;
      gap.end_ps += shift_ps;
    }
  }

 private:
  struct Gap {
    int64_t start_ps;
    int64_t end_ps;
    int64_t cause;  // What the transfer after it waited for.
  };

  void Forget() {
    size_t old = 0;
    while (old < gaps_.size() && gaps_[old].end_ps <= end_ps_ - horizon_ps_) ++old;
    if (old) gaps_.erase(gaps_.begin(), gaps_.begin() + static_cast<int64_t>(old));
  }

  // Returns the work left over.
  int64_t FillGaps(int64_t ready_ps, int64_t work_ps, int64_t cause, int64_t* idle_ps) {
    size_t i = gaps_.size();
    while (i > 0 && gaps_[i - 1].end_ps > ready_ps) --i;
    while (i < gaps_.size() && work_ps > 0) {
      const Gap gap = gaps_[i];
      const int64_t start = std::max(ready_ps, gap.start_ps);
      const int64_t room = gap.end_ps - start;
      if (room < std::min(work_ps, packet_ps_)) {
        ++i;
        continue;
      }
      const int64_t taken = std::min(room, work_ps);
      pieces_.push_back({start, start + taken});
      work_ps -= taken;
      idle_ps[gap.cause] -= start + taken - gap.start_ps;
      idle_ps[cause] += start - gap.start_ps;
      i = Shrink(i, {gap.start_ps, start, cause}, {start + taken, gap.end_ps, gap.cause});
    }
    return work_ps;
  }

  // Leaves of gap i what lies before and after a piece; returns the position of the gap after it.
  size_t Shrink(size_t i, Gap before, Gap after) {
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
  int64_t horizon_ps_;
  int64_t end_ps_ = 0;
  std::vector<Gap> gaps_;  // Sorted, disjoint, all before end_ps_.
  std::vector<Interval> pieces_;
};

}  // namespace trn
