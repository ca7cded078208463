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
        return self.verdict == "trusted"

    @property
    def verdict(self) -> str:
        """``"trusted"``, ``"NOT TRUSTED"`` if a check failed, or ``"cannot tell"`` if none says either."""
        if any(finding.verdict == "failed" for finding in self[1:]):
            return "NOT TRUSTED"
        return "trusted" if self.finite_differences.verdict == "ok" else "cannot tell"

    def __str__(self) -> str:
        lines = [f"{self.subject}: {self.verdict}"]
        for name, verdict, _, meaning in self[1:]:
            head = f"  {name:<20}{verdict:<13}"
            lines.append(textwrap.fill(head + meaning, 100, subsequent_indent=" " * len(head)))
        return "\n".join(lines)
