"""How many latents, how strong? The |S| x alpha grid of the paper, chosen on dev, reported on test.

The first |S| latents of a group (A-exclusive, shared, both; of a plain crosscoder all; the best
separated on dev first) are scaled by alpha at A's last prompt token, for every |S| and alpha:

    delta_n = sum_{l in S} (alpha - 1) f_nl W_dec[l, A]

The best of a hundred cells is high by luck alone on the rows that made it the best. So a cell is
chosen on dev rows and reported on test rows. It is chosen twice: by exact calls, as published, and
by exact calls less false calls. A strength at which every prompt is answered with a call may be the
best by the first count; by the second it is worth nothing.

    python extras/grid.py                           # the newest run: three minutes on 2 CPU cores
    python extras/grid.py runs/tiny runs/tiny-excl0.0       # and a plain crosscoder
    python extras/grid.py runs/tiny runs/tiny-layer*        # the best cell of each layer, together

Answers go into the run's grid.jsonl: a killed grid, or one with more --sizes or --alpha, goes on
from there. They count for the same weights, models and rows only.
"""

import argparse
import json
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfc import atomically, cli, hash_of, leave, load_model
from eval_toolcall import at_least_one, open_run, paired, save_result
from steer import ALPHAS, delta, outcomes_in, read_prompts, survey_latents


class Scaling(NamedTuple):
    """Latents scaled together: all that A's answers depend on."""

    alpha: float
    latents: tuple


class Cell(NamedTuple):
    """A cell of the grid. Two groups may begin with the same latents: they share their answers."""

    group: str
    scaling: Scaling


class Counts(NamedTuple):
    """What A's answers come to."""

    exact: list         # 0 or 1 for each prompt that needs a tool
    false_calls: float  # tool calls on prompts that need none, in percent of these


@dataclass
class Best:
    """A cell chosen on dev rows; changes of exact calls are in percentage points."""

    group: str
    size: int           # |S|
    alpha: float
    dev: float          # change on dev rows
    test: dict          # change on test rows {pp, lo, hi}
    false_calls: float  # on test rows, in percent


@dataclass
class Grid:
    """The grid of one run; metrics.json keeps it."""

    layer: int
    rows: dict             # prompts that need a tool: {"dev", "test"}
    clean: dict            # of A on test rows, in percent: {"exact", "false_calls"}
    groups: dict           # {group: for each |S| {"best": Best, "on_dev": {alpha: change on dev}}}
    best: Best             # by exact calls
    best_less_false: Best  # by exact calls less false calls


CLEAN = Scaling(1., ())
GROUPS = {"A-exclusive": ["A-exclusive"], "shared": ["shared"],
          "A-exclusive + shared": ["A-exclusive", "shared"]}


# ---- 1. The cells --------------------------------------------------------------------------------

def list_cells(run, ranking, sizes, alphas):
    """A list of cells for each group and |S|; small sizes and strengths come first. B-exclusive
    latents write nothing into A, by the mask: the published +0 is no finding. Raises ValueError."""
    groups = GROUPS
    if run.cc.n_a + run.cc.n_b == 0:
        groups = {"plain crosscoder": ["shared"]}
    strengths = sorted(set(alphas) - {1}, key=lambda alpha: abs(alpha - 1))

    lines = []
    for group, partitions in groups.items():
        latents = [row["feature_idx"] for row in ranking
                   if row["contrast"] == "needs/none" and row["partition"] in partitions]
        for size in sorted(set(sizes)):
            if size <= len(latents):
                chosen = tuple(latents[:size])
                lines.append([Cell(group, Scaling(alpha, chosen)) for alpha in strengths])

    if not any(lines):
        raise ValueError(f"an empty grid: alpha 1 alone, or too few latents of "
                         f"{run.folder} are larger where a tool is needed")
    return lines


def fingerprint(run, prompts):
    """A name for all that answers depend on: every weight, the rows, the length of an answer."""
    what = [str(prompts.rows), prompts.texts, run.settings.max_new, run.settings.layer]
    for module in (run.cc, *run.models.values()):
        for weights in module.state_dict().values():
            what.append(zlib.crc32(weights.flatten().view(torch.uint8).cpu().numpy()))
    return hash_of(what)


def read_lines(file):
    """The lines of a grid.jsonl, of whatever fingerprint."""
    if not file.exists():
        return []
    return [json.loads(text) for text in file.read_text().splitlines()]


def answer(run, prompts, scalings, at_once=8):
    """{scaling: Counts} of A's answers, with at least these scalings. What grid.jsonl holds is not
    done again; what is new is added to it, at_once scalings at a time."""
    file = run.folder / "grid.jsonl"
    key = fingerprint(run, prompts)

    # what is there already
    counts = {}
    lines = read_lines(file)
    for line in lines:
        if line["key"] == key:
            scaling = Scaling(line["alpha"], tuple(line["latents"]))
            counts[scaling] = Counts(line["exact"], line["false_calls"])
    missing = [scaling for scaling in dict.fromkeys(scalings) if scaling not in counts]

    for i in tqdm(range(0, len(missing), at_once), "grid", leave=False, disable=None):
        batch = missing[i:i + at_once]
        v_VND = torch.stack([delta(run.cc, prompts.f_NL, list(scaling.latents), scaling.alpha)
                             for scaling in batch])
        for scaling, outcome in zip(batch, outcomes_in(run, "A", prompts, v_VND)):
            counts[scaling] = Counts(outcome.exact, outcome.false_calls)
            lines.append({"key": key, **scaling._asdict(), **counts[scaling]._asdict()})
        with atomically(file) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return counts


# ---- 2. Chosen on dev, reported on test ----------------------------------------------------------

def change(counts, cell):
    """{pp, lo, hi}: how a cell changes exact calls, with a paired 95 % interval over rows."""
    return paired(counts[cell.scaling].exact, counts[CLEAN].exact)


def best_of(dev, test, cells, less_false=False):
    """The Best of some cells: that with most exact calls on dev, or exact calls less false calls;
    the first where equal. dev, test: {scaling: Counts}."""
    def worth(cell):
        false_calls = dev[cell.scaling].false_calls if less_false else 0
        return change(dev, cell)["pp"] - false_calls

    best = max(cells, key=worth)
    return Best(
        group=best.group,
        size=len(best.scaling.latents),
        alpha=best.scaling.alpha,
        dev=change(dev, best)["pp"],
        test=change(test, best),
        false_calls=test[best.scaling].false_calls,
    )


def measure_grid(run, lines, most_rows):
    """The Grid of list_cells()' lines, on at most `most_rows` dev and test rows of each kind."""
    cells = [cell for line in lines for cell in line]
    scalings = [CLEAN, *(cell.scaling for cell in cells)]
    dev = answer(run, read_prompts(run, "dev", most_rows), scalings)
    test = answer(run, read_prompts(run, "test", most_rows), scalings)

    clean = test[CLEAN]
    rows = {"dev": len(dev[CLEAN].exact), "test": len(clean.exact)}
    before = {"exact": 100 * np.mean(clean.exact), "false_calls": clean.false_calls}

    groups = {}
    for line in lines:
        on_dev = {cell.scaling.alpha: change(dev, cell)["pp"] for cell in sorted(line)}
        best = best_of(dev, test, line)
        groups.setdefault(best.group, []).append({"best": best, "on_dev": on_dev})

    return Grid(run.settings.layer, rows, before, groups, best_of(dev, test, cells),
                best_of(dev, test, cells, less_false=True))


# ---- 3. Print ------------------------------------------------------------------------------------

HEAD = "   best  on test, 95 %          false %"


def print_grid(grid, folder):
    """A line for each |S|: every alpha on dev, the best of them on test."""
    print(f"\n{folder}, layer {grid.layer}: {grid.rows['dev']} dev and {grid.rows['test']} test "
          f"rows that need a tool; on test A is exact on {grid.clean['exact']:.1f} %, false calls "
          f"{grid.clean['false_calls']:.1f} %")
    for group, lines in grid.groups.items():
        alphas = "".join(f"{f'a {alpha:g}':>7s}" for alpha in lines[0]["on_dev"])
        print(f"\n{group}: change of exact calls, pp\n   |S|{alphas}{HEAD}")
        for line in lines:
            changes = "".join(f"{pp:+7.1f}" for pp in line["on_dev"].values())
            print(f"{line['best'].size:6d}{changes}{best_columns(line['best'])}")

    print_best("best cell on dev by", {"exact calls": grid.best,
                                       "... less false calls": grid.best_less_false})
    print("(paper: one A-exclusive latent, alpha 32: +65.0 [47.9, 82.1])")


def print_layers(grids):
    """The best cell of each layer (of several runs of one, the best on dev), if there are several.
    Neither interval nor p-value of their mean: layers share prompts and model, they are not a
    sample of anything."""
    best = {}
    for grid in sorted(grids, key=lambda grid: (grid.layer, grid.best.dev)):
        best[f"layer {grid.layer}"] = grid.best
    if len(best) == 1:
        return

    print_best("best cell on dev of", best)
    mean = np.mean([cell.test["pp"] for cell in best.values()])
    print(f"mean {mean:+.1f} (paper: +43.3 over 9 layers)")


def print_best(title, cells):
    """{name: Best} as a table."""
    print(f"\n{title:46s}  |S|{HEAD}")
    for name, best in cells.items():
        print(f"{name:27s}{best.group:20s}{best.size:4d}{best_columns(best)}")


def best_columns(best):
    """What stands below HEAD."""
    on_test = "{pp:+.1f} [{lo:+.1f}, {hi:+.1f}]".format(**best.test)
    return f"{best.alpha:7g}  {on_test:22s}{best.false_calls:6.1f}"


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
        lines = list_cells(run, survey_latents(run).ranking, args.sizes, args.alpha)
        grid = measure_grid(run, lines, args.rows)
        print_grid(grid, run.folder)
        save_result(run.folder, "grid", asdict(grid), read_lines(run.folder / "grid.jsonl"),
                    "grid.jsonl")
        grids.append(grid)

    print_layers(grids)


if __name__ == "__main__":
    leave(cli(main))
