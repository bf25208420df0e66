"""How many latents, how strong? The paper's grid of |S| and alpha, chosen on dev, reported on test.

The first |S| latents of a group are scaled by alpha at A's last prompt token, for every |S| and
alpha. Groups: A-exclusive, shared, both; of a plain crosscoder all latents. First are those that
separate dev prompts best.

    added_n = (alpha - 1) sum_{l in S} f_nl W_dec[l, A] scale_A

Beside them stand the two differences of means of steer.py, added to every prompt with factors of
their own.

The best of a hundred cells is high by luck alone on the prompts that made it the best. So a cell is
chosen on dev prompts and reported on test prompts. It is chosen twice: by exact calls, as
published, and by exact calls minus false calls, which also chooses the alpha of each |S|. A
strength at which A answers every prompt with a call can win the first choice. It cannot win the
second.

    python extras/grid.py                           # the newest run: three minutes on 2 CPU cores
    python extras/grid.py runs/tiny runs/tiny-excl0.0       # and a plain crosscoder
    python extras/grid.py runs/tiny runs/tiny-layer*        # then the best cell of each layer

Results are kept in the run's grid.jsonl. A grid that was stopped, or one with more --sizes or
--alpha, resumes from there. They count only for the same weights, models and prompts.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
from dfc import atomically, cli, fingerprint, load_model, read_rows
from eval_toolcall import at_least_one, open_run, paired, save_result
from steer import (
    ALPHAS,
    Outcome,
    difference_of_means,
    outcomes,
    rank_latents,
    read_prompts,
    written,
)


class Scaling(NamedTuple):
    """Latents scaled together, or a difference of means: all that A's answers depend on."""

    alpha: float    # of a difference of means: the factor with which it is added
    latents: tuple  # or its name


class Cell(NamedTuple):
    """A cell of the grid. Two groups may begin with the same latents: they share their answers."""

    group: str
    scaling: Scaling


CLEAN = Scaling(1., ())
FACTORS = (.1, .2, .3, .4, .5, .75, 1., 1.5, 2.)
GROUPS = {"A-exclusive": ["A-exclusive"], "shared": ["shared"],
          "A-exclusive + shared": ["A-exclusive", "shared"]}


# ---- 1. The cells --------------------------------------------------------------------------------
def list_cells(cc, ranking, sizes, alphas):
    """A list of cells for each group and |S|; small sizes and strengths come first. There is no
    group of B-exclusive latents: they write nothing into A, so the published +0 is true by
    construction. Raises ValueError."""
    groups = GROUPS
    if cc.n_a + cc.n_b == 0:
        groups = {"plain crosscoder": ["shared"]}
    strengths = sorted(set(alphas) - {1}, key=lambda alpha: abs(alpha - 1))

    lines = []
    for group, partitions in groups.items():
        latents = [row["feature_idx"] for row in ranking
                   if row["partition"] in partitions and row["cohens_d"] > 0]
        for size in sorted(set(sizes)):
            if size <= len(latents):
                chosen = tuple(latents[:size])
                lines.append([Cell(group, Scaling(alpha, chosen)) for alpha in strengths])

    if not any(lines):
        raise ValueError("an empty grid: alpha 1 alone, or too few latents are larger where a tool "
                         "is needed")
    for name in ("A - B", "diff of means"):
        lines.append([Cell(name, Scaling(factor, (name,))) for factor in FACTORS])
    return lines


def differences_of_means(dev):
    """{name: (D,)}: A minus B where a tool is needed, and A there minus A elsewhere."""
    a_ND, b_ND = dev.x_NMD.unbind(1)
    gap_ND = (a_ND - b_ND)[dev.needs_N]
    return {"A - B": gap_ND.mean(0), "diff of means": difference_of_means(a_ND, dev.needs_N)}


def added(run, prompts, means, scaling):
    """What a scaling adds to A -> (N, D)."""
    alpha, latents = scaling
    if latents and latents[0] in means:
        return (alpha * means[latents[0]]).expand(len(prompts.rows), -1)
    return (alpha - 1) * written(run.cc, prompts.f_NL, list(latents))


def answer(run, prompts, means, scalings, at_once=8):
    """{scaling: Outcome} of at least these scalings, without the answers' texts. Those that
    grid.jsonl holds are not done again; new ones are added to it, at_once scalings at a time."""
    s = run.settings
    file = run.folder / "grid.jsonl"
    weights = [p.double().sum().item() for p in run.cc.parameters()]
    what = [prompts.texts, s.max_new, s.layer, weights, str(run.cc.mean.device)]
    key = fingerprint(what, s)

    # what is there already
    found = {}
    lines = []  # also those of other weights or prompts
    if file.exists():
        lines += read_rows(str(file), ())
    for line in lines:
        if line["key"] == key:
            scaling = Scaling(line["alpha"], tuple(line["latents"]))
            found[scaling] = Outcome(line["exact"], line["false_calls"], [])
    missing = [scaling for scaling in dict.fromkeys(scalings) if scaling not in found]

    for i in tqdm(range(0, len(missing), at_once), "grid", leave=False, disable=None):
        batch = missing[i:i + at_once]
        v_VND = torch.stack([added(run, prompts, means, scaling) for scaling in batch])
        for scaling, outcome in zip(batch, outcomes(run, "A", prompts, v_VND)):
            found[scaling] = outcome._replace(answers=[])
            lines.append({"key": key, **scaling._asdict(), "exact": outcome.exact,
                          "false_calls": outcome.false_calls})
        with atomically(file) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


# ---- 2. Chosen on dev, reported on test ----------------------------------------------------------
def change(found, cell):
    """{pp, lo, hi}: how a cell changes exact calls, with a paired 95 % interval over prompts."""
    return paired(found[cell.scaling].exact, found[CLEAN].exact)


def best_of(dev, test, cells, less_false=False):
    """The cell with most exact calls on dev, or exact calls minus false calls; the first if several
    are equal. dev, test: {scaling: Outcome}."""
    def gain(cell):
        false_calls = dev[cell.scaling].false_calls if less_false else 0
        return change(dev, cell)["pp"] - false_calls

    best = max(cells, key=gain)
    return {
        "group": best.group,
        "size": len(best.scaling.latents),
        "alpha": best.scaling.alpha,
        "dev": change(dev, best)["pp"],  # change of exact calls, in percentage points
        "test": change(test, best),
        "false_calls": test[best.scaling].false_calls,  # on test, in percent
    }


def measure_grid(run, lines, means, most_rows):
    """What metrics.json keeps of list_cells()' lines, on at most `most_rows` dev and test rows of
    each kind. means: differences_of_means()."""
    cells = [cell for line in lines for cell in line]
    scaled = [cell for cell in cells if cell.group not in means]
    scalings = [CLEAN, *(cell.scaling for cell in cells)]
    dev = answer(run, read_prompts(run, "dev", most_rows), means, scalings)
    test = answer(run, read_prompts(run, "test", most_rows), means, scalings)
    clean = test[CLEAN]

    groups = {}  # {group: for each |S| its best cell and {alpha: change on dev}}
    for line in lines:
        on_dev = {cell.scaling.alpha: change(dev, cell)["pp"] for cell in sorted(line)}
        best = best_of(dev, test, line, less_false=True)
        groups.setdefault(best["group"], []).append({"best": best, "on_dev": on_dev})

    return {
        "layer": run.settings.layer,
        "rows": {"dev": len(dev[CLEAN].exact), "test": len(clean.exact)},  # that need a tool
        "clean": {"exact": 100 * np.mean(clean.exact), "false_calls": clean.false_calls},
        "groups": groups,
        "best": best_of(dev, test, scaled),
        "best_less_false": best_of(dev, test, scaled, less_false=True),
    }


# ---- 3. Print ------------------------------------------------------------------------------------
HEAD = "   best  on test, 95 %          false %"


def print_grid(grid, folder):
    """A line for each |S|: every alpha on dev, and the best of them on test."""
    print("\n{}, layer {}: {dev} dev and {test} test prompts need a tool; on test clean A has "
          "{exact:.1f} % exact calls and {false_calls:.1f} % false calls".format(
              folder, grid["layer"], **grid["rows"], **grid["clean"]))
    for group, lines in grid["groups"].items():
        alphas = "".join(f"{f'a {alpha:g}':>7s}" for alpha in lines[0]["on_dev"])
        print(f"\n{group}: change of exact calls, pp\n   |S|{alphas}{HEAD}")
        for line in lines:
            changes = "".join(f"{pp:+7.1f}" for pp in line["on_dev"].values())
            print(f"{line['best']['size']:6d}{changes}{best_columns(line['best'])}")

    print_best("best cell on dev by", {"exact calls": grid["best"],
                                       "... minus false calls": grid["best_less_false"]})
    print("(paper: one A-exclusive latent, alpha 32: +65.0 [47.9, 82.1])")


def print_layers(grids):
    """The best cell of each layer (of several runs of one, the best on dev), if there are several.
    Their mean has no interval: layers share prompts and model, so they are no sample."""
    best = {}
    for grid in sorted(grids, key=lambda grid: (grid["layer"], grid["best"]["dev"])):
        best[f"layer {grid['layer']}"] = grid["best"]
    if len(best) == 1:
        return

    print_best("best cell on dev of", best)
    mean = np.mean([cell["test"]["pp"] for cell in best.values()])
    print(f"mean {mean:+.1f} (paper: +43.3 over 9 layers)")


def print_best(title, cells):
    """{name: what best_of() returns} as a table."""
    print(f"\n{title:46s}  |S|{HEAD}")
    for name, best in cells.items():
        print(f"{name:27s}{best['group']:20s}{best['size']:4d}{best_columns(best)}")


def best_columns(best):
    """The columns below HEAD."""
    on_test = "{pp:+.1f} [{lo:+.1f}, {hi:+.1f}]".format(**best["test"])
    return f"{best['alpha']:7g}  {on_test:22s}{best['false_calls']:6.1f}"


# ---- 4. The program ------------------------------------------------------------------------------
def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    p.add_argument("--sizes", nargs="+", type=at_least_one, default=[1, 2, 4, 8, 16, 32],
                   help="the |S|")
    p.add_argument("--alpha", nargs="+", type=float, default=[0., *ALPHAS],
                   help="strengths; 1 is clean")
    p.add_argument("--rows", type=at_least_one, default=20, help="dev and test rows of each kind")
    args = p.parse_args(argv)

    grids = []
    get = cache(load_model)  # runs of one pair share its models
    for name in args.runs or [None]:
        run = open_run(name, get)
        dev = read_prompts(run, "dev")
        ranking = rank_latents(run.cc, dev.f_NL, dev.needs_N)
        lines = list_cells(run.cc, ranking, args.sizes, args.alpha)
        grid = measure_grid(run, lines, differences_of_means(dev), args.rows)
        print_grid(grid, run.folder)
        rows = list(read_rows(f"{run.folder}/grid.jsonl", ()))
        save_result(run.folder, "grid", grid, rows, "grid.jsonl")
        grids.append(grid)

    print_layers(grids)


if __name__ == "__main__":
    raise SystemExit(cli(main))
