"""How many latents, how strong? The |S| x alpha grid of the paper; steer.py --grid runs it.

The first |S| latents of a group (A-exclusive, shared, ...; ranked on dev rows) are scaled by alpha
at the prompt's last token (or --positions all), for every |S| and alpha: on A, but B-exclusive
ones, which write nothing into A (the published +0), on B. The best cell is chosen on dev rows and
reported on test rows: on the rows it was chosen on, the best of many cells is high by luck alone.

    python steer.py --grid                              # the newest run: a minute on 2 cores
    python steer.py --grid runs/dfc runs/plain          # and a plain crosscoder: all of its latents
    python steer.py --grid runs/layer1 runs/layer2      # the best cell of each layer, together

Each eight cells are answered at once and written to grid.jsonl, texts included; a killed grid goes
on from there. The results also go to the run's metrics.json, under "grid". Names as in steer.py: s
is a scene, p are prompts placed in it.
"""

import contextlib
import json
import time

import numpy as np
import torch

from dfc import Problem, software
from eval_toolcall import add_metrics, identity, paired
from steer import exacts, home_of, outputs_of, place, rows_of, written

SIZES = (1, 2, 4, 8, 16, 32)


def groups(s):
    """{name: its latents, best first}: each partition, A-exclusive with shared; of a plain
    crosscoder all. Groups without latents are left out."""
    ranked = [r for r in s.ranked if r["contrast"] == "needs/none"]
    if not s.cc.n_a + s.cc.n_b:
        return {"all": [r["feature_idx"] for r in ranked]}
    names = {"A-exclusive": ["a_excl"], "shared": ["shared"], "B-exclusive": ["b_excl"],
             "A-exclusive + shared": ["a_excl", "shared"]}
    out = {name: [r["feature_idx"] for r in ranked if r["partition"] in parts]
           for name, parts in names.items()}
    return {name: latents for name, latents in out.items() if latents}


def cells_of(s, alphas):
    """Every (group, size, alpha): the first `size` latents of a group at strength alpha on their
    model, and the clean answers of each model. Raises Problem where nothing is to be steered."""
    cells = [{"model": "AB"[home_of(s.cc, latents)], "group": name, "size": n, "alpha": a,
              "latents": latents[:n]}
             for name, latents in groups(s).items() for n in SIZES if n <= len(latents)
             for a in alphas if a != 1]
    if not cells:
        raise Problem(f"an empty grid: no alpha other than 1, or no latent of {s.folder} fires "
                      f"more where a tool is needed")
    return [{"model": m, "group": "clean", "size": 0, "alpha": 1., "latents": []}
            for m in sorted({c["model"] for c in cells})] + cells


def key_of(cell):
    """What sets a cell apart."""
    return *(cell[k] for k in ("split", "model", "group", "size", "alpha")), *cell["latents"]


def grid(s, args, at_once=8):
    """Answer every cell on dev and on test rows that need a tool -> finished cells. Each `at_once`
    cells are written to grid.jsonl as they are done; what is there already is not done again."""
    from tqdm import tqdm
    file, cells, out = s.folder / "grid.jsonl", cells_of(s, args.alpha), []
    how = {"rows": args.rows, "max_new": s.max_new, "positions": s.positions}
    how |= identity((s.cc, s.settings, s.folder))
    finished = {key_of(c): c for c in read_grid(file, how)}
    for split in ("dev", "test"):
        todo = [c | {"split": split} for c in cells]
        missing = [c for c in todo if key_of(c) not in finished]
        p = place(s, rows_of(s, split, args.rows, needs=True)) if missing else None
        for some in tqdm(together(missing, at_once), desc=f"grid, {split}", leave=False):
            m = some[0]["model"]
            deltas = [(c["alpha"] - 1) * written(s.cc, p.f, c["latents"], "AB".index(m))
                      for c in some]
            texts = outputs_of(s, p, m, torch.stack(deltas))
            new = [c | {"how": how, "outputs": t, "exact": exacts(t, p)}
                   for c, t in zip(some, texts)]
            append_lines(file, new)
            finished |= {key_of(c): c for c in new}
        out += [finished[key_of(c)] for c in todo]
    return out


def together(cells, at_once):
    """[cells of one model, at most `at_once`]."""
    apart = [[c for c in cells if c["model"] == m] for m in "AB"]
    return [some[i:i + at_once] for some in apart for i in range(0, len(some), at_once)]


def read_grid(file, how):
    """Whole cells of grid.jsonl made the same way. A line cut short by a kill is left out."""
    cells = []
    if file.exists():
        for line in file.read_text().split("\n"):
            with contextlib.suppress(ValueError):
                cells.append(json.loads(line))
    return [c for c in cells if c["how"] == how]


def append_lines(file, rows):
    """Add lines at the end. Each begins with the line break: the last may have been cut short."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as f:
        f.write("".join("\n" + json.dumps(row) for row in rows))


def cohens_dz(differences):
    """Mean over standard deviation of paired differences."""
    x = np.asarray(differences, float)
    return float(x.mean() / x.std(ddof=1)) if len(x) > 1 and x.std() > 0 else float("nan")


def sign_flip(differences, times=100_000, seed=0):
    """Two-sided p: how often is |mean| as large when signs are thrown? Exact up to 16 values."""
    x = np.asarray(differences, float)
    if len(x) <= 16:
        signs = 1 - 2 * (np.arange(2 ** len(x))[:, None] >> np.arange(len(x)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], (times, len(x)))
        signs[0] = 1  # what was observed is one of the ways: p is never 0
    means = abs((signs * x).mean(1))
    return float((means >= abs(x.mean()) - 1e-12).mean())


def clean_of(cells):
    """{(split, model): exact of the clean answers}."""
    return {(c["split"], c["model"]): c["exact"] for c in cells if c["group"] == "clean"}


def best_of(cells, **where):
    """Of the cells with these fields the one that adds most exact calls on dev, and its effect on
    test (paired intervals): chosen on one, reported on the other."""
    clean = clean_of(cells)
    some = [c for c in cells if all(c[k] == v for k, v in where.items()) and c["group"] != "clean"]
    top = max((c for c in some if c["split"] == "dev"),
              key=lambda c: sum(c["exact"]) - sum(clean["dev", c["model"]]))
    test = next(c for c in some if key_of(c) == ("test", *key_of(top)[1:]))
    effects = {c["split"]: paired(c["exact"], clean[c["split"], c["model"]]) for c in (top, test)}
    return {k: top[k] for k in ("model", "group", "size", "alpha")} | effects


def grid_report(cells):
    """Saturation curve, best alpha, heat map; returns them for metrics.json."""
    out = {}
    for name in dict.fromkeys(c["group"] for c in cells if c["group"] != "clean"):
        mine = [c for c in cells if c["group"] in (name, "clean")]
        fields = {f: sorted({c[f] for c in mine if c["group"] == name}) for f in ("size", "alpha")}
        out[name] = {f: [best_of(mine, **{f: v}) for v in values] for f, values in fields.items()}
        out[name]["best"] = best_of(mine)
        for f, title, other in (("size", "|S|", "alpha"), ("alpha", "alpha", "size")):
            print(f"\n{name}, on {out[name]['best']['model']}: best cell at each {title} on dev, "
                  f"change of exact\n{title:>6s}{other:>8s}   dev pp   test pp, 95 %")
            for row in out[name][f]:
                t = row["test"]
                print(f"{row[f]:6g}{row[other]:8g}{row['dev']['pp']:+9.1f}{t['pp']:+10.1f} "
                      f"[{t['lo']:+.1f}, {t['hi']:+.1f}]")
        heat_map(on_dev(mine)[name], name, fields)
    return out


def on_dev(cells):
    """{group: {(size, alpha): change of exact on dev rows, pp}}."""
    clean, out = clean_of(cells), {}
    for c in cells:
        if c["split"] == "dev" and c["group"] != "clean":
            change = np.mean(c["exact"]) - np.mean(clean["dev", c["model"]])
            out.setdefault(c["group"], {})[c["size"], c["alpha"]] = 100 * change
    return out


def heat_map(value, name, fields):
    """Change of exact on dev, a row for each |S| and a column for each alpha."""
    print(f"\n{name}: change of exact on dev, pp\n   |S|" + "".join(
        f"{'a ' + format(a, 'g'):>8s}" for a in fields["alpha"]))
    for n in fields["size"]:
        print(f"{n:6d}" + "".join(f"{value[n, a]:+8.1f}" for a in fields["alpha"]))


def across_layers(bests):
    """The best cell of each layer and, from 6 layers on, whether their mean differs from 0 (flips
    of 5 signs cannot go below p = 2 / 2^5). About these prompts, which all layers share, only."""
    best = {}
    for b in sorted(bests, key=lambda b: (b["layer"], b["dev"]["pp"])):
        best[b["layer"]] = b["test"]["pp"]  # of several runs of a layer the best on dev stays
    effects = list(best.values())
    p = f"sign-flip p {sign_flip(effects):.4f}" if len(best) > 5 else "too few layers for a p-value"
    print("\nbest cell per layer, change on test: " + ", ".join(
        f"{layer}: {e:+.1f}" for layer, e in best.items()))
    print(f"mean {np.mean(effects):+.1f}, d_z {cohens_dz(effects):.2f}, {p} "
          f"(paper: +43.3 over 9 layers, d_z 1.61)")


def grids(scenes, args):
    """The grid of each run; with several layers their best cells together."""
    bests = []
    for s in scenes:
        began = time.time()
        cells = grid(s, args)
        rows = {c["split"]: len(c["exact"]) for c in cells}
        print(f"\n{s.folder}, layer {s.layer}: {len(cells) // 2} cells, {rows['dev']} dev and "
              f"{rows['test']} test prompts each")
        result = grid_report(cells)
        best = best_of(cells, model=min(c["model"] for c in cells))  # B's cells start from 0 calls
        bests.append({"run": str(s.folder), "layer": s.layer, **best})
        add_metrics(s.folder, "grid", {
            "groups": result, "best": bests[-1], "how": cells[0]["how"], "alphas": args.alpha,
            "seconds": time.time() - began, "versions": software()})
        test = best["test"]
        print(f"\nbest cell: {best['group']} on {best['model']}, |S| {best['size']}, alpha "
              f"{best['alpha']:g}: test {test['pp']:+.1f} [{test['lo']:+.1f}, {test['hi']:+.1f}] pp"
              f" (paper: one A-exclusive latent, alpha 32: +65.0 [47.9, 82.1])")
    if len({b["layer"] for b in bests}) > 1:
        across_layers(bests)
