"""What `inspect_model` says before a swap is what the functions do after it."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_normswap import calibrate, find_norms, fold_norms, inspect_model, swap_norm
from hf_normswap.core.statistics import statistic_norms
from tests.helpers.architectures import tiny_architecture
from tests.helpers.models import tiny_batch, tiny_model


# Post- and pre-norm, sandwich, tied heads, experts, shared layers, towers, stages.
NAMES = ["bert", "roberta", "electra", "albert", "gpt2", "llama", "gemma2", "mixtral", "t5", "vit", "clip", "swin"]


def state_of(model):
    return type(model), model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before):
    cls, config, tensors = before
    assert type(model) is cls
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_folding_is_foreseen(name):
    model, _ = tiny_architecture(name)
    before = state_of(model)
    foreseen = {norm.name: norm for norm in inspect_model(model).norms}
    assert_untouched(model, before)
    swap_norm(model, "batchnorm", where="all")
    for norm in statistic_norms(model):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    report = fold_norms(model)
    assert report.folded
    assert {norm for norm, audit in foreseen.items() if audit.fold is None} == set(report.folded)
    for norm, reason in report.kept.items():
        assert foreseen[norm].swap is not None or foreseen[norm].fold == reason


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "llama", "vit"])
def test_calibration_is_foreseen(name):
    model, batch = tiny_architecture(name)
    report = inspect_model(model)
    stuck = [norm.name for norm in report.norms if norm.calibrate is not None]
    assert bool(stuck) == (name == "albert")
    batch = {key: value for key, value in batch.items() if key != "labels"}
    swap_norm(model, "batchnorm", where="all")
    if stuck:
        assert all(norm.calls == 2 for norm in report.norms if norm.name in stuck)
        with pytest.raises(ValueError, match="is called 2 times"):
            calibrate(model, [batch])
    else:
        assert {fit.name for fit in calibrate(model, [batch])} == {norm.name for norm in report.norms}


def test_a_model_of_any_size_takes_no_memory_and_prints_short():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    report = inspect_model(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert report.heading() == "LlamaForCausalLM (llama): 65 rmsnorm"
    heading, *rows = report.rows()
    assert heading == (
        "norm", "stack", "sublayer", "layer", "placement", "width", "swap", "calibrate", "fold", "name"
    )  # fmt: skip
    assert [(row[3], row[-1]) for row in rows] == [
        ("0-31", "model.layers.*.input_layernorm"),
        ("0-31", "model.layers.*.post_attention_layernorm"),
        (None, "model.norm"),
    ]
    assert len(report.rows(every=True)) == 66
    assert str(report).startswith(report.heading())
    assert len(str(report).splitlines()) < 12


def test_only_equal_norms_share_a_row():
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    rows = inspect_model(ModernBertModel(ModernBertConfig(vocab_size=9, pad_token_id=0, **sizes))).rows()
    assert [(row[2], row[3]) for row in rows[1:]] == [
        ("embedding", None),
        ("ffn", "0-3"),
        ("attention", "1-3"),  # the first layer has none
        ("final", None),
    ]


def test_json_has_every_norm():
    model, _ = tiny_architecture("qwen3")
    content = json.loads(json.dumps(inspect_model(model).to_dict()))
    assert content["class"] == "Qwen3ForCausalLM"
    assert content["model_type"] == "qwen3"
    assert [norm["name"] for norm in content["norms"]] == [site.name for site in find_norms(model)]
    named = [norm["name"] for norm in content["norms"] if norm["swap"]]
    assert len(named) == 4
    assert all(name.endswith(("q_norm", "k_norm")) for name in named)


@pytest.mark.parametrize(
    ("name", "reason", "count"),
    [
        ("convnext", "channels first", 2),
        ("hubert", "groups of channels", 1),
        ("hubert", "normalises a weight", 1),
        ("mobilebert", "no statistic", 13),
    ],
)
def test_what_looks_like_a_norm_and_is_none_has_a_reason(name, reason, count):
    report = inspect_model(tiny_architecture(name)[0])
    assert sum(reason in why for why in report.left.values()) == count
    assert f"not taken: {next(iter(report.left)).split('.')[0]}" in "\n".join(report.notes())


class WithOthers(BertModel):
    """Calls norms that are no site."""

    def __init__(self, config):
        super().__init__(config)
        self.both = nn.LayerNorm((2, 4))
        self.unused = nn.LayerNorm(8)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        x = super().forward(input_ids, attention_mask=attention_mask)[0]
        x = functional.layer_norm(x, (8,))
        return (self.both(x.unflatten(-1, (2, 4))).flatten(-2),)


def test_norms_of_other_kinds():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    left = inspect_model(WithOthers(config)).left
    assert left == {
        "both": "LayerNorm has a gain of several dimensions, or parts",
        "unused": "LayerNorm is not called by the forward",
        "WithOthers": "calls native_layer_norm, a function and no module",
    }


def test_a_model_without_a_norm_of_tokens():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2)
    report = inspect_model(ResNetForImageClassification(config))
    assert report.norms == []
    assert report.heading().endswith("no norms")
    assert all("BatchNorm2d" in why for why in report.left.values())
    assert "could not be followed" not in str(report)


@pytest.mark.parametrize(
    ("name", "functions", "masks"),
    [
        ("bert", {"convert_to_rmsnorm"}, ["attention_mask"]),
        ("gpt2", set(), ["attention_mask"]),
        ("opt", {"set_norm_placement"}, ["attention_mask"]),
        ("llama", {"convert_to_rmsnorm", "set_norm_placement"}, ["attention_mask"]),
        ("bart", {"convert_to_rmsnorm"}, ["attention_mask", "decoder_attention_mask"]),
        ("convnext", {"convert_to_rmsnorm", "set_norm_placement"}, []),
    ],
)
def test_what_the_whole_model_can(name, functions, masks):
    report = inspect_model(tiny_architecture(name)[0])
    assert report.obstacles.keys() == functions
    assert report.masks == masks


def test_a_swapped_model_shows_its_statistics():
    model = swap_norm(tiny_model("bert").eval(), "batchnorm")
    calibrate(model, [tiny_batch(model, (6, 5), labels=False)])
    report = inspect_model(model)
    swapped = [norm for norm in report.norms if norm.norm == "batchnorm"]
    assert len(swapped) == 4
    for norm in swapped:
        module = model.get_submodule(norm.name)
        assert norm.batches == module.num_batches_tracked
        assert norm.sigma_max == pytest.approx(module.running_var.max().sqrt().item())
        assert norm.r2 is not None
    assert len(report.rows()) == 6  # no two of them are alike
