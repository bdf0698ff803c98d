"""The progressive swap under the Trainer: its schedule, its checkpoints, and the pure model at its end."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_normswap import NormSwapTrainer, ProgressiveSwapCallback, find_norms, swap_norm
from hf_normswap.core.model_state import swapped_parts
from hf_normswap.modeling.replace import layer_norm_shares
from tests.helpers.architectures import tiny_architecture
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence, outputs, same
from tests.helpers.surgery import blends
from tests.helpers.trainer import HEADS, arguments, batch_of, rows, swapped


class Recorder(TrainerCallback):
    """λ of every norm in every step, by path."""

    def __init__(self):
        self.shares = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.shares.append(layer_norm_shares(model))


@pytest.fixture
def estimates(monkeypatch):
    """What the statistics at the end are estimated from, in place of the estimation."""
    calls = []

    def record(model, data):
        calls.append(SimpleNamespace(model=model, data=list(data), blends=blends(model), training=model.training))

    monkeypatch.setattr(importlib.import_module("hf_normswap.conversion.calibrate"), "reestimate_statistics", record)
    return calls


def train(tmp_path, model=None, cls=NormSwapTrainer, callbacks=(), examples=None, resume=None, **options):
    """Four examples a step; `ratio` and so on go to the callback, other options to the arguments."""
    names = ("ratio", "order", "statistics_batches")
    ours = {name: options.pop(name) for name in names if name in options}
    model = model or swapped("bert", "batchnorm")
    trainer = cls(
        model=model,
        args=arguments(tmp_path, **{"max_steps": 4, **options}),
        train_dataset=rows("bert", 48) if examples is None else examples,
        callbacks=[ProgressiveSwapCallback(**ours), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# The schedule


@pytest.mark.parametrize(
    ("order", "step", "expected"),
    [
        ("together", 0, [1.0, 1.0]),
        ("together", 10, [0.75, 0.75]),
        ("together", 40, [0.0, 0.0]),
        ("together", 77, [0.0, 0.0]),
        ("forward", 0, [1.0, 1.0]),
        ("forward", 10, [0.5, 1.0]),
        ("forward", 20, [0.0, 1.0]),
        ("forward", 35, [0.0, 0.25]),
        ("forward", 40, [0.0, 0.0]),
        ("backward", 10, [1.0, 0.5]),
        ("backward", 35, [0.25, 0.0]),
        ("backward", 90, [0.0, 0.0]),
    ],
)
def test_share_of_each_norm(order, step, expected):
    assert ProgressiveSwapCallback(0.4, order).shares(step, max_steps=100, norms=2) == expected


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("order", ["together", "forward", "backward"])
def test_nothing_is_left_after_the_share_of_the_run(ratio, order):
    """In floating point 0.1 · 30 is not 3."""
    for max_steps in (10, 30, 70):
        callback = ProgressiveSwapCallback(ratio, order)
        assert any(callback.shares(round(ratio * max_steps) - 1, max_steps, norms=3))
        assert not any(callback.shares(round(ratio * max_steps), max_steps, norms=3))


@pytest.mark.usefixtures("estimates")
def test_norms_together(tmp_path):
    recorder = Recorder()
    trainer = train(tmp_path, ratio=1.0, callbacks=[recorder])
    paths = [site.path for site in find_norms(trainer.model) if site.kind == "batchnorm"]
    assert recorder.shares == [dict.fromkeys(paths, share) for share in (1.0, 0.75, 0.5, 0.25)]
    logged = [entry["layer_norm_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.usefixtures("estimates")
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_norms_one_after_the_other(order, tmp_path):
    recorder = Recorder()
    train(tmp_path, ratio=1.0, order=order, callbacks=[recorder], max_steps=8, gradient_accumulation_steps=2)
    block = "bert.encoder.layer.{}.{}.LayerNorm"
    names = [block.format(layer, name) for layer in (0, 1) for name in ("attention.output", "output")]
    for path in names[:: 1 if order == "forward" else -1]:
        assert [shares.pop(path, 0.0) for shares in recorder.shares[:2]] == [1.0, 0.5]
        assert not any(path in shares for shares in recorder.shares[2:3])
        recorder.shares = recorder.shares[2:]


def test_cross_attention_has_its_turn_between_attention_and_ffn():
    from hf_normswap.training.progressive import _swapped_sites

    model = swap_norm(tiny_model("gpt2", add_cross_attention=True), "batchnorm", where="all")
    called = []
    for site in find_norms(model):
        site.module.register_forward_hook(lambda *_, path=site.path: called.append(path))
    encoded = torch.randn(2, 5, 16)
    model(**tiny_batch(model), encoder_hidden_states=encoded)
    assert [site.path for site in _swapped_sites(model)] == called


@pytest.mark.parametrize("family", ["bert", "roberta", "marian"])
def test_order_is_that_of_the_forward(family):
    from hf_normswap.training.progressive import _swapped_sites

    model = swap_norm(tiny_model(family), "batchnorm", where="all")
    called = []
    for site in find_norms(model):
        site.module.register_forward_hook(lambda *_, path=site.path: called.append(path))
    model(**tiny_batch(model))
    assert [site.path for site in _swapped_sites(model)] == called


# The end


def test_statistics_at_the_end_are_those_of_the_pure_model(estimates, tmp_path):
    trainer = train(tmp_path, statistics_batches=3)
    (call,) = estimates
    assert call.model is trainer.model
    assert not call.blends
    assert not call.training
    assert trainer.model.training
    assert "layer_norm_share" not in trainer.model.config.norm_swap
    assert [batch["input_ids"].shape[0] for batch in call.data] == [4, 4, 4]


def test_statistics_are_estimated_from_the_training_data(tmp_path):
    """The running statistics are exactly those of what comes to each norm in evaluation."""
    examples = rows("bert", 4)
    batch = batch_of(examples)
    model = train(tmp_path, examples=examples, max_steps=10).model.eval()
    checked = []

    def check(norm, args, output):
        x = args[0][batch["attention_mask"].bool()].double()
        torch.testing.assert_close(norm.running_mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), x.var(0, unbiased=False), rtol=1e-4, atol=1e-5)
        checked.append(norm)

    for site in find_norms(model):
        if site.kind == "batchnorm":
            site.module.register_forward_hook(check)
    model(**batch)
    assert len(checked) == 4


@pytest.mark.usefixtures("estimates")
def test_the_model_at_the_end_is_pure(tmp_path):
    trainer = train(tmp_path, cls=Trainer)
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert not blends(again)
    assert same(outputs(again), outputs(trainer.model))


def test_norms_without_statistics_need_no_estimation(estimates, tmp_path):
    trainer = train(tmp_path, model=swapped("bert", "rmsnorm"))
    assert not estimates
    assert not blends(trainer.model)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_stops_early_leaves_the_mixture(estimates, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_normswap.training.progressive"):
        trainer = train(tmp_path, ratio=1.0, callbacks=[Stop()])
    (warning,) = [
        record.getMessage() for record in caplog.records if record.name == "hf_normswap.training.progressive"
    ]
    assert "step 2 of 4" in warning
    assert is_one_sentence(warning)
    assert not estimates
    assert set(layer_norm_shares(trainer.model).values()) == {0.5}
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(outputs(again), outputs(trainer.model))


# Checkpoints


class Outputs(TrainerCallback):
    """What the model returns when a checkpoint is made, by step."""

    def __init__(self):
        self.found = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.found[state.global_step] = outputs(model, batch_of(rows("bert", 4)))
        model.train()


@pytest.mark.usefixtures("estimates")
def test_a_checkpoint_loads_as_the_mixture_that_it_is(tmp_path):
    recorder = Outputs()
    train(tmp_path, ratio=1.0, callbacks=[recorder], save_strategy="steps", save_steps=3)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert set(layer_norm_shares(again).values()) == {0.5}
    assert same(outputs(again, batch_of(rows("bert", 4))), recorder.found[3])


@pytest.mark.parametrize("order", ["together", "forward"])
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_resume_continues_bit_equal(norm, order, tmp_path):
    def run(folder, resume=None):
        torch.manual_seed(0)
        model = swap_norm(tiny_model("bert", HEADS["bert"], hidden_dropout_prob=0.1), norm)
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
        return train(folder, model, resume=resume, order=order, **settings)

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-3"))
    assert same(straight.model.state_dict(), resumed.model.state_dict())
    for key in ("loss", "layer_norm_share"):
        ours = [entry[key] for entry in straight.state.log_history if "loss" in entry]
        assert ours == [entry[key] for entry in resumed.state.log_history if "loss" in entry]


# What wraps the model, and what is refused


@pytest.mark.usefixtures("estimates")
def test_the_model_may_be_wrapped(tmp_path):
    model = swapped("bert", "batchnorm")
    assert list(swapped_parts(nn.ModuleDict({"module": model})).values()) == [model]
    assert list(swapped_parts(torch.compile(model)).values()) == [model]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"order": "sideways"}, "together, forward, backward"),
        ({"statistics_batches": 0}, "statistics_batches"),
    ],
)
def test_wrong_arguments(options, cause):
    with pytest.raises(ValueError, match=cause) as caught:
        ProgressiveSwapCallback(**options)
    assert is_one_sentence(caught.value)


def test_a_stock_model_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="call swap_norm") as caught:
        train(tmp_path, model=tiny_model("bert"))
    assert is_one_sentence(caught.value)


def test_a_calibrated_model_is_refused_before_training(tmp_path):
    model = tiny_model("bert").eval()
    swap_norm(model, "batchnorm", calibrate_on=[tiny_batch(model, lengths=(6, 9, 8))])
    with pytest.raises(ValueError, match="Calibration") as caught:
        train(tmp_path, model=model)
    assert is_one_sentence(caught.value)


def test_the_best_model_is_refused_before_training(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    recorder = Recorder()
    with pytest.raises(ValueError, match="load_best_model_at_end") as caught:
        Trainer(
            model=swapped("bert", "batchnorm"),
            args=arguments(tmp_path, **best),
            train_dataset=rows("bert", 4),
            eval_dataset=rows("bert", 4),
            callbacks=[ProgressiveSwapCallback(), recorder],
        ).train()
    assert is_one_sentence(caught.value)
    assert not recorder.shares


def test_norms_of_queries_and_keys_have_their_turn(tmp_path):
    model, batch = tiny_architecture("qwen3")
    model = swap_norm(model.train(), "rmsnorm", where=["blocks", "query_key"])
    examples = [{name: values[0] for name, values in batch.items()}] * 16
    trainer = train(tmp_path, model, examples=examples, max_steps=2)
    assert not layer_norm_shares(trainer.model)
