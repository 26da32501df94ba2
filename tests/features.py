"""Writes docs/vllm-features.md from the tests that are marked with a feature.

python tests/features.py        # runs the tests, some minutes
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "vllm-features.md"
HEAD = """# vLLM's features on a factored model

Written by `python tests/features.py` after a run of the listed tests on vLLM {version} (CPU). They start real engines
and servers, and compare their tokens with those of transformers or of the plain engine.

| feature | test | result |
|---|---|---|
"""
# Limits, and features that no test covers.
REMARKS = """
- Several nodes: `vllm serve DIR --load-format pgsvd --tensor-parallel-size 8 --pipeline-parallel-size 2
  --distributed-executor-backend ray`. Factored models need nothing else; this has not been run.
- Tensor parallelism: `pgsvd-vllm inspect DIR --tp N` shows the weights and the communication of each rank;
  PGSVD_COLLECTIVE_BYTES=0 minimizes memory. With LoRA, row-parallel layers all-reduce their outputs, as dense ones do.
  Run with two ranks; 4 and 8 ranks are simulated (`tests/serving/test_collectives.py`).
- Expert parallelism (`--enable-expert-parallel`): vLLM 0.32 on CPU ends with an error, for dense models too; not run
  elsewhere.
- A compressed draft model of its dense parent loses time: it is as deep as the parent (`benchmarks/draft.py`,
  [performance.md](performance.md)).
- Sleep mode: level 1 keeps all weights; after level 2, reload them (`reload_weights`). Neither has been run: both need
  a GPU.
- LoRA in vLLM 0.32 on CPU: in a mixed batch, a request without an adapter gets the adapter of the last slot. Set
  `--max-loras` to one more than the number of adapters.
- Pipeline parallelism in vLLM 0.32 on CPU does not start with `--enforce-eager`, for dense models either.
- MoE models: without `--include experts` the experts stay dense, and they are most of the model: of Mixtral-8x7B's
  46.7 billion parameters 1.3 billion are other projections, so that `--ratio 0.2` removes 0.6 % of it. On CPU, vLLM
  computes with the experts' factors (`benchmarks/experts_cpu.py`, [performance.md](performance.md)). On GPUs, with
  expert parallelism and with LoRA, their dense weights are reconstructed at load: the checkpoint is smaller on disk,
  memory and speed are those of the dense model. `reload_weights` refuses factored experts. DeepSeek's `kv_b_proj`
  also gets dense weights.
"""


class Features:
    """Collects the marked tests and their outcomes, as a pytest plugin.

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
    status = pytest.main(["-m", "feature", "-q", str(ROOT / "tests" / "e2e")], plugins=[features])
    if status == 0:
        text = HEAD.format(version=__version__) + "\n".join(features.rows()) + "\n" + REMARKS
        DOCUMENT.write_text(text, encoding="utf-8")
    return int(status)


def marked() -> dict[str, str]:
    """Node id -> feature of all marked tests, collected in a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import json, pytest; from tests.features import Features;"
        "found = Features();"
        "status = pytest.main(['--collect-only', '-qq', '-m', 'feature', 'tests/e2e'], plugins=[found]);"
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
