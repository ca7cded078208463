"""Readers of a user's own files, their standardization, and the messages when a file is wrong."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypergrad import data, files
from hypergrad.data.rows import fixed_order


def refused(words: str, function: Callable[..., Any], path: Any, /, **options: Any) -> None:
    """The call is refused in these words (a regular expression), after the call itself."""
    with pytest.raises(ValueError, match=words) as caught:
        function(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{function.__name__}({str(path)!r}")
    assert all(f"{name}={value!r}" in message for name, value in options.items())


# ---- the order of rows, and the split


def test_fixed_order_is_that_of_numpys_raw_bits() -> None:
    raw = np.random.PCG64(0).random_raw(50).tolist()
    assert fixed_order(50).tolist() == sorted(range(50), key=lambda k: raw[k])


def test_every_class_is_split_by_its_share(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [2, 10, 50])
    np.savez(tmp_path / "a.npz", x=np.arange(62.0)[:, None], y=labels)
    first, again = (data.read_npz(tmp_path / "a.npz") for _ in range(2))
    assert np.bincount(first.test_labels).tolist() == [1, 2, 10]
    assert np.bincount(first.train_labels).tolist() == [1, 8, 40]
    rows = [part[:, 0].astype(int) for part in (first.train_inputs, first.test_inputs)]
    assert sorted(np.concatenate(rows)) == list(range(62))
    for part, part_labels in zip(rows, (first.train_labels, first.test_labels)):
        assert part_labels.tolist() == labels[part].tolist()
        order = fixed_order(62).tolist()
        assert part.tolist() == sorted(part.tolist(), key=order.index)
    np.testing.assert_array_equal(first.train_inputs, again.train_inputs)


@pytest.mark.parametrize("share", [0.0, 1.0, 1, -0.1, "half", np.nan])
@pytest.mark.parametrize("function", [data.read_text, data.read_csv, data.read_npz, data.read_images])
def test_error_share(tmp_path: Path, function: Callable[..., Any], share: Any) -> None:
    refused(r"test_share is the share .*between 0 and 1", function, tmp_path, test_share=share)


@pytest.mark.parametrize("function", [data.read_text, data.read_csv, data.read_npz])
def test_error_missing_file(tmp_path: Path, function: Callable[..., Any]) -> None:
    refused(r"cannot read the file \(No such file or directory\). Check", function, tmp_path / "absent")
    refused(r"cannot read the file \(Is a directory\). Check", function, tmp_path)


@pytest.mark.parametrize("function", [data.read_text, data.read_csv])
def test_error_not_utf_8(tmp_path: Path, function: Callable[..., Any]) -> None:
    path = tmp_path / "latin"
    path.write_bytes("caf\xe9,a".encode("latin-1"))
    refused(r"not a text in UTF-8: byte 3 is 0xe9 \(.*\). Save the file as UTF-8", function, path)


# ---- text


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_bytes("\ufeffÄpfel\r\nund\rBirnen\n".encode())
    text = data.read_text(path, test_share=0.25)
    content = "Äpfel\nund\nBirnen\n"
    assert (text.name, text.vocabulary) == ("poem", "".join(sorted(set(content))))
    assert text.train.dtype == text.test.dtype == np.int32
    assert text.decode(text.train) + text.decode(text.test) == content
    assert len(text.test) == round(0.25 * len(content))
    assert text.encode("und").tolist() == [text.vocabulary.index(x) for x in "und"]
    assert text.encode("").shape == (0,) and text.decode(text.encode("")) == ""


def test_error_text_encode_decode(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabcabcabcabcabc")
    text = data.read_text(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"Text.encode\(text\): 'x' is not among the 3 characters of a"):
        text.encode("abx")
    for codes in ([0, 3], [-1], [0.5], [[1]]):
        with pytest.raises(ValueError, match=r"Text.decode\(codes\) with .* integers from 0 to 2"):
            text.decode(np.array(codes))


def test_error_text_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij")
    refused("has 10 characters, 9 of them to train on and 1 to test on", data.read_text, path)
    path.write_text("")
    refused("has 0 characters", data.read_text, path)
    path.write_text("a" * 100)
    refused("one character, 'a', again and again", data.read_text, path)


@pytest.mark.parametrize(("length", "stride"), [(3, None), (3, 1), (2, 5), (10, None)])
def test_windows(length: int, stride: int | None) -> None:
    codes = np.arange(20, 31, dtype=np.int32)
    inputs, targets = data.windows(codes, length, stride)
    starts = [k for k in range(0, 11, stride or length) if k + length < 11]
    assert inputs.tolist() == [codes[k : k + length].tolist() for k in starts]
    assert targets.tolist() == [codes[k + 1 : k + length + 1].tolist() for k in starts]
    assert inputs.dtype == targets.dtype == np.int32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.arange(5), 5), r"windows\(codes, length=5, stride=None\) .*a whole number from 1 to 4"),
        ((np.arange(5), 0), "a whole number from 1 to 4"),
        ((np.arange(5), 2.0), "a whole number from 1 to 4"),
        ((np.arange(5), 2, 0), "stride=0.* stride must be a whole number of at least 1"),
        ((np.zeros((5, 2), int), 2), r"codes int64\[5, 2\]: codes must be a row of integers"),
        ((np.zeros(5), 2), r"codes float64\[5\]: codes must be a row of integers"),
    ],
)
def test_error_windows(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data.windows(*arguments)


# ---- tables


def write_rows(path: Path, rows: list[list[Any]], **how: Any) -> Path:
    with path.open("w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        csv.writer(file, **how).writerows(rows)
    return path


ROWS = [
    ["age", "city", "income"],
    [30, "Bern", 1.5],
    [40, "Ulm", -2e3],
    [50, 'Bad "Ems"', 0.25],
    [60, "Ulm", 4],
    [70, "Bern", 5],
    [80, "Bad\nEms", 6],
]
GOOD = [["a", "b"], [1, "x"], [2, "x"], [3, "y"], [4, "y"]]


def whole(table: data.Table) -> tuple[np.ndarray, list[int]]:
    """All rows, by the first column."""
    inputs = np.concatenate([table.train_inputs, table.test_inputs])
    labels = np.concatenate([table.train_labels, table.test_labels])
    order = inputs[:, 0].argsort()
    return inputs[order], labels[order].tolist()


@pytest.mark.parametrize("how", ["comma", "tab", "semicolon", "bom"])
def test_csv(tmp_path: Path, how: str) -> None:
    path = tmp_path / ("people.tsv" if how == "tab" else "people.csv")
    delimiter = {"tab": "\t", "semicolon": ";"}.get(how, ",")
    rows = [[*row[:1], len(str(row[1])), *row[2:]] if k else row for k, row in enumerate(ROWS)]
    rows = [[*row, "kind" if k == 0 else "old" if k > 3 else " young "] for k, row in enumerate(rows)]
    write_rows(path, rows, delimiter=delimiter, encoding="utf-8-sig" if how == "bom" else "utf-8")
    table = data.read_csv(path, delimiter=";" if how == "semicolon" else None)
    assert (table.name, table.classes, table.class_names) == ("people", 2, ("old", "young"))
    assert table.feature_names == ("age", "city", "income")
    assert table.train_inputs.dtype == np.float32 and table.train_labels.dtype == np.int32
    assert table.train_inputs.shape == (4, 3) and table.test_labels.tolist() in ([0, 1], [1, 0])
    inputs, labels = whole(table)
    np.testing.assert_array_equal(inputs, np.array([row[:3] for row in rows[1:]], np.float32))
    assert labels == [1, 1, 1, 0, 0, 0]


def test_csv_one_hot_and_label_by_name(tmp_path: Path) -> None:
    rows = [[x[0], "sold" if k == 0 else 10 if k % 2 else 9, *x[1:]] for k, x in enumerate(ROWS)]
    table = data.read_csv(write_rows(tmp_path / "a.csv", rows), label="sold", one_hot=("city",))
    assert table.class_names == ("9", "10")  # by their numbers, not as text
    cities = ["Bad\nEms", 'Bad "Ems"', "Bern", "Ulm"]
    assert table.feature_names == ("age", *(f"city={city}" for city in cities), "income")
    inputs, labels = whole(table)
    assert labels == [1, 0, 1, 0, 1, 0]
    expected = [[x[0], *(float(x[1] == city) for city in cities), x[2]] for x in ROWS[1:]]
    np.testing.assert_array_equal(inputs, np.array(expected, np.float32))


def test_csv_passes_over_blank_lines_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(" a , b\n\n1, x\n2 ,x\n\n3,y\n 4,y \n")
    table = data.read_csv(path)
    assert table.feature_names == ("a",) and table.class_names == ("x", "y")
    assert whole(table)[0].ravel().tolist() == [1, 2, 3, 4]


def changed(row: int, column: int, cell: Any) -> list[list[Any]]:
    rows = [[*x] for x in GOOD]
    rows[row][column] = cell
    return rows


WRONG_TABLES: dict[str, tuple[list[list[Any]], str]] = {
    "a missing cell": (changed(2, 0, ""), r"line 3, column 'a' is missing. Fill the cell in"),
    "text": (changed(2, 0, "red"), r"line 3, column 'a' is 'red', not a finite number .*into one_hot"),
    "NaN": (changed(4, 0, "nan"), r"line 5, column 'a' is 'nan', not a finite number"),
    "infinity": (changed(4, 0, "-inf"), r"line 5, column 'a' is '-inf', not a finite number"),
    "more than float32 holds": (
        changed(1, 0, "1e39"),
        r"line 2, column 'a' is '1e39', not a finite number",
    ),
    "a number for Python alone": (changed(1, 0, "2020_01"), r"is '2020_01', not a finite number"),
    "a missing label": (changed(3, 1, ""), r"line 4, column 'b' is missing. Fill the cell in or remove"),
    "a label that is no class": (
        [["a", "b"], [1, 2.5], [2, 2.5]],
        r"'b' holds the number 2.5, which is no class",
    ),
    "labels of two sorts": (
        [["a", "b"], [1, 0], [2, 1], [3, "NA"]],
        r"column 'b' holds numbers and also 'NA', but classes are either all numbers or all text",
    ),
    "one class": ([["a", "b"], [1, "x"], [2, "x"]], r"all examples are of the class 'x'. Add another"),
    "a class with one row": (changed(4, 1, "x"), r"class 'y' has only one example, .*Add examples"),
    "a long row": ([*GOOD, [1, 2, 3]], r"line 6 has 3 cells, but the header has 2. Complete the row"),
    "a short row": ([*GOOD, [1]], r"line 6 has 1 cells, but the header has 2"),
    "no rows": (GOOD[:1], r"the file has 1 lines with cells. Pass one with a header and rows"),
    "nothing": ([], r"the file has 0 lines with cells"),
    "one column": ([["a;b"], ["1;x"]], r"the header has one column, 'a;b', .*pass it as delimiter"),
    "a column without a name": (changed(0, 0, ""), r"column 1 has no name; it may be the index"),
    "a name twice": (changed(0, 0, "b"), r"two columns are called 'b'. Rename one"),
    "no header": (GOOD[1:], r"the first line has the number 1 in it, but it must be the header"),
}


@pytest.mark.parametrize("what", WRONG_TABLES)
def test_error_table(tmp_path: Path, what: str) -> None:
    rows, words = WRONG_TABLES[what]
    refused(words, data.read_csv, write_rows(tmp_path / "a.csv", rows))


def test_error_table_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,x\n2,"x"x\n')
    refused(r"line 3: .*Put the quotes of that line right", data.read_csv, path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "c"}, r"there is no column 'c'. Choose from a, b"),
        ({"one_hot": ("c",)}, r"there is no column 'c'. Choose from a, b"),
        ({"one_hot": "a"}, r"one_hot is a list of names. Pass \['a'\]"),
        ({"one_hot": ["b"]}, r"'b' holds the classes. Leave it out of one_hot"),
        ({"delimiter": ",,"}, r"delimiter is one character"),
        ({"delimiter": '"'}, r"delimiter is one character"),
    ],
)
def test_error_table_arguments(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    refused(words, data.read_csv, write_rows(tmp_path / "a.csv", GOOD), **options)


# ---- archives

BYTES = np.random.default_rng(0).integers(0, 256, (8, 3, 4, 3), np.uint8)
LABELS = np.arange(8) % 2


@pytest.mark.parametrize(
    "names", ["train_images train_labels test_images test_labels", "x_train y_train x_test y_test"]
)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 3)])
@pytest.mark.parametrize("floats", [False, True])
def test_npz_of_images_split(tmp_path: Path, names: str, shape: tuple[int, ...], floats: bool) -> None:
    pixels = BYTES.reshape(-1)[: 8 * int(np.prod(shape))].reshape(8, *shape)
    images = pixels / 255 if floats else pixels
    arrays = (images[:6], LABELS[:6, None], images[6:], LABELS[6:].astype(np.uint8))
    np.savez(tmp_path / "a.npz", **dict(zip(names.split(), arrays)), val_images=np.zeros(3))
    read = data.read_npz(tmp_path / "a.npz")
    assert isinstance(read, data.Dataset) and (read.name, read.classes) == ("a", 2)
    expected = pixels.reshape(8, *(shape if shape[2:] == (3,) else shape[:2])) / 255
    np.testing.assert_allclose(read.train_images, expected[:6], rtol=1e-6)
    np.testing.assert_allclose(read.test_images, expected[6:], rtol=1e-6)
    assert read.train_labels.tolist() == LABELS[:6].tolist() and read.test_labels.tolist() == [0, 1]
    for array, dtype in zip(read[:4], (np.float32, np.int32) * 2):
        assert array.dtype == dtype


@pytest.mark.parametrize("names", [("images", "labels"), ("inputs", "labels"), ("x", "y"), ("X", "y")])
def test_npz_to_be_split(tmp_path: Path, names: tuple[str, str]) -> None:
    inputs = np.arange(16.0).reshape(8, 2)
    np.savez(tmp_path / "a.npz", **dict(zip(names, (inputs, LABELS == 1))))
    read = data.read_npz(tmp_path / "a.npz", test_share=0.25)
    assert isinstance(read, data.Table) and read.train_inputs.dtype == np.float32
    assert sorted(read.test_labels.tolist()) == [0, 1]
    found, labels = whole(read)
    np.testing.assert_array_equal(found, inputs)
    assert labels == LABELS.tolist()


TABLE = np.zeros((8, 2))
WRONG_ARCHIVES: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "other names": (
        {"a": TABLE, "b": LABELS},
        r"holds the arrays a, b. Name them as one of images and labels",
    ),
    "no test part": ({"x_train": TABLE, "y_train": LABELS}, r"holds the arrays x_train, y_train. Name"),
    "two of everything": (
        {"x": TABLE, "y": LABELS, "images": TABLE, "labels": LABELS},
        r"; both \('images', 'labels'\) and \('x', 'y'\) fit",
    ),
    "fewer labels": (
        {"x": TABLE, "y": LABELS[:7]},
        r"holds x \(8, 2\), y \(7,\), but .* one label for each",
    ),
    "other test images": (
        {"x_train": TABLE, "y_train": LABELS, "x_test": TABLE[:, :1], "y_test": LABELS},
        r"x_test \(8, 1\), y_test \(8,\), but .*examples of one shape",
    ),
    "one axis": ({"x": TABLE[:, 0], "y": LABELS}, r"x has the shape \(8,\), but must be \(n, features\)"),
    "channels first": ({"x": np.zeros((8, 3, 5, 5)), "y": LABELS}, r"\(8, 3, 5, 5\), but .*channels last"),
    "nothing": ({"x": TABLE[:0], "y": LABELS[:0]}, r"x has the shape \(0, 2\), .*not empty"),
    "NaN": ({"x": TABLE + np.nan, "y": LABELS}, r"x, of float64, holds what is no finite number"),
    "text": ({"x": TABLE.astype(str), "y": LABELS}, r"x, of <U32, holds what is no finite number"),
    "too large": ({"x": TABLE + 1e39, "y": LABELS}, r"holds what is no finite number in float32"),
    "pixels to 255": (
        {"x": BYTES.astype(float), "y": LABELS},
        r"x holds images of float64 from 0.0 to 255.0, but they must be uint8, or floats from 0 to 1",
    ),
    "integer pixels": ({"x": BYTES.astype(int), "y": LABELS}, r"images of int64 from 0 to 255"),
    "NaN in images": ({"x": BYTES * np.nan, "y": LABELS}, r"images of float64 from nan to nan"),
    "float labels": (
        {"x": TABLE, "y": LABELS / 1},
        r"y has the shape \(8,\) and the type float64, but labels",
    ),
    "one-hot labels": (
        {"x": TABLE, "y": np.eye(2, dtype=int)[LABELS]},
        r"y has the shape \(8, 2\) .*argmax",
    ),
    "labels from 1": ({"x": TABLE, "y": LABELS + 1}, r"2 different numbers from 1 to 2, but classes are"),
    "negative labels": ({"x": TABLE, "y": LABELS - 1}, r"2 different numbers from -1 to 0"),
    "a gap": ({"x": TABLE, "y": LABELS * 2}, r"2 different numbers from 0 to 2, .*renumbers them"),
    "a class to test on alone": (
        {"x_train": TABLE, "y_train": LABELS, "x_test": TABLE[:1], "y_test": np.array([2])},
        r"class 2 is in the test part alone",
    ),
    "one class": ({"x": TABLE, "y": LABELS * 0}, r"all examples are of the class '0'"),
    "a class with one example": ({"x": TABLE, "y": np.arange(8) // 7}, r"class '1' has only one example"),
}


@pytest.mark.parametrize("what", WRONG_ARCHIVES)
def test_error_npz(tmp_path: Path, what: str) -> None:
    arrays, words = WRONG_ARCHIVES[what]
    np.savez(tmp_path / "a.npz", **arrays)
    refused(words, data.read_npz, tmp_path / "a.npz")


@pytest.mark.parametrize("how", ["cut", "text", "array", "objects"])
def test_error_npz_damaged(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=TABLE.astype(object) if how == "objects" else TABLE, y=LABELS)
    if how == "array":
        with path.open("wb") as file:
            np.save(file, TABLE)
    elif how != "objects":
        path.write_bytes(path.read_bytes()[:-9] if how == "cut" else b"x,y\n")
    refused(r"a.npz is damaged or is another file \(", data.read_npz, path)


def test_error_npz_share_of_split_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=TABLE, y_train=LABELS, x_test=TABLE, y_test=LABELS)
    refused(
        r"split already, into x_train, y_train, x_test, y_test. Leave test_share out",
        data.read_npz,
        tmp_path / "a.npz",
        test_share=0.2,
    )


# ---- images


def draw(path: Path, pixels: np.ndarray, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three gray images of 3 x 4 pixels in each of two classes; all their pixels have one value."""
    for k in range(6):
        draw(tmp_path / "pets" / ("cat", "dog")[k % 2] / f"{k}.png", np.full((3, 4), 40 * k, np.uint8))
    (tmp_path / "pets" / ".hidden").write_text("")
    (tmp_path / "pets" / "cat" / ".hidden").write_text("")
    (tmp_path / "pets" / "README.txt").write_text("")
    return tmp_path / "pets"


def test_images(folder: Path) -> None:
    read = data.read_images(folder, test_share=0.4)
    assert (read.name, read.classes, read.class_names) == ("pets", 2, ("cat", "dog"))
    assert read.train_images.shape == (4, 3, 4) and read.test_images.shape == (2, 3, 4)
    images = np.concatenate([read.train_images, read.test_images])
    assert images.dtype == np.float32 and read.train_labels.dtype == np.int32
    values = np.rint(images[:, 0, 0] * 255) / 40
    np.testing.assert_allclose(images, values[:, None, None] * np.ones((3, 4)) * 40 / 255, rtol=1e-6)
    assert sorted(values) == list(range(6))
    assert (values % 2).tolist() == np.concatenate([read.train_labels, read.test_labels]).tolist()


def test_images_in_color(tmp_path: Path) -> None:
    for k, image in enumerate(BYTES):
        draw(tmp_path / "ab"[k % 2] / f"{k}.PNG", image)
    read = data.read_images(tmp_path)
    images = np.concatenate([read.train_images, read.test_images])
    assert {x.tobytes() for x in np.rint(images * 255).astype(np.uint8)} == {x.tobytes() for x in BYTES}
    gray = data.read_images(tmp_path, channels=1)
    assert gray.train_images.shape == read.train_images.shape[:3]
    expected = read.train_images @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R 601
    np.testing.assert_allclose(gray.train_images, expected, atol=1 / 255)


def test_images_of_all_kinds(tmp_path: Path) -> None:
    """Palettes, opaque alpha, black and white, JPEG, and turned by the camera."""
    color = np.zeros((3, 4, 3), np.uint8)
    color[:, :2] = (255, 0, 0)
    path = tmp_path / "a" / "palette.png"
    path.parent.mkdir()
    Image.fromarray(color).quantize(2).save(path)
    draw(tmp_path / "a" / "opaque.png", np.dstack([color, np.full((3, 4), 255, np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to show it
    draw(tmp_path / "b" / "turned.png", np.rot90(color).copy(), exif=exif)
    draw(tmp_path / "b" / "photo.JPG", color, quality=100, subsampling=0)
    read = data.read_images(tmp_path)
    for image in np.concatenate([read.train_images, read.test_images]):
        np.testing.assert_allclose(image, color / 255, atol=0.03)
    for k in range(4):
        draw(tmp_path / "white" / "cd"[k % 2] / f"{k}.png", np.arange(12).reshape(3, 4) % 2 == 0)
    white = data.read_images(tmp_path / "white")
    np.testing.assert_array_equal(white.train_images[0], (np.arange(12).reshape(3, 4) + 1) % 2)


def test_images_resized(folder: Path) -> None:
    draw(folder / "dog" / "large.png", np.full((30, 9), 255, np.uint8))
    read = data.read_images(folder, size=(6, 2), channels=3)
    assert read.train_images.shape[1:] == (6, 2, 3)
    assert all(np.ptp(image) == 0 for image in read.train_images)  # of one value before
    checks = (np.indices((4, 4)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for k in range(4):
        draw(folder / "checks" / "ab"[k % 2] / f"{k}.png", checks)
    half = data.read_images(folder / "checks", size=(1, 1)).train_images
    np.testing.assert_allclose(half, 0.5, atol=0.003)  # every pixel counts


def test_images_split_into_train_and_test(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / "split").mkdir(exist_ok=True)
        (tmp_path / "split" / part).symlink_to(folder)
    draw(folder / "dog" / "9.png", np.full((3, 4), 255, np.uint8))
    read = data.read_images(tmp_path / "split")
    assert read.name == "split" and read.class_names == ("cat", "dog")
    for images, labels in (read[:2], read[2:4]):
        assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1, 1] and labels.tolist() != sorted(labels)
        assert sorted(np.rint(images[labels == 0, 0, 0] * 255).tolist()) == [0, 80, 160]
    refused("split already, into train and test", data.read_images, tmp_path / "split", test_share=0.5)
    (tmp_path / "split" / "test").unlink()
    for name in ("cat", "cow"):
        draw(tmp_path / "split" / "test" / name / "0.png", np.zeros((3, 4), np.uint8))
    refused("class 'cow' is in test alone. Give both", data.read_images, tmp_path / "split")


def damage(folder: Path, what: str) -> None:
    zeros, cat = np.zeros((3, 4), np.uint8), folder / "cat"
    if what == "no class":
        draw(folder / "0.png", zeros)
    elif what == "a folder in a class":
        draw(cat / "black" / "0.png", zeros)
    elif what == "no image":
        (cat / "notes.txt").write_text("")
    elif what == "no image in a class":
        (folder / "cow").mkdir()
    elif what == "one image":
        draw(folder / "cow" / "0.png", zeros)
    elif what == "damaged":
        draw(cat / "0.png", np.random.default_rng(0).integers(0, 256, (3, 4), np.uint8))
        (cat / "0.png").write_bytes((cat / "0.png").read_bytes()[:50])
    elif what == "text":
        (cat / "0.png").write_text("pixels")
    elif what == "16 bits":
        draw(cat / "9.png", zeros.astype(np.uint16))
    elif what == "transparent":
        draw(cat / "9.png", np.zeros((3, 4, 4), np.uint8))
    elif what == "in color":
        draw(cat / "9.png", np.zeros((3, 4, 3), np.uint8))
    else:
        draw(cat / "9.png", zeros.T.copy())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no class", r"0\.png is in no class. A class is a folder of PNG and JPEG files"),
        ("a folder in a class", r"black is a folder within a class. A class is a folder of PNG"),
        ("no image", r"notes\.txt is no PNG or JPEG file. A class is a folder of PNG"),
        ("no image in a class", r"class 'cow' has no images. A class is a folder of PNG"),
        ("one image", r"class 'cow' has only one example"),
        ("damaged", r"0\.png is damaged or is no image \(.*\). Replace or remove it"),
        ("text", r"0\.png is damaged or is no image \(.*\). Replace or remove it"),
        ("16 bits", r"9\.png is stored in the mode I;16, .*Convert it"),
        ("transparent", r"9\.png has transparent pixels. Put it on a background"),
        ("in color", r"0\.png is gray, but .*9\.png is in color. Pass channels=1 or channels=3"),
        ("another size", r"9\.png has 4 x 3 pixels .*, but .*0\.png has 3 x 4. Pass size="),
    ],
)
def test_error_images(folder: Path, what: str, words: str) -> None:
    damage(folder, what)
    refused(words, data.read_images, folder)


def test_error_images_no_folder(folder: Path) -> None:
    refused(r"absent does not exist. Pass a folder", data.read_images, folder / "absent")
    refused(r"0\.png is a file. Pass a folder", data.read_images, folder / "cat" / "0.png")
    refused(r"cat\d*/?.* is in no class", data.read_images, folder / "cat")
    (folder.parent / "empty").mkdir()
    refused(r"empty has 0 sub-folders, but two classes or more", data.read_images, folder.parent / "empty")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 28}, r"size is \(height, width\) in pixels"),
        ({"size": (28,)}, r"size is \(height, width\) in pixels"),
        ({"size": (28, 0)}, r"size is \(height, width\) in pixels"),
        ({"channels": 2}, r"channels is 1 for gray images, 3 for color, or None"),
    ],
)
def test_error_images_arguments(folder: Path, options: dict[str, Any], words: str) -> None:
    refused(words, data.read_images, folder, **options)


def test_images_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.ImageOps", None)
    with pytest.raises(
        ImportError, match=r"read_images\(.*Pillow, .* install it, or hypergrad-jax\[data\]"
    ):
        data.read_images(folder)


# ---- load


def test_load(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("abc" * 10)
    np.savez(tmp_path / "a.npz", x=TABLE, y=LABELS)
    write_rows(tmp_path / "a.csv", GOOD)
    write_rows(tmp_path / "a.TSV", GOOD, delimiter="\t")
    kinds = {"a.txt": data.Text, "a.npz": data.Table, "a.csv": data.Table, "a.TSV": data.Table}
    for name, kind in kinds.items():
        assert isinstance(data.load(tmp_path / name), kind)
    assert len(data.load(str(tmp_path / "a.txt"), test_share=0.5).test) == 15
    assert data.load(folder, size=(2, 2)).train_images.shape[1:] == (2, 2)
    assert data.load("digits").name == "digits"
    folder.rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert data.load("./digits").classes == data.load(Path("digits")).classes == 2
    with pytest.raises(data.DataError, match=r"mnist\(directory='nowhere'\): looked for"):
        data.load("mnist", directory="nowhere")


def test_error_load(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    refused(r"there is no such file or folder. .*names digits, mnist, fashion-mnist, a9a", data.load, path)
    path.write_text("{}")
    refused(r"a folder of images, or a file named .csv, .tsv, .npz, .txt. Rename it", data.load, path)
    (tmp_path / "a.txt").write_text("abc")
    refused(
        r"read_text reads this, .*not take 'size'. Choose from test_share",
        data.load,
        tmp_path / "a.txt",
        size=3,
    )
    refused(r"digits reads this, .*not take 'size'. Choose from nothing", data.load, "digits", size=3)
    refused(r"mnist reads this, .*not take 'size'. Choose from directory", data.load, "mnist", size=3)


# ---- standardization


@pytest.mark.parametrize("shape", [(50, 4), (50, 3, 4), (50, 3, 4, 2)])
def test_standardization(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=shape) * 3 + rng.normal(size=shape[-1:]) * 5).astype(np.float32)
    scale = data.standardization(inputs)
    axes = {2: (0,), 3: (0, 1, 2), 4: (0, 1, 2)}[len(shape)]
    assert scale.mean.shape == scale.std.shape == (() if len(shape) == 3 else shape[-1:])
    assert scale.mean.dtype == scale.std.dtype == np.float32
    np.testing.assert_allclose(scale.mean, inputs.astype(float).mean(axis=axes), rtol=1e-6)
    applied = scale.apply(inputs)
    assert isinstance(applied, np.ndarray) and applied.dtype == np.float32
    np.testing.assert_allclose(applied.mean(axis=axes, dtype=float), 0, atol=1e-6)
    np.testing.assert_allclose(applied.std(axis=axes, dtype=float), 1, rtol=1e-5)
    np.testing.assert_allclose(scale.undo(applied), inputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(scale.apply)(jnp.asarray(inputs)), applied, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale.apply(inputs[0, ...]), applied[0], rtol=1e-6)


def test_standardization_of_constants() -> None:
    inputs = np.full((1001, 3), 0.1, np.float32)  # whose mean, even in float64, is not 0.1 to the last bit
    inputs[:, 1] = 1e-44  # denormal
    inputs[0, 1] = 0
    inputs[:, 2] = np.arange(1001)
    scale = data.standardization(inputs)
    assert scale.std[:2].tolist() == [1, 1] and scale.std[2] == pytest.approx(288.96, rel=1e-4)
    assert (scale.apply(inputs)[:, 0] == 0).all()


def test_standardization_is_stored(tmp_path: Path) -> None:
    scale = data.standardization(np.random.default_rng(0).random((5, 3)))
    files.save(tmp_path / "a.npz", {"scale": scale, "gray": data.standardization(np.ones((5, 2, 2)))})
    tree, _ = files.load(tmp_path / "a.npz")
    again, gray = data.Standardization(**tree["scale"]), data.Standardization(**tree["gray"])
    np.testing.assert_array_equal(again.mean, scale.mean)
    np.testing.assert_array_equal(again.std, scale.std)
    assert gray.apply(np.ones((2, 2))).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            np.ones(3),
            r"standardization\(inputs\) with inputs of shape \(3,\): pass a table \(n, features\)",
        ),
        (np.ones((0, 3)), r"shape \(0, 3\): pass a table"),
        (np.ones((2, 3, 4, 5, 6)), r"shape \(2, 3, 4, 5, 6\): pass a table"),
        (np.array([[1.0, np.nan]]), r"there is NaN or infinity in them"),
    ],
)
def test_error_standardization(inputs: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data.standardization(inputs)


@pytest.mark.parametrize("method", ["apply", "undo"])
def test_error_standardization_of_other_features(method: str) -> None:
    scale = data.standardization(np.ones((5, 3)))
    words = rf"Standardization.{method}\(inputs\) with inputs of shape .*: mean and std are of 3 features"
    for shape in ((5, 1), (3, 5), ()):
        with pytest.raises(ValueError, match=words):
            getattr(scale, method)(np.ones(shape))
