"""Looks up the locked packages in the database of known vulnerabilities with pip-audit.

    python packaging/audit.py FILE ...

FILEs are lock files with hashes. Exit status 0: every package was looked up, and none has a known vulnerability. 1: one
has, or was not looked up; where the database does not answer, one line says so.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A local version, such as torch's +cpu, is another build of a public one, under which the database lists it.
LOCAL_VERSION = re.compile(r"^([A-Za-z0-9._-]+==[^+\s]+)\+[A-Za-z0-9.]+", re.MULTILINE)


def verdict(report: dict[str, Any]) -> tuple[list[str], int]:
    """The lines to print and the exit status.

    Args:
        report: pip-audit's, in JSON.
    """
    packages = report["dependencies"]
    skipped = sorted(one["name"] for one in packages if "skip_reason" in one)
    if len(skipped) == len(packages):
        return [f"audit: the database of vulnerabilities does not answer: {len(packages)} packages not looked up"], 1
    lines = []
    for one in packages:
        for found in one.get("vulns", []):
            fixed = ", ".join(found["fix_versions"]) or "no version"
            lines.append(f"audit: {one['name']} {one['version']}: {found['id']}, fixed in {fixed}")
    if skipped:
        lines.append(f"audit: not looked up: {', '.join(skipped)}")
    return lines or [f"audit: {len(packages)} packages, no known vulnerability"], bool(lines)


def main(files: Sequence[str]) -> int:
    """Audit lock files; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner", "off"]
        for name in files:
            copy = Path(folder) / Path(name).with_suffix(".txt").name
            # Without hashes: that of a local version belongs to no public file, and nothing is installed here.
            text = LOCAL_VERSION.sub(r"\1", Path(name).read_text(encoding="utf-8"))
            copy.write_text("\n".join(re.findall(r"^[^\s#]+==[^\s;]+", text, re.MULTILINE)), encoding="utf-8")
            command += ["-r", str(copy)]
        done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        print(f"audit: the database of vulnerabilities does not answer ({reason[:200]})", file=sys.stderr)
        return 1
    lines, status = verdict(report)
    print("\n".join(lines), file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
