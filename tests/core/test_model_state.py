"""Models that every function refuses: of another copy of the code, offloaded, without weights, wrapped."""

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForSequenceClassification, Trainer

import hf_normswap
from hf_normswap import (
    NormSwapConfig,
    NormSwapTrainer,
    ProgressiveSwapCallback,
    accumulate_norm_statistics,
    calibrate,
    convert_to_rmsnorm,
    distill,
    export_onnx,
    find_norms,
    fold_gains,
    fold_norms,
    freeze_norm_statistics,
    gradient_norms,
    measure_tid,
    norm_penalty,
    probe_activations,
    reestimate_statistics,
    restore_norm,
    set_norm_placement,
    set_norm_process_group,
    swap_norm,
    update_norm_statistics,
)
from hf_normswap.core.model_state import swapped_parts, unwrap
from hf_normswap.modeling.replace import set_layer_norm_share
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model
from tests.helpers.norms import family_is_causal, norms_in
from tests.helpers.persistence import is_one_sentence, outputs, run_fresh, same, train
from tests.helpers.surgery import state
from tests.helpers.trainer import arguments, rows


LENGTHS = (9, 7, 8, 9)


def data_for(model):
    return [tiny_batch(model, LENGTHS, labels=False)]


def teacher_of(model):
    return tiny_model("bert").eval()


# What reads or changes the statistics of any module; then what takes a model of transformers.
OF_STATISTICS = {
    "norm_penalty": norm_penalty,
    "defer": accumulate_norm_statistics,
    "sync": update_norm_statistics,
    "synchronize": set_norm_process_group,
    "freeze": freeze_norm_statistics,
}
READING = {
    "find_norms": find_norms,
    "measure_tid": lambda model: measure_tid(model, data_for(model)),
    "probe_activations": lambda model: probe_activations(model, data_for(model)),
    "gradient_norms": lambda model: gradient_norms(model, tiny_batch(model, LENGTHS)),
}
CHANGING = {
    "swap_norm": lambda model: swap_norm(model, "rmsnorm", where="all"),
    "swap_norm, calibrated": lambda model: swap_norm(model, "batchnorm", where="all", calibrate_on=data_for(model)),
    "restore_norm": restore_norm,
    "set_norm_placement": lambda model: set_norm_placement(model, "pre"),
    "calibrate": lambda model: calibrate(model, data_for(model)),
    "distill": lambda model: distill(model, teacher_of(model), data_for(model), steps=1),
    "reestimate_statistics": lambda model: reestimate_statistics(model, data_for(model)),
    "fold_norms": fold_norms,
}


def refused(model, call, words):
    """`call(model)` raises one sentence with these words, and leaves the model as it was."""
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call(model)
    assert is_one_sentence(caught.value), caught.value
    after = state(model)
    assert same(*({name: t for name, t in tensors.items() if not t.is_meta} for tensors, _ in (before, after)))
    assert before[1] == after[1]


# Another copy of the code


@pytest.fixture(scope="module")
def other_copy():
    """The model classes once more, as `trust_remote_code` makes them where the package is not imported yet."""
    package = types.ModuleType("other_copy")
    package.__path__ = [str(Path(hf_normswap.__file__).parent / "modeling")]
    sys.modules["other_copy"] = package
    yield importlib.import_module("other_copy.modeling_normswap")
    for name in [name for name in sys.modules if name.partition(".")[0] == "other_copy"]:
        del sys.modules[name]


def copied(other_copy, ours):
    """The model `ours` in the classes of the other copy."""
    config = getattr(other_copy, type(ours.config).__name__).from_dict(ours.config.to_dict())
    model = getattr(other_copy, type(ours).__name__)(config)
    model.load_state_dict(ours.state_dict())
    return model.eval()


SAYS = "made by another copy of this code (other_copy): import hf_normswap first"


@pytest.mark.parametrize("name", OF_STATISTICS | READING | CHANGING)
def test_a_model_of_another_copy_is_refused(name, other_copy):
    model = copied(other_copy, train(swap_norm(tiny_model("bert"), "rbn", where="all")))
    refused(model, (OF_STATISTICS | READING | CHANGING)[name], SAYS)


def test_more_that_refuses_another_copy(other_copy, tmp_path):
    model = copied(other_copy, train(swap_norm(tiny_model("gpt2"), "rbn", where="all")))
    refused(model, lambda model: set_layer_norm_share(model, 0.5), SAYS)
    refused(model, lambda model: convert_to_rmsnorm(model, untie=True), SAYS)
    refused(model, lambda model: export_onnx(model, tmp_path / "onnx"), SAYS)
    with pytest.raises(ValueError, match="import hf_normswap first"):
        norm_penalty(nn.ModuleDict({"inside": model}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["placed", "folded", "calibrated"])
def test_a_copy_without_swapped_norms_is_refused_too(model, other_copy):
    """It has no norm that would tell."""
    ours = swap_norm(tiny_model("bert").eval(), "batchnorm", where="all")
    if model == "placed":
        ours = set_norm_placement(tiny_model("bert").eval(), "pre")
    elif model == "folded":
        fold_norms(ours)
    theirs = copied(other_copy, ours)
    for call in (CHANGING["swap_norm"], CHANGING["restore_norm"], CHANGING["set_norm_placement"], fold_norms):
        refused(theirs, call, SAYS)


def test_a_trainer_refuses_another_copy_before_it_makes_a_folder(other_copy, tmp_path):
    model = copied(other_copy, train(swap_norm(tiny_model("bert"), "rbn", where="all")))

    def make(model):
        options = {"callbacks": [ProgressiveSwapCallback()], "train_dataset": rows("bert", 4)}
        NormSwapTrainer(model, arguments(tmp_path / "run"), **options)

    refused(model, make, SAYS)
    assert not (tmp_path / "run").exists()
    options = {"callbacks": [ProgressiveSwapCallback()], "train_dataset": rows("bert", 4)}
    stock = Trainer(model, arguments(tmp_path / "run"), **options)
    refused(model.train(), lambda model: stock.train(), SAYS)


def test_a_norm_of_another_copy_alone(other_copy):
    norm = importlib.import_module("other_copy.rbn").RegularizedBatchNorm(4)
    for call in OF_STATISTICS.values():
        with pytest.raises(ValueError, match="import hf_normswap first"):
            call(nn.Sequential(nn.Linear(4, 4), norm))


def test_other_modules_with_a_configuration_are_none_of_a_copy():
    class Plain(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.inside = config, swap_norm(tiny_model("bert"), "batchnorm")

    for config in ({"model_type": "x"}, None, types.SimpleNamespace(model_type=3)):
        accumulate_norm_statistics(Plain(config))


def test_remote_code_before_the_package(tmp_path):
    """In a process of its own, as in the first cell of a notebook."""
    train(swap_norm(tiny_model("bert"), "rbn", where="all")).save_pretrained(tmp_path / "model")
    script = """
from transformers import AutoModelForSequenceClassification
options = {"trust_remote_code": True}
model = AutoModelForSequenceClassification.from_pretrained("model", **options)
import hf_normswap
for call in (hf_normswap.norm_penalty, hf_normswap.find_norms, hf_normswap.restore_norm):
    try:
        call(model)
    except ValueError as error:
        assert "transformers_modules" in str(error) and "import hf_normswap first" in str(error), error
    else:
        raise AssertionError(call)
model = AutoModelForSequenceClassification.from_pretrained("model", **options)  # the cure
assert {site.kind for site in hf_normswap.find_norms(model)} == {"rbn"}
"""
    run_fresh(script, tmp_path)


# Offloaded models


def offloaded(model, tmp_path, where="cpu"):
    if where == "disk":
        return disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    return cpu_offload(model, execution_device="cpu", offload_buffers=where == "cpu with buffers")


IS_SWAPPED = {"restore_norm", "calibrate", "distill", "reestimate_statistics", "fold_norms", *READING} - {"find_norms"}


@pytest.mark.parametrize("where", ["cpu with buffers", "disk"])
@pytest.mark.parametrize("name", sorted({*READING, *CHANGING} - {"find_norms"}))
def test_an_offloaded_model_is_refused_and_goes_on_working(name, where, tmp_path):
    model = tiny_model("bert").eval()
    if name in IS_SWAPPED:
        swap_norm(model, "batchnorm", where="all")
        model = model if name == "calibrate" else train(model)
    batch = tiny_batch(model, (7, 5), labels=False)
    expected = outputs(model, batch)
    offloaded(model, tmp_path, where)
    refused(model, {**READING, **CHANGING}[name], "The model is offloaded (bert.embeddings")
    assert same(outputs(model, batch), expected)


def test_more_that_refuses_an_offloaded_model(tmp_path):
    model = offloaded(tiny_model("gpt2").eval(), tmp_path)
    refused(model, lambda model: convert_to_rmsnorm(model, untie=True), "The model is offloaded")
    refused(model, fold_gains, "The model is offloaded")
    refused(model, lambda model: set_norm_placement(model, "post", drop_final=True), "The model is offloaded")
    refused(model, lambda model: export_onnx(model, tmp_path / "onnx"), "The model is offloaded")
    assert not (tmp_path / "onnx").exists()


def test_an_offloaded_teacher_is_refused(tmp_path):
    model = swap_norm(tiny_model("bert").eval(), "batchnorm", where="all")
    teacher = offloaded(tiny_model("bert").eval(), tmp_path)
    data = data_for(model)
    refused(model, lambda model: calibrate(model, data, teacher=teacher), "The teacher is offloaded")
    refused(model, lambda model: distill(model, teacher, data), "The teacher is offloaded")


@pytest.mark.parametrize("change", [swap_norm, restore_norm, fold_norms])
def test_parts_on_disk_and_on_the_cpu(change, tmp_path):
    """As `from_pretrained` puts them there where the memory is too small."""
    model = tiny_model("bert").eval()
    if change is not swap_norm:
        train(swap_norm(model, "batchnorm", where="all"))
    model.save_pretrained(tmp_path / "model")
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    batch = tiny_batch(model, (7, 5), labels=False)
    arguments = ("rmsnorm",) if change is swap_norm else ()
    refused(loaded.eval(), lambda model: change(model, *arguments), "without offloading")
    assert same(outputs(loaded, batch), outputs(model, batch))


@pytest.mark.parametrize(
    ("place", "norm"),
    norms_in(
        [("bert", "disk"), ("marian", "cpu with buffers"), ("gpt2", "cpu")], lambda place: family_is_causal(place[0])
    ),
)
def test_offloaded_models_infer_as_they_did(place, norm, tmp_path):
    family, where = place
    model = train(swap_norm(tiny_model(family), norm, where="all"))
    batch = tiny_batch(model, (7, 5), labels=False)
    expected = outputs(model, batch)
    assert same(outputs(offloaded(model, tmp_path, where), batch), expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_mixture_infers_as_it_did(where, tmp_path):
    model = train(swap_norm(tiny_model("bert"), NormSwapConfig("powernorm", group_scaling=False), where="all"))
    set_layer_norm_share(model, 0.3)
    expected = outputs(model)
    offloaded(model, tmp_path, where)
    for _ in range(2):
        assert same(outputs(model, tiny_batch(model, (7, 5), labels=False, seed=9)), expected)


# Models without weights


@pytest.mark.parametrize("name", sorted(IS_SWAPPED - {"restore_norm"}))
def test_what_needs_weights_refuses_a_model_on_the_meta_device(name):
    model = swap_norm(tiny_model("bert").eval(), "batchnorm", where="all").to("meta")
    refused(model, {**READING, **CHANGING}[name], "is on the meta device (bert.embeddings.word_embeddings.weight)")


def test_a_calibrated_swap_of_a_model_without_weights_is_undone():
    model = tiny_model("bert").eval().to("meta")
    before = state(model)[1]
    with pytest.raises(ValueError, match="on the meta device"):
        swap_norm(model, "batchnorm", calibrate_on=data_for(model))
    assert state(model)[1] == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drop_final", [False, True])
def test_what_changes_places_alone_needs_no_weights(family, drop_final):
    """Built on the meta device and given the weights afterwards, it is the model that was built with them."""
    placement = "post" if family == "gpt2" else "pre"
    built = set_norm_placement(tiny_model(family), placement, drop_final=True)
    expected = outputs(swap_norm(built, "rmsnorm", where="all"))
    model = tiny_model(family).to("meta")
    set_norm_placement(model, placement, drop_final=drop_final)
    set_norm_placement(model, "pre" if placement == "post" else "post", drop_final=drop_final)
    set_norm_placement(model, placement, drop_final=drop_final)
    swap_norm(restore_norm(swap_norm(model, "batchnorm", where="all")), "rmsnorm", where="all")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.load_state_dict(built.state_dict(), assign=True) == ([], [])
    model.tie_weights()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:  # not saved: transformers' own position ids
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, built.get_buffer(name))
    assert same(outputs(model), expected)


# Wrapped models


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "average": AveragedModel,
    "compiled": torch.compile,
    "distributed": DistributedDataParallel,
    "parallel": nn.DataParallel,
    "average of a compiled one": lambda model: AveragedModel(torch.compile(model)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_reading_looks_into_wrappers(wrapper):
    model = train(swap_norm(tiny_model("bert").double(), "batchnorm", where="all"))
    wrapped, data = WRAPPERS[wrapper](model).eval(), data_for(model)
    assert str(measure_tid(wrapped, data)) == str(measure_tid(model, data))
    assert str(probe_activations(wrapped, data)) == str(probe_activations(model, data))
    batch = tiny_batch(model, LENGTHS)
    assert str(gradient_norms(wrapped, batch)) == str(gradient_norms(model, batch))
    reestimate_statistics(wrapped, data)
    reestimate_statistics(model, data)
    assert same(unwrap(wrapped).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"pass its \.(module|_orig_mod)") as caught:
        find_norms(wrapped)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize("wrapper", ["average", "compiled", "parallel"])
@pytest.mark.parametrize("name", sorted(CHANGING.keys() - {"reestimate_statistics"}))
def test_a_change_of_a_wrapped_model_says_what_to_pass(name, wrapper):
    model = tiny_model("bert").eval()
    if name in IS_SWAPPED:
        swap_norm(model, "batchnorm", where="all")
    before = state(model)
    with pytest.raises(ValueError, match=r"wrapped in (AveragedModel|OptimizedModule|DataParallel): ") as caught:
        CHANGING[name](_with_config(WRAPPERS[wrapper](model)))
    assert is_one_sentence(caught.value)
    attribute = "_orig_mod" if wrapper == "compiled" else "module"
    is_structural = name in ("swap_norm", "swap_norm, calibrated", "restore_norm", "set_norm_placement")
    said = "before wrapping or compiling it." if is_structural else f"pass its .{attribute}."
    assert str(caught.value).endswith(said)
    after = state(model)
    assert same(before[0], after[0])
    assert before[1] == after[1]


def _with_config(wrapped):
    """What makes batches for a test reads it off the model."""
    object.__setattr__(wrapped, "config", unwrap(wrapped).config)
    return wrapped


def test_a_wrapped_teacher_says_what_to_pass():
    model = swap_norm(tiny_model("bert").eval(), "batchnorm", where="all")
    teacher = AveragedModel(tiny_model("bert")).eval()
    for call in (calibrate, lambda model, data, teacher: distill(model, teacher, data)):
        with pytest.raises(ValueError, match=r"The teacher is wrapped in AveragedModel: pass its \.module\."):
            call(model, data_for(model), teacher=teacher)


def test_parts_are_the_outermost_swapped_models():
    inner = tiny_model("bert")
    swap_norm(inner.bert, "batchnorm")
    assert list(swapped_parts(inner)) == ["bert"]
    swap_norm(inner, "rmsnorm", where="embedding")
    assert list(swapped_parts(inner)) == [""]
    towers = nn.ModuleList([swap_norm(tiny_model("bert"), "batchnorm"), tiny_model("bert"), inner])
    assert list(swapped_parts(towers)) == ["0", "2"]
