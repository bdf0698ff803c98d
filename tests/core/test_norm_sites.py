"""Which norms a model has, and which of them a name stands for: held against lists of module names."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    MarianConfig,
    MarianModel,
    MarianMTModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from hf_normswap import find_norms, swap_norm
from hf_normswap.core.norm_sites import where_names
from tests.helpers.models import FAMILIES, all_heads, tiny_model
from tests.helpers.persistence import is_one_sentence
from tests.helpers.sites import STANDS_FOR, full_model, layer_norms


# The published sizes are the defaults of BERT and GPT-2; the Marian models of OPUS-MT have six layers on either side.
PUBLISHED = [
    (BertModel, BertConfig(), 25),
    (BertForMaskedLM, BertConfig(), 26),
    (RobertaModel, RobertaConfig(), 25),
    (RobertaForSequenceClassification, RobertaConfig(), 25),
    (RobertaForMaskedLM, RobertaConfig(), 26),
    (MarianModel, MarianConfig(encoder_layers=6, decoder_layers=6, d_model=512), 30),
    (MarianMTModel, MarianConfig(encoder_layers=6, decoder_layers=6, d_model=512), 30),
    (GPT2Model, GPT2Config(), 25),
    (GPT2LMHeadModel, GPT2Config(), 25),
]


@pytest.mark.parametrize(("model_class", "config", "number"), PUBLISHED)
def test_published_sizes(model_class, config, number):
    with torch.device("meta"):
        model = model_class(config)
    assert len(find_norms(model)) == number


@pytest.mark.parametrize(("family", "head"), all_heads())
def test_every_layernorm_is_found_in_order(family, head):
    model = tiny_model(family, head)
    sites = find_norms(model)
    assert [site.name for site in sites] == layer_norms(model)
    assert all(model.get_submodule(site.name) is site.module for site in sites)
    assert {site.kind for site in sites} == {"layernorm"}


@pytest.mark.parametrize(("family", "head"), all_heads())
def test_a_path_is_the_same_under_every_head(family, head):
    """The paths of any head are among those of the model that has all norms, where they name the same layers."""
    paths = {site.path: (site.sublayer, site.layer) for site in find_norms(full_model(family))}
    for site in find_norms(tiny_model(family, head)):
        assert paths[site.path] == (site.sublayer, site.layer)


@pytest.mark.parametrize("where", where_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_name_stands_for(family, where):
    model = full_model(family)
    names = layer_norms(model)
    pattern = STANDS_FOR[family].get(where)
    if pattern is None:
        with pytest.raises(ValueError, match="No norm") as caught:
            swap_norm(model, "rmsnorm", where=where)
        assert is_one_sentence(caught.value)
        assert layer_norms(model) == names
        return
    expected = [name for name in names if re.search(pattern, name)]
    assert expected
    swap_norm(model, "rmsnorm", where=where)
    assert [site.name for site in find_norms(model) if site.kind == "rmsnorm"] == expected
    assert layer_norms(model) == [name for name in names if name not in expected]


def test_every_name_stands_for_something():
    assert set(where_names()) >= {name for names in STANDS_FOR.values() for name in names}
    # Those left over name what these families have not, or a stack together with a sublayer that it has in none.
    left = set(where_names()) - {name for names in STANDS_FOR.values() for name in names} - {"query_key", "other"}
    assert all("." in name for name in left)


@pytest.mark.parametrize(
    ("family", "head", "overrides", "name", "fields"),
    [
        ("bert", "BertModel", {}, "embeddings.LayerNorm", ("encoder", "embedding", None, None)),
        ("bert", "BertModel", {}, "encoder.layer.1.output.LayerNorm", ("encoder", "ffn", 1, "post")),
        (
            "bert",
            "BertLMHeadModel",
            {"add_cross_attention": True},
            "bert.encoder.layer.0.crossattention.output.LayerNorm",
            ("decoder", "cross_attention", 0, "post"),
        ),
        ("roberta", "RobertaForMaskedLM", {}, "lm_head.layer_norm", ("encoder", "head", None, None)),
        (
            "roberta",
            "RobertaForCausalLM",
            {},
            "roberta.encoder.layer.1.attention.output.LayerNorm",
            ("decoder", "attention", 1, "post"),
        ),
        ("marian", "MarianModel", {}, "encoder.layers.1.final_layer_norm", ("encoder", "ffn", 1, "post")),
        (
            "marian",
            "MarianForCausalLM",
            {},
            "model.decoder.layers.0.encoder_attn_layer_norm",
            ("decoder", "cross_attention", 0, "post"),
        ),
        ("gpt2", "GPT2Model", {}, "h.1.ln_1", ("decoder", "attention", 1, "pre")),
        ("gpt2", "GPT2DoubleHeadsModel", {}, "transformer.ln_f", ("decoder", "final", None, None)),
    ],
)
def test_what_is_known_of_a_norm(family, head, overrides, name, fields):
    (site,) = [site for site in find_norms(tiny_model(family, head, **overrides)) if site.name == name]
    assert (site.stack, site.sublayer, site.layer, site.placement) == fields


def test_a_norm_of_the_users_own_beside_the_model_is_no_site():
    model = tiny_model("bert")
    model.adapter = nn.LayerNorm(16)
    assert "adapter" not in [site.name for site in find_norms(model)]


def test_the_table():
    model = swap_norm(tiny_model("gpt2"), "pn", where="attention")
    lines = str(find_norms(model)).splitlines()
    assert [line.split() for line in lines] == [
        ["norm", "stack", "sublayer", "layer", "placement", "name"],
        ["powernorm", "decoder", "attention", "0", "pre", "transformer.h.0.ln_1"],
        ["layernorm", "decoder", "ffn", "0", "pre", "transformer.h.0.ln_2"],
        ["powernorm", "decoder", "attention", "1", "pre", "transformer.h.1.ln_1"],
        ["layernorm", "decoder", "ffn", "1", "pre", "transformer.h.1.ln_2"],
        ["layernorm", "decoder", "final", "-", "-", "transformer.ln_f"],
    ]
    starts = [[word.start() for word in re.finditer(r"\S+", line)] for line in lines]
    assert all(start == starts[0] for start in starts[1:])


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ValueError, match="not in a Linear") as caught:
        find_norms(nn.Linear(2, 2))
    assert is_one_sentence(caught.value)
