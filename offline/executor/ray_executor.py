"""Runs calibration samples and solvers in Ray actors, on this machine or on a cluster.

Each worker is an actor that has the model's folder on its own file system, a share of the blocks of batches, and as
many threads as this process: LAPACK rounds by the number of threads. Matrices travel through Ray's object store.

A lost worker takes its hidden states with it. Its stage runs again with a new worker, from the finished layers of the
run's state as after `--resume`: the other workers would have to wait for as long.
"""

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import ActorPool

from pgsvd_vllm.errors import InputError, PgsvdError
from pgsvd_vllm.offline.executor.executor import shares_of
from pgsvd_vllm.offline.executor.worker import Function, Shard, Worker
from pgsvd_vllm.offline.model.batch import BLOCKS, Batch
from pgsvd_vllm.offline.model.source import ModelSource

Result = TypeVar("Result")
# Times that a stage goes on after it has lost workers.
MOST_LOST = 8
# Time that a worker has to start, a started one to answer, and the cluster to accept a connection.
START_SECONDS, ANSWER_SECONDS, CONNECT_SECONDS = 600, 5, 10


class RayWorker:
    """An actor with a `Worker`, whose model is read on its own machine."""

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool,
        experts: bool,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self._worker = Worker(ModelSource(folder, trust_remote_code, experts), device, dtype)

    def answer(self) -> None:
        """Show that this worker is there."""

    def begin(self, shard: type[Shard], batches: dict[int, Batch], *arguments: Any) -> None:
        """As of `Worker`."""
        self._worker.begin(shard, batches, *arguments)

    def end(self) -> None:
        """As of `Worker`."""
        self._worker.end()

    def call(self, method: str, *arguments: Any) -> Any:
        """As of `Worker`."""
        return self._worker.call(method, *arguments)

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """As of `Worker`."""
        yield from self._worker.stream(method, *arguments)

    def apply(self, function: Function[Any], item: Any, shared: Any) -> Any:
        """As of `Worker`."""
        return self._worker.apply(function, item, shared)


class RayExecutor:
    """Workers in a Ray cluster; see `LocalExecutor` for the methods.

    Args:
        source: the model.
        device: that computes.
        dtype: of weights and activations.
        address: of the cluster, such as `auto` or `HOST:6379`; None for a new one on this machine.
        say: called with one line about the workers, and one for each time that some are lost.

    Raises:
        InputError: the cluster cannot be reached.
    """

    is_local = False

    def __init__(
        self,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        address: str | None,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._device, self._dtype, self._say = source, device, dtype, say
        self._where = f"--address {address}" if address else "--executor ray"
        self._actors: list[Any] = []
        self._active: list[Any] = []
        self._lost, self._complete = 0, False
        # A cluster that exists has chosen for itself.
        options: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            _check_reachable(address)
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{self._where}: Ray cannot start or reach it ({str(error).splitlines()[0]})") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has replaced it

    def _start(self) -> None:
        """Start the workers that are missing.

        Raises:
            InputError: the cluster has no room for one, or one cannot read the model.
        """
        if self._complete:
            return
        on_gpu, threads = self._device.type == "cuda", torch.get_num_threads()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count = sum(int(node.get("GPU", 0)) if on_gpu else int(node.get("CPU", 0) // threads) for node in nodes)
        if count < 1:
            needed = "a GPU" if on_gpu else f"{threads} CPUs, one for each thread of this process (OMP_NUM_THREADS)"
            raise InputError(f"{self._where}: no machine of the cluster has {needed}")
        source, needs = self._source, {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": threads}
        model = (source.folder, source.trust_remote_code, source.unstacks_experts)
        kind: Any = ray.remote(RayWorker).options(max_restarts=0, **needs)
        missing = min(count, BLOCKS) - len(self._actors)
        started = [kind.remote(*model, self._device, self._dtype, threads) for _ in range(missing)]
        try:
            ray.get([actor.answer.remote() for actor in started], timeout=START_SECONDS)
        except GetTimeoutError:
            raise InputError(
                f"{self._where}: {missing} workers have not started in {START_SECONDS} s; the cluster may be in use"
            ) from None
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"{self._where}: a worker cannot start ({reason})") from None
        self._actors += started
        if not self._lost:
            machines = len(nodes)
            self._say(
                f"ray: {missing} worker{'s' * (missing > 1)} with {threads} thread{'s' * (threads > 1)} each on "
                f"{machines} machine{'s' * (machines > 1)}"
            )
        self._complete = True

    def begin(self, shard: type[Shard], batches: Sequence[Batch], *arguments: Any) -> None:
        """Give every worker a new shard with its share of the blocks."""
        self._start()
        shares = shares_of(batches, len(self._actors))
        self._active = [self._actors[worker] for worker in shares]
        shared = [ray.put(argument) for argument in arguments]
        begun = zip(self._active, shares.values(), strict=True)
        self._get([actor.begin.remote(shard, share, *shared) for actor, share in begun])

    def end(self) -> None:
        """Free the shards."""
        with contextlib.suppress(RayError):
            ray.get([actor.end.remote() for actor in self._active], timeout=ANSWER_SECONDS)
        self._active = []

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method of every shard; calls of one shard keep their order."""
        shared = [ray.put(argument) for argument in arguments]
        for actor in self._active:
            actor.call.remote(method, *shared)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every shard."""
        shared = [ray.put(argument) for argument in arguments]
        found: list[Any] = self._get([actor.call.remote(method, *shared) for actor in self._active])
        return found

    def streams(self, method: str, *arguments: Any) -> list[Iterator[Any]]:
        """Call a method of every shard that yields; all begin at once."""
        shared = [ray.put(argument) for argument in arguments]
        started = [actor.stream.options(num_returns="streaming").remote(method, *shared) for actor in self._active]
        return [map(self._get, stream) for stream in started]

    def map(self, function: Function[Result], items: Iterable[Any], shared: Any = None) -> Iterator[Result]:
        """Call a function for every item; workers take the next one when they are free."""
        self._start()
        reference = ray.put(shared)
        pool: Any = ActorPool(self._actors)
        with _unwrapped():
            yield from pool.map(lambda actor, item: actor.apply.remote(function, item, reference), items)

    def _get(self, references: Any) -> Any:
        """The values of references; raises what a worker has raised."""
        with _unwrapped():
            return ray.get(references)

    def retry(self, stage: Callable[[], Result]) -> Result:
        """The result of a stage, which runs again where workers are lost in it.

        Raises:
            InputError: workers are lost again and again.
        """
        while True:
            try:
                return stage()
            except RayError as error:  # of a worker, its machine, or what they had in the object store
                reason = " ".join(str(error).split())
                self._lost += 1
                if self._lost > MOST_LOST:
                    raise InputError(f"{self._where}: workers are lost again and again ({reason})") from None
                self._say(f"WARNING: a worker was lost, its stage goes on from the last finished layer ({reason})")
                self._actors = [actor for actor in self._actors if _is_alive(actor)]
                self._active, self._complete = [], False
            finally:
                self.end()

    def close(self) -> None:
        """End all workers, and the cluster if it was started here."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Connect to the host and port of an address, if it has them: Ray itself tries for minutes; raises OSError."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def _is_alive(actor: Any) -> bool:
    """Whether a worker answers, or is busy."""
    try:
        ray.get(actor.answer.remote(), timeout=ANSWER_SECONDS)
    except GetTimeoutError:
        return True
    except RayError:
        return False
    return True


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise what a worker has raised, instead of Ray's error with its traceback."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, PgsvdError):
            raise error.cause from None
        raise error.cause from error
