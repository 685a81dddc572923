import torch

from zoo.layers.global_mean import GlobalGram, GlobalMean


def test_it_is_the_mean_and_has_no_parameters():
    features = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(GlobalMean()(features)[..., 0, 0], features.flatten(2).mean(2))
    assert not GlobalMean().state_dict()


def test_whoever_gathers_is_asked_instead():
    module = GlobalMean()
    module.gather = lambda asked, features: features.new_full((1, 1, 1, 1), float(asked is module))
    assert module(torch.zeros(1, 1, 2, 2)).item() == 1


def test_a_gram_is_the_mean_of_products_within_each_head():
    features = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    gram = GlobalGram(3)(features)
    assert gram.shape == (2, 3, 2, 2)
    torch.testing.assert_close(gram[1, 2, 0, 1], (features[1, 4] * features[1, 5]).mean())
    assert not GlobalGram(3).state_dict()


def test_a_gram_keeps_its_precision_inside_autocast():
    features = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gram = GlobalGram(2)(features)
    torch.testing.assert_close(gram, GlobalGram(2)(features.float()))


def test_what_is_asked_instead_may_ask_for_the_own_value():
    module = GlobalGram(1)
    module.gather = lambda asked, features: 2 * asked.own(features)
    features = torch.rand(1, 2, 3, 3)
    torch.testing.assert_close(module(features), 2 * module.own(features))
