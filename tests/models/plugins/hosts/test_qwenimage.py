from tests.models.plugins.denoisers import TEXT, H, W
from tests.models.plugins.hosts.reach import check
from zoo.models.plugins.hosts import Layout


def test_the_picture_lies_behind_the_text():
    assert check("qwenimage")[0] == Layout((H, W), TEXT)


def test_padding_of_texts_is_not_attended_to():
    assert check("qwenimage", padded=True)[0] == Layout((H, W), TEXT, (TEXT, 4))
