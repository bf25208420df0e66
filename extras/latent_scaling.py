"""Is what a latent writes into A in B's activations too? Latent Scaling (arXiv 2504.02922).

A latent of A alone cannot write into B, but B may hold the same information all the same. So fit:
how much of what the latent writes is in each model's vectors? With d the latent's row in A, f_n its
activation on text n, and y_nm a vector of model m on that text,

    beta_m(y) = sum_n <f_n d, y_nm> / sum_n |f_n d|^2           nu = beta_B / beta_A

    nu_recon    y = zhat minus its mean over texts (in the paper zhat itself)
    nu_error    y = z - zhat + f_n W_dec[l, m]: the error of the reconstruction without this latent

Both are 0 if only A has it, and 1 if both models have it alike. A nu is negative if B's vectors
point against d. A latent passes as A's own if |nu_error| < .2 and |nu_recon| < .5. This says
whether B's vectors vary with the latent, not whether A needs it: for that, ablate it (steer.py).

    python extras/latent_scaling.py runs/null runs/tiny         # a few seconds each

Vectors are those of dev prompts, tool texts and plain texts. A line each for the first ten latents
that are larger where a tool is needed.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
from dfc import cli, load_model, plain_texts, tool_texts
from eval_toolcall import open_run
from steer import best_latents, rank_latents, read_prompts


def exclusivity(cc, x_NMD, f_NL):
    """(nu_error_L, nu_recon_L). Vectors are in normalised units: in raw ones nu would carry scale_B
    / scale_A. A ratio is +-1e9 if its denominator is 0."""
    zhat_NMD = cc.normalise(cc.decode(f_NL))
    error_NMD = cc.normalise(x_NMD) - zhat_NMD
    d_LD = cc.W_dec[:, 0]

    def numerator(y_NMD):  # of beta; the denominator cancels in nu
        return torch.einsum("nmd,ld,nl->lm", y_NMD, d_LD, f_NL)

    # in nu_error y is another one for each latent: its own part of the numerator is added after,
    # sum_n <f_n d, f_n W_dec[l, m]> = sum_n f_n^2 <d, W_dec[l, m]>
    own_LM = f_NL.pow(2).sum(0)[:, None] * (cc.W_dec * d_LD[:, None]).sum(2)
    error_LM = numerator(error_NMD) + own_LM
    recon_LM = numerator(zhat_NMD - zhat_NMD.mean(0))

    nu_error_L, nu_recon_L = (b_LM[:, 1] / b_LM[:, 0] for b_LM in (error_LM, recon_LM))
    return nu_error_L.nan_to_num(1e9, 1e9, -1e9), nu_recon_L.nan_to_num(1e9, 1e9, -1e9)


def print_scaling(run):
    """A line for each of the first ten latents that are larger where a tool is needed, and how many
    of all of these pass."""
    s = run.settings
    dev = read_prompts(run, "dev")
    texts = tool_texts(s.tool_texts, run.tokenizer, "dev", 300)
    texts += plain_texts(s.plain_texts, run.tokenizer, "dev", 300)
    x_NMD = torch.cat([dev.x_NMD, run.vectors(texts)])
    nu_error_L, nu_recon_L = exclusivity(run.cc, x_NMD, run.cc.encode(x_NMD))
    passes_L = (nu_error_L.abs() < .2) & (nu_recon_L.abs() < .5)

    ranking = rank_latents(run.cc, dev.f_NL, dev.needs_N)
    partition = "A-exclusive" if run.cc.n_a else "shared"
    best = best_latents(ranking, partition)

    print(f"\n{run.folder}, {partition}\nlatent  nu_error  nu_recon")
    for latent in best[:10]:
        verdict = "   passes" if passes_L[latent] else ""
        print(f"{latent:6d}{nu_error_L[latent]:10.2f}{nu_recon_L[latent]:10.2f}{verdict}")
    print(f"{int(passes_L[best].sum())} of {len(best)} latents that are larger where a tool is "
          "needed pass")


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    args = p.parse_args(argv)

    get = cache(load_model)  # runs of one pair share its models
    for name in args.runs or [None]:
        print_scaling(open_run(name, get))


if __name__ == "__main__":
    raise SystemExit(cli(main))
