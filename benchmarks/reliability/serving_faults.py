"""A compressed model under `vllm serve`, beside the dense one: load, clients that hang up, damage and a killed worker.

    python benchmarks/reliability/serving_faults.py [--tiny] [--quick] [--json FILE]

The model is SmolLM2-135M with every third layer factored; --tiny takes a random one of three small layers, --quick that
and fewer requests. Two ranks serve the random one in any case: SmolLM2 has nine attention heads. Figures of the dense
model are references without a bar. The exit status is 1 where a bar is missed. The servers listen on 127.0.0.1 alone.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import httpx
import psutil

from benchmarks.reliability import load, record
from benchmarks.reliability.load import Service
from benchmarks.reliability.record import Row, at_most, figure
from tests.support import reference_model
from tests.support.server import STOP_SECONDS, Server, group_is_alive, serve

# MiB by which a compressed server may grow more than a dense one, from the first quarter of the requests to the last.
GROWTH_BAR = 64.0
# Seconds after which a server whose clients hung up must be idle, and whose worker was killed must be gone.
IDLE_BAR, GONE_BAR = 10.0, 60.0
MIB = 1024 * 1024


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        requests: under load.
        clients: that send them, and that hang up.
        length: longest context of the server in tokens.
    """

    requests: int
    clients: int
    length: int


FULL, TINY, QUICK = Size(2000, 64, 1024), Size(2000, 64, 512), Size(200, 16, 256)


@contextlib.contextmanager
def service(folder: Path, log: Path, size: Size, ranks: int = 1) -> Iterator[tuple[Server, Service]]:
    """A server of a model that asks for an API key, and what its clients need to know.

    Args:
        folder: of the model.
        log: of the server.
        size: of the run.
        ranks: tensor-parallel ranks, each with a core of its own if there are several.
    """
    key = secrets.token_hex(16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    form = ("--load-format", "pgsvd") if "quantization_config" in config else ()
    limits = ("--max-model-len", str(size.length), "--max-num-seqs", str(size.clients), "--enforce-eager")
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))} if ranks > 1 else {}
    parallel = ("--tensor-parallel-size", str(ranks))
    with serve(folder, log, *limits, *form, *parallel, "--api-key", key, variables=bound) as server:
        yield server, Service(server.url, server.model, config["vocab_size"], size.length, key)


def resident(server: Server) -> float:
    """Resident memory of a server's processes in MiB."""
    leader = psutil.Process(server.process.pid)
    return float(sum(process.memory_info().rss for process in [leader, *leader.children(recursive=True)])) / MIB


def under_load(name: str, server: Server, target: Service, size: Size) -> tuple[list[Row], float]:
    """Send the requests; the rows, and the growth of the server's memory in MiB after the first quarter."""
    quarter = size.requests // 4
    memory: list[float] = []

    def note(done: int) -> None:
        if done % quarter == 0:
            memory.append(resident(server))

    begin = time.monotonic()
    bodies = load.requests_of_mixed_lengths(target, size.requests, seed=0)
    failures = load.send_all(target, bodies, size.clients, note)
    for failure in failures[:5]:
        print(f"  {failure}", file=sys.stderr)
    rows = [
        figure(f"{name}: requests of mixed lengths", size.requests),
        figure(f"{name}: clients that send them at once", size.clients),
        at_most(f"{name}: requests that failed", len(failures), 0),
        figure(f"{name}: seconds", round(time.monotonic() - begin, 1)),
    ]
    rows += [figure(f"{name}: memory after {quarter * (i + 1)} requests, MiB", round(m)) for i, m in enumerate(memory)]
    return rows, memory[-1] - memory[0]


def hang_ups(name: str, target: Service, size: Size) -> list[Row]:
    """Clients close their connections in the middle of a stream; the server must become idle and answer as before."""
    before = load.greedy(target)
    load.hang_up(target, size.clients)
    begin = time.monotonic()
    left = load.wait_until_idle(target, IDLE_BAR)
    rows = [figure(f"{name}: clients that hang up in a stream", size.clients)]
    rows.append(at_most(f"{name}: seconds until the server is idle", round(time.monotonic() - begin, 1), IDLE_BAR))
    for gauge, value in left.items():
        rows.append(at_most(f"{name}: {gauge} after hang-ups", value, 0))
    rows.append(at_most(f"{name}: answers changed by hang-ups", changed(target, before), 0))
    return rows


def changed(target: Service, before: list[str]) -> int:
    """Number of greedy answers that differ from earlier ones."""
    return sum(a != b for a, b in zip(before, load.greedy(target), strict=True))


def refusals(name: str, target: Service) -> list[Row]:
    """Bad requests and requests without the API key are refused."""
    before = load.greedy(target)
    accepted = load.not_refused(target)
    for failure in accepted:
        print(f"  {failure}", file=sys.stderr)
    wrong = 0
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": target.key}):
        body = {"model": target.model, "prompt": [5], "max_tokens": 1}
        wrong += httpx.post(f"{target.url}/v1/completions", json=body, headers=headers).status_code != 401
    return [
        figure(f"{name}: kinds of bad requests", len(load.bad_requests(target))),
        at_most(f"{name}: bad requests without a status from 400 to 499", len(accepted), 0),
        at_most(f"{name}: requests without the API key that are not refused", wrong, 0),
        at_most(f"{name}: answers changed by bad requests", changed(target, before), 0),
    ]


def lost_files(name: str, folder: Path, other: Path, target: Service) -> list[Row]:
    """Delete the served checkpoint, then put another model in its place; answers stay as they were.

    Args:
        name: of the model.
        folder: of the served checkpoint.
        other: a model that takes its place.
        target: the service.
    """
    before = load.greedy(target)
    shutil.rmtree(folder)
    deleted = changed(target, before)
    shutil.copytree(other, folder)
    return [
        at_most(f"{name}: answers changed by deleting the checkpoint", deleted, 0),
        at_most(f"{name}: answers changed by replacing the checkpoint", changed(target, before), 0),
    ]


async def _streams_that_end(target: Service, clients: int, killed: int) -> int:
    """Streams that end, in an error or not, after a process is killed in their middle; each has GONE_BAR seconds."""
    started = 0
    everyone = asyncio.Event()

    async def one_client(number: int) -> bool:
        nonlocal started
        body = {"model": target.model, "prompt": [3 + number] * 8, "max_tokens": target.longest - 8}
        body |= {"ignore_eos": True, "stream": True}
        with contextlib.suppress(httpx.HTTPError):
            async with (
                httpx.AsyncClient(base_url=target.url, headers=target.headers, timeout=load.TIMEOUT) as client,
                client.stream("POST", "/v1/completions", json=body) as stream,
            ):
                first = True
                async for _ in stream.aiter_lines():
                    if first:
                        first = False
                        started += 1
                        if started == clients:
                            everyone.set()
        return True

    tasks = [asyncio.create_task(one_client(number)) for number in range(clients)]
    await asyncio.wait_for(everyone.wait(), load.TIMEOUT)
    os.kill(killed, signal.SIGKILL)
    done, waiting = await asyncio.wait(tasks, timeout=GONE_BAR)
    for task in waiting:
        task.cancel()
    return len(done)


def a_worker_of(server: Server) -> psutil.Process:
    """A tensor-parallel worker of the server, not the first one.

    Raises:
        RuntimeError: no process of the server has a worker's name.
    """
    names = {p: p.name() for p in psutil.Process(server.process.pid).children(recursive=True)}
    workers = sorted((p for p, name in names.items() if "Worker" in name), key=lambda p: p.pid)
    if len(workers) < 2:
        raise RuntimeError(f"no two workers among the server's processes: {sorted(names.values())}")
    return workers[-1]


def killed_worker(name: str, folder: Path, log: Path, size: Size) -> list[Row]:
    """Kill one of two tensor-parallel workers under load: clients get an end, and no process stays."""
    clients = min(8, size.clients)
    with service(folder, log, size, ranks=2) as (server, target):
        load.greedy(target)
        ended = asyncio.run(_streams_that_end(target, clients, a_worker_of(server).pid))
        begin = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(timeout=GONE_BAR)
        seconds = time.monotonic() - begin
        while group_is_alive(server.process.pid) and time.monotonic() - begin < GONE_BAR + STOP_SECONDS:
            time.sleep(0.2)
        left = int(group_is_alive(server.process.pid))
    return [
        figure(f"{name}: streams whose worker is killed, two ranks", clients),
        at_most(f"{name}: of them without an end", clients - ended, 0),
        at_most(f"{name}: seconds until the server has exited", round(seconds, 1), GONE_BAR),
        at_most(f"{name}: process groups that stay", left, 0),
    ]


def make_models(folder: Path, tiny: bool) -> dict[str, Path]:
    """Name -> folder of the dense model and of the compressed one."""
    from pgsvd_vllm.cli import main as command
    from tests.conftest import save_tiny_model

    folder.mkdir()
    dense = save_tiny_model(folder / "dense") if tiny else reference_model.smollm2()
    compressed = folder / "compressed"
    options = ["--sensitivity", "uniform", "--num-calibration-samples", "8", "--max-seq-length", "256", "--ratio"]
    kept = [] if tiny else ["--ignore", *(f"model.layers.{i}.*" for i in range(30) if i % 3)]
    status = command(["compress", str(dense), "-o", str(compressed), *options, "0.25" if tiny else "0.066", *kept])
    if status:
        raise RuntimeError(f"compress ended with status {status}")
    return {"dense": dense, "compressed": compressed}


def measure(models: dict[str, Path], sharded: dict[str, Path], logs: Path, size: Size) -> list[Row]:
    """Every row; the dense model's have no bar, since they are references.

    Args:
        models: name -> folder of the dense model and of the compressed one.
        sharded: the same of models whose attention heads two ranks can share.
        logs: an existing folder for logs and copies.
        size: of the run.
    """
    config = json.loads((models["dense"] / "config.json").read_text(encoding="utf-8"))
    rows: list[Row] = [figure("layers of the model", config["num_hidden_layers"])]
    growth = {}
    for name, folder in models.items():
        served, log = logs / f"served-{name}", logs / f"{name}.log"
        shutil.copytree(folder, served)
        other = next(path for other, path in models.items() if other != name)
        with service(served, log, size) as (server, target):
            found, growth[name] = under_load(name, server, target, size)
            found += hang_ups(name, target, size)
            found += refusals(name, target)
            found += lost_files(name, served, other, target)
            known = int(target.key in log.read_text(encoding="utf-8", errors="replace"))
        found.append(at_most(f"{name}: server logs that show the API key", known, 0))
        found += killed_worker(name, sharded[name], logs / f"{name}-two-ranks.log", QUICK)
        rows += found if name == "compressed" else [figure(row["case"], row["value"]) for row in found]
        record.show(rows[-len(found) :])
    rows.append(figure("dense: growth of memory, MiB", round(growth["dense"], 1)))
    bar = round(max(0.0, growth["dense"]) + GROWTH_BAR, 1)
    rows.append(at_most("compressed: growth of memory, MiB", round(growth["compressed"], 1), bar))
    record.show(rows[-2:])
    return rows


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--quick", action="store_true", help="a tiny random model and fewer requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    arguments = parser.parse_args()
    tiny = arguments.tiny or arguments.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = make_models(folder / "tiny", tiny=True)
        models = small if tiny else make_models(folder / "smollm2", tiny=False)
        rows = measure(models, small, folder, QUICK if arguments.quick else TINY if tiny else FULL)
    if arguments.json:
        size = " --quick" if arguments.quick else " --tiny" if tiny else ""
        record.write(arguments.json, f"python benchmarks/reliability/serving_faults.py{size}", rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
