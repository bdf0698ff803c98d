"""Every run of a trainer is that of a new trainer: in a search, after another run, and when it is resumed."""

import gc
import weakref

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from hf_normswap import (
    NormSwapTrainer,
    NormSwapTrainingArguments,
    PowerNorm,
    TidHistory,
    swap_norm,
)
from hf_normswap.core.statistics import statistic_norms
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.trainer import HEADS, rows


SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
VOLATILE = "runtime", "per_second", "flos"  # what a clock says of a run, and the flos of earlier runs


def make_model(norm="rbn", where="all"):
    return swap_norm(tiny_model("bert", HEADS["bert"], hidden_dropout_prob=0.1), norm, where=where)


def make_trainer(folder, model=None, model_init=None, callbacks=None, number=16, **options):
    args = NormSwapTrainingArguments(str(folder), **{**SETTINGS, **options})
    data = {"train_dataset": rows("bert", number), "eval_dataset": rows("bert", 4)}
    return NormSwapTrainer(model, args, model_init=model_init, callbacks=callbacks, **data)


def logs_of(trainer):
    history = [entry for entry in trainer.state.log_history if not any(name.startswith("eval") for name in entry)]
    return [{k: v for k, v in entry.items() if not any(word in k for word in VOLATILE)} for entry in history]


def clone(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# A search


RATES = 1e-2, 2e-2, 5e-3  # of the trials


def search(trainer, trials=2, **options):
    """Weights, logs and history of each trial that came to its end."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results, rates = [], iter(RATES)

    def objective(metrics):
        results.append((clone(trainer.model), logs_of(trainer), vars(trainer.tid_history)))
        return metrics["eval_loss"]

    def space(trial):
        rate = next(rates)
        return {"learning_rate": trial.suggest_float("learning_rate", rate, rate)}

    trainer.hyperparameter_search(
        hp_space=space, n_trials=trials, backend="optuna", compute_objective=objective, **options
    )
    return results


def test_each_trial_is_a_training_of_its_own(tmp_path):
    results = search(make_trainer(tmp_path / "search", model_init=lambda: make_model()))
    assert len(results) == 2
    for number, (state, logs, history) in enumerate(results):
        alone = make_trainer(tmp_path / str(number), model_init=lambda: make_model(), learning_rate=RATES[number])
        alone.train()
        assert_equal(state, clone(alone.model))
        assert logs == logs_of(alone)
        assert history == vars(alone.tid_history)
        found = TidHistory.read(tmp_path / "search" / f"run-{number}")
        assert vars(found) == vars(TidHistory.read(tmp_path / str(number)))


def test_each_trial_has_the_layers_of_its_model(tmp_path):
    models = iter([make_model(), make_model("batchnorm", "ffn"), make_model()])
    results = search(make_trainer(tmp_path, model_init=lambda trial: next(models)))
    assert [len(history["layers"]) for _, _, history in results] == [2, 5]
    for _, _, history in results:
        assert {len(row) for row in history["variance"]} == {len(history["layers"])}


def test_a_trial_that_is_pruned_or_fails_leaves_the_next_alone(tmp_path):
    optuna = pytest.importorskip("optuna")
    ends = iter([optuna.TrialPruned(), ZeroDivisionError(), None])

    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and error is not None:
                raise error

    def model_init(trial):
        nonlocal error
        error = next(ends) if trial is not None else None
        return make_model("powernorm")

    error = None
    trainer = make_trainer(tmp_path / "search", model_init=model_init, callbacks=[End()])
    results = search(trainer, trials=3, catch=(ZeroDivisionError,))
    alone = make_trainer(tmp_path / "alone", model_init=lambda: make_model("powernorm"), learning_rate=RATES[2])
    alone.train()
    ((state, logs, _),) = results
    assert_equal(state, clone(alone.model))
    assert logs == logs_of(alone)


def test_a_model_that_cannot_be_made_ends_a_search_with_its_own_error(tmp_path):
    models = iter([make_model(), make_model()])

    def model_init(trial):
        return next(models, None) or 1 / 0

    with pytest.raises(ZeroDivisionError):
        search(make_trainer(tmp_path, model_init=model_init))


def test_statistics_that_were_never_estimated_are_refused_in_a_trial(tmp_path):
    """The model of the trial is looked at, not the one before it."""
    models = iter([calibrated(), make_model("batchnorm")])
    trainer = make_trainer(tmp_path, model_init=lambda: next(models), norm_freeze_ratio=0.0)
    with pytest.raises(ValueError, match="no statistics to keep"):
        search(trainer)


# One run after the other


def test_a_second_run_with_model_init_is_the_first(tmp_path):
    trainer = make_trainer(tmp_path, model_init=lambda: make_model())
    results = []
    for _ in range(2):
        trainer.train()
        results.append((clone(trainer.model), logs_of(trainer), vars(trainer.tid_history)))
    assert_equal(results[1][0], results[0][0])
    assert results[1][1:] == results[0][1:]


def test_a_model_that_is_replaced_between_runs(tmp_path):
    trainer = make_trainer(tmp_path / "two", make_model("rbn"))
    trainer.train()
    trainer.model = trainer.model_wrapped = make_model("batchnorm", "ffn")
    trainer.optimizer = trainer.lr_scheduler = None
    set_seed(3)
    trainer.train()
    alone = make_trainer(tmp_path / "one", make_model("batchnorm", "ffn"))
    set_seed(3)
    alone.train()
    assert_equal(clone(trainer.model), clone(alone.model))
    assert logs_of(trainer) == logs_of(alone)
    assert trainer.tid_history.layers == alone.tid_history.layers


@pytest.mark.parametrize("in_search", [False, True])
def test_a_run_with_model_init_can_be_resumed(in_search, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "norm_warmup_ratio": 0.75}
    whole = make_trainer(tmp_path / "whole", model_init=lambda: make_model("powernorm"), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", model_init=lambda: make_model("powernorm"), **options)
    if in_search:  # after a trial there is no model
        resumed.model = resumed.model_wrapped = None
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(clone(resumed.model), clone(whole.model))
    assert vars(resumed.tid_history) == vars(whole.tid_history)


def test_a_run_that_starts_again_with_smaller_batches_starts_its_history_again(tmp_path):
    class OutOfMemory(TrainerCallback):
        failed = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")

    options = {"auto_find_batch_size": True, "logging_steps": 1}
    trainer = make_trainer(tmp_path, make_model(), callbacks=[OutOfMemory()], **options)
    trainer.train()
    assert trainer.tid_history.steps == [1, 2, 3, 4]


def test_a_trainer_is_gone_with_its_last_reference(tmp_path):
    """With the memory of its model: nothing that it adds to the loop refers to it."""
    trainer = make_trainer(tmp_path, make_model())
    trainer.train()
    references = weakref.ref(trainer), weakref.ref(trainer.model)
    gc.disable()
    try:
        del trainer
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


# The warm-up of PowerNorm is a share of each run


class WarmUp(TrainerCallback):
    """For each step whether PowerNorm is PN-V: then it divides by the statistic of the batch."""

    def __init__(self, model):
        self.steps = []
        self.norm = next(norm for norm in model.modules() if isinstance(norm, PowerNorm))
        self.norm.register_forward_hook(self._look)

    def _look(self, norm, args, output):
        if norm.training:
            rows = ((output - norm.bias) / norm.weight).flatten(0, -2)[self._mask(args[0])]
            self.steps.append(torch.allclose(rows.square().mean(0), torch.ones(rows.shape[-1]), atol=1e-3))

    def _mask(self, x):
        from hf_normswap.modeling.padding_mask import current_mask

        return current_mask(x).flatten()


def calibrated(norm="batchnorm"):
    model = tiny_model("bert", HEADS["bert"]).eval()
    return swap_norm(model, norm, calibrate_on=[tiny_batch(model)])


def warm_steps(folder, model, ratio, number=10, **options):
    watch = WarmUp(model)
    make_trainer(folder, model, callbacks=[watch], norm_warmup_ratio=ratio, max_steps=number, **options).train()
    return watch.steps


def plain():
    return swap_norm(tiny_model("bert", HEADS["bert"]), "powernorm")


def test_every_run_has_its_warm_up(tmp_path):
    model = plain()
    for ratio in (0.5, 0.5, 0.2, 0.0):
        warm = round(10 * ratio)
        assert warm_steps(tmp_path, model, ratio) == [True] * warm + [False] * (10 - warm)


def test_a_model_that_was_trained_elsewhere_has_its_warm_up(tmp_path):
    first = plain()
    make_trainer(tmp_path, first).train()
    first.save_pretrained(tmp_path / "saved")
    model = type(first).from_pretrained(tmp_path / "saved")
    assert statistic_norms(model)[0].num_batches_tracked == 4
    assert warm_steps(tmp_path, model, 0.5) == [True] * 5 + [False] * 5


def test_a_calibrated_model_has_its_warm_up(tmp_path):
    model = calibrated("powernorm")
    assert statistic_norms(model)[0].num_batches_tracked > 0
    assert warm_steps(tmp_path, model, 0.3) == [True] * 3 + [False] * 7


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_a_second_run_resumes_exactly(ratio, tmp_path):
    """From a checkpoint in the warm-up of the second run, and from one after it."""
    model = make_model("powernorm")
    make_trainer(tmp_path / "first", model).train()
    before = clone(model)
    options = {"max_steps": 8, "norm_warmup_ratio": ratio, "save_strategy": "steps", "save_steps": 4, "number": 32}
    make_trainer(tmp_path / "whole", model, **options).train()
    resumed = make_model("powernorm")
    resumed.load_state_dict(before)
    trainer = make_trainer(tmp_path / "resumed", resumed, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(clone(resumed), clone(model))
