"""Where tensors are worked on by threads that aren't the engine's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def apart(act: Callable[[], T]) -> T:
    """Do something in a thread that ends with it.

    OpenMP keeps a team of threads for every thread that has computed with one. When there are more of them than cores,
    none waits by spinning any more, and the many small steps of a decode take a quarter longer. So only the engine's
    thread has a team that stays.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="segcore-apart") as executor:
        return executor.submit(act).result()
