"""What `check_hypergradient` and `check_leave_out` found."""

import textwrap
from collections.abc import Sequence
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
        return _table(self.subject, self.verdict, self[1:])


class LeaveOutReport(NamedTuple):
    """What `check_leave_out` found; ``str(report)`` is a readable table.

    Attributes:
      subject: what was checked, in words.
      prediction: predicted effects of leaving examples out against real ones.
      noise: how much of the spread of real effects comes from random keys.
      metasmoothness: whether the hypergradient predicts an eighth of the change.
    """

    subject: str
    prediction: Finding
    noise: Finding
    metasmoothness: Finding

    @property
    def trusted(self) -> bool:
        """Whether the hypergradient predicts the effects."""
        return self.verdict == "trusted"

    @property
    def verdict(self) -> str:
        """``"trusted"``, ``"NOT TRUSTED"`` if the prediction fails, or ``"cannot tell"``."""
        verdicts = {"ok": "trusted", "failed": "NOT TRUSTED"}
        return verdicts.get(self.prediction.verdict, "cannot tell")

    def __str__(self) -> str:
        return _table(self.subject, self.verdict, self[1:])


def _table(subject: str, verdict: str, findings: Sequence[Any]) -> str:
    """A line for the subject, and a paragraph for every finding."""
    lines = [f"{subject}: {verdict}"]
    width = max(20, *(len(name) + 2 for name, *_ in findings))
    for name, found, _, meaning in findings:
        head = f"  {name:<{width}}{found:<13}"
        lines.append(textwrap.fill(head + meaning, 100, subsequent_indent=" " * len(head)))
    return "\n".join(lines)
