"""Print version, instruction sets, threads and why, formats and machine."""

from __future__ import annotations

import argparse

import fusedopt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no options."""


def run(options: argparse.Namespace) -> None:
    """Print `fusedopt.info`, a line for each entry."""
    for label, text in fusedopt.info().items():
        print(f"{label:10} {text}")
