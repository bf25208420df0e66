"""Four figures, drawn from what runs have saved (pip install matplotlib).

    python extras/plot.py                          # of the runs in runs/, into runs/: seconds
    python extras/plot.py --run runs/mine --out figures

    effect.png   each change of steer.py beside its controls, and the false calls of both
    grid.png     how many latents, how strong: the best alpha of each |S|, beside differences of
                 means (paper, Figure 3)
    dose.png     exact calls left against what is ablated along one direction
    map.png      decoder rows of the newest DFC and of the newest plain crosscoder (Figure 2)

effect.png is of --run, or if it has no such result of the newest run that has one. grid.png and
dose.png are of all runs with the models, layer and prompts of the newest. A figure without results
is left out, and the missing command is printed.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
from saturation import kind_of

from dfc import atomically, cli, load, read_metrics, read_rows


class Finished(NamedTuple):
    """A finished run."""

    folder: Path
    metrics: dict  # what its metrics.json holds


BLUE, RED = "#0072B2", "#D55E00"  # colour-blind readers can tell them apart
CONTROLS = {
    "random": "random direction",
    "latents": "another latent",
    "A - B": "mean of A - B",
    "diff of means": "difference of means",
}
COLORS = ("#56B4E9", "#002B5C", "#CC79A7", "#D55E00", "#0072B2", "#009E73", "#999999")
OURS = "our recipe, all sizes"
OURS_BUT = "our recipe, but untied or with B-exclusive latents"
LABELS = {  # of saturation.py's kinds, by their folders
    "preset": OURS,
    "1024-k-16": OURS,
    "8192-k-45": OURS,
    "untied": OURS_BUT,
    "with-B-exclusive": OURS_BUT,
    "as-published": "the paper's recipe",
    "plain": "plain crosscoder",
}
OTHERS = {  # of its other lines
    "A - B": "instead, as long: mean of A - B",
    "diff of means": "instead, as long: difference of means",
    "u": "instead: the same vector along u on every prompt",
}
MARKS = {  # marker and colour, in the order of drawing
    OTHERS["A - B"]: (".", "#E69F00"),
    OTHERS["diff of means"]: ("|", "#CC79A7"),
    OTHERS["u"]: ("*", "black"),
    OURS: ("o", BLUE),
    "plain crosscoder": ("^", RED),
    OURS_BUT: ("+", "grey"),
    "the paper's recipe": ("x", "#009E73"),
}
CHANGE = "change of exact calls, percentage points"
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
    """The runs whose result of a command is of the same prompts as that of the newest. Raises
    ValueError."""
    found = [run for run in runs if key in run.metrics]
    if not found:
        raise ValueError(f"no result of {command}")
    newest = same(found[-1], key)
    return [run for run in found if same(run, key) == newest]


def same(run, key):
    """What the runs of one figure share: models, layer and rows, or a fingerprint of them."""
    result = run.metrics[key]
    if isinstance(result, str):
        return result
    config = run.metrics["config"]
    return (config["model_a"], config["model_b"], config["tool_texts"], config["layer"],
            result["rows"])


# ---- 2. Pieces of a figure -----------------------------------------------------------------------
def column(records, key):
    """The values of a key in a list of dicts."""
    return [record[key] for record in records]


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
        pp, lo, hi = (result["effect"][key] for key in ("pp", "lo", "hi"))
        left.errorbar(pp, y, xerr=[[pp - lo], [hi - pp]], fmt="o", ms=8, capsize=3, color=BLUE)
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
        "tool; bars: 95 % intervals;\nopen circles: vectors of equal length in other directions")

    # axes
    left.axvline(0, color=".7", lw=1, zorder=0)
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
    """The best alpha of each |S|, on test, a line for each group; and the false calls. Differences
    of means stand beside them."""
    groups = {}  # {group: {|S|: the best cell of each dictionary}}
    for run in runs_with(runs, "grid", "python extras/grid.py"):
        for group, lines in run.metrics["grid"]["groups"].items():
            for line in lines:
                best = line["best"]
                groups.setdefault(group, {}).setdefault(best["size"], []).append(best)
    rows = run.metrics["grid"]["rows"]["test"]

    fig, axes = plt.subplots(1, 2, figsize=(9, 4))
    for color, (group, cells) in zip(COLORS, groups.items()):
        changes = []
        false_calls = []
        for best in cells.values():
            changes.append(np.mean(column(column(best, "test"), "pp")))
            false_calls.append(np.mean(column(best, "false_calls")))
        for ax, values in zip(axes, (changes, false_calls)):
            if len(values) == 1:
                ax.axhline(values[0], color=color, ls=":", label=CONTROLS.get(group, group))
            else:
                ax.plot(list(cells), values, "o-", color=color, label=group)

    for ax in axes:
        ax.set(xlabel="latents scaled up together, |S|", xscale="log")
        ax.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        ax.minorticks_off()
    axes[0].set_ylabel(f"{CHANGE}\n({rows} test prompts that need a tool)")
    axes[1].set(ylabel="false calls, % of other prompts", ylim=(-4, 104))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.suptitle("Scaled up, A-exclusive latents add calls, shared ones do not. A difference of\n"
                 "means adds as many. (alpha chosen on dev prompts; mean over dictionaries)")
    return fig


def draw_dose(plt, runs):
    """Exact calls left against what is removed along u: a mark for each dictionary and n."""
    groups = {name: [] for name in MARKS}
    for run in runs_with(runs, "saturation_test", "python extras/saturation.py --all"):
        kind = kind_of(run.folder)
        for line in read_rows(f"{run.folder}/saturation_test.jsonl", ()):
            name = line["name"]
            if name == "latents":
                groups.setdefault(LABELS.get(kind, kind), []).append(line)
            elif name.startswith("u x"):
                groups[OTHERS["u"]].append(line)
            elif line["n"] and name in OTHERS:
                groups[OTHERS[name]].append(line)
    n_rows = len(line["greedy"]["exact"])

    fig, ax = plt.subplots(figsize=(9, 4.8))
    for name, lines in groups.items():
        if not lines:
            continue
        marker, color = MARKS.get(name, ("s", "black"))
        exact = [100 * np.mean(line["greedy"]["exact"]) for line in lines]
        ax.plot(column(lines, "along u"), exact, ls="", marker=marker, ms=6, mfc="none",
                color=color, label=name)
    ax.set(xlabel="part along u of what is removed (all of it is removed)", ylim=(-4, 104),
           ylabel=f"exact calls left, % of {n_rows} test prompts\nthat need a tool, greedy answers")
    fig.legend(loc="outside lower center", ncols=2)
    fig.suptitle("Latents of our recipe stop A's calls by what they remove along one direction, u."
                 "\nPlain crosscoders and the difference of means may act otherwise.\n"
                 "(A mark: one dictionary with its best n latents ablated)")
    return fig


def draw_map(plt, runs):
    """The decoder rows of two dictionaries, projected onto two principal components, and how much
    of each row's length is A's."""
    fig, axes = plt.subplots(2, 2, figsize=(9, 7))
    for (left, right), plain in zip(axes, (False, True)):
        chosen = [run for run in runs if plain == (run.metrics["config"]["excl"] == 0)]
        if not chosen:
            raise ValueError("a DFC and a plain crosscoder: python dfc.py; python dfc.py --excl 0")
        cc = load(chosen[-1].folder)
        norm_LM = cc.W_dec.norm(dim=2)
        share_L = norm_LM[:, 0] / norm_LM.sum(1)
        row_LE = cc.W_dec.flatten(1) - cc.W_dec.flatten(1).mean(0)
        xy_L2 = row_LE @ torch.pca_lowrank(row_LE, 2, center=False)[2]

        dots = left.scatter(*xy_L2.T, c=share_L, cmap="coolwarm", vmin=0, vmax=1)
        fig.colorbar(dots, ax=left, label="A's share of the row")
        left.set(title=chosen[-1].folder.name)
        right.hist(share_L, bins=np.linspace(0, 1, 41), color=BLUE)
        right.set(xlabel="A's share of the row's length", ylabel="latents", yscale="log")
    fig.suptitle("Decoder rows of both models side by side (paper, Figure 2, there as a UMAP)")
    return fig


# ---- 4. The program ------------------------------------------------------------------------------
FIGURES = {"effect": draw_effect, "grid": draw_grid, "dose": draw_dose, "map": draw_map}


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
