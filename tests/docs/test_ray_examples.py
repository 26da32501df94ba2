"""packaging/ray: the examples for SLURM and KubeRay pass linters, and their commands are commands of this version."""

import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from pgsvd_vllm.cli import build_parser
from tests.conftest import ROOT

EXAMPLES = ROOT / "packaging" / "ray"
TOOLS = Path(sys.executable).parent


def test_the_slurm_script_passes_shellcheck() -> None:
    command = [str(TOOLS / "shellcheck"), "--severity=style", str(EXAMPLES / "slurm.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_slurm_script_runs_this_command() -> None:
    last = (EXAMPLES / "slurm.sh").read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith('on "$first" pgsvd-vllm compress "$@" ')
    given = [*shlex.split("MODEL -o DIR --ratio 0.2"), *shlex.split(last)[5:]]
    found = build_parser().parse_args(["compress", *given])
    assert (found.executor, found.address) == ("ray", "$address")


def test_the_kuberay_job_passes_yamllint() -> None:
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    command = [str(TOOLS / "yamllint"), "--strict", "-d", rules, str(EXAMPLES / "kuberay.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kuberay_job_runs_this_command_on_equal_pods() -> None:
    job = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, command, *given = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("pgsvd-vllm", "compress")
    found = build_parser().parse_args(["compress", *given])
    assert (found.executor, found.address) == ("ray", "auto")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["template"] == cluster["headGroupSpec"]["template"]
    (container,) = workers["template"]["spec"]["containers"]
    mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    assert all(any(folder in Path(path).parents for folder in mounted) for path in (found.model, found.output_dir))
