"""What the experiments share: flags, records, figures, statistics, data."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import cli, figures, records, statistics, workloads
from hypergrad import data

# ---- flags


@dataclass(frozen=True)
class Config:
    data: str = "small"
    steps: int = cli.option(10, "100 % of them")
    rates: tuple[float, ...] = (0.1, 0.2)
    pair: tuple[int, int] = (1, 2)
    window: int | None = None
    late: bool = False
    nested: tuple[tuple[int, int], ...] = ()
    inits: int = cli.option(0, "a word", flag="init", type=len)


PRESETS = {"small": Config(), "large": Config("large", steps=1000)}


def parsed(words, config=PRESETS):
    fast = lambda c: replace(c, steps=1, rates=(0.5,))  # noqa: E731
    return cli.parse("name", "About.", config, words.split(), fast=fast, flags=("checkpoint",), gates={})


def test_without_flags_the_first_configuration_is_run_and_written():
    config, run = parsed("")
    assert config == Config() and run.output == "figures" and not run.fast
    assert run.checkpoint is None and run.gates is None


def test_flags_of_every_type():
    words = (
        "--data large --rates 1 2 3 --pair 3 4 --window 5 --late --init four --checkpoint file --gates 1"
    )
    config, run = parsed(words)
    expected = {"rates": (1.0, 2.0, 3.0), "pair": (3, 4), "window": 5, "late": True, "inits": 4}
    assert config == replace(PRESETS["large"], **expected)
    assert run.checkpoint == "file" and run.gates == "1"


def test_what_is_given_counts_more_than_fast():
    config, run = parsed("--fast --steps 7")
    assert config == Config(steps=7, rates=(0.5,)) and run.fast and run.output is None
    assert parsed("--fast --output here")[1].output == "here"
    assert parsed("--data large --fast")[0] == Config("large", steps=1, rates=(0.5,))


@pytest.mark.parametrize("words", ["--nested 1", "--data medium", "--pair 1", "--steps many"])
def test_other_flags_and_values_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(words)
    assert stop.value.code == 2 and "python -m experiments.name: error" in capsys.readouterr().err


def test_help_names_the_flags_with_their_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "About." in text and "100 % of them (default 10)" in text and "(default 0.1 0.2)" in text
    assert "--data {small,large}" in text and "--no-late" in text


def test_what_is_no_dataclass_has_no_flags_of_its_own():
    configs = (Config(), Config("other"))
    both = [cli.parse("name", None, configs, words, fast=lambda c: c[:1])[0] for words in ([], ["--fast"])]
    assert both == [configs, configs[:1]]


# ---- records


def test_records_hold_plain_numbers_and_versions(tmp_path):
    path = tmp_path / "new" / "record.json"
    difference = statistics.Difference(0.5, np.float32(0.25))
    arrays = {"none": np.array([1.0, np.nan]), "jax": jnp.arange(2), 3: -np.inf, "bool": np.bool_(True)}
    records.write(path, {"config": Config(), "found": [difference], **arrays})
    record = records.read(path)
    assert set(record.pop("versions")) == {"hypergrad", "jax", "numpy"}
    assert record["config"] == json.loads(json.dumps(Config().__dict__))
    assert record["found"] == [{"mean": 0.5, "standard_error": 0.25}]
    assert (record["none"], record["jax"], record["3"], record["bool"]) == ([1.0, None], [0, 1], None, True)


# ---- figures


def lightness(colour):
    """``L*`` of CIELAB, 0 for black and 100 for white, from the luminance of an sRGB colour."""
    levels = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_colours_read_in_grey_too():
    levels = sorted(lightness(colour) for colour in figures.COLOURS)
    assert np.diff([*levels, 100.0]).min() > 18  # and the last from the paper
    looks = [figures.look(k) for k in range(len(figures.LINES))]
    assert len({str(look) for look in looks}) == len(looks)
    shades = [lightness("#" + "".join(f"{round(255 * x):02x}" for x in c[:3])) for c in figures.shades(9)]
    assert np.diff(shades).min() > 5


def test_figure_and_record_stand_beside_each_other(tmp_path):
    made, axes = figures.figure(1, 2)
    figures.lines(axes[0, 0], {"one": [1.0, 2.0], "two": jnp.ones(3)})
    figures.save(made, tmp_path / "new" / "name.png", {"x": 1})
    assert {path.name for path in Path(tmp_path / "new").iterdir()} == {"name.png", "name.json"}


def drawn(array, **options):
    made, axes = figures.figure()
    figures.images(axes[0, 0], array, **options)
    made.draw_without_rendering()
    return axes[0, 0].get_images()[0], axes[0, 0]


def test_images_stand_in_rows_apart_by_an_empty_pixel():
    array = np.arange(1.0, 19.0).reshape(3, 2, 3)
    image, axes = drawn(array, columns=2, names="ab")
    mosaic = image.get_array().filled(np.nan)
    assert mosaic.shape == (5, 7)
    np.testing.assert_array_equal(mosaic[:2, :3], array[0])
    np.testing.assert_array_equal(mosaic[:2, 4:], array[1])
    np.testing.assert_array_equal(mosaic[3:, :3], array[2])
    assert np.isnan(mosaic[2]).all() and np.isnan(mosaic[3:, 3:]).all()
    assert axes.get_xticks().tolist() == [1.0, 5.0]  # the middle of each column


def test_scale_is_symmetric_and_as_large_as_the_images_or_the_limit():
    array = np.array([[[-3.0, 1.0]]])
    assert drawn(array)[0].get_clim() == (-3, 3)
    assert drawn(array, limit=0.5)[0].get_clim() == (-0.5, 0.5)


@pytest.mark.parametrize("array", [np.ones((2, 2)), np.zeros((1, 2, 2)), np.full((1, 2, 2), np.nan)])
def test_what_is_no_stack_of_images_is_refused(array):
    with pytest.raises(ValueError, match=r"images\(axes, array, limit=None\).*pass finite images"):
        drawn(array)


# ---- statistics


def test_standard_errors_and_paired_differences():
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(statistics.standard_error(x), x.std(axis=0, ddof=1) / np.sqrt(5))
    found = statistics.paired(x[:, 0] + 1.0, x[:, 0])
    assert found.mean == pytest.approx(1.0) and found.standard_error == pytest.approx(0.0, abs=1e-12)
    noise = np.array([1.0, -1.0, 1.0, -1.0])  # standard error 1/√3
    assert [statistics.paired(noise + shift, 0.0).sign() for shift in (1.2, 1.1, -1.1, -1.2)] == [
        1,
        0,
        0,
        -1,
    ]
    assert statistics.paired(noise + 1.2, 0.0).sign(errors=3) == 0
    assert str(statistics.Difference(-0.5, 0.25)) == "-0.5000 ± 0.2500"


def test_grids_are_ranked_and_have_edges():
    tried = statistics.grid(momentum=(0.5, 0.1, 0.9), damping=(0.1, 0.2, 0.3))
    assert statistics.edges({"momentum": 0.1, "damping": 0.2}, tried) == ["momentum"]
    assert statistics.edges({"momentum": 0.5, "damping": 0.3}, tried) == ["damping"]
    assert statistics.ranked([3.0, np.nan, 1.0, np.inf], lambda x: x)[:2] == [1.0, 3.0]


def test_the_grid_grows_until_the_best_is_inside():
    # The best rate is below the grid; the second axis makes no difference, and one of one value is held.
    loss = lambda point: abs(np.log(point[0] / 0.01))  # noqa: E731
    axes = [(0.1, 0.3), (1e3, 3e3), (1.0,)]
    found = statistics.widening(axes, loss, lambda point: True, times=5)
    wider = [(0.003, 0.01, 0.03, 0.1, 0.3), (1e3, 3e3), (1.0,)]
    assert found == ((0.01, 1e3, 1.0), wider, True)
    assert not statistics.widening(axes, loss, lambda point: True, times=1).inside
    stable = statistics.widening(axes[:2], loss, lambda point: point[0] > 0.2, times=0)
    assert stable.best == (0.3, 1e3)


# ---- data


def test_images_are_flat_and_centred():
    loaded = data.digits()
    flat = workloads.flat(loaded)
    assert flat.images.shape == (len(loaded.train_labels), 64)
    np.testing.assert_allclose(flat.images.mean(axis=0), 0, atol=1e-5)
    plain = workloads.flat(loaded, centred=False)
    np.testing.assert_array_equal(plain.test_images, loaded.test_images.reshape(-1, 64))
    assert workloads.load("digits", None).name == loaded.name


def test_wrong_labels_are_wrong_and_the_others_as_they_were():
    found, wrong = workloads.wrong_labels("digits", None, 0.25, seed=0)
    right, none = workloads.wrong_labels("digits", None, 0.0, seed=0)
    assert wrong.mean() == pytest.approx(0.25, abs=1e-3) and not none.any()
    np.testing.assert_array_equal(found.labels != right.labels, wrong)
    assert len(found.clean_labels) == len(found.test_labels) == 180


def test_what_was_computed_is_remembered_for_the_same_question(tmp_path):
    calls = []

    def compute():
        calls.append(None)
        return {"loss": np.array([0.1, np.float32(0.1)])}

    path = tmp_path / "folder" / "found.json"
    first = records.remembered(path, [1, np.float32(0.1)], compute)
    again = records.remembered(path, [1, np.float32(0.1)], compute)
    assert first == again == {"loss": [0.1, float(np.float32(0.1))]} and len(calls) == 1
    records.remembered(path, [2, np.float32(0.1)], compute)
    records.remembered(None, [2, np.float32(0.1)], compute)
    assert len(calls) == 3
