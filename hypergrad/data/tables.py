"""Tables in CSV files."""

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hypergrad.data.kinds import DataError, Table
from hypergrad.data.rows import SHARE, check_share, split
from hypergrad.data.sources import text_of


class _Cells(NamedTuple):
    """The cells of a table as text, with the names of the columns and the lines of the file."""

    names: list[str]
    lines: list[int]
    columns: list[list[str]]


def read_csv(
    path: str | os.PathLike[str],
    *,
    label: str | None = None,
    one_hot: Sequence[str] = (),
    delimiter: str | None = None,
    test_share: float = SHARE,
) -> Table:
    """Read a CSV file: a line of names, then a row of numbers and a class for every example.

    Classes are whole numbers or any text, and are numbered in their order.  All other cells are numbers,
    but for the columns in `one_hot`.  Blank lines and spaces around cells are passed over.

    Args:
      path: a file in UTF-8.
      label: the name of the column of classes; None takes the last one.
      one_hot: names of columns that hold kinds and not amounts, as text or numbers: each becomes a column
        of zeros and ones for every kind, in alphabetical order.
      delimiter: what separates cells; None takes a tab if the file's name ends in ``.tsv``, and otherwise a
        comma.
      test_share: the share of every class that is kept for testing, between 0 and 1.  The same file is
        split in the same way everywhere.

    Returns:
      A `Table` in float32, named like the file.

    Raises:
      DataError: the file is missing, is not UTF-8, or has no header; a row has too many or too few cells; a
        cell is missing, is no number or no finite one in float32; there is only one class, or a class of
        only one row.
      ValueError: a column that is asked for is not there, or an argument is out of range.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fruit.csv"
    >>> rows = ["grams,color,kind", "150,red,apple", "120,green,apple", "9,red,cherry", "8,red,cherry"]
    >>> _ = path.write_text("\\n".join(rows))
    >>> fruit = read_csv(path, one_hot=["color"])
    >>> fruit.feature_names, fruit.class_names
    (('grams', 'color=green', 'color=red'), ('apple', 'cherry'))
    >>> fruit.train_inputs, fruit.train_labels
    (array([[  9.,   0.,   1.],
           [150.,   0.,   1.]], dtype=float32), array([1, 0], dtype=int32))
    """
    call = (
        f"read_csv({str(path)!r}, label={label!r}, one_hot={one_hot!r}, delimiter={delimiter!r}, "
        f"test_share={test_share!r})"
    )
    check_share(call, test_share)
    if delimiter is None:
        delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    cells = _cells(call, text_of(call, path), delimiter)
    target = _target(call, cells, label, one_hot)
    labels, classes = _labels(call, cells, target)
    features: list[tuple[str, np.ndarray]] = []
    for k, name in enumerate(cells.names):
        if name in one_hot:
            kinds, codes = np.unique(_texts(call, cells, k), return_inverse=True)
            features += [(f"{name}={kind}", codes == j) for j, kind in enumerate(kinds)]
        elif k != target:
            features.append((name, _numbers(call, cells, k)))
    names, columns = zip(*features)
    inputs = np.stack(columns, axis=1).astype(np.float32)
    train, test = split(call, labels, classes, test_share)
    parts = (inputs[train], labels[train], inputs[test], labels[test])
    return Table(*parts, Path(path).stem, len(classes), classes, names)


def _cells(call: str, text: str, delimiter: str) -> _Cells:
    """The cells of a file, if it has a header and all rows are of its length."""
    if len(delimiter) != 1 or delimiter in '"\n\r':
        raise ValueError(
            f"{call}: delimiter is one character, such as ',' or ';', and neither a quote nor a new line"
        )
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise DataError(
            f"{call}: line {reader.line_num}: {error}. Put the quotes of that line right."
        ) from error
    if len(rows) < 2:
        raise DataError(
            f"{call}: the file has {len(rows)} lines with cells. Pass one with a header and rows."
        )
    (_, names), *rows = rows
    _check_header(call, names)
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                f"{call}: line {line} has {len(row)} cells, but the header has {len(names)}. Complete the "
                "row, or remove it."
            )
    return _Cells(
        names, [line for line, _ in rows], [list(column) for column in zip(*(row for _, row in rows))]
    )


def _check_header(call: str, names: list[str]) -> None:
    if len(names) < 2:
        raise DataError(
            f"{call}: the header has one column, {names[0]!r}, but a column of classes and one or more of "
            "numbers are needed. If something other than a comma separates cells, pass it as delimiter."
        )
    if "" in names:
        raise DataError(
            f"{call}: column {names.index('') + 1} has no name; it may be the index that a program wrote. "
            "Name it, or remove it."
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{call}: two columns are called {twice[0]!r}. Rename one.")
    if numbers := [name for name in names if math.isfinite(_number(name))]:
        raise DataError(
            f"{call}: the first line has the number {numbers[0]} in it, but it must be the header. Add a "
            "line with the names of the columns."
        )


def _target(call: str, cells: _Cells, label: str | None, one_hot: Sequence[str]) -> int:
    """The place of the column of classes."""
    if isinstance(one_hot, str):
        raise ValueError(f"{call}: one_hot is a list of names. Pass [{one_hot!r}]")
    wanted = [*one_hot] if label is None else [label, *one_hot]
    if unknown := [name for name in wanted if name not in cells.names]:
        raise ValueError(f"{call}: there is no column {unknown[0]!r}. Choose from {', '.join(cells.names)}")
    target = cells.names.index(cells.names[-1] if label is None else label)
    if cells.names[target] in one_hot:
        raise ValueError(f"{call}: {cells.names[target]!r} holds the classes. Leave it out of one_hot")
    return target


def _number(cell: str) -> float:
    """The number in a cell; NaN if there is none."""
    try:
        return math.nan if "_" in cell else float(cell)  # Python would read 2020_01 as 202001
    except ValueError:
        return math.nan


def _numbers(call: str, cells: _Cells, k: int) -> np.ndarray:
    """A column of numbers."""
    numbers = np.array([_number(cell) for cell in cells.columns[k]])
    with np.errstate(over="ignore"):
        finite = np.isfinite(numbers.astype(np.float32))
    if not finite.all():
        row = int(finite.argmin())
        cell = cells.columns[k][row]
        why = f"is {cell!r}, not a finite number in float32" if cell else "is missing"
        raise DataError(
            f"{call}: line {cells.lines[row]}, column {cells.names[k]!r} {why}. Fill the cell in or "
            "remove the row; if the column holds kinds and not amounts, put it into one_hot."
        )
    return numbers


def _texts(call: str, cells: _Cells, k: int) -> list[str]:
    """A column of any text."""
    if "" in cells.columns[k]:
        line = cells.lines[cells.columns[k].index("")]
        raise DataError(
            f"{call}: line {line}, column {cells.names[k]!r} is missing. Fill the cell in or remove the "
            "row."
        )
    return cells.columns[k]


def _labels(call: str, cells: _Cells, k: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of all rows, and the names of the classes."""
    texts = _texts(call, cells, k)
    numbers = [_number(text) for text in texts]
    if all(map(math.isnan, numbers)):
        names, labels = np.unique(texts, return_inverse=True)
    elif any(map(math.isnan, numbers)):
        odd = texts[[*map(math.isnan, numbers)].index(True)]
        raise DataError(
            f"{call}: column {cells.names[k]!r} holds numbers and also {odd!r}, but classes are either "
            "all numbers or all text. Remove the rows of that, or rename the classes."
        )
    else:
        if broken := [text for text, number in zip(texts, numbers) if not number.is_integer()]:
            raise DataError(
                f"{call}: column {cells.names[k]!r} holds the number {broken[0]}, which is no class: "
                "classes are whole numbers or text. Pass the name of the column of classes as label."
            )
        whole, labels = np.unique(np.array([int(number) for number in numbers]), return_inverse=True)
        names = whole.astype(str)
    return labels.astype(np.int32), tuple(names.tolist())
