"""Free memory within a container's limits, from files of proc and sys; the memory of an untied LM head and of texts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pgsvd_vllm.offline.model.free_memory import free_memory
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning import memory as memory_module
from pgsvd_vllm.offline.planning.memory import memory_bytes, stage_bytes
from pgsvd_vllm.offline.planning.plan import make_plan
from tests.conftest import save_tiny_model

CPU = torch.device("cpu")
GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n"}
VERSION_2 = {
    **MEMINFO,
    "proc/self/cgroup": "0::/pod/container\n",
    "sys/fs/cgroup/pod/container/memory.max": "max\n",
    "sys/fs/cgroup/pod/container/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/pod/container/memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
    "sys/fs/cgroup/pod/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/pod/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/pod/memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
}
NAMESPACE = {
    **MEMINFO,
    "proc/self/cgroup": "0::/../../elsewhere\n",
    "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory.current": f"{GIB}\n",
    "sys/fs/cgroup/memory.stat": "anon 0\n",
}
VERSION_1 = {
    **MEMINFO,
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
    "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": f"{6 * GIB}\n",
    "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/docker/x/memory.stat": f"total_inactive_file {GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, None, id="nothing known"),
        pytest.param(MEMINFO, 48 * GIB, id="no container"),
        pytest.param(VERSION_2, 6 * GIB, id="limit of an outer group, version 2"),
        pytest.param(NAMESPACE, 3 * GIB, id="a group that is the mount itself"),
        pytest.param(VERSION_1, 3 * GIB, id="version 1"),
        pytest.param(
            {**VERSION_2, "sys/fs/cgroup/pod/memory.current": f"{10 * GIB}\n"}, 0, id="more used than allowed"
        ),
        pytest.param({**VERSION_2, "sys/fs/cgroup/pod/memory.max": "max\n"}, 48 * GIB, id="no limit"),
    ],
)
def test_free_memory_is_what_the_container_allows(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    assert free_memory(CPU, write(tmp_path, files)) == expected


def test_this_machine_says_what_is_free() -> None:
    found = free_memory(CPU)
    assert found is not None
    assert found > 2**20


def test_an_untied_lm_head_is_counted(tmp_path: Path) -> None:
    small: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "refine": 0}
    needed = {}
    for tie in (True, False):
        model = save_tiny_model(tmp_path / f"tied-{tie}", tie=tie)
        needed[tie] = stage_bytes(make_plan(CompressOptions(str(model), tmp_path / "out", **small)))["gradients"]
    assert needed[False] - needed[True] == 258 * 128 * 4


def test_memory_counts_the_text_that_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    options = CompressOptions(
        str(tiny_model), tmp_path / "out", dataset=(str(text),), num_calibration_samples=8, max_seq_length=64, refine=0
    )

    def needed(lines: int) -> int:
        text.write_text("".join(f"{i} towns lie on the {i * 7919 % 1000}th river.\n" for i in range(lines)))
        return memory_bytes(make_plan(options))

    small = needed(1000)
    tokens = text.stat().st_size  # one a byte
    assert needed(4000) - small == pytest.approx(4 * (text.stat().st_size - tokens), abs=64 * 4)


def test_memory_counts_the_windows_of_a_step(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 64 tokens are distilled on sixteen at a time."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} towns lie on the {i * 7919 % 1000}th river.\n" for i in range(1000)))
    options = CompressOptions(str(tiny_model), tmp_path / "out", dataset=(str(text),), max_seq_length=64)
    plan = make_plan(options)
    assert plan.settings.dose is not None
    together = stage_bytes(plan)["distillation"]
    monkeypatch.setattr(memory_module, "STEP_TOKENS", 1)
    # Activations of both models' layers; logits of at most 128 tokens are in memory.
    features = max(sum(p.in_features + p.out_features for p in row) for row in plan.projections.layers)
    layers, vocabulary = len(plan.projections.layers), plan.source.vocabulary
    apart = stage_bytes(plan)["distillation"]
    assert together - apart == (1024 - 64) * 2 * layers * features * 4 + (128 - 64) * 6 * vocabulary * 4
