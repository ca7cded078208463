"""Text as integers, one for each character, and windows of it for predicting the next one."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hypergrad._base.checks import is_whole
from hypergrad.data.kinds import DataError
from hypergrad.data.rows import check_share
from hypergrad.data.sources import text_of


class Text(NamedTuple):
    """A text as integers, split into a beginning to train on and an end to test on.

    Attributes:
      train: ``(n,)`` int32 in [0, len(vocabulary)).
      test: as `train`, for the end of the text.
      vocabulary: all characters of the text, each once and in the order of Unicode; character ``k`` has the
        integer ``k``.
      name: the text's name, such as "shakespeare".
    """

    train: np.ndarray
    test: np.ndarray
    vocabulary: str
    name: str

    def encode(self, text: str) -> np.ndarray:
        """The integers of a text.

        Args:
          text: characters of the vocabulary.

        Returns:
          ``(len(text),)`` int32.

        Raises:
          ValueError: a character is not in the vocabulary.
        """
        code = {character: k for k, character in enumerate(self.vocabulary)}
        unknown = sorted(set(text) - set(code))
        if unknown:
            raise ValueError(
                f"Text.encode(text): {unknown[0]!r} is not among the {len(code)} characters of "
                f"{self.name}. Leave it out, or read a text that has it"
            )
        return np.fromiter((code[character] for character in text), np.int32, len(text))

    def decode(self, codes: np.ndarray) -> str:
        """The text of integers.

        Args:
          codes: ``(n,)`` integers in [0, len(vocabulary)).

        Raises:
          ValueError: there is another number among them.
        """
        known, codes = len(self.vocabulary), np.asarray(codes)
        whole = np.issubdtype(codes.dtype, np.integer) and codes.ndim == 1
        if codes.size and not (whole and codes.min() >= 0 and codes.max() < known):
            raise ValueError(
                f"Text.decode(codes) with codes of shape {codes.shape} and {codes.dtype}: pass a row of "
                f"integers from 0 to {known - 1}, which stand for the {known} characters of {self.name}"
            )
        return "".join(self.vocabulary[k] for k in codes)


def read_text(path: str | os.PathLike[str], *, test_share: float = 0.1) -> Text:
    r"""Read a text file, one integer for each character.

    Args:
      path: a file in UTF-8.  A byte order mark is dropped, and every line ends with ``\n`` alone.
      test_share: the share of the characters, at the end, that is kept for testing, between 0 and 1.

    Returns:
      A `Text`, named like the file.  Its vocabulary is that of both parts.

    Raises:
      DataError: the file is missing, is not UTF-8, has fewer than two characters in a part, or holds only
        one character again and again.
      ValueError: the share is not between 0 and 1.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "banana.txt"
    >>> _ = path.write_text("banana banana")
    >>> text = read_text(path, test_share=0.4)
    >>> text.vocabulary, text.train, text.decode(text.test)
    (' abn', array([2, 1, 3, 1, 3, 1, 0, 2], dtype=int32), 'anana')
    """
    call = f"read_text({str(path)!r}, test_share={test_share!r})"
    check_share(call, test_share)
    text = text_of(call, path)
    made = Text(np.empty(0, np.int32), np.empty(0, np.int32), "".join(sorted(set(text))), Path(path).stem)
    cut = len(text) - round(test_share * len(text))
    if min(cut, len(text) - cut) < 2:
        raise DataError(
            f"{call}: the text has {len(text)} characters, {cut} of them to train on and {len(text) - cut} "
            "to test on, but both parts need two or more. Pass a longer text, or another test_share."
        )
    if len(made.vocabulary) < 2:
        raise DataError(
            f"{call}: the text is one character, {made.vocabulary!r}, again and again: there is nothing to "
            "predict. Pass another text."
        )
    codes = made.encode(text)
    return made._replace(train=codes[:cut], test=codes[cut:])


def windows(codes: np.ndarray, length: int, stride: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of a text, and for each of their characters the next one, which is to be predicted.

    Window ``i`` begins at ``i * stride``.  What is left at the end, too short for a window, is not used.
    Rows of both arrays, as `minibatches` draws them for ``len(inputs)`` examples, are a minibatch.

    Args:
      codes: ``(n,)`` integers, such as ``text.train``.
      length: the number of characters in a window, from 1 to ``n - 1``.
      stride: from one window's beginning to the next one's, 1 or more; None takes ``length``, so that every
        character is predicted once.

    Returns:
      ``inputs`` and ``targets``, both ``(windows, length)``, with ``targets[:, :-1] == inputs[:, 1:]``.

    Raises:
      ValueError: a size is out of range, or the codes are not a row of integers.

    >>> windows(np.array([7, 8, 9, 10, 11, 12]), length=2)
    (array([[ 7,  8],
           [ 9, 10]]), array([[ 8,  9],
           [10, 11]]))
    """
    codes = np.asarray(codes)
    call = (
        f"windows(codes, length={length!r}, stride={stride!r}) with codes {codes.dtype}{list(codes.shape)}"
    )
    if codes.ndim != 1 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"{call}: codes must be a row of integers, such as the train part of a Text")
    if not is_whole(length) or length >= len(codes):
        raise ValueError(
            f"{call}: a window has a length of at least 1, and one more character follows it. Pass a whole "
            f"number from 1 to {len(codes) - 1}"
        )
    if stride is not None and not is_whole(stride):
        raise ValueError(f"{call}: stride must be a whole number of at least 1, or None")
    pieces = np.lib.stride_tricks.sliding_window_view(codes, length + 1)[:: stride or length]
    return pieces[:, :-1].copy(), pieces[:, 1:].copy()
