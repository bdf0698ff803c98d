"""What is saved is what the modules are, or saving refuses: never LayerNorm in the place of another norm."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.marian.modeling_marian import MarianDecoder, MarianEncoder

import hf_normswap.modeling.modeling_normswap as swapped
from hf_normswap import (
    BatchNorm,
    NormSwapConfig,
    RegularizedBatchNorm,
    RMSNorm,
    find_norms,
    fold_norms,
    restore_norm,
    set_norm_placement,
    swap_norm,
    swapped_class,
)
from hf_normswap.modeling.configuration_normswap import STOCK_CLASS_GUARD
from hf_normswap.modeling.replace import layer_norm_shares, set_layer_norm_share
from tests.helpers.models import tiny_batch, tiny_config, tiny_model
from tests.helpers.persistence import is_one_sentence, outputs, run_fresh, same, train


STACKS = {
    "bert": ("bert.encoder", "layer", "num_hidden_layers"),
    "roberta": ("roberta.encoder", "layer", "num_hidden_layers"),
    "marian": ("model.encoder", "layers", "encoder_layers"),
    "gpt2": ("transformer", "h", "n_layer"),
}


def change_blocks(model, family, change):
    """Replace the list of blocks by what `change` makes of it, and tell the configuration how many there are."""
    path, name, count = STACKS[family]
    stack = model.get_submodule(path)
    blocks = nn.ModuleList(change(list(getattr(stack, name))))
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(stack, name, blocks)
    setattr(model.config, count, len(blocks))


def saved_and_loaded(model, folder):
    model.eval().save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def refuses_to_save(model, folder, match):
    with pytest.raises(ValueError, match=match) as caught:
        model.save_pretrained(folder)
    assert is_one_sentence(caught.value), caught.value
    assert not folder.exists() or not list(folder.iterdir())


# The record is that of the live modules


@pytest.mark.parametrize("norm", ["rmsnorm", "batchnorm", "powernorm", "layernorm"])
@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize(
    "change",
    [
        lambda old: [*old, *copy.deepcopy(old)],
        lambda old: old[:1],
        lambda old: old[::-1],
        lambda old: [old[1], *copy.deepcopy(old)],
    ],
    ids=["stacked", "dropped", "reversed", "mixed"],
)
def test_blocks_that_were_changed(change, family, norm, tmp_path):
    model = swap_norm(tiny_model(family), norm, where="attention")
    swap_norm(model, "affine", where="ffn", filter_fn=lambda module, name: ".0." in name)
    train(model)
    change_blocks(model, family, change)
    again = saved_and_loaded(model, tmp_path / "folder")
    assert [(s.path, s.kind) for s in find_norms(again)] == [(s.path, s.kind) for s in find_norms(model)]
    assert same(outputs(again), outputs(model))


def test_a_norm_that_was_replaced_by_hand(tmp_path):
    model = swap_norm(tiny_model("bert"), "batchnorm")
    layers = model.bert.encoder.layer
    layers[0].output.LayerNorm = RMSNorm(16, eps=1e-3, bias=False)
    layers[1].output.LayerNorm = nn.LayerNorm(16, eps=model.config.layer_norm_eps)
    layers[1].attention.output.LayerNorm = BatchNorm(16, momentum=0.3)
    again = saved_and_loaded(train(model), tmp_path)
    kinds = ["layernorm", "batchnorm", "rmsnorm", "batchnorm", "layernorm"]
    assert [site.kind for site in find_norms(again)] == kinds
    loaded = again.bert.encoder.layer
    assert (loaded[0].output.LayerNorm.eps, loaded[1].attention.output.LayerNorm.momentum) == (1e-3, 0.3)
    assert same(outputs(again), outputs(model))


@pytest.mark.parametrize(
    ("norm", "option", "value"),
    [("batchnorm", "eps", 0.5), ("rbn", "lambda_mean", 0.0), ("powernorm", "eps", 0.25), ("layernorm", "eps", 0.1)],
)
def test_an_option_that_was_changed(norm, option, value, tmp_path):
    model = swap_norm(tiny_model("roberta"), norm, where="all")
    for site in find_norms(model):
        setattr(site.module, option, value)
    again = saved_and_loaded(train(model), tmp_path)
    assert {getattr(site.module, option) for site in find_norms(again)} == {value}
    assert same(outputs(again), outputs(model))


def test_each_eps_of_a_baseline(tmp_path):
    model = tiny_model("bert")
    for number, site in enumerate(find_norms(model)):
        site.module.eps = 10.0**-number
    again = saved_and_loaded(swap_norm(model, "layernorm", where="all"), tmp_path)
    assert [site.module.eps for site in find_norms(again)] == [10.0**-n for n in range(len(find_norms(model)))]
    assert same(outputs(again), outputs(model))


def test_blocks_in_the_middle_of_a_progressive_swap(tmp_path):
    model = swap_norm(tiny_model("bert"), "batchnorm")
    set_layer_norm_share(model, {site.path: 0.25 * (site.layer + 1) for site in find_norms(model) if site.block})
    train(model)
    change_blocks(model, "bert", lambda old: old[::-1])
    again = saved_and_loaded(model, tmp_path)
    assert layer_norm_shares(again) == layer_norm_shares(model)
    assert same(outputs(again), outputs(model))


@pytest.mark.parametrize("change", [lambda old: old[:1], lambda old: [*old, *copy.deepcopy(old)]])
def test_blocks_of_a_folded_model(change, tmp_path):
    model = train(swap_norm(tiny_model("gpt2"), "batchnorm"))
    assert fold_norms(model).folded
    change_blocks(model, "gpt2", change)
    again = saved_and_loaded(model, tmp_path)
    assert [site.path for site in find_norms(again)] == ["transformer.ln_f"]
    assert same(outputs(again), outputs(model))


def test_a_folded_head_that_another_model_has_not(tmp_path):
    """A language model opens as a classifier, and what that saves opens as a language model again."""
    model = train(swap_norm(tiny_model("bert", "BertForMaskedLM"), "batchnorm", where="all"))
    fold_norms(model, untie=True)
    model.save_pretrained(tmp_path / "lm")
    classifier = swapped.NormSwapBertForTokenClassification.from_pretrained(tmp_path / "lm")
    classifier.save_pretrained(tmp_path / "classifier")
    assert classifier.config.norm_swap == model.config.norm_swap
    assert not find_norms(swapped.NormSwapBertForMaskedLM.from_pretrained(tmp_path / "classifier"))


def test_changed_blocks_in_the_other_placement(tmp_path):
    model = set_norm_placement(tiny_model("bert"), "pre")
    train(swap_norm(model, "rbn"))
    change_blocks(model, "bert", lambda old: [*old, *copy.deepcopy(old)])
    again = saved_and_loaded(model, tmp_path)
    assert same(outputs(again), outputs(model))


def test_an_unchanged_model_keeps_its_record(tmp_path):
    model = swap_norm(tiny_model("bert"), NormSwapConfig("rbn", lambda_mean=0.5), where="ffn")
    record = copy.deepcopy(model.config.norm_swap)
    state = torch.random.get_rng_state()
    model.save_pretrained(tmp_path)
    assert model.config.norm_swap == record
    assert torch.equal(torch.random.get_rng_state(), state)  # runs are resumed exactly


# Defaults that have changed


def forget_options(folder, *names):
    """What an earlier version would have written: options that were the default were not recorded."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for entry in config["norm_swap"]["norms"]:
        for name in names:
            del entry["options"][name]
    path.write_text(json.dumps(config))


def weights_of_penalty(model):
    return {(site.module.lambda_mean, site.module.lambda_var) for site in find_norms(model) if site.kind == "rbn"}


WEIGHTS = {"lambda_mean": 8.0, "lambda_var": 4.0}


@pytest.mark.parametrize("family", STACKS)
def test_a_folder_without_weights_of_the_penalty_has_those_of_its_time(family, tmp_path, monkeypatch):
    model = swap_norm(tiny_model(family), "rbn")
    default = RegularizedBatchNorm(4)
    assert weights_of_penalty(model) == {(default.lambda_mean, default.lambda_var)}
    again = saved_and_loaded(model, tmp_path)
    forget_options(tmp_path, "lambda_mean", "lambda_var")
    monkeypatch.setitem(RegularizedBatchNorm.__init__.__kwdefaults__, "lambda_mean", 8.0)
    assert RegularizedBatchNorm(4).lambda_mean == 8.0
    old = type(again).from_pretrained(tmp_path)
    assert weights_of_penalty(old) == {(0.1, 0.1)}
    later = saved_and_loaded(old, tmp_path / "later")
    assert weights_of_penalty(later) == {(0.1, 0.1)}
    (entry,) = later.config.norm_swap["norms"]
    assert entry["options"] == {"lambda_mean": 0.1, "lambda_var": 0.1}


def test_a_folder_keeps_the_defaults_of_its_time(tmp_path, monkeypatch):
    model = swap_norm(tiny_model("bert"), "rbn")
    weights = weights_of_penalty(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(RegularizedBatchNorm.__init__.__kwdefaults__, "lambda_mean", 8.0)
    monkeypatch.setitem(RegularizedBatchNorm.__init__.__kwdefaults__, "lambda_var", 4.0)
    assert weights_of_penalty(type(model).from_pretrained(tmp_path)) == weights
    assert weights_of_penalty(swap_norm(tiny_model("bert"), "rbn")) == {(8.0, 4.0)}


def test_a_folder_with_one_weight_of_the_penalty(tmp_path):
    again = saved_and_loaded(swap_norm(tiny_model("bert"), NormSwapConfig("rbn", **WEIGHTS)), tmp_path)
    assert weights_of_penalty(again) == {(8.0, 4.0)}
    forget_options(tmp_path, "lambda_var")
    assert weights_of_penalty(type(again).from_pretrained(tmp_path)) == {(8.0, 0.1)}


def test_a_head_of_an_earlier_version_that_this_model_has_not(tmp_path):
    """Its entry goes on as it was meant, with those of the modules that are there."""
    swap_norm(tiny_model("bert", "BertForMaskedLM"), "rbn", where="all").save_pretrained(tmp_path / "whole")
    forget_options(tmp_path / "whole", "lambda_mean", "lambda_var")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (entry,) = config["norm_swap"]["norms"]
    assert entry["options"] == {"lambda_mean": 0.1, "lambda_var": 0.1}
    assert "cls.predictions.transform.LayerNorm" in entry["modules"]


def test_a_weight_of_the_penalty_that_was_changed_to_that_of_earlier_versions(tmp_path):
    model = swap_norm(tiny_model("bert"), NormSwapConfig("rbn", **WEIGHTS))
    for site in find_norms(model):
        if site.kind == "rbn":
            site.module.lambda_mean = 0.1
    assert weights_of_penalty(saved_and_loaded(model, tmp_path)) == {(0.1, 4.0)}


# What no configuration describes


@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize("change", [lambda old: old[:1], lambda old: [*old, *copy.deepcopy(old)]])
def test_a_configuration_of_another_number_of_blocks(change, family, tmp_path):
    model = swap_norm(tiny_model(family), "rmsnorm")
    change_blocks(model, family, change)
    setattr(model.config, STACKS[family][2], 2)
    refuses_to_save(model, tmp_path / "folder", "number of blocks")


def test_blocks_of_both_placements(tmp_path):
    model = swap_norm(tiny_model("bert"), "rmsnorm")
    other = swap_norm(set_norm_placement(tiny_model("bert"), "pre"), "rmsnorm")
    model.bert.encoder.layer[1] = other.bert.encoder.layer[1]
    refuses_to_save(model, tmp_path / "folder", "placement")


def test_one_block_in_two_places(tmp_path):
    model = swap_norm(tiny_model("bert"), "rmsnorm")
    change_blocks(model, "bert", lambda old: [old[0], old[0]])
    refuses_to_save(model, tmp_path / "folder", "would be lost|missing")


def test_a_norm_where_the_class_has_none(tmp_path):
    model = swap_norm(tiny_model("bert"), "batchnorm")
    model.classifier = nn.Sequential(BatchNorm(16), model.classifier)
    refuses_to_save(model, tmp_path / "folder", "classifier.0 is a batchnorm")


# Models that do not know of the norms in them


def test_a_stock_class_with_the_configuration_of_a_swapped_model(tmp_path):
    config = swap_norm(tiny_model("bert", "BertModel"), "batchnorm", where="all").config
    refuses_to_save(BertModel(config), tmp_path / "folder", "save the whole swapped model")
    refuses_to_save(BertForSequenceClassification(config), tmp_path / "folder", "save the whole swapped model")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_stack_of_a_swapped_model(part, tmp_path):
    model = swap_norm(tiny_model("marian"), "batchnorm").model
    stack = getattr(model, part)
    assert isinstance(stack, MarianEncoder | MarianDecoder)
    refuses_to_save(stack, tmp_path / "folder", f"This {type(stack).__name__} has the configuration")


@pytest.mark.parametrize("norm", ["rmsnorm", "batchnorm", "layernorm"])
def test_a_part_that_was_swapped_by_itself(norm, tmp_path):
    model = tiny_model("bert")
    swap_norm(model.bert, norm)
    refuses_to_save(model, tmp_path / "folder", "bert has a swapped norm .* swap the whole model")
    train(model)  # it is right by itself
    restore_norm(model.bert)
    model.save_pretrained(tmp_path / "folder")
    assert same(outputs(type(model).from_pretrained(tmp_path / "folder")), outputs(model))


@pytest.mark.parametrize(("family", "path"), [("bert", "bert.embeddings.LayerNorm"), ("gpt2", "transformer.ln_f")])
def test_a_norm_put_into_a_stock_model_by_hand(family, path, tmp_path):
    model = tiny_model(family)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, RMSNorm(16))
    refuses_to_save(model, tmp_path / "folder", f"{path} has a swapped norm")


def test_a_stock_model_saves_as_ever(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    assert same(outputs(BertForSequenceClassification.from_pretrained(tmp_path)), outputs(model))


def test_the_stock_class_says_how_to_load(tmp_path):
    swap_norm(tiny_model("bert"), "rmsnorm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import hf_normswap") as caught:
        BertForSequenceClassification.from_pretrained(tmp_path)
    assert STOCK_CLASS_GUARD in str(caught.value)


# Encoder-decoder pairs


def pair(norm="batchnorm"):
    size = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = swap_norm(BertModel(tiny_config("bert", **size)), norm)
    decoder = BertLMHeadModel(tiny_config("bert", is_decoder=True, add_cross_attention=True, **size))
    model = EncoderDecoderModel(encoder=encoder, decoder=swap_norm(decoder, norm, where="ffn"))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def pair_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 38, (3, 6), generator=generator)
    return {"input_ids": ids, "labels": ids.flip(1)}


@pytest.mark.parametrize("norm", ["batchnorm", "rmsnorm"])
def test_a_pair_of_swapped_models(norm, tmp_path, caplog):
    model = pair(norm).train()
    model(**pair_batch())
    layers = model.encoder.encoder.layer
    model.encoder.encoder.layer = nn.ModuleList([*layers, *copy.deepcopy(layers)])
    model.encoder.config.num_hidden_layers = 4
    with caplog.at_level("WARNING"):
        model.eval().save_pretrained(tmp_path)
    assert "load it after `import hf_normswap`" in caplog.text
    again = EncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert [s.kind for s in find_norms(again.encoder)] == [s.kind for s in find_norms(model.encoder)]
    assert same(outputs(again, pair_batch()), outputs(model, pair_batch()))


def test_a_pair_with_a_part_that_was_swapped_afterwards(tmp_path):
    model = pair()
    restore_norm(model.encoder)
    swap_norm(model.encoder, "rmsnorm")  # with a configuration that is not the pair's
    refuses_to_save(model, tmp_path / "folder", "encoder has a swapped norm")


# Classes of a user


class Scaled(BertForSequenceClassification):
    """With a forward of its own."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class OwnHead(BertPreTrainedModel):
    """A head that transformers has not."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.scorer = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.scorer(states[:, 0]))


class FromSwapped(swapped.NormSwapBertForSequenceClassification):
    """Derived from a swapped class."""


@pytest.mark.parametrize("norm", ["rmsnorm", "batchnorm"])
@pytest.mark.parametrize("cls", [Scaled, OwnHead, FromSwapped])
def test_a_class_of_the_user(cls, norm, tmp_path, caplog):
    model = cls(tiny_config("bert") if cls is not FromSwapped else cls.config_class(**tiny_config("bert").to_dict()))
    swap_norm(model, norm, where="all")
    assert isinstance(model, cls)
    train(model)
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path)
    if cls is not FromSwapped:
        assert f"swapped_class({cls.__name__}).from_pretrained(...)" in caplog.text
        with pytest.raises(ValueError, match="import hf_normswap"):
            cls.from_pretrained(tmp_path)
    again = swapped_class(cls).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert {site.kind for site in find_norms(again)} == {norm}
    assert same(outputs(again), outputs(model))
    assert same(outputs(pickle.loads(pickle.dumps(model))), outputs(model))
    assert same(outputs(copy.deepcopy(model)), outputs(model))
    restore_norm(model)
    assert type(model) is cls
    assert {site.kind for site in find_norms(model)} == {"layernorm"}
    assert same(outputs(saved_and_loaded(model, tmp_path / "restored")), outputs(model))


def test_an_auto_class_loads_the_class_of_transformers_that_a_user_derived_from(tmp_path):
    model = swap_norm(Scaled(tiny_config("bert")), "batchnorm")
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again).__name__ == "NormSwapBertForSequenceClassification"
    assert same({"logits": 2 * outputs(again)["logits"]}, outputs(model.eval()))


# Baselines


def test_a_baseline_is_swapped_like_any_model(tmp_path):
    model, plain = swap_norm(tiny_model("bert"), "layernorm", where="all"), tiny_model("bert")
    for each in (model, plain):
        swap_norm(each, "batchnorm", where="blocks")
    assert same(outputs(train(model)), outputs(train(plain)))
    kinds = ["layernorm", "batchnorm", "batchnorm", "batchnorm", "batchnorm"]
    assert [site.kind for site in find_norms(saved_and_loaded(model, tmp_path))] == kinds
    with pytest.raises(ValueError, match="already swapped to batchnorm"):
        swap_norm(model, "rbn")


def test_a_baseline_is_calibrated_like_any_model():
    batches = [tiny_batch(tiny_model("bert"), labels=False, seed=seed) for seed in range(4)]
    model, plain = swap_norm(tiny_model("bert").eval(), "layernorm", where="all"), tiny_model("bert").eval()
    for each in (model, plain):
        swap_norm(each, "batchnorm", where="all", calibrate_on=batches)
    assert same(outputs(model), outputs(plain))


def test_a_loaded_baseline_is_swapped(tmp_path):
    swap_norm(tiny_model("gpt2"), "layernorm", where="all").save_pretrained(tmp_path)
    model = swap_norm(swapped.NormSwapGPT2LMHeadModel.from_pretrained(tmp_path), "rmsnorm", where="ffn")
    assert [entry["norm"] for entry in model.config.norm_swap["norms"]] == ["layernorm", "rmsnorm"]
    assert same(outputs(saved_and_loaded(model, tmp_path / "again")), outputs(model))


# In a process that has nothing but the folder


def test_changed_blocks_load_anywhere(tmp_path):
    model = train(swap_norm(tiny_model("bert"), "rmsnorm"))
    change_blocks(model, "bert", lambda old: [*old, *copy.deepcopy(old)])
    model.save_pretrained(tmp_path / "folder")
    torch.save((tiny_batch(model, labels=False), outputs(model, tiny_batch(model, labels=False))), tmp_path / "out.pt")
    script = """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("folder", trust_remote_code=True).eval()
batch, expected = torch.load("out.pt")
torch.testing.assert_close(model(**batch).logits, expected["logits"])
model.bert.encoder.layer = model.bert.encoder.layer[:1]
model.config.num_hidden_layers = 1
model.save_pretrained("again")
again = AutoModelForSequenceClassification.from_pretrained("again", trust_remote_code=True).eval()
assert torch.equal(model(**batch).logits, again(**batch).logits)
"""
    run_fresh(script, tmp_path, package=False)
