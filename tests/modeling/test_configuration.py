"""What a saved configuration says, what is refused in it, and that it is JSON like any other."""

import json
import re

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from hf_normswap import NormSwapConfig, available_norms, swap_norm
from hf_normswap.modeling import configuration_normswap as configuration
from tests.helpers.models import FAMILIES, tiny_config, tiny_model
from tests.helpers.persistence import edit_config, is_one_sentence, outputs, same


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A saved model of each family; tests that edit it copy its configuration first."""
    path = tmp_path_factory.mktemp(request.param)
    swap_norm(tiny_model(request.param), NormSwapConfig("powernorm", alpha_fwd=0.75)).save_pretrained(path)
    return path


@pytest.fixture
def masked(tmp_path):
    swap_norm(tiny_model("bert", "BertForMaskedLM"), "powernorm").save_pretrained(tmp_path)
    return tmp_path


def test_what_is_saved(folder):
    content = json.loads((folder / "config.json").read_text())
    assert content["model_type"].startswith("normswap_")
    assert content["architectures"][0].startswith("NormSwap")
    assert content["fusion_config"] == {configuration.STOCK_CLASS_GUARD: False}
    record = content["norm_swap"]
    assert record["format_version"] == 1
    (entry,) = record["norms"]
    assert entry["norm"] == "powernorm"
    assert entry["options"] == {"alpha_fwd": 0.75, "num_groups": 4, "group_scaling": True}
    assert len(entry["modules"]) == {"marian": 10}.get(content["model_type"].removeprefix("normswap_"), 4)


def test_reading_and_writing_changes_nothing(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert type(config).from_json_file(tmp_path / "config.json").to_json_string() == config.to_json_string()


def test_values_are_those_of_the_stock_configuration(folder):
    config = AutoConfig.from_pretrained(folder)
    family = config.model_type.removeprefix("normswap_")
    stock = tiny_config(family).to_dict()
    ours = config.to_dict()
    bookkeeping = {"model_type", "architectures", "auto_map", "norm_swap", "fusion_config", "dtype", "_name_or_path"}
    assert {name: ours[name] for name in stock.keys() - bookkeeping} == {
        name: stock[name] for name in stock.keys() - bookkeeping
    }
    assert isinstance(config, type(tiny_config(family)))
    assert ours.keys() - stock.keys() == {"auto_map", "norm_swap", "fusion_config"}


def test_the_map_of_classes_names_every_head(folder):
    """For every Auto class that knows the stock model, the saved folder names a class of its code."""
    content = json.loads((folder / "config.json").read_text())
    family = content["model_type"].removeprefix("normswap_")
    stock = type(tiny_config(family))
    expected = {"AutoConfig": f"modeling_normswap.NormSwap{stock.__name__}"}
    for name in dir(transformers):
        mapping = (
            getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        )
        if mapping is not None and stock in mapping:
            expected[name] = f"modeling_normswap.NormSwap{mapping[stock].__name__}"
    assert expected.items() <= content["auto_map"].items()
    for path in content["auto_map"].values():
        assert (folder / f"{path.partition('.')[0]}.py").is_file()


@pytest.mark.parametrize("norm", available_norms())
def test_every_norm_fits_in_json(norm):
    model = swap_norm(tiny_model("bert"), norm)
    assert json.loads(model.config.to_json_string())["norm_swap"] == model.config.norm_swap


def test_a_fusion_of_the_users_own_is_kept():
    for guard in (configuration.STOCK_CLASS_GUARD, "hf_normswap"):  # folders saved earlier have the latter
        config = configuration.NormSwapBertConfig(fusion_config={"mine": True, guard: False})
        assert config.fusion_config == {"mine": True}
        assert config.to_dict()["fusion_config"] == {"mine": True, configuration.STOCK_CLASS_GUARD: False}


def test_an_empty_record_is_a_model_of_layernorms():
    model = AutoModel.from_config(configuration.NormSwapBertConfig(**tiny_config("bert").to_dict()))
    model.load_state_dict(tiny_model("bert", "BertModel").state_dict())
    assert same(outputs(model), outputs(tiny_model("bert", "BertModel")))


def newer(record):
    record["format_version"] = 2


def without_version(record):
    del record["format_version"]


def unknown_entry(record):
    record["placements"] = []


def unknown_entry_of_a_norm(record):
    record["norms"][0]["phase"] = 1


def missing_entry_of_a_norm(record):
    del record["norms"][0]["options"]


def missing_norms(record):
    del record["norms"]


def unknown_norm(record):
    record["norms"][0]["norm"] = "pwernorm"


def unknown_option(record):
    record["norms"][0]["options"]["alpha_forward"] = 0.9


def no_site(record):
    record["norms"][0]["modules"].append("bert.encoder.layer.0.attention.self.query")


def foreign_site(record):
    record["norms"][0]["modules"].append("transformer.h.0.ln_1")


def missing_layer(record):
    record["norms"][0]["modules"].append("bert.encoder.layer.2.output.LayerNorm")


def indivisible_groups(record):
    record["norms"][0]["options"]["num_groups"] = 5


REFUSED = {
    newer: "upgrade hf_normswap",
    without_version: "format None",
    unknown_entry: "placements",
    unknown_entry_of_a_norm: "phase",
    missing_entry_of_a_norm: "options",
    missing_norms: "norms",
    unknown_norm: "'powernorm'",
    unknown_option: "'alpha_fwd'",
    no_site: "'bert.encoder.layer.0.attention.self.query', which is no norm",
    foreign_site: "'transformer.h.0.ln_1', which is no norm",
    missing_layer: "number of layers",
    indivisible_groups: "num_groups",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_a_folder_may_not_say(spoil, masked):
    edit_config(masked, lambda content: spoil(content["norm_swap"]))
    with pytest.raises(ValueError, match=re.escape(REFUSED[spoil])) as caught:
        AutoModelForMaskedLM.from_pretrained(masked)
    assert is_one_sentence(caught.value), caught.value


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_an_override_may_not_say(spoil, masked):
    """`from_pretrained` sets its overrides after the configuration has checked itself."""
    config = AutoConfig.from_pretrained(masked)
    spoil(config.norm_swap)
    with pytest.raises(ValueError, match=re.escape(REFUSED[spoil])) as caught:
        AutoModelForMaskedLM.from_pretrained(masked, norm_swap=config.norm_swap)
    assert is_one_sentence(caught.value), caught.value


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_group": 4}, "did you mean 'num_groups'"),
        ({"momentum": 0.1}, "'alpha_fwd'"),
        ({"device": "cpu"}, "'device'"),
        ({"zzz": 1}, "'zzz'"),
    ],
)
def test_options_are_checked_when_named(options, names):
    with pytest.raises(ValueError, match=re.escape(names)) as caught:
        NormSwapConfig("powernorm", **options)
    assert is_one_sentence(caught.value), caught.value


def test_a_norm_and_its_options_compare_and_print():
    config = NormSwapConfig("Power-Norm", num_groups=2)
    assert config == NormSwapConfig("pn", num_groups=2)
    assert config != NormSwapConfig("pn")
    assert config != "powernorm"
    assert eval(repr(config)) == config
    assert NormSwapConfig.of(config) is config
    assert NormSwapConfig.of("BN") == NormSwapConfig("batchnorm")
