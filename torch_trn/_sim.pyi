from array import array

import numpy as np
from numpy.typing import NDArray

_Tables = tuple[array[int], array[int], array[int], array[int], array[int], array[int]]
_Constants = tuple[int, int, int, int, int]

def schedule(
    tables: _Tables,
    issued_for: tuple[_Tables, _Constants] | None,
    constants: _Constants,
    look_ahead: int,
    spans: bool,
    extrapolate: bool,
) -> tuple[int, NDArray[np.int64], int, NDArray[np.int64]]: ...
def tile_matmul(
    stationary: NDArray[np.float32], moving: NDArray[np.float32]
) -> NDArray[np.float32]: ...
