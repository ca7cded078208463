"""What a user can put right, in one line."""

import difflib
from collections.abc import Iterable


class RefusedError(ValueError):
    """The command cannot be carried out as it was given; the message says what to do."""


def meant(given: str, names: Iterable[str]) -> str:
    """The names that look like a wrong one, or else all names, as the end of a message.

    >>> meant("adamv", ["adam", "adamw", "sgd"])
    'did you mean adam or adamw?'
    >>> meant("x", ["adam", "sgd"])
    'there are: adam, sgd'
    """
    names = sorted(names)
    close = difflib.get_close_matches(given, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names)}"
