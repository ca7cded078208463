"""What `check_hypergradient` found."""

import textwrap
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """What one check found.

    Attributes:
      name: the name of the check.
      verdict: ``"ok"``, ``"warning"``, ``"failed"`` or ``"not checked"``.
      numbers: what was measured, by name.
      meaning: what it means and what to do about it, in words.
    """

    name: str
    verdict: str
    numbers: dict[str, Any]
    meaning: str


class Report(NamedTuple):
    """What `check_hypergradient` found; ``str(report)`` is a readable table.

    Attributes:
      subject: what was checked, in words.
      finite_differences: the hypergradient against differences of the objective.
      recovery: whether the runs played backwards arrived at their starts.
      chaos: how the norm of the hypergradient grows with the length of the run.
      metasmoothness: whether the hypergradient describes the objective over a whole meta-step.
      precision: numbers of low precision in the computation.
    """

    subject: str
    finite_differences: Finding
    recovery: Finding
    chaos: Finding
    metasmoothness: Finding
    precision: Finding

    @property
    def trusted(self) -> bool:
        """Whether finite differences confirm the hypergradient and no check failed."""
        return self.finite_differences.verdict == "ok" and all(f.verdict != "failed" for f in self[1:])

    def __str__(self) -> str:
        lines = [f"{self.subject}: {'trusted' if self.trusted else 'NOT TRUSTED'}"]
        for name, verdict, _, meaning in self[1:]:
            head = f"  {name:<20}{verdict:<13}"
            lines.append(textwrap.fill(head + meaning, 100, subsequent_indent=" " * len(head)))
        return "\n".join(lines)
