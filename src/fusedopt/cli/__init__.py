"""The command line: ``python -m fusedopt train | bench | memory | info``, a module for each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import fusedopt
from fusedopt.cli import bench, info, memory, train

# each has a first docstring line, add_arguments, and prepare, which checks all that can be checked
# beforehand and returns the function that does the work
COMMANDS = {
    "train": train,
    "bench": bench,
    "memory": memory,
    "info": info,
}
FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141  # 128 + SIGINT, 128 + SIGPIPE


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        own = action.default is None or action.default is False or "(default" in (action.help or "")
        return action.help if own else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    0: done; 1: it failed half-way; 2: bad input, and nothing was done; 130: interrupted by Ctrl-C;
    141: the reader of its output is gone.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a file opened later would get its number
            setattr(sys, name, open(os.devnull, mode))
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where a failure can still be reported
    except BrokenPipeError:
        _discard()
        return UNREAD
    except OSError as exc:
        return _complain("fusedopt", exc, FAILED)


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="fusedopt", description="Optimizer steps in place, in one pass, on the CPU."
    )
    parser.add_argument("--version", action="version", version=f"fusedopt {fusedopt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=_Help,
        )
        module.add_arguments(command)
    options = parser.parse_args(argv)
    name = f"fusedopt {options.command}"
    try:
        try:
            work = COMMANDS[options.command].prepare(options)
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as exc:
            return _complain(name, exc, BAD_INPUT)
        work()
    except KeyboardInterrupt:
        return _complain(f"\n{name}", "interrupted", INTERRUPTED)
    except MemoryError:
        return _complain(name, "out of memory", FAILED)
    except BrokenPipeError:
        raise
    except OSError as exc:
        return _complain(name, exc, FAILED)
    return 0


def _complain(who: str, what: object, status: int) -> int:
    """Print an error on one line; return the status."""
    try:
        print(f"{who}: {' '.join(str(what).split())}", file=sys.stderr, flush=True)
    except OSError:
        _discard()
    return status


def _discard() -> None:
    """Discard what the streams still hold, or Python would report it as an error at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
