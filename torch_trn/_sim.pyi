import numpy as np
from numpy.typing import NDArray

def schedule(
    pools: NDArray[np.int64],
    terms: NDArray[np.int64],
    refs: NDArray[np.int64],
    instructions: NDArray[np.int64],
    ops: NDArray[np.int64],
    semaphore_ps: int,
    dma_packet_ps: int,
    spans: bool,
) -> tuple[int, tuple[int, int, int, int, int], NDArray[np.int64], int, int, NDArray[np.int64]]: ...
def tile_matmul(
    stationary: NDArray[np.float32], moving: NDArray[np.float32]
) -> NDArray[np.float32]: ...
