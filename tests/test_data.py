import gzip
import hashlib
import os
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hypergrad import data
from hypergrad.data import built_in

FILES = (
    ("train-images-idx3-ubyte.gz", np.arange(24, dtype=np.uint8).reshape(6, 2, 2)),
    ("train-labels-idx1-ubyte.gz", np.arange(6, dtype=np.uint8)),
    ("t10k-images-idx3-ubyte.gz", np.full((2, 2, 2), 255, np.uint8)),
    ("t10k-labels-idx1-ubyte.gz", np.array([9, 8], np.uint8)),
)
CODES = {"uint8": 8, "int8": 9, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array):
    header = bytes([0, 0, CODES[array.dtype.name], array.ndim])
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return header + shape + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    folder = tmp_path / "mnist"
    folder.mkdir()
    sums = []
    for name, array in FILES:
        content = gzip.compress(idx_bytes(array), mtime=0)
        (folder / name).write_bytes(content)
        sums.append(hashlib.md5(content).hexdigest())
    monkeypatch.setitem(built_in._MD5, "mnist", tuple(sums))
    return tmp_path


def needs(name):
    root = os.environ.get("HYPERGRAD_DATA")
    return pytest.mark.skipif(
        not root or not Path(root, name).is_dir(),
        reason=f"{name} is absent: set HYPERGRAD_DATA to the folder that holds {name}/",
    )


# ---- digits


def test_digits_split_is_disjoint_and_complete():
    from sklearn.datasets import load_digits

    dataset = data.digits()
    assert dataset.train_images.shape == (1437, 8, 8) and dataset.test_images.shape == (360, 8, 8)
    # The 1,797 pictures are all different, so pictures stand for rows.
    pairs = [
        (image.tobytes(), int(label))
        for images, labels in (dataset[:2], dataset[2:4])
        for image, label in zip(images, labels)
    ]
    original = load_digits()
    wanted = {
        (np.float32(image / 16).tobytes(), int(label))
        for image, label in zip(original.images, original.target)
    }
    assert len(wanted) == len(set(pairs)) == len(pairs) == 1797
    assert set(pairs) == wanted


def test_digits_split_is_fixed():
    first, second = data.digits(), data.digits()
    for a, b in zip(first[:4], second[:4]):
        np.testing.assert_array_equal(a, b)
    assert first.train_labels[:10].tolist() == [0, 6, 3, 8, 1, 8, 4, 1, 5, 8]
    assert first.test_labels[:10].tolist() == [6, 2, 4, 2, 4, 1, 9, 3, 0, 5]
    # Every class is in both parts, in about its share.
    assert np.bincount(first.test_labels, minlength=10).min() >= 25


def test_digits_types_and_range():
    dataset = data.digits()
    assert (dataset.name, dataset.classes) == ("digits", 10)
    for images, labels in (dataset[:2], dataset[2:4]):
        assert images.dtype == np.float32 and labels.dtype == np.int32
        assert images.min() == 0 and images.max() == 1
        assert set(labels.tolist()) == set(range(10))


# ---- mnist, fashion_mnist


@needs("mnist")
def test_mnist():
    dataset = data.mnist()
    assert (dataset.name, dataset.classes) == ("mnist", 10)
    assert dataset.train_images.shape == (60000, 28, 28)
    assert dataset.test_images.shape == (10000, 28, 28)
    assert dataset.train_images.dtype == np.float32 and dataset.train_labels.dtype == np.int32
    assert dataset.train_images.min() == 0 and dataset.train_images.max() == 1
    assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert dataset.train_images.mean(dtype=np.float64) == pytest.approx(0.1307, abs=1e-4)


@needs("fashion-mnist")
def test_fashion_mnist():
    dataset = data.fashion_mnist()
    assert (dataset.name, dataset.classes) == ("fashion-mnist", 10)
    assert dataset.train_images.shape == (60000, 28, 28)
    assert dataset.test_images.shape == (10000, 28, 28)
    assert np.bincount(dataset.train_labels).tolist() == [6000] * 10
    assert dataset.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert dataset.train_images.mean(dtype=np.float64) == pytest.approx(0.2860, abs=1e-4)


@pytest.mark.parametrize("by_variable", [False, True])
def test_mnist_from_tiny_files(tiny_mnist, monkeypatch, by_variable):
    monkeypatch.setenv("HYPERGRAD_DATA", str(tiny_mnist if by_variable else "/nowhere"))
    dataset = data.mnist() if by_variable else data.mnist(tiny_mnist)
    expected = np.arange(24).reshape(6, 2, 2) / 255
    np.testing.assert_allclose(dataset.train_images, expected, rtol=1e-6)
    assert dataset.train_images.dtype == np.float32
    assert dataset.train_labels.tolist() == list(range(6))
    assert (dataset.test_images == 1).all()
    assert dataset.test_labels.tolist() == [9, 8]


@pytest.fixture
def tiny_omniglot(tmp_path):
    folder = tmp_path / "omniglot"
    folder.mkdir()
    arrays = {
        "images": np.zeros((3, 20, 28, 28), np.uint8) + np.uint8([[[[255]]], [[[51]]], [[[0]]]]),
        "alphabet": np.array(["Greek", "N_Ko"]),
        "alphabet_id": np.array([0, 1, 0], np.int16),
        "is_evaluation": np.array([False, True, False]),
    }
    np.savez(folder / "omniglot_28.npz", **arrays)
    return tmp_path, arrays


@pytest.mark.parametrize("by_variable", [False, True])
def test_omniglot_from_a_tiny_file(tiny_omniglot, monkeypatch, by_variable):
    root, _ = tiny_omniglot
    monkeypatch.setenv("HYPERGRAD_DATA", str(root if by_variable else "/nowhere"))
    read = data.omniglot(None if by_variable else root)
    assert read.names == ("Greek", "N_Ko") and read.alphabet.tolist() == [0, 0, 1]
    assert read.images.dtype == np.float32 and read.images.shape == (3, 20, 28, 28)
    np.testing.assert_allclose(read.images[:, 3, 5, 7], [1, 0, 0.2], rtol=1e-6)
    assert read.evaluation.tolist() == [False, False, True]
    other = data.omniglot(root, ["N_Ko", "Greek"])
    assert other.names == ("N_Ko", "Greek") and other.alphabet.tolist() == [0, 1, 1]
    np.testing.assert_allclose(other.images[:, 0, 0, 0], [0.2, 1, 0], rtol=1e-6)


@needs("omniglot")
def test_omniglot():
    read = data.omniglot()
    assert read.images.shape == (1623, 20, 28, 28) and len(read.names) == 50
    assert read.evaluation.sum() == 659  # of 20 alphabets, against 964 of 30
    assert np.bincount(read.alphabet)[read.names.index("Hebrew")] == 22
    assert 0 < read.images.mean() < 0.2 and read.images.max() == 1  # ink is 1, and scarce


def omniglot_error(root, alphabets=None):
    with pytest.raises(ValueError) as caught:
        data.omniglot(root, alphabets)
    message = str(caught.value)
    assert message.startswith(f"omniglot(directory={root!r}, alphabets={alphabets!r}): ")
    return message


def test_error_omniglot_no_directory(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    message = omniglot_error(None)
    assert "no directory was given" in message and "holds omniglot/ with omniglot_28.npz" in message


def test_error_omniglot_missing(tmp_path):
    message = omniglot_error(tmp_path)
    assert f"looked for {tmp_path / 'omniglot' / 'omniglot_28.npz'} (No such file" in message
    assert "set the environment variable HYPERGRAD_DATA" in message


@pytest.mark.parametrize("how", ["cut", "flipped", "text", "array", "keys"])
def test_error_omniglot_damaged(tiny_omniglot, how):
    root, arrays = tiny_omniglot
    path = root / "omniglot" / "omniglot_28.npz"
    content = path.read_bytes()
    if how == "array":
        with path.open("wb") as file:
            np.save(file, arrays["images"])
    elif how == "keys":
        np.savez(path, images=arrays["images"])
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:-9], "flipped": flipped, "text": b"a,b,c\n"}[how])
    message = omniglot_error(root)
    assert f"{path.name} is damaged or is another file" in message


@pytest.mark.parametrize("name", ["images", "alphabet_id", "is_evaluation"])
def test_error_omniglot_shapes(tiny_omniglot, name):
    root, arrays = tiny_omniglot
    wrong = arrays[name][:, :7] if name == "images" else arrays[name][:2]
    np.savez(root / "omniglot" / "omniglot_28.npz", **arrays | {name: wrong})
    assert "but (n, 20, 28, 28) uint8, (n,) and (n,) are read" in omniglot_error(root)


@pytest.mark.parametrize("alphabets", [["N_Ko", "Elvish"], []])
def test_error_omniglot_alphabets(tiny_omniglot, alphabets):
    message = omniglot_error(tiny_omniglot[0], alphabets)
    assert ("there is no alphabet 'Elvish'" if alphabets else "no alphabet is asked for") in message
    assert message.endswith("Choose from Greek, N_Ko.")


@pytest.mark.parametrize("value", [None, ""])
def test_error_no_directory(monkeypatch, value):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("HYPERGRAD_DATA", value)
    with pytest.raises(data.DataError) as caught:
        data.fashion_mnist()
    message = str(caught.value)
    assert message.startswith("fashion_mnist(directory=None): no directory was given")
    assert "set the environment variable HYPERGRAD_DATA" in message
    assert "holds fashion-mnist/" in message


def test_error_missing_file(tmp_path):
    with pytest.raises(data.DataError) as caught:
        data.mnist(str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"mnist(directory={str(tmp_path)!r}): looked for ")
    assert str(tmp_path / "mnist" / FILES[0][0]) in message
    assert "set the environment variable HYPERGRAD_DATA" in message


@pytest.mark.parametrize("file", [name for name, _ in FILES])
def test_error_checksum(tiny_mnist, file):
    path = tiny_mnist / "mnist" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(data.DataError, match="damaged or is another version") as caught:
        data.mnist(tiny_mnist)
    assert str(path) in str(caught.value)
    assert hashlib.md5(content).hexdigest() in str(caught.value)


# ---- a9a


@needs("libsvm")
def test_a9a():
    table = data.a9a()
    assert (table.name, table.classes) == ("a9a", 2)
    assert table.train_inputs.shape == (32561, 123) and table.test_inputs.shape == (16281, 123)
    assert table.train_inputs.dtype == np.float32 and table.train_labels.dtype == np.int32
    assert set(np.unique(table.train_inputs)) == {0, 1}
    assert table.train_labels.sum() == 7841 and table.test_labels.sum() == 3846
    assert np.flatnonzero(table.train_inputs[0]).tolist() == [
        *(2, 10, 13, 18, 38, 41, 54, 63, 66, 72, 74, 75, 79, 82)
    ]


@pytest.fixture
def tiny_a9a(tmp_path, monkeypatch):
    (tmp_path / "libsvm").mkdir()
    contents = {"a9a": b"-1 1:1 123:1 \n+1 2:1 \n", "a9a.t": b"+1 3:1 \n"}
    for name, content in contents.items():
        (tmp_path / "libsvm" / name).write_bytes(content)
        monkeypatch.setitem(built_in._A9A, name, hashlib.md5(content).hexdigest())
    return tmp_path


def test_a9a_from_tiny_files(tiny_a9a):
    table = data.a9a(tiny_a9a)
    expected = np.zeros((2, 123), np.float32)
    expected[[0, 0, 1], [0, 122, 1]] = 1
    np.testing.assert_array_equal(table.train_inputs, expected, strict=True)
    assert table.train_labels.tolist() == [0, 1] and table.test_labels.tolist() == [1]
    assert np.flatnonzero(table.test_inputs[0]).tolist() == [2]


def test_a9a_errors(tiny_a9a, monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    with pytest.raises(
        data.DataError, match=r"a9a\(directory=None\): no directory .* holds libsvm/ with its two"
    ):
        data.a9a()
    (tiny_a9a / "libsvm" / "a9a.t").write_bytes(b"+1 4:1 \n")
    with pytest.raises(data.DataError, match=r"a9a\(.*a9a.t has md5 .* damaged or is another version"):
        data.a9a(tiny_a9a)
    (tiny_a9a / "libsvm" / "a9a").unlink()
    with pytest.raises(data.DataError, match=r"a9a\(.*: looked for "):
        data.a9a(tiny_a9a)


# ---- read_idx


@pytest.mark.parametrize("dtype", sorted(CODES))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_idx_every_type(tmp_path, dtype, suffix):
    kind = np.dtype(dtype)
    limits = np.iinfo(kind) if kind.kind in "iu" else np.finfo(kind)
    array = np.array([[limits.min, 0, 1], [2, 77, limits.max]], kind)
    content = idx_bytes(array)
    path = tmp_path / f"array{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    result = data.read_idx(path)
    assert result.dtype == kind and result.dtype.isnative and result.flags.writeable
    np.testing.assert_array_equal(result, array)


def test_read_idx_is_big_endian(tmp_path):
    path = tmp_path / "hand-written"
    path.write_bytes(bytes([0, 0, 0x0B, 2, 0, 0, 0, 1, 0, 0, 0, 2, 1, 2, 0xFF, 0xFE]))
    assert data.read_idx(str(path)).tolist() == [[258, -2]]


def test_read_idx_scalar_and_empty(tmp_path):
    for array in (np.array(3.5), np.zeros((0, 28, 28), np.uint8)):
        path = tmp_path / "array"
        path.write_bytes(idx_bytes(array))
        np.testing.assert_array_equal(data.read_idx(path), array, strict=True)


IDX = idx_bytes(np.arange(6, dtype=np.int16).reshape(2, 3))
IDX_GZ = gzip.compress(IDX)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b"", "truncated: 0 bytes, but the IDX header alone takes 4"),
        ("header", IDX[:9], "truncated: 9 bytes, but the IDX header alone takes 12"),
        ("short", IDX[:-1], "truncated: 23 bytes, but the header's shape (2, 3) of int16 makes 24"),
        ("long", IDX + b"\0", "trailing bytes: 25 bytes, but the header's shape (2, 3)"),
        ("text", b"a,b,c\n1,2,3\n", "not an IDX file: it starts with 61 2c 62 2c"),
        ("type", b"\0\0\x0a\1\0\0\0\0", "not an IDX file: it starts with 00 00 0a 01"),
        ("compressed", IDX_GZ, "not an IDX file: it starts with 1f 8b"),
        (
            "axes",
            b"\0\0\x08\x41" + b"\0\0\0\1" * 65 + b"\7",
            "numpy cannot hold the header's shape",
        ),
        ("plain.gz", IDX, "does not decompress (Not a gzipped file"),
        ("cut.gz", IDX_GZ[:-9], "does not decompress (Compressed file ended"),
        ("flipped.gz", IDX_GZ[:-5] + b"\xff" + IDX_GZ[-4:], "does not decompress (CRC check"),
        ("body.gz", IDX_GZ[:10] + b"\xff" * 20, "does not decompress (Error -3"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_error_read_idx(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(data.DataError) as caught:
        data.read_idx(path)
    assert str(caught.value).startswith(f"read_idx({str(path)!r}): ")
    assert message in str(caught.value)


def test_error_read_idx_missing(tmp_path):
    with pytest.raises(data.DataError, match=r"cannot read the file \(No such file.*HYPERGRAD_DATA"):
        data.read_idx(tmp_path / "absent")
    with pytest.raises(data.DataError, match=r"cannot read the file \(Is a directory"):
        data.read_idx(tmp_path)


def test_every_cut_of_a_file_is_a_data_error(tmp_path):
    for name, content in (("cut", IDX), ("cut.gz", IDX_GZ)):
        path = tmp_path / name
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(data.DataError):
                data.read_idx(path)


# ---- minibatches


@pytest.mark.parametrize(("examples", "batch_size"), [(11, 4), (6, 6)])
def test_minibatches_cover_each_epoch_once(examples, batch_size):
    per_epoch = examples // batch_size
    rows = np.asarray(data.minibatches(jax.random.key(0), examples, batch_size, steps=3 * per_epoch))
    assert rows.shape == (3 * per_epoch, batch_size) and rows.dtype == np.int32
    assert rows.min() >= 0 and rows.max() < examples
    epochs = rows.reshape(3, -1)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == per_epoch * batch_size
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_minibatches_leave_out_other_rows_in_other_epochs():
    rows = np.asarray(data.minibatches(jax.random.key(0), 11, 4, steps=6)).reshape(3, 8)
    assert len({frozenset(range(11)) - frozenset(epoch.tolist()) for epoch in rows}) > 1
    assert set(rows.ravel().tolist()) == set(range(11))


def test_minibatches_depend_on_the_key_alone():
    first, second, other = (data.minibatches(jax.random.key(k), 11, 4, 6) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_minibatches_of_a_short_run_start_a_long_one():
    key = jax.random.key(3)
    long = data.minibatches(key, 11, 4, 6)
    for steps in (0, 3):
        np.testing.assert_array_equal(data.minibatches(key, 11, 4, steps), long[:steps])


def test_minibatches_under_jit():
    key = jax.random.key(2)
    jitted = jax.jit(data.minibatches, static_argnums=(1, 2, 3))
    np.testing.assert_array_equal(jitted(key, 11, 4, 6), data.minibatches(key, 11, 4, 6))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_error_minibatches_batch_size(batch_size):
    with pytest.raises(ValueError, match=f"examples=10, batch_size={batch_size}, steps=3.*1 to 10"):
        data.minibatches(jax.random.key(0), 10, batch_size, 3)


def test_error_minibatches_steps():
    with pytest.raises(ValueError, match=r"steps=-1\): .*Pass steps of 0 or more"):
        data.minibatches(jax.random.key(0), 10, 5, -1)


def test_error_minibatches_types():
    with pytest.raises(TypeError, match=r"steps=1000\.0\): .*Round floats with int"):
        data.minibatches(jax.random.key(0), 10, 5, 1e3)
    with pytest.raises(TypeError, match=r"static_argnums=\(1, 2, 3\)"):
        jax.jit(data.minibatches)(jax.random.key(0), 10, 5, 3)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError, match=r"digits\(\): scikit-learn, .* install it, or hypergrad-jax\[data\]"
    ):
        data.digits()
