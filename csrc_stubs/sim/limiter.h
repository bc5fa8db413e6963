// The ramp of the PE array after idle time (dI/dt), as a function of how busy it was.
//
// Cold, the array starts at a share of its rate and gains the rest in proportion to the time it was
// busy; after ramp_ps of it, it is hot and runs at full rate. Busy time counts up and idle time
// down, between 0 and ramp_ps, so that use below one half over a window as long cools it down.
#pragma once

#include <algorithm>
#include <cstdint>

namespace trn {

struct Ramp {
  int64_t ramp_ps = 0;            // 0: no ramp.
  int64_t start_permille = 1000;  // Share of the rate at which a cold array starts.
};

class RampState {
 public:
  // How long an instruction takes that starts at start_ps and would take full_ps at full rate.
  int64_t Occupancy(const Ramp& ramp, int64_t start_ps, int64_t full_ps) {
    credit_ps_ = std::max<int64_t>(0, credit_ps_ - (start_ps - last_end_ps_));
    if (credit_ps_ == 0) hot_ = false;
    int64_t taken_ps = full_ps;
    if (!hot_) {
      const int64_t permille = ramp.start_permille + (1000 - ramp.start_permille) * credit_ps_ / ramp.ramp_ps;
      taken_ps = (full_ps * 1000 + permille - 1) / permille;
    }
    credit_ps_ = std::min(ramp.ramp_ps, credit_ps_ + taken_ps);
    if (credit_ps_ == ramp.ramp_ps) hot_ = true;
    last_end_ps_ = start_ps + taken_ps;
    return taken_ps;
  }

  // Whether this is `earlier`, shift_ps later.
  bool Repeats(const RampState& earlier, int64_t shift_ps) const {
    return hot_ == earlier.hot_ && credit_ps_ == earlier.credit_ps_ && last_end_ps_ == earlier.last_end_ps_ + shift_ps;
  }

  void Shift(int64_t shift_ps) { last_end_ps_ += shift_ps; }

 private:
  bool hot_ = false;
  int64_t credit_ps_ = 0;
  int64_t last_end_ps_ = 0;
};

}  // namespace trn
