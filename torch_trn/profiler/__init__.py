"""Profiles in simulated time: tables, records, timelines and traces of what the devices did.

`session` records, `recording` keeps, and the other files are views: `table`, `explain`, `spans` and
`chrome_trace`. `module_path` and `python_stack` say where in the user's program an operator is.
"""

from torch_trn.profiler.session import profile

__all__ = ["profile"]
