"""Model cards."""

import copy
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BertForSequenceClassification

from hf_normswap import find_norms, fold_norms, set_norm_placement, swap_norm
from hf_normswap.reporting.card import card_of_model, render_card
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import ROOT
from tests.helpers.results import RESULTS, make_result


def render(results=RESULTS, **options):
    return render_card(results, **{"norm": "powernorm", "repo_id": "someone/bert-rte", **options})


def numbers_of(text):
    return re.findall(r"(?<![\w.-])\d+(?:\.\d+)?", text)


def test_the_card_tells_what_the_results_say():
    text = render().text
    for expected in (
        "| powernorm | `num_groups=4`, `group_scaling=True`, `grad_scale=running`, `alpha_fwd=0.9`, ",
        "| rte | google-bert/bert-base-uncased | powernorm | 2 | 0.6300 ± 0.0283 |",
        "| rte | google-bert/bert-base-uncased | layernorm | 1 | 0.6700 |",
        "majority class 0.5271",
        "277 examples of rte; all norms with the same recipe. Seeds of powernorm: 0, 1.",
        "| step | tid_var_max |\n|---|---|\n| 1 | 0.75 |\n\n",
        "| `norm_warmup_ratio` | `0.1` |",
        "| `learning_rate` | `3e-05` |",
        "python recipes/glue.py rte.yaml --seed 0\npython recipes/glue.py rte.yaml --seed 1\n",
        "Versions: python 3.12.9, torch 2.9.1. Hardware: one kind of CPU.",
        "arxiv.org/abs/2003.07845",
    ):
        assert expected in text
    for unknown in ("tid_mean_max", "./bert", "`seed`"):
        assert unknown not in text


def test_the_metadata_is_what_the_hub_reads():
    card = ModelCard(str(render(license="apache-2.0")))  # parsed again, as the Hub does
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "text-classification",
        "apache-2.0",
    )
    assert data.base_model == "google-bert/bert-base-uncased"
    assert set(data.tags) == {"hf_normswap", "powernorm", "custom_code"}
    (score,) = data.eval_results
    assert (score.dataset_type, score.dataset_name, score.metric_type) == ("nyu-mll/glue", "rte", "accuracy")
    assert score.metric_value == pytest.approx(0.63)
    assert data.model_name == "bert-rte"


def test_every_number_comes_from_the_results():
    """Without figures in the results there is none in the card, but for names and the bibliography."""
    bare = make_result("powernorm", 0, None)
    for entry in ("baselines", "arguments", "history", "versions", "hardware", "command"):
        del bare[entry]
    bare = bare | {"model": "model", "seed": 0}
    bare["norm_swap"]["norms"][0] |= {"norm": "a norm of somebody else's", "options": {}}
    text = render([bare]).text.partition("## Citation")[0]
    # The seed, the number of runs, and how many norms are in either place.
    assert sorted(numbers_of(text)) == ["0", "1", "2", "2"]


def test_a_result_that_changes_changes_the_card():
    changed = copy.deepcopy(RESULTS)
    changed[0]["metrics"]["accuracy"] = 0.69
    assert "0.6700 ± 0.0283" in render(changed).text
    changed[2]["arguments"]["learning_rate"] = 1e-4
    assert "the recipes of the norms differ in `learning_rate`. Seeds" in render(changed).text


def test_a_base_model_without_an_id_on_the_hub_is_not_linked():
    results = [result | {"model": "bert-2x96"} for result in RESULTS]
    assert render(results).data.base_model is None


def test_the_snippet_loads_the_model(tmp_path, monkeypatch):
    model = swap_norm(tiny_model("bert", "BertForSequenceClassification"), "powernorm").eval()
    assert isinstance(model, BertForSequenceClassification)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    card = render(repo_id=None, folder="model").text
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    snippet = snippet.replace("<your-namespace>/model", "./model")  # as the card says
    names = {}
    exec("\n".join(line for line in snippet.splitlines() if not line.startswith("tokenizer")), names)
    inputs = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(names["model"](inputs).logits, model(inputs).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rbn"}, "No result is of the norm 'rbn', only of powernorm, layernorm"),
        ({"auto_class": "AutoModelForAll"}, "auto_class 'AutoModelForAll' is none of"),
        ({"results": [*RESULTS, make_result("powernorm", 0, 0.6, task="mrpc")]}, "2 tasks or models"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        render(**options)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["render"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


def test_the_cards_of_the_project_are_those_of_their_results(script):
    written = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "model_cards").glob("*.md")}
    assert written == script.render_all()


def test_every_figure_of_a_card_is_in_a_result(script):
    """Each number under Results: as it stands in a result, or mean or deviation over the seeds, worked out anew."""
    for name, variant in script.VARIANTS.items():
        by_norm = {norm: variant.load(norm) for norm in ("layernorm", *script.NORMS)}
        columns = [
            [run["metrics"][metric] for run in runs] for runs in by_norm.values() for metric in runs[0]["metrics"]
        ]
        known = [np.mean(column) for column in columns]
        known += [np.std(column, ddof=1) for column in columns if len(column) > 1]
        known += [len(runs) for runs in by_norm.values()]
        for runs in by_norm.values():
            for entries in zip(*(run["history"] for run in runs)):
                known += [np.mean([entry.get(key, 0) for entry in entries]) for key in entries[0]]
        known += [float(number) for number in numbers_of(json.dumps([run["arguments"] for run in runs]))]
        known += [run["seed"] for run in runs]
        known = np.array(known)
        for norm in variant.norms:
            card = (ROOT / "model_cards" / f"{name}-{norm}.md").read_text(encoding="utf-8")
            shown = numbers_of(card.partition("## Results")[2].partition("## Training")[0])
            shown += re.findall(r"^ +value: (\S+)$", card, re.MULTILINE)
            assert len(shown) > 5
            for number in shown:
                last_digit = 10.0 ** -len(number.partition(".")[2])
                assert np.abs(known - float(number)).min() <= 0.51 * last_digit, (name, norm, number)


@pytest.mark.parametrize("family", ["bert", "roberta", "marian", "gpt2"])
def test_a_model_without_results_has_a_card_too(family):
    model = set_norm_placement(tiny_model(family).eval(), "pre")
    swap_norm(model, "rbn", where="all", calibrate_on=[tiny_batch(model, (6, 3, 9, 5))])
    card = card_of_model(model, "someone/model-rbn", license="mit")
    r2 = model.config.norm_swap["calibration"].values()
    assert f"R² {min(r2):.2f} to {max(r2):.2f}" in card.text
    assert ("pre placement" in card.text) == (family != "gpt2")
    assert "## Results" not in card.text
    assert card.data.eval_results is None
    assert "rbn" in card.data.tags
    fold_norms(model)
    folded = card_of_model(model, "someone/model-rbn")
    left = len(find_norms(model))
    assert ("norms were folded" in folded.text) == (left > 0)
    assert ("without norms" in folded.text) == ("norm-free" in folded.data.tags) == (left == 0)
    assert ("What was swapped" in folded.text) == (left > 0)


def test_a_card_is_of_a_swapped_model():
    with pytest.raises(ValueError, match="no swapped norms"):
        card_of_model(tiny_model("bert"), "someone/model")


def test_a_run_of_an_earlier_version_has_the_defaults_of_its_time():
    """The record of that version has no weights of RBN's penalty, which were 0.1."""
    card = str(render([make_result("rbn", 0, 0.7)], norm="rbn"))
    assert "`lambda_mean=0.1`, `lambda_var=0.1`" in card
    told = make_result("rbn", 0, 0.7)
    told["norm_swap"]["norms"][0]["options"] = {"lambda_mean": 8.0, "lambda_var": 4.0}
    assert "`lambda_mean=8.0`, `lambda_var=4.0`" in str(render([told], norm="rbn"))


def test_a_mean_says_of_how_many_runs_it_is():
    """Diverged runs have no score."""
    results = [make_result("powernorm", 0, 0.9), make_result("powernorm", 1, None), make_result("powernorm", 2, None)]
    (score,) = render(results).data.eval_results
    assert (score.metric_value, score.metric_name) == (0.9, "accuracy (mean over 1 of 3 seeds)")


def test_a_discrepancy_that_was_no_number_is_left_out():
    history = [{"step": step, "tid_mean_max": mean, "tid_var_max": 0.5} for step, mean in ((1, None), (2, 0.5))]
    text = render([make_result("batchnorm", 0, 0.6, history=history)], norm="batchnorm").text
    assert "| step | tid_var_max |\n" in text


def test_a_result_without_a_record_of_the_swap():
    result = make_result("powernorm", 0, 0.6)
    del result["norm_swap"]
    assert "0.6000" in render([result]).text
