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
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfc import cli
from eval_toolcall import keep
from steer import as_long, auroc, claim, delta, place, random_units, stage

KINDS = "down", "up", "into B"

def at_step(base, file):
    """A as it was: the base plus what the snapshot holds, differences in half precision."""
    model = copy.deepcopy(base)
    for name, difference in load_file(file).items():
        model.get_parameter(name).data += difference.to(model.device)
    return model

def read(t, p, latent, alpha):
    """One latent at one step, on test prompts p; t is a scene with that A."""
    f_N, row_D = p.f_NL[:, latent], t.cc.W_dec[latent, 0] * t.cc.scale[0]
    most_D = t.dev.f_NL[t.dev.needs, latent].max() * row_D
    cosine_N = F.cosine_similarity(p.x_NMD[p.needs, 0] - p.x_NMD[p.needs, 1], row_D[None])
    added = [delta(t.cc, p.f_NL, [latent], a) for a in (0, alpha)] + [most_D.expand(len(f_N), -1)]
    claims, units = {}, {"random": random_units(10, row_D)}
    for kind, m, v_ND, sign in zip(KINDS, "AAB", added, (-1, 1, 1)):
        claims[kind] = c = claim(t, p, m, kind, kind, v_ND, as_long(v_ND, units, sign), sign)
        c["measured"] = min(sign * c["effect"]["lo"], sign * c["effect"]["hi"]) > 0
        del c["texts"]
    values = f_N[p.needs], f_N[~p.needs]
    return {"latent": latent, "claims": claims, "value": [v.mean().item() for v in values],
            "auroc": auroc(*(v[:, None] for v in values)).item(), "most": most_D.norm().item(),
            "writes": (values[0].mean() * row_D.norm()).item(), "cosine": cosine_N.mean().item()}

def follow(r, file, latents, args):
    """One snapshot: what A does there, and each latent."""
    t = argparse.Namespace(**vars(r) | {"models": r.models | {"A": at_step(r.models["B"], file)}})
    t.dev, p = place(t, "dev", 30), place(t, "test", args.rows)
    length = (p.x_NMD[p.needs, 0] - p.x_NMD[p.needs, 1]).norm(dim=1).mean().item()
    found = [read(t, p, latent, args.alpha) for latent in latents]
    return found[0]["claims"]["down"]["clean"] | {
        "step": int(file.stem[4:]), "length": length, "rows": int(p.needs.sum()), "latents": found}

def expected(s, x, theta, alpha):
    """{claim: do lengths let us expect it?} of one latent at one step."""
    return dict(zip(KINDS, (s["length"] - x["writes"] < theta < s["length"], s["length"] < theta
                            < s["length"] + (alpha - 1) * x["writes"], theta < x["most"])))

def print_steps(steps, i, theta, alpha):
    """The table of the i-th latent; where each claim was measured, and where it is expected."""
    print("\nlatent {}, {} rows that need a tool, theta {:.1f}\n step exact false  |A-B|   cos  "
          "value needs none AUROC writes{:>23s}{:>23s}{:>23s}".format(
              steps[0]["latents"][i]["latent"], steps[0]["rows"], theta, *KINDS))
    for s in steps:
        x = s["latents"][i]
        print("{:5d}{:6.0f}{:6.0f}{:7.1f}{:6.2f}{:13.2f}{:5.2f}{:6.2f}{:7.1f}".format(
            s["step"], s["exact"], s["false_calls"], s["length"], x["cosine"], *x["value"],
            x["auroc"], x["writes"]) + "".join(f"{cell_of(c):>23s}" for c in x["claims"].values()))
    for kind in KINDS:
        seen = [s["step"] for s in steps if s["latents"][i]["claims"][kind]["measured"]]
        print(f"{kind}: measured at steps {seen}, expected at", [
            s["step"] for s in steps if expected(s, s["latents"][i], theta, alpha)[kind]])

def cell_of(c):
    pp, star = [x["pp"] for x in c["controls"]["random"]], "*" * ("beyond" in c["verdict"])
    return f"{c['effect']['pp']:+.0f}{star} ({min(pp):.0f}..{max(pp):.0f}) {c['false_calls']:.0f}%"

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", help="run folder (default: the newest)")
    p.add_argument("--alpha", type=float, default=2., help="strength of up")
    p.add_argument("--rows", type=int, default=15, help="test rows of each kind")
    args = p.parse_args(argv)
    r = stage(args.run, None)
    files = sorted(Path(r.s.model_b).parent.glob("snapshots/step*.safetensors"),
                   key=lambda file: int(file.stem[4:]))
    latents = [row["feature_idx"] for row in r.ranked
               if (row["partition"], row["contrast"]) == ("A-exclusive", "needs/none")][:2]
    if not files or not latents:
        raise ValueError(f"{len(files)} snapshots by {r.s.model_b}, {len(latents)} latents of A")
    off = max((w - v).abs().max().item() for w, v in zip(
        r.models["A"].parameters(), at_step(r.models["B"], files[-1]).parameters()))
    print(f"{r.folder}, layer {r.s.layer}; the last snapshot's weights are A's to within {off:.1g}")
    steps = [follow(r, file, latents, args) for file in files]
    exact = np.maximum.accumulate([0., *(s["exact"] for s in steps)])
    theta = float(np.interp(exact[-1] / 2, exact, [0., *(s["length"] for s in steps)]))
    for i in range(len(latents)):
        print_steps(steps, i, theta, args.alpha)
    keep(r.folder, "birth", {"theta": theta, "alpha": args.alpha, "off": off, "steps": steps},
         steps, "birth.jsonl")

if __name__ == "__main__":
    sys.exit(cli(main))
