"""Watch reinforcement learning add it: the tool latent along the RL run.

snapshots/, beside model B, holds A at some steps of its RL run; the final crosscoder, a fixed
dictionary, reads each beside the same base. For the best A-exclusive latent (on dev) and, as a
control, the next one:

    exact, false     exact calls where a tool is needed, false calls where none is, % of test rows
    |A-B|, cos       at the prompt's last token, and its cosine with the latent's decoder row
    value, AUROC     of the latent there, mean where a tool is needed and where none is; writes: w
    down, up, into B taken away from A, times --alpha, its dev maximum c added to B: change of
                     exact (of ten random directions; *: beyond them and 0), false calls

Does it come before the behaviour, or after? When could each claim be made? Is it a distance to a
threshold: does a model call once it is pushed further from B than some theta, whatever pushes?
theta is read off the behaviour alone, |A-B| where exact calls pass half of the most they reach.
Then lengths say where to expect a claim, printed beside where it is measured (interval beyond 0):

    down   |A-B| - w < theta < |A-B|        it calls, and would not without the latent
    up     |A-B| < theta < |A-B| + (alpha - 1) w           into B   theta < c

    python extras/birth.py                  # the newest run: two minutes on 2 CPU cores

Shapes as in dfc.py: N prompts, P those that need a tool, Q the others, M = 2 models, D width, L
latents, V versions of an answer.
"""

import argparse
import copy
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfc import cli, leave
from eval_toolcall import at_least_one, open_run, save_result
from steer import (
    auroc,
    best_latents,
    clean_outcomes,
    compare,
    delta,
    measure,
    random_units,
    read_prompts,
    survey_latents,
    with_controls,
)


@dataclass
class Reading:
    """One latent at one step of the RL run."""

    latent: int
    claims: dict   # {"down" | "up" | "into B": Claim}
    value: dict    # its mean on test prompts: {"needs", "none"}
    auroc: float   # between these two
    cosine: float  # of A - B with its decoder row, where a tool is needed
    writes: float  # w, the length it writes there
    most: float    # c, the length written by its maximum on dev prompts


@dataclass
class Step:
    """A step of the RL run."""

    step: int
    exact: float        # of A on test prompts, in percent
    false_calls: float
    length: float       # |A - B| at prompts that need a tool
    rows: int           # how many these are
    latents: list       # a Reading each


# ---- 1. One snapshot -----------------------------------------------------------------------------

def read_step(run, file, latents, alpha, most_rows):
    """The Step that a snapshot holds. run: with whatever A, which the snapshot's replaces."""
    # A as it was: the base and what is saved, differences in half precision
    model = copy.deepcopy(run.models["B"])
    for name, difference in load_file(file).items():
        model.get_parameter(name).data += difference.to(model.device)
    run = replace(run, models={"A": model, "B": run.models["B"]})

    # what both models answer
    dev = read_prompts(run, "dev", 30)
    test = read_prompts(run, "test", most_rows)
    clean = clean_outcomes(run, test)

    # how far apart they are
    apart_PD = (test.x_NMD[:, 0] - test.x_NMD[:, 1])[test.needs_N]

    return Step(
        step=int(file.stem.removeprefix("step")),
        exact=100 * np.mean(clean["A"].exact),
        false_calls=clean["A"].false_calls,
        length=apart_PD.norm(dim=1).mean().item(),
        rows=len(apart_PD),
        latents=[read_latent(run, dev, test, clean, apart_PD, latent, alpha) for latent in latents],
    )


def read_latent(run, dev, test, clean, apart_PD, latent, alpha):
    """One latent's Reading. clean: {"A", "B": the Outcome as it is}; apart_PD: A - B."""
    row_D = run.cc.W_dec[latent, 0] * run.cc.scale[0]
    most_D = dev.f_NL[dev.needs_N, latent].max() * row_D
    most_ND = most_D.expand_as(test.x_NMD[:, 0])

    # the three claims, beside random directions
    units = {"random": random_units(10, row_D)}
    down = with_controls("down", "A", "down", delta(run.cc, test.f_NL, [latent], 0), units, -1)
    up = with_controls("up", "A", "up", delta(run.cc, test.f_NL, [latent], alpha), units)
    into_b = with_controls("into B", "B", "into B", most_ND, units)
    claims = {}
    for todo in (down, up, into_b):
        own, controls = measure(run, test, todo)
        claims[todo.kind] = compare(
            todo.kind, todo.text, todo.sign, clean[todo.model], own, controls)

    # its values, and its direction
    needs_P = test.f_NL[test.needs_N, latent]
    none_Q = test.f_NL[~test.needs_N, latent]
    value = {"needs": needs_P.mean().item(), "none": none_Q.mean().item()}
    return Reading(
        latent, claims, value,
        auroc=auroc(needs_P[:, None], none_Q[:, None]).item(),
        cosine=F.cosine_similarity(apart_PD, row_D[None]).mean().item(),
        writes=value["needs"] * row_D.norm().item(),
        most=most_D.norm().item(),
    )


# ---- 2. All of them ------------------------------------------------------------------------------

def find_threshold(steps):
    """theta: the length |A - B| at which exact calls pass half of the most they reach."""
    exact = [0., *(step.exact for step in steps)]
    length = [0., *(step.length for step in steps)]
    most_so_far = np.maximum.accumulate(exact)
    return np.interp(most_so_far[-1] / 2, most_so_far, length)


def measured(claim):
    """Does the whole interval lie on the right side of 0?"""
    return min(claim.sign * claim.effect["lo"], claim.sign * claim.effect["hi"]) > 0


def expected(step, reading, theta, alpha):
    """{claim: do lengths let us expect it of a latent at a step?}"""
    length = step.length
    w = reading.writes
    return {"down": length - w < theta < length,
            "up": length < theta < length + (alpha - 1) * w,
            "into B": theta < reading.most}


def print_steps(steps, i, theta, alpha):
    """The table of the i-th latent; where each claim was measured, and where it is expected."""
    print(f"\nlatent {steps[0].latents[i].latent}, {steps[0].rows} rows that need a tool, theta "
          f"{theta:.1f}")
    readings = [(step, step.latents[i]) for step in steps]

    # its line at each step
    print(" step exact false  |A-B|   cos  value needs none AUROC writes"
          f"{'down':>23s}{'up':>23s}{'into B':>23s}")
    for step, x in readings:
        cells = "".join(f"{claim_cell(claim):>23s}" for claim in x.claims.values())
        print(f"{step.step:5d}{step.exact:6.0f}{step.false_calls:6.0f}{step.length:7.1f}"
              f"{x.cosine:6.2f}{x.value['needs']:13.2f}{x.value['none']:5.2f}{x.auroc:6.2f}"
              f"{x.writes:7.1f}{cells}")

    # its claims
    for kind in ("down", "up", "into B"):
        seen = [step.step for step, x in readings if measured(x.claims[kind])]
        due = [step.step for step, x in readings if expected(step, x, theta, alpha)[kind]]
        print(f"{kind}: measured at steps {seen}, expected at {due}")


def claim_cell(claim):
    pp = [change["pp"] for change in claim.controls["random"]]
    star = "*" if "beyond" in claim.verdict else ""
    random = f"({min(pp):.0f}..{max(pp):.0f})"
    return f"{claim.effect['pp']:+.0f}{star} {random} {claim.false_calls:.0f}%"


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", help="run folder (default: the newest)")
    p.add_argument("--alpha", type=float, default=2., help="strength of up")
    p.add_argument("--rows", type=at_least_one, default=15, help="test rows of each kind")
    args = p.parse_args(argv)

    run = open_run(args.run)
    folder = Path(run.settings.model_b).parent / "snapshots"
    files = list(folder.glob("step*.safetensors"))
    latents = best_latents(survey_latents(run).ranking, "A-exclusive")[:2]
    if not files or not latents:
        raise ValueError(f"{len(files)} snapshots in {folder}, {len(latents)} latents of A")

    steps = [read_step(run, file, latents, args.alpha, args.rows) for file in files]
    steps.sort(key=lambda step: step.step)
    theta = find_threshold(steps)
    print(f"{run.folder}, layer {run.settings.layer}")
    for i in range(len(latents)):
        print_steps(steps, i, theta, args.alpha)
    lines = [asdict(step) for step in steps]
    save_result(run.folder, "birth", {"theta": theta, "alpha": args.alpha, "steps": lines}, lines,
                "birth.jsonl")


if __name__ == "__main__":
    leave(cli(main))
