"""Models that are unlike those of transformers: each is served, or refused in one sentence and left as it was."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_normswap import (
    calibrate,
    find_norms,
    fold_norms,
    inspect_model,
    probe_activations,
    restore_norm,
    set_norm_placement,
    swap_norm,
)
from hf_normswap.core.norm_sites import describe
from tests.helpers.architectures import tiny_architecture
from tests.helpers.models import tiny_model
from tests.helpers.persistence import is_one_sentence, same


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}


def bert_config(**fields):
    return BertConfig(**SIZES, max_position_embeddings=40, **fields)


def refuses(model, call, *parts):
    """A call is refused in one sentence with these parts, and nothing is changed."""
    before = type(model), copy.deepcopy(model.config.to_dict()), dict(model.named_modules())
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))) as caught:
        call(model)
    assert is_one_sentence(caught.value), caught.value
    assert (type(model), model.config.to_dict()) == before[:2]
    assert dict(model.named_modules()).keys() == before[2].keys()
    assert all(module is before[2][name] for name, module in model.named_modules())
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    assert all(value.is_meta or torch.equal(value, tensors[name]) for name, value in after.items())
    return str(caught.value)


def batches(model):
    return [{"input_ids": torch.randint(3, 30, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}]


# A forward that cannot be followed


class Unreadable(BertPreTrainedModel):
    """Wants an input that nobody can make up."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, edges=None, attention_mask=None):
        return self.norm(self.bert(input_ids, attention_mask=attention_mask)[0]) * edges.mean()


def test_a_forward_that_raises_leaves_the_list_and_all():
    model = Unreadable(bert_config()).eval()
    sites = find_norms(model)
    assert "NoneType" in sites.obstacle
    assert [site.name for site in sites] == [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert {(site.sublayer, site.layer, site.placement, site.block) for site in sites} == {(None, None, None, None)}
    for where in ("blocks", "attention", "encoder", "encoder.ffn", "final"):
        refuses(model, lambda model, where=where: swap_norm(model, "rmsnorm", where=where), "could not be followed")
    assert all(site.kind == "rmsnorm" for site in find_norms(swap_norm(model, "rmsnorm", where="all")))
    ids = torch.randint(3, 30, (2, 5))
    assert model(ids, torch.ones(2)).shape == (2, 5, 8)
    assert [site.kind for site in find_norms(restore_norm(model))] == 6 * ["layernorm"]


@pytest.mark.parametrize(
    "call",
    [lambda model: calibrate(model, [batches(model)[0] | {"edges": torch.ones(3)}]), fold_norms],
    ids=["calibrate", "fold_norms"],
)
def test_a_forward_that_raises_is_neither_fitted_nor_folded(call):
    model = swap_norm(Unreadable(bert_config()).eval(), "batchnorm", where="all")
    refuses(model, call, "could not be followed")


def test_a_forward_that_raises_is_inspected():
    report = inspect_model(Unreadable(bert_config()))
    assert report.obstacles.keys() >= {"where", "calibrate", "fold"}
    assert len(report.rows()) < 7  # norms of layers share a row
    assert all(norm.calls == 0 for norm in report.norms)


class Wordy(Unreadable):
    """Its error is several sentences on several lines."""

    def forward(self, input_ids=None, attention_mask=None):
        raise RuntimeError("This needs a graph, version 2.1 or later. Pass one!\nSee the manual.")


def test_the_reason_is_the_first_sentence_of_the_error():
    model = Wordy(bert_config())
    assert find_norms(model).obstacle == "RuntimeError: This needs a graph, version 2.1 or later"
    refuses(model, lambda model: swap_norm(model, "rmsnorm"), "version 2.1 or later), and the places")


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "qwen3", "mixtral"])
def test_a_classifier_without_padding_token_takes_one_row(name):
    config = tiny_architecture(name)[0].config
    config.pad_token_id = None
    sites = find_norms(AutoModelForSequenceClassification.from_config(config))
    assert sites.obstacle is None
    assert {site.layer for site in sites} == {0, 1, None}


# No norm


class WithoutNorms(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def resnet():
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2))


def without_norms_of_bert():
    class Bert(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 2)
            self.post_init()

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    return Bert(bert_config())


@pytest.mark.parametrize("make", [resnet, without_norms_of_bert])
@pytest.mark.parametrize("where", ["blocks", "all"])
def test_a_model_without_norms(make, where):
    model = make()
    assert find_norms(model) == []
    assert find_norms(model).obstacle is None
    refuses(model, lambda model: swap_norm(model, "batchnorm", where=where), "has no LayerNorm or RMSNorm")


# Code of a user


class MyConfig(PreTrainedConfig):
    model_type = "my_model_of_the_test"

    def __init__(self, hidden_size=8, layers=2, vocab_size=30, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.layers, self.vocab_size = hidden_size, layers, vocab_size


class MyBlock(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x):
        query, key, value = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(query, key, value))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class MyModel(PreTrainedModel):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MyBlock(config.hidden_size) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x))}


def test_a_model_of_a_user_alone_is_read_and_its_swap_refused():
    """It would load from no folder: the sentence says from what to derive it."""
    model = MyModel(MyConfig())
    assert [(site.sublayer, site.layer, site.placement) for site in find_norms(model)] == [
        ("attention", 0, "pre"),
        ("ffn", 0, "pre"),
        ("attention", 1, "pre"),
        ("ffn", 1, "pre"),
        ("final", None, None),
    ]
    said = refuses(model, lambda model: swap_norm(model, "batchnorm"), "derives from no model class")
    assert "derives from no model class" in inspect_model(model).obstacles["swap"]
    assert said.startswith("MyModel")


def test_a_model_without_norms_of_a_user_alone_is_refused():
    refuses(WithoutNorms(bert_config()), lambda model: swap_norm(model, "batchnorm"), "derives from no model class")


def test_placement_stays_with_its_families():
    model = tiny_model("bert")
    for name in ("resnet", "llama", "distilbert"):
        other = resnet() if name == "resnet" else tiny_architecture(name)[0]
        for placement in ("pre", "post"):
            refuses(
                other,
                lambda model, placement=placement: set_norm_placement(model, placement),
                "bert, roberta, xlm-roberta, camembert, electra, ernie, marian, bart, gpt2",
            )
    assert set_norm_placement(model, "pre") is model


# Quantized weights


class Int8Linear(nn.Linear):
    """As those of bitsandbytes: whole numbers, and a scale for each row."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantized():
    model = BertForMaskedLM(bert_config()).eval()
    for layer in model.bert.encoder.layer:
        for parent in (layer.attention.self, layer.attention.output, layer.intermediate, layer.output):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))
    return model.eval()


def test_a_quantized_model_is_swapped_and_restored():
    model = quantized()
    assert [site.sublayer for site in find_norms(model)] == ["embedding", *2 * ["attention", "ffn"], "head"]
    (batch,) = batches(model)
    before = model(**batch).logits
    assert not torch.equal(swap_norm(model, "rmsnorm")(**batch).logits, before)
    assert torch.equal(restore_norm(model)(**batch).logits, before)
    report = inspect_model(model)
    assert report.obstacles.keys() >= {"calibrate", "fold"}
    assert "Int8Linear" in report.obstacles["calibrate"]
    assert "Int8Linear" in report.obstacles["fold"]


@pytest.mark.parametrize(
    "call", [lambda model: calibrate(model, batches(model)), fold_norms], ids=["calibrate", "fold_norms"]
)
@pytest.mark.parametrize("where", ["blocks", "all"])
def test_a_quantized_model_is_neither_corrected_nor_folded(call, where):
    refuses(swap_norm(quantized(), "batchnorm", where=where), call, "Int8Linear")


def test_norms_of_a_quantized_model_are_calibrated_by_themselves():
    model = swap_norm(quantized(), "batchnorm")
    assert len(calibrate(model, batches(model), linears=False)) == 4


# One norm in two places


def shared_norm():
    model = BertForMaskedLM(bert_config()).eval()
    model.bert.encoder.layer[1].output.LayerNorm = model.bert.encoder.layer[0].output.LayerNorm
    return model


def test_a_norm_in_two_places_is_called_twice():
    model = shared_norm()
    site = next(site for site in find_norms(model) if site.name.endswith("layer.0.output.LayerNorm"))
    assert site.calls == 2
    assert "layer.1.output" not in " ".join(site.name for site in find_norms(model))
    assert next(norm for norm in inspect_model(model).norms if norm.name == site.name).calibrate is not None


def test_a_norm_in_two_places_stays_one():
    model = shared_norm()
    refuses(model, lambda model: swap_norm(model, "batchnorm"), "layer.0.output.LayerNorm", "layer.1.output.LayerNorm")
    swap_norm(model, "batchnorm", where="attention")
    (batch,) = batches(model)
    assert model(**batch).logits.isfinite().all()


def test_a_stock_norm_that_is_called_several_times_is_one():
    model, batch = tiny_architecture("albert")
    swap_norm(model, "batchnorm")
    refuses(model, lambda model: calibrate(model, [{k: v for k, v in batch.items() if k != "labels"}]), "2 times")


# No weights


def test_a_model_on_meta():
    with torch.device("meta"):
        model = BertForMaskedLM(bert_config()).eval()
    assert [site.sublayer for site in find_norms(model)] == ["embedding", *2 * ["attention", "ffn"], "head"]
    swap_norm(model, "batchnorm", where="all")
    assert all(parameter.is_meta for parameter in model.parameters())
    refuses(model, lambda model: calibrate(model, batches(model)), "meta device")
    refuses(model, fold_norms, "meta device")
    assert {norm.norm for norm in inspect_model(model).norms} == {"batchnorm"}


# Two models in one


def pair():
    encoder = BertModel(bert_config())
    decoder = BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def test_a_pair_names_its_parts():
    model = pair()
    said = refuses(model, lambda model: swap_norm(model, "batchnorm"), ".encoder", ".decoder")
    assert said.endswith("one by one.")
    refuses(model, lambda model: set_norm_placement(model, "pre"), ".encoder", ".decoder")
    assert ".encoder" in inspect_model(model).obstacles["swap"]


def test_parts_of_a_pair_are_swapped():
    model = pair()
    for part in (model.encoder, model.decoder):
        swap_norm(part, "batchnorm", where="all")
    assert [site.kind for site in find_norms(model.decoder)] == 8 * ["batchnorm"]
    batch = {**batches(model)[0], "labels": torch.randint(3, 30, (3, 4))}
    assert model(**batch).loss.isfinite()


# The description is read once


def test_reading_changes_nothing():
    model = BertForMaskedLM(bert_config()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    describe(model), find_norms(model), inspect_model(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(model.state_dict(), before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


_SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 40,
    "dropout": 0.0,
}
_T5 = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
UNUSUAL = {  # heads that count ends of sentences, products with one input, a model without a vocabulary
    "BartForSequenceClassification": ("BartConfig", _SEQ2SEQ),
    "MBartForSequenceClassification": ("MBartConfig", _SEQ2SEQ),
    "T5ForSequenceClassification": ("T5Config", _T5),
    "UMT5ForSequenceClassification": ("UMT5Config", _T5),
    "FNetForMaskedLM": (
        "FNetConfig",
        {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 40},
    ),
    "CanineForSequenceClassification": (
        "CanineConfig",
        {**SIZES, "vocab_size": None, "local_transformer_stride": 16, "max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_heads_and_families_that_random_tokens_could_not_run(name):
    config, fields = UNUSUAL[name]
    fields = {key: value for key, value in fields.items() if value is not None}
    model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    assert describe(model).obstacle is None
    assert any(site.block for site in find_norms(model))
    swap_norm(model, "rmsnorm")
    assert {site.kind for site in find_norms(model)} >= {"rmsnorm"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_without_parameters_has_the_dtype_and_the_device_of_what_is_around(dtype, device):
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**SIZES, eos_token_id=2)).to(dtype).to(device)
    swap_norm(model, "rmsnorm", where="all")
    for site in find_norms(model):
        assert (site.module.weight.dtype, site.module.weight.device.type) == (dtype, device)


def test_a_norm_without_parameters_is_probed():
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**SIZES, eos_token_id=2)).eval()
    assert len(probe_activations(model, [{"input_ids": torch.randint(30, (2, 6))}])) == 5


@pytest.mark.parametrize(
    "name", ["BartModel", "BartForQuestionAnswering", "BartForSequenceClassification", "MBartModel"]
)
def test_pads_do_not_count_in_a_decoder_whose_inputs_the_model_makes(name):
    """The statistics of the decoder are those of the same texts without padding."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = swap_norm(cls(cls.config_class(**_SEQ2SEQ)), "batchnorm", where="all").train()
        ids = torch.randint(5, 40, (3, 6))
    ids[:, -1] = model.config.eos_token_id
    padded = torch.nn.functional.pad(ids, (0, 4), value=model.config.pad_token_id)
    found = []
    for tokens in (ids, padded):
        each = copy.deepcopy(model)
        each(input_ids=tokens, attention_mask=tokens.ne(model.config.pad_token_id).long())
        found.append({key: value for key, value in each.state_dict().items() if "running" in key})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=key)


TIME_FIRST = {
    "XLNetModel": {"vocab_size": 30, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8},
    "FSMTModel": {
        **{name: size for name, size in _SEQ2SEQ.items() if name != "vocab_size"},
        "langs": ["en", "de"],
        "src_vocab_size": 40,
        "tgt_vocab_size": 40,
    },
}


@pytest.mark.parametrize("norm", ["batchnorm", "rbn", "powernorm", "instancenorm"])
@pytest.mark.parametrize("name", TIME_FIRST)
def test_norms_that_see_the_time_first_have_no_mask(name, norm):
    """With as many texts as tokens the mask of (B, T) would fit, and tell the wrong tokens."""
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**TIME_FIRST[name])).eval()
    refuses(model, lambda model: swap_norm(model, norm), "sees the tokens of a text before the texts of a batch")
    swap_norm(model, "rmsnorm")


def test_a_forward_is_followed_whatever_the_default_device_is():
    """Its description serves all later models of the structure."""
    config = bert_config(type_vocab_size=3)
    model = BertModel(config)
    torch.set_default_device("meta")
    try:
        assert describe(model).obstacle is None
    finally:
        torch.set_default_device(None)
    swap_norm(BertModel(config), "batchnorm", where="blocks")
