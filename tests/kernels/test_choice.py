"""The kernels that are the default on a device are those that measurements have shown to be correct and faster."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from hf_normswap import BatchNorm, PowerNorm, PowerNormV, RegularizedBatchNorm, RMSNorm, kernels, use_kernels
from hf_normswap.kernels.cpu import CpuBackend
from hf_normswap.modeling.backends import BACKENDS, ReferenceBackend, get_backend


sys.path.insert(0, str(Path(__file__).parents[2] / "results"))

import tables_speed  # noqa: E402


CLASSES = [BatchNorm, RegularizedBatchNorm, PowerNormV, PowerNorm, RMSNorm]


def make_record(ratios, correct=True):
    """Figures of the kernels as they are given, beside those of PyTorch, which are 3."""
    rows, checks = [], []
    for (norm, dtype), found in ratios.items():
        case = {"norm": norm, "dtype": dtype, "tokens": 16384}
        checks.append({**case, "path": "kernels", "correct": correct})
        for channels, (low, high) in zip((768, 1024), found, strict=True):
            for path, interval in (("kernels", [low, high]), ("pytorch", [2.9, 3.1])):
                part = {"interval": interval}
                rows.append({**case, "channels": channels, "path": path, "forward": part, "both": part})
    return {"rows": checks}, {"rows": rows}


def test_the_table_is_what_the_figures_say():
    records = [tables_speed.read_hardware(phase) for phase in ("correctness", "norms")]
    chosen = tables_speed.choose_defaults(*records) if all(records) else set()
    assert {(norm, getattr(torch, dtype)) for norm, dtype in chosen} == kernels.FASTEST.get("cuda", set())


def test_the_rule():
    fast, slow, close = [(0.9, 1.0), (1.0, 1.1)], [(0.9, 1.0), (3.2, 3.3)], [(0.9, 1.0), (2.8, 3.0)]
    ratios = {("batchnorm", "bfloat16"): fast, ("batchnorm", "float32"): slow, ("rbn", "bfloat16"): close}
    assert tables_speed.choose_defaults(*make_record(ratios)) == {("batchnorm", "bfloat16")}
    assert tables_speed.choose_defaults(*make_record(ratios, correct=False)) == set()
    # Both variants of PowerNorm.
    variants = {("powernorm", "bfloat16"): fast, ("powernorm, group scaling", "bfloat16"): fast}
    assert tables_speed.choose_defaults(*make_record(variants)) == {("powernorm", "bfloat16")}
    variants["powernorm", "bfloat16"] = slow
    assert tables_speed.choose_defaults(*make_record(variants)) == set()
    correctness, norms = make_record({("batchnorm", "bfloat16"): fast})
    unfinished = {"rows": [row for row in norms["rows"] if row["path"] == "kernels"]}
    assert tables_speed.choose_defaults(correctness, unfinished) == set()
    assert tables_speed.choose_defaults({"rows": []}, norms) == set()
    slow_forward = copy.deepcopy(norms)
    slow_forward["rows"][0]["forward"]["interval"] = [3, 4]
    assert tables_speed.choose_defaults(correctness, slow_forward) == set()


def test_a_path_for_a_norm_and_a_dtype(compiled, paths_as_before, monkeypatch):
    """On a CPU in place of a GPU: as if its kernels were not the default of every norm."""
    monkeypatch.setitem(kernels.CHOICES, "auto", [])
    defaults = {("batchnorm", torch.float32), ("rbn", torch.bfloat16)}
    monkeypatch.setattr(kernels, "FASTEST", {"cpu": defaults, "cuda": {("batchnorm", torch.bfloat16)}})
    use_kernels("auto")
    x = torch.ones(2, 4)
    assert get_backend(x, norm="batchnorm") is CpuBackend
    assert get_backend(x.bfloat16(), norm="batchnorm") is not CpuBackend
    assert get_backend(x.bfloat16(), norm="rbn") is CpuBackend
    assert get_backend(x, norm="rbn") is not CpuBackend
    assert get_backend(x, norm="pnv") is ReferenceBackend
    assert get_backend(x) is ReferenceBackend
    use_kernels("none")
    assert get_backend(x, norm="batchnorm") is ReferenceBackend


@pytest.mark.parametrize("chosen", CLASSES)
def test_forward_and_backward_of_that_norm_alone(chosen, paths_as_before, no_kernels, monkeypatch):
    seen = []

    class Recording(ReferenceBackend):
        pass

    for name in (
        "batch_norm_fwd",
        "batch_norm_bwd",
        "power_norm_fwd",
        "power_norm_bwd",
        "rms_norm_fwd",
        "rms_norm_bwd",
    ):

        def record(*args, name=name, **kwargs):
            seen.append(name)
            return getattr(ReferenceBackend, name)(*args, **kwargs)

        monkeypatch.setattr(Recording, name, staticmethod(record))
    monkeypatch.setitem(BACKENDS, ("cpu", chosen.norm_name), lambda x: Recording)
    for norm in CLASSES:
        seen.clear()
        norm(4)(torch.randn(5, 4, requires_grad=True)).sum().backward()
        of_one_norm = [f"{name.removesuffix('_fwd')}_{half}" for name in seen[:1] for half in ("fwd", "bwd")]
        assert seen == of_one_norm
        assert bool(seen) == (norm is chosen), norm
