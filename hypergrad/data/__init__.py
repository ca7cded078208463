"""Small real data sets, readers of a user's own files, and minibatches, all as NumPy arrays.

`load` takes the name of a data set, or the path of a text, a table, a folder of images or a ``.npz`` file.
"""

from hypergrad.data.archives import read_npz
from hypergrad.data.built_in import a9a, digits, fashion_mnist, mnist, omniglot
from hypergrad.data.guess import load
from hypergrad.data.idx import read_idx
from hypergrad.data.images import read_images
from hypergrad.data.kinds import DataError, Dataset, Omniglot, Table
from hypergrad.data.rows import minibatches, require_classes
from hypergrad.data.scaling import Standardization, standardization
from hypergrad.data.tables import read_csv
from hypergrad.data.text import Text, read_text, windows

__all__ = [
    "DataError",
    "Dataset",
    "Omniglot",
    "Standardization",
    "Table",
    "Text",
    "a9a",
    "digits",
    "fashion_mnist",
    "load",
    "minibatches",
    "mnist",
    "omniglot",
    "read_csv",
    "read_idx",
    "read_images",
    "read_npz",
    "read_text",
    "require_classes",
    "standardization",
    "windows",
]
