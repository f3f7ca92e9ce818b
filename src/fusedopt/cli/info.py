"""Print version, instruction sets, threads and why, formats and machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import fusedopt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no options."""


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Return the function that prints `fusedopt.info`, one line for each entry."""
    lines = [f"{label:10} {text}" for label, text in fusedopt.info().items()]
    return lambda: print("\n".join(lines))
