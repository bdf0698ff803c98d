import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_normswap import (
    BatchNorm,
    NormSwapConfig,
    NormSwapSeq2SeqTrainer,
    NormSwapSeq2SeqTrainingArguments,
    NormSwapTrainer,
    NormSwapTrainingArguments,
    PowerNorm,
    RegularizedBatchNorm,
    accumulate_norm_statistics,
    freeze_norm_statistics,
    get_norm,
    norm_penalty,
    pause_norm_statistics,
    swap_norm,
    update_norm_statistics,
)
from hf_normswap.core.statistics import statistic_norms
from hf_normswap.modeling.discrepancy import training_inference_discrepancy
from hf_normswap.training.trainer import NormStatisticsCallback, _NormLogs
from tests.helpers.models import tiny_model
from tests.helpers.persistence import is_one_sentence
from tests.helpers.trainer import HEADS, arguments, batch_of, rows, swapped, train
from tests.helpers.versions import BEFORE_5_23, NO_SCALED_LOSS


@pytest.mark.parametrize("family", list(HEADS))
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradient_is_that_of_task_and_penalty(family, accumulation, tmp_path):
    examples = rows(family, 4)
    options = {"lambda_mean": 3.0, "lambda_var": 2.0}
    torch.manual_seed(0)
    model = swap_norm(tiny_model(family, HEADS[family]), NormSwapConfig("rbn", **options), where="all").train()
    (model(**batch_of(examples)).loss + norm_penalty(model)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ran = train(
        family,
        NormSwapConfig("rbn", **options),
        examples * accumulation,
        tmp_path,
        batch=4,
        accumulation=accumulation,
        steps=1,
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(ran.gradients[0][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


# Whoever computes the loss


class Gradients(TrainerCallback):
    """The gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def own_loss(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 1.0]))


class OwnLoss(NormSwapTrainer):
    """As the documentation of Trainer shows it."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = own_loss(outputs, labels)
        return (loss, outputs) if return_outputs else loss


class LossMixin:
    loss_is_scaled_for_ga = False
    compute_loss = OwnLoss.compute_loss


class OwnLossBeforeOurs(LossMixin, NormSwapTrainer):
    pass


class OwnStep(NormSwapTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        loss = own_loss(model(**inputs), labels) / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class WithPenalty(OwnLoss):
    """Takes the penalty by itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return loss + norm_penalty(model)


class ScaledLoss(OwnLoss):
    """A loss that is divided by the number of micro-batches already."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / self.current_gradient_accumulation_steps


def of_instance(**options):
    trainer = NormSwapTrainer(**options)
    trainer.loss_is_scaled_for_ga = False
    trainer.compute_loss = OwnLoss.compute_loss.__get__(trainer)
    return trainer


def of_function(**options):
    class Trainer(NormSwapTrainer):
        loss_is_scaled_for_ga = False

    return Trainer(compute_loss_func=own_loss, **options)


LOSSES = {
    "overridden": OwnLoss,
    "mixin": OwnLossBeforeOurs,
    "step": OwnStep,
    "with_penalty": WithPenalty,
    "scaled": ScaledLoss,
    "of_instance": of_instance,
    "function": of_function,
}


@pytest.mark.parametrize("make", LOSSES.values(), ids=list(LOSSES))
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_of_the_user_has_the_penalty(make, accumulation, tmp_path):
    if BEFORE_5_23 and accumulation > 1 and make in (ScaledLoss, of_function):
        pytest.skip(NO_SCALED_LOSS)
    examples = rows("bert", 4 * accumulation)
    model = swapped("bert", "rbn", lambda_mean=3.0, lambda_var=2.0)
    by_hand, gradients = copy.deepcopy(model).train(), Gradients()
    accumulate_norm_statistics(by_hand)
    losses, penalties = [], []
    for number in range(accumulation):
        batch = batch_of(examples[4 * number :][:4])
        labels = batch.pop("labels")
        losses.append(own_loss(by_hand(**batch), labels))
        penalties.append(norm_penalty(by_hand))
        ((losses[-1] + penalties[-1]) / accumulation).backward()
    options = {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": "sequential"}
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, **options)
    trainer = make(model=model, args=args, train_dataset=examples, callbacks=[gradients])
    trainer.train()
    for name, parameter in by_hand.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    logs, penalty = trainer.state.log_history[0], torch.stack(penalties).mean().item()
    if make is not WithPenalty:
        assert logs["rbn_penalty"] == pytest.approx(penalty, rel=1e-5)
    if make is not OwnStep:  # it returns what is logged
        assert logs["loss"] == pytest.approx(torch.stack(losses).mean().item() + penalty, rel=1e-5)
    assert "tid_mean_max" in logs


@pytest.mark.parametrize("freed", [True, False], ids=["left_out_of_the_backward", "no_backward"])
def test_a_penalty_that_is_not_in_the_gradient_ends_the_training(freed, tmp_path):
    class Direct(OwnLoss):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if not freed:
                super().training_step(model, dict(inputs))
            loss = self.compute_loss(model, inputs)
            if freed:
                loss.backward()
            return loss.detach()

    model = swapped("bert", "rbn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Direct(model=model, args=arguments(tmp_path), train_dataset=rows("bert", 8))
    with pytest.raises(RuntimeError, match="lacks RBN's penalty.*self.accelerator.backward") as error:
        trainer.train()
    assert is_one_sentence(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(norm.records or norm.penalties for norm in statistic_norms(model))


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_a_backward_of_the_user_keeps_the_discrepancy(norm, tmp_path):
    class Direct(OwnLoss):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    logs = []
    for cls in (OwnLoss, Direct):
        trainer = cls(model=swapped("bert", norm), args=arguments(tmp_path), train_dataset=rows("bert", 8))
        trainer.train()
        logs.append([{k: v for k, v in entry.items() if "tid" in k} for entry in trainer.state.log_history[:2]])
    assert logs[0] == logs[1]
    assert len(logs[0][1]) == 4


def test_evaluation_has_no_penalty(tmp_path):
    examples = rows("bert", 8)
    stock, ours = (
        cls(model=swapped("bert", "rbn"), args=arguments(tmp_path), eval_dataset=examples).evaluate()
        for cls in (Trainer, NormSwapTrainer)
    )
    assert ours["eval_loss"] == stock["eval_loss"]


def test_a_forward_before_the_training_is_not_in_its_gradient(tmp_path):
    examples = rows("bert", 8)
    states = []
    for looks in (False, True):
        model = swapped("bert", "rbn", lambda_mean=9.0)
        if looks:
            model.train()
            torch.manual_seed(1)
            with pause_norm_statistics(model):
                model(**batch_of(rows("bert", 4, seed=5)))
        trainer = NormSwapTrainer(model=model, args=arguments(tmp_path), train_dataset=examples)
        trainer.train()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# Several forwards in a step


class Pair(nn.Module):
    """Two sentences through one encoder: siamese, or the two dropout masks of R-Drop."""

    def __init__(self, **options):
        super().__init__()
        model = tiny_model("bert", "BertModel")
        self.bert = swap_norm(model, NormSwapConfig("rbn", **options))

    def forward(self, first, second):
        first, second = (self.bert(input_ids=ids).pooler_output for ids in (first, second))
        return {"loss": functional.cross_entropy(first @ second.T, torch.arange(len(first)))}


def pairs(number):
    first, second = torch.randint(5, 20, (number, 7)), torch.randint(20, 38, (number, 7))
    return [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]


def penalty_by_hand(norm, tokens):
    rows, sigma = tokens.double().flatten(0, -2), (norm.running_var.double() + norm.eps).sqrt()
    gap, ratio = rows.mean(0) - norm.running_mean, (rows.var(0, correction=0) + norm.eps).sqrt() / sigma
    return norm.lambda_mean * (gap / sigma).square().mean() + norm.lambda_var * (ratio - 1).square().mean()


def test_every_forward_of_a_step_counts(tmp_path):
    examples = pairs(4)
    model, gradients = Pair(lambda_mean=3.0, lambda_var=2.0), Gradients()
    by_hand = copy.deepcopy(model).train()
    inputs = {}
    for name, module in by_hand.named_modules():
        if isinstance(module, BatchNorm):
            module.accumulating = True
            module.register_forward_hook(
                lambda norm, args, out, name=name: inputs.setdefault(name, []).append((norm, args[0]))
            )
    loss = by_hand(**batch_of(examples))["loss"]
    penalty = sum(penalty_by_hand(*forward) for forwards in inputs.values() for forward in forwards)
    (loss + penalty).backward()
    trainer = NormSwapTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1, max_grad_norm=0.0),
        train_dataset=examples,
        callbacks=[gradients],
    )
    trainer.train()
    assert all(len(forwards) == 2 for forwards in inputs.values())
    for name, parameter in by_hand.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients.steps[0][name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    logs = trainer.state.log_history[0]
    assert logs["rbn_penalty"] == pytest.approx(penalty.item(), rel=1e-4)
    assert logs["loss"] == pytest.approx((loss + penalty).item(), rel=1e-4)
    new = {"running_mean": torch.zeros(16), "running_var": torch.ones(16)}
    for index, kind in enumerate(("mean", "var")):
        layers = [sum(tid_by_hand(x, new)[index] for _, x in forwards) / 2 for forwards in inputs.values()]
        assert logs[f"tid_{kind}_max"] == pytest.approx(max(layers), rel=1e-4)
        assert logs[f"tid_{kind}_avg"] == pytest.approx(sum(layers) / len(layers), rel=1e-4)


class Twice(nn.Module):
    """Two forwards of one norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), RegularizedBatchNorm(4, lambda_mean=3.0)

    def forward(self, first, second):
        first, second = (self.norm(self.linear(x)) for x in (first, second))
        return {"loss": (first * second.tanh()).mean()}


@pytest.mark.parametrize("options", [{}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}])
def test_two_forwards_in_a_loop_are_those_of_the_trainer(options, tmp_path):
    torch._dynamo.reset()
    examples = [{"first": first, "second": second} for first, second in torch.randn(4, 2, 3, 4)]
    model, by_hand, penalties = Twice(), Twice(), []
    by_hand.norm.register_forward_pre_hook(lambda norm, args: penalties.append(penalty_by_hand(norm, args[0])))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    accumulate_norm_statistics(by_hand)
    for _ in range(2):
        (by_hand(**batch_of(examples))["loss"] + sum(penalties)).backward()
        by_hand.norm.forget_statistics()
        penalties.clear()
        optimizer.step()
        optimizer.zero_grad()
        update_norm_statistics(by_hand)
    settings = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **options}
    args = arguments(tmp_path, train_sampling_strategy="sequential", **settings)
    NormSwapTrainer(model=model, args=args, train_dataset=examples).train()
    for (name, ours), theirs in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_sharpness_aware_steps(tmp_path):
    """The second forward of SAM is in the gradient with its penalty, and in no statistic."""

    class Sam(NormSwapTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
            steps = {p: 0.05 * p.grad.sign() for p in model.parameters() if p.grad is not None}
            move(steps, 1)
            model.zero_grad()
            with pause_norm_statistics(model):
                super().training_step(model, inputs, num_items_in_batch)
            move(steps, -1)
            return loss

    @torch.no_grad()
    def move(steps, sign):
        for parameter, step in steps.items():
            parameter.add_(step, alpha=sign)

    examples = rows("bert", 4)
    model, gradients, plain = swapped("bert", "rbn", lambda_mean=3.0), Gradients(), []
    twin = copy.deepcopy(model)
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0)
    trainer = Sam(model=model, args=args, train_dataset=examples, callbacks=[gradients])
    trainer.train()
    by_hand = copy.deepcopy(twin).train()
    accumulate_norm_statistics(by_hand)
    for sign in (1, None):
        by_hand.zero_grad()
        (by_hand(**batch_of(examples)).loss + norm_penalty(by_hand)).backward()
        if sign:
            move({p: 0.05 * p.grad.sign() for p in by_hand.parameters() if p.grad is not None}, sign)
    for name, parameter in by_hand.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    plain = NormSwapTrainer(model=twin, args=arguments(tmp_path, max_steps=1), train_dataset=examples)
    plain.train()
    buffers = dict(twin.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    for name in ("tid_mean_max", "tid_var_avg"):
        assert trainer.state.log_history[0][name] == plain.state.log_history[0][name]


# The discrepancy of layers that do not always run


class Skipping(nn.Module):
    """Two norms, of which the second runs where `deep` says so."""

    def __init__(self, norm):
        super().__init__()
        self.norms = nn.ModuleList(get_norm(norm)(4) for _ in range(3))

    def forward(self, x, deep):
        y = self.norms[0](x)
        return {"loss": (self.norms[1](y) if deep.any() else y).square().mean()}


@pytest.mark.parametrize("norm", ["batchnorm", "rbn", "pnv"])
@pytest.mark.parametrize("schedule", [(1, 0, 0, 1, 0, 0), (0, 0, 1, 0, 0, 1), (0, 0, 0, 1, 1, 1)], ids=str)
def test_a_layer_counts_in_the_steps_in_which_it_runs(norm, schedule, tmp_path):
    examples = [
        {"x": 1 + torch.randn(5, 4).double(), "deep": torch.tensor(deep)} for deep in schedule for _ in range(4)
    ]
    seen = []

    class Watch(NormSwapTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inputs_of_norms = {}
            handles = [
                layer.register_forward_pre_hook(lambda _, args, index=index: inputs_of_norms.update({index: args[0]}))
                for index, layer in enumerate(model.norms)
            ]
            running = [{name: getattr(layer, name).double() for name in layer.running} for layer in model.norms]
            loss = super().compute_loss(model, inputs, **kwargs)
            for handle in handles:
                handle.remove()
            seen.append({index: tid_by_hand(x, running[index]) for index, x in inputs_of_norms.items()})
            return loss

    args = arguments(tmp_path, max_steps=6, logging_steps=3, train_sampling_strategy="sequential")
    trainer = Watch(model=Skipping(norm).double(), args=args, train_dataset=examples)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    history = trainer.tid_history
    for entry, steps in enumerate((seen[:3], seen[3:])):
        of_layers = [[step[layer] for step in steps if layer in step] for layer in range(3)]
        means = [torch.tensor(values).double().mean(0).tolist() if values else (None, None) for values in of_layers]
        for kind, name, values in zip((0, 1), ("mean", "var"), (history.mean, history.variance), strict=True):
            expected = [mean[kind] for mean in means]
            if norm == "pnv" and name == "mean":
                assert values[entry] == [None] * 3
                continue
            assert values[entry] == [None if v is None else pytest.approx(v, rel=1e-4) for v in expected]
            ran = [value for value in expected if value is not None]
            assert logs[entry][f"tid_{name}_max"] == pytest.approx(max(ran), rel=1e-4)
            assert logs[entry][f"tid_{name}_avg"] == pytest.approx(sum(ran) / len(ran), rel=1e-4)


def tid_by_hand(x, running, eps=1e-5):
    rows = x.detach().double().flatten(0, -2)
    if "running_power" in running:
        psi = (running["running_power"] + eps).sqrt()
        return 0.0, (((rows.square().mean(0) + eps).sqrt() - psi).norm() / psi.norm()).item()
    sigma = (running["running_var"] + eps).sqrt()
    batch_sigma = (rows.var(0, correction=0) + eps).sqrt()
    gap = rows.mean(0) - running["running_mean"]
    return (gap.norm() / sigma.norm()).item(), ((batch_sigma - sigma).norm() / sigma.norm()).item()


@pytest.mark.parametrize("norm", ["batchnorm", "rbn"])
def test_layerdrop_leaves_finite_logs(norm, tmp_path):
    torch.manual_seed(0)
    model = swap_norm(tiny_model("marian", HEADS["marian"], encoder_layerdrop=0.5, decoder_layerdrop=0.5), norm)
    args = arguments(tmp_path, NormSwapSeq2SeqTrainingArguments, max_steps=4, logging_steps=4)
    trainer = NormSwapSeq2SeqTrainer(model=model, args=args, train_dataset=rows("marian", 16))
    trainer.train()
    logs = trainer.state.log_history[0]
    assert all(math.isfinite(value) for name, value in logs.items() if name.startswith(("tid", "rbn")))


def test_powernorm_knows_by_what_the_loss_is_scaled_from_the_first_step():
    """Whoever overrides training_step, and before the scale of fp16 is on the device."""
    model, state = nn.ModuleList([PowerNorm(4), BatchNorm(4)]), TrainerState(max_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    args = SimpleNamespace(norm_freeze_ratio=1.0, norm_warmup_ratio=0.0, norm_sync="none", world_size=2)
    callback, options = NormStatisticsCallback(_NormLogs()), {"optimizer": SimpleNamespace(scaler=scaler)}
    callback.on_train_begin(args, state, None, model=model)
    for scale in (1024.0, 512.0):
        callback.on_step_begin(args, state, None, model=model, **options)
        assert model[0].loss_scale == 2 * scale
        scaler.scale(torch.ones(()))
        scaler._scale.fill_(512.0)


def test_logs_of_ranks_on_which_other_layers_ran():
    ranks = [_NormLogs() for _ in range(2)]
    norms = [BatchNorm(4), BatchNorm(4), RegularizedBatchNorm(4), BatchNorm(4)]
    packed, expected = [], torch.zeros(2, 4)
    for logs, layers in zip(ranks, ((0, 1, 1), (1, 2)), strict=True):
        logs.reset(4)
        for layer in layers:
            norms[layer](torch.randn(3, 4))
            statistics = norms[layer].statistics
            expected[:, layer] += torch.stack(training_inference_discrepancy(statistics, 1e-5))
        penalty = logs.take_records(norms)
        if penalty is not None:
            logs.add_penalty(penalty)
        logs.means("cpu", lambda sums: packed.append(sums) or sums)
    discrepancy, found = ranks[0].means("cpu", lambda _: sum(packed))
    torch.testing.assert_close(discrepancy, expected / torch.tensor([1, 3, 1, 0]), equal_nan=True)
    assert found == pytest.approx(penalty.item())  # only one rank had a penalty


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_logged_discrepancy_is_that_computed_by_hand(norm, tmp_path):
    examples = rows("bert", 4)
    model = swapped("bert", norm, **({"group_scaling": False} if norm == "powernorm" else {}))
    by_hand = copy.deepcopy(model).train()
    inputs = {}
    for name, module in by_hand.named_modules():
        if getattr(module, "norm_name", None) == norm:
            module.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: args[0].double()}))
    batch = batch_of(examples)
    by_hand(**batch)
    of_mean, of_variance = [], []
    for x in inputs.values():
        tokens = x[batch["attention_mask"].bool()]
        running = torch.ones(x.shape[-1], dtype=torch.float64)
        sigma = (running + 1e-5).sqrt()
        second = tokens.square().mean(0) if norm == "powernorm" else tokens.var(0, unbiased=False)
        of_mean.append((tokens.mean(0).norm() / sigma.norm()).item())
        of_variance.append((((second + 1e-5).sqrt() - sigma).norm() / sigma.norm()).item())
    args = arguments(tmp_path, max_steps=1, norm_warmup_ratio=0.0)
    trainer = NormSwapTrainer(model=model, args=args, train_dataset=examples)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["tid_var_max"] == pytest.approx(max(of_variance), rel=1e-4)
    assert logs["tid_var_avg"] == pytest.approx(sum(of_variance) / len(of_variance), rel=1e-4)
    if norm == "batchnorm":
        assert logs["tid_mean_max"] == pytest.approx(max(of_mean), rel=1e-4)
        assert logs["tid_mean_avg"] == pytest.approx(sum(of_mean) / len(of_mean), rel=1e-4)
    else:
        assert logs["tid_mean_max"] == 0
    assert "rbn_penalty" not in logs


def test_logged_loss_is_task_plus_penalty(tmp_path):
    examples = rows("bert", 4)
    with_term = NormSwapTrainer(
        model=swapped("bert", "rbn", lambda_mean=5.0), args=arguments(tmp_path, max_steps=1), train_dataset=examples
    )
    without = NormSwapTrainer(
        model=swapped("bert", "batchnorm"), args=arguments(tmp_path, max_steps=1), train_dataset=examples
    )
    with_term.train()
    without.train()
    logs, plain = with_term.state.log_history[0], without.state.log_history[0]
    assert logs["rbn_penalty"] > 0
    assert logs["loss"] - plain["loss"] == pytest.approx(logs["rbn_penalty"], rel=1e-4)


@pytest.mark.parametrize("norms", [("batchnorm", "rbn"), ("powernorm", "pnv")])
def test_frozen_statistics_make_an_affine_map_of_a_norm(norms, tmp_path):
    """What differs in the use of the batch's statistics then trains alike, and the running ones stay."""
    examples = rows("bert", 12)
    states = []
    for norm in norms:
        model = tiny_model("bert", HEADS["bert"]).double().eval()
        swap_norm(model, norm, calibrate_on=[batch_of(examples)])
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        args = arguments(tmp_path, max_steps=3, norm_freeze_ratio=0.0, learning_rate=1e-2)
        trainer = NormSwapTrainer(model=model, args=args, train_dataset=examples)
        trainer.train()
        after = dict(model.named_buffers())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any("tid_var_max" in entry for entry in trainer.state.log_history)
        assert any(norm.training for norm in statistic_norms(model.train()))
        states.append((model.bert.encoder.layer[1].output.dense.weight, model.eval()(**batch_of(examples)).logits))
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_statistics_stay_as_they_are_after_their_share_of_the_run(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append([norm.running_mean.clone() for norm in statistic_norms(model)])

    def trainer(folder, **options):
        torch.manual_seed(0)
        args = arguments(folder, max_steps=4, norm_freeze_ratio=0.5, save_strategy="steps", save_steps=3, **options)
        model = swapped("bert", "batchnorm")
        return NormSwapTrainer(model=model, args=args, train_dataset=rows("bert", 16), callbacks=[Watch()])

    straight = trainer(tmp_path / "straight")
    straight.train()
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair)) for pair in zip(seen, seen[1:])]
    assert moved == [True, False, False]
    assert not any(norm.frozen for norm in statistic_norms(straight.model))
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_statistics_that_were_never_estimated_cannot_be_frozen(tmp_path):
    args = arguments(tmp_path, norm_freeze_ratio=0.0)
    trainer = NormSwapTrainer(model=swapped("bert", "batchnorm"), args=args, train_dataset=rows("bert", 4))
    with pytest.raises(ValueError, match="no statistics to keep"):
        trainer.train()


@pytest.mark.parametrize(
    "norm",
    [
        *map(NormSwapConfig, ["batchnorm", "rbn", "powernorm", "pnv", "attentivenorm"]),
        NormSwapConfig("batchrenorm", bn_steps=1, r_steps=4, d_steps=5),
        NormSwapConfig("mabn", window=2, warmup_steps=3),
    ],
    ids=lambda norm: norm.norm,
)
def test_resume_continues_bit_equal(norm, tmp_path):
    def trainer(folder, **options):
        torch.manual_seed(0)
        model = swap_norm(tiny_model("bert", HEADS["bert"], hidden_dropout_prob=0.1), norm)
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
        args = arguments(folder, **settings, norm_warmup_ratio=0.7, **options)
        return NormSwapTrainer(model=model, args=args, train_dataset=rows("bert", 48))

    straight = trainer(tmp_path / "straight")
    straight.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    expected, found = straight.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert resumed.state.log_history[-2]["loss"] == straight.state.log_history[-2]["loss"]


def test_warmup_is_a_share_of_the_run(tmp_path):
    model = swapped("bert", "powernorm")
    args = arguments(tmp_path, max_steps=10, norm_warmup_ratio=0.3)
    norms = [module for module in model.modules() if isinstance(module, PowerNorm)]
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({norm.warmup_steps for norm in norms})

    trainer = NormSwapTrainer(model=model, args=args, train_dataset=rows("bert", 40), callbacks=[Watch()])
    trainer.train()
    assert seen == [{3}] * 3 + [{0}] * 7
    assert [norm.num_batches_tracked.item() for norm in norms] == [10] * len(norms)
    assert not any(norm.accumulating for norm in norms)


@pytest.mark.parametrize("family", list(HEADS))
@pytest.mark.parametrize("norm", ["layernorm", "powernorm"])
def test_no_norm_parameter_decays(family, norm, tmp_path):
    model = swap_norm(tiny_model(family, HEADS[family]), norm, where="all")
    trainer = NormSwapTrainer(model=model, args=arguments(tmp_path), train_dataset=rows(family, 4))
    decayed = set(trainer.get_decay_parameter_names(model))
    assert decayed
    one_dimensional = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert not decayed & one_dimensional


class _HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["rbn", "powernorm"])
def test_a_step_never_waits_for_the_device(norm, tmp_path):
    examples = rows("bert", 4)
    reads = {}
    for kind in ("layernorm", norm):
        model = swapped("bert", kind)
        trainer = NormSwapTrainer(model=model, args=arguments(tmp_path), train_dataset=examples)
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        accumulate_norm_statistics(model)
        with _HostReads() as mode:
            trainer.training_step(model, batch_of(examples))
            update_norm_statistics(model)
        reads[kind] = mode.count
    assert reads[norm] == reads["layernorm"]


def test_arguments_parse_and_serialise(tmp_path):
    parser = HfArgumentParser(NormSwapTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--norm_warmup_ratio", "0.25"])
    assert args.norm_warmup_ratio == 0.25
    assert args.to_dict()["norm_warmup_ratio"] == 0.25
    assert args.ddp_broadcast_buffers is False
    with pytest.raises(ValueError, match="between 0 and 1"):
        NormSwapTrainingArguments(output_dir=tmp_path, norm_warmup_ratio=3)


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    args._setup_devices  # noqa: B018
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        NormSwapTrainer(model=swapped("bert", "batchnorm"), args=args)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_seq2seq_trainer_trains_and_generates(smoothing, tmp_path):
    args = arguments(
        tmp_path,
        NormSwapSeq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=6,
        label_smoothing_factor=smoothing,
        gradient_accumulation_steps=2,
    )
    examples = rows("marian", 16)
    model = swapped("marian", "rbn")
    for example in examples:  # as DataCollatorForSeq2Seq does, for label smoothing takes the labels away
        example["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(example["labels"][None])[0]
    trainer = NormSwapSeq2SeqTrainer(model=model, args=args, train_dataset=examples, eval_dataset=examples[:4])
    trainer.train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    predictions = trainer.predict(examples[:4]).predictions
    assert predictions.shape[0] == 4
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())


def test_trained_model_reloads_from_the_output_folder(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = swapped("bert", "powernorm")
    trainer = NormSwapTrainer(model=model, args=arguments(tmp_path), train_dataset=rows("bert", 8))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = batch_of(rows("bert", 4))
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)


def test_what_the_user_froze_stays_frozen(tmp_path):
    """Through a training and the next; what the training froze itself is as it was before."""
    model = swapped("bert", "batchnorm").train()
    model(**batch_of(rows("bert", 8)))
    norms = statistic_norms(model)
    freeze_norm_statistics(norms[0])
    values = norms[0].running_mean.clone()
    for ratio in (1.0, 0.5, 1.0):
        args = arguments(tmp_path, max_steps=2, norm_freeze_ratio=ratio)
        NormSwapTrainer(model, args, train_dataset=rows("bert", 8)).train()
        assert [norm.frozen for norm in norms] == [True, *[False] * (len(norms) - 1)]
        assert torch.equal(norms[0].running_mean, values)


@pytest.mark.parametrize("cls", [NormSwapTrainer, NormSwapSeq2SeqTrainer])
def test_arguments_of_transformers_are_refused(cls, tmp_path):
    args = TrainingArguments(str(tmp_path / "out"), report_to="none")
    with pytest.raises(ValueError, match="says nothing of norms: pass NormSwap.*TrainingArguments") as error:
        cls(tiny_model("bert"), args)
    assert is_one_sentence(error.value)


def test_without_arguments_it_makes_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert NormSwapTrainer(tiny_model("bert")).args.norm_freeze_ratio == 1.0
