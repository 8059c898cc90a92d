"""Two threads that compute an iteration's parts at once, each with half of a CPU's cores.

A decode reads all weights for a few rows, which one core does nearly as fast as two, and the many small products of
training spread badly over cores. So a lane that serves and a lane that trains, or two that train, can get more done
than all cores on one after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition

import torch

NUM_LANES = 2


class Progress:
    """How many steps each lane has done."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._steps = [0.0] * NUM_LANES
        self._last_begun = -1  # step of either lane, by its place in the batch
        self._is_stopped = False
        self.waited_s = [0.0] * NUM_LANES  # by each lane for the other

    def begin_step(self, index: int, is_late: bool) -> bool:
        """Whether a step may begin. Once a late one may not, none behind it may, but all before those that have begun:
        what has been computed is then the beginning of the batch's list."""
        with self._changed:
            if index > max(self._last_begun, 0) and (self._is_stopped or is_late):
                self._is_stopped = True
                return False
            self._last_begun = max(self._last_begun, index)
            return True

    @property
    def num_begun(self) -> int:
        return self._last_begun + 1

    def pass_step(self, lane: int) -> None:
        with self._changed:
            self._steps[lane] += 1
            self._changed.notify()

    def wait_for_steps(self, lane: int, count: int) -> None:
        """Until the other lane has done `count` steps."""
        with self._changed:
            if self._steps[1 - lane] < count:
                started = time.perf_counter()
                self._changed.wait_for(lambda: self._steps[1 - lane] >= count)
                self.waited_s[lane] += time.perf_counter() - started

    def close(self) -> None:
        """Nobody waits any more: a lane has failed."""
        with self._changed:
            self._steps = [math.inf] * NUM_LANES
            self._changed.notify()


class Lanes:
    """The second thread; the first is the caller's."""

    def __init__(self, num_threads: int) -> None:
        """`num_threads` of both lanes together, as many for each."""
        self._all, self.num_threads = num_threads, num_threads // NUM_LANES
        self._beside = ThreadPoolExecutor(1, "lane", torch.set_num_threads, (self.num_threads,))

    @contextmanager
    def threads_of_one(self) -> Iterator[None]:
        """What runs meanwhile has a lane's threads."""
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._all)

    def run(self, work: Callable[[int], None], progress: Progress) -> None:
        """`work(0)` here and `work(1)` beside it; raises what either raises, once both have ended."""

        def run(lane: int) -> None:
            try:
                work(lane)
            except BaseException:
                progress.close()
                raise

        with self.threads_of_one():
            beside = self._beside.submit(run, 1)
            try:
                run(0)
            finally:
                wait([beside])
        beside.result()
