"""Writes docs/vllm-features.md from the tests that are marked as showing a feature.

python tests/features.py        # runs them, some minutes
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "vllm-features.md"
HEAD = """# vLLM's features on a factored model

Written by `python tests/features.py` from a run of the tests it names, on vLLM {version} (CPU): real engines
and servers, whose tokens are compared with transformers' or the plain engine's.

| feature | test | |
|---|---|---|
"""
# What no test shows.
REMARKS = """
- Several nodes: vLLM's own (`vllm serve DIR --load-format pgsvd --tensor-parallel-size 8 --pipeline-parallel-size 2
  --distributed-executor-backend ray`). Nothing of a factored model is in its way, and nothing of it was run.
- Tensor parallelism: `pgsvd-vllm inspect DIR --tp N` shows what each rank holds and sends, PGSVD_COLLECTIVE_BYTES=0
  gives the least memory. With LoRA row-parallel layers sum their outputs, as dense ones do. Not run on more than two
  workers; 4 and 8 ranks are simulated (`tests/serving/test_ranks.py`).
- Expert parallelism (`--enable-expert-parallel`): vLLM 0.32 on CPU ends with an error, dense models too; not run
  elsewhere.
- A draft of its dense parent loses time: it is as deep as the parent (`benchmarks/draft.py`, performance.md).
- Sleep: level 1 keeps all weights; after level 2 load them again (`reload_weights`). Neither was run: they need a GPU.
- LoRA in vLLM 0.32 on CPU: a request without an adapter, in a batch with others, gets the adapter of the last
  slot. Give `--max-loras` one more than there are.
- Pipeline stages in vLLM 0.32 on CPU: not with `--enforce-eager`, dense models neither.
- Mixtures: without `--include experts` these stay dense, and are most of such a model: of Mixtral-8x7B's 46.7 billion
  parameters 1.3 are other projections, so that `--ratio 0.2` removes 0.6 % of it. Factored experts are computed from
  their factors on CPU (`benchmarks/experts_cpu.py`, performance.md); on GPUs, with expert parallelism and with LoRA
  they are multiplied back as they are loaded: smaller on disk, as large and as fast as dense in memory. Factored
  experts are loaded once: `reload_weights` is an error that says so. vLLM multiplies DeepSeek's `kv_b_proj` back.
"""


class Features:
    """Collects what marked tests show, as a plugin of pytest.

    Attributes:
        tests: node id -> feature.
        outcomes: node id -> passed, failed or skipped.
    """

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("feature"):
                self.tests[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def rows(self) -> list[str]:
        """The document's table."""
        return [
            f"| {feature} | `{name.partition('/')[2]}` | {self.outcomes.get(name, 'not run')} |"
            for name, feature in sorted(self.tests.items(), key=lambda row: row[1].lower())
        ]


def main() -> int:
    """Run the marked tests, and write the document if they pass."""
    from vllm import __version__

    features = Features()
    status = pytest.main(["-m", "feature", "-q", str(ROOT / "tests")], plugins=[features])
    if status == 0:
        text = HEAD.format(version=__version__) + "\n".join(features.rows()) + "\n" + REMARKS
        DOCUMENT.write_text(text, encoding="utf-8")
    return int(status)


def marked() -> dict[str, str]:
    """Node id -> feature of all marked tests, collected in a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import json, pytest; from tests.features import Features;"
        "found = Features();"
        "status = pytest.main(['--collect-only', '-qq', '-m', 'feature', 'tests'], plugins=[found]);"
        "print(); print(json.dumps(found.tests)); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
