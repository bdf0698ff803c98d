"""Adapters of PEFT on swapped models: the running statistics that they train are theirs, and are saved with them."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForMaskedLM

from hf_normswap import (
    NormSwapConfig,
    NormSwapTrainer,
    NormSwapTrainingArguments,
    ProgressiveSwapCallback,
    find_norms,
    fold_norms,
    measure_tid,
    swap_norm,
)
from hf_normswap.modeling import modeling_normswap
from hf_normswap.modeling.activation_checkpointing import CHECKPOINTING
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence, outputs, run_fresh, same, train
from tests.helpers.trainer import HEADS, rows


peft = pytest.importorskip("peft", minversion="0.21")

FAMILIES = list(HEADS)
NORMS = [NormSwapConfig("rbn"), NormSwapConfig("batchnorm"), NormSwapConfig("powernorm", group_scaling=False)]
PLACES = {"bert": ["query"], "roberta": ["query"], "marian": ["q_proj"], "gpt2": ["c_attn"]}


def swapped_base(family, norm, head=None):
    """A swapped model that has been trained: an adapter comes to statistics that are not those of a new norm."""
    return train(swap_norm(tiny_model(family, head or HEADS[family]), norm, where="all"))


def with_adapter(base, saves_norms=True):
    family = base.config.model_type.removeprefix("normswap_")
    torch.manual_seed(0)
    names = [site.name for site in find_norms(base)] if saves_norms else None
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=PLACES[family], modules_to_save=names))


def make_trainer(model, folder, **options):
    family = model.config.model_type.removeprefix("normswap_")
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, **options}
    args = NormSwapTrainingArguments(str(folder), **settings)
    return NormSwapTrainer(model, args, train_dataset=rows(family, 16))


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        *itertools.product(FAMILIES, NORMS),
        ("bert", NormSwapConfig("repbn", eta=0.5)),
        ("roberta", NormSwapConfig("mabn")),
    ],
    ids=lambda value: getattr(value, "norm", value),
)
def test_an_adapter_keeps_its_statistics(family, norm, tmp_path):
    base = swapped_base(family, norm)
    batch = tiny_batch(base, lengths=(7, 5), labels=False, seed=9)
    fresh, stock = copy.deepcopy(base), outputs(base, batch)
    norms = len(find_norms(base))
    model = with_adapter(base)
    trainer = make_trainer(model, tmp_path / "run")
    trainer.train()
    trained = outputs(model, batch)
    assert not torch.allclose(trained["logits"], stock["logits"], atol=1e-3)
    assert len(trainer.tid_history.layers) == norms  # the copies, and not the idle originals

    with model.disable_adapter():
        assert same(outputs(model, batch), stock)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert same(outputs(again, batch), trained)

    merged = model.merge_and_unload()
    assert type(merged).__name__ == f"NormSwap{HEADS[family]}"
    # A product of matrices is added to a matrix, and then multiplied, in place of two products.
    torch.testing.assert_close(outputs(merged, batch)["logits"], trained["logits"], rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = getattr(modeling_normswap, type(merged).__name__).from_pretrained(tmp_path / "merged")
    assert same(outputs(loaded, batch), outputs(merged, batch))
    expected = outputs(merged, batch)["logits"]
    fold_norms(merged)
    assert len(find_norms(merged)) < norms
    torch.testing.assert_close(outputs(merged, batch)["logits"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_stays_as_it_was(family, tmp_path):
    base = swapped_base(family, "batchnorm")
    before = statistics(base)
    make_trainer(with_adapter(base), tmp_path).train()
    assert any(".modules_to_save." in name for name in statistics(base))
    kept = {name: value for name, value in statistics(base).items() if ".original_module." in name}
    assert same({name.replace(".original_module", ""): value for name, value in kept.items()}, before)


def test_merged_it_loads_by_plain_auto_classes(tmp_path):
    base = swapped_base("roberta", "rbn", "RobertaForMaskedLM")
    model = with_adapter(base)
    optimised = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**tiny_batch(base)).loss.backward()
    optimised.step()
    merged = model.merge_and_unload()
    batch = tiny_batch(base, labels=False)
    expected = outputs(merged, batch)
    merged.save_pretrained(tmp_path / "merged")
    assert same(outputs(AutoModelForMaskedLM.from_pretrained(tmp_path / "merged"), batch), expected)
    torch.save((batch, expected["logits"]), tmp_path / "expected.pt")
    run_fresh(
        "import hf_normswap, torch, transformers\n"
        "batch, expected = torch.load('expected.pt')\n"
        "model = transformers.AutoModelForMaskedLM.from_pretrained('merged').eval()\n"
        "assert torch.equal(model(**batch).logits, expected)\n",
        tmp_path,
    )


@pytest.mark.parametrize("saves_norms", [False, True])
@pytest.mark.parametrize("attach", ["get_peft_model", "add_adapter"])
def test_statistics_that_would_be_lost_are_refused(attach, saves_norms, tmp_path):
    base = swapped_base("bert", "batchnorm")
    if attach == "get_peft_model":
        model = with_adapter(base, saves_norms)
    else:
        names = [site.name for site in find_norms(base)] if saves_norms else None
        base.add_adapter(peft.LoraConfig(target_modules=PLACES["bert"], modules_to_save=names))
        model = base
    before = statistics(model)
    trainer = make_trainer(model, tmp_path)
    if saves_norms:
        trainer.train()
        assert not same(statistics(model), before)
    else:
        with pytest.raises(ValueError, match=r"LayerNorm.*modules_to_save.*norm_freeze_ratio") as caught:
            trainer.train()
        assert is_one_sentence(caught.value)
        assert same(statistics(model), before)


def test_an_old_peft_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(with_adapter(swapped_base("bert", "batchnorm")), tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.0")
    with pytest.raises(ValueError, match="before 0.21"):
        trainer.train()


def test_frozen_statistics_need_no_place_in_the_adapter(tmp_path):
    base = swapped_base("bert", "batchnorm")
    fresh, before = copy.deepcopy(base), statistics(base)
    batch = tiny_batch(base, labels=False)
    model = with_adapter(base, saves_norms=False)
    make_trainer(model, tmp_path, norm_freeze_ratio=0.0).train()
    assert same(statistics(model.get_base_model()), before)
    model.save_pretrained(tmp_path / "adapter")
    assert same(outputs(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter"), batch), outputs(model, batch))


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "BertForMaskedLM"), ("marian", "MarianMTModel"), ("gpt2", "GPT2LMHeadModel")]
)
@pytest.mark.parametrize("norm", ["rbn", "powernorm"])
def test_padding_does_not_count(family, head, norm):
    """Nor for the norm of a head, which only the hooks of the model with the head tell what is padding."""
    models = [with_adapter(swapped_base(family, norm, head)) for _ in range(2)]
    base = models[0].get_base_model()
    for model, filler in zip(models, (None, 7)):
        model.train()(**tiny_batch(base, lengths=(6, 3), columns=6 if filler is None else 9, filler=filler))
    left, right = map(statistics, models)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-6, msg=name)


def test_checkpointing_and_accumulation_on_copies(tmp_path):
    """The first norm sees the same tokens in any division, and every norm in a recomputation."""

    def run(name, **options):
        model = with_adapter(swapped_base("bert", "batchnorm"))
        make_trainer(model, tmp_path / name, max_steps=2, **options).train()
        return statistics(model)

    whole = run("whole")
    checkpointed = run("checkpointed", **{CHECKPOINTING: True})
    assert whole.keys() == checkpointed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-6)
    halves = run("halves", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    first = [name for name in whole if "embeddings" in name]
    assert first
    for name in first:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-5, atol=1e-6)


def test_resume_continues_bit_equal(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = with_adapter(swapped_base("bert", "powernorm"))
    make_trainer(straight, tmp_path, **settings).train()
    resumed = with_adapter(swapped_base("bert", "powernorm"))
    make_trainer(resumed, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(straight.state_dict(), resumed.state_dict())


def test_norms_of_an_adapter_do_not_decay(tmp_path):
    model = with_adapter(swapped_base("gpt2", "rbn"))
    decaying = make_trainer(model, tmp_path).get_decay_parameter_names(model)
    assert decaying
    assert not [name for name in decaying if "ln_" in name]


def test_what_finds_norms_finds_those_in_use():
    base = swapped_base("bert", "batchnorm")
    paths, batch = [site.path for site in find_norms(base)], tiny_batch(base, labels=False)
    original = {tid.name: tid for tid in measure_tid(base, [batch])}
    model = with_adapter(base)
    sites = find_norms(base)
    assert [site.path for site in sites] == paths
    assert all(base.get_submodule(site.name) is site.module for site in sites)
    assert all(site.name.endswith(".modules_to_save.default") for site in sites)
    # The copies are new, and compute what their originals did.
    assert [tid.variance for tid in measure_tid(base, [batch])] == [tid.variance for tid in original.values()]
    with model.disable_adapter():
        assert all(site.name.endswith(".original_module") for site in find_norms(base))
    with pytest.raises(ValueError, match="PeftModel"):
        find_norms(model)


def test_a_progressive_swap_is_refused(tmp_path):
    trainer = make_trainer(with_adapter(swapped_base("bert", "batchnorm")), tmp_path)
    trainer.add_callback(ProgressiveSwapCallback())
    with pytest.raises(ValueError, match="share of LayerNorm"):
        trainer.train()


def test_the_card_of_an_adapter_is_that_of_peft(tmp_path):
    trainer = make_trainer(with_adapter(swapped_base("bert", "batchnorm")), tmp_path / "run")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "library_name: peft" in (tmp_path / "run" / "README.md").read_text()
