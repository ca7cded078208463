"""Experiments that anyone can run again: ``python -m experiments.<name>``."""
