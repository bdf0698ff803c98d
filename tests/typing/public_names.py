"""Every public name with its type. Nothing here runs: `tests/test_typing.py` has basedpyright read it."""

from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import hf_normswap
from hf_normswap import (
    FRN,
    MABN,
    ActivationProbe,
    ActivationReport,
    AdaNorm,
    Affine,
    AttentiveNorm,
    BatchNorm,
    BatchRenorm,
    BatchStatisticNorm,
    CalibrationReport,
    ConversionReport,
    ConvertedNorm,
    DepthSlope,
    DepthStudy,
    Derf,
    DyT,
    Estimate,
    Fixup,
    FoldReport,
    GradientNorm,
    GradientReport,
    GroupNorm,
    Hamming,
    InspectReport,
    InstanceNorm,
    LayerNorm,
    LayerNormSimple,
    LayerTid,
    Moments,
    Norm,
    NormAudit,
    NormFit,
    NormSite,
    NormSwapConfig,
    NormSwapSeq2SeqTrainer,
    NormSwapSeq2SeqTrainingArguments,
    NormSwapTrainer,
    NormSwapTrainingArguments,
    OnnxReport,
    PowerNorm,
    PowerNormV,
    ProgressiveSwapCallback,
    RegularizedBatchNorm,
    RepBN,
    RMSNorm,
    RMSNormSimple,
    ScaleNorm,
    Statistics,
    StockReport,
    SwitchableNorm,
    TidHistory,
    TidReport,
    UnifiedNorm,
    WeightNorm,
    __version__,
    accumulate_norm_statistics,
    available_norms,
    calibrate,
    checkpoint_norms,
    convert_norms,
    convert_to_rmsnorm,
    copy_sentence_modules,
    distill,
    export_onnx,
    find_norms,
    fold_gains,
    fold_norms,
    freeze_norm_statistics,
    get_norm,
    gradient_norms,
    initialize_fixup,
    initialize_weightnorm,
    inspect_model,
    make_batches,
    masked_moments,
    measure_tid,
    norm_penalty,
    padding_mask,
    pause_norm_statistics,
    probe_activations,
    push_folder,
    push_model,
    reestimate_statistics,
    register_norm,
    restore_norm,
    sample_batches,
    save_stock,
    set_norm_placement,
    set_norm_process_group,
    study_depth,
    swap_norm,
    swapped_class,
    update_norm_statistics,
    use_kernels,
)


Batches = list[dict[str, torch.Tensor]]


def swapping(model: PreTrainedModel) -> None:
    assert_type(
        swap_norm(model, NormSwapConfig("batchnorm", momentum=0.2), where=["blocks", "final"]), PreTrainedModel
    )
    assert_type(restore_norm(model), PreTrainedModel)
    assert_type(set_norm_placement(model, "pre"), PreTrainedModel)
    assert_type(set_norm_placement(model, "deep", scale_weights=True), PreTrainedModel)
    assert_type(initialize_fixup(model), PreTrainedModel)
    assert_type(initialize_weightnorm(model, {}), PreTrainedModel)
    assert_type(swapped_class(type(model)), type | None)
    for site in find_norms(model):
        assert_type(site, NormSite)
        assert_type(site.layer, int | None)


def norms(x: torch.Tensor, mask: torch.Tensor) -> None:
    of_one_token: list[Norm] = [Affine(8), LayerNorm(8), RMSNorm(8), AdaNorm(8, k=0.2), GroupNorm(8, num_groups=2)]
    of_one_token += [LayerNormSimple(8), RMSNormSimple(8), ScaleNorm(8), DyT(8, alpha=1.0), Derf(8, shift=0.1)]
    of_one_token += [WeightNorm(8), Hamming(8), Fixup(8)]
    of_the_batch: list[BatchStatisticNorm] = [BatchNorm(8), RegularizedBatchNorm(8), PowerNormV(8), PowerNorm(8)]
    of_the_batch += [
        BatchRenorm(8, r_max=2.0),
        RepBN(8, eta=1.0),
        MABN(8, window=4),
        UnifiedNorm(8),
        SwitchableNorm(8),
    ]
    of_a_sentence: list[Norm] = [InstanceNorm(8), FRN(8, tlu=False), AttentiveNorm(8, num_maps=3)]
    of_a_sentence += [SwitchableNorm(8)]
    for norm in (*of_one_token, *of_the_batch, *of_a_sentence):
        norm(x, mask)
    assert_type(available_norms(), list[str])
    assert_type(get_norm("rbn"), type)
    assert_type(masked_moments(x, mask), Moments)
    assert_type(Statistics(None, x, None, x).batch_var, torch.Tensor)
    assert_type(Statistics(None, x, None, x).batch_mean, torch.Tensor | None)

    @register_norm("mine")
    class Mine(Norm):
        def normalize(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return x

    Mine(8, eps=1e-6)


def conversion(model: PreTrainedModel, teacher: PreTrainedModel, texts: list[str]) -> None:
    report = calibrate(model, texts, memory_budget=1 << 20)
    assert_type(report, CalibrationReport)
    for fit in report:
        assert_type(fit, NormFit)
        assert_type(fit.r2, float)
    converted = convert_norms(model, texts, budget=0.003, distill_steps=10, score=lambda model: {"accuracy": 0.5})
    assert_type(converted, ConversionReport)
    assert_type(converted.norms, list[ConvertedNorm])
    assert_type(converted.kl, Estimate | None)
    assert_type(converted.relative_error.high, float)
    reestimate_statistics(model, sample_batches(make_batches(model, texts), 8))
    assert_type(distill(model, teacher, texts, steps=10), list[float])
    assert_type(fold_norms(model, untie=True), FoldReport)
    assert_type(fold_gains(model, untie=True), FoldReport)
    assert_type(save_stock(model, "folder"), StockReport)
    assert_type(copy_sentence_modules("source", "folder"), list[str])
    assert_type(convert_to_rmsnorm(model), PreTrainedModel)
    assert_type(export_onnx(model, Path("onnx")), OnnxReport)


def training(model: PreTrainedModel, mask: torch.Tensor, function: Callable[..., torch.Tensor]) -> None:
    args: TrainingArguments = NormSwapTrainingArguments("output", norm_freeze_ratio=0.5)
    trainer: Trainer = NormSwapTrainer(model, args, callbacks=[ProgressiveSwapCallback(ratio=0.5)])
    trainer.train()
    seq2seq_args: Seq2SeqTrainingArguments = NormSwapSeq2SeqTrainingArguments("output", predict_with_generate=True)
    seq2seq_trainer: Seq2SeqTrainer = NormSwapSeq2SeqTrainer(model, seq2seq_args)
    seq2seq_trainer.train()

    accumulate_norm_statistics(model)
    with padding_mask(mask), pause_norm_statistics(model):
        assert_type(norm_penalty(model), torch.Tensor)
    update_norm_statistics(model)
    set_norm_process_group(model, synchronized=False)
    freeze_norm_statistics(model)
    checkpoint_norms(function)(mask)
    use_kernels("none")


def diagnostics(model: PreTrainedModel, batches: Batches) -> None:
    report = measure_tid(model, batches)
    assert_type(report, TidReport)
    for layer in report:
        assert_type(layer, LayerTid)
        assert_type(layer.mean, float | None)
    TidHistory(["bert.encoder.layer.0.output.LayerNorm"])
    audit = inspect_model(model, tid=report)
    assert_type(audit, InspectReport)
    assert_type(audit.norms, list[NormAudit])
    assert_type(audit.obstacles, dict[str, str])
    gradients = gradient_norms(model, batches[0])
    assert_type(gradients, GradientReport)
    for gradient in gradients:
        assert_type(gradient, GradientNorm)
    probes = probe_activations(model, batches)
    assert_type(probes, ActivationReport)
    for probe in probes:
        assert_type(probe, ActivationProbe)
    study = study_depth(["rbn"], seeds=1)
    assert_type(study, DepthStudy)
    for slope in study:
        assert_type(slope, DepthSlope)


def sharing(model: PreTrainedModel) -> None:
    assert_type(push_model(model, "<your-namespace>/name", private=True), CommitInfo)
    assert_type(push_folder("./folder", "<your-namespace>/name"), CommitInfo)
    version: str = __version__
    print(version)


def mistakes(model: PreTrainedModel) -> None:
    """Each line is an error; a comment that ignores none is one, too."""
    hf_normswap.swap_norms(model, "rbn")  # pyright: ignore[reportAttributeAccessIssue]
    swap_norm(model)  # pyright: ignore[reportCallIssue]
    swap_norm(model, 3)  # pyright: ignore[reportArgumentType]
    measure_tid(model, []).means  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
