"""How many latents, how strong? The |S| x alpha grid of the paper, chosen on dev, reported on test.

The first |S| latents of a group (A-exclusive, shared, both; of a plain crosscoder all; the best
separated on dev first) are scaled by alpha at A's last prompt token, for every |S| and alpha:

    delta_n = sum_{l in S} (alpha - 1) f_nl W_dec[l, A]

The best of a hundred cells is high by luck alone on the rows that made it the best. So a cell is
chosen on dev rows and reported on test rows. It is chosen twice: by exact calls, as published, and
by exact calls less false calls. A strength that answers every prompt with a call may be the best
by the first count; by the second it is worth nothing.

    python extras/grid.py                           # the newest run: three minutes on 2 CPU cores
    python extras/grid.py runs/tiny runs/tiny-excl0.0       # and a plain crosscoder
    python extras/grid.py runs/tiny runs/tiny-layer*        # the best cell of each layer, together

Cells go into the run's grid.jsonl: a killed grid, or one with more --sizes or --alpha, goes on from
there. They count for the same weights, models and rows only.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfc import cli
from eval_toolcall import keep, paired
from steer import ALPHAS, delta, outcomes, place, stage

# ---- 1. The cells --------------------------------------------------------------------------------

def cells_of(r, sizes, alphas):
    """{(group, |S|, alpha): latents}, small sizes and strengths first. B-exclusive latents write
    nothing into A, by the mask: the published +0 is no finding. Raises ValueError."""
    groups = {"A-exclusive": ["A-exclusive"], "shared": ["shared"],
              "A-exclusive + shared": ["A-exclusive", "shared"]}
    groups, cells = groups if r.cc.n_a + r.cc.n_b else {"plain crosscoder": ["shared"]}, {}
    for name, parts in groups.items():
        latents = [row["feature_idx"] for row in r.ranked
                   if row["contrast"] == "needs/none" and row["partition"] in parts]
        cells |= {(name, n, a): latents[:n] for n in sorted(set(sizes)) if 0 < n <= len(latents)
                  for a in sorted(set(alphas) - {1}, key=lambda a: abs(a - 1))}
    if not cells:
        raise ValueError(f"an empty grid: alpha 1 alone, no |S| above 0, or no latent of "
                         f"{r.folder} fires more where a tool is needed")
    return cells

def fingerprint(r, p):
    """A name for all that answers depend on: every weight, the rows, the length of an answer."""
    found = hashlib.sha256(json.dumps([p.rows, p.prompts, r.max_new, r.s.layer]).encode())
    for module in (r.cc, *r.models.values()):
        for weights in module.state_dict().values():
            found.update(weights.flatten().view(torch.uint8).cpu().numpy())
    return found.hexdigest()[:16]

def read_cells(file):
    """The cells of a grid.jsonl, of whatever key; half a line is no cell."""
    cells = []
    for line in file.read_text().split("\n") if file.exists() else ():
        with contextlib.suppress(ValueError):
            cells.append(json.loads(line))
    return cells

def answer(r, p, wanted, at_once=8):
    """A's {(alpha, *latents): {exact of rows that need a tool, false_calls of others in %, ...}}.
    What grid.jsonl holds is not done again; what is new is added to it."""
    file, key = r.folder / "grid.jsonl", fingerprint(r, p)
    done = {(c["alpha"], *c["latents"]): c for c in read_cells(file) if c["key"] == key}
    missing = [cell for cell in dict.fromkeys(wanted) if cell not in done]
    for i in tqdm(range(0, len(missing), at_once), "grid", leave=False):
        some = missing[i:i + at_once]
        v_VND = torch.stack([delta(r.cc, p.f_NL, latents, alpha) for alpha, *latents in some])
        for cell, (exact, false, _) in zip(some, outcomes(r, p, "A", v_VND)):
            done[cell] = {"key": key, "alpha": cell[0], "latents": cell[1:], "exact": exact,
                          "false_calls": false}
            with open(file, "a") as f:  # first a break: what stands there may be half a line
                f.write("\n" + json.dumps(done[cell]))
    return done

# ---- 2. Chosen on dev, reported on test ----------------------------------------------------------

CLEAN = 1.,  # the cell without latents

def gain(found, name, cells):
    """Change of exact calls, in percentage points, with a paired 95 % interval over rows."""
    return paired(found[name[2], *cells[name]]["exact"], found[CLEAN]["exact"])

def best_of(dev, test, cells, less_false=0):
    """The cell with most exact calls on dev (less_false 1: less its false calls), the first where
    equal, and its effect on test."""
    best = max(cells, key=lambda name: gain(dev, name, cells)["pp"]
               - less_false * dev[name[2], *cells[name]]["false_calls"])
    return dict(zip(("group", "size", "alpha"), best)) | {
        "dev": gain(dev, best, cells)["pp"], "test": gain(test, best, cells),
        "false_calls": test[best[2], *cells[best]]["false_calls"]}

def grid(r, args):
    """Every cell on dev and on test rows -> (what metrics.json keeps, the cells behind it)."""
    cells = cells_of(r, args.sizes, args.alpha)
    places = [place(r, split, args.rows) for split in ("dev", "test")]
    wanted = [CLEAN, *((name[2], *latents) for name, latents in cells.items())]
    dev, test = (answer(r, p, wanted) for p in places)
    out = {"layer": r.s.layer, "rows": [int(p.needs.sum()) for p in places], "groups": {},
           "best": best_of(dev, test, cells), "best_less_false": best_of(dev, test, cells, 1),
           "clean": [100 * float(np.mean(test[CLEAN]["exact"])), test[CLEAN]["false_calls"]]}
    for group, n in dict.fromkeys(name[:2] for name in cells):
        some = {name: latents for name, latents in cells.items() if name[:2] == (group, n)}
        on_dev = {a: gain(dev, (group, n, a), some)["pp"] for *_, a in sorted(some)}
        out["groups"].setdefault(group, []).append(best_of(dev, test, some) | {"on_dev": on_dev})
    return out, read_cells(r.folder / "grid.jsonl")

def print_grid(r, out):
    """A line for each |S|: every alpha on dev, the best of them on test."""
    print("\n{}, layer {}: {} dev and {} test rows that need a tool; on test A is exact on "
          "{:.1f} %, false calls {:.1f} %".format(r.folder, r.s.layer, *out["rows"], *out["clean"]))
    head = "   best  on test, 95 %          false %"
    for group, sizes in out["groups"].items():
        print(f"\n{group}: change of exact calls, pp\n   |S|" + "".join(
            f"{f'a {a:g}':>7s}" for a in sizes[0]["on_dev"]) + head)
        for b in sizes:
            cells = "".join(f"{v:+7.1f}" for v in b["on_dev"].values())
            print(f"{b['size']:6d}{cells}{best_line(b)}")
    print(f"\n{'best cell on dev by':46s}  |S|{head}")
    for name, b in (("exact calls", out["best"]), ("... less false calls", out["best_less_false"])):
        print(f"{name:27s}{b['group']:20s}{b['size']:4d}{best_line(b)}")
    print("(paper: one A-exclusive latent, alpha 32: +65.0 [47.9, 82.1])")

def best_line(b):
    change = "{pp:+.1f} [{lo:+.1f}, {hi:+.1f}]".format(**b["test"])
    return f"{b['alpha']:7g}  {change:22s}{b['false_calls']:6.1f}"

# ---- 3. Several layers ---------------------------------------------------------------------------

def across_layers(grids):
    """The best cell of each layer (of several runs of one, the best on dev). No p-value: layers
    share their prompts and their model, they are not a sample of anything."""
    best = {g["layer"]: g["best"]["test"]["pp"] for g in sorted(
        grids, key=lambda g: (g["layer"], g["best"]["dev"]))}
    x = np.array(list(best.values()))
    print("\nbest cell of each layer, test:", *(f"layer {n} {v:+.1f}  " for n, v in best.items()))
    print(f"mean {x.mean():+.1f}, d_z {x.mean() / max(1e-9, x.std(ddof=1)):.2f}"
          "   (paper: +43.3 over 9 layers, d_z 1.61)")

# ---- 4. The program ------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    p.add_argument("--preset", choices=["tiny", "paper"], help="for crosscoders without a run: "
                   "whose models and texts")
    p.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="the |S|")
    p.add_argument("--alpha", nargs="+", type=float, default=ALPHAS, help="strengths; 1 is clean")
    p.add_argument("--rows", type=int, default=20, help="rows of each kind, on dev and on test")
    args, grids = p.parse_args(argv), []
    for name in args.runs or [None]:
        began, r = time.time(), stage(name, args.preset)
        out, lines = grid(r, args)
        print_grid(r, out)
        grids.append(out | {"seconds": time.time() - began})
        keep(r.folder, "grid", grids[-1], lines, "grid.jsonl")
    if len({g["layer"] for g in grids}) > 1:
        across_layers(grids)

if __name__ == "__main__":
    sys.exit(cli(main))
