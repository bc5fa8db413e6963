// The way from a call that the cost cache does not hold to Python's lowerings and back.
#pragma once

#include <pybind11/pybind11.h>

namespace trn {

// `lower(name, args, outs, fresh) -> (launch_ps, duration_ps, busy_ps[5], flops, hbm_bytes, bound, host)`;
// `has_lowering(name) -> bool`. Tensors arrive as meta tensors.
void set_lowering(pybind11::object lower, pybind11::object has_lowering);

}  // namespace trn
