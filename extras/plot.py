"""All figures, drawn again from what runs have saved (pip install matplotlib).

    python extras/plot.py                          # of all runs in runs/: seconds
    python extras/plot.py --run runs/mine --out figures

    effect.png    each claim of steer.py beside its controls, and the false calls of both
    grid.png      how many latents, how strong: every cell on dev, the best at each |S| on test
    layers.png    the best cell of each layer: needs runs with another --layer
    recipes.png   which dictionary finds the latent, and with which seeds
    sweep.png     what reconstruction changes, a point for each setting of run_sweep.sh
    birth.png     the tool latent along the RL run

Shown is the newest result, or that of --run; in recipes and layers all those of its pair of models.
What cannot be drawn yet is named with its command.
"""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import table
from dfc import cli, read_metrics, whole

BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by colour-blind eyes
CONTROLS = {"random": ("|", "a random direction"), "latents": ("^", "another live latent"),
            "A - B": ("D", "mean A - mean B"), "needs - none": ("s", "mean needs - mean none")}
DONE = {"down": "taken away from A", "up": "scaled up in A", "into B": "its maximum added to B"}
CHANGE = "change of exact calls, percentage points"
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

def with_key(runs, key, command):
    """The runs that hold a result, all of the newest one's pair of models. Raises ValueError."""
    found = [(folder, m) for folder, m in runs if key in m]
    if not found:
        raise ValueError(f"no result of {command}")
    a, b = (found[-1][1]["config"][m] for m in ("model_a", "model_b"))
    return [(folder, m) for folder, m in found
            if (m["config"]["model_a"], m["config"]["model_b"]) == (a, b)]

def recipe_of(c):
    """A run's kind of dictionary in words, without its seed."""
    kind = f"{'tied' if c['tie_shared'] else 'untied'}, A {c['excl']:.0%}, B {c['excl_b']:.0%}"
    kind = kind if c["excl"] + c["excl_b"] else "plain crosscoder"
    return f"{kind}\n{c['dict']} latents, k {c['k']}, layer {c['layer']}" + (
        ", as published" if c["recipe"] == "paper" else "")

# ---- 2. Pieces of a figure -----------------------------------------------------------------------

def points(ax, at, effects, flip=False, **how):
    """Effects {pp, lo, hi} with intervals at their places, and the line of no effect."""
    y, low, high = np.array([[e["pp"], e["lo"], e["hi"]] for e in effects]).T
    pair, side = ((y, at), "x") if flip else ((at, y), "y")
    ax.errorbar(*pair, **{f"{side}err": [y - low, high - y], "fmt": "o", "color": BLUE,
                          "capsize": 3} | how)
    (ax.axvline if flip else ax.axhline)(0, color=".7", lw=1, zorder=0)

def legend(fig, ax):
    """What the points of ax mean, once each, above the figure."""
    handles = dict(reversed(pair) for pair in zip(*ax.get_legend_handles_labels()))
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)

# ---- 3. The figures ------------------------------------------------------------------------------

def effect(plt, runs):
    """What steering one latent changes, beside what pushes of the same length change."""
    folder, m = with_key(runs, "steering", "python steer.py")[-1]
    claims = m["steering"]["claims"]
    fig, axes = plt.subplots(1, 2, sharey=True, width_ratios=[3, 1.4],
                             figsize=(9, 1.6 + .8 * len(claims)))
    for y, c in enumerate(claims):
        color, label = (BLUE, "the latent") if c["controls"] else (RED, "no dictionary")
        points(axes[0], [y], [c["effect"]], True, ms=8, color=color, label=f"{label}, {RANGE}")
        axes[1].plot(c["false_calls"], y, "o", ms=8, color=color)
        for i, (name, (marker, label)) in enumerate(CONTROLS.items(), 1):
            for ax, key in zip(axes, ("pp", "false_calls")):
                some = [x[key] for x in c["controls"].get(name, [])]
                ax.plot(some, [y + .16 * i] * len(some), marker, color=RED, mfc="none", label=label)
        axes[1].text(112, y, textwrap.fill(c["verdict"], 12), va="center")
    labels = [f"{c['text']}\n(clean {c['clean']['exact']:.0f} %)" for c in claims]
    n, latents = m["steering"]["rows"], " ".join(map(str, m["steering"]["latents"]))
    axes[0].set(yticks=range(len(claims)), yticklabels=labels, ylim=(len(claims) - .2, -.4),
                xlabel=CHANGE, title=f"latent {latents} of {folder.name}; n = {n['needs']} test "
                "prompts that need a tool")
    axes[1].set(xlabel=f"false calls, % of {n['none']}\nprompts that need none", xlim=(-4, 104))
    axes[1].text(112, -.45, "verdict on\nexact calls:")
    legend(fig, axes[0])
    return fig

def grid(plt, runs):
    """Every cell on dev, above the best cell of each |S| on test."""
    folder, m = with_key(runs, "grid", "python extras/grid.py")[-1]
    rows, groups = m["grid"]["rows"], m["grid"]["groups"]
    fig, axes = plt.subplots(2, len(groups), sharey="row", squeeze=False, figsize=(9, 6.4))
    top = max(abs(v) for sizes in groups.values() for b in sizes for v in b["on_dev"].values()) or 1
    for (upper, lower), (name, sizes) in zip(axes.T, groups.items()):
        ticks, alphas = [b["size"] for b in sizes], [f"{float(a):g}" for a in sizes[0]["on_dev"]]
        value = np.array([list(b["on_dev"].values()) for b in sizes])
        shown = upper.imshow(value, "PuOr_r", aspect="auto", vmin=-top, vmax=top)
        for (i, j), v in np.ndenumerate(value):
            upper.text(j, i, f"{v:+.0f}", ha="center", va="center", fontsize=7,
                       color="w" if abs(v) > .7 * top else "k")
        upper.set(title=name, xlabel="strength alpha (1: unchanged)", yticks=range(len(ticks)),
                  yticklabels=ticks, xticks=range(len(alphas)), xticklabels=alphas)
        upper.tick_params("x", labelsize=7)
        points(lower, range(len(ticks)), [b["test"] for b in sizes])
        lower.plot([b["false_calls"] for b in sizes], "x", color=RED)
        lower.set(xticks=range(len(ticks)), xlabel="latents scaled, |S|, and alpha",
                  xticklabels=[f"{b['size']}\n{b['alpha']:g}" for b in sizes])
    axes[0, 0].set_ylabel(f"latents scaled, |S|\n(n = {rows[0]} dev prompts)")
    axes[1, 0].set_ylabel(f"percentage points\n(n = {rows[1]} test prompts)")
    fig.colorbar(shown, ax=axes[0], label="percentage points")
    fig.suptitle(f"{CHANGE}, {folder.name}\nbelow: each |S| with its best alpha on dev, on test, "
                 f"{RANGE}; crosses: false calls, %", fontsize=10)
    return fig

def layers(plt, runs):
    """Where in the model? The best cell of each layer, chosen on dev."""
    grids = [m["grid"] for _, m in with_key(runs, "grid", "python extras/grid.py")]
    best = {g["layer"]: g for g in sorted(grids, key=lambda g: (g["layer"], g["best"]["dev"]))}
    if len(best) < 2:
        raise ValueError("one layer only: python dfc.py --layer 1, then python extras/grid.py")
    fig, ax = plt.subplots(figsize=(8, 4.2))
    cells = [g["best"] | {"layer": layer, "n": g["rows"][1]} for layer, g in best.items()]
    points(ax, range(len(cells)), [c["test"] for c in cells], label=f"change, {RANGE}")
    ax.plot([c["false_calls"] for c in cells], "x", color=RED, label="false calls, %")
    ax.set(xmargin=.1, xticks=range(len(cells)), ylabel=CHANGE.replace(", ", ",\n"), xticklabels=[
        "layer {layer}\n{group}\n|S| {size}, alpha {alpha:g}\nn = {n}".format(**c) for c in cells])
    legend(fig, ax)
    return fig

def recipes(plt, runs):
    """Which dictionary finds the latent: a point for each run, hence for each seed."""
    found = with_key(runs, "steering", "python steer.py")
    kinds = sorted({recipe_of(m["config"]) for _, m in found})
    fig, axes = plt.subplots(1, 3, sharex=True, sharey=True, figsize=(9, 1.6 + .7 * len(kinds)))
    for ax, (kind, text) in zip(axes, DONE.items()):
        for i, name in enumerate(kinds):
            some = [m["steering"]["claims"] for _, m in found if recipe_of(m["config"]) == name]
            for j, claims in enumerate(some):
                c = [c for c in claims if c["kind"] == kind][-1]  # of mean and maximum the last
                points(ax, [i + .8 * (j + 1) / (len(some) + 1) - .4], [c["effect"]], True,
                       mfc=BLUE if "beyond" in c["verdict"] else "w")
        ax.set(title=text, yticks=range(len(kinds)), yticklabels=kinds, xlabel="percentage points")
    n = sorted({m["steering"]["rows"]["needs"] for _, m in found})
    fig.suptitle(f"{CHANGE}; a point for each run (seed), {RANGE}, n = {n[0]} to {n[-1]}\nfull: "
                 "beyond 0 and ten random directions of its length; hollow: not", fontsize=10)
    return fig

def sweep(plt, runs):
    """What reconstruction changes, a point for each setting (the mean of its seeds)."""
    swept = [folder for folder, _ in runs if folder.parent.name.startswith("seed")]
    rows, _ = table.read([f for f in swept if f.parent.parent == swept[-1].parent.parent])
    fig, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 4.6))
    for ax, (title, score) in zip(axes, (("exact calls", "exact"),
                                         ("the paper's tool correctness", "tool"))):
        ticks = [(m, kind) for m in "AB" for kind in ("DFC", "crosscoder")]
        for x, (m, kind) in enumerate(ticks):
            some = table.by_setting(table.lines_of(rows).get(kind, []), f"{score} {m}")
            v = [np.mean(seeds) for seeds in some]
            ticks[x] = f"{kind}\ninto {m}\n{len(v)} settings"
            ax.plot(x + np.linspace(-.25, .25, len(v)), v, "o", color=BLUE, alpha=.6, mew=0)
            ax.hlines(np.mean(v) if v else np.nan, x - .35, x + .35, "k", lw=2,
                      label="mean of the settings")
        ax.set(title=title, xticks=range(4), xticklabels=ticks)
        ax.axhline(0, color=".7", lw=1, zorder=0)
    axes[0].set_ylabel(f"change by reconstruction, percentage points\n(n = {rows[0]['n']} prompts)")
    ax.hlines(table.PUBLISHED["all"][::2], [-.45, 1.55], [1.45, 3.45], RED, "--",
              label="published mean, another pair")
    legend(fig, ax)
    return fig

def birth(plt, runs):
    """Behaviour, lengths and claims along the RL run."""
    m = with_key(runs, "birth", "python extras/birth.py")[-1][1]["birth"]
    steps, at = m["steps"], [s["step"] for s in m["steps"]]
    first, second = ([s["latents"][min(i, len(s["latents"]) - 1)] for s in steps] for i in (0, 1))
    fig, axes = plt.subplots(4, 1, sharex=True, figsize=(9, 10), height_ratios=[1, 1.2, 1.8, 1])
    axes[0].plot(at, [s["exact"] for s in steps], "o-", color=BLUE, label="exact calls")
    axes[0].plot(at, [s["false_calls"] for s in steps], "s--", color=RED, label="false calls")
    axes[1].plot(at, [s["length"] for s in steps], "o-", color=GREY, label="A - B")
    for some, style in ((first, "o-"), (second, "^:")):
        axes[1].plot(at, [x["writes"] for x in some], style, color=BLUE,
                     label=f"written by latent {some[0]['latent']}")
    axes[1].axhline(m["theta"], color=RED, ls="--", label="where half of the\ncalls have come")
    for (kind, text), color, style in zip(DONE.items(), (BLUE, RED, GREY), ("o-", "s--", "^:")):
        claims = [x["claims"][kind] for x in first]
        points(axes[2], at, [c["effect"] for c in claims], fmt=style, color=color, label=text)
        pp = [[x["pp"] for x in c["controls"]["random"]] for c in claims]
        axes[2].fill_between(at, *np.transpose([[min(v), max(v)] for v in pp]), color=color,
                             alpha=.2, lw=0)
        axes[3].plot(at, [c["false_calls"] for c in claims], style, color=color, label=text)
    titles = ("what A does", "length of vectors at the prompt's last token",
              f"{CHANGE}, by latent {first[0]['latent']}\n({RANGE} that need a tool, n = "
              f"{steps[0]['rows']}; bands: ten random directions; up: times {m['alpha']:g})",
              "false calls then")
    for ax, title, unit in zip(axes, titles, ("%", "length", "percentage points", "%")):
        ax.set(title=title, ylabel=unit)
        ax.legend(loc="center left", bbox_to_anchor=(1, .5))
    ax.set_xlabel("step of reinforcement learning")
    return fig

# ---- 4. The program ------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", type=Path, default="runs", help="holds runs (runs/)")
    p.add_argument("--run", type=Path, help="of effect, grid and birth (default: the newest)")
    p.add_argument("--out", type=Path, default=HERE, help="folder of the pictures (extras/)")
    args, plt = p.parse_args(argv), pyplot()
    files = sorted(args.folder.glob("**/metrics.json"), key=lambda file: file.stat().st_ctime)
    folders = [f.parent for f in files if f.parent != args.run] + ([args.run] if args.run else [])
    runs = [(folder, read_metrics(folder)) for folder in folders]
    if not runs:
        raise ValueError(f"no finished run in {args.folder}: python dfc.py")
    for draw in (effect, grid, layers, recipes, sweep, birth):
        file = args.out / f"{draw.__name__}.png"
        try:
            with whole(file) as part:
                draw(plt, runs).savefig(part, format="png")
            print(file)
        except ValueError as e:
            print(f"{file.name} left out: {e}")

if __name__ == "__main__":
    sys.exit(cli(main))
