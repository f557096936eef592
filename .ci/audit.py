"""Looks up the known vulnerabilities of what is pinned in constraints.txt; ends with 1 where there is one.

What cannot be looked up (no network, a package that the index does not know) is said and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
TIMEOUT_S = 60
ARGUMENTS = ("--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json", f"--requirement={CONSTRAINTS}")


def main() -> int:
    """Print what was found; gives the exit status."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *ARGUMENTS], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        dependencies = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("audit: skipped, because the list of known vulnerabilities cannot be reached")
        return 0
    found = list(faults(dependencies))
    skipped = sum("skip_reason" in dependency for dependency in dependencies)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"audit: {len(dependencies) - skipped} packages looked up, {skipped} unknown, {len(found)} vulnerabilities")
    return 1 if found else 0


def faults(dependencies: list[dict[str, Any]]) -> list[str]:
    """A line for each vulnerability, with the version that has none."""
    return [
        f"{dependency['name']} {dependency['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions'])}"
        for dependency in dependencies
        for fault in dependency.get("vulns", ())
    ]


if __name__ == "__main__":
    sys.exit(main())
