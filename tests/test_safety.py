"""A folder of others: nothing in it is executed, and no path in it leads out of it."""

import contextlib
import importlib
import json
import pickle
import re
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, pipeline

from hf_normswap import push_model, swap_norm
from hf_normswap.cli import main
from hf_normswap.cli.checkpoints import load_checkpoint
from hf_normswap.modeling import registry
from hf_normswap.reporting.card import card_of_model
from hf_normswap.training.checkpoints import find_last_checkpoint
from tests.helpers.checkpoint import save_stock
from tests.helpers.models import tiny_model
from tests.helpers.persistence import Poison, edit_config, is_one_sentence, outputs, same, train
from tests.helpers.trainer import make_trainer


PICKLES = ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"]


@pytest.fixture
def sentinel(tmp_path):
    return tmp_path / "sentinel"


@pytest.fixture
def folder(tmp_path):
    """A saved model with a tokenizer."""
    folder = tmp_path / "inside" / "model"
    save_stock(folder)
    train(swap_norm(tiny_model("bert"), "batchnorm")).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("w6 w7 w8\nw9 w10\n" * 8, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """A push is tried again at once: there is no network, now or later."""
    monkeypatch.setattr(sys.modules[push_model.__module__], "WAIT", 0)


def visit(folder, texts, tmp_path):
    """Everything that reads a model's folder; the push ends where there is no network."""
    assert type(AutoConfig.from_pretrained(folder)).__module__.startswith("hf_normswap")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert same(outputs(model), outputs(load_checkpoint(str(folder))[0]))
    pipeline("text-classification", str(folder), device="cpu")("w6 w7")
    card_of_model(model, "me/model")
    assert main(["inspect", str(folder), "--texts", str(texts)]) == 0
    assert main(["fold", str(folder), str(tmp_path / "folded")]) == 0
    assert main(["push", str(folder), "me/model"]) == 2
    model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
def test_pickles_beside_the_weights_are_ignored(write, folder, texts, sentinel, tmp_path):
    for name in PICKLES:
        write(Poison(sentinel), folder / name)
    visit(folder, texts, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert not sentinel.exists()
    with contextlib.suppress(RuntimeError):  # of torch, after it has unpickled a file that is none of its own
        torch.load(folder / "optimizer.pt", weights_only=False)
    assert sentinel.exists()


@pytest.mark.parametrize("name", [name for name in PICKLES if name not in ("pytorch_model.bin", "scaler.pt")])
def test_resuming_runs_no_pickle(name, sentinel, tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / name).exists()
    torch.save(Poison(sentinel), checkpoint / name)
    assert find_last_checkpoint(tmp_path) == str(checkpoint)
    trainer = make_trainer(tmp_path)
    if name == "training_args.bin":  # which is not read
        trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trainer.train(resume_from_checkpoint=True)
    assert not sentinel.exists()


def test_code_in_the_folder_is_not_executed(folder, texts, sentinel, tmp_path):
    files = list(folder.glob("*.py"))
    assert len(files) > 10
    for path in [*files, folder / "evil.py"]:
        path.write_text(f"open({str(sentinel)!r}, 'w')\n")
    visit(folder, texts, tmp_path)
    assert main(["calibrate", str(folder), str(tmp_path / "new"), "--norm", "rbn", "--texts", str(texts)]) == 2
    assert not sentinel.exists()
    exec(files[0].read_text())  # noqa: S102
    assert sentinel.exists()


@pytest.mark.parametrize(
    "entry", ["../../evil.Model", "../evil--swapped.Model", "/evil.Model", "evil.Model", "os.system"]
)
def test_no_map_of_classes_leads_to_code(entry, folder, texts, sentinel, tmp_path):
    for path in (folder / "evil.py", folder.parent / "evil.py", folder.parents[1] / "evil.py"):
        path.write_text(f"open({str(sentinel)!r}, 'w')\n\nclass Model: ...\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    edit_config(folder, lambda content: content.update(auto_map=dict.fromkeys(names, entry)))
    visit(folder, texts, tmp_path)
    assert not sentinel.exists()
    # Nor is it handed on.
    assert entry not in json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"].values()


# What norm_swap says


def of_norm(**entries):
    """A change of the first norm of the record."""
    return lambda record: record["norms"][0].update(entries)


def modules(*names):
    return lambda record: record["norms"][0]["modules"].extend(names)


def options(**values):
    return lambda record: record["norms"][0]["options"].update(values)


def of_record(**entries):
    return lambda record: record.update(entries)


# Each with a part of what the error says.
REFUSED = {
    "module: path": (modules("../x"), "'../x', which is no norm"),
    "module: absolute path": (modules("/etc/passwd"), "'/etc/passwd', which is no norm"),
    "module: attribute": (modules("__class__"), "'__class__', which is no norm"),
    "module: attribute of a part": (modules("bert.__init__"), "'bert.__init__', which is no norm"),
    "module: number": (modules(5), "modules"),
    "module: list": (modules(["x"]), "modules"),
    "modules: none": (of_norm(modules=None), "modules"),
    "modules: one": (of_norm(modules="bert.embeddings.LayerNorm"), "modules"),
    "module: far layer": (modules(f"bert.encoder.layer.{10**40}.output.LayerNorm"), "number of layers"),
    "norm: function": (of_norm(norm="os.system"), "no norm 'os.system'"),
    "norm: path": (of_norm(norm="../../evil"), "no norm '../../evil'"),
    "norm: base class": (of_norm(norm="Norm"), "no norm 'Norm'"),
    "norm: number": (of_norm(norm=5), "norm"),
    "norm: list": (of_norm(norm=["rbn"]), "norm"),
    "option: unknown": (options(zzz=1), "no option 'zzz'"),
    "option: self": (options(self=1), "no option 'self'"),
    "option: norm": (options(norm="rbn"), "no option 'norm'"),
    "option: channels": (options(num_features=3), "no option 'num_features'"),
    "option: device": (options(device="meta"), "no option 'device'"),
    "option: attribute": (options(__class__=1), "no option '__class__'"),
    "option: huge groups": (options(num_groups=10**30), "num_groups"),
    "option: negative groups": (options(num_groups=-4), "num_groups"),
    "option: no groups": (options(num_groups=0), "num_groups"),
    "option: groups in words": (options(num_groups="4"), "num_groups"),
    "option: negative eps": (options(eps=-1), "eps"),
    "option: infinite eps": (options(eps=float("inf")), "eps"),
    "option: eps that is no number": (options(eps=float("nan")), "eps"),
    "option: eps in words": (options(eps="x"), "eps"),
    "option: nested eps": (options(eps={"a": 1}), "eps"),
    "option: large weight": (options(alpha_fwd=7), "alpha_fwd"),
    "option: weights": (options(alpha_bwd=[0.5]), "alpha_bwd"),
    "option: gradient": (options(grad_scale={"a": [1]}), "grad_scale"),
    "options: list": (of_norm(options=[1]), "options"),
    "options: none": (of_norm(options=None), "options"),
    "version: newer": (of_record(format_version=99), "upgrade hf_normswap"),
    "version: text": (of_record(format_version="1"), "format '1'"),
    "norms: text": (of_record(norms="../x"), "norms"),
    "norms: number": (of_record(norms=3), "norms"),
    "norms: none": (of_record(norms=None), "norms"),
    "norms: one": (of_record(norms={"norm": "rbn"}), "norms"),
    "norms: names": (of_record(norms=["rbn"]), "norms"),
    "placement: path": (of_record(placement="../x"), "'../x'"),
    "placement: list": (of_record(placement=["pre"]), "placement"),
    "shares: list": (of_record(layer_norm_share=[1]), "layer_norm_share"),
    "shares: path": (of_record(layer_norm_share={"../x": 0.5}), "'../x'"),
    "folded: path": (of_record(folded=["../x"]), "'../x', which is no norm"),
    "folded: attribute": (of_record(folded=["__class__"]), "'__class__', which is no norm"),
    "folded: number": (of_record(folded=3), "folded"),
    "biases: model": (of_record(biases=["bert"]), "'bert' as a head"),
    "biases: nested": (of_record(biases=[{}]), "biases"),
    "untied: table": (of_record(untied=["bert.embeddings.word_embeddings"]), "as a head"),
    "calibration: list": (of_record(calibration=[1]), "calibration"),
}


@pytest.fixture(scope="module")
def power_norms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("power_norms")
    train(swap_norm(tiny_model("bert", "BertForMaskedLM"), "powernorm")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(case, power_norms):
    change, words = REFUSED[case]
    config = json.loads((power_norms / "config.json").read_text())
    change(config["norm_swap"])
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        AutoModelForMaskedLM.from_pretrained(power_norms, norm_swap=config["norm_swap"])
    assert is_one_sentence(caught.value), caught.value


def test_a_record_that_is_none_is_refused(power_norms, tmp_path):
    config = json.loads((power_norms / "config.json").read_text())
    for record in ("../x", [1], 5):
        (tmp_path / "config.json").write_text(json.dumps({**config, "norm_swap": record}))
        with pytest.raises(Exception, match="norm_swap"):
            AutoConfig.from_pretrained(tmp_path)


# What is written beside the weights


def test_a_record_names_no_file_to_copy(power_norms, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(power_norms)
    for name in ("../../etc/passwd", "/etc/passwd", "os"):
        model.config.norm_swap["norms"][0]["norm"] = name
        with pytest.raises(ValueError, match=f"no norm {name!r}"):
            model.config.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "whole")  # which reads the record off the modules
    assert model.config.norm_swap["norms"][0]["norm"] == "powernorm"


def test_the_name_of_a_norm_is_no_path(tmp_path, monkeypatch):
    """A user's norm may be called anything: its file keeps its own name, in the folder."""
    for table in ("_NORMS", "_ALIASES"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.syspath_prepend(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "norm_of_mine.py").write_text(
        "from hf_normswap import Norm, register_norm\n\n\n"
        "@register_norm('../../escaped')\nclass Same(Norm):\n    def normalize(self, x, mask):\n        return x\n"
    )
    importlib.import_module("norm_of_mine")
    model = swap_norm(tiny_model("bert"), "../../escaped")
    before = {path for path in tmp_path.rglob("*") if path.name != "__pycache__" and path.suffix != ".pyc"}
    model.save_pretrained(tmp_path / "a" / "saved")
    sys.modules.pop("norm_of_mine")
    new = {path for path in tmp_path.rglob("*") if path.suffix != ".pyc"} - before
    outside = {path for path in new if tmp_path / "a" / "saved" not in path.parents}
    assert outside <= {tmp_path / "a", tmp_path / "a" / "saved", tmp_path / "mine" / "__pycache__"}
    assert (tmp_path / "a" / "saved" / "norm_of_mine.py").exists()
