"""Options and entry of the command."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""


def run(args: argparse.Namespace) -> int:
    """Do it."""
    raise NotImplementedError
