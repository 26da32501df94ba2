"""Cases of the crash matrix in which files, inputs or the machine change between a crash and the next run."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.reliability.faults import Recorder
from benchmarks.reliability.record import Row
from benchmarks.reliability.run_bench import Bench

NOBODY = 65534


# -- damaged work files -----------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)


def _header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 0x04
    path.write_bytes(data)


def _zero(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def _swap(path: Path) -> None:
    other = path.with_name(path.name.replace("00000", "00001"))
    if other != path and other.exists():
        kept = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(kept)
    else:
        _flip(path)


def _unsealed(path: Path) -> None:
    """The tensors with NaN in one of them and without checksums, as another program writes them."""
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"reports": "[]", "layer": "{}"})


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped bit": _flip,
    "flipped bit in the header": _header,
    "second half zero": _zero,
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "empty": lambda path: os.truncate(path, 0),
    "exchanged with another layer": _swap,
    "rewritten with NaN": _unsealed,
    "deleted": lambda path: path.unlink(),
}
REPLACED: dict[str, Callable[[Path], None]] = {"a folder": _as_folder, "a pipe": _as_pipe}
WORK_FILES = {
    "calibration": "layers/00000.safetensors",
    "sensitivities": "layers/00000.measured.safetensors",
    "LM head": "layers/head.safetensors",
    "factors": "factors-*/00000.safetensors",
}


def tampered(bench: Bench) -> Iterator[Row]:
    """Damage of every kind to a work file of every kind, and to run.json."""
    bench.begin()
    bench.stopped()
    _stop_while_writing(bench)
    kept = bench.copy("factored")
    for number, (kind, pattern) in enumerate(WORK_FILES.items()):
        for index, (name, damage) in enumerate(DAMAGE.items()):
            if bench.quick and index % len(WORK_FILES) != number:
                continue
            bench.restore(kept)
            damage(next(bench.partial.glob(pattern)))
            yield bench.continued(f"{kind} file, {name}")
    for kind, pattern in list(WORK_FILES.items())[:: 3 if bench.quick else 1]:
        for name, damage in REPLACED.items():
            bench.restore(kept)
            path = next(bench.partial.glob(pattern))
            damage(path)
            yield bench.refused(f"{name} in the place of the {kind} file", bench.run(resume=True), path.name, "remove")
    for name, text in {"empty": "", "cut": '{"weights": "', "a list": "[]", "another": '{"weights": "x"}'}.items():
        bench.restore(kept)
        (bench.partial / "run.json").write_text(text)
        yield bench.refused(f"run.json {name}", bench.run(resume=True))
    bench.restore(kept)
    shutil.rmtree(bench.partial / "layers")
    yield bench.continued("folder of the layers deleted")


def _stop_while_writing(bench: Bench) -> None:
    """Leave a run with all factors, killed when it begins the checkpoint."""

    def plant() -> None:
        def act(_recorder: Recorder, _count: int, title: str, moment: str) -> None:
            if title == "mkdir out.partial/checkpoint" and moment == "after":
                os.kill(os.getpid(), signal.SIGKILL)

        Recorder(bench.place, act).install()

    outcome = bench.run(before=plant, resume=True)
    assert outcome.status == -signal.SIGKILL, outcome.text


# -- changed options, inputs and software -----------------------------------------------------------


def changed(bench: Bench) -> Iterator[Row]:
    """Another option, model, text or version between the crash and --resume."""
    bench.begin()
    bench.stopped()
    _stop_while_writing(bench)
    kept = bench.copy("changed")

    def resumed(*options: str) -> tuple[str, ...]:
        bench.restore(kept)
        return options

    for option in (("--ratio", "0.5"), ("--form", "factors"), ("--no-sequential",), ("--baseline", "svd-llm")):
        yield bench.continued(f"resumed with {' '.join(option)}", *resumed(*option))
    for option, word in (
        (("--seed", "1"), "seed"),
        (("--max-seq-length", "32"), "text"),
        (("--ignore", "*.up_proj"), "ignore"),
    ):
        resumed()
        yield bench.refused(f"resumed with {' '.join(option)}", bench.run(*option, resume=True), f"another {word}"[8:])
    weights = bench.model / "model.safetensors"
    data, stamp = weights.read_bytes(), weights.stat()
    for position in (len(data) // 3, len(data) // 2, len(data) - 3):
        resumed()
        weights.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        yield bench.refused(
            f"weights with another bit at {position}, same size and time", bench.run(resume=True), "weights"
        )
    weights.write_bytes(data)
    resumed()
    os.utime(weights, (0, 0))
    yield bench.continued("weights with another file time")
    model, bench.model = bench.model, bench.model.with_name("moved") / "model"
    bench.model.parent.mkdir(exist_ok=True)
    model.rename(bench.model)
    resumed()
    yield bench.continued("model in another folder")
    bench.model.rename(model)
    bench.model = model
    text = bench.text.read_text()
    bench.text.write_text(text.replace("times", "TIMES"))
    resumed()
    yield bench.refused("another calibration text", bench.run(resume=True), "calibration text")
    bench.text.write_text(text)
    resumed()
    yield bench.continued("torch of another version", before=lambda: _pretend("torch", "2.13.99"))
    resumed()
    outcome = bench.run(before=lambda: _pretend("pgsvd_vllm", "0.0.1"), resume=True)
    config = json.loads((bench.output / "config.json").read_text()) if outcome.status == 0 else {}
    told = "factors of another version" in outcome.text and config["quantization_config"]["tool_version"] == "0.0.1"
    for name in ("config.json", "README.md"):
        path = bench.output / name
        path.write_text(path.read_text().replace("0.0.1", _version()))
    row = bench.equal("pgsvd-vllm of another version", outcome)
    yield {**row, "ok": row["ok"] and told}


def _pretend(module: str, version: str) -> None:
    """Report another version in this process."""
    import importlib

    importlib.import_module(module).__version__ = version  # type: ignore[attr-defined]


def _version() -> str:
    import pgsvd_vllm

    return pgsvd_vllm.__version__


def clocks(bench: Bench) -> Iterator[Row]:
    """File times of 1970 and 2100, as after a change of the clock."""
    bench.begin()
    bench.stopped()
    kept = bench.copy("clock")
    for year, seconds in (("1970", 0), ("2100", 4102444800)):
        bench.restore(kept)
        for path in [*bench.partial.rglob("*"), *bench.model.iterdir(), bench.text]:
            os.utime(path, (seconds, seconds))
        yield bench.continued(f"all files of {year}")


# -- disks and permissions --------------------------------------------------------------------------


def full_disks(bench: Bench) -> Iterator[Row]:
    """A disk that is full, or a limit of the file size, at several operations; afterwards there is room again."""
    for number in (10,) if bench.quick else (2, 10, 20, 30, 40):
        for name, code in (("full disk", errno.ENOSPC), ("failing disk", errno.EIO), ("read-only disk", errno.EROFS)):

            def plant(number: int = number, code: int = code) -> None:
                def act(_recorder: Recorder, count: int, _title: str, moment: str) -> None:
                    if count >= number and moment == "before":
                        raise OSError(code, os.strerror(code), str(bench.partial))

                Recorder(bench.place, act).install()

            bench.begin()
            yield bench.refused(f"{name} from file operation {number}", bench.run(before=plant))
            yield bench.continued(f"{name} from file operation {number}, then resumed")
    for limit in (1000, 200_000, 500_000):

        def shrink(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        bench.begin()
        yield bench.refused(f"files limited to {limit} bytes", bench.run(before=shrink))
        yield bench.continued(f"files limited to {limit} bytes, then resumed")
    if os.geteuid() == 0 and shutil.which("mount"):
        yield from _small_disks(bench)


def _small_disks(bench: Bench) -> Iterator[Row]:
    """A real file system that fills up."""
    for kilobytes in (64, 1500, 4000):
        bench.begin()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(bench.place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return
        try:
            yield bench.refused(f"disk of {kilobytes} kB", bench.run(before=_ignore_estimate))
            subprocess.run(["mount", "-o", "remount,size=1g", str(bench.place)], check=True)
            yield bench.continued(f"disk of {kilobytes} kB, then enlarged")
        finally:
            subprocess.run(["umount", str(bench.place)], check=False)


def _ignore_estimate() -> None:
    """Start although the disk is known to be too small."""
    import pgsvd_vllm.offline.compress as module

    module.check_disk = lambda *_: None  # type: ignore[assignment]


def permissions(bench: Bench) -> Iterator[Row]:
    """An ordinary user who may not read or write something, and then may."""
    if os.geteuid() != 0:
        return
    bench.begin()
    bench.stopped()
    kept = bench.copy("denied")
    places: dict[str, tuple[str, int]] = {
        "DIR.partial is read-only": ("out.partial", 0o555),
        "DIR.partial is closed": ("out.partial", 0o000),
        "the folder of the layers is read-only": ("out.partial/layers", 0o555),
        "the folder of the layers is closed": ("out.partial/layers", 0o000),
        "a layer is closed": ("out.partial/layers/00001.safetensors", 0o000),
        "run.json is closed": ("out.partial/run.json", 0o000),
        "the folder of DIR is read-only": (".", 0o555),
    }
    for path in [bench.work, *bench.model.iterdir()]:
        path.chmod(0o755)
    for name, (path, mode) in places.items():
        bench.restore(kept)
        for one in [bench.place, *bench.place.rglob("*")]:
            os.chown(one, NOBODY, NOBODY)
        before = (bench.place / path).stat().st_mode
        (bench.place / path).chmod(mode)
        outcome = bench.run(before=_become_nobody, resume=True)
        if outcome.status == 0:
            yield bench.equal(name, outcome)
            continue
        yield bench.refused(name, outcome, "ermission denied", "out")
        (bench.place / path).chmod(before)
        yield bench.continued(f"{name}, then open again", before=_become_nobody)


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def shared_calibration(bench: Bench) -> Iterator[Row]:
    """Damage to a folder that several runs share, and a run that only reads it beside another."""
    folder = bench.work / "shared"
    options = ("--calibration", str(folder))
    bench.begin()
    yield bench.equal("shared calibration, first run", bench.run(*options), *options)
    for name, damage in list(DAMAGE.items())[:: 4 if bench.quick else 1]:
        damage(folder / "00001.safetensors")
        bench.begin()
        yield bench.equal(f"shared calibration, {name}", bench.run(*options), *options)
    bench.begin()
    _as_pipe(folder / "00001.safetensors")
    yield bench.refused("a pipe in the shared calibration", bench.run(*options), "00001", "remove")
    shutil.rmtree(folder)


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "tampered": tampered,
    "changed": changed,
    "clocks": clocks,
    "disks": full_disks,
    "permissions": permissions,
    "shared": shared_calibration,
}
