"""Any architecture of transformers: its norms are swapped, trained, saved, loaded, restored, calibrated and folded."""

import functools

import pytest
import torch
import transformers

from hf_normswap import calibrate, find_norms, fold_norms, norm_penalty, restore_norm, swap_norm
from hf_normswap.core.residual_stream import is_result
from tests.helpers.architectures import architectures, tiny_architecture
from tests.helpers.norms import norms_in
from tests.helpers.persistence import is_one_sentence, run_fresh


ALL = [architecture.name for architecture in architectures()]
AUTO = {architecture.name: architecture.auto for architecture in architectures()}
TAKES_MASK = [architecture.name for architecture in architectures() if architecture.takes_mask]
CALLED_TWICE, READ_OTHERWISE = "albert", "mobilebert"
# Convolutions, or a mixture of three tokens, read what stands at pads.
READS_PADS = ("convbert", "mobilebert")
# One of each kind: post, pre, parallel, sandwich, cross-attention, experts, images, sound, and two towers.
OTHER_KINDS = ["distilbert", "deberta-v2", "opt", "vit", "swin"]
KINDS = ("distilbert", "llama", "gptj", "gemma2", "t5", "mixtral", "swin", "wav2vec2", "clip")


@torch.no_grad()
def results(model, inputs):
    inputs = {name: value.to(model.dtype) if is_float(value) else value for name, value in inputs.items()}
    output = model(**inputs, return_dict=True)
    return {name: value for name, value in output.items() if is_float(value) and is_result(name)}


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ALL)
def test_swapped_trained_saved_and_loaded(name, tmp_path):
    stock, inputs = tiny_architecture(name)
    before = results(stock, inputs)
    cls, count = type(stock), len(find_norms(stock))
    model = swap_norm(stock, "batchnorm", where="all").train()
    swapped = [site.module for site in find_norms(model) if site.kind == "batchnorm"]
    assert count > 0
    assert swapped
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert all(norm.weight.grad is not None and norm.num_batches_tracked > 0 for norm in swapped)
    model.eval().save_pretrained(tmp_path)
    loaded = getattr(transformers, AUTO[name]).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert same(results(loaded, inputs), results(model, inputs))
    for restored in (restore_norm(model), restore_norm(loaded)):
        assert type(restored) is cls
        assert same(results(restored, inputs), before)


@pytest.mark.parametrize("name", KINDS)
def test_other_norms_train_too(name):
    for norm in ("rbn", "powernorm", "rmsnorm", "layernorm"):
        model, inputs = tiny_architecture(name)
        loss = swap_norm(model, norm, where="all").train()(**inputs).loss
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize(("name", "norm"), norms_in(OTHER_KINDS, lambda name: name == "opt", core=[]))
def test_each_other_norm_is_swapped_trained_saved_and_loaded(name, norm, tmp_path):
    model, inputs = tiny_architecture(name)
    model = swap_norm(model, norm, where="blocks").train()
    parameters = [p for site in find_norms(model) if site.kind == norm for p in site.module.parameters()]
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in parameters)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval().save_pretrained(tmp_path)
    loaded = getattr(transformers, AUTO[name]).from_pretrained(tmp_path).eval()
    assert [site.kind for site in find_norms(loaded)] == [site.kind for site in find_norms(model)]
    assert same(results(loaded, inputs), results(model, inputs))


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_changes_nothing(name):
    """In Swin a stage is checkpointed, and each of its blocks once more."""
    seen = []
    for is_on in (False, True):
        model, inputs = tiny_architecture(name)
        swap_norm(model, "rbn", where="blocks").train()
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        (model(**inputs).loss + norm_penalty(model)).backward()
        seen.append({key: value for key, value in model.named_buffers() if "running" in key or "tracked" in key})
        seen[-1] |= {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert seen[0].keys() == seen[1].keys()
    for key, value in seen[0].items():
        assert (seen[1][key] - value).float().norm() <= 1e-4 * value.float().norm() + 1e-6, key


@functools.cache
def calibrated(name):
    model, inputs = tiny_architecture(name)
    swap_norm(model, "batchnorm", where="all")
    batch = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    return model, inputs, calibrate(model, [batch])


@pytest.mark.parametrize("name", [name for name in ALL if name not in (CALLED_TWICE, READ_OTHERWISE)])
def test_calibrated_and_folded(name):
    model, inputs, report = calibrated(name)
    swapped = [site.name for site in find_norms(model) if site.kind == "batchnorm"]
    assert {fit.name for fit in report} == set(swapped)
    before = results(model, inputs)
    folded = fold_norms(model, untie=True)
    assert folded.folded
    assert {*folded.folded, *folded.kept} >= set(swapped)
    after = results(model, inputs)
    for key, value in before.items():
        assert (after[key] - value).norm() <= 1e-5 * value.norm(), key


def test_what_is_called_twice_is_not_calibrated():
    with pytest.raises(ValueError, match="called 2 times") as caught:
        calibrated(CALLED_TWICE)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize("name", [name for name in TAKES_MASK if name not in READS_PADS])
def test_pads_reach_no_statistic(name):
    states = []
    for token in (7, 8):
        model, inputs = tiny_architecture(name)
        ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, token)
        swap_norm(model, "batchnorm", where="all").train()(**{**inputs, "input_ids": ids})
        states.append({key: value for key, value in model.named_buffers() if "running" in key})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_statistics_are_of_32_bits(name, dtype):
    model, _ = tiny_architecture(name)
    swap_norm(model, "batchnorm", where="all").to(dtype)
    assert {value.dtype for key, value in model.named_buffers() if "running" in key} == {torch.float32}


def test_the_tokens_of_a_recording_are_those_that_it_has_samples_for():
    model, inputs = tiny_architecture("wav2vec2")
    swap_norm(model, "batchnorm", where="blocks").train()(**inputs)
    samples = inputs["attention_mask"].sum(1)
    tokens = model._get_feat_extract_output_lengths(samples).sum().item()
    assert {site.module.records[-1].moments.count.item() for site in find_norms(model) if site.layer == 0} == {tokens}


def test_each_tower_has_its_own_tokens():
    """The text of CLIP has padding, its images have none."""
    model, inputs = tiny_architecture("clip")
    swap_norm(model, "batchnorm", where="blocks").train()(**inputs)
    counts = {
        site.name.split(".")[0]: site.module.records[-1].moments.count.item()
        for site in find_norms(model)
        if site.layer is not None
    }
    images = inputs["pixel_values"]
    patches = 1 + (images.shape[-1] // model.config.vision_config.patch_size) ** 2
    assert counts == {"text_model": inputs["attention_mask"].sum().item(), "vision_model": len(images) * patches}


@pytest.mark.parametrize("name", ["t5", "gemma2", "vit"])
def test_a_fresh_process_loads_it(name, tmp_path):
    model, inputs = tiny_architecture(name)
    swap_norm(model, "batchnorm", where="all").train()(**inputs)
    model.eval().save_pretrained(tmp_path)
    torch.save((inputs, results(model, inputs)), tmp_path / "expected.pt")
    run_fresh(_LOAD.format(auto=AUTO[name], folder=str(tmp_path)), tmp_path)


_LOAD = """
import torch, transformers, hf_normswap
folder = {folder!r}
inputs, expected = torch.load(folder + "/expected.pt", weights_only=False)
model = transformers.{auto}.from_pretrained(folder).eval()
with torch.no_grad():
    output = model(**inputs, return_dict=True)
assert all(torch.equal(output[key], value) for key, value in expected.items())
"""
