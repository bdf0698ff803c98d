"""Tables and picture of docs/speed.md, and the tables for GPUs of docs/folding.md."""

import math

from records import FOLDER, read, show_ratio, table


GPU = FOLDER / "gpu"
PICTURE = FOLDER.parent / "docs/pictures/speed.svg"
# Okabe and Ito: apart for colour-blind eyes.
COLORS = {"powernorm": "#0072B2", "powernorm, group scaling": "#56B4E9", "batchnorm": "#E69F00", "rbn": "#D55E00"}
STEPS = {"bert": "BERT-base", "gpt2": "GPT-2-small"}


def read_speed(name):
    return read(FOLDER / f"speed/{name}.json")


def describe_machine(result):
    return f"{result['hardware']}, {result['threads']} threads, PyTorch {result['versions']['torch']}"


def table_of_norms(*names, show=show_ratio):
    """What `show` makes of a figure: a row for each norm, a column for each size and dtype."""
    rows = [row for name in names for row in read_speed(name)["rows"]]
    cases = sorted({(row["dtype"] == "bfloat16", row["channels"], row["tokens"]) for row in rows})
    titles = [f"{tokens // 1024}k x {c}, {'bf16' if is_bf16 else 'f32'}" for is_bf16, c, tokens in cases]
    lines = [["norm", *titles]]
    for norm in dict.fromkeys(row["norm"] for row in rows):
        cells = []
        for is_bf16, channels, tokens in cases:
            wanted = norm, channels, tokens, "bfloat16" if is_bf16 else "float32"
            of = [r for r in rows if (r["norm"], r["channels"], r["tokens"], r["dtype"]) == wanted]
            cells.append(show(of[0]) if of else "")
        lines.append([norm, *cells])
    return table(lines)


def table_of_steps():
    lines = [["step", "norm", "ratio", "95 % interval", "seconds with LayerNorm"]]
    for path in sorted((FOLDER / "speed/steps").glob("*.json")):
        result = read(path)
        said = [f"{STEPS[result['family']]}, {result['batch_size']} x {result['length']} tokens"]
        said += ["checkpointing"] * result["checkpointing"]
        said += ["without compiled code"] * (result.get("kernels") == "none")
        said += [f"DDP on {result['processes']} processes"] * (result["processes"] > 1)
        interval = "{:.3f} to {:.3f}".format(*result["interval"])
        lines.append([", ".join(said), result["norm"], f"{result['ratio']:.3f}", interval, f"{result['seconds']:.2f}"])
    return table(lines)


def draw_scaling():
    """Time of a step over the number of tokens, for each norm, at one width."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = read_speed("cpu-scaling")["rows"]
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


def read_phase(folder, phase):
    """What a phase of benchmarks/gpu.py left in a folder, `None` if nothing."""
    path = folder / f"{phase}.json"
    return read(path) if path.exists() else None


def read_hardware(phase):
    """The figures of a phase that the pages show.

    Raises:
        ValueError: when they are those of a dry run.
    """
    record = read_phase(GPU, phase)
    if record and (record["device"] != "cuda" or record["quick"]):
        raise ValueError(f"{GPU / phase}.json is of a dry run: remove it.")
    return record


def table_of_gpu(phase, record, **options):
    """The table of a phase, or that there is none."""
    rows = [row for row in record["rows"] if not isinstance(row.get("error"), str)] if record else []
    return GPU_TABLES[phase](rows, **options) if rows else "Not measured."


def table_of_facts(rows):
    lines = [[name, str(value)] for name, value in rows[0].items() if name not in ("fact", "bandwidth", "took")]
    bandwidth = ["copy, read and written", f"{rows[0]['bandwidth'] / 1e12:.3f} TB/s"]
    return table([["device", ""], *lines, bandwidth])


def table_of_correctness(rows):
    lines = [["norm", "path", "dtype", "largest error / that of LayerNorm", "correct"]]
    for row in rows:
        if "errors" in row:
            ratio = max(row["errors"][key] / error for key, error in row["layernorm_errors"].items())
            lines.append([row["norm"], row["path"], row["dtype"], f"{ratio:.2f}", "yes" if row["correct"] else "no"])
    tests = [f"{row['norm']}: {row['passed']} passed, {row['failed']} failed." for row in rows if "passed" in row]
    return "\n\n".join([table(lines).rstrip(), *tests])


def table_of_gpu_norms(rows, part="both"):
    cases = list(dict.fromkeys((row["dtype"], row["channels"], row["tokens"]) for row in rows))
    titles = [f"{n // 1024}k x {c}, {'bf16' if dtype == 'bfloat16' else 'f32'}" for dtype, c, n in cases]
    lines = [["norm", "path", *titles]]
    for norm, path in dict.fromkeys((row["norm"], row["path"]) for row in rows):
        cells = []
        for case in cases:
            found = [
                r
                for r in rows
                if (r["norm"], r["path"], r["dtype"], r["channels"], r["tokens"]) == (norm, path, *case)
            ]
            cells.append(f"{show_ratio(found[0][part])}, {found[0][part]['bandwidth_share']:.0%}" if found else "")
        lines.append([norm, SAID[path], *cells])
    return table(lines)


def table_of_gpu_steps(rows):
    lines = [["step", "norm", "path", "ratio", "ms with LayerNorm", "memory"]]
    for row in rows:
        said = f"{row['model']}, {row['batch_size']} x {row['length']} tokens" + ", compiled" * row["compiled"]
        memory = f"{row['peak_bytes'] / row['layernorm_peak_bytes']:.3f}" if row["peak_bytes"] else ""
        milliseconds = f"{row['layernorm_milliseconds']:.1f}"
        lines.append([said, row["norm"], SAID[row["path"]], show_ratio(row), milliseconds, memory])
    return table(lines)


def table_of_gpu_inference(rows):
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [["", "model", *ways, "error"]]
    for case in dict.fromkeys((row["task"], row["batch_size"], row["dtype"], row["kind"]) for row in rows):
        found = {r["way"]: r for r in rows if (r["task"], r["batch_size"], r["dtype"], r["kind"]) == case}
        task, batch_size, dtype, kind = case
        if kind == "layernorm":
            cells, error = [f"{found[way]['milliseconds']:.2f} ms" if way in found else "" for way in ways], ""
        else:
            cells = [show_ratio(found[way]) if way in found else "" for way in ways]
            error = max((r["difference"] for r in found.values() if r["difference"] is not None), default=None)
            error = "" if error is None else f"{error:.0e}"
        lines.append([f"{TASKS[task]}, batch {batch_size}, {dtype}", kind, *cells, error])
    return table(lines)


def table_of_launch(rows):
    lines = [["steps", "norm", "difference", "equal"]]
    lines += [[r["launch"], r["norm"], f"{r['difference']:.0e}", "yes" if r["equal"] else "no"] for r in rows]
    return table(lines)


def table_of_words(rows):
    lines = [["norm", "seed", "perplexity, validation", "perplexity, test", "best step"]]
    for row in rows:
        scores = [f"{math.exp(min(row[name], 700)):.1f}" for name in ("validation_loss", "test_loss")]
        lines.append([row["norm"], str(row["seed"]), *scores, str(row["best_step"])])
    return table(lines)


def render_folder(folder):
    """All tables of what benchmarks/gpu.py left in a folder, with errors, and with where they are from."""
    parts = []
    for phase in GPU_TABLES:
        if record := read_phase(folder, phase):
            said = f"{record['device']}{', dry run' * record['quick']}, {record['seconds']:.0f} s, {record['ended']}"
            errors = [f"- {row}" for row in record["rows"] if isinstance(row.get("error"), str)]
            parts += [f"## {phase} ({said})", table_of_gpu(phase, record), *errors]
    return "\n\n".join(parts)


def choose_defaults(correctness, norms):
    """`(norm, dtype)` for which the kernels are to be the default on CUDA (see `FASTEST` in hf_normswap/kernels).

    They are correct, and in every variant of the norm the whole interval of their ratio lies below that of PyTorch, in
    the forward, and in forward and backward together, at every number of channels.
    """
    chosen = set()
    rows = [row for row in norms["rows"] if "both" in row and row["path"] in ("kernels", "pytorch")]
    for norm, dtype in dict.fromkeys((row["norm"].partition(",")[0], row["dtype"]) for row in rows):

        def of(all_rows, norm=norm, dtype=dtype):
            return [row for row in all_rows if (row["norm"].partition(",")[0], row.get("dtype")) == (norm, dtype)]

        checks = [row for row in of(correctness["rows"]) if row["path"] == "kernels"]
        intervals = {
            (r["norm"], r["channels"], part, r["path"]): r[part]["interval"] for r in of(rows) for part in PARTS
        }
        pairs = [
            (value, intervals.get((*key[:3], "pytorch"))) for key, value in intervals.items() if key[3] == "kernels"
        ]
        faster = pairs and all(theirs and ours[1] < theirs[0] for ours, theirs in pairs)
        if checks and all(row.get("correct") for row in checks) and faster:
            chosen.add((norm, dtype))
    return chosen


PARTS = ("forward", "both")
SAID = {"kernels": "kernels", "pytorch": "PyTorch", "compile": "torch.compile", None: ""}
TASKS = {"decode": "GPT-2-small, the next token after 128", "encode": "BERT-base, rows of 128 tokens"}
GPU_TABLES = {
    "facts": table_of_facts,
    "correctness": table_of_correctness,
    "norms": table_of_gpu_norms,
    "steps": table_of_gpu_steps,
    "inference": table_of_gpu_inference,
    "launch": table_of_launch,
    "train": table_of_words,
}
TABLES = {
    "cpu-norms": lambda: table_of_norms("cpu-4096", "cpu-16384"),
    "cpu-pytorch": lambda: table_of_norms("cpu-pytorch"),
    "cpu-kept": lambda: table_of_norms("cpu-kept"),
    "cpu-forward": lambda: table_of_norms("cpu-forward"),
    "cpu-scaling": lambda: table_of_norms("cpu-scaling"),
    "cpu-widths": lambda: table_of_norms("cpu-widths"),
    "cpu-memory": lambda: table_of_norms("cpu-16384", show=lambda row: f"{row['memory_ratio']:.3f}"),
    "cpu-steps": table_of_steps,
    "cpu-machine": lambda: f"Measured on: {describe_machine(read_speed('cpu-4096'))}.",
}
TABLES |= {f"gpu_{phase}": lambda phase=phase: table_of_gpu(phase, read_hardware(phase)) for phase in GPU_TABLES}
TABLES["gpu_forward"] = lambda: table_of_gpu("norms", read_hardware("norms"), part="forward")
