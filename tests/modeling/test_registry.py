"""Norms by name: spellings, errors, and norms of one's own."""

import pytest
import torch
from torch import nn

from hf_normswap import (
    BatchNorm,
    BatchStatisticNorm,
    Norm,
    NormSwapConfig,
    PowerNorm,
    PowerNormV,
    RegularizedBatchNorm,
)
from hf_normswap.modeling import registry
from hf_normswap.modeling.registry import available_norms, get_norm, register_norm


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_NORMS", dict(registry._NORMS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))


@pytest.mark.parametrize(
    ("spellings", "cls"),
    [
        (["powernorm", "PowerNorm", "power-norm", "power_norm", "Power Norm", "PN", "pn"], PowerNorm),
        (["pnv", "PN-V", "pn_v", "powernorm-v", "PowerNormV"], PowerNormV),
        (["batchnorm", "BatchNorm", "bn", "masked_batchnorm"], BatchNorm),
        (["rbn", "RBN", "regularized_batchnorm", "RegularizedBatchNorm"], RegularizedBatchNorm),
        (["layernorm", "LayerNorm", "ln", "layer norm"], get_norm("layernorm")),
        (["rmsnorm", "RMSNorm", "rms", "RMS-norm"], get_norm("rmsnorm")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_spellings(spellings, cls):
    assert {get_norm(spelling) for spelling in spellings} == {cls}


def test_names_are_their_own():
    for name in available_norms():
        assert get_norm(name).norm_name == name
    assert available_norms() == sorted(available_norms())
    assert {"batchnorm", "layernorm", "pnv", "powernorm", "rbn", "rmsnorm"} <= set(available_norms())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("powernrom", "did you mean 'powernorm'"),
        ("batch_nrom", "did you mean 'batchnorm'"),
        ("qqqqqq", "'batchnorm', .*'layernorm', .*@register_norm"),
        (None, "'batchnorm', .*'layernorm', .*@register_norm"),
    ],
)
def test_unknown_names_get_a_hint(name, hint):
    with pytest.raises(ValueError, match=f"There is no norm {name!r}: .*{hint}"):
        get_norm(name)


@pytest.mark.usefixtures("own_registry")
def test_a_norm_of_ones_own():
    @register_norm("clipped", "clip-norm")
    class ClippedNorm(Norm):
        def __init__(self, num_features, *, limit: float = 1.0, **kwargs):
            super().__init__(num_features, **kwargs)
            self.limit = limit

        def normalize(self, x, mask):
            return x.clamp(-self.limit, self.limit)

    assert get_norm("Clip Norm") is get_norm("clipped") is get_norm("clippednorm") is ClippedNorm
    assert ClippedNorm.option_defaults().keys() == {"eps", "bias", "limit"}
    assert NormSwapConfig("clipped", limit=2.0).options == {"limit": 2.0}
    with pytest.raises(ValueError, match="has no option 'limits': did you mean 'limit'"):
        NormSwapConfig("clipped", limits=2.0)
    norm = ClippedNorm(2, limit=2.0)
    nn.init.constant_(norm.bias, 1)
    assert norm(torch.tensor([[-5.0, 0.5]])).tolist() == [[-1.0, 1.5]]


@pytest.mark.usefixtures("own_registry")
def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match="'bn' belongs to BatchNorm: choose another name"):

        @register_norm("other", "BN")
        class OtherNorm(Norm):
            pass

    assert "other" not in available_norms()


@pytest.mark.usefixtures("own_registry")
def test_a_reloaded_module_may_register_again():
    def define():
        @register_norm("reloaded")
        class ReloadedNorm(Norm):
            pass

        return ReloadedNorm

    first, second = define(), define()
    assert first is not second
    assert get_norm("reloaded") is second


def test_options_are_the_keyword_arguments():
    assert get_norm("layernorm").option_defaults().keys() == {"eps", "bias"}
    assert get_norm("batchnorm").option_defaults().keys() == {"eps", "bias", "momentum", "center_tokens"}
    rbn = {"eps", "bias", "momentum", "center_tokens", "lambda_mean", "lambda_var", "distance"}
    assert get_norm("rbn").option_defaults().keys() == rbn
    powernorm = {"eps", "bias", "num_groups", "group_scaling", "grad_scale", "alpha_fwd", "alpha_bwd"}
    assert get_norm("powernorm").option_defaults().keys() == powernorm


@pytest.mark.parametrize("base", [Norm, BatchStatisticNorm])
def test_what_a_subclass_lacks_is_named(base):
    class Unfinished(base):
        running = {}

    with pytest.raises(NotImplementedError, match="Unfinished must implement normalize"):
        Unfinished(3)(torch.randn(2, 3))
