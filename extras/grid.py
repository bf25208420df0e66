"""How many latents, how strong? The |S| x alpha grid of the paper; steer.py --grid runs it.

The first |S| latents of a group (A-exclusive, shared, ...; ranked on dev rows) are scaled by alpha
at the prompt's last token, for every |S| and alpha. The best cell is chosen on dev rows and
reported on test rows: on the rows it was chosen on, the best of many cells is high by luck alone.

    python steer.py --grid                              # the newest run: 3 minutes on 2 cores
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
from steer import exacts, outputs_of, place, rows_of, written

SIZES = (1, 2, 4, 8, 16, 32)


def groups(s):
    """{name: its latents, best first}: each partition, A-exclusive with shared; of a plain
    crosscoder all."""
    ranked = [r for r in s.ranked if r["contrast"] == "needs/none"]
    if not s.cc.n_a + s.cc.n_b:
        return {"all": [r["feature_idx"] for r in ranked]}
    names = {"A-exclusive": ["a_excl"], "shared": ["shared"], "B-exclusive": ["b_excl"],
             "A-exclusive + shared": ["a_excl", "shared"]}
    out = {name: [r["feature_idx"] for r in ranked if r["partition"] in parts]
           for name, parts in names.items()}
    return {name: latents for name, latents in out.items() if latents}


def cells_of(s, alphas):
    """Every (group, size, alpha): the first `size` latents of a group at strength alpha on A."""
    return [{"group": name, "size": n, "alpha": a, "latents": latents[:n]}
            for name, latents in groups(s).items() for n in SIZES if n <= len(latents)
            for a in alphas if a != 1]


def key_of(cell):
    return cell["split"], cell["group"], cell["size"], cell["alpha"]


def grid(s, args, at_once=8):
    """Answer every cell on dev and on test rows that need a tool -> finished cells. Each `at_once`
    cells are written to grid.jsonl as they are done; what is there already is not done again."""
    from tqdm import tqdm
    file, cells = s.folder / "grid.jsonl", []
    how = {"rows": args.rows, "max_new": s.max_new, "positions": s.positions}
    how |= identity((s.cc, s.settings, s.folder))
    finished = {key_of(c): c for c in read_grid(file, how)}
    clean = {"group": "clean", "size": 0, "alpha": 1., "latents": []}
    if not cells_of(s, args.alpha):
        raise Problem(f"an empty grid: no alpha other than 1, or no latent of {s.folder} fires "
                      f"more where a tool is needed")
    for split in ("dev", "test"):
        todo = [c | {"split": split} for c in [clean, *cells_of(s, args.alpha)]]
        missing = [c for c in todo if key_of(c) not in finished]
        p = place(s, rows_of(s, split, args.rows, needs=True)) if missing else None
        for i in tqdm(range(0, len(missing), at_once), desc=f"grid, {split}", leave=False):
            some = missing[i:i + at_once]
            deltas = [(c["alpha"] - 1) * written(s.cc, p.f, c["latents"], 0) for c in some]
            texts = outputs_of(s, p, "A", torch.stack(deltas))
            new = [c | {"how": how, "outputs": t, "exact": exacts(t, p)}
                   for c, t in zip(some, texts)]
            append_lines(file, new)
            finished |= {key_of(c): c for c in new}
        cells += [finished[key_of(c)] for c in todo]
    return cells


def read_grid(file, how):
    """Whole cells of grid.jsonl made the same way. A line cut short by a kill is left out."""
    cells = []
    for line in file.read_text(errors="replace").split("\n") if file.exists() else ():
        with contextlib.suppress(ValueError):
            cells.append(json.loads(line))
    return [c for c in cells if c["how"] == how]


def append_lines(file, rows):
    """Add lines at the end, beginning a new line if the last one was cut short."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    cut = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    with open(file, "a") as f:
        f.write("\n" * bool(cut) + text)


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


def best_of(cells, **where):
    """The cell with most exact calls on dev among those with these fields, and its effect on test
    (paired interval): chosen on one, reported on the other."""
    clean = {c["split"]: c["exact"] for c in cells if c["group"] == "clean"}
    some = [c for c in cells if all(c[k] == v for k, v in where.items()) and c["group"] != "clean"]
    top = max((c for c in some if c["split"] == "dev"), key=lambda c: sum(c["exact"]))
    test = next(c for c in some if key_of(c) == ("test", *key_of(top)[1:]))
    return {"group": top["group"], "size": top["size"], "alpha": top["alpha"],
            "dev": paired(top["exact"], clean["dev"]), "test": paired(test["exact"], clean["test"])}


def grid_report(cells):
    """Saturation curve, best alpha, heat map; returns them for metrics.json."""
    out = {}
    for name in dict.fromkeys(c["group"] for c in cells if c["group"] != "clean"):
        mine = [c for c in cells if c["group"] in (name, "clean")]
        fields = {f: sorted({c[f] for c in mine if c["group"] == name}) for f in ("size", "alpha")}
        out[name] = {f: [best_of(mine, **{f: v}) for v in values] for f, values in fields.items()}
        out[name]["best"] = best_of(mine)
        for f, title in (("size", "|S|"), ("alpha", "alpha")):
            print(f"\n{name}: best cell at each {title}, chosen on dev, change of exact on test\n"
                  f"{title:>6s}   other   dev pp   test pp, 95 %")
            for row in out[name][f]:
                other = row["alpha" if f == "size" else "size"]
                t = row["test"]
                print(f"{row[f]:6g}{other:8g}{row['dev']['pp']:+9.1f}{t['pp']:+10.1f} "
                      f"[{t['lo']:+.1f}, {t['hi']:+.1f}]")
        heat_map(mine, name, fields)
    return out


def heat_map(cells, name, fields):
    """Change of exact on dev, a row for each |S| and a column for each alpha."""
    clean = next(c["exact"] for c in cells if c["group"] == "clean" and c["split"] == "dev")
    value = {(c["size"], c["alpha"]): 100 * (np.mean(c["exact"]) - np.mean(clean))
             for c in cells if c["split"] == "dev" and c["group"] == name}
    print(f"\n{name}: change of exact on dev, pp\n   |S|" + "".join(
        f"{'a ' + format(a, 'g'):>8s}" for a in fields["alpha"]))
    for n in fields["size"]:
        print(f"{n:6d}" + "".join(f"{value[n, a]:+8.1f}" for a in fields["alpha"]))


def across_layers(bests):
    """The best cell of each layer and, from 6 layers on, whether their mean differs from 0."""
    best = {}
    for b in sorted(bests, key=lambda b: (b["layer"], b["dev"]["pp"])):
        best[b["layer"]] = b["test"]["pp"]
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
        began, cells = time.time(), grid(s, args)
        print(f"\n{s.folder}, layer {s.layer}: {len(cells)} cells, "
              f"{len(cells[0]['exact'])} prompts each")
        result, best = grid_report(cells), best_of(cells)
        bests.append({"run": str(s.folder), "layer": s.layer, **best})
        add_metrics(s.folder, "grid", {"groups": result, "best": bests[-1],
                                       "seconds": time.time() - began, "versions": software()})
        test = best["test"]
        print(f"\nbest cell: {best['group']}, |S| {best['size']}, alpha {best['alpha']:g}: test "
              f"{test['pp']:+.1f} [{test['lo']:+.1f}, {test['hi']:+.1f}] pp "
              f"(paper: one A-exclusive latent, alpha 32: +65.0 [47.9, 82.1])")
    if len({b["layer"] for b in bests}) > 1:
        across_layers(bests)
