"""The processes (ranks) of one worker, one per GPU, and their communication. A single process does not communicate.

Rank 0 leads. It sends commands, and the other ranks report failures, through a TCP store in rank 0's process. Within a
step the ranks use collective operations: NCCL's for tensors on GPUs, gloo's for tensors on CPUs and all small values.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from jobs.data.batches import part
from jobs.data.randomness import hash_seed, seed_all
from jobs.errors import JobError
from orchestrator.files import atomic

HOST = "127.0.0.1"  # all ranks are on one node
MEETING_S = 300.0  # how long to wait for every rank to start; importing torch from a cold network folder takes minutes
STEP_S = 300.0  # how long a rank may lag behind the others, for example while it loads data or compiles its model
COMMAND_WAIT = timedelta(days=1)  # rank 0 may be busy for hours; if rank 0 dies, waiting fails at once


class RankLostError(Exception):
    """Another rank died, hangs or failed."""


class Alone:
    """The group of a process that trains alone: it is rank 0 of 1. The methods are described for groups of any size."""

    rank = 0
    count = 1

    def adopt(self, model: nn.Module) -> nn.Module:
        """Prepare a new model for training on all ranks, with rank 0's weights, and return it."""
        return model

    def fetch(self, checkpoint: Path) -> Path | IO[bytes]:
        """Return a checkpoint to load, on every rank. Only rank 0 reads the file, and sends it to the others."""
        return checkpoint

    def same(self, number: int) -> int:
        """Return, on every rank, the number that rank 0 passed."""
        return number

    def agree(self, should_stop: Callable[[], bool]) -> bool:
        """Return, on every rank, what should_stop returns on rank 0, so that all stop at the same step."""
        return should_stop()

    def reseed(self, seed: int, step: int) -> None:
        """Seed the random generators of each rank except 0 differently, for one step. seed: the epoch's seed."""

    def share(self, batch: Any, size: int) -> Any:
        """Return this rank's part of a batch of `size` examples. The parts of all ranks, in order, form the batch."""
        return batch

    @property
    def weight(self) -> float:
        """This rank's part of the batch that was shared last, from 0 to 1."""
        return 1.0

    def merge(self, loss: Tensor, model: nn.Module) -> Tensor:
        """Return the sum of all ranks' losses (a scalar), each weighted by its rank's part of the batch; set the
        parameters' gradients to those of this sum."""
        return loss

    def align(self, model: nn.Module) -> None:
        """Copy rank 0's buffers to all ranks: unlike the weights, they may differ between ranks after training."""

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        """Return, for each name, the sum of all ranks' values."""
        return sums


ALONE = Alone()


class Ranks(Alone):
    """Several ranks. All must call the methods defined in Alone in the same order. Methods may raise RankLostError."""

    def __init__(self, rank: int, count: int, store: TCPStore, step_s: float) -> None:
        self.rank, self.count = rank, count
        self._store = store
        self._step = timedelta(seconds=step_s)
        self._device = torch.device("cpu")
        self._tensors: dist.ProcessGroup | None = None  # None: torch's default group (gloo)
        self._weight = 1.0  # this rank's share of the current batch
        self._masks: dict[tuple[bool, ...], Tensor] = {}  # the masks used in `merge`, as tensors on the device
        self._commands = 0

    # --- commands

    def tell(self, **command: Any) -> None:
        """Send the next command (called on rank 0). Its values must be convertible to JSON."""
        self._commands += 1
        with _connection_errors():
            self._store.set(f"command {self._commands}", json.dumps(command))

    def hear(self) -> dict[str, Any]:
        """Wait for the next command (called on all ranks except 0)."""
        self._commands += 1
        key = f"command {self._commands}"
        with _connection_errors():
            while not self._store.check([key]):
                with suppress(dist.DistStoreError):  # COMMAND_WAIT has passed
                    self._store.wait([key], COMMAND_WAIT)
            command: dict[str, Any] = json.loads(self._store.get(key))
        return command

    def report_failure(self, reason: str) -> None:
        """Report to rank 0 why this rank ends (called on any rank except 0)."""
        with _connection_errors():
            self._store.set(f"failed {self.rank}", reason)
            self._store.get(f"failed {self.rank}")  # returns only once rank 0 has the report

    def failures(self) -> list[str]:
        """Return the failures reported by other ranks (called on rank 0)."""
        reported = [rank for rank in range(1, self.count) if self._store.check([f"failed {rank}"])]
        return [f"rank {rank}: {self._store.get(f'failed {rank}').decode()}" for rank in reported]

    def use(self, device: torch.device) -> None:
        """Train on this device from now on. Raises JobError unless every rank has its own GPU or no rank has one."""
        own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        gpus: list[str] = [""] * self.count
        with _connection_errors():
            dist.all_gather_object(gpus, own)
        self._device = device
        if not any(gpus):
            return
        if len(set(gpus)) < self.count or not all(gpus):
            seen = ", ".join(f"rank {rank} has {gpu or 'none'}" for rank, gpu in enumerate(gpus))
            raise JobError(f"gpus_per_worker is {self.count}, but there is no GPU for each: {seen}")
        if self._tensors is None:
            with _connection_errors():
                self._tensors = dist.new_group(backend="nccl", timeout=self._step)

    def close(self, at_once: bool) -> None:
        """Leave the group. at_once: abort collectives in progress; ranks that wait for this rank get RankLostError."""
        if dist.is_initialized():
            if at_once and self._tensors is not None:
                with suppress(Exception):  # the connection may already be broken
                    self._tensors.abort()  # else the next line may wait for a dead rank
            dist.destroy_process_group()

    # --- the model

    def adopt(self, model: nn.Module) -> nn.Module:
        if self._device.type == "cuda":  # SyncBatchNorm works only on GPUs
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self._tensors)  # type: ignore[no-untyped-call]  # torch
        self._broadcast([*model.parameters(), *model.buffers()])
        return model

    def align(self, model: nn.Module) -> None:
        self._broadcast(model.buffers())

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with rank 0's values."""
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            with _connection_errors():
                dist.broadcast(whole, 0, group=self._tensors)
            tensor.detach().copy_(whole)

    def fetch(self, checkpoint: Path) -> IO[bytes]:
        read = bytearray(checkpoint.read_bytes() if self.rank == 0 else b"")
        size = self.same(len(read))
        content = torch.frombuffer(read, dtype=torch.uint8) if self.rank == 0 else torch.empty(size, dtype=torch.uint8)
        with _connection_errors():
            dist.broadcast(content, 0)
        return io.BytesIO(content.numpy().data)

    # --- a step

    def same(self, number: int) -> int:
        shared = torch.tensor(number)
        with _connection_errors():
            dist.broadcast(shared, 0)
        return int(shared.item())

    def agree(self, should_stop: Callable[[], bool]) -> bool:
        asked = should_stop()  # on every rank, although only the answer of rank 0 counts
        stop = torch.tensor(int(asked and self.rank == 0))
        with _connection_errors():
            dist.all_reduce(stop, dist.ReduceOp.MAX)  # not a broadcast, so that rank 0 notices if a rank has died
        return bool(stop.item())

    def reseed(self, seed: int, step: int) -> None:
        if self.rank > 0:  # only rank 0's random state is saved; the other ranks compute theirs from the step
            seed_all(hash_seed(seed, step, self.rank))

    def share(self, batch: Any, size: int) -> Any:
        first, end = size * self.rank // self.count, size * (self.rank + 1) // self.count
        self._weight = (end - first) / size
        if first == end:  # fewer examples than ranks: join the step with one example of weight 0
            first, end = 0, 1
        return part(batch, size, first, end)

    @property
    def weight(self) -> float:
        return self._weight

    def merge(self, loss: Tensor, model: nn.Module) -> Tensor:
        """Sum the gradients in one tensor per dtype, always with the same layout, so that a resumed chunk adds them in
        the same order."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        by_dtype = sorted(range(len(parameters)), key=lambda i: str(parameters[i].dtype))
        mask = tuple(p.grad is not None for p in parameters)
        for _, indices in groupby(by_dtype, key=lambda i: parameters[i].dtype):
            some = [parameters[i] for i in indices]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            flat = self._sum(torch.cat([g.reshape(-1) for g in grads]))
            for p, grad, merged in zip(some, grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                p.grad = grad.copy_(merged.view_as(grad))
        if mask not in self._masks:  # cached, because copying a mask to the GPU waits for the GPU
            self._masks[mask] = torch.tensor(mask, dtype=torch.float64, device=self._device)
        total = self._sum(torch.cat([loss.detach().double().reshape(1), self._masks[mask]]))
        if not all(mask):  # a parameter that no rank used gets no gradient, as in a single process
            for p, used in zip(parameters, total[1:].tolist(), strict=True):
                p.grad = p.grad if used else None
        return total[0]

    def _sum(self, tensor: Tensor) -> Tensor:
        with _connection_errors():
            dist.all_reduce(tensor, group=self._tensors)
        return tensor

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        gathered: list[dict[str, float]] = [{}] * self.count
        with _connection_errors():
            dist.all_gather_object(gathered, sums)
        return {name: sum(one.get(name, 0.0) for one in gathered) for part in gathered for name in part}


def meet(rank: int, count: int, place: Path, meeting_s: float = MEETING_S, step_s: float = STEP_S) -> Ranks:
    """Connect to the other ranks of this job, on the same node. place: a file used only for this start of the job;
    rank 0 writes its port there, chosen by the system. meeting_s: how many seconds to wait for all ranks to connect.
    step_s: how many seconds to wait in each later operation. Raises RankLostError if a rank connects too late."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = timedelta(seconds=meeting_s)
    with _connection_errors():
        if rank == 0:
            listener = socket.create_server((HOST, 0))
            port, fd = int(listener.getsockname()[1]), listener.detach()
            store = TCPStore(HOST, port, None, True, meeting, wait_for_workers=False, master_listen_fd=fd)
            atomic.publish(place, lambda target: target.write(str(port).encode()))
        else:
            store = TCPStore(HOST, _port(place, meeting_s), None, False, meeting)
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(count)], meeting)
        if rank == 0:
            place.unlink()
        step = timedelta(seconds=step_s)
        dist.init_process_group("gloo", timeout=step, world_size=count, rank=rank, store=store)
    return Ranks(rank, count, store, step_s)


def _port(place: Path, meeting_s: float) -> int:
    end = time.monotonic() + meeting_s
    while not place.exists():
        if time.monotonic() > end:
            raise RankLostError(f"rank 0 did not write its port to {place} within {meeting_s:g} s")
        time.sleep(0.1)
    return int(place.read_text())


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Convert errors of torch's communication in this block to RankLostError."""
    try:
        yield
    except RuntimeError as error:  # torch has no error class for gloo
        raise RankLostError(str(error).partition("\n")[0]) from error
