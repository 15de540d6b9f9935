"""Workers as processes of this machine, for where Ray isn't: one case at a time each."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from segcore.errors import SegcoreError
from services.evaluation.config import EvalConfig
from services.evaluation.results import Key, Result
from services.evaluation.tasks.base import Case

# A process's end of the pipe: it takes (arm, case), and gives a result or what was raised.
Peer = Connection


class Processes:
    """A pool, as `dealt` wants one. It ends with the process that made it."""

    def __init__(self, config: EvalConfig) -> None:
        self._settings = config.model_dump(mode="json")
        self._busy: dict[Peer, Key] = {}
        self._ranks = itertools.count()

    def start(self, worker: Peer | None, key: Key, case: Case) -> None:
        """Give a case to a worker that is idle, or to a new one."""
        peer = worker or self._new()
        peer.send((key[0], tuple(case)))
        self._busy[peer] = key

    def wait(self) -> tuple[Peer | None, Key, Result | None]:
        """A worker that is done, and its result; None for both if it died. Raises what the worker raised."""
        peer = next(p for p in wait(list(self._busy)) if isinstance(p, Connection))
        key = self._busy.pop(peer)
        try:
            result: Result | Exception = peer.recv()
        except (EOFError, ConnectionError):
            return None, key, None
        if isinstance(result, Exception):
            raise result
        return peer, key, result

    @property
    def busy(self) -> bool:
        return bool(self._busy)

    def _new(self) -> Peer:
        # Spawned, not forked: a GPU's context doesn't survive a fork.
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, self._settings, next(self._ranks)), daemon=True).start()
        theirs.close()
        return ours


def work(peer: Peer, settings: dict[str, Any], rank: int) -> None:
    """A worker's process: answers until nobody asks any more."""
    see_one_gpu(rank)
    from services.evaluation.worker import Worker  # brings torch along, which who deals doesn't need

    worker: Worker | None = None
    with suppress(EOFError, ConnectionError):
        while True:
            arm, case = peer.recv()
            try:
                worker = worker or Worker(settings)
                answer: Result | SegcoreError = worker.run(arm, Case(*case))
            except SegcoreError as error:
                answer = error
            peer.send(answer)
    if worker is not None:
        worker.close()


def see_one_gpu(rank: int) -> None:
    """Of several GPUs workers see one each, in turn, as Ray has it. Before CUDA starts in this process."""
    import torch

    if (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank % count]
