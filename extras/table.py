"""The tables of a sweep: what reconstruction changes, over settings, and what of it is seed noise.

    python extras/table.py runs/sweep-tiny/*/*        # run folders; unfinished ones are counted
    python extras/table.py rows.jsonl                 # rows in the form below, from anywhere
    python extras/table.py runs/sweep-tiny/*/* --rows rows.jsonl       # keep them, one line a run

A row is flat, with the authors' names where they have one, in percent: name, hyperparameters,
tool_correctness_A_pre, _post, _delta (the paper's rubric: before, after, change), the same for B,
format_accuracy_*, overall_score_*; and ours: exact_*, seed, fve_A, fve_B, n. Pre is the clean
model, post the model patched with the reconstruction, on rows that need a tool.

Each line of the table is mean +- standard deviation over settings (each the mean of its seeds). The
published columns are computed from the 47 published rows (one of the 48 is missing).
"""

import argparse
import json
import statistics as st
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfc import Problem, cli, write  # noqa: E402
from eval_toolcall import RowError, read_jsonl, read_metrics  # noqa: E402

OURS = {"tool_correctness": "paper_tool", "format_accuracy": "paper_format",
        "overall_score": "paper_overall", "exact": "exact"}
PUBLISHED = {  # change of tool correctness: mean and sd over settings, into A and into B
    "all": (31.2, 9.7, 6.7, 4.9), "DFC": (30.6, 9.5, 5.9, 4.4),
    "crosscoder": (32.9, 10.6, 8.9, 5.9),
    "k 1": (31.1, 8.4, 7.6, 5.7), "k 2": (29.5, 8.1, 7.2, 5.3), "k 3": (32.9, 12.3, 5.2, 3.4),
    "dict 1": (32.5, 11.4, 6.2, 5.1), "dict 2": (29.8, 7.7, 7.1, 4.8),
    "excl 3": (27.5, 5.5, 6.0, 2.3), "excl 5": (30.3, 9.3, 4.4, 3.1),
    "excl 10": (34.2, 12.4, 7.4, 6.6), "DFC penalised": (28.3, 7.1, 6.1, 4.6),
    "DFC free": (32.7, 11.1, 5.7, 4.3), "crosscoder L1": (34.8, 7.8, 6.3, 4.4),
    "crosscoder no L1": (31.0, 13.4, 11.5, 6.4)}
COLUMNS = ("exact_A", "exact_B", "tool_correctness_A", "tool_correctness_B")


def row_of(folder):
    """The flat row of an evaluated run; None if it is not whole."""
    m = read_metrics(folder)
    if "evaluation" not in m or "config" not in m:
        return None
    c, e = m["config"], m["evaluation"]
    row = {"name": folder.name, "seed": c["seed"], "hyperparameters": {
               k: c[k] for k in ("dict", "k", "excl", "excl_b", "l1_shared", "l1_excl")},
           "pair": [c["model_a"], c["model_b"]],
           "recipe": [c[k] for k in ("recipe", "layer", "steps", "batch", "n_texts")],
           "fve_A": m["fve"]["A"], "fve_B": m["fve"]["B"]}
    for model, versions in e["models"].items():
        pre, post = (versions[v]["totals"].get("needs", {}) for v in ("clean", "reconstruction"))
        row["n"] = pre.get("n", 0)
        for name, key in OURS.items():
            if key in pre:
                a, b = (t[key].get("pct", t[key].get("mean")) for t in (pre, post))
                row |= {f"{name}_{model}_pre": a, f"{name}_{model}_post": b,
                        f"{name}_{model}_delta": b - a}
    return row


def read(names):
    """(rows, how many folders are not whole) of run folders and .jsonl files. Raises Problem."""
    rows, waiting = [], 0
    for name in map(Path, names):
        if name.suffix == ".jsonl":
            rows += [row for _, row in read_jsonl(name)]
        elif name.is_dir() and name.name != "cache":
            row = row_of(name)
            rows += [row] if row else []
            waiting += row is None
        elif not name.is_dir() and name.name != "tables.txt":
            raise Problem(f"no run folder and no .jsonl file: {name}")
    for key, what in (("pair", "models"), ("recipe", "recipes, layers, steps or texts")):
        if len({json.dumps(r.get(key)) for r in rows}) > 1:
            raise Problem(f"these runs are of different {what}: make a table of each")
    if not rows:
        raise Problem("no finished run to make a table of")
    return rows, waiting


def groups(rows):
    """{line of the table: its rows}, in the paper's order."""
    h = [r["hyperparameters"] for r in rows]
    plain, out = [not x["excl"] for x in h], {"all": rows}
    def some(name, keep):
        picked = [r for r, yes in zip(rows, keep) if yes]
        if picked:
            out[name] = picked
    some("DFC", [not p for p in plain])
    some("crosscoder", plain)
    for key, published in (("k", 3), ("dict", 2)):
        values = sorted({x[key] for x in h})
        for i, value in enumerate(values, 1):  # the smallest, ... beside the published smallest
            rank = f" {i}" if len(values) == published else ""
            some(f"{key}{rank} ({value})", [x[key] == value for x in h])
    for share in sorted({x["excl"] for x in h} - {0}):
        some(f"excl {100 * share:.0f}", [x["excl"] == share for x in h])
    some("DFC penalised", [not p and x["l1_excl"] > 0 for p, x in zip(plain, h)])
    some("DFC free", [not p and x["l1_excl"] == 0 for p, x in zip(plain, h)])
    some("crosscoder L1", [p and x["l1_shared"] > 0 for p, x in zip(plain, h)])
    some("crosscoder no L1", [p and x["l1_shared"] == 0 for p, x in zip(plain, h)])
    return out


def by_setting(rows, column):
    """{setting: its values over seeds}; rows without the column are left out."""
    out = {}
    for r in rows:
        if f"{column}_delta" in r:
            out.setdefault(r["name"], []).append(r[f"{column}_delta"])
    return out


def spread(values):
    return f"{st.mean(values):+.1f} ± {st.stdev(values) if len(values) > 1 else 0:.1f}"


def print_tables(rows):
    """Mean ± sd over settings, the published figures beside; then the seed noise."""
    print(f"{'change, pp':18s}{'n':>3s}" + "".join(f"{c:>15s}" for c in (
        "exact A", "exact B", "tool A", "tool B")) + "   paper: tool A, tool B")
    for name, some in groups(rows).items():
        cells = [[st.mean(v) for v in by_setting(some, c).values()] for c in COLUMNS]
        shown = "".join(f"{spread(v) if v else '-':>15s}" for v in cells)
        p = PUBLISHED.get(name.split(" (")[0])
        beside = f"   {p[0]:+.1f} ± {p[1]:.1f}, {p[2]:+.1f} ± {p[3]:.1f}" if p else ""
        print(f"{name:18s}{max(map(len, cells)):3d}{shown}{beside}")
    noise = [[v for v in by_setting(rows, c).values() if len(v) > 1] for c in COLUMNS]
    if any(noise):
        sd = [st.mean(st.variance(v) for v in some) ** .5 if some else 0. for some in noise]
        print(f"{'seed noise, sd':21s}" + "".join(f"{s:15.1f}" for s in sd)
              + f"   within a setting, {max(map(len, noise))} settings with several seeds")
        print_effects(rows, sd)


def print_effects(rows, sd):
    """Each factor's largest difference between levels, in standard errors that seeds alone give.
    (Of three levels without any effect the largest difference is about 1.2 of them.)"""
    lines = groups(rows)
    factors = {"DFC - crosscoder": ["DFC", "crosscoder"], "free - penalised": [
        "DFC free", "DFC penalised"]} | {f: [n for n in lines if n.startswith(f + " ")]
                                         for f in ("k", "dict", "excl")}
    print(f"\n{'largest difference (z)':21s}   z = difference / what seeds alone would give it")
    for factor, names in factors.items():
        if len(names) < 2 or not all(n in lines for n in names):
            continue
        shown = f"{factor:21s}"
        for column, noise in zip(COLUMNS, sd):
            levels = [list(by_setting(lines[n], column).values()) for n in names]
            means = sorted((st.mean(map(st.mean, v)), error(v, noise)) for v in levels if v)
            if not noise or len(means) < 2:
                shown += f"{'-':>15s}"
                continue
            (low, e_low), (high, e_high) = means[0], means[-1]
            z = (high - low) / (e_low ** 2 + e_high ** 2) ** .5
            shown += f"{f'{high - low:.1f} ({z:.1f})':>15s}"
        print(shown)


def error(settings, noise):
    """Standard error that seed noise alone gives the mean of some settings, [values over seeds]."""
    return noise / len(settings) * sum(1 / len(v) for v in settings) ** .5


def main(argv=None):
    p = argparse.ArgumentParser(prog="table.py", description=__doc__.split("\n")[0])
    p.print_usage = lambda *_: None  # an error is one line
    p.add_argument("runs", nargs="+", help="run folders of dfc.py, evaluated; or .jsonl of rows")
    p.add_argument("--rows", type=Path, metavar="FILE", help="write the rows there as JSONL")
    args = p.parse_args(argv)
    try:
        rows, waiting = read(args.runs)
    except RowError as e:
        raise Problem(str(e)) from None
    if args.rows:
        write(args.rows, lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in rows)))
    print(f"{len(rows)} runs, {waiting} not finished or not evaluated\n")
    print_tables(rows)


if __name__ == "__main__":
    sys.exit(cli(main))
