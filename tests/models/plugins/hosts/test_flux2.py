import pytest

from tests.models.plugins.denoisers import TEXT, H, W, built, output
from tests.models.plugins.hosts.reach import check
from zoo import apply
from zoo.errors import UserError
from zoo.models.plugins.hosts import Layout


def test_the_picture_lies_behind_the_text_in_both_kinds_of_blocks():
    layout, layers = check("flux2")
    assert layout == Layout((H, W), TEXT)
    assert len(layers) == 4


def test_cached_keys_are_refused():
    denoiser, call = built("flux2")
    apply(denoiser, "clear-8")
    with pytest.raises(UserError, match="without kv_cache"):
        output(denoiser, call | {"kv_cache": object()})
