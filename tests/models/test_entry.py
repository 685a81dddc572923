from collections.abc import Sequence

import pytest

from zoo.models.entry import check_sizes, check_type, constructor_arguments, count, ratio


def test_ratio_survives_the_truncation_of_the_constructor():
    assert all(int(whole * ratio(part, whole)) == part for whole in range(1, 200) for part in range(1, 4 * whole, 7))


def test_count_counts_numbered_children_once():
    assert count({"layers.0.a": 1, "layers.0.b": 1, "layers.11.a": 1, "other.0": 1}, "layers.") == 2


def test_constructor_arguments_are_plain():
    assert constructor_arguments({"self": 1, "__class__": 2, "depths": (1, 2), "c": 3}) == {"depths": [1, 2], "c": 3}


def test_sizes_below_one_are_named():
    check_sizes("Net", depth=1, width=3)
    with pytest.raises(ValueError, match=r"^Net: width must be at least 1, got -3$"):
        check_sizes("Net", depth=1, width=-3)


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "said"),
    [
        (int, [3, -1], [True, 3.0, "3", None, [3]], "a whole number"),
        (float, [3, 0.5], [True, "x", float("nan"), float("inf")], "a number"),
        (float | None, [None, 1.5], ["a"], "a number or null"),
        (bool, [True], [1, "yes"], "true or false"),
        (str, ["x"], [3], "text"),
        (
            Sequence[int],
            [[1, 2], (1,), []],
            ["ab", ["a"], [1.0], 3, {"a": 1}],
            "a list with a whole number per element",
        ),
    ],
)
def test_values_of_another_type_are_named(annotation, good, bad, said):
    for value in good:
        check_type("depths", annotation, value)
        check_type("depths", tuple[int, int], value)
    for value in bad:
        with pytest.raises(ValueError, match=f"depths must be {said}, got "):
            check_type("depths", annotation, value)
