"""Draw the pictures of docs/concepts.md: `python docs/draw_concepts.py [FOLDER]`, the same bytes each time."""

import sys
from math import nan
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle


# Okabe and Ito: apart for colour-blind eyes.
INK, LINE, TOKEN, STATISTIC, RUNNING = (
    "#222222",
    "#9A9A9A",
    "#EAF2F8",
    "#0072B2",
    "#E69F00",
)
CHANNELS, POSITIONS, LENGTHS = 4, 5, (5, 3, 4)


def new_figure(width, height):
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def write(axes, x, y, text, size=9, **options):
    axes.text(
        x,
        y,
        text,
        **{"fontsize": size, "color": INK, "ha": "center", "va": "center", **options},
    )


def draw_batch(
    axes, left, bottom, is_counted, color=STATISTIC, cell=0.155, gap=0.16, alpha=1.0
):
    """A batch of sequences side by side: columns are positions, rows are channels, pads are hatched."""
    for row, length in enumerate(LENGTHS):
        x0 = left + row * (POSITIONS * cell + gap)
        x1, top = x0 + POSITIONS * cell, bottom + CHANNELS * cell
        end = x0 + length * cell
        axes.add_patch(
            Rectangle(
                (x0, bottom), end - x0, top - bottom, facecolor=TOKEN, alpha=alpha
            )
        )
        pads = {"facecolor": "white", "edgecolor": "#C4C4C4", "hatch": "//////"}
        if length < POSITIONS:
            axes.add_patch(
                Rectangle(
                    (end, bottom),
                    x1 - end,
                    top - bottom,
                    linewidth=0,
                    alpha=alpha,
                    **pads,
                )
            )
        for position in range(length):
            for channel in range(CHANNELS):
                if is_counted(row, position, channel):
                    corner = x0 + position * cell, top - (channel + 1) * cell
                    axes.add_patch(
                        Rectangle(corner, cell, cell, facecolor=color, alpha=alpha)
                    )
        columns = [[(x0 + n * cell,) * 2, (bottom, top)] for n in range(POSITIONS + 1)]
        rows = [[(x0, x1), (bottom + n * cell,) * 2] for n in range(CHANNELS + 1)]
        xs, ys = (
            [value for line in (*columns, *rows) for value in (*line[axis], nan)]
            for axis in (0, 1)
        )
        axes.plot(xs, ys, color=LINE, linewidth=0.6, alpha=alpha)
    return x1


def draw_axes_of_statistics():
    """What one statistic is taken over."""
    figure, axes = new_figure(7.2, 3.65)
    panels = [
        (
            0.55,
            2.45,
            "LayerNorm, RMSNorm",
            "one token, all channels",
            lambda row, t, c: (row, t) == (0, 2),
        ),
        (
            4.15,
            2.45,
            "Group scaling of PowerNorm",
            "one token, one group of channels",
            _is_in_group,
        ),
        (
            0.55,
            0.6,
            "BatchNorm, RBN, PN-V",
            "one channel, all real tokens of the batch",
            _is_second,
        ),
    ]
    for left, bottom, title, caption, is_counted in panels:
        right = draw_batch(axes, left, bottom, is_counted)
        write(axes, (left + right) / 2, bottom + 0.95, title, 10, weight="bold")
        write(axes, (left + right) / 2, bottom - 0.2, caption)
    for row in range(3):
        write(axes, 0.55 + row * 0.935 + 0.39, 2.45 + 0.73, f"sequence {row + 1}", 7)
    write(axes, 0.4, 2.76, "channels", 7, rotation=90)
    write(axes, 0.4, 0.91, "channels", 7, rotation=90)
    write(axes, 0.94, 0.6 + 0.7, "positions", 7)

    left, bottom = 4.15, 0.6
    for age, alpha in ((2, 0.35), (1, 0.65), (0, 1.0)):
        color = RUNNING if age else TOKEN
        end = draw_batch(
            axes,
            left,
            bottom + 0.15,
            _is_second,
            color,
            cell=0.048,
            gap=0.04,
            alpha=alpha,
        )
        write(
            axes,
            (left + end) / 2,
            bottom + 0.47,
            f"batch t − {age}" if age else "batch t",
            7,
        )
        left = end + 0.13
    write(axes, 5.49, bottom + 0.95, "PowerNorm", 10, weight="bold")
    write(
        axes,
        5.49,
        bottom - 0.2,
        "one channel, real tokens of the batches before;\nbatch t counts from the next step on",
    )
    write(axes, 3.6, 0.08, "hatched: padding, which is in no statistic of a batch", 8)
    return figure


def _is_second(row, position, channel):
    return channel == 1


def _is_in_group(row, position, channel):
    return (row, position) == (0, 2) and channel < CHANNELS // 2


def box(axes, x, y, text, color="white", width=1.5, height=0.34):
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.06",
        facecolor=color,
        edgecolor=INK,
        linewidth=0.9,
    )
    axes.add_patch(patch)
    write(axes, x, y, text, color="white" if color == STATISTIC else INK)


def arrow(axes, *points, color=INK, dashes="-"):
    *_, before, end = points
    axes.plot(
        *zip(*points[:-1], before, strict=True),
        color=color,
        linewidth=1,
        linestyle=dashes,
    )
    style = {
        "arrowstyle": "-|>",
        "shrinkA": 0,
        "shrinkB": 0,
        "color": color,
        "linewidth": 1,
        "linestyle": dashes,
    }
    axes.annotate("", end, before, arrowprops=style)


def draw_placements():
    """Post-LN and Pre-LN."""
    figure, axes = new_figure(7.2, 4.1)
    for x, title in ((1.9, "Post-LN: BERT, RoBERTa, Marian"), (5.5, "Pre-LN: GPT-2")):
        write(axes, x, 3.92, title, 10, weight="bold")
    _draw_block(axes, 1.9, ["Self-attention", "+", "norm", "Feed-forward", "+", "norm"])
    _draw_block(axes, 5.5, ["norm", "Self-attention", "+", "norm", "Feed-forward", "+"])
    box(axes, 5.5, 3.5, "final norm", STATISTIC, width=1.3, height=0.3)
    arrow(axes, (5.5, 3.05), (5.5, 3.34))
    return figure


def _draw_block(axes, x, parts):
    axes.add_patch(
        Rectangle(
            (x - 1.5, 0.5),
            3.0,
            2.6,
            fill=False,
            edgecolor=LINE,
            linewidth=0.9,
            linestyle="--",
        )
    )
    write(axes, x + 1.2, 2.97, "block", 7)
    heights = [0.85 + 0.4 * index for index in range(6)]
    arrow(axes, (x, 0.12), (x, heights[0] - 0.16))
    write(axes, x + 0.1, 0.2, "residual stream", 7, ha="left")
    start = 0.58
    for index, (part, y) in enumerate(zip(parts, heights, strict=True)):
        if part == "+":
            axes.plot(
                [x],
                [y],
                marker="o",
                markersize=13,
                markerfacecolor="white",
                markeredgecolor=INK,
            )
            write(axes, x, y, "+", 11)
            arrow(axes, (x, start), (x - 1.15, start), (x - 1.15, y), (x - 0.13, y))
            start = y + (
                0.6
                if "norm" in parts[index + 1 : index + 2] and parts[0] != "norm"
                else 0.2
            )
        else:
            box(
                axes,
                x,
                y,
                part,
                STATISTIC if part == "norm" else "white",
                width=1.3,
                height=0.24,
            )
        if index + 1 < len(parts):
            arrow(axes, (x, y + 0.13), (x, heights[index + 1] - 0.13))
    if parts[0] != "norm":
        arrow(axes, (x, heights[-1] + 0.13), (x, 3.45))


def draw_modes():
    """Which statistics a norm divides by, in training and in evaluation."""
    figure, axes = new_figure(7.2, 2.75)
    titles = (
        "BatchNorm, RBN, PN-V: training",
        "PowerNorm: training",
        "all four: evaluation",
    )
    for index, title in enumerate(titles):
        x = 1.2 + 2.4 * index
        write(axes, x, 2.55, title, 9, weight="bold")
        is_frozen = index == 2
        if not is_frozen:
            box(axes, x, 1.55, "batch", TOKEN, width=1.2)
        box(axes, x, 0.75, "running", RUNNING, width=1.2)
        box(axes, x, 2.15, "x → x̂", width=1.2)
        if index == 0:
            arrow(axes, (x, 1.76), (x, 1.96))
            arrow(axes, (x, 1.36), (x, 0.94), dashes="--")
            write(axes, x + 0.08, 1.15, "update", 7, ha="left")
        elif index == 1:
            arrow(
                axes,
                (x - 0.62, 0.75),
                (x - 0.95, 0.75),
                (x - 0.95, 2.15),
                (x - 0.62, 2.15),
            )
            arrow(axes, (x, 1.36), (x, 0.94), dashes="--")
            write(axes, x + 0.08, 1.15, "update, afterwards", 7, ha="left")
        else:
            arrow(axes, (x, 0.94), (x, 1.96))
        if index:
            axes.plot([2.4 * index] * 2, [0.45, 2.65], color=LINE, linewidth=0.6)
    write(
        axes,
        3.6,
        0.2,
        "An arrow from a box: the tokens are normalised with these statistics.",
        8,
    )
    return figure


PICTURES = {
    "axes": draw_axes_of_statistics,
    "placement": draw_placements,
    "modes": draw_modes,
}


def draw(folder):
    """Write every picture into `folder`."""
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "hf_normswap",
            "font.family": "DejaVu Sans",
            "hatch.linewidth": 0.6,
        }
    ):
        for name, make in PICTURES.items():
            # The version that drew it is in the file: another one may draw other bytes.
            metadata = {"Date": None, "Creator": f"Matplotlib {matplotlib.__version__}"}
            make().savefig(Path(folder, f"{name}.svg"), metadata=metadata)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
