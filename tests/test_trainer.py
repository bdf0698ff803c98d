import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser, TrainerCallback

from hf_normswap import (
    NormSwapConfig,
    NormSwapSeq2SeqTrainer,
    NormSwapSeq2SeqTrainingArguments,
    NormSwapTrainer,
    NormSwapTrainingArguments,
    PowerNorm,
    defer_norm_statistics,
    norm_penalty,
    swap_norm,
    sync_norm_statistics,
)
from hf_normswap.statistics import statistic_norms
from tests.invariant.test_accumulation import HEADS, rows, train
from tests.models import tiny_model


def arguments(tmp_path, cls=NormSwapTrainingArguments, **options):
    defaults = {
        "output_dir": tmp_path,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(**{**defaults, **options})


def swapped(family, norm, **options):
    torch.manual_seed(0)
    return swap_norm(tiny_model(family, HEADS[family]), NormSwapConfig(norm, **options))


def batch_of(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


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


@pytest.mark.parametrize("norm", ["batchnorm", "rbn", "powernorm", "pnv"])
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
    assert not any(norm.deferred for norm in norms)


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
        defer_norm_statistics(model)
        with _HostReads() as mode:
            trainer.training_step(model, batch_of(examples))
            sync_norm_statistics(model)
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
