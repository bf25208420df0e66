"""How many latents, or how much of one direction? Ablate the first n latents, on many seeds.

The first n latents are those that separate dev prompts best by Cohen's d and are larger where a
tool is needed. They are A-exclusive; of a plain crosscoder, shared. What they write is subtracted
from A at the prompt's last token. How many exact calls are left?

That depends on the dictionary's seed and size. So we also measure the *dose*: how much is removed
along one direction u. It is what the first ten latents of a reference dictionary write, the mean
over dev prompts that need a tool minus the mean over the others. Take a reference of another seed,
or a dictionary defines the direction by which it is judged. (The default may be that very run.)

    latents     what the first n write
    along u     the part of it along u
    all but u   the rest of it
    live        as long, along what n other latents of the partition, active on dev prompts, write
    random, A - B, diff of means    as long, along a direction of steer.control_directions()
    d < 0       what all latents of the partition write that are larger where no tool is needed
    all         what all latents of the partition write

Baselines set A's coordinate along a direction to another value, without a dictionary (but for u):

    A - B           the mean of A minus that of B, where a tool is needed; set to B's value
    2 components    the first two principal components of A - B there; set to B's values
    diff of means   A's mean where a tool is needed minus that elsewhere; set to the latter
    u               set to B's value
    B's vector      every coordinate is set to B's value
    u x 1           the mean of A - B along u, where a tool is needed, is subtracted everywhere

    python dfc.py; python extras/saturation.py          # the newest run: half a minute
    python extras/saturation.py --all runs/many --seeds 10 11 --samples 5    # every kind below

--all trains what is missing, and finished runs are skipped, so it can be stopped anywhere. Under
`torchrun --nproc-per-node 4` the processes share the work; the command without it prints all.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
import dfc
from eval_toolcall import at_least_one, open_run, save_result
from steer import (
    Prompts,
    best_latents,
    control_directions,
    difference_of_means,
    outcomes,
    rank_latents,
    read_prompts,
    written,
)

KINDS = {  # name: how dfc.py trains it
    "preset": "",
    "plain": "--excl 0",
    "untied": "--no-tie-shared",
    "with B-exclusive": "--excl-b .1",
    "as published": "--recipe paper",
    "1,024, k 16": "--dict 1024 --k 16",
    "8,192, k 45": "--dict 8192 --k 45"}
CONTROLS = ("along u", "all but u", "live", "random", "A - B", "diff of means")  # greedy only
DOSES = (.25, .4, .5, .6, .75, 1.)                                              # of "u x"
N_BASELINES = 6 + len(DOSES)


class Removal(NamedTuple):
    """What is subtracted from A's vectors."""

    n: int              # how many latents; 0: a whole partition, or a baseline
    name: str           # as above
    v_ND: torch.Tensor  # for each prompt


@dataclass
class Scene:
    """What all dictionaries of a pair share. Of the prompts' f_NL saturate() makes its own."""

    dev: Prompts
    report: Prompts  # dev or test rows
    u_D: torch.Tensor
    lines: list      # what measure() returns of clean A and the baselines


# ---- 1. The direction u and the baselines --------------------------------------------------------
def make_scene(run, reference, split, most_rows):
    """The scene of a run's pair and layer, with u of another run."""
    dev = read_prompts(reference, "dev")
    report = read_prompts(run, split, most_rows)
    first = order_latents(reference.cc, dev)[0][:10]
    first_ND = written(reference.cc, dev.f_NL, first)
    u_D = F.normalize(difference_of_means(first_ND, dev.needs_N), dim=0)
    return Scene(dev, report, u_D, measure(run, report, u_D, baselines(dev, report, u_D)))


def order_latents(cc, dev):
    """Of the A-exclusive partition, or a plain crosscoder's only one: (latents that are larger
    where a tool is needed, best separated first; those that are smaller; all)."""
    name = "A-exclusive" if cc.n_a else "shared"
    ranking = rank_latents(cc, dev.f_NL, dev.needs_N)
    own = [row for row in ranking if row["partition"] == name]
    smaller = [row["feature_idx"] for row in own if row["cohens_d"] < 0]
    return best_latents(ranking, name), smaller, [row["feature_idx"] for row in own]


def baselines(dev, report, u_D):
    """Removals of clean A and the baselines. Directions and means are of dev prompts."""
    a_ND, b_ND = report.x_NMD.unbind(1)
    dev_ND = dev.x_NMD[:, 0]
    gap_ND = (dev_ND - dev.x_NMD[:, 1])[dev.needs_N]
    gap_D = gap_ND.mean(0)
    components_KD = torch.linalg.svd(gap_ND, full_matrices=False).Vh[:2]
    none_D = dev_ND[~dev.needs_N].mean(0)

    def set_to(target_ND, directions_KD):
        """A minus the target, along orthogonal directions."""
        directions_KD = F.normalize(directions_KD)
        return (a_ND - target_ND) @ directions_KD.T @ directions_KD

    removed = {
        "clean": 0 * a_ND,
        "A - B": set_to(b_ND, gap_D[None]),
        "2 components": set_to(b_ND, components_KD),
        "diff of means": set_to(none_D, difference_of_means(dev_ND, dev.needs_N)[None]),
        "u": set_to(b_ND, u_D[None]),
        "B's vector": a_ND - b_ND,
    }
    for dose in DOSES:
        removed[f"u x {dose:g}"] = (dose * (gap_D @ u_D) * u_D).expand_as(a_ND)
    return [Removal(0, name, v_ND) for name, v_ND in removed.items()]


# ---- 2. One dictionary ---------------------------------------------------------------------------
def saturate(run, scene, sizes):
    """The lines of one dictionary."""
    cc = run.cc
    u_D = scene.u_D
    dev, report = (replace(prompts, f_NL=cc.encode(prompts.x_NMD))
                   for prompts in (scene.dev, scene.report))
    order, smaller, every = order_latents(cc, dev)
    live_L = (dev.f_NL > 0).any(0)
    controls = control_directions(cc, dev, [], run.settings.seed)

    removals = [Removal(0, "all", written(cc, report.f_NL, every)),
                Removal(0, "d < 0", written(cc, report.f_NL, smaller))]
    for n in [n for n in sizes if n <= len(order)]:
        # what they write, and its two parts
        own_ND = written(cc, report.f_NL, order[:n])
        along_ND = (own_ND @ u_D)[:, None] * u_D
        removals.append(Removal(n, "latents", own_ND))
        removals.append(Removal(n, "along u", along_ND))
        removals.append(Removal(n, "all but u", own_ND - along_ND))

        # as long, along other directions
        directions = dict(controls)
        others = [latent for latent in every if live_L[latent] and latent not in order[:n]]
        if others:
            drawn = np.random.default_rng(n).permutation(others)[:n].tolist()
            directions["live"] = written(cc, dev.f_NL, drawn).mean(0, keepdim=True)
        length_N1 = own_ND.norm(dim=1, keepdim=True)
        for name, d_UD in directions.items():
            removals.append(Removal(n, name, length_N1 * F.normalize(d_UD[0], dim=0)))

    # the answers; and how many of the first n are active on a prompt that needs a tool
    lines = measure(run, report, u_D, removals)
    for line in lines:
        latents = order[:line["n"]] or every
        f_NS = report.f_NL[report.needs_N][:, latents]
        line["active"] = (f_NS > 0).sum(1).float().mean().item()
    return lines


def is_control(n, name):
    """Does a removal stand beside what the first n write? A baseline (n = 0) may have its name."""
    return n > 0 and name != "latents"


def measure(run, prompts, u_D, removals):
    """For each removal {"n", "name", mean "length" and "along u" where a tool is needed, "greedy"
    and, if run.samples says how many, "sampled": {"exact", "false_calls"}}."""
    lines = []
    for n, name, v_ND in removals:
        needs_ND = v_ND[prompts.needs_N]
        lines.append({"n": n, "name": name, "length": needs_ND.norm(dim=1).mean().item(),
                      "along u": (needs_ND @ u_D).mean().item()})

    for decoding, samples in (("greedy", 0), ("sampled", run.samples)):
        chosen = [i for i, (n, name, _) in enumerate(removals)
                  if decoding == "greedy" or (samples and not is_control(n, name))]
        if chosen:
            v_VND = torch.stack([-removals[i].v_ND for i in chosen])
            found = outcomes(replace(run, samples=samples), "A", prompts, v_VND)
            for i, outcome in zip(chosen, found):
                exact = [round(hit, 3) for hit in outcome.exact]
                lines[i][decoding] = {"exact": exact, "false_calls": outcome.false_calls}
    return lines


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


def two_way(exact_SN):
    """Exact calls of S dictionaries on N prompts -> mean and 95 % bootstrap interval over both, in
    percent."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(1000):
        seeds, prompts = (rng.integers(size, size=size) for size in exact_SN.shape)
        means.append(exact_SN[seeds][:, prompts].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in (exact_SN.mean(), low, high)))


def print_table(title, runs):
    """A line for each n of one kind of dictionary. runs: the lines of each dictionary."""
    print(f"\n{title}\n{'':14s}seeds active length along u   greedy      false  sampled     "
          "false" + "".join(f"{name:>15s}" for name in CONTROLS))
    groups = {}
    for line in chain(*runs):
        groups.setdefault((line["n"], line["name"]), []).append(line)

    for (n, name), lines in groups.items():
        if is_control(n, name):
            continue
        numbers = ""
        for key, form in (("active", "7.1f"), ("length", "7.1f"), ("along u", "8.1f")):
            numbers += format(np.mean([line.get(key, 0) for line in lines]), form)

        # exact calls left and false calls
        for decoding in ("greedy", "sampled"):
            found = [line[decoding] for line in lines if decoding in line]
            cell = ""
            if found:
                exact = two_way(np.array([outcome["exact"] for outcome in found]))
                false_calls = np.mean([outcome["false_calls"] for outcome in found])
                cell = f"{exact:14s}{false_calls:4.0f}"
            numbers += f"   {cell:19s}"
        for control in CONTROLS:
            exact = [line["greedy"]["exact"] for line in groups.get((n, control), [])]
            numbers += f"{100 * np.mean(exact):15.0f}" if n and exact else f"{'':15s}"
        print(f"{f'first {n}' if n else name:14s}{len(lines):5d}{numbers}")


def print_tables(results, split):
    """The baselines, then a table for each kind. results: {kind: the lines of each dictionary}."""
    every = list(chain(*results.values()))
    n = len(every[0][0]["greedy"]["exact"])
    print(f"\nexact calls left, % of {n} {split} prompts that need a tool [95 %, over dictionaries "
          "and prompts]; false calls, % of the others")
    print_table("no dictionary", [every[0][:N_BASELINES]])
    for kind, runs in results.items():
        print_table(kind, [lines[N_BASELINES:] for lines in runs])


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    p.add_argument("--all", metavar="FOLDER", help="first train dictionaries into this folder")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of --all (all)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --all (0)")
    p.add_argument("--options", default="", help="of dfc.py, for all of them: '--preset smol'")
    # what is measured
    p.add_argument("--reference", help="the run that defines u (default: the newest in runs/)")
    p.add_argument("--split", choices=["dev", "test"], default="test",
                   help="rows to report (test); latents are chosen on dev")
    p.add_argument("--rows", type=at_least_one, default=20, help="of each kind (20)")
    p.add_argument("--sizes", type=at_least_one, nargs="+", default=[1, 2, 3, 5, 10, 20, 40],
                   help="numbers of latents, n")
    p.add_argument("--samples", type=at_least_one, default=0, help="also score this many answers a "
                   "prompt, sampled at temperature 1 (0)")
    args = p.parse_args(argv)
    if args.all and args.runs:
        p.error("either run folders or --all")
    folders = args.runs or [None]
    if args.all:
        folders = train_all(args.kinds, args.seeds, args.all, args.options)

    get = cache(dfc.load_model)
    reference = open_run(args.reference, get)
    scene = None
    results = {}
    for folder in tqdm(folders, "dictionaries", disable=None):
        run = replace(open_run(folder, get), samples=args.samples)
        if pair_of(run) != pair_of(reference):
            raise ValueError(f"{run.folder} has other models, rows, layer or --max-new than "
                             f"{reference.folder}: give another --reference")

        # what is there is not done again
        key = f"saturation_{args.split}"
        u_of = reference.cc.W_dec.sum().item()
        what = [args.rows, args.samples, args.sizes, u_of, DOSES, CONTROLS]
        depends_on = dfc.fingerprint(what, run.settings)
        if dfc.read_metrics(run.folder).get(key) != depends_on:
            scene = scene or make_scene(run, reference, args.split, args.rows)
            lines = scene.lines + saturate(run, scene, args.sizes)
            save_result(run.folder, key, depends_on, lines, f"{key}.jsonl")
        lines = list(dfc.read_rows(f"{run.folder}/{key}.jsonl", ()))
        results.setdefault(kind_of(run.folder), []).append(lines)

    if results:  # under torchrun a process may have none
        print_tables(results, args.split)


def pair_of(run):
    """What runs of one table have in common."""
    s = run.settings
    return s.model_a, s.model_b, s.tool_texts, s.layer, s.max_new


if __name__ == "__main__":
    raise SystemExit(dfc.cli(main))
