"""The worker's engine: in this process alone, or shared among processes of which this one is rank 0.

The other ranks are our children. They are told what to do over pipes that nobody else has. Tensors go over NCCL or
gloo, whose members find each other by a file in a private folder.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog
import torch
import torch.distributed as dist

from services.gpu_worker.engine.config import EngineConfig, device_of, is_asynchronous
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.group import Channel, GroupEngine
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import check_tensor_parallel
from services.gpu_worker.model.parallel import Group
from shared.telemetry import configure_logs

log = structlog.get_logger()
END_S = 30.0  # for the other ranks to end when they are told to
DYING_S = 1.0  # from a rank's closed pipes and sockets to its end


@contextmanager
def open_engine(config: EngineConfig, tp: int) -> Iterator[Engine]:
    """The engine of `config`, on `tp` ranks; raises ValueError where the model or the machine cannot have them.

    Should another rank die, this process ends: whoever watches it starts all of them again.
    """
    if tp == 1:
        yield Engine(config)
        return
    check_tensor_parallel(ModelConfig.from_folder(config.model_dir), tp)
    _check_machine(config.device, tp)
    is_asynchronous(config, device_of(config.device), tp)  # raises where the config asks for it
    with TemporaryDirectory(prefix="flexllm-ranks-") as folder:
        followers = Followers.start(config, tp, Path(folder))
        try:
            engine = _make_engine(config, 0, tp, Path(folder), Channel(*followers.pipes))
            yield engine
            followers.expect_end()
            engine.close()
            followers.join(END_S)
        finally:
            followers.kill()
            if dist.is_initialized():
                dist.destroy_process_group()


@dataclass(slots=True)
class Followers:
    """The processes of ranks 1 and up, and rank 0's ends of their pipes."""

    processes: list[SpawnProcess]
    pipes: list[Connection]
    folder: Path  # where the ranks meet
    _ending: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, config: EngineConfig, tp: int, folder: Path) -> Followers:
        context = multiprocessing.get_context("spawn")
        processes, pipes = [], []
        for rank in range(1, tp):
            theirs, ours = context.Pipe(duplex=False)
            process = context.Process(
                target=_follow, args=(config, rank, tp, folder, theirs), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        followers = cls(processes, pipes, folder)
        threading.Thread(target=followers._watch, name="ranks", daemon=True).start()
        return followers

    def expect_end(self) -> None:
        self._ending.set()

    def join(self, timeout_s: float) -> None:
        for process in self.processes:
            process.join(timeout_s)

    def kill(self) -> None:
        """Ends what has not ended; says who did before it was meant to, for that may be why we are here."""
        if not self._ending.is_set():
            wait([process.sentinel for process in self.processes], DYING_S)
        self._report()
        for process in self.processes:
            process.kill()
            process.join()

    def _watch(self) -> None:
        wait([process.sentinel for process in self.processes])
        if not self._ending.is_set():
            self._report()
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(1)  # the main thread may wait for the dead rank's tensors for ever

    def _report(self) -> None:
        if self._ending.is_set():
            return
        self._ending.set()
        ended = wait([process.sentinel for process in self.processes], 0)
        for process in self.processes:
            if process.sentinel in ended:
                process.join(DYING_S)
                log.error("rank_died", rank=process.name, exit_code=process.exitcode)


def _follow(config: EngineConfig, rank: int, tp: int, folder: Path, pipe: Connection) -> None:
    """A process of rank 1 or up. Rank 0 stops it: a terminal's Ctrl-C reaches all of them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    configure_logs()
    engine = _make_engine(config, rank, tp, folder, Channel(pipe))
    log.info("rank_ready", rank=rank, device=str(engine.model.weights.device))
    engine.follow()
    dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_engine(config: EngineConfig, rank: int, tp: int, folder: Path, channel: Channel) -> GroupEngine:
    device = device_of(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    elif not config.num_threads:
        config = replace(config, num_threads=max(1, (os.cpu_count() or 1) // tp))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=tp)
    return GroupEngine(replace(config, device=str(device)), Group(dist.group.WORLD), channel)


def _check_machine(name: str, tp: int) -> None:
    device = device_of(name)
    if device.type != "cuda":
        return
    if device.index is not None:
        raise ValueError(f"device {name!r} is one GPU: {tp} ranks take GPUs 0 to {tp - 1} of device 'cuda'")
    if torch.cuda.device_count() < tp:
        raise ValueError(f"{tp} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
