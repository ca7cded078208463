import errno
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import warnings

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


def test_whatever_happens_to_the_bytes_the_error_names_the_file(tmp_path):
    path = tmp_path / "run.npz"
    tree = {"a": np.arange(20.0), "b": [np.ones(3, np.float32)], "c": jnp.ones(2, jnp.bfloat16)}
    files.save(path, tree, steps=1)
    whole, generator = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):
            damaged[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice([len(whole), generator.randrange(len(whole))])])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile and NumPy may find it odd first
            try:
                files.load(path)
            except ValueError as error:
                assert re.match(r"load\('.*run.npz'\): not a whole file", str(error))
                refused += 1
    assert refused > 300


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"load\('.*'\): it is a folder; give the path of a file"):
        files.load(tmp_path)
    with pytest.raises(OSError, match=r"cannot write '.*', [\d,]+ bytes: Is a directory"):
        files.save(tmp_path, np.ones(2))
    with pytest.raises(OSError, match=r"cannot write '.*missing.*': No such file|cannot write '.*missing"):
        files.save(tmp_path / "missing" / "run.npz", np.ones(2))


def test_a_disk_that_fills_up_in_a_write_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "run.npz"
    files.save(path, np.ones(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(
            OSError, match=r"cannot write '.*run.npz', 8\d,\d{3} bytes: .*as it was"
        ) as found:
            files.save(path, np.ones(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.errno == errno.EFBIG
    np.testing.assert_array_equal(files.load(path)[0], np.ones(2))
    assert os.listdir(tmp_path) == ["run.npz"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]
    orphans = [f".run.npz.{dead.pid}.tmp", f".run.npz.{host}-{dead.pid}-77.tmp"]
    others = [
        f".run.npz.{host}-{os.getppid()}-1.tmp",  # of a process that lives
        f".run.npz.other{host}-{dead.pid}-1.tmp",  # of another machine
        f".run2.npz.{dead.pid}.tmp",
        ".run.npz.mine.tmp",
    ]
    for name in orphans + others:
        (tmp_path / name).touch()
    files.save(tmp_path / "run.npz", np.ones(2))
    assert set(os.listdir(tmp_path)) == {"run.npz", *others}
    (tmp_path / orphans[1]).touch()
    with files.locked(tmp_path / "run.npz", "work()"):
        assert orphans[1] not in os.listdir(tmp_path)


def test_links_stay_links(tmp_path):
    target, link = tmp_path / "real.npz", tmp_path / "link.npz"
    files.save(target, np.ones(1))
    link.symlink_to(target)
    files.save(link, np.ones(2))
    assert link.is_symlink()
    np.testing.assert_array_equal(files.load(target)[0], np.ones(2))
    with files.locked(target, "one()"), pytest.raises(BlockingIOError), files.locked(link, "other()"):
        pass


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 1 on somewhere")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_lock_keeps_others_out_until_its_process_ends_however_it_ends(tmp_path):
    path = tmp_path / "run.npz"
    command = [sys.executable, "-c", HOLD, os.fspath(tmp_path / ".run.npz.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                BlockingIOError,
                match=r"work\(\): another process \(process 1 on somewhere\) works on it; wait",
            ),
            files.locked(path, "work()"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with files.locked(path, "work()"):
        assert os.listdir(tmp_path) == [".run.npz.lock"]
    assert os.listdir(tmp_path) == []


def test_a_lock_is_given_back_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), files.locked(tmp_path / "run", "work()"):
            raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_announced(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    without = r"has no file locks \(No locks available\): nothing keeps"
    with pytest.warns(RuntimeWarning, match=without), files.locked(tmp_path / "run", "work()"):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    without = "this system has no locks"
    with pytest.warns(RuntimeWarning, match=without), files.locked(tmp_path / "run", "work()"):
        pass
