"""The command line: learned schedules, tuned optimizers, distilled sets, each in a folder of its own."""

from hypergrad.cli.entry import main

__all__ = ["main"]
