import torch

from zoo.layers.global_mean import GlobalMean


def test_it_is_the_mean_and_has_no_parameters():
    features = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(GlobalMean()(features)[..., 0, 0], features.flatten(2).mean(2))
    assert not GlobalMean().state_dict()


def test_whoever_gathers_is_asked_instead():
    module = GlobalMean()
    module.gather = lambda asked, features: features.new_full((1, 1, 1, 1), float(asked is module))
    assert module(torch.zeros(1, 1, 2, 2)).item() == 1
