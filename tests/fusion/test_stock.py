"""Stock checkpoints of converted models: transformers alone computes what the model does."""

import json

import pytest
import torch
from torch import nn

from hf_normswap import (
    BatchNorm,
    NormSwapConfig,
    calibrate,
    convert_to_rmsnorm,
    find_norms,
    fold_norms,
    restore_norm,
    save_stock,
    set_norm_placement,
    swap_norm,
)
from hf_normswap.modeling.model_norms import read_norm
from tests.helpers.architectures import architectures, tiny_architecture
from tests.helpers.folding import relative_error, swapped
from tests.helpers.models import tiny_model
from tests.helpers.persistence import clone, is_one_sentence, outputs, run_fresh, same


CENTERED = NormSwapConfig("batchnorm", center_tokens=True)
SHIFTLESS = NormSwapConfig("pnv", bias=False)
MODELS = {
    "bert": CENTERED,
    "roberta": NormSwapConfig("rbn", center_tokens=True),
    "mpnet": CENTERED,
    "vit": CENTERED,
    "clip": CENTERED,
    "gpt2": CENTERED,
    "dinov2": CENTERED,
    "llama": NormSwapConfig("batchnorm", bias=True),
    "t5": SHIFTLESS,
    "gemma2": SHIFTLESS,
}


def converted(name, dtype=torch.float32):
    """A calibrated model, and a batch."""
    model, batch = tiny_architecture(name)
    others = tiny_architecture(name, seed=1)[1]
    swap_norm(model, MODELS[name], where="all", calibrate_on=[batch, others])
    return model.to(dtype), batch


def test_stock_models_compute_the_same_without_the_package(tmp_path):
    expected, reports = {}, {}
    for name in MODELS:
        model, batch = converted(name)
        reports[name] = save_stock(model, tmp_path / name)
        torch.save(batch, tmp_path / f"{name}.batch")
        expected[name] = outputs(model, batch)
        assert not list((tmp_path / name).glob("*.py"))
        assert "norm_swap" not in json.loads((tmp_path / name / "config.json").read_text())
        assert reports[name].norms == len(find_norms(model))
        assert reports[name].error < 1e-5
    autos = {each.name: each.auto for each in architectures() if each.name in MODELS}
    script = """
import json, sys, torch, transformers
for name, auto in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto).from_pretrained(name)
    assert type(model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        output = model.eval()(**torch.load(f"{name}.batch"))
    torch.save({key: value for key, value in output.items() if torch.is_tensor(value)}, f"{name}.outputs")
"""
    run_fresh(script, tmp_path, json.dumps(autos), package=False)
    for name in MODELS:
        assert relative_error(expected[name], torch.load(tmp_path / f"{name}.outputs")) < 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_bfloat16(name, tmp_path):
    exact, batch = converted(name)
    wanted = outputs(exact, batch)
    model = exact.to(torch.bfloat16)
    rounding = relative_error(wanted, outputs(model, batch))
    save_stock(model, tmp_path / "stock")
    loaded = type(tiny_architecture(name)[0]).from_pretrained(tmp_path / "stock", dtype=torch.bfloat16)
    assert relative_error(wanted, outputs(loaded, batch)) < 2 * rounding + 0.01


def test_a_gain_keeps_its_digits(tmp_path):
    """The root of eps is a power of 2: the stored gain, divided by it, is the gain of the map to the last bit."""
    model, _ = converted("bert")
    save_stock(model, tmp_path / "stock")
    loaded = type(tiny_architecture("bert")[0]).from_pretrained(tmp_path / "stock")
    for site in find_norms(model):
        gain = site.module.map_of_statistics()[0].float()
        assert torch.equal(loaded.get_submodule(site.name).weight / 2**20, gain)


@pytest.mark.parametrize(("name", "kind"), [("llama", "rmsnorm"), ("t5", "rmsnorm"), ("bert", "layernorm")])
def test_the_norms_of_the_folder_are_what_they_are(name, kind, tmp_path):
    """Their outputs without gain are a millionth of the usual ones."""
    model, _ = converted(name)
    save_stock(model, tmp_path / "stock")
    loaded = type(tiny_architecture(name)[0]).from_pretrained(tmp_path / "stock")
    assert {site.kind for site in find_norms(loaded)} == {kind}
    assert {read_norm(site.module).eps for site in find_norms(loaded)} == {2.0**40}


def test_a_large_variance_does_not_count(tmp_path):
    """Tokens with channels of 1000, as attention sinks have them."""
    model, _ = tiny_architecture("gpt2")
    model.transformer.wte.weight.data[:, :2] += torch.tensor([1000, -1000])
    swap_norm(model, CENTERED, where="all")
    for site in find_norms(model):
        site.module.running_var.fill_(1e4)
    assert save_stock(model, tmp_path / "stock").error < 1e-5


def in_eval(family, norm, **options):
    return swap_norm(tiny_model(family).eval(), norm, where="all", **options)


def moved():
    return swap_norm(set_norm_placement(tiny_model("bert").eval(), "pre"), CENTERED, where="all")


def folded():
    model = in_eval("gpt2", "batchnorm")
    fold_norms(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: in_eval("bert", "batchnorm"), "center_tokens=True"),
        (lambda: swapped("gpt2", dtype=torch.float32), "center_tokens=True"),
        (lambda: in_eval("marian", CENTERED), "eps that its configuration does not hold"),
        (lambda: swap_norm(tiny_model("bert").eval(), CENTERED), "swap it too"),
        (lambda: in_eval("gpt2", "powernorm"), "needs statistics of each token"),
        (lambda: in_eval("gpt2", "rmsnorm"), "needs statistics of each token"),
        (lambda: in_eval("bert", CENTERED).half(), "range of float16"),
        (lambda: in_eval("bert", CENTERED).train(), "training mode"),
        (lambda: tiny_model("bert").eval(), "no swapped norms"),
        (lambda: shifted_t5(), "has a shift"),
        (moved, "another placement"),
        (folded, "folded away"),
    ],
)
def test_refused_and_nothing_written(make, message, tmp_path):
    model = make()
    before = clone(model.state_dict().items())
    with pytest.raises(ValueError, match=message) as error:
        save_stock(model, tmp_path / "stock")
    assert is_one_sentence(error.value)
    assert not list(tmp_path.iterdir())
    assert same(model.state_dict(), before)


def shifted_t5():
    model = swap_norm(tiny_architecture("t5")[0], NormSwapConfig("pnv", bias=True), where="all")
    for site in find_norms(model):
        site.module.bias.data.fill_(0.5)
    return model


def without_a_mean():
    """The stream of GPT-2 has no mean over the channels any more, and a LayerNorm would subtract none."""
    model = restore_norm(convert_to_rmsnorm(tiny_architecture("gpt2")[0], untie=True))
    return swap_norm(model, "batchnorm", where="all")


def test_a_stream_without_a_mean_needs_no_centering(tmp_path):
    assert save_stock(without_a_mean(), tmp_path / "stock").error < 1e-5


def test_center_tokens():
    """It is the BatchNorm of tokens without their mean; in training, too, and in the fit of a calibration."""
    torch.manual_seed(0)
    norm, plain = BatchNorm(6, center_tokens=True).double(), nn.BatchNorm1d(6).double()
    x = torch.randn(50, 6, dtype=torch.float64) + 3
    for mode in (True, False):
        norm.train(mode), plain.train(mode)
        torch.testing.assert_close(
            norm(x), plain(x - x.mean(-1, keepdim=True)), rtol=1e-2 if not mode else 1e-9, atol=0
        )
    assert norm.affine_map() is None


def test_center_tokens_follows_layer_norm_where_the_mean_moves(tmp_path):
    """A mean that is common to all channels is nothing to LayerNorm, nor to this norm."""
    model, batch = tiny_architecture("bert")
    wanted = outputs(model, batch)
    model.bert.embeddings.word_embeddings.weight.data += 2 * torch.randn(
        len(model.bert.embeddings.word_embeddings.weight), 1
    )
    assert relative_error(wanted, outputs(model, batch)) < 1e-4
    swap_norm(model, CENTERED, where="embedding")
    report = calibrate(model, [batch])
    assert report[0].r2 > 0.8
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.bert.embeddings.LayerNorm.center_tokens
    assert relative_error(outputs(model, batch), outputs(loaded, batch)) < 1e-6
