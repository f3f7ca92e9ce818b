"""The command line: ``python -m fusedopt train | bench | info``. One module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fusedopt.cli import bench, info, train

COMMANDS = {
    "train": train,
    "bench": bench,
    "info": info,
}  # each has add_arguments, run and a first docstring line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="fusedopt", description="Optimizer steps in place, in one pass, on the CPU."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
    options = parser.parse_args(argv)
    try:
        COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        print(f"\nfusedopt {options.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as exc:
        print(f"fusedopt {options.command}: {exc}", file=sys.stderr)
        return 2
    return 0
