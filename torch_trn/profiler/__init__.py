"""Profiles in simulated time: tables, records, timelines and traces of what the devices did.

`session` records, `recording` keeps, and the other files are views: `table`, `explain`, `memory`,
`spans` and `chrome_trace`. `module_path` and `python_stack` say where in the user's program an
operator is, `memory_mark` what its memory is for. `estimating` asks whether a program fits.
"""

from torch_trn.profiler.estimating import Estimate, estimate
from torch_trn.profiler.session import profile

__all__ = ["Estimate", "estimate", "profile"]
