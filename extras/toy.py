"""Planted concepts: does the crosscoder find those that only one model has?

Two "models" are linear readouts of the same sparse concepts (the toy world of arXiv 2602.11729).
Each text activates a few of C concepts, and model m's vector is the sum of their directions in m.
Some concepts have a direction in A only, some in B only, the rest in both:

    x_m = sum_c  s_c  d_{c,m} + noise      s_c > 0 on active concepts;  d_{c,m} = 0 if m lacks c

A shared concept has nearly the same direction in both models: each is turned a little.

    python extras/toy.py            # 4 crosscoders, 3 seeds each: half a minute on 2 CPU cores

A latent counts as exclusive to a model that holds 95 % of its norm. So a plain crosscoder can be
graded too. A concept is recovered if the decoder row of a live exclusive latent has cosine > 0.8
with it. Printed are mean and range over seeds of two shares: the recall of A-only and B-only
concepts, and the false positives, exclusive latents that stand for no concept of their model alone.

Measured recall of A-only / B-only concepts, mean over 3 seeds: tied .83 / .88, untied 1.00 / .21,
published recipe .79 / .50, plain 1.00 / 1.00. So a plain crosscoder needs no partition if concepts
are independent and each has a latent to itself. A partition of the right size misplaces a few
concepts, and the seed decides which. Over eight seeds of "untied", the recall of B-only concepts
lies anywhere between 0 and 1.

Shapes as in dfc.py (N vectors, M = 2 models, D width, L latents), and C concepts; E latents that
are exclusive to one model and P concepts that it alone has.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
from dfc import Crosscoder, cli, train
from eval_toolcall import at_least_one

N_ONLY = 8  # concepts of A alone, and as many of B alone

VARIANTS = {  # name: options of fit()
    "DFC, tied": {"tied": True},
    "DFC, untied": {},
    "DFC, recipe paper": {"fair_start": False, "l1_mean": True, "revive": 0, "schedule": False},
    "plain crosscoder": {"share": 0.},
}


class Grade(NamedTuple):
    recall: float           # share of the concepts only this model has that some latent stands for
    false_positives: float  # share of its live exclusive latents that stand for none of these


def plant(C=64, D=48, N=20_000, active=4, seed=0):
    """Vectors of both models, and the directions they are made of.

    The first N_ONLY concepts are A's, the next B's, the rest shared. `active` concepts make a
    vector. -> (x_NMD, d_CMD); a direction is zero if the model lacks it."""
    g = torch.Generator().manual_seed(seed)

    # directions of length 1; each model's is turned a little
    d_CMD = F.normalize(torch.randn(C, 1, D, generator=g), dim=-1)
    turn_CMD = F.normalize(torch.randn(C, 2, D, generator=g), dim=-1)
    d_CMD = F.normalize(d_CMD + .1 * turn_CMD, dim=-1)
    d_CMD[:N_ONLY, 1] = 0            # A's alone: none in B
    d_CMD[N_ONLY:2 * N_ONLY, 0] = 0  # B's alone: none in A

    # which concepts a text activates, and how strongly: between .5 and 1.5
    chosen_Na = torch.rand(N, C, generator=g).topk(active).indices
    strength_Na = torch.rand(N, active, generator=g) + .5
    s_NC = torch.zeros(N, C).scatter(1, chosen_Na, strength_Na)

    # x_m = sum_c s_c d_{c,m} + noise
    x_NMD = torch.einsum("nc,cmd->nmd", s_NC, d_CMD)
    x_NMD = x_NMD + .02 * torch.randn(x_NMD.shape, generator=g)
    return x_NMD, d_CMD


def fit(x_NMD, share=.1, tied=False, L=96, k=4, steps=1200, seed=0, fair_start=True, **how):
    """A crosscoder trained on planted vectors. share: of the latents for A alone, and as much for B
    alone. how: goes to train()."""
    torch.manual_seed(seed)
    n_exclusive = int(share * L)
    cc = Crosscoder(x_NMD.shape[2], L, k, n_exclusive, n_exclusive, tied,
                    random_encoder=not fair_start)

    cc.fit_scale(x_NMD)  # one scale a model, also for the published recipe: coordinates are alike
    if fair_start:
        cc.fair_start(x_NMD[:4096])
    train(cc, x_NMD, steps, batch=256, lr=2e-2, l1_shared=1e-4, l1_excl=1e-4, seed=seed, **how)
    return cc


@torch.no_grad()
def grade(cc, x_NMD, d_CMD, m):
    """How well model m's exclusive latents stand for the concepts only it has (m: 0 = A, 1 = B)."""
    # live latents: active on some vector
    live_L = cc.encode(x_NMD).gt(0).any(0)

    # exclusive ones: m holds 95 % of the norm, by the partition or, in a plain crosscoder, learned
    norm_LM = cc.W_dec.norm(dim=-1)
    exclusive_L = norm_LM[:, m] > .95 * norm_LM.sum(1)
    rows_ED = cc.W_dec[live_L & exclusive_L, m]
    if not len(rows_ED):
        return Grade(recall=0., false_positives=0.)

    # a latent stands for a concept if their cosine is over .8
    only_PD = d_CMD[m * N_ONLY:(m + 1) * N_ONLY, m]
    cosine_EP = F.normalize(rows_ED, dim=-1) @ only_PD.T
    recovered_P = cosine_EP.max(0).values > .8
    stands_E = cosine_EP.max(1).values > .8
    return Grade(recovered_P.float().mean().item(), 1 - stands_E.float().mean().item())


def mean_and_range(over_seeds):
    """`mean (min-max)`, as wide as a column of the table."""
    return f"{over_seeds.mean():.2f} ({over_seeds.min():.2f}-{over_seeds.max():.2f})  "


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=at_least_one, default=3)
    p.add_argument("--steps", type=at_least_one, default=1200)
    args = p.parse_args(argv)

    print(f"{'':20s}recall, mean (range)                false positives, mean (range)")
    print(f"{'':20s}A-only            B-only            A-only            B-only")
    for name, options in VARIANTS.items():
        shares = []  # a row for each seed, in the order of the table's columns
        for seed in range(args.seeds):
            x_NMD, d_CMD = plant(seed=seed)
            cc = fit(x_NMD, seed=seed, steps=args.steps, **options)

            a = grade(cc, x_NMD, d_CMD, 0)
            b = grade(cc, x_NMD, d_CMD, 1)
            shares.append([a.recall, b.recall, a.false_positives, b.false_positives])

        cells = "".join(mean_and_range(column) for column in torch.tensor(shares).T)
        print(f"{name:20s}{cells}", flush=True)


if __name__ == "__main__":
    raise SystemExit(cli(main))
