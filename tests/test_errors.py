from zoo.errors import UserError, nearest


def test_nearest_offers_close_names_and_is_silent_otherwise():
    assert nearest("hatx4", ["hat-x4", "craft-x2"]) == " Did you mean 'hat-x4'?"
    assert nearest("emma", ["ModelSummary", "EMA"]).startswith(" Did you mean 'EMA'")
    assert nearest("Fit", ["fit", "info"]) == " Did you mean 'fit'?"
    assert nearest("zzz", ["fit", "info"]) == ""


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
