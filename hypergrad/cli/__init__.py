"""The command line: learned schedules, tuned optimizers and distilled sets, each run in a folder of its own."""

from hypergrad.cli.entry import main

__all__ = ["main"]
