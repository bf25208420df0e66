"""How many latents does it take? Ablate the first n, or copy them into B, on many seeds.

The first n latents are those that separate dev prompts best by Cohen's d and are larger where a
tool is needed. They are A-exclusive; of a plain crosscoder, shared. At the prompt's last token

    ablated          what they write is subtracted from A: how many exact calls remain?
    copied into B    c times what they write into A is added to B: how many exact calls appear?
                     (c is chosen on dev prompts.)

Both stand beside two controls: n latents drawn at random from the same partition, active or not;
and a random direction, on each prompt as long as what the first n write. The dictionary's seed
matters. So a figure is read over many seeds.

    python extras/saturation.py                     # the newest run: a minute on 2 CPU cores
    python extras/saturation.py --all runs/many --seeds 10 11      # also trains every kind below

Finished runs are skipped, so it can be stopped anywhere. Under `torchrun --nproc-per-node 4` the
processes share the work; the command without torchrun then prints all.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
import dfc
from eval_toolcall import at_least_one, open_run, save_result
from steer import Prompts, best_latents, best_strength, outcomes, rank, read_prompts, written

SIZES = (1, 2, 3, 5, 10, 20, 40)
KINDS = {  # name: how dfc.py trains it
    "preset": "",
    "plain": "--excl 0",
    "untied": "--no-tie-shared",
    "with B-exclusive": "--excl-b .1",
    "as published": "--recipe paper",
    "1,024, k 16": "--dict 1024 --k 16",
    "8,192, k 45": "--dict 8192 --k 45",
}
COLUMNS = (  # of what is added a column of the tables
    ("latents", "exact"),
    ("latents", "false_calls"),
    ("drawn", "exact"),
    ("random", "exact"),
)


# ---- 1. What all dictionaries of a pair share ----------------------------------------------------
@dataclass
class Scene:
    """Prompts and clean answers. They are the same for every dictionary, except the prompts' f_NL,
    which saturate() replaces."""

    dev: Prompts      # for the ranking
    few_dev: Prompts  # for c
    report: Prompts   # for results: dev or test rows
    clean: dict       # {"A", "B": {"exact", "false_calls"}} in percent of these


def make_scene(run, split, most_rows):
    """The scene of a run's pair and layer."""
    report = read_prompts(run, split, most_rows)
    nothing = {"clean": torch.zeros_like(report.x_NMD[:, 0])}
    clean = {m: measure(run, m, report, nothing)["clean"] for m in "AB"}
    return Scene(read_prompts(run, "dev"), read_prompts(run, "dev", 12), report, clean)


def measure(run, m, prompts, versions):
    """{name: what is added to model m, (N, D)} -> {name: {"exact", "false_calls"} in percent}."""
    out = {}
    found = outcomes(run, m, prompts, torch.stack(list(versions.values())))
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

    # the latents in order, and the partition that they are of
    name = "A-exclusive" if cc.n_a else "shared"
    order = best_latents(rank(run, dev, "prompts"), name)
    latents_of = {part.name: part.latents for part in cc.partitions()}
    every = range(len(cc.b_enc))[latents_of[name]]

    # a random direction, always the same
    rng = torch.Generator().manual_seed(0)
    random_1D = F.normalize(torch.randn(1, len(cc.mean[0]), generator=rng), dim=1).to(cc.mean)

    sizes = []
    for n in SIZES:
        if n > len(order):
            break
        latents = order[:n]
        drawn = np.random.default_rng(n).choice(every, n, replace=False).tolist()

        own_ND = written(cc, report.f_NL, latents)
        added = {
            "latents": own_ND,
            "drawn": written(cc, report.f_NL, drawn),
            "random": own_ND.norm(dim=1, keepdim=True) * random_1D,
        }
        c = best_strength(run, "B", few_dev, written(cc, few_dev.f_NL, latents), (.5, 1, 2, 4))
        ablated = measure(run, "A", report, {name: -v_ND for name, v_ND in added.items()})
        copied = measure(run, "B", report, {name: c * v_ND for name, v_ND in added.items()})
        sizes.append({"n": n, "latents": latents, "c": c, "ablated": ablated,
                      "copied into B": copied})
    return {"sizes": sizes, "clean": scene.clean, "rows": int(report.needs_N.sum())}


# ---- 3. Many dictionaries, and the tables --------------------------------------------------------
def train_all(kinds, seeds, where, options):
    """Train these kinds and seeds with these options of dfc.py, unless they are there, and yield
    each folder. Under torchrun each process takes its share. Raises ValueError if a folder holds
    another run."""
    rank = int(os.getenv("RANK", "0"))
    world = int(os.getenv("WORLD_SIZE", "1"))
    for seed, kind in list(product(seeds, kinds))[rank::world]:
        folder = Path(where, f"{kind.replace(',', '').replace(' ', '-')}-seed{seed}")
        given = f"{options} {KINDS[kind]} --seed {seed}".split()
        dfc.main([*given, "--out", str(folder)])
        yield folder


def kind_of(folder):
    """A folder's name without its seed: "preset" of preset-seed10."""
    return re.sub(r"-seed\d+", "", folder.name)


def print_table(results, change, added, score):
    """A line for each kind of dictionary: mean (range) over seeds, for each n; [how many have n
    latents], if not all. results: (kind, what saturate() returns) of each run."""
    print(f"\n{change}, {added}: {score}, %, mean (range) over seeds\n{'':17s}{'seeds':>6s}"
          + "".join(f"{f'n = {n}':>16s}" for n in SIZES))
    for kind in dict.fromkeys(kind for kind, _ in results):
        runs = [result["sizes"] for own, result in results if own == kind]
        cells = ""
        for n in SIZES:
            values = [size[change][added][score]
                      for sizes in runs for size in sizes if size["n"] == n]
            cell = f"{np.mean(values):.0f} ({min(values):.0f}-{max(values):.0f})" if values else "-"
            if 0 < len(values) < len(runs):
                cell += f" [{len(values)}]"
            cells += f"{cell:>16s}"
        print(f"{kind:17s}{len(runs):6d}{cells}")


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    p.add_argument("--all", metavar="FOLDER", help="first train dictionaries into this folder")
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

    get = cache(dfc.load_model)
    pair = None
    scene = None
    results = []
    key = f"saturation_{args.split}"
    for folder in tqdm(folders, "dictionaries", total, disable=None):
        run = open_run(folder, get)
        s = run.settings
        own_pair = s.model_a, s.model_b, s.tool_texts, s.layer, s.max_new
        pair = pair or own_pair
        if own_pair != pair:
            raise ValueError(f"{run.folder} has other models, rows, layer or --max-new than the "
                             "first: make a table of each")

        # what is there is not done again
        result = dfc.read_metrics(run.folder).get(key, {})
        files = dfc.fingerprint("", s)
        if (result.get("most_rows"), result.get("files")) != (args.rows, files):
            scene = scene or make_scene(run, args.split, args.rows)
            result = {**saturate(run, scene), "most_rows": args.rows, "files": files}
            save_result(run.folder, key, result, result["sizes"], f"{key}.jsonl")
        results.append((kind_of(run.folder), result))

    clean = result["clean"]["A"]
    print(f"\n{result['rows']} {args.split} prompts need a tool; clean A: {clean['exact']:.0f} % "
          f"exact calls, and {clean['false_calls']:.0f} % false calls on the other prompts")
    for change in ("ablated", "copied into B"):
        for added, score in COLUMNS:
            print_table(results, change, added, score)


if __name__ == "__main__":
    raise SystemExit(dfc.cli(main))
