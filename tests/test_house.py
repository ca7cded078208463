"""The arrows between folders, and other rules of the house; see `tests.house`."""

import pytest

from tests import house


@pytest.mark.parametrize("rule", [house.wrong_arrows, house.circles, house.long_functions, house.twice])
def test_the_house_is_in_order(rule: object) -> None:
    assert callable(rule)
    assert list(rule()) == []


def test_a_wrong_arrow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "FLOORS", tuple(reversed(house.FLOORS)))
    assert any("hypergrad.training.inner_loop imports adjoints" in each for each in house.wrong_arrows())


def test_a_long_function_is_counted_without_docstrings_and_comments() -> None:
    source = 'def f(a, b):\n    """One.\n\n    Two."""\n    # why\n    return (\n        a\n    )\n'
    assert list(house.functions(source)) == [("f", 4, 2)]
    assert house.asks_for_the_kind("isinstance(x, Optimizer | None)")
    assert not house.asks_for_the_kind("isinstance(x, int)")
