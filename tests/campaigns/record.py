"""Appends a row to the table in README.md beside this file: a campaign's command and result."""

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def record(result: str, command: str = "") -> None:
    """Append date, machine, sources, command and result; print them too."""
    command = command or shlex.join(["python", *sys.argv])
    sources = [
        subprocess.run(
            ["git", "rev-parse", "--short=8", f"HEAD:{part}"],
            cwd=HERE,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for part in ("csrc", "src")
    ]
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} CPUs, {platform.system()}"
    date = time.strftime("%Y-%m-%d")
    row = f"| {date} | {machine} | {' '.join(sources)} | `{command}` | {result} |\n"
    with open(HERE / "README.md", "a", encoding="utf-8") as page:
        page.write(row)
    print(row, end="")


if __name__ == "__main__":  # record.py RESULT COMMAND, for scripts of the shell
    record(sys.argv[1], sys.argv[2])
