"""The figures of the README, drawn from what runs have measured (pip install matplotlib).

    python extras/plot.py runs/DFC               # a run after steer.py and steer.py --grid
    python extras/plot.py runs/DFC runs/PLAIN    # beside it a plain crosscoder: dfc.py --excl 0
    python extras/plot.py runs/DFC runs/PLAIN --sweep runs/sweep-tiny --layers runs/L1 runs/L2

effect.png: each claim of steer.py above its controls. decoders.png: what the live latents write, as
a map, and how much of it into A. grid.png: the grid's best cell at each |S| and alpha, chosen on
dev, on test. heat.png: every cell, on dev. layers.png: the best cell of each layer. sweep.png: what
reconstruction changes, a point a setting. What cannot be drawn yet is named with its command.
"""

import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import steer  # noqa: E402
import table  # noqa: E402
from dfc import NAMES, Parser, Problem, cli, write  # noqa: E402
from eval_toolcall import open_runs, read_metrics  # noqa: E402
from extras.grid import on_dev, read_grid  # noqa: E402

CONTROLS = {"random": ("|", .2, "random directions"), "latents": ("^", .36, "other latents"),
            "A - B": ("D", .54, "difference of means, A - B"),
            "needs - none": ("s", .54, "difference of means, needs - none")}
GROUPS = {"A-exclusive": "ko-", "shared": "C2s--", "A-exclusive + shared": "C0^-.",
          "B-exclusive": "C1v:", "all": "C3D--"}
LABEL = {"all": "plain crosscoder"}
LINES = "#0072B2", "#D55E00", "#56B4E9", "#777777"
HEAT = "#16235a", "#4f6bb5", "#9a9a9a", "#efc050", "#fffbe0"  # lightness rises with the value


def pyplot():
    """matplotlib, set for pictures shown 800 pixels wide. Raises Problem where it is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise Problem("figures need matplotlib: pip install matplotlib") from None
    plt.switch_backend("Agg")
    plt.rcParams |= {"axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
                     "axes.spines.right": False, "axes.prop_cycle": plt.cycler(color=LINES),
                     "axes.xmargin": .07, "figure.constrained_layout.use": True,
                     "legend.frameon": False, "savefig.dpi": 192}
    return plt


def points(ax, at, effects, fmt, flip=False, **how):
    """Effects {pp, lo, hi} at their places, with intervals and the line of no effect."""
    y, low, high = np.array([[e["pp"], e["lo"], e["hi"]] for e in effects]).T
    pair, side = [(at, y), (y, at)][flip], "yx"[flip]
    ax.errorbar(*pair, **{f"{side}err": [y - low, high - y]}, fmt=fmt, elinewidth=2, **how)
    (ax.axvline if flip else ax.axhline)(0, color=".7", lw=1, zorder=0)


def effect(plt, args):
    """What steering changes, beside what directions of the same length change."""
    results = read_metrics(args.runs[0]).get("steering", {}).get("results")
    if not results:
        return f"no steering results in {args.runs[0]}: python steer.py {args.runs[0]}"
    sizes = [len(r["claims"]) for r in results]
    fig, axes = plt.subplots(len(results), 1, sharex=True, squeeze=False, height_ratios=sizes,
                             figsize=(8.3, .9 + .55 * sum(sizes)))
    for ax, r, n in zip(axes[:, 0], results, sizes):
        claims = r["claims"]
        points(ax, range(n), [c["effect"] for c in claims], "ko", True, label="effect, 95 %")
        for name, (marker, down, label) in CONTROLS.items():
            at = [(v, y + down) for y, c in enumerate(claims) for v in c["controls"].get(name, ())]
            ax.plot(*zip(*at or [(np.nan, 0)]), f"C1{marker}", ms=5.5, mew=1.4, mfc="none",
                    label=label)
        for y, text in enumerate(["verdict", *(c["verdict"] for c in claims)], -1):
            ax.text(1.02, max(y, -.65), text, transform=ax.get_yaxis_transform(), va="center")
        kind = {NAMES[row["partition"]] + " " for row in r["ranking"]}
        ax.set(yticks=range(n), yticklabels=[c["claim"] for c in claims], ylim=(n - .3, -.3),
               title=f"{' + '.join(kind)}latent {' '.join(map(str, r['latents']))}, "
                     f"n = {claims[0]['effect']['n']} prompts that need a tool")
    ax.set_xlabel("change of exact calls, percentage points")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def decoders(plt, args):
    """Live latents by the direction of their two decoder rows, coloured by A's share."""
    device, rows, live = "cuda" if torch.cuda.is_available() else "cpu", [], []
    for cc, settings, folder in args.opened:
        x = torch.cat(list(steer.dev_sets(settings, folder, device).values())).float().cpu()
        live.append(cc.encode(x).gt(0).any(0).nonzero()[:, 0].numpy())
        rows.append(cc.decoder().detach().numpy()[live[-1]])
    every = np.concatenate([W.reshape(len(W), -1) for W in rows])
    try:
        from umap import UMAP
        xy, name = UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(every), "UMAP"
    except ImportError:
        part, basis = np.linalg.eigh(np.cov(every.T))
        xy = every @ basis[:, :-3:-1]
        name = f"PCA ({100 * part[-2:].sum() / part.sum():.0f} % of variance)"
    fig, axes = plt.subplots(1, len(rows), sharex=True, sharey=True, squeeze=False,
                             figsize=(8.3, 4.3))
    for ax, (cc, _, folder), W, ids in zip(axes[0], args.opened, rows, live):
        here, xy, mass = xy[:len(W)], xy[len(W):], np.linalg.norm(W, axis=2)
        share, dfc = mass[:, 0] / mass.sum(1), cc.n_a + cc.n_b
        for (part, where), marker in zip(cc.partitions().items(), "^vo"):
            some = (ids >= where.start) & (ids < where.stop)
            dots = ax.scatter(*here[some].T, 28, share[some], marker=marker, cmap="cividis", vmin=0,
                              vmax=1, lw=.3, ec="k", zorder=1 + (marker != "o"), label=None if
                              not some.any() else f"{some.sum()} live {NAMES[part] * (dfc > 0)}")
        first = [r["feature_idx"] for p in read_metrics(folder)["ranking"].values()
                 for r in p["needs/none"][:1]][:1]  # steer.py's choice
        for point in here[np.isin(ids, first)]:
            ax.plot(*point, "ko", ms=13, mfc="none", mew=1.8)
            ax.annotate(f"latent {first[0]}", point, (9, 7), textcoords="offset points",
                        bbox={"fc": "w", "ec": "none", "alpha": .8, "pad": 1})
        ax.legend(loc="upper left", bbox_to_anchor=(-.05, -.06), ncols=3, handletextpad=0)
        ax.set(xticks=[], yticks=[], xlabel=f"{name}, axis 1", ylabel=f"{name}, axis 2",
               title=f"{'DFC' if dfc else LABEL['all']}, "
                     f"share of A {share.min():.2f} to {share.max():.2f}")
        ax.label_outer()
    fig.colorbar(dots, ax=axes, label="share of A: |W_dec A| / (|W_dec A| + |W_dec B|)")
    return fig


def curves(plt, panels, joined=True):
    """{xlabel: {group: [((place, tick), effect)]}} -> a panel an xlabel, a line a group."""
    fig, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False, figsize=(8.3, 4.2))
    n = sorted({e["n"] for p in panels.values() for line in p.values() for _, e in line})
    for ax, (xlabel, lines) in zip(axes[0], panels.items()):
        ticks = sorted({tick for line in lines.values() for tick, _ in line})
        for i, (group, line) in enumerate(lines.items()):
            at = [ticks.index(t) + .1 * joined * (i - len(lines) / 2 + .5) for t, _ in line]
            fmt = GROUPS[group] if joined else GROUPS[group].rstrip("-.:")
            points(ax, at, [e for _, e in line], fmt, label=LABEL.get(group, group))
        ax.set(xticks=range(len(ticks)), xticklabels=[text for _, text in ticks], xlabel=xlabel,
               ylabel=f"change of exact calls on test, pp\n(n = {str(n)[1:-1]} prompts, 95 %)")
        ax.label_outer()
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def grid(plt, args):
    """How many latents, how strong?"""
    groups = {name: g for run in args.runs for name, g in
              read_metrics(run).get("grid", {}).get("groups", {}).items()}
    if not groups:
        return f"no grid in {args.runs[0]}: python steer.py {args.runs[0]} --grid"
    return curves(plt, {label: {group: [((row[key], f"{row[key]:g}"), row["test"])
                                        for row in g[key]] for group, g in groups.items()}
                        for label, key in (("|S|", "size"), ("alpha", "alpha"))})


def heat(plt, args):
    """Every cell of the grids, on dev rows."""
    maps = {}
    for run in args.opened:
        last = read_metrics(run[2]).get("grid", {})
        cells = [c for c in read_grid(run[2] / "grid.jsonl", last.get("how"))
                 if c["split"] == "dev" and c["alpha"] in (1, *last["alphas"])]  # clean: 1
        for group, changes in on_dev(cells).items():
            maps[f"{LABEL.get(group, group)}, n = {len(cells[0]['exact'])}"] = changes
    if not maps:
        return f"no grid in {args.runs[0]}: python steer.py {args.runs[0]} --grid"
    rows, top = (len(maps) + 1) // 2, max(abs(v) for m in maps.values() for v in m.values()) or 1
    fig = plt.figure(figsize=(8.3, .4 + 2.5 * rows))
    axes = [fig.add_subplot(rows, min(2, len(maps)), i + 1) for i in range(len(maps))]
    for ax, (name, m) in zip(axes, maps.items()):
        sizes, alphas = (sorted(set(v)) for v in zip(*m))
        value = np.array([[m.get((n, a), np.nan) for a in alphas] for n in sizes])
        shown = ax.imshow(value, plt.matplotlib.colors.LinearSegmentedColormap.from_list("", HEAT),
                          aspect="auto", vmin=-top, vmax=top)
        for (i, j), v in np.ndenumerate(value):
            ax.text(j, i, f"{v:+.0f}", ha="center", va="center", c="k" if v > -.3 * top else "w")
        ax.set(title=name, xlabel="alpha", ylabel="|S|", xticks=range(len(alphas)),
               xticklabels=[f"{a:g}" for a in alphas], yticks=range(len(sizes)), yticklabels=sizes)
    fig.colorbar(shown, ax=axes, label="change of exact calls on dev, pp")
    return fig


def layers(plt, args):
    """Where in the model? Each layer's best cell."""
    best, panel = {}, {}
    for run in [args.runs[0], *args.layers]:
        b = read_metrics(run).get("grid", {}).get("best")
        if not b:
            return f"no grid in {run}: python steer.py {run} --grid"
        best[b["layer"]] = max(best.get(b["layer"], b), b, key=lambda b: b["dev"]["pp"])
    if len(best) < 2:
        return "no run of another layer in --layers: python dfc.py --layer 2 --out runs/L2"
    for layer, b in best.items():
        tick = layer, f"{layer}\n{b['size']}\n{b['alpha']:g}"
        panel.setdefault(b["group"], []).append((tick, b["test"]))
    return curves(plt, {"layer; |S| and alpha of its best cell": panel}, joined=False)


def sweep(plt, args):
    """What reconstruction changes, a point for each setting (the mean of its seeds)."""
    if not args.sweep:
        return "no --sweep: bash run_sweep.sh, then --sweep runs/sweep-tiny"
    try:
        rows, _ = table.read(sorted(args.sweep.glob("*/*")) or [args.sweep])
    except (Problem, ValueError) as e:
        return f"{e} in {args.sweep}: bash run_sweep.sh"
    fig, axes = plt.subplots(1, 2, sharey=True, figsize=(8.3, 4.4))
    for ax, title, column in zip(axes, ("exact calls", "the paper's tool correctness"),
                                 ("exact_", "tool_correctness_")):
        ticks = [(kind, m) for m in "AB" for kind in ("DFC", "crosscoder")]
        for x, (kind, m) in enumerate(ticks):
            seeds = table.by_setting(table.groups(rows).get(kind, ()), column + m)
            v = [np.mean(values) for values in seeds.values()]
            ticks[x] = f"{kind}\ninto {m}\nn = {len(v)}"
            ax.boxplot(v, positions=[x], widths=.7, showfliers=False, patch_artist=True,
                       medianprops={"color": "k", "lw": 2}, boxprops={
                           "fc": "w", "hatch": "" if kind == "DFC" else "///", "ec": ".5"})
            ax.plot(x + np.linspace(-.2, .2, len(v)), v, "C0o", ms=5, mew=0, alpha=.6)
        ax.set(title=title, xticks=range(4), xticklabels=ticks, xlabel="n settings", ylabel=
               f"change by reconstruction, pp ({rows[0]['n']} prompts)")
        ax.axhline(0, color=".7", lw=1, zorder=0)
        ax.label_outer()
    means = table.PUBLISHED["all"][::2]
    ax.hlines(means, [-.45, 1.55], [1.45, 3.45], "C1", "--", lw=2.5, zorder=3, label=
              "published means, another pair of models: {:+} into A, {:+} into B".format(*means))
    fig.legend(loc="outside upper right")
    return fig


def main(argv=None):
    p = Parser(prog="plot.py", description=__doc__.split("\n")[0])
    p.add_argument("runs", type=Path, nargs="+", help="a run of dfc.py; beside it a plain one")
    p.add_argument("--sweep", type=Path, help="folder of run_sweep.sh, or rows of extras/table.py")
    p.add_argument("--layers", type=Path, nargs="+", default=[], help="runs of other layers")
    p.add_argument("--out", type=Path, default=HERE, help="folder of the pictures")
    args, plt = p.parse_args(argv), pyplot()
    args.opened = open_runs(args.runs, "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    for draw in (effect, decoders, grid, heat, layers, sweep):
        fig, file = draw(plt, args), args.out / f"{draw.__name__}.png"
        if isinstance(fig, str):
            print(f"{file.name} left out: {fig}")
        else:
            write(file, lambda part: fig.savefig(part, format="png"))
            print(file)


if __name__ == "__main__":
    sys.exit(cli(main))
