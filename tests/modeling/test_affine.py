"""Affine: gain and shift, and nothing of the input's statistics."""

import torch

from hf_normswap import Affine
from tests.helpers.norms import make_norm, make_tokens


def test_it_is_one_map_of_every_token():
    norm, x = make_norm("affine"), make_tokens(2, 5)
    expected = x.numpy() * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    for training in (True, False):
        torch.testing.assert_close(norm.train(training)(x), torch.from_numpy(expected), rtol=1e-15, atol=1e-15)


def test_affine_map_is_gain_and_shift():
    norm = make_norm("affine")
    gain, shift = norm.affine_map()
    assert gain is norm.weight
    assert shift is norm.bias
    assert torch.equal(Affine(3, bias=False).affine_map()[1], torch.zeros(3))
