import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad import files


def test_a_tree_survives_saving(tmp_path):
    tree = {
        "rates": [np.arange(3.0), (np.float32(1), np.zeros((2, 0)))],
        "0": {"a/b": np.array([True, False]), "c d": jnp.arange(2)},
        "low": jnp.array([1.5, -2.0], jnp.bfloat16),
        "state": optax.ScaleByAdamState(jnp.int32(3), jnp.ones(2), jnp.zeros(2)),
    }
    files.save(tmp_path / "run.npz", tree, steps=100, path="p", tree=[1, None])
    loaded, metadata = files.load(tmp_path / "run.npz")
    assert metadata == {"steps": 100, "path": "p", "tree": [1, None]}
    assert loaded["state"].keys() == {"count", "mu", "nu"}
    expected = tree | {
        "rates": [tree["rates"][0], list(tree["rates"][1])],
        "state": tree["state"]._asdict(),
    }
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected)):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert os.listdir(tmp_path) == ["run.npz"]


def test_the_file_describes_itself_to_numpy(tmp_path):
    tree = {"rates": [np.arange(3.0)], "images": np.ones(2), "file": np.zeros(1), "hypergrad": np.zeros(2)}
    files.save(tmp_path / "run", tree, steps=1)
    with np.load(tmp_path / "run") as archive:
        np.testing.assert_array_equal(archive['["rates", 0]'], np.arange(3.0))
        np.testing.assert_array_equal(archive["images"], np.ones(2))
        assert json.loads(str(archive["hypergrad"]))["metadata"] == {"steps": 1}
    loaded, _ = files.load(tmp_path / "run")
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, tree)


def test_an_array_alone_is_a_tree(tmp_path):
    files.save(tmp_path / "one.npz", np.arange(3))
    loaded, metadata = files.load(tmp_path / "one.npz")
    np.testing.assert_array_equal(loaded, np.arange(3))
    assert metadata == {}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    files.save(path, np.ones(2))

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        files.save(path, np.zeros(2))
    np.testing.assert_array_equal(files.load(path)[0], np.ones(2))
    assert os.listdir(tmp_path) == ["run.npz"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": None}, r"save\(tree\): \['a'\] is None, which is not an array of numbers"),
        ({"a": []}, r"save\(tree\): \['a'\] is \[\], which is not"),
        ({}, r"save\(tree\): the tree is \{\}, which is not"),
        (["text"], r"save\(tree\): \[0\] is 'text', which is not"),
        ({3: np.ones(1)}, r"save\(tree\): the dict key 3 in \[3\] is not a string"),
    ],
)
def test_trees_that_could_not_come_back_are_refused(tmp_path, tree, message):
    with pytest.raises(TypeError, match=message):
        files.save(tmp_path / "run.npz", tree)
    assert os.listdir(tmp_path) == []


def test_saving_a_prng_key_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"the tree is a PRNG key; save jax.random.key_data\(key"):
        files.save(tmp_path / "run.npz", jax.random.key(0))


def test_metadata_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"save\(\*\*metadata\): metadata must be JSON"):
        files.save(tmp_path / "run.npz", np.ones(1), when=object())


def _bytes_of(write, *arguments, **arrays):
    buffer = io.BytesIO()
    write(buffer, *arguments, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        b"PK\x03\x04 torn",
        _bytes_of(np.save, np.arange(3)),
        _bytes_of(np.savez, rates=np.arange(3)),
        _bytes_of(np.savez, hypergrad=np.array("{}")),
        _bytes_of(np.savez, hypergrad=np.array("[1]")),
        _bytes_of(np.savez, hypergrad=np.array('{"format": 2}')),
        _bytes_of(np.savez, hypergrad=np.array({"format": 1})),  # an object: pickled
    ],
)
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"load\('.*foreign'\): not a whole file written by hyp"):
        files.load(path)


def test_a_torn_file_is_refused_and_a_missing_one_is_missing(tmp_path):
    path = tmp_path / "run.npz"
    files.save(path, np.arange(1000.0))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole file"):
        files.load(path)
    with pytest.raises(FileNotFoundError):
        files.load(tmp_path / "missing.npz")
