"""A saved folder in other processes: with the package, without it, and with norms that the package does not have."""

import ast
import contextlib
import copy
import importlib
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_normswap import NormSwapConfig, find_norms, register_norm, swap_norm
from hf_normswap.modeling import norms, registry, saving
from hf_normswap.modeling.base import Norm
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model
from tests.helpers.persistence import Poison, is_one_sentence, outputs, run_fresh, same, train


AUTO_CLASSES = {
    "bert": "AutoModelForSequenceClassification",
    "roberta": "AutoModelForMaskedLM",
    "marian": "AutoModelForSeq2SeqLM",
    "gpt2": "AutoModelForCausalLM",
}
STOCK_CLASSES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForMaskedLM",
    "marian": "MarianMTModel",
    "gpt2": "GPT2LMHeadModel",
}

# Two norms in one file, one of each kind of base class.
MY_NORMS = '''
"""Norms of a user's own."""

import math

import torch

from hf_normswap import (
    BatchStatisticNorm,
    Norm,
    masked_moments,
    register_norm,
)


@register_norm("soft_sign", "ss")
class SoftSign(Norm):
    def __init__(self, num_features, *, slope: float = 0.5, **kwargs):
        super().__init__(num_features, **kwargs)
        self.slope = slope

    def normalize(self, x, mask):
        return 2 / math.pi * torch.atan(self.slope * x)


@register_norm("centre")
class Centre(BatchStatisticNorm):
    """Subtracts the running mean."""

    running = {"running_mean": 0.0}

    def normalize(self, x, mask):
        if not self.training:
            return x - self.running_mean
        running, is_first_run = self.running_snapshot()
        if is_first_run:
            self.update_running(masked_moments(x.detach(), mask))
        return x - running["running_mean"]
'''

LOADING = """
import json, sys
from pathlib import Path

import torch
import transformers

folder = Path(sys.argv[1])

def outputs(model):
    with torch.no_grad():
        returned = model.eval()(**inputs[name])
    return {key: value for key, value in returned.items() if isinstance(value, torch.Tensor)}

def said(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None

results = {}
inputs = torch.load(folder / "inputs.pt")
"""


@contextlib.contextmanager
def users_code(folder):
    """A user's session: gives a function that writes a module to `folder` and imports it; all is forgotten at the end.

    The norms that are registered in it are unknown again afterwards, and the modules are no longer imported.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write_and_import(name, source):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
        importlib.invalidate_caches()
        importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_NORMS", dict(registry._NORMS))
        patch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
        patch.syspath_prepend(folder)
        yield write_and_import
    for name, module in list(sys.modules.items()):
        if folder in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]


@pytest.fixture
def warnings_on_saving(caplog):
    return lambda: [record.getMessage() for record in caplog.records if record.name == saving.__name__]


def mixed(family):
    model = swap_norm(tiny_model(family), "powernorm", where="attention")
    return train(swap_norm(model, "rbn", where=["ffn", "cross_attention", "embedding", "head", "final"]))


def write_models(folder, models):
    """Save models with inputs for each; what the models return is returned."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    inputs = {name: tiny_batch(model, lengths=(7, 5), labels=False, seed=9) for name, model in models.items()}
    torch.save(inputs, folder / "inputs.pt")
    with_labels = {name: tiny_batch(model, seed=3) for name, model in models.items()}
    torch.save(with_labels, folder / "batches.pt")
    return {name: outputs(model, inputs[name]) for name, model in models.items()}


@pytest.fixture(scope="module")
def models():
    return {family: mixed(family) for family in FAMILIES}


# With the package


def test_a_new_process_with_an_empty_cache(models, tmp_path):
    """Nothing but the import is needed, not even that for a pickle."""
    expected = write_models(tmp_path, models)
    double = train(swap_norm(tiny_model("gpt2", "GPT2DoubleHeadsModel"), "powernorm"))
    (tmp_path / "double.pickle").write_bytes(pickle.dumps(double))
    pickled_outputs = outputs(double, tiny_batch(double, labels=False))
    torch.save(tiny_batch(double, labels=False), tmp_path / "double_inputs.pt")
    script = f"""
import pickle
inputs["double"] = torch.load(folder / "double_inputs.pt")
for name in ("double",):
    double = outputs(pickle.loads((folder / "double.pickle").read_bytes()))
import hf_normswap
returned = {{"double": double}}
for name, auto in {AUTO_CLASSES}.items():
    model, info = getattr(transformers, auto).from_pretrained(folder / name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__ == "hf_normswap.modeling.modeling_normswap"
    returned[name] = outputs(model)
torch.save(returned, folder / "returned.pt")
"""
    run_fresh(LOADING + script, tmp_path, tmp_path)
    returned = torch.load(tmp_path / "returned.pt")
    assert not list((tmp_path / "empty_modules").rglob("modeling_normswap.py"))
    for family in FAMILIES:
        assert same(returned[family], expected[family])
    assert same(returned["double"], pickled_outputs)


def test_the_installed_classes_win_over_the_code_in_the_folder(models, tmp_path):
    models["bert"].save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is type(models["bert"])


def test_what_lies_beside_the_weights(models, tmp_path):
    models["bert"].save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert {"modeling_normswap.py", "configuration_normswap.py", "norms.py"} <= code
    assert {path.name for path in tmp_path.iterdir()} - code == {"config.json", "model.safetensors"}
    for name in code:
        nodes = list(ast.walk(ast.parse((tmp_path / name).read_text())))
        absolute = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        absolute += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert "hf_normswap" not in {module.partition(".")[0] for module in absolute}
        relative = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
        assert {f"{module}.py" for module in relative} <= code


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_runs_no_pickle(models, family, tmp_path):
    model = models[family]
    model.save_pretrained(tmp_path)
    marker = tmp_path / "marker"
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Poison(marker)))
    auto = getattr(importlib.import_module("transformers"), AUTO_CLASSES[family])
    assert same(outputs(auto.from_pretrained(tmp_path)), outputs(model))
    assert not marker.exists()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        auto.from_pretrained(tmp_path)
    assert not marker.exists()
    pickle.loads((tmp_path / "model.pt").read_bytes())  # the poison is one
    assert marker.exists()


# Without the package


@pytest.fixture(scope="module")
def without_package(models, tmp_path_factory):
    """What a process says that cannot import the package, and what the models return there."""
    folder = tmp_path_factory.mktemp("without")
    with users_code(folder / "code") as write_and_import:
        write_and_import("my_norms.py", MY_NORMS)
        mine = swap_norm(tiny_model("roberta"), NormSwapConfig("ss", slope=0.25), where="attention")
        mine = train(swap_norm(mine, "centre", where=["ffn", "head"]))

        @register_norm("local")
        class Local(Norm):
            def normalize(self, x, mask):
                return x

        swap_norm(tiny_model("bert"), "local").save_pretrained(folder / "local")
        expected = write_models(folder, {**models, "mine": mine})
    for family in FAMILIES:
        config = json.loads((folder / family / "config.json").read_text())
        (folder / f"{family}_bare").mkdir()
        (folder / f"{family}_bare" / "config.json").write_text(json.dumps({**config, "auto_map": {}}))
    script = f"""
batches = torch.load(folder / "batches.pt")
returned, trained, autos, stocks = {{}}, {{}}, {AUTO_CLASSES}, {STOCK_CLASSES}
for name in autos:
    auto, stock = getattr(transformers, autos[name]), getattr(transformers, stocks[name])
    results[name] = {{"plain": said(lambda: auto.from_pretrained(folder / name))}}
    results[name]["bare"] = said(lambda: auto.from_pretrained(folder / (name + "_bare")))
    results[name]["stock"] = said(lambda: stock.from_pretrained(folder / name))
    model, info = auto.from_pretrained(folder / name, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    results[name]["class"] = [type(model).__name__, type(model).__module__, type(model.config).__name__]
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    results[name]["is_causal"] = type(model).__name__ in names
    returned[name] = outputs(model)
    before = {{key: value.clone() for key, value in model.state_dict().items()}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()(**batches[name]).loss.backward()
    optimizer.step()
    after = model.state_dict()
    results[name]["moved"] = [key for key in before if not torch.equal(before[key], after[key])]
    trained[name] = outputs(model)
    model.save_pretrained(folder / (name + "_again"))
    again = auto.from_pretrained(folder / (name + "_again"), trust_remote_code=True)
    assert all(torch.equal(value, trained[name][key]) for key, value in outputs(again).items())
    again.bfloat16()
    assert all(b.dtype is torch.float32 for key, b in again.named_buffers() if "running" in key)

# Norms that the package does not have.
name = "mine"
model = transformers.AutoModelForMaskedLM.from_pretrained(folder / name, trust_remote_code=True)
returned[name] = outputs(model)
kinds = {{type(module).__name__: module for module in model.modules()}}
assert kinds["SoftSign"].slope == 0.25 and "Centre" in kinds and "my_norms" not in sys.modules
model.save_pretrained(folder / "mine_again")
auto = transformers.AutoModelForSequenceClassification
results["local"] = said(lambda: auto.from_pretrained(folder / "local", trust_remote_code=True))

# Another head of the same folder, and the configuration alone.
model = transformers.AutoModelForTokenClassification.from_pretrained(folder / "bert", trust_remote_code=True)
results["other_head"] = type(model).__name__
config = transformers.AutoConfig.from_pretrained(folder / "gpt2", trust_remote_code=True)
model = transformers.AutoModel.from_config(config, trust_remote_code=True)
results["config"] = [config.model_type, type(model).__name__]
assert "hf_normswap" not in sys.modules
torch.save({{"returned": returned, "trained": trained}}, folder / "returned.pt")
(folder / "results.json").write_text(json.dumps(results))
"""
    run_fresh(LOADING + script, folder, folder, package=False)
    return folder, expected, json.loads((folder / "results.json").read_text()), torch.load(folder / "returned.pt")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_package_nothing_loads_by_mistake(without_package, family):
    _, _, results, _ = without_package
    named = {"plain": "trust_remote_code=True", "bare": f"`normswap_{family}`", "stock": "hf_normswap"}
    for attempt, name in named.items():
        kind, message = results[family][attempt]
        assert kind == "ValueError"
        assert name in message


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_package_the_folder_brings_its_code(without_package, family):
    _, expected, results, tensors = without_package
    name, module, config = results[family]["class"]
    assert name == f"NormSwap{STOCK_CLASSES[family]}"
    assert module.startswith("transformers_modules.")
    assert config.startswith("NormSwap")
    assert results[family]["is_causal"] == (family == "gpt2")  # where Trainer looks for whose labels to shift
    assert same(tensors["returned"][family], expected[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("no_kernels")
def test_without_the_package_it_trains_and_saves(without_package, models, family):
    folder, _, results, tensors = without_package
    moved = results[family]["moved"]
    for site in find_norms(models[family]):
        assert f"{site.name}.weight" in moved
        assert f"{site.name}.num_batches_tracked" in moved
    # One step on the same batch with the package gives the same model, and the package reads what was saved there.
    model = copy.deepcopy(models[family]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(**torch.load(folder / "batches.pt")[family]).loss.backward()
    optimizer.step()
    inputs = torch.load(folder / "inputs.pt")[family]
    loaded = type(model).from_pretrained(folder / f"{family}_again")
    assert same(outputs(loaded, inputs), tensors["trained"][family])
    assert same(outputs(model, inputs), tensors["trained"][family])
    first = {path.name: path.read_bytes() for path in (folder / family).glob("*.py")}
    again = {path.name: path.read_bytes() for path in (folder / f"{family}_again").glob("*.py")}
    assert first == again
    assert json.loads((folder / family / "config.json").read_text()) == json.loads(
        (folder / f"{family}_again" / "config.json").read_text()
    )


def test_without_the_package_other_heads_open(without_package):
    _, _, results, _ = without_package
    assert results["other_head"] == "NormSwapBertForTokenClassification"
    assert results["config"] == ["normswap_gpt2", "NormSwapGPT2Model"]


# Norms of a user's own


def test_a_norm_of_ones_own_travels(without_package, warnings_on_saving, tmp_path):
    folder, expected, _, tensors = without_package
    assert same(tensors["returned"]["mine"], expected["mine"])
    files = {path.name: path.read_bytes() for path in (folder / "mine").glob("*.py")}
    assert "my_norms.py" in files
    assert {path.name: path.read_bytes() for path in (folder / "mine_again").glob("*.py")} == files

    inputs = torch.load(folder / "inputs.pt")["mine"]
    with users_code(tmp_path / "code") as write_and_import:
        write_and_import("my_norms.py", MY_NORMS)
        for name in ("mine", "mine_again"):
            loaded = AutoModelForMaskedLM.from_pretrained(folder / name)
            assert {site.kind for site in find_norms(loaded)} == {"layernorm", "soft_sign", "centre"}
            assert same(outputs(loaded, inputs), expected["mine"])
        loaded.save_pretrained(tmp_path / "model")
    assert not warnings_on_saving()
    with pytest.raises(ValueError, match="'soft_sign'.*@register_norm") as caught:
        AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert is_one_sentence(caught.value)


def test_norms_of_two_files_travel(warnings_on_saving, tmp_path):
    other = MY_NORMS.replace("soft_sign", "soft").replace('"ss"', '"s"').replace("SoftSign", "Soft")
    with users_code(tmp_path / "code") as write_and_import:
        write_and_import("my_norms.py", MY_NORMS)
        write_and_import("other_norms.py", other.replace("centre", "middle").replace("Centre", "Middle"))
        model = swap_norm(tiny_model("gpt2"), "soft", where="attention")
        swap_norm(model, "centre", where="ffn").save_pretrained(tmp_path / "model")
    assert not warnings_on_saving()
    facade = (tmp_path / "model" / "norms.py").read_text()
    own = Path(norms.__file__).read_text(encoding="utf-8")
    assert facade.startswith(own)
    lines = facade.removeprefix(own).split("\n")
    assert [line.partition(" import")[0] for line in lines if line] == ["from .other_norms", "from .my_norms"]


ONE_NORM = """
from hf_normswap import Norm, register_norm


@register_norm("shrink")
class Shrink(Norm):
    def normalize(self, x, mask):
        return x / 2
"""
OBSTACLES = {
    "foreign": ("mine.py", "import pytest\n" + ONE_NORM, "pytest"),
    "foreign_from": ("mine.py", "from peft.utils import constants\n" + ONE_NORM, "peft"),
    "foreign_inside": ("mine.py", ONE_NORM + "\n\ndef plot():\n    import matplotlib.pyplot\n", "matplotlib"),
    "of_the_package": ("mine.py", "from hf_normswap.swap import swap_norm\n" + ONE_NORM, "hf_normswap"),
    "the_package": ("mine.py", "import hf_normswap\n" + ONE_NORM, "hf_normswap"),
    "public_but_no_norm": ("mine.py", "from hf_normswap import swap_norm\n" + ONE_NORM, "swap_norm"),
    "relative": ("pack/mine.py", "from . import __doc__\n" + ONE_NORM, "imports ."),
    "named_like_ours": ("moments.py", ONE_NORM, "moments.py"),
    "init": ("pack/__init__.py", ONE_NORM, "__init__.py"),
    "nested": (
        "mine.py",
        ONE_NORM
        + "\n\nclass Outer:\n    class Inner(Shrink):\n        pass\n\n\nregister_norm('nested')(Outer.Inner)\n",
        "a class",
    ),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_a_norm_that_cannot_travel(case, warnings_on_saving, tmp_path):
    name, source, said = OBSTACLES[case]
    if case == "foreign_from":
        pytest.importorskip("peft")
    norm = "nested" if case == "nested" else "shrink"
    with users_code(tmp_path / "code") as write_and_import:
        if case == "relative":
            write_and_import("pack/__init__.py", "")
        write_and_import(name, source)
        model = swap_norm(tiny_model("bert"), norm)
        model.save_pretrained(tmp_path / "model")
        (warning,) = warnings_on_saving()
        assert repr(norm) in warning
        assert said in warning
        assert is_one_sentence(warning)
        assert "class Shrink" not in "".join(path.read_text() for path in (tmp_path / "model").glob("*.py"))
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        assert same(outputs(loaded), outputs(model))
    with pytest.raises(ValueError, match=f"There is no norm '{norm}'") as caught:
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert is_one_sentence(caught.value)


def test_a_norm_of_a_function_cannot_travel(without_package, warnings_on_saving, tmp_path):
    with users_code(tmp_path / "code"):

        @register_norm("local")
        class Local(Norm):
            def normalize(self, x, mask):
                return x

        swap_norm(tiny_model("bert"), "local").save_pretrained(tmp_path / "model")
    (warning,) = warnings_on_saving()
    assert "'local'" in warning
    assert "a function" in warning
    kind, message = without_package[2]["local"]
    assert kind == "ValueError"
    assert message.startswith("There is no norm 'local'")


def test_a_norm_typed_at_a_prompt_cannot_travel(tmp_path):
    """It has no source file, and its model is saved and loaded all the same where it is registered."""
    script = (
        ONE_NORM
        + """
import sys
import torch
from transformers import AutoModel, BertConfig, BertModel
from hf_normswap import swap_norm

folder = sys.argv[1]
model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
swap_norm(model, "shrink").eval().save_pretrained(folder)
loaded = AutoModel.from_pretrained(folder).eval()
ids = torch.tensor([[1, 2, 3]])
assert torch.equal(loaded(ids)[0], model(ids)[0])
"""
    )
    done = run_fresh(script, tmp_path, tmp_path / "model")
    assert "The norm 'shrink' cannot travel with the model" in done.stderr


def test_the_public_face_for_norms_of_ones_own():
    """What `from hf_normswap import ...` may name in a norm's file is what the folder's norms.py offers."""
    assert {"Norm", "BatchStatisticNorm", "register_norm", "masked_moments"} <= set(norms.__all__)
