"""The folder of a compression under way: what is finished survives an interruption.

DIR.partial/ lies beside DIR: run.json says which run it belongs to, layers/ holds the calibration
of every finished layer, factors-*/ the factors for one choice of ranks, checkpoint/ the
result while it is written. The last step renames checkpoint/ to DIR, so DIR appears complete or not at all.
With --calibration the layers lie in a folder of the user's instead, which other runs share and none deletes.
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

# Raised whenever other things are kept of a layer: what an older program left cannot be continued.
CALIBRATION = "4"
RUN_FILE = "run.json"
SETTINGS = "settings"


class RunState:
    """Creates or reopens DIR.partial.

    Args:
        output: DIR, the folder that the run publishes.
        identity: what calibration depends on; runs of equal identity may share it.
        settings: what the options left open, as resolved; kept for a resumed run.
        resume: whether DIR.partial may exist.
        calibration: the user's folder for what is measured; None for DIR.partial/layers.

    Raises:
        InputError: the folder cannot be made, exists without `resume`, or belongs to another run.
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
        self.layers = calibration or self.folder / "layers"
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
        """Whether a layer's calibration is complete on disk."""
        return self._layer_file(index).is_file()

    @property
    def has_any_layer(self) -> bool:
        """Whether anything would be lost by deleting the folder."""
        return any(self.layers.glob("*.safetensors"))

    @property
    def used_bytes(self) -> int:
        """Disk that the finished layers and factors take."""
        files = {*self.folder.glob("*/*.safetensors"), *self.layers.glob("*.safetensors")}
        return sum(path.stat().st_size for path in files)

    def save_layer(self, index: int, data: LayerCalibration) -> None:
        """Write one layer's calibration; the file appears complete or not at all."""
        tensors = {f"gram:{name}": gram.float() for name, gram in data.grams.items()}
        tensors.update({f"energy:{name}": energy for name, energy in data.energy.items()})
        layer = {"leader": data.leader, "tokens": data.tokens, "counts": data.counts}
        _write(self._layer_file(index), tensors, {"layer": json.dumps(layer)})

    def load_layer(self, index: int, with_grams: bool = True) -> LayerCalibration:
        """Read one layer's calibration; raises InputError where the file is damaged."""
        kinds = ("gram", "energy") if with_grams else ("energy",)
        found, layer = _read(self._layer_file(index), kinds, "layer")
        counts = layer.get("counts", {})  # not kept by earlier versions, which left experts alone
        return LayerCalibration(found.get("gram", {}), layer["leader"], found["energy"], layer["tokens"], counts)

    @property
    def _lm_head_file(self) -> Path:
        return self.layers / "head.safetensors"

    def has_lm_head(self) -> bool:
        """Whether the output head's calibration is complete on disk."""
        return self._lm_head_file.is_file()

    def save_lm_head(self, data: LMHeadCalibration) -> None:
        """Write the output head's calibration; the file appears complete or not at all."""
        _write(self._lm_head_file, {f"head:{name}": tensor for name, tensor in vars(data).items()})

    def load_lm_head(self) -> LMHeadCalibration:
        """Read the output head's calibration; raises InputError where the file is damaged."""
        found, _ = _read(self._lm_head_file, ("head",))
        return LMHeadCalibration(**found["head"])

    def _sensitivity_file(self, index: int, kind: str) -> Path:
        return self.layers / f"{index:05d}.{kind}.safetensors"

    def has_sensitivity(self, index: int, kind: str) -> bool:
        """Whether a layer's sensitivities of a kind (`measured`, `forward`) are complete on disk."""
        return self._sensitivity_file(index, kind).is_file()

    def save_sensitivity(self, index: int, kind: str, data: LayerSensitivity) -> None:
        """Write one layer's sensitivities; the file appears complete or not at all."""
        tensors = {f"moment:{name}": moment.float() for name, moment in data.moments.items()}
        tensors.update({f"gram:{name}": gram.float() for name, gram in data.grams.items()})
        tensors.update({f"energy:{name}": energy for name, energy in data.energy.items()})
        _write(self._sensitivity_file(index, kind), tensors)

    def load_sensitivity(self, index: int, kind: str, with_matrices: bool = True) -> LayerSensitivity:
        """Read one layer's sensitivities; raises InputError where the file is damaged."""
        kinds = ("moment", "gram", "energy") if with_matrices else ("energy",)
        found, _ = _read(self._sensitivity_file(index, kind), kinds)
        return LayerSensitivity(found.get("moment", {}), found.get("gram", {}), found["energy"])

    def open_factors(self, choice: dict[str, Any]) -> None:
        """Use the factors that belong to a choice of ranks, form and solver; others are deleted."""
        self._open(f"factors-{_digest(choice)}")

    def open_refined(self, choice: dict[str, Any]) -> None:
        """Use what refining the current factors by a choice of time and seed gives; the current ones stay."""
        self._open(f"{self._factors.name}-{_digest(choice)}")

    def _open(self, name: str) -> None:
        for folder in self.folder.glob("factors-*"):
            if not (folder.name.startswith(name) or name.startswith(folder.name)):
                shutil.rmtree(folder)
        self._factors = self.folder / name
        self._factors.mkdir(exist_ok=True)

    def _factors_file(self, index: int) -> Path:
        return self._factors / f"{index:05d}.safetensors"

    def has_factors(self, index: int) -> bool:
        """Whether a layer's factors are complete on disk."""
        return self._factors_file(index).is_file()

    def save_factors(self, index: int, data: LayerFactors) -> None:
        """Write one layer's factors; the file appears complete or not at all."""
        tensors = {f"factor:{n}.{suffix}": t for n, row in data.tensors.items() for suffix, t in row.items()}
        reports = json.dumps([asdict(report) for report in data.reports.values()])
        _write(self._factors_file(index), tensors, {"reports": reports})

    def load_factors(self, index: int) -> LayerFactors:
        """Read one layer's factors; raises InputError where the file is damaged."""
        found, reports = _read(self._factors_file(index), ("factor",), "reports")
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in found["factor"].items():
            name, _, suffix = key.rpartition(".")
            tensors.setdefault(name, {})[suffix] = tensor
        return LayerFactors(tensors, {row["name"]: ModuleReport(**row) for row in reports})

    def begin_checkpoint(self) -> Path:
        """An empty folder to write the result into."""
        self.checkpoint.mkdir()
        return self.checkpoint

    def publish(self) -> None:
        """Make the result visible as DIR and remove the rest."""
        for path in self.checkpoint.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        # Over an existing folder os.rename fails unless that one is empty, so nothing is replaced.
        try:
            os.rename(self.checkpoint, self.output)
        except OSError as error:
            raise InputError(f"--output-dir {self.output}: cannot be written ({error.strerror})") from None
        self.discard()

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(output: Path) -> Path:
    """Where a run that publishes `output` keeps its work."""
    return output.with_name(output.name + ".partial")


def recorded_settings(output: Path) -> dict[str, str]:
    """The resolved settings in the manifest of an interrupted run; empty where there is none that can be read."""
    try:
        manifest = json.loads((partial_folder(output) / RUN_FILE).read_text(encoding="utf-8"))
        return dict(manifest[SETTINGS])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write_manifest(folder: Path, manifest: Mapping[str, Any], label: str) -> None:
    """Write or replace the manifest, which is complete or as it was; raises InputError, starting with the label."""
    part = folder / f"{RUN_FILE}.writing"
    try:
        part.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        os.replace(part, folder / RUN_FILE)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{label}: cannot be written ({error.strerror})") from None


def _claim(folder: Path, manifest: Mapping[str, Any], label: str) -> None:
    """Make a folder for a run, or see that it belongs to this one.

    Raises:
        InputError: it cannot be made, or holds something else; starts with the label.
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
        shutil.rmtree(folder, ignore_errors=True)  # there was nothing in it
        raise


def _check_owner(folder: Path, manifest: Mapping[str, Any], label: str) -> None:
    """Refuse the folder of another run; raises InputError saying what differs."""
    run_file = folder / RUN_FILE
    try:
        old = dict(json.loads(run_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{run_file}: unreadable, this run cannot be resumed; delete {folder}") from None
    identity = [key for key in manifest if key != SETTINGS]
    # Earlier versions knew no --include.
    changed = [key for key in identity if old.get(key, "" if key == "include" else None) != manifest[key]]
    if changed:
        raise InputError(
            f"{label} belongs to a run with another {', '.join(changed)}; use the same options or delete it"
        )


def _digest(choice: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors on the CPU under another name, then give them their own."""
    part = path.with_suffix(".writing")
    save_tensors(tensors, part, metadata)
    os.replace(part, path)


def _read(
    path: Path, kinds: Sequence[str], metadata_key: str | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], Any]:
    """The tensors named `kind:name` of some kinds, and one JSON value of the metadata.

    Raises:
        InputError: the file is damaged; says what to do.
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
    # Nothing wider: a Ctrl-C inside the compiled reader comes out as a TypeError, and is no damage.
    except (SafetensorError, OSError) as error:
        raise damaged(error) from None
    if metadata_key is None:
        return found, None
    try:
        return found, json.loads(metadata[metadata_key])
    except (KeyError, ValueError) as error:
        raise damaged(error) from None
