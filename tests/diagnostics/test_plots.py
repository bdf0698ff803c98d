"""Figures of runs."""

import math
import sys

import pytest
import torch

from hf_normswap import DepthSlope, DepthStudy, TidHistory
from hf_normswap.diagnostics.plots import plot_curves, plot_depth, plot_gap, plot_layer, plot_tid


def run(norm, seed, losses, accuracy=(), tid=(), **entries):
    history = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    for entry, value in zip(history, tid):
        entry |= {"tid_mean_max": 0.0 if norm == "powernorm" else value, "tid_var_max": value}
    history += [{"step": 20 * (i + 1), "eval_accuracy": value} for i, value in enumerate(accuracy)]
    return {
        "task": "rte",
        "model": "bert",
        "norm": norm,
        "seed": seed,
        "metrics": {"accuracy": 0.5},
        "history": history,
    } | entries


RESULTS = [
    run("rbn", 0, [1.0, 0.5], [0.6], [0.2, 0.1]),
    run("rbn", 1, [0.8, 0.7], [0.8], [0.4, 0.1]),
    run("layernorm", 0, [0.9, 0.6], [0.7]),
    run("powernorm", 0, [1.1, 0.8], [0.5], [0.3, 0.3]),
]


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def lines(figure, panel):
    """Norm → line, by the legend."""
    (legend,) = figure.legends
    colors = {line.get_color(): text.get_text() for line, text in zip(legend.get_lines(), legend.get_texts())}
    return {colors[line.get_color()]: line for line in panels(figure)[panel].lines}


def test_there_is_a_panel_for_all_that_was_logged():
    figure = plot_curves(RESULTS)
    assert list(panels(figure)) == [
        "training loss",
        "accuracy",
        "TID of the mean, worst layer",
        "TID of the variance, worst layer",
    ]
    assert list(panels(plot_curves(RESULTS[2:3]))) == ["training loss", "accuracy"]


def test_a_line_is_the_mean_over_the_seeds_and_the_shade_their_range():
    figure = plot_curves(RESULTS)
    line = lines(figure, "training loss")["rbn"]
    assert list(line.get_xdata()) == [10, 20]
    assert list(line.get_ydata()) == pytest.approx([0.9, 0.6])
    assert list(lines(figure, "accuracy")["rbn"].get_ydata()) == pytest.approx([0.7])
    shade = panels(figure)["training loss"].collections[0].get_datalim(line.axes.transData)
    assert (shade.ymin, shade.ymax) == pytest.approx((0.5, 1.0))


def test_norms_without_a_discrepancy_have_no_line_of_it():
    figure = plot_curves(RESULTS)
    assert set(lines(figure, "TID of the mean, worst layer")) == {"rbn"}
    assert set(lines(figure, "TID of the variance, worst layer")) == {"rbn", "powernorm"}
    assert panels(figure)["TID of the variance, worst layer"].get_yscale() == "log"


def test_norms_can_be_told_apart_without_colour():
    names = ["layernorm", "batchnorm", "rbn", "powernorm", "pnv", "rmsnorm", "dyt", "own"]
    figure = plot_curves([run(name, 0, [1.0, 0.5]) for name in names])
    drawn = lines(figure, "training loss")
    assert set(drawn) == set(names)
    assert len({line.get_marker() for line in drawn.values()}) == len(names)
    assert len({line.get_color() for line in drawn.values()}) == len(names)


def test_layernorm_comes_first_in_the_legend():
    (legend,) = plot_curves(RESULTS).legends
    assert [text.get_text() for text in legend.get_texts()] == ["layernorm", "rbn", "powernorm"]


def test_what_was_not_finite_is_left_out():
    figure = plot_curves([run("rbn", 0, [1.0, None]), run("rbn", 1, [0.5, 0.5])])
    assert list(lines(figure, "training loss")["rbn"].get_ydata()) == pytest.approx([0.75, 0.5])


def test_a_figure_can_be_written(tmp_path):
    plot_curves(RESULTS).savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("results", "options", "message"),
    [
        ([], {}, "one task, not of 0"),
        ([RESULTS[0], run("rbn", 0, [1.0], task="sst2")], {}, "one task, not of 2"),
        ([run("rbn", 0, [])], {}, "no history"),
        (RESULTS, {"metric": "f1"}, "'f1' was not evaluated"),
    ],
)
def test_bad_results_are_refused(results, options, message):
    with pytest.raises(ValueError, match=message):
        plot_curves(results, **options)


def test_a_missing_matplotlib_is_an_error_that_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_normswap\[plots\]"):
        plot_curves(RESULTS)


def history(*values):
    made = TidHistory([f"layer.{index}" for index in range(len(values[0]))])
    for number, row in enumerate(values, start=1):
        made.add(10 * number, torch.tensor([row, [2 * value for value in row]]))
    return made


def test_every_layer_has_a_line_over_the_training():
    figure = plot_tid(history([0.1, math.nan, 0.4], [0.2, math.nan, 0.3]))
    mean, variance = panels(figure)["TID of the mean"], panels(figure)["TID of the variance"]
    assert [list(line.get_ydata()) for line in mean.lines] == [pytest.approx([0.1, 0.2]), pytest.approx([0.4, 0.3])]
    assert [list(line.get_xdata()) for line in variance.lines] == [[10, 20], [10, 20]]
    luminance = [sum(line.get_color()[:3]) for line in mean.lines]
    assert luminance == sorted(luminance)
    powernorm = TidHistory(["layer.0"])
    powernorm.add(10, torch.tensor([[math.nan], [0.5]]))
    assert "TID of the mean" not in panels(plot_tid(powernorm))
    with pytest.raises(ValueError, match="no entries"):
        plot_tid(TidHistory(["layer.0"]))


def test_one_layer_for_several_norms():
    figure = plot_layer({"batchnorm": history([0.1, 0.3]), "rbn": history([0.2, 0.05])})
    found = {norm: list(line.get_ydata()) for norm, line in lines(figure, "TID of the mean").items()}
    assert found == {"batchnorm": pytest.approx([0.3]), "rbn": pytest.approx([0.05])}


def test_the_gap_is_evaluation_less_training_without_the_penalty():
    more = {"eval_loss": 0.9, "step": 20}
    results = [run("rbn", 0, [1.0, 0.5], tid=[0.2, 0.1]), run("layernorm", 0, [0.9, 0.6])]
    for result in results:
        result["history"].append(more)
    results[0]["history"][1]["rbn_penalty"] = 0.1
    figure = plot_gap(results)
    (points,) = panels(figure)["loss in evaluation − in training"].collections
    assert points.get_offsets().tolist() == [pytest.approx([0.1, 0.9 - 0.4])]
    with pytest.raises(ValueError, match="No run has a TID"):
        plot_gap(results[1:])


def test_a_panel_for_each_placement():
    study = DepthStudy(
        DepthSlope("layernorm", placement, 0.0, 0.1, {2: [1.0, 3.0], 4: [1.0, 1.0]}) for placement in ("post", "pre")
    )
    figure = plot_depth(study)
    line = lines(figure, "gradient of the last layer, pre")["layernorm"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 4], [2.0, 1.0])
