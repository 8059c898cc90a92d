"""What is allocated while Triton's interpreter runs kernels: it makes tensors of its own, and leaves cycles behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from services.gpu_worker.baseline import LiveBytes


class CollectedBytes(LiveBytes):
    """Whose garbage is gone before anything new is counted."""

    def _add(self, tensor: Tensor) -> None:
        gc.collect()
        super()._add(tensor)


@contextmanager
def allocated() -> Iterator[LiveBytes]:
    """Counts what is made inside, whoever makes tensors of what is there already."""
    gc.collect()
    given = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    gc.freeze()  # so that what is left to look through is small
    try:
        with CollectedBytes(given) as live:
            yield live
    finally:
        gc.unfreeze()
