"""Three figures, drawn from what runs have saved (pip install matplotlib).

    python extras/plot.py                          # of the runs in runs/, into runs/: seconds
    python extras/plot.py --run runs/mine --out figures

    effect.png      each change of steer.py beside its controls, and the false calls of both
    grid.png        how many latents, how strong: every cell on dev, the best of each |S| on test
    saturation.png  how many latents does it take: a line for each dictionary, so for each seed

effect.png and grid.png are of --run, or if it has no such results of the newest run that has them.
saturation.png is of all runs with the models, layer and rows of that run. A figure without results
is left out, and the missing command is printed.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
from dfc import atomically, cli, read_metrics


class Finished(NamedTuple):
    """A finished run."""

    folder: Path
    metrics: dict  # what its metrics.json holds


BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"  # colour-blind readers can tell them apart
NO_CHANGE = {"color": ".7", "lw": 1, "zorder": 0}  # the line at 0
CONTROLS = {
    "random": "random direction",
    "latents": "another latent",
    "A - B": "diff of means: A - B",
    "needs - none": "diff of means: tool needed - not",
}
ADDED = {"latents": "the n that separate prompts best", "drawn": "n drawn from the same partition"}
CHANGE = "change of exact calls, percentage points"
INTERVAL = "95 % interval over prompts"
PAGE = {  # for pictures shown 800 pixels wide
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 10,
    "legend.frameon": False,
    "savefig.dpi": 130,
}


# ---- 1. What runs have saved ---------------------------------------------------------------------
def kind_of(folder):
    """A folder's name without its seed: "preset" of preset-seed10."""
    return re.sub(r"-seed\d+", "", folder.name)


def read_runs(folder, last=None):
    """The finished runs anywhere in a folder, newest last; `last` comes after all others. Raises
    ValueError if there is none."""
    files = sorted(folder.glob("**/metrics.json"), key=lambda file: file.stat().st_ctime)
    folders = [file.parent.resolve() for file in files]
    if last:
        folders = [each for each in folders if each != last.resolve()] + [last]
    if not folders:
        raise ValueError(f"no finished run in {folder}: python dfc.py")
    return [Finished(each, read_metrics(each)) for each in folders]


def runs_with(runs, key, command):
    """The runs that hold a result of a command and agree with the newest of them in what same()
    returns. Raises ValueError."""
    found = [run for run in runs if key in run.metrics]
    if not found:
        raise ValueError(f"no result of {command}")
    newest = same(found[-1], key)
    return [run for run in found if same(run, key) == newest]


def same(run, key):
    """What the runs of one picture must have in common."""
    config = run.metrics["config"]
    rows = run.metrics[key]["rows"]
    return config["model_a"], config["model_b"], config["tool_texts"], config["layer"], rows


# ---- 2. Pieces of a figure -----------------------------------------------------------------------
def column(records, key):
    """The values of a key in a list of dicts."""
    return [record[key] for record in records]


def draw_changes(ax, at, changes, sideways=False, **style):
    """Changes {pp, lo, hi} with their intervals at some positions, and the line of no change."""
    pp = np.array(column(changes, "pp"))
    below = pp - column(changes, "lo")
    above = column(changes, "hi") - pp
    style = {"fmt": "o", "color": BLUE, "capsize": 3, **style}

    if sideways:
        ax.errorbar(pp, at, xerr=[below, above], **style)
        ax.axvline(0, **NO_CHANGE)
    else:
        ax.errorbar(at, pp, yerr=[below, above], **style)
        ax.axhline(0, **NO_CHANGE)


# ---- 3. The figures ------------------------------------------------------------------------------
def draw_effect(plt, runs):
    """Each change of steer.py; below it, a row each, what controls of the same length change."""
    run = runs_with(runs, "steering", "python steer.py")[-1]
    steering = run.metrics["steering"]
    changes = steering["changes"]
    fig, (left, right) = plt.subplots(1, 2, sharey=True, width_ratios=[3, 1.4])
    heads = {}  # position: words
    below = {}

    y = 0
    for name, result in changes.items():
        draw_changes(left, [y], [result["effect"]], sideways=True, ms=8)
        right.plot(result["false_calls"], y, "o", ms=8, color=BLUE)
        right.text(116, y, "{pp:+.0f} [{lo:+.0f}, {hi:+.0f}]".format(**result["margin"]),
                   va="center")
        heads[y] = f"{name} (clean: {result['clean']['exact']:.0f} %)"

        # each kind of control
        for control, found in result["controls"].items():
            y += 1
            below[y] = f"{CONTROLS[control]} ({len(found)})"
            for ax, key in ((left, "pp"), (right, "false_calls")):
                ax.plot(column(found, key), [y] * len(found), "o", color=RED, mfc="none")
        y += 1.7

    # the title says what ablating does
    partition = steering["ranking"][0]["partition"]
    n = len(steering["latents"])
    latents = f"one {partition} latent" if n == 1 else f"{n} {partition} latents"
    ablated = changes["ablated in A"]
    before = ablated["clean"]["exact"]
    fig.suptitle(
        f"Ablating {latents} takes A from {before:.0f} % to {before + ablated['effect']['pp']:.0f} "
        f"% exact calls.\n{run.folder.name}, {steering['rows']['needs']} test prompts that need a "
        f"tool; bars: {INTERVAL};\nopen circles: vectors of the same length along other directions")

    # axes
    fig.set_size_inches(9, 1.4 + .18 * y)
    left.set(xlabel=CHANGE, ylim=(y - .9, -1.2))
    left.set_yticks(list(heads), heads.values(), weight="bold")
    left.set_yticks(list(below), below.values(), minor=True)
    for ax in (left, right):
        ax.grid(axis="y", which="both", color=".9")
        ax.tick_params(axis="y", which="both", length=0)
    right.set(xlabel=f"false calls, % of {steering['rows']['none']}\nprompts that need none",
              xlim=(-8, 108))
    right.text(116, -1.7, "margin over the\nstrongest control:")
    return fig


def draw_grid(plt, runs):
    """Every cell on dev, above the best cell of each |S| on test."""
    run = runs_with(runs, "grid", "python extras/grid.py")[-1]
    grid = run.metrics["grid"]
    groups = grid["groups"]
    fig, axes = plt.subplots(2, len(groups), sharey="row", squeeze=False, figsize=(9, 6.4))
    changes = {}
    for name, lines in groups.items():
        changes[name] = np.array([list(line["on_dev"].values()) for line in lines])
    top = max(abs(pp).max() for pp in changes.values()) or 1

    for (upper, lower), (name, lines) in zip(axes.T, groups.items()):
        best = column(lines, "best")
        at = range(len(lines))

        # every cell
        shown = upper.imshow(changes[name], "PuOr_r", aspect="auto", vmin=-top, vmax=top)
        for (y, x), pp in np.ndenumerate(changes[name]):
            upper.text(x, y, f"{pp:+.0f}", ha="center", va="center", fontsize=7,
                       color="w" if abs(pp) > .7 * top else "k")
        alphas = [f"{float(alpha):g}" for alpha in lines[0]["on_dev"]]
        upper.set(title=name, xlabel="strength alpha (1: clean)")
        upper.set_xticks(range(len(alphas)), alphas, size=7)
        upper.set_yticks(at, column(best, "size"))

        # the best of each line
        draw_changes(lower, at, column(best, "test"))
        lower.plot(column(best, "false_calls"), "x", color=RED)
        lower.set_xlabel("latents scaled, |S|, and alpha")
        lower.set_xticks(at, [f"{cell['size']}\n{cell['alpha']:g}" for cell in best])

    axes[0, 0].set_ylabel(f"latents scaled, |S|\n(n = {grid['rows']['dev']} dev prompts)")
    axes[1, 0].set_ylabel(f"percentage points\n(n = {grid['rows']['test']} test prompts)")
    fig.colorbar(shown, ax=axes[0], label="percentage points")
    fig.suptitle(
        "The best cell on dev (|S| = {size}, {group}, alpha {alpha:g}) changes exact calls on test "
        "by {test[pp]:+.0f} points.\n".format(**grid["best"])
        + f"{run.folder.name}; above: {CHANGE}; below: the best alpha of each |S| on test,\n"
        f"{INTERVAL}; crosses: false calls, %")
    return fig


def draw_saturation(plt, runs):
    """Exact calls when the first n latents are ablated: a line for each dictionary."""
    kinds = {}
    for run in runs_with(runs, "saturation_test", "python extras/saturation.py --all"):
        kinds.setdefault(kind_of(run.folder), []).append(run.metrics["saturation_test"])

    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    fig, axes = plt.subplots(lines, columns, sharex=True, sharey=True, squeeze=False,
                             figsize=(9, 1.4 + 2 * lines))
    for ax, (kind, results) in zip(axes.flat, kinds.items()):
        for result in results:
            n = column(result["sizes"], "n")
            ablated = column(result["sizes"], "ablated")
            for added, color in (("drawn", GREY), ("latents", BLUE)):
                exact = [outcome[added]["exact"] for outcome in ablated]
                ax.plot(n, exact, ".-", color=color, lw=.8, label=ADDED[added])
        ax.axhline(result["clean"]["A"]["exact"], color=RED, ls=":", label="clean A")
        ax.set(title=f"{kind.replace('-', ' ')} (seeds: {len(results)})", xscale="log",
               ylim=(-4, 104))
        ax.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"], minor=False)
        ax.minorticks_off()

    fig.supylabel(f"exact calls, % of {results[0]['rows']} test\nprompts that need a tool", size=10)
    fig.supxlabel("latents ablated in A (n)", size=10)
    for ax in axes.flat[len(kinds):]:
        ax.axis("off")

    # what the lines mean, once each; below the title of the figure, as a suptitle would overlap
    handles, labels = axes[0, 0].get_legend_handles_labels()
    once = dict(zip(labels, handles))
    fig.legend(once.values(), once.keys(), loc="outside upper center", ncols=3,
               title="How many latents must be ablated until A stops calling tools? "
                     "A line for each dictionary.")
    return fig


# ---- 4. The program ------------------------------------------------------------------------------
FIGURES = {"effect": draw_effect, "grid": draw_grid, "saturation": draw_saturation}


def pyplot():
    """matplotlib, which only this program needs, set up for these pictures. Raises ValueError."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    plt.switch_backend("Agg")
    plt.rcParams.update(PAGE)
    return plt


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", type=Path, default="runs", help="holds runs (runs/)")
    p.add_argument("--run", type=Path, help="of effect and grid (default: the newest)")
    p.add_argument("--out", type=Path, help="folder of the pictures (default: that of the runs)")
    args = p.parse_args(argv)

    plt = pyplot()
    runs = read_runs(args.folder, args.run)
    for name, draw in FIGURES.items():
        file = (args.out or args.folder) / f"{name}.png"
        try:
            fig = draw(plt, runs)
        except ValueError as e:
            print(f"{file.name} is left out: {e}")
            continue
        with atomically(file) as part:
            fig.savefig(part)
        print(file)


if __name__ == "__main__":
    raise SystemExit(cli(main))
