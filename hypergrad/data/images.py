"""A folder of images, one sub-folder per class."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad._base.checks import is_whole
from hypergrad.data.kinds import DataError, Dataset
from hypergrad.data.rows import SHARE, check_share, fixed_order, split
from hypergrad.data.sources import optional

_SUFFIXES = (".png", ".jpg", ".jpeg")
_GRAY, _COLOR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA")  # what Pillow calls images of 8 bits


def read_images(
    folder: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    test_share: float | None = None,
) -> Dataset:
    """Read a folder of PNG and JPEG images, one sub-folder per class.

    The folder holds ``cat/1.png, cat/2.png, dog/1.jpg, ...``, or the folders ``train`` and ``test`` which
    hold these.  Classes are numbered in the order of their names.  Hidden files are passed over.  Pillow
    reads the images, and turns those whose file says how the camera was held.

    Args:
      folder: the folder.
      size: (height, width) to which every image is resized, by linear interpolation over as many pixels as
        one new pixel covers; None takes them as they are, all of one size.
      channels: 1 makes gray images of all, 3 makes color images; None takes them as they are, all gray or
        all in color.
      test_share: the share of every class that is kept for testing, between 0 and 1; None takes 0.2.  The
        same files are split in the same way everywhere.  With ``train`` and ``test`` it must be None.

    Returns:
      A `Dataset` with pixels divided by 255, named like the folder.

    Raises:
      DataError: the folder is missing, is not laid out as above, or has only one class or a class of only
        one image; a file is not a PNG or JPEG image of 8 bits, or has transparent pixels; sizes differ, or
        gray images are mixed with color.
      ImportError: Pillow is not installed.
      ValueError: an argument is out of range.

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> root = pathlib.Path(tempfile.mkdtemp()) / "squares"
    >>> for shade, name in enumerate(["black", "white"]):
    ...     (root / name).mkdir(parents=True)
    ...     for k in range(3):
    ...         Image.new("L", (8, 6), 255 * shade).save(root / name / f"{k}.png")
    >>> squares = read_images(root)
    >>> squares.train_images.shape, squares.test_labels, squares.class_names
    ((4, 6, 8), array([1, 0], dtype=int32), ('black', 'white'))
    """
    given = f"size={size!r}, channels={channels!r}, test_share={test_share!r}"
    call, root = f"read_images({str(folder)!r}, {given})", Path(folder)
    _check_arguments(call, size, channels, test_share)
    parts, read = _parts(call, root, test_share), _reader(call, size, channels)
    names = tuple(parts[0])
    files = [(path, label) for part in parts for label, name in enumerate(names) for path in part[name]]
    labels = np.array([label for _, label in files], np.int32)
    if len(parts) == 1:
        train, test = split(call, labels, names, SHARE if test_share is None else test_share)
    else:
        cut = sum(map(len, parts[0].values()))
        train, test = fixed_order(cut), cut + fixed_order(len(files) - cut)
    pixels = _stacked(call, [(path, read(path)) for path, _ in files])
    train_images, test_images = (pixels[rows].astype(np.float32) / 255 for rows in (train, test))
    name, classes = root.resolve().name, len(names)
    return Dataset(train_images, labels[train], test_images, labels[test], name, classes, names)


def _check_arguments(call: str, size: Any, channels: Any, test_share: float | None) -> None:
    pair = isinstance(size, tuple | list) and len(size) == 2 and all(map(is_whole, size))
    if size is not None and not pair:
        raise ValueError(f"{call}: size is (height, width) in pixels. Pass two whole numbers, or None")
    if channels not in (None, 1, 3):
        raise ValueError(f"{call}: channels is 1 for gray images, 3 for color, or None")
    if test_share is not None:
        check_share(call, test_share)


def _parts(call: str, root: Path, test_share: float | None) -> list[dict[str, list[Path]]]:
    """The files of every class: of one part, still to be split, or of training and test."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{call}: {root} {what}. Pass a folder that holds one sub-folder per class.")
    inside = {folder.name: _visible(folder) for folder in _visible(root) if folder.is_dir()}
    deeper = all(any(path.is_dir() for path in paths) for paths in inside.values())
    if sorted(inside) != ["test", "train"] or not deeper:
        return [_classes(call, root)]
    if test_share is not None:
        raise ValueError(
            f"{call}: the folder is split already, into train and test. Leave test_share out, or pass one "
            "of the two folders"
        )
    train, test = (_classes(call, root / part) for part in ("train", "test"))
    if odd := sorted(set(train) ^ set(test)):
        raise DataError(
            f"{call}: class {odd[0]!r} is in {'train' if odd[0] in train else 'test'} alone. Give both "
            "parts the same classes."
        )
    return [train, test]


def _visible(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, by name."""
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(visible, key=lambda path: path.name)


def _classes(call: str, root: Path) -> dict[str, list[Path]]:
    """The image files of every class in a folder."""
    layout = f"A class is a folder of PNG and JPEG files, such as {root / 'cat' / '1.png'}."
    classes = {folder.name: _visible(folder) for folder in _visible(root) if folder.is_dir()}
    outside = [path for path in _visible(root) if path.suffix.lower() in _SUFFIXES]
    other = [
        path
        for paths in classes.values()
        for path in paths
        if path.is_dir() or path.suffix.lower() not in _SUFFIXES
    ]
    empty = [name for name, paths in classes.items() if not paths]
    if outside:
        raise DataError(f"{call}: {outside[0]} is in no class. {layout}")
    if other:
        what = "a folder within a class" if other[0].is_dir() else "no PNG or JPEG file"
        raise DataError(f"{call}: {other[0]} is {what}. {layout}")
    if empty:
        raise DataError(f"{call}: class {empty[0]!r} has no images. {layout}")
    if len(classes) < 2:
        raise DataError(
            f"{call}: {root} has {len(classes)} sub-folders, but two classes or more are needed. {layout}"
        )
    return classes


def _reader(call: str, size: tuple[int, int] | None, channels: int | None) -> Callable[[Path], np.ndarray]:
    """The function from a file to its pixels, ``(height, width)`` or ``(height, width, 3)`` bytes."""
    image_of, upright = (
        optional(call, f"PIL.{x}", "Pillow, which reads images,") for x in ("Image", "ImageOps")
    )

    def read(path: Path) -> np.ndarray:
        try:
            with image_of.open(path) as file:
                image = upright.exif_transpose(file)
        except Exception as error:  # damaged files make Pillow raise anything
            raise DataError(
                f"{call}: {path} is damaged or is no image ({error}). Replace or remove it."
            ) from error
        if image.mode not in _GRAY + _COLOR:
            raise DataError(
                f"{call}: {path} is stored in the mode {image.mode}, which does not turn into 8 bits of "
                "gray or RGB without a choice of how. Convert it."
            )
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            raise DataError(
                f"{call}: {path} has transparent pixels. Put it on a background, and save it without."
            )
        gray = image.mode in _GRAY if channels is None else channels == 1
        image = image.convert("L" if gray else "RGB")
        if size is not None:
            image = image.resize(size[::-1], image_of.Resampling.BILINEAR)
        return np.asarray(image)

    return read


def _stacked(call: str, images: list[tuple[Path, np.ndarray]]) -> np.ndarray:
    """One array of all images, if they are alike."""
    first, like = images[0]
    for path, pixels in images:
        if pixels.ndim != like.ndim:
            gray, color = (path, first) if pixels.ndim == 2 else (first, path)
            raise DataError(
                f"{call}: {gray} is gray, but {color} is in color. Pass channels=1 or channels=3."
            )
        if pixels.shape != like.shape:
            (h, w), (height, width) = pixels.shape[:2], like.shape[:2]
            raise DataError(
                f"{call}: {path} has {h} x {w} pixels (height x width), but {first} has {height} x "
                f"{width}. Pass size=(height, width), to which all are resized."
            )
    return np.stack([pixels for _, pixels in images])
