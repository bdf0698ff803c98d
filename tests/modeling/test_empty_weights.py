"""Models that are built without memory and get their weights afterwards, by accelerate and by transformers."""

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_normswap import find_norms, fold_norms, reestimate_statistics, set_norm_placement, swap_norm
from hf_normswap.modeling.replace import set_layer_norm_share
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import outputs, same, train


AUTO = {
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
}
NORMS = ["batchnorm", "rbn", "pnv", "powernorm", "rmsnorm"]


def build(family, folder, **options):
    with init_empty_weights(**options):
        model = AUTO[family].from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return model


def load(model, folder, **options):
    return load_checkpoint_and_dispatch(model, folder, **{"device_map": {"": "cpu"}, **options}).eval()


def trained(family, norm, where="all"):
    return train(swap_norm(tiny_model(family), norm, where=where))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", AUTO)
def test_what_accelerate_loads_is_what_was_saved(family, norm, tmp_path):
    model = trained(family, norm)
    model.save_pretrained(tmp_path)
    empty = build(family, tmp_path)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert not [name for name, buffer in empty.named_buffers() if buffer.is_meta]
    loaded = load(empty, tmp_path)
    batch = tiny_batch(model, (7, 5), labels=False)
    assert same(outputs(loaded, batch), outputs(model, batch))
    train(loaded)  # with all that a training needs
    if norm != "rmsnorm":
        reestimate_statistics(loaded, [batch])


def mixture():
    model = trained("bert", "batchnorm")
    set_layer_norm_share(model, 0.5)
    return model


def folded():
    model = trained("bert", "batchnorm", where="blocks")
    fold_norms(model)
    return model


SPECIAL = {
    "placed": lambda: train(swap_norm(set_norm_placement(tiny_model("bert"), "pre"), "powernorm", where="all")),
    "mixture": mixture,
    "folded": folded,
}


@pytest.mark.parametrize("case", SPECIAL)
def test_every_kind_of_record_is_built_without_memory(case, tmp_path):
    model = SPECIAL[case]()
    model.save_pretrained(tmp_path)
    empty = build("bert", tmp_path)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert same(outputs(load(empty, tmp_path)), outputs(model))


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_buffers_without_memory_too(norm, tmp_path):
    """A stock GPT-2 loads then, as it has no buffer that is not saved; so does a swapped one."""
    stock = tiny_model("gpt2").eval()
    for model in (stock, trained("gpt2", norm)):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        empty = build("gpt2", folder, include_buffers=True)
        saved = [buffer for name, buffer in empty.named_buffers() if name in empty.state_dict()]
        assert all(buffer.is_meta for buffer in saved)
        loaded = load(empty, folder)
        batch = tiny_batch(model, (7, 5), labels=False)
        assert same(outputs(loaded, batch), outputs(model, batch))
        train(loaded)


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_parts_that_go_to_disk(norm, tmp_path):
    model = trained("bert", norm)
    model.save_pretrained(tmp_path / "model")
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    batch = tiny_batch(model, (7, 5), labels=False)
    loaded = load(build("bert", tmp_path / "model"), tmp_path / "model", offload_buffers=True, **options)
    assert same(outputs(loaded, batch), outputs(model, batch))
    # Without that accelerate loads no buffer of them, of no module: it is not taken for what was saved.
    loaded = load(build("bert", tmp_path / "model"), tmp_path / "model", **options)
    assert loaded(**batch).logits.isnan().all()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **options).eval()
    assert same(outputs(loaded, batch), outputs(model, batch))


def test_weights_that_are_made_afresh_have_fresh_statistics(tmp_path):
    """As a training from scratch makes them after building without memory."""
    trained("bert", "powernorm").save_pretrained(tmp_path)
    model = build("bert", tmp_path).to_empty(device="cpu")
    model.initialize_weights()
    for site in find_norms(model):
        assert site.module.running_power.eq(1).all()
        assert not site.module.nu.any()
        assert not site.module.num_batches_tracked
        assert not site.module.pending.any()


def test_a_swap_makes_buffers_where_the_norm_was():
    """Not on the default device: the model may have moved since."""
    model = tiny_model("bert")
    with torch.device("meta"):
        swap_norm(model, "powernorm", where="all")
    assert not [name for name, buffer in model.named_buffers() if buffer.is_meta]
    train(model)
    on_meta = swap_norm(tiny_model("bert").to("meta"), "powernorm", where="all")
    assert all(buffer.is_meta for site in find_norms(on_meta) for buffer in site.module.buffers())
    assert isinstance(on_meta.classifier, nn.Linear)


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_a_configuration_on_the_default_device(norm):
    config = trained("bert", norm).config
    model = AutoModelForSequenceClassification.from_config(config)
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert all(buffer.isfinite().all() for buffer in model.buffers() if buffer.is_floating_point())
    with torch.device("meta"):
        built = AutoModelForSequenceClassification.from_config(config)
    assert {tensor.device.type for tensor in built.state_dict().values()} == {"meta"}
