"""Four figures, drawn from what runs have saved (pip install matplotlib).

    python extras/plot.py                          # of the runs in runs/, into runs/: seconds
    python extras/plot.py runs/mine --out figures

    answer.png   a latent scaled up in early A and latents ablated in A, beside vectors that need no
                 dictionary (its runs, and the names of their folders: extras/MORE_RESULTS.md)
    effect.png   each change of steer.py beside its controls, and the false calls of both
    dose.png     exact calls left against what is ablated along one direction
    norms.png    A's share of each decoder row's length: the newest DFC, the newest plain crosscoder

effect.png is of the newest run with such a result. answer.png and dose.png are of all runs with the
models, layer and prompts of the newest. A figure without results is left out, and the missing
command is printed.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
ANSWERS = {  # row of answer.png: what is added (kind, group of grid.py or "random"), and what is
             # subtracted (kind, n, name in saturation.py)
    "A-exclusive latents,\nour recipe": (("preset", "A-exclusive"), ("preset", 3, "latents")),
    "A-exclusive latents,\nthe paper's recipe": (("as-published", "A-exclusive"),
                                                 ("as-published", 0, "all")),
    "difference of means": (("preset", "diff of means"), ("preset", 3, "diff of means")),
    "random directions": (("preset", "random"), ("preset", 3, "random")),
}
DOSES = {  # label, marker and colour of dose.png, for saturation.py's names and kinds
    "A - B": ("instead: A − B", ".", "#E69F00"),
    "diff of means": ("instead: difference of means", "|", RED),
    "preset": ("our recipe: best n latents", "o", BLUE),
    "1024-k-16": ("our recipe, 1,024 latents", "s", BLUE),
    "8192-k-45": ("our recipe, 8,192 latents", "D", BLUE),
    "plain": ("plain crosscoder: best n latents", "^", "#009E73"),
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
def read_runs(folder):
    """The finished runs anywhere in a folder, newest last. Raises ValueError if there is none."""
    files = sorted(folder.glob("**/metrics.json"), key=lambda file: file.stat().st_ctime)
    if not files:
        raise ValueError(f"no finished run in {folder}: python dfc.py")
    return [Finished(file.parent.resolve(), read_metrics(file.parent)) for file in files]


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


def removals(runs):
    """Yield (kind of dictionary, line, exact calls left in %) of all that saturation.py saved.
    Raises ValueError."""
    for run in runs_with(runs, "saturation_test", "python extras/saturation.py --all"):
        for line in read_rows(f"{run.folder}/saturation_test.jsonl", ()):
            yield kind_of(run.folder), line, 100 * np.mean(line["greedy"]["exact"])


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

    fig.suptitle(
        "What changing latents does, beside vectors as long in other directions (open circles).\n"
        f"{run.folder.name}, {steering['rows']['needs']} test prompts that need a tool; bars: 95 % "
        "intervals")

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


def draw_answer(plt, runs):
    """Exact calls with a vector added to early A, and with one subtracted from A: a circle for each
    dictionary or random direction, and a bar from clean to their mean. Raises ValueError."""
    # added: grid.py's strength, chosen on dev; random directions are as long as steer.py's vector
    added = defaultdict(list)
    for run in runs_with(runs, "grid", "python extras/grid.py"):
        kind = kind_of(run.folder)
        grid = run.metrics["grid"]
        early = grid["clean"]["exact"]
        for group, lines in grid["groups"].items():
            if group in CONTROLS:  # the same for all dictionaries
                added[kind, group].clear()
            added[kind, group].append(early + lines[0]["best"]["test"]["pp"])
        steering = run.metrics.get("steering", {"changes": {}})
        for name, result in steering["changes"].items():
            if name.startswith("scaled"):
                pp = column(result["controls"]["random"], "pp")
                added[kind, "random"].extend(early + np.array(pp))

    # subtracted
    subtracted = defaultdict(list)
    for kind, line, exact in removals(runs):
        subtracted[kind, line["n"], line["name"]].append(exact)

    for add, subtract in ANSWERS.values():
        if not added[add] or not subtracted[subtract]:
            raise ValueError(f"no result of {add} or {subtract}: see extras/MORE_RESULTS.md")
    late = subtracted["preset", 0, "clean"][0]

    fig, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 3.2))
    for ax, side, found, clean in zip(axes, (0, 1), (added, subtracted), (early, late)):
        for y, whats in enumerate(ANSWERS.values()):
            exact = found[whats[side]]
            color = BLUE if y < 2 else "dimgrey"
            ax.plot(exact, y + np.linspace(-.25, .25, len(exact)), "o", mfc="none", color=color)
            ax.barh(y, np.mean(exact) - clean, left=clean, color=color, alpha=.3)
        ax.axvline(clean, color="grey", ls=":")
        ax.set(xlim=(-4, 104), ylim=(3.6, -.6), xlabel="exact calls, % of prompts")
    axes[0].set_yticks(range(len(ANSWERS)), ANSWERS)
    axes[0].set_title("one latent scaled up in early A,\nor another vector added")
    axes[1].set_title("three latents ablated in A (the paper's recipe: all),\n"
                      "or another vector subtracted")
    fig.suptitle("Latents of our recipe add calls and stop them. So does a difference of means.")
    return fig


def draw_dose(plt, runs):
    """Exact calls left against what is removed along u: a mark for each dictionary and n."""
    marks = {style: [] for style in DOSES.values()}
    for kind, line, exact in removals(runs):
        name = kind if line["name"] == "latents" else line["name"]
        if line["n"] and name in DOSES:
            marks[DOSES[name]].append((line["along u"], exact))
    n_rows = len(line["greedy"]["exact"])

    fig, ax = plt.subplots(figsize=(9, 4.8))
    for (label, marker, color), points in marks.items():
        if points:
            ax.plot(*zip(*points), ls="", marker=marker, ms=6, mfc="none", color=color, label=label)
    ax.set(xlabel="part along u of the vector that is subtracted", ylim=(-4, 104),
           ylabel=f"exact calls left, % of {n_rows} test prompts\nthat need a tool, greedy answers")
    fig.legend(loc="outside lower center", ncols=2)
    fig.suptitle("Latents of our recipe stop A's calls by how much they write along one direction, "
                 "u.\nOther vectors do not follow the same curve.")
    return fig


def draw_norms(plt, runs):
    """A's share of the length of each decoder row, in two dictionaries. (The paper's Figure 2
    colours a map of the rows by it.)"""
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.8))
    for ax, plain in zip(axes, (False, True)):
        chosen = [run for run in runs if plain == (run.metrics["config"]["excl"] == 0)]
        if not chosen:
            raise ValueError("a DFC and a plain crosscoder: python dfc.py; python dfc.py --excl 0")
        norm_LM = load(chosen[-1].folder).W_dec.norm(dim=2)
        ax.hist(norm_LM[:, 0] / norm_LM.sum(1), bins=np.linspace(0, 1, 41), color=BLUE)
        ax.set(title=chosen[-1].folder.name, xlabel="A's share of a decoder row's length",
               ylabel="latents", yscale="log")
    fig.suptitle("Rows of exclusive latents are one model's alone (A's: 1), by construction.\n"
                 "Those of a plain crosscoder are what training made of them.")
    return fig


# ---- 4. The program ------------------------------------------------------------------------------
FIGURES = {"answer": draw_answer, "effect": draw_effect, "dose": draw_dose, "norms": draw_norms}


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
    p.add_argument("--out", type=Path, help="folder of the pictures (default: that of the runs)")
    args = p.parse_args(argv)

    plt = pyplot()
    runs = read_runs(args.folder)
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
