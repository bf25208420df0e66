"""A planted ground truth: does the crosscoder find concepts that only one model has?

Two "models" are linear readouts of the same sparse concepts: each text activates a few of n
concepts, and model m's vector is the sum of the active concepts' directions in m. Some concepts
have a direction in A only, some in B only, the rest in both (the toy world of arXiv 2602.11729):

    x_m = sum_c  s_c  d_{c,m} + noise      s_c > 0 on active concepts;  d_{c,m} = 0 where m lacks c

The directions of shared concepts are unit vectors, the same in both models up to a small turn.

    python extras/toy.py            # 4 crosscoders, 3 seeds each: about half a minute on 2 cores

Measured (recall of A-only / B-only concepts, mean over 3 seeds): tied .83 / .88, untied 1.00 / .50,
published recipe .79 / .38, plain 1.00 / 1.00. So where concepts are independent and every one has a
latent to itself, the plain crosscoder needs no partition; a partition of the right size misplaces
a few, and which seed it is matters more than tying.

A concept is recovered when some latent's decoder row has cosine > 0.8 with it. Printed, as mean and
range over seeds: recall of A-only and B-only concepts among the latents that are exclusive to their
model, and false positives: the share of live exclusive latents that stand for no concept of theirs.
A plain crosscoder has no exclusive part: there, a latent counts as A's if A has 95 % of its norm.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def plant(n_concepts=64, n_only=8, d_model=48, n_vectors=20_000, active=4, turn=.1, noise=.02,
          seed=0):
    """x_NMD and the true directions d_CMD (zero rows where a model lacks the concept).

    The first n_only concepts belong to A, the next n_only to B, the rest to both; `turn` is the
    size of the difference between A's and B's direction of a shared concept."""
    g = torch.Generator().manual_seed(seed)
    d_CMD = F.normalize(torch.randn(n_concepts, 1, d_model, generator=g), dim=-1)
    d_CMD = d_CMD + turn * F.normalize(torch.randn(n_concepts, 2, d_model, generator=g), dim=-1)
    d_CMD = F.normalize(d_CMD, dim=-1)
    d_CMD[:n_only, 1] = 0
    d_CMD[n_only:2 * n_only, 0] = 0
    chosen = torch.rand(n_vectors, n_concepts, generator=g).topk(active).indices
    strength = torch.rand(n_vectors, active, generator=g) + .5
    s_NC = torch.zeros(n_vectors, n_concepts).scatter(1, chosen, strength)
    x_NMD = torch.einsum("nc,cmd->nmd", s_NC, d_CMD)
    return x_NMD + noise * torch.randn(x_NMD.shape, generator=g), d_CMD


def fit(x_NMD, share=.1, share_b=None, tied=False, n_latents=96, k=4, steps=1200, seed=0,
        recipe="dfc"):
    """A crosscoder on planted vectors, trained as dfc.py trains."""
    from dfc import Crosscoder, train
    torch.manual_seed(seed)
    n_a, n_b = (int(s * n_latents) for s in (share, share if share_b is None else share_b))
    cc = Crosscoder(x_NMD.shape[2], n_latents, k, n_a, n_b, tied)
    cc.fit_scale(x_NMD)
    if recipe != "paper":
        cc.fair_start(x_NMD[:4096])
    train(cc, x_NMD, steps, batch=256, lr=2e-2, l1_shared=1e-4, l1_excl=1e-4, seed=seed,
          recipe=recipe)
    return cc


@torch.no_grad()
def exclusive_latents(cc, x_NMD, model):
    """Live latents that are `model`'s alone: by the mask, or, without a partition, by 95 % of the
    norm."""
    alive = torch.cat([cc.encode(x) for x in x_NMD.split(4096)]).gt(0).any(0)
    norms = cc.decoder().norm(dim=-1)
    own = norms[:, model] > .95 * norms.sum(1)
    return (alive & own).nonzero()[:, 0]


def grade(cc, x_NMD, d_CMD, n_only, model):
    """(recall of the concepts only `model` has, false positives among its exclusive latents)."""
    latents = exclusive_latents(cc, x_NMD, model)
    if not len(latents):
        return 0., 0.
    rows = F.normalize(cc.decoder()[latents, model].detach(), dim=-1)
    mine = slice(0, n_only) if model == 0 else slice(n_only, 2 * n_only)
    cosine = rows @ d_CMD[mine, model].T
    return (cosine.max(0).values > .8).float().mean().item(), \
        1 - (cosine.max(1).values > .8).float().mean().item()


def main(argv=None):
    p = argparse.ArgumentParser(description="Planted exclusive concepts, and who finds them.")
    p.add_argument("--seeds", type=int, default=3)
    args = p.parse_args(argv)
    print(f"{'':21s}recall, mean (range)                  false positives, mean (range)")
    print(f"{'':21s}A-only             B-only             A-only             B-only")
    variants = {"DFC, tied": dict(tied=True), "DFC, untied": {},
                "DFC, recipe paper": dict(recipe="paper"), "plain crosscoder": dict(share=0.)}
    for name, how in variants.items():
        grades = []
        for seed in range(args.seeds):
            x, d = plant(seed=seed)
            cc = fit(x, seed=seed, **how)
            grades.append([*grade(cc, x, d, 8, 0), *grade(cc, x, d, 8, 1)])
        columns = torch.tensor(grades).T[[0, 2, 1, 3]]
        cells = (f"{c.mean():.2f} ({c.min():.2f}-{c.max():.2f})   " for c in columns)
        print(f"{name:20s} " + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
