"""The table of a sweep: what reconstruction changes, over settings, and how much is seed noise.

    python extras/table.py runs/sweep-tiny/*/*      # evaluated runs, as run_sweep.sh leaves them

Each line is a mean +- standard deviation over settings (each the mean of its seeds), in percentage
points: by how much exact calls and the paper's tool correctness change when the reconstruction
replaces the vector at the prompt's last token, on prompts that need a tool. The published columns
are computed from the 47 rows that the authors released. (One of the 48 is missing; the paper's text
says 31.1 and 6.8.) "raw" is the published evaluation: on vectors without the mean and the scale
that the crosscoder was trained with. Runs with `--recipe paper` have it.

Compare a difference with what seeds alone do. With several seeds a setting (SEEDS="0 1 2" bash
run_sweep.sh), each factor's largest difference between two levels is divided by its standard error
under seed noise: z. Without any effect z is about 0.8 for two levels and 1.2 for three. Below 2
there is nothing to explain, and of twenty z one or two are above it by luck.

A run is here a dict: its settings; "name" of its folder, which is its setting (one name, several
seeds); "n", the test prompts that need a tool; and the change under each column's title.
"""

import argparse
import statistics as st
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
from dfc import cli, read_metrics


class Published(NamedTuple):
    """Change of tool correctness over the published settings, in percentage points."""

    mean_a: float  # into A: mean over settings
    sd_a: float    # and their standard deviation
    mean_b: float  # the same into B
    sd_b: float


COLUMNS = {  # into which model which reconstruction was put, and a score of eval_toolcall.py
    "exact A": ("A", "reconstruction", "exact"),
    "raw A": ("A", "reconstruction, raw", "exact"),
    "exact B": ("B", "reconstruction", "exact"),
    "tool A": ("A", "reconstruction", "paper_tool"),
    "tool B": ("B", "reconstruction", "paper_tool"),
}
PUBLISHED = {  # "k 1": the smallest k, and so on
    "all": Published(31.2, 9.7, 6.7, 4.9),
    "DFC": Published(30.6, 9.5, 5.9, 4.4),
    "crosscoder": Published(32.9, 10.6, 8.9, 5.9),
    "k 1": Published(31.1, 8.4, 7.6, 5.7),
    "k 2": Published(29.5, 8.1, 7.2, 5.3),
    "k 3": Published(32.9, 12.3, 5.2, 3.4),
    "dict 1": Published(32.5, 11.4, 6.2, 5.1),
    "dict 2": Published(29.8, 7.7, 7.1, 4.8),
    "excl 3": Published(27.5, 5.5, 6.0, 2.3),
    "excl 5": Published(30.3, 9.3, 4.4, 3.1),
    "excl 10": Published(34.2, 12.4, 7.4, 6.6),
    "DFC penalised": Published(28.3, 7.1, 6.1, 4.6),
    "DFC free": Published(32.7, 11.1, 5.7, 4.3),
    "crosscoder L1": Published(34.8, 7.8, 6.3, 4.4),
    "crosscoder no L1": Published(31.0, 13.4, 11.5, 6.4),
}
N_PUBLISHED = {"k": 3, "dict": 2}  # how many sizes of each the published sweep has
# in all else the runs of one table are equal
VARIES = {"dict", "k", "excl", "excl_b", "l1_shared", "l1_excl", "seed", "out", "name", *COLUMNS}


# ---- 1. The runs ---------------------------------------------------------------------------------
def run_of(folder, metrics):
    """The dict of an evaluated run."""
    evaluation = metrics["evaluation"]
    models = evaluation["models"]
    run = {**metrics["config"], "name": folder.name, "template": evaluation["template"],
           "n": models["A"]["clean"]["needs"]["n"]}

    for title, (model, version, score) in COLUMNS.items():
        if version in models[model]:
            clean = models[model]["clean"]["needs"]
            after = models[model][version]["needs"]
            run[title] = after[score]["pct"] - clean[score]["pct"]
    return run


def read(folders):
    """The evaluated runs among some folders, and how many are not evaluated yet. Raises ValueError
    if there is none, or if they do not belong into one table."""
    runs = []
    waiting = 0
    for folder in map(Path, folders):
        if folder.name == "cache":  # of activations
            continue

        metrics = read_metrics(folder)
        if "evaluation" in metrics:
            runs.append(run_of(folder, metrics))
        else:
            waiting += 1

    if not runs:
        raise ValueError("no evaluated run: bash run_sweep.sh")
    if len({(run["name"], run["seed"]) for run in runs}) < len(runs):
        raise ValueError("a setting (the folder's name) is given twice with the same seed")
    for key in runs[0]:
        if key not in VARIES and len({run[key] for run in runs}) > 1:
            raise ValueError(f"these runs differ in {key} (n: test prompts that need a tool): make "
                             "a table of each")
    return runs, waiting


# ---- 2. The lines of the table -------------------------------------------------------------------
def line_names(run, sizes):
    """The lines a run belongs to. sizes: of "k" and "dict" all that occur in the table, sorted."""
    if run["excl"]:
        penalty = "penalised" if run["l1_excl"] else "free"
        names = ["all", "DFC", f"excl {100 * run['excl']:.0f}", f"DFC {penalty}"]
    else:
        penalty = "L1" if run["l1_shared"] else "no L1"
        names = ["all", "crosscoder", f"crosscoder {penalty}"]

    # if there are as many sizes as were published, smallest stands beside smallest
    for key, n_published in N_PUBLISHED.items():
        name = key
        if len(sizes[key]) == n_published:
            rank = sizes[key].index(run[key]) + 1
            name = f"{key} {rank}"
        names.append(f"{name} ({run[key]})")
    return names


def published_name(line):
    """"k 1 (45)" is published as "k 1"."""
    return line.split(" (")[0]


def lines_of(runs):
    """{line of the table: its runs}, in the paper's order."""
    sizes = {}
    for key in N_PUBLISHED:
        sizes[key] = sorted({run[key] for run in runs})

    lines = {}
    for run in runs:
        for name in line_names(run, sizes):
            lines.setdefault(name, []).append(run)

    # unpublished lines come last
    order = [*PUBLISHED, *map(published_name, lines)]
    ordered = sorted(lines, key=lambda line: order.index(published_name(line)))
    return {line: lines[line] for line in ordered}


def by_setting(runs, column):
    """A list for each setting: its values over seeds."""
    settings = {}
    for run in runs:
        settings.setdefault(run["name"], []).append(run[column])
    return list(settings.values())


def setting_means(runs, column):
    """The mean over seeds of each setting."""
    return [st.mean(seeds) for seeds in by_setting(runs, column)]


def columns_of(runs):
    """The titles of the columns; "raw A" is of runs trained as published."""
    return [title for title in COLUMNS if title in runs[0]]


def mean_and_sd(values):
    """`+mean ± sd`; the sd of a single value is 0."""
    sd = st.stdev(values) if len(values) > 1 else 0.
    return f"{st.mean(values):+.1f} ± {sd:.1f}"


def print_table(runs):
    titles = columns_of(runs)
    heads = "".join(f"{title:>15s}" for title in titles)
    print(f"{'change, pp':18s}of {heads}   paper: tool A, tool B")

    for line, line_runs in lines_of(runs).items():
        columns = [setting_means(line_runs, title) for title in titles]
        cells = "".join(f"{mean_and_sd(values):>15s}" for values in columns)

        # the published numbers, if there are any
        beside = ""
        paper = PUBLISHED.get(published_name(line))
        if paper:
            beside = (f"   {paper.mean_a:+.1f} ± {paper.sd_a:.1f}, "
                      f"{paper.mean_b:+.1f} ± {paper.sd_b:.1f}")
        print(f"{line:18s}{len(columns[0]):3d}{cells}{beside}")


# ---- 3. Seed noise -------------------------------------------------------------------------------
def difference(levels, column, sd):
    """The largest difference between levels' means, with its z. levels: the runs of each; sd: of
    seeds within a setting. A mean of S settings, each the mean of its seeds, has the variance

        sd^2  sum_s (1 / seeds of s) / S^2"""
    means = []
    for runs in levels:
        settings = by_setting(runs, column)
        variance = st.mean(1 / len(seeds) for seeds in settings) / len(settings)
        means.append((st.mean(map(st.mean, settings)), variance))
    (low, low_variance), *_, (high, high_variance) = sorted(means)

    # if all seeds agree, the noise is unknown
    error = sd * (low_variance + high_variance) ** .5 or float("nan")
    return f"{high - low:.1f} ({(high - low) / error:.1f})"


def print_noise(runs):
    """Seed noise, and the z of each factor's largest difference between levels."""
    # the standard deviation within a setting, pooled over settings
    sds = {}
    for title in columns_of(runs):
        settings = by_setting(runs, title)
        variances = [st.variance(seeds) for seeds in settings if len(seeds) > 1]
        if not variances:
            print("one seed a setting: SEEDS=\"0 1 2\" bash run_sweep.sh shows what is noise")
            return
        sds[title] = st.mean(variances) ** .5
    cells = "".join(f"{sd:15.1f}" for sd in sds.values())
    print(f"{'seed noise, sd':21s}{cells}   within a setting, over {len(variances)} settings")

    # the lines that are each factor's levels
    lines = lines_of(runs)
    factors = {}
    for key in ("k", "dict", "excl"):
        factors[key] = [line for line in lines if line.startswith(f"{key} ")]
    factors["DFC or crosscoder"] = ["DFC", "crosscoder"]
    factors["free or penalised"] = ["DFC free", "DFC penalised"]

    # the largest difference of each factor
    print("\nlargest difference between two levels (z)")
    for factor, names in factors.items():
        levels = [lines[name] for name in names if name in lines]
        if len(levels) > 1:
            differences = [difference(levels, title, sd) for title, sd in sds.items()]
            print(f"{factor:21s}" + "".join(f"{cell:>15s}" for cell in differences))


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", help="run folders of dfc.py, evaluated by eval_toolcall.py")
    args = p.parse_args(argv)

    runs, waiting = read(args.runs)
    print(f"{len(runs)} runs, {runs[0]['n']} test prompts that need a tool; {waiting} more "
          "runs are not evaluated\n")
    print_table(runs)
    print_noise(runs)


if __name__ == "__main__":
    raise SystemExit(cli(main))
