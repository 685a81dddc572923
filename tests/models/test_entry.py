from zoo.models.entry import constructor_arguments, count, ratio


def test_ratio_survives_the_truncation_of_the_constructor():
    assert all(int(whole * ratio(part, whole)) == part for whole in range(1, 200) for part in range(1, 4 * whole, 7))


def test_count_counts_numbered_children_once():
    assert count({"layers.0.a": 1, "layers.0.b": 1, "layers.11.a": 1, "other.0": 1}, "layers.") == 2


def test_constructor_arguments_are_plain():
    assert constructor_arguments({"self": 1, "__class__": 2, "depths": (1, 2), "c": 3}) == {"depths": [1, 2], "c": 3}
