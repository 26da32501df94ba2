"""The state of a run on disk, from which an interrupted run continues.

DIR.partial/ lies beside DIR. Its run.json identifies the run, layers/ holds the calibration of every finished layer,
factors-*/ the factors for one choice of ranks, and checkpoint/ the result while it is written. The last step renames
checkpoint/ to DIR, so DIR appears complete or not at all. With --calibration the layers lie in a folder of the user
instead; several runs can share it, and no run deletes it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.writer import save_tensors
from pgsvd_vllm.offline.records import LayerCalibration, LayerFactors, LayerSensitivity, LMHeadCalibration, ModuleReport

# Version of the stored calibration; a run of another version cannot be resumed. Increment it with every change.
CALIBRATION_VERSION = "4"
RUN_FILE = "run.json"
SETTINGS = "settings"
# The folder of DIR.partial that holds the calibration.
LAYERS = "layers"


class RunState:
    """Creates or reopens DIR.partial.

    Args:
        output: DIR, the folder that the run publishes.
        identity: name -> value of everything that calibration depends on.
        settings: name -> value of resolved settings that a resumed run keeps.
        resume: whether DIR.partial may exist.
        calibration: the user's folder for calibration results; None for DIR.partial/layers.

    Attributes:
        folder: DIR.partial.
        layers: folder of the calibration results.
        checkpoint: folder of the checkpoint while it is written.

    Raises:
        InputError: a folder cannot be created, DIR.partial exists without `resume`, or a folder belongs to another run.
    """

    def __init__(
        self,
        output: Path,
        identity: dict[str, str],
        settings: dict[str, str],
        resume: bool = False,
        calibration: Path | None = None,
    ) -> None:
        self.output = output
        self.folder = partial_folder(output)
        self.layers = calibration or self.folder / LAYERS
        self.checkpoint = self.folder / "checkpoint"
        if calibration is not None:
            _claim(calibration, identity, f"--calibration {calibration}")
        if os.path.lexists(self.folder):
            if not resume:
                raise InputError(f"{self.folder}: left by an interrupted run; continue it with --resume, or delete it")
            _check_owner(self.folder, identity, f"--resume: {self.folder}")
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            if recorded_settings(output) != settings:
                _write_manifest(self.folder, identity | {SETTINGS: settings}, f"--output-dir {output}")
        else:
            _claim(self.folder, identity | {SETTINGS: settings}, f"--output-dir {output}")
        self.layers.mkdir(exist_ok=True)

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

    def save_layer(self, index: int, data: LayerCalibration) -> None:
        """Write the calibration of a layer; the file appears complete or not at all."""
        tensors = {f"gram:{name}": gram.float() for name, gram in data.grams.items()}
        tensors.update({f"energy:{name}": energy for name, energy in data.energy.items()})
        layer = {"leader": data.leader, "tokens": data.tokens, "counts": data.counts}
        _write(self._layer_file(index), tensors, {"layer": json.dumps(layer)})

    def load_layer(self, index: int, with_grams: bool = True) -> LayerCalibration:
        """Read the calibration of a layer; `with_grams` False leaves `grams` empty.

        Raises:
            InputError: the file is damaged.
        """
        kinds = ("gram", "energy") if with_grams else ("energy",)
        found, layer = _read(self._layer_file(index), kinds, "layer")
        counts = layer.get("counts", {})  # earlier versions, without MoE experts, kept none
        return LayerCalibration(found.get("gram", {}), layer["leader"], found["energy"], layer["tokens"], counts)

    @property
    def _lm_head_file(self) -> Path:
        return self.layers / "head.safetensors"

    def has_lm_head(self) -> bool:
        """Whether the calibration of the LM head is on disk."""
        return self._lm_head_file.is_file()

    def save_lm_head(self, data: LMHeadCalibration) -> None:
        """Write the calibration of the LM head; the file appears complete or not at all."""
        _write(self._lm_head_file, {f"head:{name}": tensor for name, tensor in vars(data).items()})

    def load_lm_head(self) -> LMHeadCalibration:
        """Read the calibration of the LM head; raises InputError if the file is damaged."""
        found, _ = _read(self._lm_head_file, ("head",))
        return LMHeadCalibration(**found["head"])

    def _sensitivity_file(self, index: int, kind: str) -> Path:
        return self.layers / f"{index:05d}.{kind}.safetensors"

    def has_sensitivity(self, index: int, kind: str) -> bool:
        """Whether the sensitivities of a layer are on disk; `kind` is `measured` or `forward`."""
        return self._sensitivity_file(index, kind).is_file()

    def save_sensitivity(self, index: int, kind: str, data: LayerSensitivity) -> None:
        """Write the sensitivities of a layer; the file appears complete or not at all."""
        tensors = {f"moment:{name}": moment.float() for name, moment in data.moments.items()}
        tensors.update({f"gram:{name}": gram.float() for name, gram in data.grams.items()})
        tensors.update({f"energy:{name}": energy for name, energy in data.energy.items()})
        _write(self._sensitivity_file(index, kind), tensors)

    def load_sensitivity(self, index: int, kind: str, with_matrices: bool = True) -> LayerSensitivity:
        """Read the sensitivities of a layer; `with_matrices` False leaves `moments` and `grams` empty.

        Raises:
            InputError: the file is damaged.
        """
        kinds = ("moment", "gram", "energy") if with_matrices else ("energy",)
        found, _ = _read(self._sensitivity_file(index, kind), kinds)
        return LayerSensitivity(found.get("moment", {}), found.get("gram", {}), found["energy"])

    def open_factors(self, choice: dict[str, Any]) -> None:
        """Select the folder of factors for a choice of ranks, form and solver; folders of other choices are deleted.

        Args:
            choice: JSON values that the factors depend on.
        """
        self._open(f"factors-{_digest(choice)}")

    def open_refined(self, choice: dict[str, Any]) -> None:
        """Select the folder of factors distilled from the current ones, which are kept.

        Args:
            choice: JSON values that distillation depends on.
        """
        self._open(f"{self._factors.name}-{_digest(choice)}")

    def _open(self, name: str) -> None:
        """Select a folder of factors and delete those that neither extend its name nor are extended by it."""
        for folder in self.folder.glob("factors-*"):
            if not (folder.name.startswith(name) or name.startswith(folder.name)):
                shutil.rmtree(folder)
        self._factors = self.folder / name
        self._factors.mkdir(exist_ok=True)

    def _factors_file(self, index: int) -> Path:
        return self._factors / f"{index:05d}.safetensors"

    def has_factors(self, index: int) -> bool:
        """Whether the factors of a layer are on disk."""
        return self._factors_file(index).is_file()

    def save_factors(self, index: int, data: LayerFactors) -> None:
        """Write the factors of a layer; the file appears complete or not at all."""
        tensors = {f"factor:{n}.{suffix}": t for n, row in data.tensors.items() for suffix, t in row.items()}
        reports = json.dumps([asdict(report) for report in data.reports.values()])
        _write(self._factors_file(index), tensors, {"reports": reports})

    def load_factors(self, index: int) -> LayerFactors:
        """Read the factors of a layer; raises InputError if the file is damaged."""
        found, reports = _read(self._factors_file(index), ("factor",), "reports")
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in found["factor"].items():
            name, _, suffix = key.rpartition(".")
            tensors.setdefault(name, {})[suffix] = tensor
        return LayerFactors(tensors, {row["name"]: ModuleReport(**row) for row in reports})

    def begin_checkpoint(self) -> Path:
        """Create an empty folder for the checkpoint and return it."""
        self.checkpoint.mkdir()
        return self.checkpoint

    def publish(self) -> None:
        """Rename the checkpoint to DIR and delete DIR.partial.

        Raises:
            InputError: DIR exists by now, or cannot be written.
        """
        for path in self.checkpoint.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        # os.rename fails if DIR is a folder with files, so nothing is replaced.
        try:
            os.rename(self.checkpoint, self.output)
        except OSError as error:
            raise InputError(f"--output-dir {self.output}: cannot be written ({error.strerror})") from None
        self.discard()

    def discard(self) -> None:
        """Delete DIR.partial."""
        shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(output: Path) -> Path:
    """DIR.partial of a run that publishes `output`."""
    return output.with_name(output.name + ".partial")


def recorded_settings(output: Path) -> dict[str, str]:
    """The resolved settings in the manifest of an interrupted run; empty if it cannot be read."""
    try:
        manifest = json.loads((partial_folder(output) / RUN_FILE).read_text(encoding="utf-8"))
        return dict(manifest[SETTINGS])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def measured_layers(folder: Path, sensitivity: str) -> int:
    """How many layers have sensitivities of a kind in a folder of calibration results."""
    if not os.path.isdir(folder):  # unlike Path.glob, also for a name that is too long
        return 0
    return len(list(folder.glob(f"?????.{sensitivity}.safetensors")))


def _write_manifest(folder: Path, manifest: Mapping[str, Any], label: str) -> None:
    """Write or replace the manifest atomically; raises InputError, which starts with `label`."""
    part = folder / f"{RUN_FILE}.writing"
    try:
        part.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        os.replace(part, folder / RUN_FILE)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{label}: cannot be written ({error.strerror})") from None


def _claim(folder: Path, manifest: Mapping[str, Any], label: str) -> None:
    """Create a folder for a run, or check that an existing one belongs to it.

    Raises:
        InputError: the folder cannot be created or belongs to something else; starts with `label`.
    """
    if os.path.isfile(folder / RUN_FILE):  # unlike Path.is_file, also for a name that is too long
        return _check_owner(folder, manifest, label)
    try:
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{label}: exists and holds something else; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{label}: cannot be written ({error.strerror})") from None
    try:
        return _write_manifest(folder, manifest, label)
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)  # it was empty
        raise


def _check_owner(folder: Path, manifest: Mapping[str, Any], label: str) -> None:
    """Check that a folder belongs to the run of a manifest; raises InputError naming what differs."""
    run_file = folder / RUN_FILE
    try:
        old = dict(json.loads(run_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{run_file}: unreadable, this run cannot be resumed; delete {folder}") from None
    identity = [key for key in manifest if key != SETTINGS]
    # Manifests of earlier versions lack `include`.
    changed = [key for key in identity if old.get(key, "" if key == "include" else None) != manifest[key]]
    if changed:
        raise InputError(
            f"{label} belongs to a run with another {', '.join(changed)}; use the same options or delete it"
        )


def _digest(choice: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    part = path.with_suffix(".writing")
    save_tensors(tensors, part, metadata)
    os.replace(part, path)


def _read(
    path: Path, kinds: Sequence[str], metadata_key: str | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], Any]:
    """The tensors named `kind:name` by kind and name, and one JSON value of the metadata.

    Raises:
        InputError: the file is damaged; the message says to delete it and resume.
    """
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}

    def damaged(error: Exception) -> InputError:
        return InputError(f"{path}: damaged ({error}); delete it and run again with --resume")

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                kind, _, name = key.partition(":")
                if kind in found:
                    found[kind][name] = file.get_tensor(key)
    # Not TypeError: Ctrl-C inside the compiled reader raises it, without any damage.
    except (SafetensorError, OSError) as error:
        raise damaged(error) from None
    if metadata_key is None:
        return found, None
    try:
        return found, json.loads(metadata[metadata_key])
    except (KeyError, ValueError) as error:
        raise damaged(error) from None
