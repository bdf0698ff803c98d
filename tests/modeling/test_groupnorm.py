"""Group norm of each token, against its equation and PyTorch's own."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hf_normswap import NormSwapConfig, find_norms, swap_norm
from hf_normswap.modeling.norms import GroupNorm
from tests.helpers.models import tiny_model
from tests.helpers.norms import assert_computes, assert_gradients_are_those_of_differences
from tests.helpers.persistence import outputs, same, train


def test_follows_the_formula_and_agrees_with_pytorch():
    norm = GroupNorm(12, num_groups=3, eps=1e-3).double()
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.uniform_(norm.bias)

    def formula(x):
        groups = np.split(x, 3, axis=-1)
        return np.concatenate(
            [(g - g.mean(-1, keepdims=True)) / np.sqrt(g.var(-1, keepdims=True) + 1e-3) for g in groups], axis=-1
        )

    assert_computes(norm, formula)
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(norm(x), functional.group_norm(x, 3, norm.weight, norm.bias, 1e-3))
    assert_gradients_are_those_of_differences(GroupNorm(4, num_groups=2, eps=1.0).double(), None)


@pytest.mark.parametrize(("channels", "groups"), [(768, 32), (64, 8), (16, 2), (7, 1), (72, 1), (24, 1), (128, 16)])
def test_default_groups(channels, groups):
    assert GroupNorm(channels).num_groups == groups


def test_groups_have_to_divide_the_channels():
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4 groups"):
        GroupNorm(6, num_groups=4)


def test_groups_are_saved(tmp_path):
    model = train(swap_norm(tiny_model("gpt2"), NormSwapConfig("groupnorm", num_groups=4)))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {site.module.num_groups for site in find_norms(loaded) if site.kind == "groupnorm"} == {4}
    assert same(outputs(loaded), outputs(model))
