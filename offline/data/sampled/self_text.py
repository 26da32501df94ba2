"""The model's own text as calibration data: sampled in batches, kept in the user's cache, continued after a stop."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.data.sampled.generate import SampleError, generate
from pgsvd_vllm.offline.data.sampled.scripts import Chat, Form, FreeText, Script, read_form
from pgsvd_vllm.offline.model.content import content_digest
from pgsvd_vllm.offline.model.device import gemm_rate
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.state.work_files import DamagedFileError, WorkFileError, read_sealed, save_sealed

# Temperature of the draws; see docs/dev/log.md.
TEMPERATURE = 1.0
# Pieces of windows that are sampled together, if memory allows.
ROWS = 128
# Longest piece of a window: attention reads the KV cache of every earlier token of the piece, so that shorter ones are
# sampled faster (on a CPU 342 tokens/s at 1024 and 645 at 512, docs/dev/log.md).
PIECE = 512
# FLOPs of sampling on a CPU: 15 minutes of two ordinary cores. More windows are not sampled there.
CPU_FLOPS = 1.35e14
# Seconds that one step takes at least for each layer: the calls of its kernels.
STEP_SECONDS = 0.5e-3
# Time of the GEMMs of decoding, which are small, as a multiple of that at full speed.
GEMM_SLOWDOWN = 1.5
# Bytes of the KV cache that attention reads in a second.
ATTENTION_RATE = {"cpu": 5e9, "cuda": 1e12}
# Version of the stored text; increment it with every change of what is sampled.
VERSION = 3


@dataclass(frozen=True)
class Machine:
    """Where sampling runs.

    Attributes:
        device: that computes.
        dtype: of the model.
        free: bytes that can be allocated; None if unknown.
    """

    device: torch.device
    dtype: torch.dtype
    free: int | None


@dataclass(frozen=True)
class Sampling:
    """What sampling takes.

    Attributes:
        seconds: estimated time.
        memory: of the whole model and its KV cache, in bytes.
    """

    seconds: float
    memory: int


class SelfText:
    """Windows that a model samples from itself: half free text, half conversations if it has a chat template.

    Long windows are put together from pieces that are sampled on their own.

    Args:
        source: the model, which generates text.
        tokenizer: of the model.
        machine: that samples.
        length: tokens per window.
        seed: of the draws.

    Raises:
        InputError: a file of the model cannot be read.
    """

    def __init__(
        self, source: ModelSource, tokenizer: PreTrainedTokenizerBase, machine: Machine, length: int, seed: int
    ) -> None:
        self._source, self._tokenizer, self._machine = source, tokenizer, machine
        self.length, self._piece, self._seed = length, piece_length(length), seed
        self.form: Form = read_form(tokenizer, _end_tokens(source.folder))
        self._identity = self._identify()
        self.folder = cache_folder() / "sampled" / self._identity[:32]

    def _identify(self) -> str:
        """SHA-256 of all that the text depends on, besides rounding."""
        form = self.form
        tokens = [form.leading, form.separator, sorted(form.special), len(form.plain), form.turns and vars(form.turns)]
        parts = {
            "tokens": hashlib.sha256(repr(tokens).encode()).hexdigest(),
            "length": self.length,
            "piece": self._piece,
            "temperature": TEMPERATURE,
            "version": VERSION,
        }
        return sampled_identity(self._source, self._machine, self._seed, parts)

    @property
    def most(self) -> int:
        """Windows that this machine samples at most."""
        if self._machine.device.type != "cpu":
            return 1 << 20
        return max(1, int(CPU_FLOPS / (2 * self._source.weights.numel * self.length)))

    @property
    def _rows(self) -> int:
        return rows_in_memory(self._source, self._machine, self._piece)

    @property
    def _pieces(self) -> int:
        """Pieces of a window."""
        return self.length // self._piece

    def cached(self, count: int) -> torch.Tensor:
        """The first windows, int64 [count or fewer, length], as far as they have been sampled."""
        found, total = [torch.empty(0, self.length, dtype=torch.int64)], 0
        while total < count:
            path = self.folder / f"{total:06d}.safetensors"
            if not path.is_file():
                break
            try:
                tensors, _ = read_sealed(path, self._label(total), ("text",))
            except (DamagedFileError, WorkFileError):
                with suppress(OSError):
                    path.unlink()  # it is sampled again
                break
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}); delete it") from None
            found.append(tensors["text"]["ids"].long())
            total += len(found[-1])
        return torch.cat(found)[:count]

    def _label(self, first: int) -> str:
        return f"sampled windows from {first} of {self._identity}"

    def to_sample(self, count: int) -> Sampling | None:
        """What it takes to sample what is missing of the first `count` windows; None if nothing is."""
        missing = count - len(self.cached(count))
        if missing <= 0:
            return None
        source, machine = self._source, self._machine
        pieces = missing * self._pieces
        rows = max(1, min(self._rows, pieces))
        rate = gemm_rate(machine.dtype, machine.device)
        compute = GEMM_SLOWDOWN * 2 * missing * self.length * source.weights.numel / rate
        read = pieces * self._piece**2 / 2 * _cache_features(source) * machine.dtype.itemsize
        attention = read / ATTENTION_RATE.get(machine.device.type, ATTENTION_RATE["cuda"])
        calls = -(-pieces // rows) * self._piece * len(source.layers) * STEP_SECONDS
        memory = source.weights.numel * machine.dtype.itemsize + rows * _row_bytes(source, machine, self._piece)
        return Sampling(compute + attention + calls, memory)

    def stand_in(self, count: int) -> torch.Tensor:
        """Random tokens in the place of windows that have not been sampled yet, int64 [count, length]."""
        drawn = torch.randint(len(self.form.plain), (count, self.length), generator=torch.Generator().manual_seed(0))
        return torch.tensor(self.form.plain)[drawn]

    def sample(self, count: int) -> torch.Tensor:
        """The first windows, int64 [count, length]; those that are missing are sampled, with a progress bar.

        Raises:
            InputError: the cache cannot be written.
            SampleError: the model cannot be loaded or generate, or does not fit into memory.
        """
        known = self.cached(count)
        if len(known) == count:
            return known
        rows = self._rows
        if not rows:
            raise SampleError(
                f"`dataset` self: {self._source.folder} does not fit into memory as a whole, which sampling needs; "
                "give a text"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be created ({error.strerror}); set XDG_CACHE_HOME to another folder"
            ) from None
        model = self._model()
        parts, total = [known], len(known)
        # Equal batches, so that the last one is not small.
        batches = -(-(count - total) // max(1, rows // self._pieces))
        steps = range(total, count, -(-(count - total) // batches))
        with tqdm(total=len(steps) * (self._piece - 1), unit="step", desc="sample") as bar:
            for first in steps:
                parts.append(self._generate(model, range(first, min(first + steps.step, count)), bar.update))
                self._keep(first, parts[-1])
        return torch.cat(parts)

    def _keep(self, first: int, ids: torch.Tensor) -> None:
        """Write windows into the cache; raises InputError if that fails."""
        path, tensors = self.folder / f"{first:06d}.safetensors", {"text:ids": ids.int()}
        write_cached(path, lambda own: save_sealed(own, self._label(first), tensors))

    def _generate(self, model: Any, windows: range, tick: Callable[[], Any]) -> torch.Tensor:
        pieces = range(windows.start * self._pieces, windows.stop * self._pieces)
        try:
            scripts = [self._script(piece) for piece in pieces]
            ids = generate(model, scripts, len(self._tokenizer), self._piece, TEMPERATURE, tick)
            return ids.view(len(windows), self.length)
        except InputError:
            raise
        except Exception as error:  # generation fails in many ways for models that transformers cannot generate with
            reason = reason_of(error)
            raise SampleError(
                f"`dataset` self: {self._source.folder} cannot generate text in transformers ({reason}); give a text"
            ) from None

    def _script(self, piece: int) -> Script:
        """The form of a piece; its draws depend on the seed and its number alone."""
        chance = random.Random(f"{self._seed} {piece}")
        return Chat(self.form, chance) if self.form.turns is not None and piece % 2 else FreeText(self.form, chance)

    def _model(self) -> Any:
        """The whole dense model on the machine's device; raises SampleError if transformers cannot load it."""
        source = self._source
        try:
            return source.whole(self._machine.device, self._machine.dtype)
        except Exception as error:  # damaged weights, lack of memory, and what else transformers meets
            raise SampleError(
                f"`dataset` self: transformers cannot load {source.folder} as a whole ({reason_of(error)})"
            ) from None


def sum_of(parts: Sequence[Sampling]) -> Sampling | None:
    """What it takes to sample one part after the other; None for nothing."""
    return Sampling(sum(p.seconds for p in parts), max(p.memory for p in parts)) if parts else None


def piece_length(length: int) -> int:
    """Tokens of the pieces of a window: the window's length divided by the least number that gives PIECE or less.

    A length without such a divisor above PIECE / 2, such as a prime, is one piece.
    """
    numbers = range(-(-length // PIECE), 2 * length // PIECE + 1)
    return next((length // number for number in numbers if length % number == 0), length)


def rows_in_memory(source: ModelSource, machine: Machine, length: int) -> int:
    """Pieces of `length` tokens that are sampled together; 0 if the model itself does not fit into memory."""
    if machine.free is None:
        return ROWS
    left = 0.8 * machine.free - source.weights.numel * machine.dtype.itemsize
    return max(0, min(ROWS, int(left // _row_bytes(source, machine, length))))


def _row_bytes(source: ModelSource, machine: Machine, length: int) -> int:
    """Bytes of a piece's KV cache and of its predictions."""
    return length * _cache_features(source) * machine.dtype.itemsize + 4 * source.vocabulary * 4


def _end_tokens(folder: Path) -> list[int]:
    """The end-of-text tokens of generation_config.json; empty without a usable one."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]


def _cache_features(source: ModelSource) -> int:
    """Elements of the KV cache per token."""
    config = source.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * len(source.layers) * (getattr(config, "num_key_value_heads", None) or heads) * width


def sampled_identity(source: ModelSource, machine: Machine, seed: int, parts: dict[str, Any]) -> str:
    """SHA-256 of a model, a machine's dtype, a seed, and the other parts that what is sampled depends on."""
    shared = {
        "weights": content_digest({info.file for info in source.weights.tensors.values()}),
        "config": source.config_json,
        "seed": seed,
        "dtype": str(machine.dtype),
    }
    return hashlib.sha256(json.dumps(shared | parts, sort_keys=True).encode()).hexdigest()


def write_cached(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file of the cache by a function of its path; raises InputError if that fails.

    Two processes may sample the same at the same time: each writes a file of its own name first.
    """
    own = path.with_suffix(f".{os.getpid()}")
    try:
        write(own)
        own.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            own.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written ({reason_of(error)}); make room, or set XDG_CACHE_HOME to another folder"
        ) from None


def cache_folder() -> Path:
    """The folder of this program in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgsvd-vllm"
