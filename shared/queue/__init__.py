"""The two Redis queues: inference requests with their token streams, and finetuning job ids.

Redis holds only what may vanish. Each grant of work carries a fence (`attempt`) that is checked, in Lua, where
the effect lands, so a request's tokens reach its owner exactly once whoever dies in between. The life of an
inference request:

    API     enqueue  -> lane stream + request hash           (bounded, idempotent by request id)
    worker  take     -> claim under the next fence           (leases over first, then new entries)
    worker  emit     -> token log + frame to the API process (atomic with the terminal and the acknowledgement)
    worker  beat     -> renews the leases that are still its own
    API     stream   -> frames in order; on silence it asks the log, and puts a lost entry back

Nothing here goes by a client's clock: leases and deadlines are the server's.
"""

from shared.queue.client import InferenceClient, QueueFull, QueueUnavailable, RequestTooLarge
from shared.queue.connection import open_async_redis, open_redis
from shared.queue.finetune import FinetuneQueue, FinetuneSender
from shared.queue.iterations import IterationBatch, Iterations, IterationSender, read_iterations
from shared.queue.worker import Claimed, Emission, InferenceWorkerQueue

__all__ = [
    "Claimed",
    "Emission",
    "FinetuneQueue",
    "FinetuneSender",
    "InferenceClient",
    "InferenceWorkerQueue",
    "IterationBatch",
    "IterationSender",
    "Iterations",
    "QueueFull",
    "QueueUnavailable",
    "RequestTooLarge",
    "open_async_redis",
    "open_redis",
    "read_iterations",
]
