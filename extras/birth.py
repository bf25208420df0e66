"""Watch reinforcement learning add it: the tool latent along the RL run.

snapshots/, beside model B, holds A as it was at some steps of its RL run. The final crosscoder is a
fixed dictionary: it can read each of them beside the same base. Printed for the best A-exclusive
latent (on dev) and, as a control, the next one:

    exact, false     exact calls where a tool is needed, false calls where none is, % of test rows
    |A-B|, cos       at the prompt's last token, and its cosine with the latent's decoder row
    value, AUROC     of the latent there, mean where a tool is needed and where none is
    writes           length of what it writes into A there, mean where a tool is needed
    down, up, into B taken away from A, times --alpha, its dev maximum added to B: change of exact
                     (that of ten random directions) measured / predicted

measured: beyond 0 and all ten. predicted, by a distance to a threshold: a model calls once it is
pushed further from B than some theta, and of a push counts what lies along A - B (w of what the
latent writes, c of its maximum). theta is read off the behaviour alone, the |A - B| where exact
calls pass half of their end; then lengths and cosines say which claims can be made:

    down   |A-B| - w < theta < |A-B|        it calls, and would not without the latent
    up     |A-B| < theta < |A-B| + (alpha - 1) w           into B   theta < c

    python extras/birth.py                  # the newest run: four minutes on 2 CPU cores
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
from steer import auroc, claim, delta, place, random_units, stage

KINDS = "down", "up", "into B"

def at_step(base, file):
    """A as it was: the base plus what the snapshot holds, differences in half precision."""
    model = copy.deepcopy(base)
    for name, difference in load_file(file).items():
        model.get_parameter(name).data += difference.to(model.device)
    return model

def read(t, dev, p, latent, alpha):
    """One latent at one step, t a scene with that A."""
    f_N, row_D = p.f_NL[:, latent], t.cc.W_dec[latent, 0] * t.cc.scale[0]
    most_D, values = dev.f_NL[dev.needs, latent].max() * row_D, (f_N[p.needs], f_N[~p.needs])
    cosine = F.cosine_similarity(p.x_NMD[p.needs, 0] - p.x_NMD[p.needs, 1], row_D[None]).mean()
    added = [delta(t.cc, p.f_NL, [latent], a) for a in (0, alpha)] + [most_D.expand(len(f_N), -1)]
    claims = [claim(t, p, m, kind, kind, d_ND, {"random": random_units(10, row_D)}, sign)
              for kind, m, d_ND, sign in zip(KINDS, "AAB", added, (-1, 1, 1))]
    return {"latent": latent, "cosine": cosine.item(), "value": [v.mean().item() for v in values],
            "auroc": auroc(*(v[:, None] for v in values)).item(), "most": most_D.norm().item(),
            "writes": (values[0].mean() * row_D.norm()).item(), "clean": claims[0]["clean"],
            "claims": {c["kind"]: {key: c[key] for key in ("effect", "false_calls", "controls")} | {
                "measured": c["verdict"] != "no"} for c in claims}}

def follow(r, file, latents, args):
    """One snapshot: what the models do there, and each latent."""
    t = argparse.Namespace(**vars(r) | {"models": r.models | {"A": at_step(r.models["B"], file)}})
    dev, p = place(t, "dev", 30), place(t, "test", args.rows)
    length = (p.x_NMD[p.needs, 0] - p.x_NMD[p.needs, 1]).norm(dim=1).mean().item()
    return {"step": int(file.stem[4:]), "length": length, "rows": int(p.needs.sum()),
            "latents": [read(t, dev, p, latent, args.alpha) for latent in latents]}

def predict(steps, alpha):
    """Write what theta lets us expect into every claim; -> theta."""
    exact = np.maximum.accumulate([0., *(s["latents"][0]["clean"]["exact"] for s in steps)])
    theta = float(np.interp(exact[-1] / 2, exact, [0., *(s["length"] for s in steps)]))
    for length, x in ((s["length"], x) for s in steps for x in s["latents"]):
        w, c = x["cosine"] * x["writes"], x["cosine"] * x["most"]
        for kind, expected in (("down", length - w < theta < length), ("into B", theta < c),
                               ("up", length < theta < length + (alpha - 1) * w)):
            x["claims"][kind]["predicted"] = expected
    return theta

def print_steps(steps, i):
    """The table of the i-th latent, and where each claim begins."""
    print(f"\nlatent {steps[0]['latents'][i]['latent']}, {steps[0]['rows']} rows that need a tool\n"
          " step exact false  |A-B|  cos  value needs none AUROC writes{:>20s}{:>20s}{:>20s}".format(
              *KINDS))
    for s in steps:
        x = s["latents"][i]
        print("{:5d}{:6.0f}{:6.0f}{:7.1f}{:5.2f}{:13.2f}{:5.2f}{:6.2f}{:7.1f}".format(
            s["step"], *x["clean"].values(), s["length"], x["cosine"], *x["value"], x["auroc"],
            x["writes"]) + "".join(f"{cell_of(c):>20s}" for c in x["claims"].values()))
    for kind in KINDS:
        print("{}: first measured at step {}, predicted {}".format(kind, *(
            next((s["step"] for s in steps if s["latents"][i]["claims"][kind][how]), "never")
            for how in ("measured", "predicted"))))

def cell_of(c):
    pp, yes = [x["pp"] for x in c["controls"]["random"]], "ny"
    return (f"{c['effect']['pp']:+.0f} ({min(pp):.0f}..{max(pp):.0f}) "
            f"{yes[c['measured']]}/{yes[c['predicted']]}")

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", help="run folder (default: the newest)")
    p.add_argument("--alpha", type=float, default=1.5, help="strength of up")
    p.add_argument("--rows", type=int, default=15, help="test rows of each kind")
    args = p.parse_args(argv)
    r = stage(args.run, None)
    files = sorted(Path(r.s.model_b).parent.glob("snapshots/step*.safetensors"))
    latents = [row["feature_idx"] for row in r.ranked
               if (row["partition"], row["contrast"]) == ("A-exclusive", "needs/none")][:2]
    if not files or not latents:
        raise ValueError(f"{len(files)} snapshots by {r.s.model_b}, {len(latents)} latents of A")
    off = max((w - v).abs().max().item() for w, v in zip(
        r.models["A"].parameters(), at_step(r.models["B"], files[-1]).parameters()))
    print(f"{r.folder}, layer {r.s.layer}; the last snapshot's weights are A's to within {off:.1g}")
    steps = [follow(r, file, latents, args) for file in files]
    out = {"theta": predict(steps, args.alpha), "alpha": args.alpha, "off": off, "steps": steps}
    for i in range(len(latents)):
        print_steps(steps, i)
    print(f"theta {out['theta']:.1f}")
    keep(r.folder, "birth", out, steps, "birth.jsonl")

if __name__ == "__main__":
    sys.exit(cli(main))
