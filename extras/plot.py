"""All figures, drawn again from what runs have saved (pip install matplotlib).

    python extras/plot.py                  # all runs in runs/: seconds
    python extras/plot.py runs/lab --out figures

    effect.png    each claim of steer.py beside its controls, and the false calls of both
    grid.png      how many latents, how strong: every cell on dev, the best at each |S| on test
    layers.png    the best cell of each layer: needs runs with several --layer
    recipes.png   which dictionary finds the latent, and with which seeds
    sweep.png     what reconstruction changes, a point for each setting of run_sweep.sh
    birth.png     the tool latent along the RL run

Of effect, grid, birth and sweep the newest result is drawn; recipes and layers hold all runs of the
newest pair of models. What cannot be drawn yet is named with its command.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import table
from dfc import cli, read_metrics, whole

BLUE, RED, SKY, GREY = "#0072B2", "#D55E00", "#56B4E9", "#777777"  # told apart by colour-blind eyes
CONTROLS = {"random": ("|", "a random direction"), "latents": ("^", "another live latent"),
            "A - B": ("D", "mean A - mean B"),
            "needs - none": ("s", "mean needs a tool - mean does not")}
DONE = {"down": "taken away from A", "up": "scaled up in A", "into B": "its maximum added to B"}
CHANGE = "change of exactly right calls, percentage points"
RANGE = "95 % interval over prompts"

def pyplot():
    """matplotlib, set for pictures shown 800 pixels wide. Raises ValueError."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    plt.switch_backend("Agg")
    plt.rcParams |= {"axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
                     "axes.spines.right": False, "figure.constrained_layout.use": True,
                     "legend.frameon": False, "savefig.dpi": 160}
    return plt

# ---- 1. What runs have saved ---------------------------------------------------------------------

def saved(folder):
    """[(folder, metrics)] of all runs below a folder, the newest last."""
    files = sorted(folder.glob("**/metrics.json"), key=lambda f: f.stat().st_ctime)
    return [(f.parent, read_metrics(f.parent)) for f in files]

def with_key(runs, key, command):
    """The runs that hold a result, all of the newest one's pair of models. Raises ValueError."""
    found = [(folder, m) for folder, m in runs if key in m]
    if not found:
        raise ValueError(f"no result of {command}")
    pair = [found[-1][1]["config"][m] for m in ("model_a", "model_b")]
    return [(f, m) for f, m in found if [m["config"][x] for x in ("model_a", "model_b")] == pair]

def recipe_of(c):
    """A run's kind of dictionary in words, without its seed."""
    kind = "plain crosscoder" if not c["excl"] + c["excl_b"] else (
        f"{'tied' if c['tie_shared'] else 'untied'}, A {100 * c['excl']:g} %, "
        f"B {100 * c['excl_b']:g} %")
    published = ", recipe paper" if c["recipe"] == "paper" else ""
    return f"{kind}{published}\n{c['dict']} latents, k {c['k']}, layer {c['layer']}"

# ---- 2. Pieces of a figure -----------------------------------------------------------------------

def points(ax, at, effects, flip=False, **how):
    """Effects {pp, lo, hi} at their places, with intervals."""
    y, low, high = np.array([[e["pp"], e["lo"], e["hi"]] for e in effects]).T
    how = {"fmt": "o", "color": BLUE, "capsize": 3} | how
    if flip:
        ax.errorbar(y, at, xerr=[y - low, high - y], **how)
    else:
        ax.errorbar(at, y, yerr=[y - low, high - y], **how)

def zero(ax, flip=False):
    (ax.axvline if flip else ax.axhline)(0, color=".6", lw=1, zorder=0)

# ---- 3. The figures ------------------------------------------------------------------------------

def effect(plt, runs):
    """What steering one latent changes, beside what pushes of the same length change."""
    folder, m = with_key(runs, "steering", "python steer.py")[-1]
    s, claims = m["steering"], m["steering"]["claims"]
    fig, (left, right) = plt.subplots(1, 2, sharey=True, width_ratios=[3, 1.4],
                                      figsize=(9, 1.6 + .8 * len(claims)))
    for y, c in enumerate(claims):
        points(left, [y], [c["effect"]], flip=True, ms=8, label=f"the latent, {RANGE}")
        right.plot(c["false_calls"], y, "o", ms=8, color=BLUE)
        for i, (name, (marker, label)) in enumerate(CONTROLS.items(), 1):
            some = c["controls"].get(name, [])
            for ax, key in ((left, "pp"), (right, "false_calls")):
                ax.plot([x[key] for x in some], [y + .16 * i] * len(some), marker, color=RED,
                        mfc="none", ms=6, ls="none", label=label)
        left.annotate(c["verdict"], (1, y), xycoords=left.get_yaxis_transform(), ha="right",
                      va="bottom", fontsize=8, color=GREY)
    left.set(yticks=range(len(claims)), yticklabels=[c["text"] for c in claims], xlabel=CHANGE,
             ylim=(len(claims) - .2, -.4), title=f"latent {' '.join(map(str, s['latents']))} of "
             f"{folder.name}, {s['rows']} test prompts")
    right.set(xlabel="false calls, % of prompts\nthat need no tool", xlim=(-4, 104))
    zero(left, True)
    handles = dict(reversed(pair) for pair in zip(*left.get_legend_handles_labels()))
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return fig

def grid(plt, runs):
    """Every cell on dev, above the best cell of each |S| on test."""
    folder, m = with_key(runs, "grid", "python extras/grid.py")[-1]
    g, groups = m["grid"], m["grid"]["groups"]
    fig, axes = plt.subplots(2, len(groups), sharey="row", squeeze=False, figsize=(9, 6.4))
    top = max(abs(v) for s in groups.values() for b in s for v in b["on_dev"].values()) or 1
    for (upper, lower), (name, sizes) in zip(axes.T, groups.items()):
        ticks = [b["size"] for b in sizes]
        value = np.array([list(b["on_dev"].values()) for b in sizes])
        shown = upper.imshow(value, "PuOr_r", aspect="auto", vmin=-top, vmax=top)
        for (i, j), v in np.ndenumerate(value):
            upper.text(j, i, f"{v:+.0f}", ha="center", va="center", fontsize=7,
                       color="w" if abs(v) > .7 * top else "k")
        alphas = list(sizes[0]["on_dev"])
        upper.set(title=name, xlabel="strength alpha (1 = unchanged)", yticks=range(len(ticks)),
                  yticklabels=ticks, xticks=range(len(alphas)), xticklabels=alphas)
        points(lower, range(len(ticks)), [b["test"] for b in sizes])
        lower.plot([b["false_calls"] for b in sizes], "x", color=RED)
        for i, b in enumerate(sizes):
            lower.annotate(f"{b['alpha']:g}", (i, b["test"]["hi"]), (0, 4), ha="center",
                           textcoords="offset points", fontsize=8)
        lower.set(xticks=range(len(ticks)), xticklabels=ticks, xlabel="latents scaled, |S|")
        zero(lower)
    axes[0, 0].set_ylabel("latents scaled, |S|")
    axes[1, 0].set_ylabel(f"percentage points\nn = {g['rows'][1]} test prompts")
    fig.colorbar(shown, ax=axes[0], label=f"on {g['rows'][0]} dev prompts")
    fig.suptitle(f"{CHANGE}, {folder.name}\nbelow, on test: the alpha (number) that is best on dev, "
                 f"{RANGE}; crosses: false calls, %", fontsize=10, ha="left", x=.02)
    return fig

def layers(plt, runs):
    """Where in the model? The best cell of each layer, chosen on dev."""
    best = {}
    for _, m in sorted(with_key(runs, "grid", "python extras/grid.py"),
                       key=lambda run: run[1]["grid"]["best"]["dev"]):
        best[m["grid"]["layer"]] = m["grid"]["best"] | {"n": m["grid"]["rows"][1]}
    if len(best) < 2:
        raise ValueError("one layer only: python dfc.py --layer 1 and python extras/grid.py of it")
    fig, ax = plt.subplots(figsize=(8, 4))
    best = dict(sorted(best.items()))
    points(ax, range(len(best)), [b["test"] for b in best.values()], label=f"exact, {RANGE}")
    ax.plot([b["false_calls"] for b in best.values()], "x", color=RED, label="false calls, %")
    ax.set(xticks=range(len(best)), ylabel=f"{CHANGE.replace(', ', ',' + chr(10))}, on test",
           xticklabels=[f"layer {layer}\n{b['group']}\n|S| {b['size']}, alpha {b['alpha']:g}\n"
                        f"n = {b['n']}" for layer, b in best.items()],
           title="the best cell of each layer's grid, chosen on dev")
    zero(ax)
    ax.legend()
    return fig

def recipes(plt, runs):
    """Which dictionary finds the latent: a point for each run, hence for each seed."""
    found = with_key(runs, "steering", "python steer.py")
    kinds = sorted({recipe_of(m["config"]) for _, m in found})
    fig, axes = plt.subplots(1, 3, sharey=True, figsize=(9, 1.6 + .7 * len(kinds)))
    for ax, (kind, text) in zip(axes, DONE.items()):
        for i, name in enumerate(kinds):
            claims = [[c for c in m["steering"]["claims"] if c["kind"] == kind][-1]
                      for _, m in found if recipe_of(m["config"]) == name]
            for j, c in enumerate(claims):  # of "into B", mean and maximum, the last
                full = c["verdict"] != "no"
                points(ax, [i + .8 * (j + 1) / (len(claims) + 1) - .4], [c["effect"]], flip=True,
                       mfc=BLUE if full else "w")
        ax.set(title=text, yticks=range(len(kinds)), yticklabels=kinds, xlabel="pp")
        zero(ax, True)
    rows = sorted({m["steering"]["rows"] for _, m in found})
    fig.suptitle(f"{CHANGE}; a point a run (seed), {RANGE}, n = {' or '.join(map(str, rows))} test "
                 "prompts\nfull: beyond 0 and ten random directions of its length; hollow: not",
                 fontsize=10, ha="left", x=.02)
    return fig

def sweep(plt, runs):
    """What reconstruction changes, a point for each setting (the mean of its seeds)."""
    home = [f.parent.parent for f, m in runs if f.parent.name.startswith("seed")][-1:]
    rows, _ = table.read([f for f, _ in runs if [f.parent.parent] == home])
    fig, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 4.6))
    for ax, title, score in zip(axes, ("exactly right calls", "the paper's tool correctness"),
                                ("exact", "tool")):
        ticks = []
        for x, (m, kind) in enumerate((m, kind) for m in "AB" for kind in ("DFC", "crosscoder")):
            some = table.by_setting(table.lines_of(rows).get(kind, []), f"{score} {m}")
            v = [np.mean(seeds) for seeds in some]
            ticks.append(f"{kind}\ninto {m}\nn = {len(v)}")
            ax.plot(x + np.linspace(-.25, .25, len(v)), v, "o", color=BLUE, alpha=.6, mew=0)
            ax.hlines(np.mean(v) if v else np.nan, x - .35, x + .35, "k", lw=2,
                      label="mean of the settings")
        ax.set(title=title, xticks=range(4), xticklabels=ticks,
               ylabel=f"change by reconstruction, percentage points\n({rows[0]['n']} prompts)")
        ax.label_outer()
        zero(ax)
    means = table.PUBLISHED["all"][::2]
    ax.hlines(means, [-.45, 1.55], [1.45, 3.45], RED, "--", label="published, another pair")
    handles = dict(reversed(pair) for pair in zip(*ax.get_legend_handles_labels()))
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2)
    return fig

def birth(plt, runs):
    """Behaviour, lengths and claims along the RL run."""
    folder, m = with_key(runs, "birth", "python extras/birth.py")[-1]
    steps, theta = m["birth"]["steps"], m["birth"]["theta"]
    at, first = [s["step"] for s in steps], [s["latents"][0] for s in steps]
    fig, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 9), height_ratios=[1, 1, 1.6])
    for key, color, label in (("exact", BLUE, "exact where a tool is needed"),
                              ("false_calls", RED, "false calls where none is")):
        axes[0].plot(at, [x["clean"][key] for x in first], "o-", color=color, label=label)
    axes[0].set(title=f"what A does ({steps[0]['rows']} test prompts that need a tool)", ylabel="%")
    axes[1].plot(at, [s["length"] for s in steps], "o-", color=GREY, label="|A - B|")
    axes[1].axhline(theta, color=RED, ls="--", label="theta: half of the exact calls")
    for i, style in enumerate(("o-", "^:")[:len(steps[0]["latents"])]):
        axes[1].plot(at, [s["latents"][i]["writes"] for s in steps], style, color=BLUE,
                     label=f"written by latent {first[0]['latent']}" if not i else
                     f"by the next one, {steps[0]['latents'][1]['latent']}")
    axes[1].set(title="at the prompt's last token", ylabel="length")
    for kind, color, style in (("down", BLUE, "o-"), ("up", RED, "s--"), ("into B", GREY, "^:")):
        claims = [x["claims"][kind] for x in first]
        points(axes[2], at, [c["effect"] for c in claims], fmt=style, color=color, label=DONE[kind]
               + f", times {m['birth']['alpha']:g}" * (kind == "up"))
        pp = [[x["pp"] for x in c["controls"]["random"]] for c in claims]
        axes[2].fill_between(at, *np.array([[min(v), max(v)] for v in pp]).T, color=color, alpha=.2,
                             lw=0)
    axes[2].set(title=f"latent {first[0]['latent']}, {RANGE}; bands: ten random directions", ylabel=CHANGE.replace(", ", ",\n"), xlabel="step of reinforcement learning")
    zero(axes[2])
    for ax in axes:
        ax.legend()
    return fig

# ---- 4. The program ------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", type=Path, default="runs", help="holds runs (runs/)")
    p.add_argument("--out", type=Path, default=HERE, help="folder of the pictures (extras/)")
    args, plt = p.parse_args(argv), pyplot()
    runs = saved(args.folder)
    if not runs:
        raise ValueError(f"no finished run in {args.folder}: python dfc.py")
    for draw in (effect, grid, layers, recipes, sweep, birth):
        file = args.out / f"{draw.__name__}.png"
        try:
            fig = draw(plt, runs)
            with whole(file) as part:
                fig.savefig(part, format="png")
            print(file)
        except ValueError as e:
            print(f"{file.name} left out: {e}")

if __name__ == "__main__":
    sys.exit(cli(main))
