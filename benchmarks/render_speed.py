"""
Tables and picture of docs/speed.md from the figures of benchmarks/norms.py and benchmarks/training.py.

    python benchmarks/render_speed.py
"""

import json
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "pictures" / "speed.svg"
# Okabe and Ito: apart for colour-blind eyes.
COLORS = {"powernorm": "#0072B2", "powernorm, group scaling": "#56B4E9", "batchnorm": "#E69F00", "rbn": "#D55E00"}
STEPS = {"bert": "BERT-base", "gpt2": "GPT-2-small"}


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def describe_machine(result):
    return f"{result['hardware']}, {result['threads']} threads, PyTorch {result['versions']['torch']}"


def show_ratio(row):
    return "{:.2f} [{:.2f}, {:.2f}]".format(row["ratio"], *row["interval"])


def table_of_norms(*names, show=show_ratio):
    """What `show` makes of a figure: a row for each norm, a column for each size and dtype."""
    rows = [row for name in names for row in read(name)["rows"]]
    cases = sorted({(row["dtype"] == "bfloat16", row["channels"], row["tokens"]) for row in rows})
    titles = [f"{tokens // 1024}k x {c}, {'bf16' if is_bf16 else 'f32'}" for is_bf16, c, tokens in cases]
    lines = [["norm", *titles], ["---"] * (len(cases) + 1)]
    for norm in dict.fromkeys(row["norm"] for row in rows):
        cells = []
        for is_bf16, channels, tokens in cases:
            wanted = norm, channels, tokens, "bfloat16" if is_bf16 else "float32"
            of = [r for r in rows if (r["norm"], r["channels"], r["tokens"], r["dtype"]) == wanted]
            cells.append(show(of[0]) if of else "")
        lines.append([norm, *cells])
    return to_markdown(lines)


def table_of_steps():
    lines = [["step", "norm", "ratio", "95 % interval", "seconds with LayerNorm"], ["---"] * 5]
    for path in sorted((RESULTS / "steps").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        said = [f"{STEPS[result['family']]}, {result['batch_size']} x {result['length']} tokens"]
        said += ["checkpointing"] * result["checkpointing"]
        said += [f"DDP on {result['processes']} processes"] * (result["processes"] > 1)
        interval = "{:.3f} to {:.3f}".format(*result["interval"])
        lines.append([", ".join(said), result["norm"], f"{result['ratio']:.3f}", interval, f"{result['seconds']:.2f}"])
    return to_markdown(lines)


def to_markdown(lines):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_scaling():
    """Time of a step over the number of tokens, for each norm, at one width."""
    rows = read("cpu-scaling")["rows"]
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for norm, color in COLORS.items():
        of = sorted((r["tokens"], r["layernorm_milliseconds"] * r["ratio"]) for r in rows if r["norm"] == norm)
        axes.plot(*zip(*of, strict=True), marker="o", color=color, label=norm)
    layer_norm = {}
    for row in rows:
        layer_norm.setdefault(row["tokens"], []).append(row["layernorm_milliseconds"])
    layer_norm = sorted((tokens, sum(values) / len(values)) for tokens, values in layer_norm.items())
    axes.plot(*zip(*layer_norm, strict=True), marker="s", color="#222222", linestyle="--", label="nn.LayerNorm")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward and backward, ms")
    axes.set_title(f"{rows[0]['channels']} channels, {rows[0]['dtype']}, CPU", fontsize=10)
    axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none"}):
        figure.savefig(PICTURE, metadata={"Date": None})


TABLES = {
    "norms": lambda: table_of_norms("cpu-4096", "cpu-16384"),
    "pytorch": lambda: table_of_norms("cpu-pytorch"),
    "kept": lambda: table_of_norms("cpu-kept"),
    "forward": lambda: table_of_norms("cpu-forward"),
    "scaling": lambda: table_of_norms("cpu-scaling"),
    "widths": lambda: table_of_norms("cpu-widths"),
    "memory": lambda: table_of_norms("cpu-16384", show=lambda row: f"{row['memory_ratio']:.3f}"),
    "steps": table_of_steps,
    "machine": lambda: f"Measured on: {describe_machine(read('cpu-4096'))}.",
}


def render(text):
    """The page `text` with its tables made anew."""
    return re.sub(
        r"(<!-- table (\w+) -->).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n\n{TABLES[found[2]]()}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    draw_scaling()
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
