"""Build the distribution, check what is in it, and type-check the wheel as a user gets it."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folder in the checkout -> folder in the wheel.
PACKAGES = {"pgsvd_vllm": "pgsvd_vllm", "offline": "pgsvd_vllm/offline", "kernels": "pgsvd_vllm/kernels"}


def wanted_files() -> set[str]:
    """Every product module of the checkout, by its place in the wheel."""
    return {
        f"{target}/{path.relative_to(ROOT / source)}"
        for source, target in PACKAGES.items()
        for path in (ROOT / source).rglob("*.py")
    }


def main() -> int:
    """Print one line a check; the status is 1 at the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            archive.extractall(Path(folder) / "unpacked")
        inside = {name for name in names if name.endswith(".py")}
        missing, foreign = wanted_files() - inside, inside - wanted_files()
        metadata = {name.rpartition("/")[2] for name in names if ".dist-info/" in name}
        missing |= {"entry_points.txt", "LICENSE"} - metadata
        missing |= {"pgsvd_vllm/py.typed"} - names
        if missing or foreign:
            print(f"wheel: missing {sorted(missing)}, should not be there {sorted(foreign)}")
            return 1
        print(f"wheel: {len(inside)} modules, entry points, licence")
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "pgsvd_vllm"]
        return subprocess.run(command, cwd=Path(folder) / "unpacked", check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
