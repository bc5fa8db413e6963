"""The Python stack of each operator: the user's frames, not those of torch or of this package."""

import sys
import threading
from pathlib import Path
from types import CodeType

import torch

_HIDDEN_DIRECTORIES = tuple(
    str(Path(directory).resolve()) + "/"
    for directory in (Path(torch.__file__).parent, Path(__file__).parent.parent)
)


class PythonStacks:
    """The stacks of one profile, each kept once, by id; id 0 is an operator without one.

    Operators of a backward pass have that of the call of `backward()`.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[tuple[CodeType, int], ...], int] = {(): 0}
        self._is_user: dict[CodeType, bool] = {}
        self._lock = threading.Lock()

    def capture(self) -> int:
        """The id of the calling thread's stack; the device calls this for every operator."""
        frames = []
        frame = sys._getframe().f_back
        while frame is not None:
            code = frame.f_code
            is_user = self._is_user.get(code)
            if is_user is None:
                is_user = self._is_user[code] = _is_user_code(code)
            if is_user:
                frames.append((code, frame.f_lineno))
            frame = frame.f_back
        with self._lock:
            return self._ids.setdefault(tuple(frames), len(self._ids))

    def texts(self) -> list[tuple[str, ...]]:
        """The stacks by id, innermost frame first, a frame as 'file.py:12 function'."""
        return [
            tuple(f"{code.co_filename}:{line} {code.co_qualname}" for code, line in frames)
            for frames in self._ids
        ]


def _is_user_code(code: CodeType) -> bool:
    """Whether a frame is the user's: in a file, outside torch, this package and frozen modules."""
    name = code.co_filename
    return not name.startswith("<frozen") and not str(Path(name).resolve()).startswith(
        _HIDDEN_DIRECTORIES
    )
