"""The table of a sweep: what reconstruction changes, over settings, and what of it is seed noise.

    python extras/table.py runs/sweep-tiny/*/*      # evaluated runs, as run_sweep.sh leaves them

Each line is the mean +- standard deviation over settings (each the mean of its seeds) of what the
reconstruction at the prompt's last token changes, in percentage points, on rows that need a tool:
exact calls, and the paper's tool correctness. The published columns are computed from the 47
published rows (one of the 48 is missing).

A difference says something only beside what seeds alone do. With several seeds a setting (SEEDS="0
1 2" bash run_sweep.sh), each factor's largest difference between two levels is divided by the
standard error that seed noise alone gives it: z. Of two levels without any effect it is about 0.8,
of three 1.2: below 2 there is nothing to explain.
"""

import argparse
import statistics as st
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfc import cli, read_metrics

COLUMNS = {"exact A": ("A", "exact"), "exact B": ("B", "exact"), "tool A": ("A", "paper_tool"),
           "tool B": ("B", "paper_tool")}
PUBLISHED = {  # change of tool correctness: mean and sd over settings, into A and into B
    "all": (31.2, 9.7, 6.7, 4.9), "DFC": (30.6, 9.5, 5.9, 4.4),
    "crosscoder": (32.9, 10.6, 8.9, 5.9),
    "k 1": (31.1, 8.4, 7.6, 5.7), "k 2": (29.5, 8.1, 7.2, 5.3), "k 3": (32.9, 12.3, 5.2, 3.4),
    "dict 1": (32.5, 11.4, 6.2, 5.1), "dict 2": (29.8, 7.7, 7.1, 4.8),
    "excl 3": (27.5, 5.5, 6.0, 2.3), "excl 5": (30.3, 9.3, 4.4, 3.1),
    "excl 10": (34.2, 12.4, 7.4, 6.6), "DFC penalised": (28.3, 7.1, 6.1, 4.6),
    "DFC free": (32.7, 11.1, 5.7, 4.3), "crosscoder L1": (34.8, 7.8, 6.3, 4.4),
    "crosscoder no L1": (31.0, 13.4, 11.5, 6.4)}
SAME = "model_a", "model_b", "tool_texts", "recipe", "layer", "steps", "batch", "n_texts"

def read(folders):
    """[{name, config, n, column: change}] of the evaluated runs among some folders, and how many
    are not there yet. Raises ValueError for runs that do not belong into one table."""
    rows, waiting = [], 0
    for folder in (f for f in map(Path, folders) if f.name != "cache"):
        m = read_metrics(folder) if (folder / "metrics.json").exists() else {}
        if "evaluation" not in m:
            waiting += 1
            continue
        clean, after = ({ab: versions[name]["needs"] for ab, versions in m["evaluation"][
            "models"].items()} for name in ("clean", "reconstruction"))
        rows.append({"name": folder.name, "config": m["config"], "n": clean["A"]["n"]} | {
            column: after[ab][score]["pct"] - clean[ab][score]["pct"]
            for column, (ab, score) in COLUMNS.items()})
    if not rows:
        raise ValueError("no evaluated run: bash run_sweep.sh")
    for key in SAME:
        if len({row["config"][key] for row in rows}) > 1:
            raise ValueError(f"these runs differ in {key}: make a table of each")
    if len({row["n"] for row in rows}) > 1:
        raise ValueError("these runs were not evaluated on the same rows: eval_toolcall.py --rows")
    return rows, waiting

def lines_of(rows):
    """{line of the table: its rows}, in the paper's order; the smallest k and dictionary beside the
    published smallest."""
    out, order = {}, list(PUBLISHED)
    for row in rows:
        c = row["config"]
        names = ["all", "DFC", f"excl {100 * c['excl']:.0f}",
                 f"DFC {'penalised' if c['l1_excl'] else 'free'}"]
        if not c["excl"]:
            names = ["all", "crosscoder", f"crosscoder {'L1' if c['l1_shared'] else 'no L1'}"]
        for key, published in (("k", 3), ("dict", 2)):
            values = sorted({r["config"][key] for r in rows})
            rank = f" {values.index(c[key]) + 1}" if len(values) == published else ""
            names.append(f"{key}{rank} ({c[key]})")
        for name in names:
            out.setdefault(name, []).append(row)
    place = {name: order.index(head) if (head := name.split(" (")[0]) in order else len(order)
             for name in out}
    return {name: out[name] for name in sorted(out, key=place.get)}

def by_setting(rows, column):
    """[[a setting's values over seeds]]."""
    names = dict.fromkeys(row["name"] for row in rows)
    return [[row[column] for row in rows if row["name"] == name] for name in names]

def print_table(rows):
    print(f"{'change, pp':18s}{'n':>3s}" + "".join(f"{c:>15s}" for c in COLUMNS)
          + "   paper: tool A, tool B")
    for name, some in lines_of(rows).items():
        means, beside = [[st.mean(seeds) for seeds in by_setting(some, c)] for c in COLUMNS], ""
        if p := PUBLISHED.get(name.split(" (")[0]):
            beside = "   {:+.1f} ± {:.1f}, {:+.1f} ± {:.1f}".format(*p)
        print(f"{name:18s}{len(means[0]):3d}" + "".join(
            f"{f'{st.mean(v):+.1f} ± {st.pstdev(v) if len(v) < 2 else st.stdev(v):.1f}':>15s}"
            for v in means) + beside)

def print_noise(rows):
    """Seed noise, and each factor's largest difference between levels in units of it."""
    noise = [[v for v in by_setting(rows, column) if len(v) > 1] for column in COLUMNS]
    if not noise[0]:
        return print("one seed a setting: SEEDS=\"0 1 2\" bash run_sweep.sh shows what is noise")
    sd = [st.mean(map(st.variance, some)) ** .5 for some in noise]
    print(f"{'seed noise, sd':21s}" + "".join(f"{s:15.1f}" for s in sd)
          + f"   within a setting, over {len(noise[0])} settings")
    lines = lines_of(rows)
    factors = {key: [n for n in lines if n.startswith(key + " ")] for key in ("k", "dict", "excl")}
    factors |= {"DFC - crosscoder": ["DFC", "crosscoder"],
                "free - penalised": ["DFC free", "DFC penalised"]}
    print("\nlargest difference between two levels (z)")
    for factor, names in factors.items():
        levels = [lines[name] for name in names if name in lines]
        if len(levels) > 1:
            print(f"{factor:21s}" + "".join(f"{difference(levels, column, s):>15s}"
                                            for column, s in zip(COLUMNS, sd)))

def difference(levels, column, sd):
    """The largest difference of the levels' means, with its z."""
    values = [by_setting(rows, column) for rows in levels]
    ends = sorted((st.mean(map(st.mean, v)), sum(1 / len(x) for x in v) / len(v) ** 2)
                  for v in values)
    (low, var_low), (high, var_high) = ends[0], ends[-1]
    error = sd * (var_low + var_high) ** .5 or float("nan")
    return f"{high - low:.1f} ({(high - low) / error:.1f})"

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", help="run folders of dfc.py, evaluated by eval_toolcall.py")
    rows, waiting = read(p.parse_args(argv).runs)
    print(f"{len(rows)} runs, {rows[0]['n']} test rows that need a tool; {waiting} more are not "
          "finished or not evaluated\n")
    print_table(rows)
    print_noise(rows)

if __name__ == "__main__":
    sys.exit(cli(main))
