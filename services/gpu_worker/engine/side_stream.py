"""A second stream for steps of training, beside the one that everything else is computed in.

Its temporaries come from the stream's own part of torch's memory pool, as they are made while it is current. Tensors
of both streams (activations, gradients, tables of windows) are given up between two iterations or by steps on the side
stream itself; since each iteration begins and ends with the two streams joined, whoever gets their memory next uses it
later. For that a batch's forward has to be launched before the steps beside it: memory that a step gives up may be
memory that the forward would be given.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class SideStream(Protocol):
    def follow(self) -> None:
        """What is launched beside from now on comes after all that was launched before."""

    def beside(self) -> AbstractContextManager[object]:
        """What is launched within goes to the side stream."""

    def join(self) -> None:
        """What is launched from now on comes after all that was launched beside."""


class InTurn:
    """For a device that computes when it is told to."""

    def follow(self) -> None:
        pass

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def join(self) -> None:
        pass


class CudaSideStream:
    """The host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def beside(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return context

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def make_side_stream(device: torch.device) -> SideStream:
    return CudaSideStream(device) if device.type == "cuda" else InTurn()
