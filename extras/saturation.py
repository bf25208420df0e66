"""How many latents does it take? Take the first n away, or copy them into B, on many seeds.

The first n latents of a part are those that separate prompts best by Cohen's d on dev rows, of
those that are larger where a tool is needed: A-exclusive ones, in a plain crosscoder all. At the
prompt's last token

    taken away    A loses what they write                          how many calls are left?
    as in A       c times that is added to B, c chosen on dev      how many calls appear?

each beside what n latents drawn from the same part write, be it nothing, and beside one random
direction, on each prompt as long as what the first n write. One dictionary is one draw of a
lottery: hence many seeds, a thin line each in the picture.

    python extras/saturation.py                     # the newest run: a minute on 2 CPU cores
    python extras/saturation.py --all runs/many --seeds 10 11      # trains every kind below as well

What is done is not done again: stop it anywhere. Two processes, each with seeds of its own, divide
the work.
"""

import argparse
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dfc
from eval_toolcall import at_least_one, open_run, save_result
from steer import (
    Prompts,
    best_strength,
    cohens_d,
    outcomes_in,
    random_units,
    read_prompts,
    written,
)

SIZES = (1, 2, 3, 5, 10, 20, 40)
KINDS = {  # name: how dfc.py trains it
    "preset": "",
    "plain": "--excl 0",
    "untied": "--no-tie-shared",
    "with a B part": "--excl-b .1",
    "as published": "--recipe paper",
    "1,024, k 16": "--dict 1024 --k 16",
    "8,192, k 45": "--dict 8192 --k 45",
}


# ---- 1. What all dictionaries of a pair share ----------------------------------------------------
@dataclass
class Scene:
    """Prompts and clean answers. All of it is the same for every dictionary but the prompts' f_NL,
    which saturate() replaces."""

    dev: Prompts      # for the ranking
    few_dev: Prompts  # for strengths
    report: Prompts   # for results: dev or test rows
    clean: dict       # before: {"A", "B": {"exact", "false_calls"}}, percent of these


def make_scene(run, split, most_rows):
    """The scene of a run's pair and layer."""
    report = read_prompts(run, split, most_rows)
    nothing = {"clean": torch.zeros_like(report.x_NMD[:, 0])}
    clean = {m: measure(run, m, report, nothing)["clean"] for m in "AB"}
    return Scene(read_prompts(run, "dev"), read_prompts(run, "dev", 12), report, clean)


def measure(run, m, prompts, versions):
    """{name: what is added to model m, (N, D)} -> {name: {"exact", "false_calls"} in percent}."""
    out = {}
    found = outcomes_in(run, m, prompts, torch.stack(list(versions.values())))
    for name, outcome in zip(versions, found):
        exact = 100 * float(np.mean(outcome.exact))
        out[name] = {"exact": exact, "false_calls": outcome.false_calls}
    return out


# ---- 2. One dictionary ---------------------------------------------------------------------------
def saturate(run, scene):
    """What metrics.json keeps of one dictionary."""
    cc = run.cc
    dev, few_dev, report = (replace(prompts, f_NL=cc.encode(prompts.x_NMD))
                            for prompts in (scene.dev, scene.few_dev, scene.report))

    # the order of A's latents, or of the shared ones where A has none
    d_L = cohens_d(dev.f_NL[dev.needs_N], dev.f_NL[~dev.needs_N])
    part = list(range(cc.n_a) or range(cc.n_b, len(d_L)))
    order = sorted((latent for latent in part if d_L[latent] > 0), key=lambda latent: -d_L[latent])

    sizes = []
    for n in SIZES:
        if n > len(order):
            break
        latents = order[:n]
        drawn = np.random.default_rng(n).choice(part, n, replace=False).tolist()
        own_ND = written(cc, report.f_NL, latents)
        random_ND = own_ND.norm(dim=1, keepdim=True) * random_units(1, cc.mean[0])
        adds = {"latents": own_ND, "drawn": written(cc, report.f_NL, drawn), "random": random_ND}

        c = best_strength(run, "B", few_dev, written(cc, few_dev.f_NL, latents), (.5, 1, 2, 4))
        removed = measure(run, "A", report, {name: -v_ND for name, v_ND in adds.items()})
        copied = measure(run, "B", report, {name: c * v_ND for name, v_ND in adds.items()})
        sizes.append({"n": n, "latents": latents, "c": c, "taken away": removed, "as in A": copied})
    return {"sizes": sizes, "clean": scene.clean, "rows": int(report.needs_N.sum())}


# ---- 3. Many dictionaries, and the table ---------------------------------------------------------
def train_all(kinds, seeds, where, options):
    """Train what is missing of these kinds and seeds, with these options of dfc.py, and yield each
    folder when it is there. Raises ValueError where one holds another run."""
    for seed in seeds:
        for kind in kinds:
            folder = Path(where, f"{kind.replace(',', '').replace(' ', '-')}-seed{seed}")
            asked = f"{options} {KINDS[kind]} --seed {seed}".split()
            dfc.main([*asked, "--out", str(folder)])
            yield folder


def print_table(results, intervention, added, figure):
    """A line for each kind of dictionary: mean (range) over seeds, for each n; [how many have so
    many latents], where not all."""
    print(f"\n{intervention}, {added}: {figure}, %, mean (range) over seeds\n{'':14s}{'seeds':>6s}"
          + "".join(f"{f'n = {n}':>16s}" for n in SIZES))
    for kind in dict.fromkeys(kind for kind, _ in results):
        runs = [result["sizes"] for own, result in results if own == kind]
        cells = ""
        for n in SIZES:
            values = [size[intervention][added][figure]
                      for sizes in runs for size in sizes if size["n"] == n]
            cell = f"{np.mean(values):.0f} ({min(values):.0f}-{max(values):.0f})" if values else "-"
            if 0 < len(values) < len(runs):
                cell += f" [{len(values)}]"
            cells += f"{cell:>16s}"
        print(f"{kind:14s}{len(runs):6d}{cells}")


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    p.add_argument("--all", metavar="FOLDER", help="train dictionaries into this folder, first")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of --all (all)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --all (0)")
    p.add_argument("--options", default="", help="of dfc.py, for all of them: '--preset smol'")
    p.add_argument("--split", choices=["dev", "test"], default="test",
                   help="rows to report (test); latents and strengths are chosen on dev")
    p.add_argument("--rows", type=at_least_one, default=20, help="of each kind (20)")
    args = p.parse_args(argv)
    if args.all and args.runs:
        p.error("either run folders or --all")
    if not args.all and (args.options or args.seeds != [0] or args.kinds != list(KINDS)):
        p.error("--kinds, --seeds and --options go with --all")
    folders = args.runs or [None]
    total = len(folders)
    if args.all:
        folders = train_all(args.kinds, args.seeds, args.all, args.options)
        total = len(args.kinds) * len(args.seeds)

    load_model = cache(dfc.load_model)
    pair = None
    scene = None
    results = []
    key = f"saturation_{args.split}"
    for folder in tqdm(folders, "dictionaries", total, disable=None):
        run = open_run(folder, load_model)
        s = run.settings
        own_pair = s.model_a, s.model_b, s.tool_texts, s.layer, s.max_new
        pair = pair or own_pair
        if own_pair != pair:
            raise ValueError(f"{run.folder} has other models, rows, layer or --max-new than the "
                             "first: make a table of each")

        result = dfc.read_metrics(run.folder).get(key, {})
        if result.get("asked") != args.rows:
            scene = scene or make_scene(run, args.split, args.rows)
            result = {**saturate(run, scene), "asked": args.rows}
            save_result(run.folder, key, result, result["sizes"], f"{key}.jsonl")
        kind = re.sub(r"-seed\d+", "", run.folder.name)
        results.append((kind, result))

    clean = result["clean"]["A"]
    print(f"\n{result['rows']} {args.split} rows that need a tool: A as it is answers "
          f"{clean['exact']:.0f} % exactly; false calls elsewhere {clean['false_calls']:.0f} %")
    for intervention in ("taken away", "as in A"):
        for added, figure in (("latents", "exact"), ("latents", "false_calls"), ("drawn", "exact"),
                              ("random", "exact")):
            print_table(results, intervention, added, figure)


if __name__ == "__main__":
    dfc.leave(dfc.cli(main))
