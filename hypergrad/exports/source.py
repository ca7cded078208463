"""Python source text with a function of the count for every schedule."""

import json
import textwrap
from typing import NamedTuple

from hypergrad.exports.series import Series

WIDTH = 100


class Dialect(NamedTuple):
    """How schedules are written.

    Attributes:
      module: the name of the module that has ``interp``, ``where`` and ``cos``.
      listed: template of the expression that takes the value of a count out of a list.
      computed: template of the expression that returns a formula.
    """

    module: str
    listed: str
    computed: str


class Source:
    """Definitions of schedules, each of them once.

    Args:
      dialect: in which they are written.
    """

    def __init__(self, dialect: Dialect):
        self.dialect = dialect
        self.definitions: list[str] = []
        self.names: dict[tuple[str, object], str] = {}
        self.uses_module = False

    def value(self, name: str, series: Series) -> str:
        """An expression: the number itself, or the name of a function that is defined before."""
        if series.constant:
            return repr(float(series.values))
        key = name, series.key
        if key not in self.names:
            taken = sum(other == name for other, _ in self.names)
            self.names[key] = f"{name}_{taken}" if taken else name
            self.definitions.append(self._defined(self.names[key], series))
        return self.names[key]

    def _defined(self, name: str, series: Series) -> str:
        if series.formula is not None:
            self.uses_module = True
            formula = self.dialect.computed.format(series.formula.replace("xp.", f"{self.dialect.module}."))
            return f"def {name}(count):\n    return {formula}"
        taken = self.dialect.listed.format(values=f"{name}_values", last=len(series.values) - 1)
        return f"{listed(f'{name}_values', series.plain())}\n\n\ndef {name}(count):\n    return {taken}"


def listed(name: str, values: object) -> str:
    """``name = [...]``, over several lines if it is long.

    >>> listed("x", [1.0, 2.0])
    'x = [1.0, 2.0]'
    """
    line = f"{name} = {values}"
    if len(line) <= WIDTH:
        return line
    body = textwrap.fill(str(values)[1:-1], WIDTH, initial_indent="    ", subsequent_indent="    ")
    return f"{name} = [\n{body}\n]"


def quoted(text: str) -> str:
    """Text as a string in source.

    >>> quoted("first.weights")
    '"first.weights"'
    """
    return json.dumps(text)
