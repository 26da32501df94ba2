"""The state of a run on disk, from which an interrupted run continues.

DIR.partial/ lies beside DIR. Its run.json identifies the run, layers/ holds the calibration of every finished layer,
factors-*/ the factors for one choice of ranks, and checkpoint/ the result while it is written. The last step renames
checkpoint/ to DIR, so DIR appears complete or not at all. With --calibration the layers lie in a folder of the user
instead; several runs can share it, and no run deletes it.

Every file carries checksums (`state/work_files.py`). Opening a run verifies them and deletes damaged files, whose
layers are then computed again. A lock (`state/run_lock.py`) keeps a second process out.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pgsvd_vllm
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.linalg import kinds, pack, unpack
from pgsvd_vllm.offline.records import LayerCalibration, LayerFactors, LayerSensitivity, LMHeadCalibration, ModuleReport
from pgsvd_vllm.offline.state.cleanup import delete_run, remove
from pgsvd_vllm.offline.state.manifest import RUN_FILE, Manifest, fingerprint, is_blank
from pgsvd_vllm.offline.state.published import CHECKPOINT, is_complete, partial_folder
from pgsvd_vllm.offline.state.run_lock import RunLock
from pgsvd_vllm.offline.state.work_files import (
    WRITING,
    DamagedFileError,
    WorkFileError,
    check_sealed,
    read_sealed,
    save_sealed,
    sync,
)

# The folder of DIR.partial that holds the calibration.
LAYERS = "layers"
# Folders of DIR.partial that belong to one process and are not kept: the checkpoint, and the inputs of the layers.
TEMPORARY = (CHECKPOINT, "inputs")
_WORK_FILE = re.compile(r"(\d{5,}(\.(measured|forward)(-rounding)?)?|head)\.safetensors")


def has_begun(output: Path) -> bool:
    """Whether DIR.partial holds a run."""
    return os.path.isfile(partial_folder(output) / RUN_FILE)  # unlike Path.is_file, also for a name that is too long


def refuse_begun(output: Path) -> None:
    """Refuse to begin where DIR.partial holds a run.

    Raises:
        InputError: DIR.partial holds a run, which another process may be writing, or cannot be read.
    """
    folder = partial_folder(output)
    if not has_begun(output):
        return
    try:
        RunLock(folder, output).release()
    except OSError as error:
        raise InputError(f"--output-dir {output}: cannot be written ({error.strerror})") from None
    raise InputError(f"{folder}: left by an interrupted run; continue it with --resume, or delete it")


class RunState:
    """Creates or reopens DIR.partial and locks it until `close`, `discard` or `publish`.

    Args:
        output: DIR, the folder that the run publishes.
        manifest: what identifies the run.
        resume: whether DIR.partial may exist.
        calibration: the user's folder for calibration results; None for DIR.partial/layers.
        say: called with one line for each damaged file that is computed again, and for a changed environment.

    Attributes:
        folder: DIR.partial.
        layers: folder of the calibration results.
        checkpoint: folder of the checkpoint while it is written.

    Raises:
        InputError: a folder cannot be created or read, DIR.partial exists without `resume`, DIR exists, another process
            writes into a folder, or a folder belongs to another run.
    """

    def __init__(
        self,
        output: Path,
        manifest: Manifest,
        resume: bool = False,
        calibration: Path | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.output, self.manifest, self._say = output, manifest, say
        self.folder = partial_folder(output)
        self.layers = calibration or self.folder / LAYERS
        self.checkpoint = self.folder / CHECKPOINT
        self._factors = self.folder
        self._locks: dict[Path, RunLock] = {}
        created = False
        try:
            if calibration is not None:
                self._claim(calibration, calibration, f"--calibration {calibration}")
            label = f"--output-dir {output}"
            if not resume:
                refuse_begun(output)
            elif has_begun(output):
                label = f"--resume: {self.folder}"
            created = self._claim(self.folder, output, label)
            if os.path.lexists(output):
                raise InputError(f"--output-dir {output}: already exists; remove it or choose another folder")
            for name in TEMPORARY:
                remove(self.folder / name)
            self.layers.mkdir(exist_ok=True)
            self._check_files(self.layers)
        except BaseException as error:
            if created:
                self.discard()
            self.close()
            if isinstance(error, OSError):
                raise InputError(f"{error.filename or self.folder}: cannot be used ({error.strerror})") from None
            raise

    def _lock(self, folder: Path, target: Path, label: str) -> None:
        """Lock a folder, which is created if it is missing; raises InputError as `RunLock`, or with `label`."""
        try:
            lock = RunLock(folder, target, shared=folder != self.folder)
        except OSError as error:
            raise InputError(f"{label}: cannot be written ({error.strerror})") from None
        self._locks[folder] = lock
        if not lock.works:
            self._say(f"WARNING: {folder}: its file system has no locks; do not start two runs on it")

    def _claim(self, folder: Path, target: Path, label: str) -> bool:
        """Lock a folder and write the manifest into an empty one; returns whether it was empty.

        Raises:
            InputError: the folder cannot be created, holds something else or belongs to another run; starts with
                `label`.
        """
        if not is_blank(folder) and not os.path.isfile(folder / RUN_FILE):
            raise InputError(f"{label}: exists and holds something else; name another folder")
        self._lock(folder, target, label)
        own = folder == self.folder
        if not is_blank(folder):
            for line in self.manifest.check(folder, label):
                self._say(line)
            if own and (Manifest.settings_in(folder) != self.manifest.settings or Manifest.published(folder)):
                self.manifest.write(folder)
            return False
        try:
            (self.manifest if own else self.manifest.without_settings()).write(folder)
        except OSError as error:
            lock = self._locks.pop(folder)
            with suppress(OSError):
                lock.delete()
            lock.release()
            raise InputError(f"{label}: cannot be written ({error.strerror})") from None
        return True

    def _check_files(self, folder: Path) -> None:
        """Verify every work file of a folder; delete damaged ones and files whose writing was interrupted.

        Raises:
            InputError: something else is in the place of a file, or a damaged file is in use by another process.
            OSError: a file cannot be read or deleted.
        """
        for path in sorted(folder.iterdir()):
            if path.name.endswith(WRITING):
                with suppress(OSError):  # a folder that this user can only read
                    path.unlink()
            elif _WORK_FILE.fullmatch(path.name):
                try:
                    check_sealed(path, self._label(path))
                except DamagedFileError as error:
                    self._lock_for_writing(folder)
                    path.unlink()
                    self._say(f"WARNING: {path}: damaged ({error}); it is computed again")

    def _label(self, path: Path) -> str:
        """What a work file is: the name of the file, the choice of factors, and the run's identity."""
        base = "" if path.parent == self.layers else path.parent.name
        return f"{base}/{path.name} of {self.manifest.identity}"

    def _lock_for_writing(self, folder: Path) -> None:
        if folder in self._locks:
            self._locks[folder].exclude_others()

    @property
    def kept_in(self) -> str:
        """The folders with finished layers, for messages."""
        return str(self.folder) if self.layers.parent == self.folder else f"{self.layers} and {self.folder}"

    def begin_calibration(self) -> None:
        """Keep other processes out of the calibration folder; raises InputError if one uses it."""
        self._lock_for_writing(self.layers)

    def end_calibration(self) -> None:
        """Let other runs read the calibration folder while this one factors."""
        if self.layers in self._locks:
            self._locks[self.layers].share()

    def _layer_file(self, index: int) -> Path:
        return self.layers / f"{index:05d}.safetensors"

    def has_layer(self, index: int) -> bool:
        """Whether the calibration of a layer is on disk."""
        return self._layer_file(index).is_file()

    @property
    def has_any_layer(self) -> bool:
        """Whether the calibration of any layer is on disk."""
        return any(self.layers.glob("*.safetensors"))

    @property
    def used_bytes(self) -> int:
        """Bytes of the finished layers and factors on disk."""
        files = {*self.folder.glob("*/*.safetensors"), *self.layers.glob("*.safetensors")}
        return sum(path.stat().st_size for path in files)

    def _save(self, path: Path, tensors: dict[str, torch.Tensor], content: object = None) -> None:
        save_sealed(path, self._label(path), tensors, content)

    def _load(self, path: Path, *kinds: str) -> tuple[dict[str, dict[str, torch.Tensor]], Any]:
        """The tensors of a file by kind and name, and its JSON value; raises WorkFileError if the file is damaged."""
        try:
            return read_sealed(path, self._label(path), kinds)
        except DamagedFileError as error:
            raise WorkFileError(f"{path}: damaged ({error}); repeat with --resume, which computes it again") from None

    def save_layer(self, index: int, data: LayerCalibration) -> None:
        """Write the calibration of a layer; the file appears complete or not at all."""
        tensors = pack("gram", data.grams)
        tensors.update({f"energy:{name}": energy for name, energy in data.energy.items()})
        layer = {"leader": data.leader, "tokens": data.tokens, "counts": data.counts}
        self._save(self._layer_file(index), tensors, layer)

    def load_layer(self, index: int, with_grams: bool = True) -> LayerCalibration:
        """Read the calibration of a layer; `with_grams` False leaves `grams` empty.

        Raises:
            InputError: the file is damaged.
        """
        found, layer = self._load(self._layer_file(index), "energy", *(kinds("gram") if with_grams else ()))
        return LayerCalibration(unpack("gram", found), energy=found["energy"], **layer)

    @property
    def _lm_head_file(self) -> Path:
        return self.layers / "head.safetensors"

    def has_lm_head(self) -> bool:
        """Whether the calibration of the LM head is on disk."""
        return self._lm_head_file.is_file()

    def save_lm_head(self, data: LMHeadCalibration) -> None:
        """Write the calibration of the LM head; the file appears complete or not at all."""
        self._save(self._lm_head_file, {f"head:{name}": tensor for name, tensor in vars(data).items()})

    def load_lm_head(self) -> LMHeadCalibration:
        """Read the calibration of the LM head; raises InputError if the file is damaged."""
        found, _ = self._load(self._lm_head_file, "head")
        return LMHeadCalibration(**found["head"])

    def _sensitivity_file(self, index: int, kind: str) -> Path:
        return self.layers / f"{index:05d}.{kind}.safetensors"

    def has_sensitivity(self, index: int, kind: str) -> bool:
        """Whether the sensitivities of a layer are on disk; `kind` is `measured` or `forward`."""
        return self._sensitivity_file(index, kind).is_file()

    def save_sensitivity(self, index: int, kind: str, data: LayerSensitivity) -> None:
        """Write the sensitivities of a layer; the file appears complete or not at all."""
        tensors = pack("moment", data.moments) | pack("gram", data.grams)
        tensors.update({f"energy:{name}": energy for name, energy in data.energy.items()})
        self._save(self._sensitivity_file(index, kind), tensors)

    def load_sensitivity(self, index: int, kind: str, with_matrices: bool = True) -> LayerSensitivity:
        """Read the sensitivities of a layer; `with_matrices` False leaves `moments` and `grams` empty.

        Raises:
            InputError: the file is damaged.
        """
        matrices = (*kinds("moment"), *kinds("gram")) if with_matrices else ()
        found, _ = self._load(self._sensitivity_file(index, kind), "energy", *matrices)
        return LayerSensitivity(unpack("moment", found), unpack("gram", found), found["energy"])

    def _rounding_file(self, index: int, kind: str) -> Path:
        return self._sensitivity_file(index, f"{kind}-rounding")

    def save_rounding(self, index: int, kind: str, found: dict[str, Any]) -> None:
        """Write the predicted losses of rounding a layer, a JSON value; the file appears complete or not at all.

        Args:
            index: of the layer.
            kind: of the sensitivities, `measured` or `forward`.
            found: the losses.
        """
        self._save(self._rounding_file(index, kind), {}, found)

    def load_rounding(self, index: int, kind: str) -> dict[str, Any] | None:
        """Read what `save_rounding` has written, None if nothing; raises InputError if the file is damaged."""
        path = self._rounding_file(index, kind)
        found: dict[str, Any] | None = self._load(path)[1] if path.is_file() else None
        return found

    def open_factors(self, choice: dict[str, Any]) -> None:
        """Select the folder of factors for a choice of ranks, form and solver; folders of other choices are deleted.

        Factors of another version of this program are another choice.

        Args:
            choice: JSON values that the factors depend on.
        """
        self._open(f"factors-{_digest(choice | {'program': pgsvd_vllm.__version__})}")

    def open_following(self, choice: dict[str, Any]) -> None:
        """Select the folder of factors that a further stage makes of the current ones, which are kept.

        Args:
            choice: JSON values that the stage depends on.
        """
        self._open(f"{self._factors.name}-{_digest(choice)}")

    def load_earlier(self, index: int) -> LayerFactors:
        """The factors of a layer from before `open_following`; raises InputError if the file is damaged."""
        return self._read_factors(self._earlier() / self._factors_file(index).name)

    def _earlier(self) -> Path:
        return self._factors.with_name(self._factors.name.rpartition("-")[0])

    def leave_following(self) -> None:
        """Return to the factors from before `open_following`; those of the further stage are deleted."""
        remove(self._factors)
        self._factors = self._earlier()

    def _open(self, name: str) -> None:
        """Select a folder of factors and delete those that neither extend its name nor are extended by it."""
        for folder in self.folder.glob("factors-*"):
            if not (folder.name.startswith(name) or name.startswith(folder.name)):
                remove(folder)
        self._factors = self.folder / name
        self._factors.mkdir(exist_ok=True)
        self._check_files(self._factors)

    def _factors_file(self, index: int) -> Path:
        return self._factors / f"{index:05d}.safetensors"

    def has_factors(self, index: int) -> bool:
        """Whether the factors of a layer are on disk."""
        return self._factors_file(index).is_file()

    def save_factors(self, index: int, data: LayerFactors) -> None:
        """Write the factors of a layer; the file appears complete or not at all."""
        tensors = {f"factor:{n}.{suffix}": t for n, row in data.tensors.items() for suffix, t in row.items()}
        self._save(self._factors_file(index), tensors, [asdict(report) for report in data.reports.values()])

    def load_factors(self, index: int) -> LayerFactors:
        """Read the factors of a layer; raises InputError if the file is damaged."""
        return self._read_factors(self._factors_file(index))

    def _read_factors(self, path: Path) -> LayerFactors:
        found, reports = self._load(path, "factor")
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in found["factor"].items():
            name, _, suffix = key.rpartition(".")
            tensors.setdefault(name, {})[suffix] = tensor
        return LayerFactors(tensors, {row["name"]: ModuleReport(**row) for row in reports})

    def begin_checkpoint(self) -> Path:
        """Create an empty folder for the checkpoint and return it."""
        self.checkpoint.mkdir()
        return self.checkpoint

    def publish(self, request: str) -> None:
        """Rename the checkpoint to DIR and delete DIR.partial.

        Args:
            request: identifies the options, for `finish_published`.

        Raises:
            InputError: DIR exists by now, or cannot be written.
        """
        for path in sorted(self.checkpoint.rglob("*")):
            sync(path)
        sync(self.checkpoint)
        self.manifest.write(self.folder, {"request": request, "files": fingerprint(self.checkpoint)})
        # os.rename fails if DIR is a folder with files, so nothing is replaced.
        try:
            os.rename(self.checkpoint, self.output)
            sync(self.output.parent)
        except OSError as error:
            raise InputError(f"--output-dir {self.output}: cannot be written ({error.strerror})") from None
        self.discard()

    @property
    def is_published(self) -> bool:
        """Whether `publish` has renamed the checkpoint, even if it was interrupted afterwards."""
        return is_complete(self.output)

    def discard(self) -> None:
        """Delete DIR.partial as far as possible and end the locks."""
        if self.folder in self._locks:
            line = delete_run(self.folder, self._locks[self.folder])
            if line is not None:
                self._say(line)
        self.close()

    def close(self) -> None:
        """End the locks; DIR.partial stays."""
        while self._locks:
            self._locks.popitem()[1].release()


def recorded_settings(output: Path) -> dict[str, str]:
    """The resolved settings in the manifest of an interrupted run; empty if it cannot be read."""
    return Manifest.settings_in(partial_folder(output))


def measured_layers(folder: Path, sensitivity: str) -> int:
    """How many layers have sensitivities of a kind in a folder of calibration results."""
    if not os.path.isdir(folder):  # unlike Path.glob, also for a name that is too long
        return 0
    return len(list(folder.glob(f"?????.{sensitivity}.safetensors")))


def _digest(choice: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]
