"""A planted ground truth: does the crosscoder find concepts that only one model has?

Two "models" are linear readouts of the same sparse concepts (the toy world of arXiv 2602.11729).
Each text activates a few of C concepts, and model m's vector is the sum of their directions in m.
Some concepts have a direction in A only, some in B only, the rest in both:

    x_m = sum_c  s_c  d_{c,m} + noise      s_c > 0 on active concepts;  d_{c,m} = 0 where m lacks c

The directions of shared concepts are the same in both models up to a small turn.

    python extras/toy.py            # 4 crosscoders, 3 seeds each: half a minute on 2 CPU cores

A latent counts as exclusive to a model that holds 95 % of its norm, which makes sense of a plain
crosscoder too. A concept is recovered when the decoder row of one of these, a live one, has cosine
> 0.8 with it. Printed, as mean and range over seeds: the recall of A-only and B-only concepts, and
false positives, the share of exclusive latents that stand for no concept of their model alone.

Measured (recall of A-only / B-only concepts, mean over 3 seeds): tied .83 / .88, untied 1.00 / .21,
published recipe .79 / .50, plain 1.00 / 1.00. So where concepts are independent and every one has a
latent to itself, the plain crosscoder needs no partition. A partition of the right size misplaces a
few, and the draw decides which: untied, over eight seeds, B-only lies anywhere between 0 and 1.

Shapes as in dfc.py, and C concepts.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfc import Crosscoder, cli, train

N_ONLY = 8  # concepts of A alone, and as many of B alone
VARIANTS = {"DFC, tied": {"tied": True}, "DFC, untied": {},
            "DFC, recipe paper": {"recipe": "paper"}, "plain crosscoder": {"share": 0.}}

def plant(C=64, D=48, N=20_000, active=4, turn=.1, noise=.02, seed=0):
    """(x_NMD, the true directions d_CMD), a direction zero where the model lacks the concept. The
    first N_ONLY concepts are A's, the next B's, the rest shared, turned by `turn`."""
    g = torch.Generator().manual_seed(seed)
    d_CMD = F.normalize(torch.randn(C, 1, D, generator=g), dim=-1)
    d_CMD = d_CMD + turn * F.normalize(torch.randn(C, 2, D, generator=g), dim=-1)
    d_CMD = F.normalize(d_CMD, dim=-1)
    d_CMD[:N_ONLY, 1] = d_CMD[N_ONLY:2 * N_ONLY, 0] = 0
    chosen = torch.rand(N, C, generator=g).topk(active).indices
    s_NC = torch.zeros(N, C).scatter(1, chosen, torch.rand(N, active, generator=g) + .5)
    x_NMD = torch.einsum("nc,cmd->nmd", s_NC, d_CMD)
    return x_NMD + noise * torch.randn(x_NMD.shape, generator=g), d_CMD

def fit(x_NMD, share=.1, tied=False, L=96, k=4, steps=1200, seed=0, recipe="dfc"):
    """A crosscoder on planted vectors, trained as dfc.py trains."""
    torch.manual_seed(seed)
    cc = Crosscoder(x_NMD.shape[2], L, k, int(share * L), int(share * L), tied)
    cc.fit_scale(x_NMD)
    if recipe == "paper":  # as dfc.py: encoder and decoder drawn independently
        cc.W_enc.data.normal_(std=cc.W_enc.std().item())
    else:
        cc.fair_start(x_NMD[:4096])
    train(cc, x_NMD, steps, batch=256, lr=2e-2, l1_shared=1e-4, l1_excl=1e-4, seed=seed,
          recipe=recipe)
    return cc

@torch.no_grad()
def grade(cc, x_NMD, d_CMD, m):
    """(recall of the concepts only model m has, false positives among its live exclusive latents:
    by the mask, and without a partition by 95 % of the norm)."""
    live_L = torch.cat([cc.encode(x) for x in x_NMD.split(4096)]).gt(0).any(0)
    norm_LM = cc.W_dec.norm(dim=-1)
    rows = cc.W_dec[live_L & (norm_LM[:, m] > .95 * norm_LM.sum(1)), m]
    if not len(rows):
        return 0., 0.
    cosine = F.normalize(rows, dim=-1) @ d_CMD[m * N_ONLY:(m + 1) * N_ONLY, m].T
    recall, stands = ((cosine.max(i).values > .8).float().mean().item() for i in (0, 1))
    return recall, 1 - stands

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=1200)
    args = p.parse_args(argv)
    if min(args.seeds, args.steps) < 1:
        raise ValueError("--seeds and --steps must be 1 or more")
    print(f"{'':20s}recall, mean (range)                false positives, mean (range)\n"
          f"{'':20s}A-only            B-only            A-only            B-only")
    for name, how in VARIANTS.items():
        grades = []
        for seed in range(args.seeds):
            x_NMD, d_CMD = plant(seed=seed)
            cc = fit(x_NMD, seed=seed, steps=args.steps, **how)
            (recall_a, false_a), (recall_b, false_b) = (grade(cc, x_NMD, d_CMD, m) for m in (0, 1))
            grades.append([recall_a, recall_b, false_a, false_b])
        print(f"{name:20s}" + "".join(f"{v.mean():.2f} ({v.min():.2f}-{v.max():.2f})".ljust(18)
                                      for v in torch.tensor(grades).T), flush=True)

if __name__ == "__main__":
    sys.exit(cli(main))
