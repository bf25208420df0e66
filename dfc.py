"""dfc: what did reinforcement learning add to a model? Ask a Dedicated Feature Crosscoder.

Model A is an RL-tuned language model that calls tools, B the frozen base it came from. Run both
over the same texts, take the residual stream at one layer, and learn ONE sparse dictionary for the
pair. Some of its latents may read and write A only, some B only, the rest are shared: what RL
added has to go through the A-exclusive ones. (arXiv 2606.26474; the DFC is from arXiv 2602.11729.)

    z_m    = (x_m - mean_m) / scale_m                   one vector per model m, mean square 1
    pre    = relu( sum_m z_m W_enc[m] + b_enc )         forbidden (m, latent) weights are zero
    f      = the k largest of pre, the rest zero
    zhat_m = sum_l f_l W_dec[l, m] + b_dec[m]           xhat_m = zhat_m scale_m + mean_m
    loss   = mean (z - zhat)^2 + sum_l lambda_l f_l |W_dec[l]| + revival of dead latents

    latents = [ A-exclusive: n_a | B-exclusive: n_b | shared ]     n = int(share * L)
    n_a = n_b = 0 is the plain crosscoder; a share of 0.5 is two sparse autoencoders in one top k.

Shapes: B vectors in a batch, N in all, M = 2 models (0 = A, 1 = B), D residual width, L latents,
k active latents, T tokens; E = M D, a pair laid end to end; P, Q two sets to contrast. A suffix
says what a tensor is: x_BMD, f_BL. "Needs:" in a docstring: what to copy along with the piece
(some of it is in eval_toolcall.py).

    python dfc.py                          # the embedded pair: 30 s on 2 CPU cores
    python dfc.py --dict 8192 --k 45       # the paper's smaller dictionary on it: a minute
    python dfc.py --excl 0                 # the plain crosscoder
    python dfc.py --recipe paper           # trained the published way, for comparison
    python dfc.py --preset paper           # Qwen2.5-3B against ToolRL-Qwen2.5-3B (a GPU, the hub)

Where we leave the paper, and why, each in one place below (`--recipe paper` undoes 2 to 7):
  1. The mean and scale of the activations belong to the crosscoder. Published training vectors are
     standardised, evaluation vectors are not, and the statistics are lost.          [Crosscoder]
  2. Sparsity is sum_l f_l |W_dec[l]|: as a mean over all latents, lambda = 1e-3 weighs 0.1 % of the
     loss, and f alone can be shrunk for free by a longer decoder.                    [l1_loss]
  3. A fair start: an exclusive latent reads one model where a shared one reads two; drawn as
     published, at first it is picked 9 to 28 times less often. Our encoder begins as the
     decoder's transpose, and the spread is made equal per partition. [Crosscoder, fair_start]
  4. Dead latents are revived, each partition on its own.                              [aux_loss]
  5. Tied shared decoders (--tie-shared): a shared latent has one decoder row for both models, so
     that a difference between A and B cannot hide in it.                               [decoder]
     The embedded pair's preset also has no B-exclusive part: B is A's parent, and given both parts,
     pairs of exclusive latents take over what is shared (on identical models too), and what A adds
     goes, sign flipped, into a B-exclusive latent. Costs .006 (A) and .010 (B) of FVE there;
     untied, or with a B-exclusive part, taking the best A-exclusive latent away changes nothing.
  6. Half of the tool texts end where the assistant's turn begins: the place where latents are later
     ranked and patched. The published mix never contains that place.                [tool_texts]
  7. The learning rate warms up and falls to zero at the end, in place of a constant.     [lr_at]
Vectors ten times as long as the median (attention sinks) are left out under either recipe.

Left out on purpose: several GPUs, token streams larger than memory, more than two models.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------
# 1. The crosscoder
# ---------------------------------------------------------------------------------------------

NAMES = {"a_excl": "A-exclusive", "b_excl": "B-exclusive", "shared": "shared"}  # the partitions


class Crosscoder(nn.Module):
    """A sparse dictionary over pairs of vectors, some latents confined to one model.

    d_model D, n_latents L, k active latents per pair, n_a A-exclusive and n_b B-exclusive latents;
    tied: shared latents write the same direction into both models. Parameter names and shapes are
    those of the paper's checkpoints; mean and scale are ours. Draws from torch's global generator.
    encode and decode apply masks and tie at every call; training calls confine() on the weights
    once and on each gradient instead, for a mask as large as the dictionary is slow. Raises
    ValueError for sizes that cannot be. (Paper section 3 and its Figure 1.) Needs: NAMES.
    """

    def __init__(self, d_model, n_latents, k, n_a=0, n_b=0, tied=False):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise ValueError(f"k must be between 1 and the {n_latents} latents, got {k}")
        if min(n_a, n_b) < 0 or n_a + n_b > n_latents:
            raise ValueError(f"{n_a} + {n_b} exclusive latents do not fit into {n_latents}")
        self.k, self.n_a, self.n_b, self.tied = k, n_a, n_b, tied
        W_dec = F.normalize(torch.randn(n_latents, 2, d_model), dim=-1)
        if tied:
            W_dec[n_a + n_b:] = W_dec[n_a + n_b:, :1]
        allowed = torch.ones(n_latents, 2)
        allowed[:n_a, 1] = 0
        allowed[n_a:n_a + n_b, 0] = 0
        self.register_buffer("dec_mask", allowed)                                # (L, M)
        self.register_buffer("enc_mask", allowed.T.clone())                      # (M, L)
        self.W_dec = nn.Parameter(W_dec)                                         # (L, M, D)
        # The decoder's transpose: a latent starts by reading what it writes (the mean of two).
        share = allowed / allowed.sum(1, keepdim=True)
        W_enc = (W_dec * share[..., None]).permute(1, 2, 0).contiguous()
        self.W_enc = nn.Parameter(W_enc)                                         # (M, D, L)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))                        # (L,)
        self.b_dec = nn.Parameter(torch.zeros(2, d_model))                       # (M, D)
        self.register_buffer("mean", torch.zeros(2, d_model))                    # (M, D)
        self.register_buffer("scale", torch.ones(2))                             # (M,)

    def partitions(self):
        """{name: slice of latents}, in the order in which they lie."""
        a, b = self.n_a, self.n_a + self.n_b
        return dict(zip(NAMES, (slice(0, a), slice(a, b), slice(b, len(self.b_enc)))))

    def normalise(self, x_BMD):
        """Raw activations -> zero mean, mean square one per model."""
        return (x_BMD.to(self.W_enc.dtype) - self.mean) / self.scale[:, None]

    def decoder(self):
        """The decoder in use, (L, M, D). Departure 5: a tied latent's two rows are their mean, so
        both receive the same gradient and stay equal."""
        W_dec = self.W_dec
        if self.tied:
            one_each, both = W_dec.split([self.n_a + self.n_b, len(W_dec) - self.n_a - self.n_b])
            W_dec = torch.cat([one_each, both.mean(1, keepdim=True).expand_as(both)])
        return W_dec * self.dec_mask[..., None]

    @torch.no_grad()
    def confine(self, W_enc, W_dec):
        """In place: forbidden entries become zero, a tied latent's two decoder rows their mean.
        Done to the weights once and to every gradient, it keeps decoder() equal to W_dec."""
        a, b = self.n_a, self.n_a + self.n_b
        for forbidden in (W_enc[1, :, :a], W_enc[0, :, a:b], W_dec[:a, 1], W_dec[a:b, 0]):
            forbidden.zero_()
        if self.tied:
            W_dec[b:] = W_dec[b:].mean(1, keepdim=True)

    def preactivations(self, z_BMD):
        """Normalised vectors -> relu of what every latent reads, (B, L)."""
        W_enc = self.W_enc * self.enc_mask[:, None]
        return F.relu(z_BMD.flatten(1) @ W_enc.flatten(0, 1) + self.b_enc)

    def encode(self, x_BMD):
        """Raw activations -> f_BL, the k largest pre-activations of each pair, the rest zero."""
        top = self.preactivations(self.normalise(x_BMD)).topk(self.k, dim=-1)
        return torch.zeros(len(x_BMD), len(self.b_enc), dtype=top.values.dtype,
                           device=x_BMD.device).scatter(1, top.indices, top.values)

    def decode(self, f_BL):
        """f_BL -> xhat_BMD in raw activation units."""
        z_BMD = torch.einsum("bl,lmd->bmd", f_BL, self.decoder()) + self.b_dec
        return z_BMD * self.scale[:, None] + self.mean

    def forward(self, x_BMD):
        f_BL = self.encode(x_BMD)
        return self.decode(f_BL), f_BL

    @torch.no_grad()
    def fit_scale(self, x_NMD):
        """Departure 1: take mean (M, D) and root mean square (M,) from the training vectors and
        keep them, so that encode and decode speak raw units for ever after."""
        self.mean.copy_(x_NMD.float().mean(0))
        self.scale.copy_((x_NMD.float() - self.mean).pow(2).mean((0, 2)).sqrt().clamp(min=1e-8))

    @torch.no_grad()
    def fair_start(self, x_BMD):
        """Departure 3: scale each exclusive partition's encoder until its pre-activations spread as
        much as the shared ones' (as A's, if nothing is shared). The encoder of __init__, a mean of
        two decoder rows, favours exclusive latents: they shrink by up to sqrt(2) (untied always;
        tied not at all where A = B)."""
        pre = self.normalise(x_BMD).flatten(1) @ (self.W_enc * self.enc_mask[:, None]).flatten(0, 1)
        filled = {n: s for n, s in self.partitions().items() if s.stop > s.start}
        target = pre[:, filled.get("shared", filled.get("a_excl"))].std()
        for part in filled.values():
            self.W_enc[:, :, part] *= target / pre[:, part].std().clamp(min=1e-8)


# ---------------------------------------------------------------------------------------------
# 2. Losses and metrics: pure functions of tensors
# ---------------------------------------------------------------------------------------------


def l1_loss(mean_L, norms_L, weight_L):
    """Departure 2: sum_l weight_l f_l |W_dec[l]|, mean over the batch.

    mean_L is f's mean over the batch (the sum is linear in f), norms_L the lengths of the decoder
    rows over both models, weight_L the lambdas. A longer row with a smaller f writes the same and
    costs the same: there is no way round it."""
    return (weight_L * mean_L * norms_L).sum()


def aux_loss(cc, z_BMD, zhat_BMD, pre_BL, dead_L, candidates=None):
    """Departure 4: let the dead latents of each partition explain what the living leave over.

    The residual is detached and b_dec stays out: dead latents learn from the error and do not push
    the rest. A partition is asked only for the models it writes, and each on its own, or the many
    shared latents would win every place; 2 k of each are asked. candidates: where_true of all that
    may be dead (a list of its own for every step would make a GPU wait), those alive count as 0.
    (AuxK, arXiv 2406.04093 appendix A.2.) Needs: reconstruct, where_true."""
    residual, total = (z_BMD - zhat_BMD).detach(), z_BMD.new_zeros(())
    written = slice(0, 1), slice(1, 2), slice(0, 2)
    for latents, models in zip(candidates or where_true(cc, dead_L), written):
        if len(latents):
            dead = dead_L[latents]
            pre = pre_BL.detach()[:, latents].relu_().mul_(dead)
            top = pre.topk(min(len(latents), 2 * cc.k), dim=-1, sorted=False)
            guess, _ = reconstruct(cc, z_BMD, (top.values, latents[top.indices]))
            total = total + (residual - guess)[:, models].pow(2).mean() * dead.any()  # none: 0
    return total


def where_true(cc, which_L):
    """The latents for which a boolean vector holds, as one list per partition."""
    return [which_L[part].nonzero()[:, 0] + part.start for part in cc.partitions().values()]


def add_outer(f_Bk, index_Bk, y_BE, n_rows):
    """sum over b, k of f[b, k] y[b], added to row index[b, k] of (n_rows, E). Sorted by row it is a
    weighted sum of picked rows of y: no collisions, and no outer product in memory."""
    row, place = index_Bk.flatten().sort(stable=True)
    first = torch.searchsorted(row, torch.arange(n_rows, device=row.device))
    return F.embedding_bag(place // index_Bk.shape[1], y_BE.contiguous(), first, mode="sum",
                           per_sample_weights=f_Bk.flatten()[place])


class Sparse(torch.autograd.Function):
    """(decoder's output, f) of latents whose values f are known, with gradients that touch only
    them. Autograd's own would be as large as the dictionary, and several times slower. f came from
    W_enc and b outside, without a graph: they are arguments only to receive gradients. Masks and
    ties are confine()'s. E = M D. Needs: add_outer, sparse_decode."""

    @staticmethod
    def forward(ctx, z_BE, f_Bk, index_Bk, W_EL, b_L, W_LE):
        with torch.enable_grad():
            f_Bk = f_Bk.detach().float().requires_grad_()
            zhat_BE = sparse_decode(f_Bk, index_Bk, W_LE.detach())
        ctx.kept = z_BE, f_Bk, index_Bk, zhat_BE, len(b_L)
        return zhat_BE.detach(), f_Bk.detach()

    @staticmethod
    def backward(ctx, g_BE, g_Bk):
        z_BE, f_Bk, index_Bk, zhat_BE, L = ctx.kept
        g_Bk = (g_Bk + torch.autograd.grad(zhat_BE, f_Bk, g_BE)[0]) * (f_Bk > 0)
        g_L = g_BE.new_zeros(L).index_add_(0, index_Bk.flatten(), g_Bk.flatten())
        gW_enc, gW_dec = (add_outer(f, index_Bk, y, L) for f, y in ((g_Bk, z_BE), (f_Bk, g_BE)))
        return None, None, None, gW_enc.T, g_L, gW_dec


def reconstruct(cc, z_BMD, top):
    """(zhat_BMD without b_dec, f_Bk) from the picked latents, top = (values, indices).
    Needs: Sparse."""
    zhat_BE, f_Bk = Sparse.apply(z_BMD.flatten(1), *top, cc.W_enc.flatten(0, 1), cc.b_enc,
                                 cc.W_dec.flatten(1))
    return zhat_BE.view_as(z_BMD), f_Bk


def sparse_decode(f_Bk, index_Bk, W_LMD):
    """sum_k f W[index]: decode, touching only the active rows. W (L, M, D) or (L, E) -> (B,
    same)."""
    flat = F.embedding_bag(index_Bk, W_LMD.flatten(1), per_sample_weights=f_Bk, mode="sum")
    return flat.view(len(f_Bk), *W_LMD.shape[1:])


def fve(x_BMD, xhat_BMD):
    """Fraction of variance explained per model, (M,): 1 is perfect, predicting the mean gives 0."""
    error = (x_BMD - xhat_BMD).double().pow(2).sum((0, 2))
    return 1 - error / (x_BMD - x_BMD.double().mean(0)).pow(2).sum((0, 2)).clamp(min=1e-30)


def cohens_d(f_PL, f_QL):
    """(mean P - mean Q) / sqrt((var P + var Q) / 2) per latent, two rows or more on each side; 0
    where nothing differs, huge where only the means do. (Paper section 4, ranking.)"""
    spread = ((f_PL.double().var(0) + f_QL.double().var(0)) / 2).sqrt()
    return (f_PL.double().mean(0) - f_QL.double().mean(0)) / spread.clamp(min=1e-12)


def auroc(f_PL, f_QL):
    """P(a value of P is larger than one of Q), ties counted half, per latent (Mann-Whitney)."""
    both = torch.cat([f_PL, f_QL]).T.contiguous()                                # (L, P + Q)
    ordered = both.sort(-1).values
    below = torch.searchsorted(ordered, both[:, :len(f_PL)].contiguous())
    upto = torch.searchsorted(ordered, both[:, :len(f_PL)].contiguous(), right=True)
    ranks = ((below + upto + 1).double() / 2).sum(-1)
    n, m = len(f_PL), len(f_QL)
    return (ranks - n * (n + 1) / 2) / (n * m)


def rank_latents(f_PL, f_QL, only=slice(None)):
    """Latents that are alive and larger on P (tool) than on Q (other), best separated first.

    f_PL, f_QL activations on the two sets of texts; only: a slice or list of latents to consider.
    Returns a list of rows with the names of the authors' ranking.csv: rank counts from 0, sign is
    always 1, for latents larger on Q are left out. Needs: auroc, cohens_d."""
    d, area = cohens_d(f_PL, f_QL), auroc(f_PL, f_QL)
    mean_P, mean_Q = f_PL.double().mean(0), f_QL.double().mean(0)
    table = {"cohens_d": d, "auroc": area, "fire_rate_tool": (f_PL > 0).double().mean(0),
             "fire_rate_nontool": (f_QL > 0).double().mean(0), "diff": mean_P - mean_Q,
             "mean_tool": mean_P, "mean_nontool": mean_Q}
    wanted = torch.zeros(len(d), dtype=torch.bool)
    wanted[only] = True
    wanted &= d.cpu() > 0
    order = [i for i in d.argsort(descending=True).tolist() if wanted[i]]
    table = {name: column.tolist() for name, column in table.items()}
    return [{"rank": r, "feature_idx": i, **{n: c[i] for n, c in table.items()}, "sign": 1}
            for r, i in enumerate(order)]


# ---------------------------------------------------------------------------------------------
# 3. Activations: load a pair, read texts, collect
# ---------------------------------------------------------------------------------------------


class Problem(Exception):
    """Something the user can mend; the message says what and how. Ends a program with status 2."""


def resolve(name):
    """A local folder as it is; a hub name as the folder of its snapshot, downloaded if need be.
    Needs: Problem."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise Problem(f"no model folder at {name}: give one with config.json, or a hub owner/name")
    from huggingface_hub import HfApi, snapshot_download
    files = ["*.json", "*.safetensors", "*.txt", "*.jinja", "model.pt"]
    try:
        HfApi().model_info(name, timeout=20)  # the download itself would wait for minutes
        offline = False
    except Exception:  # the hub's client raises some twenty kinds; all mean the same here
        offline = True  # what was downloaded before still serves
    try:
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=offline))
    except Exception as e:
        raise Problem(f"no folder {name} here, and none from the hub ({type(e).__name__}): check "
                      f"name and network, or download it elsewhere and give its folder") from None


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def load_part(auto, name, **how):
    """A part of a model, AutoTokenizer's or AutoModelForCausalLM's, from a folder or the hub.
    Needs: Problem, first_line, resolve."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    folder = resolve(name)
    try:
        return auto.from_pretrained(folder, **how)
    except Exception as e:  # truncated or foreign file, unknown architecture: a dozen types
        raise Problem(f"cannot load a model from {name}: {first_line(e)}") from None


def load_model(name, device):
    """Model in evaluation mode (bf16 on CUDA, else fp32) and its tokenizer. Raises Problem.
    Needs: load_part."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_part(AutoModelForCausalLM, name, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), load_part(AutoTokenizer, name)


def blocks(model):
    """The list of a decoder's transformer blocks. Raises Problem for unknown families.
    Needs: Problem."""
    for path in ("model.layers", "model.language_model.layers", "language_model.model.layers",
                 "transformer.h", "gpt_neox.layers", "model.decoder.layers"):
        found = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise Problem(f"do not know where {type(model).__name__} keeps its blocks: add it to blocks()")


class DeepEnough(Exception):
    """Raised by a hook when the deepest layer wanted is done: no more of the pass is needed."""


@torch.no_grad()
def residuals(model, ids, layers):
    """{layer: (B, T, D)}, outputs of blocks counted from 0: layer 13 is hidden_states[14]. (Of the
    last block it is the output before the final norm.) The pass ends after the deepest one: no
    further block, no vocabulary head. Needs: DeepEnough, blocks."""
    found, deepest = {}, max(layers)

    def keep(layer):
        def hook(_, __, out):
            found[layer] = out[0] if isinstance(out, tuple) else out
            if layer == deepest:
                raise DeepEnough
        return hook
    handles = [blocks(model)[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        model(input_ids=ids, use_cache=False)
    except DeepEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def collect(model, tokenizer, texts, layers, positions="last", batch_tokens=None, max_tokens=4096):
    """Residual vectors after some layers -> {layer: (N, D) fp16 on the CPU}, in order of the texts.

    positions "last": one row per text, at its last token (paper section 3); "all": one per token.
    Texts go in batches of like length, padded on the right, where causal attention never looks: the
    result does not depend on the batch. Texts above max_tokens lose their beginning. Raises Problem
    for a text without a token or a vector that is not finite. Needs: Problem, blocks, cut_batches,
    residuals."""
    from tqdm import tqdm
    depth, device = len(blocks(model)), next(model.parameters()).device
    batch_tokens = batch_tokens or (8192 if device.type == "cuda" else 1024)  # CPU: 8192 is slower
    if not texts:
        raise Problem("no texts to collect from: give some")
    if not all(0 <= layer < depth for layer in layers):
        raise Problem(f"layer {max(layers)} is past the end: the model has layers 0 to {depth - 1}")
    ids = [i[-max_tokens:] for i in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if not any(ids):
        raise Problem("the tokenizer makes no token of any text: are all its files there?")
    empty = [i for i, text_ids in enumerate(ids) if not text_ids]
    if empty:
        raise Problem(f"text {empty[0]} holds no token: remove it")
    if max(map(max, ids)) >= model.get_input_embeddings().num_embeddings:
        raise Problem("the tokenizer has more tokens than the model: they do not belong together")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = {layer: [None] * len(ids) for layer in layers}
    with tqdm(total=len(ids), desc="collect", unit="text", leave=False) as bar:
        for batch in cut_batches(order, ids, batch_tokens):
            width = len(ids[batch[-1]])
            padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])
            place, end = torch.arange(width), torch.tensor([[len(ids[i])] for i in batch])
            wanted = (place < end) & ((place == end - 1) | (positions == "all"))
            for layer, h_BTD in residuals(model, padded.to(device), layers).items():
                rows = h_BTD[wanted.to(device)].half().cpu()
                for i, own in zip(batch, rows.split(wanted.sum(1).tolist())):
                    if not own.isfinite().all():
                        raise Problem(f"layer {layer} of text {i} is not finite in fp16: "
                                      f"{texts[i][:60]!r}")
                    out[layer][i] = own
            bar.update(len(batch))
    return {layer: torch.cat(rows) for layer, rows in out.items()}


def cut_batches(order, ids, batch_tokens):
    """Indices sorted by length, cut so that a padded batch holds at most batch_tokens tokens."""
    batch = []
    for i in order:
        if batch and (len(batch) + 1) * len(ids[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def read_rows(name, limit=None):
    """Rows (dicts) of a .jsonl file, lines of a .txt file as {"text": line}, or rows of a hub
    dataset "owner/name" or "owner/name:config", streamed. Raises Problem naming file and row.
    Needs: Problem, RowError, hub_rows, read_jsonl."""
    path = Path(name)
    if not path.is_file():
        if path.exists() or path.suffix in (".jsonl", ".txt") or name.count("/") != 1:
            raise Problem(f"no text file {name}: give a .jsonl, a .txt or a hub dataset owner/name")
        return hub_rows(name, limit)
    if path.suffix != ".jsonl":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, OSError) as e:
            raise Problem(f"{name} is not readable UTF-8 text ({e})") from None
        return [{"text": line} for line in lines if line.strip()][:limit]
    from eval_toolcall import RowError, read_jsonl
    try:
        rows = read_jsonl(name)[:limit]
    except RowError as e:
        raise Problem(f"{name}, {e}") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise Problem(f"{name}, row {number} is not a JSON object")
    return [row for _, row in rows]


def hub_rows(name, limit):
    """Rows of a dataset on the hub, streamed. Needs: Problem."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise Problem(f"{name} is on the hub, which needs one more package: pip install datasets") \
            from None
    name, _, config = name.partition(":")
    try:
        stream = load_dataset(name, config or None, split="train", streaming=True)
        return list(stream if limit is None else stream.take(limit))
    except Exception as e:
        raise Problem(f"cannot get {name} from the hub ({type(e).__name__}): check name and "
                      f"network, or give a local .jsonl or .txt file") from None


def split_of(row):
    """train | dev | test: the row's own "split", else by a hash of the row, 80 : 10 : 10."""
    lot = zlib.crc32(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()) % 10
    return row.get("split") or {0: "dev", 1: "test"}.get(lot, "train")


def chunks(text, tokenizer, size=30):
    """Pieces of `size` tokens or a little more that end where a sentence does (paper section 3,
    data); a shorter rest is left out, unless it is all there is."""
    pieces, piece, count = [], [], 0
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        if sentence.strip():
            piece.append(sentence)
            count += len(tokenizer(sentence, add_special_tokens=False)["input_ids"])
        if count >= size:
            pieces, piece, count = pieces + [" ".join(piece)], [], 0
    return pieces if pieces or not piece else [" ".join(piece)]


def render(row, tokenizer):
    """(prompt up to the assistant's turn, gold text, whether a call is wanted) of a tool row.
    Needs: Problem, opened, prompt_of, to_record."""
    from eval_toolcall import opened, prompt_of, to_record
    try:
        record = to_record(row)
        prompt, _ = prompt_of(record, tokenizer)
    except ValueError as e:  # RowError and CallError
        raise Problem(f"a tool row cannot be used: {e}") from None
    return prompt, (record["gold"] or "").removeprefix(opened(prompt)), bool(record["calls"])


def tool_texts(rows, tokenizer, n, recipe, rng):
    """n texts from tool rows. Departure 6: half are whole prompts up to the assistant's turn, the
    place where latents are ranked and patched, half the same dialogues with their answer, cut at a
    random blank; few rows are used again and again. recipe "paper": the ends of chunks of about 30
    tokens, and nothing else. Needs: chunks, render."""
    if recipe == "paper" or "text" in rows[0]:
        whole = [row.get("text") or "\n".join(render(row, tokenizer)[:2]) for row in rows]
        return [c for text in whole for c in chunks(text, tokenizer)][:n]
    rendered = [render(row, tokenizer) for row in rows]
    prompts = [rendered[i % len(rendered)][0] for i in range(n // 2)]
    cuts = []
    for i in range(n - len(prompts)):
        prompt, gold, _ = rendered[i % len(rendered)]
        blanks = [m.start() for m in re.finditer(r"\s", prompt + gold)]
        cuts.append((prompt + gold)[:rng.choice(blanks)])
    return prompts + cuts


def plain_texts(rows, tokenizer, n):
    """n chunks of plain rows. Needs: chunks."""
    return [c for row in rows for c in chunks(row["text"], tokenizer)][:n]


def corpus(tool_rows, plain_rows, tokenizer, n, recipe, seed, n_dev=300):
    """{name: texts}: "train" (n tool and n plain texts), and from the dev rows "needs" and "none"
    (prompts that do and do not need a tool, in the same template), "tool" and "plain" (made the
    same way whatever recipe and seed, so that runs can be compared).
    Needs: Problem, plain_texts, render, split_of, tool_texts."""
    import random

    def rows_of(split):
        tools = [row for row in tool_rows if split_of(row) == split]
        plains = [row for row in plain_rows if split_of(row) == split]
        if min(len(tools), len(plains)) < 2:
            raise Problem(f"{len(tools)} tool and {len(plains)} plain rows for {split}: too few, "
                          f"give longer files or raise --n-texts")
        if not all(isinstance(row.get("text"), str) for row in plains):
            raise Problem('every plain row must hold a "text": see --plain-texts')
        return tools, plains
    (tools, plains), (dev_tools, dev_plains) = rows_of("train"), rows_of("dev")
    prompts = [render(row, tokenizer) for row in dev_tools if "text" not in row][:2 * n_dev]
    return {
        "train": tool_texts(tools, tokenizer, n, recipe, random.Random(seed))
        + plain_texts(plains, tokenizer, n),
        "tool": tool_texts(dev_tools, tokenizer, n_dev, "dfc", random.Random(0)),
        "plain": plain_texts(dev_plains, tokenizer, n_dev),
        "needs": [prompt for prompt, _, wanted in prompts if wanted],
        "none": [prompt for prompt, _, wanted in prompts if not wanted]}


def fingerprint(folder):
    """What a model folder holds, weights and tokenizer included, as a short hash."""
    digest = hashlib.sha256()
    kinds = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")
    for file in sorted(p for p in folder.iterdir() if p.suffix in kinds):
        digest.update(file.name.encode())
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def collect_pair(name_a, name_b, texts, layer, positions, cache, device, get_model=load_model):
    """Both models' vectors for the same token ids (A's tokenizer) -> x_NMD, fp16 on the CPU.

    Kept in `cache` as one array, under a key of everything that changes it; written under another
    name until whole, so what is there is complete. get_model: load_model, or one that remembers.
    Needs: Problem, collect, fingerprint, load_model, load_part, resolve."""
    folders = [resolve(name_a), resolve(name_b)]
    manifest = {"format": 1, "models": [fingerprint(f) for f in folders], "layer": layer,
                "positions": positions, "dtype": "bf16" if device == "cuda" else "fp32",
                "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]}
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    home = Path(cache) / key
    if (home / "manifest.json").is_file():
        try:
            return torch.from_numpy(np.load(home / "x.npy"))
        except (ValueError, EOFError, OSError):  # damaged from outside: collect again
            shutil.rmtree(home)
    from transformers import AutoConfig
    widths = [load_part(AutoConfig, n).get_text_config().hidden_size for n in (name_a, name_b)]
    if widths[0] != widths[1]:
        raise Problem(f"widths differ: {name_a} has {widths[0]}, {name_b} has {widths[1]}")
    sides, tokenizer = [], None
    for name in (name_a, name_b):
        model, own = get_model(name, device)
        tokenizer = tokenizer or own
        if own.get_vocab() != tokenizer.get_vocab():
            raise Problem(f"{name_a} and {name_b} differ in vocabulary: token ids must agree")
        sides.append(collect(model, tokenizer, texts, [layer], positions)[layer])
    x_NMD, unfinished = torch.stack(sides, 1), Path(cache) / f"{key}.part{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        np.save(unfinished / "x.npy", x_NMD.numpy())
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
        unfinished.rename(home)
    except OSError as e:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not home.exists():  # else another run was faster
            raise Problem(f"cannot keep activations in {cache} ({e.strerror or e}): free space, or "
                          f"give --out on another disk") from None
    return x_NMD


# ---------------------------------------------------------------------------------------------
# 4. Training, saving, loading
# ---------------------------------------------------------------------------------------------


def lr_at(step, steps):
    """Factor of the learning rate: 5 % warm-up, constant, linear to zero over the last 20 %."""
    return min(1, (step + 1) / max(1, .05 * steps), (steps - step) / max(1, .2 * steps))


def batch_indices(n, batch, step, seed):
    """Indices of one batch: consecutive stretches of a permutation that is new in every epoch; a
    function of step and seed alone, so that a resumed run continues where it was.
    Needs: permutation."""
    batch = min(batch, n)
    epoch, place = divmod(step, n // batch)
    return permutation(n, seed * 1_000_003 + epoch)[place * batch:(place + 1) * batch]


@functools.lru_cache(maxsize=1)  # drawn once an epoch, not in every step
def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def train(cc, x_NMD, steps, batch=1024, lr=1e-4, l1_shared=2e-5, l1_excl=2e-5, seed=0, recipe="dfc",
          aux=1 / 32, dead_after=100, checkpoint=None, every=500):
    """Fit a crosscoder to raw vectors x_NMD on its device; returns {term: mean share of the loss}.

    steps of `batch` vectors with Adam at lr (paper: 9,000 of 1,024 at 1e-4), gradient norm clipped
    at 1; on CUDA the encoder's product, and with it the choice and the values of f, is bf16, the
    rest fp32. l1_shared and l1_excl are the lambdas of l1_loss, aux the weight of aux_loss; a
    latent silent for dead_after steps counts as dead. recipe "paper": L1 as a mean over all
    latents, no revival, constant rate. checkpoint: a file to continue from and to write every
    `every` steps. The shares are taken over the last tenth. Needs: aux_loss, batch_indices,
    l1_loss, lr_at, reconstruct, where_true, write."""
    from tqdm import tqdm
    device, published = x_NMD.device, recipe == "paper"
    cc.confine(cc.W_enc.data, cc.W_dec.data)
    opt = torch.optim.Adam(cc.parameters(), lr=lr, fused=True)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    pre_BL = torch.empty(min(batch, len(x_NMD)), len(cc.b_enc), dtype=kind, device=device)
    silent, begin = torch.zeros(len(cc.b_enc), dtype=torch.long, device=device), 0
    weight = torch.full((len(cc.b_enc),), l1_shared, device=device)
    weight[:cc.n_a + cc.n_b] = l1_excl
    shares, look = torch.zeros(3, device=device), 50  # look: a glance at the state every 50 steps
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        cc.load_state_dict(state["cc"])
        opt.load_state_dict(state["opt"])
        silent, shares, begin = state["silent"], state["shares"], state["step"]
    bar = tqdm(range(begin, steps), initial=begin, total=steps, desc="train", leave=False)
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = lr if published else lr * lr_at(step, steps)
        chosen = batch_indices(len(x_NMD), batch, step, seed).to(device, non_blocking=True)
        z_BMD = cc.normalise(x_NMD[chosen])
        with torch.no_grad():  # Sparse brings the gradients
            parts = (t.to(kind) for t in (cc.b_enc, z_BMD.flatten(1), cc.W_enc.flatten(0, 1)))
            top = torch.addmm(*parts, out=pre_BL).topk(cc.k, dim=-1, sorted=False)
        zhat_BMD, f_Bk = reconstruct(cc, z_BMD, (top.values.relu(), top.indices))
        zhat_BMD = zhat_BMD + cc.b_dec
        mean_L = torch.zeros_like(weight).index_add(0, top.indices.flatten(),
                                                    f_Bk.flatten() / len(f_Bk))
        terms = [(z_BMD - zhat_BMD).pow(2).mean(), *z_BMD.new_zeros(2)]
        if published:
            terms[1] = (weight * mean_L).mean()
        else:
            terms[1] = l1_loss(mean_L, cc.W_dec.flatten(1).norm(dim=1), weight)
            silent = (silent + 1) * (mean_L == 0)
            if step % look == 0 or step == begin:  # all that can be dead before the next look
                candidates = where_true(cc, silent > dead_after - look)
            terms[2] = aux * aux_loss(cc, z_BMD, zhat_BMD, pre_BL, silent > dead_after, candidates)
        opt.zero_grad()
        sum(terms).backward()
        cc.confine(cc.W_enc.grad, cc.W_dec.grad)
        nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        opt.step()
        if step >= int(.9 * steps):
            shares += torch.stack(terms).detach()
        if step % look == 0:
            bar.set_postfix(mse=f"{terms[0].item():.4f}")
        if checkpoint and (step + 1) % every == 0:
            write(checkpoint, lambda file: torch.save({
                "cc": cc.state_dict(), "opt": opt.state_dict(), "silent": silent, "shares": shares,
                "step": step + 1}, file))
    return dict(zip(("mse", "l1", "aux"), (shares / shares.sum()).tolist()))


def write(path, save_to):
    """Write a file under another name first, so that what bears its name is always whole.
    Needs: Problem, first_line."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        save_to(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        raise Problem(f"cannot write {path} ({first_line(e)}): free space, or use another disk") \
            from None


def save(cc, folder, **more):
    """model.safetensors and config.json, in the authors' names and shapes plus mean and scale.
    Needs: write."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    config = {"activation_dim": cc.b_dec.shape[1], "dict_size": len(cc.b_enc), "k": cc.k,
              "n_a": cc.n_a, "n_b": cc.n_b, "tied": cc.tied, **more}
    tensors = {name: t.detach().cpu().contiguous() for name, t in cc.state_dict().items()}
    write(folder / "model.safetensors", lambda file: save_file(tensors, file))
    write(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=1)))


def load(name, device="cpu"):
    """A crosscoder from a run folder or from the hub; the paper's checkpoints too (model.pt, read
    without executing anything; mean 0 and scale 1). Raises Problem.
    Needs: Crosscoder, Problem, first_line, resolve."""
    folder = resolve(name)
    try:
        config = json.loads((folder / "config.json").read_text())
        if (folder / "model.safetensors").exists():
            from safetensors.torch import load_file
            state = load_file(folder / "model.safetensors")
        else:
            state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        mask = state.get("dec_mask", torch.ones(len(state["b_enc"]), 2)).float()
        n_a, n_b = int((mask[:, 1] == 0).sum()), int((mask[:, 0] == 0).sum())
        cc = Crosscoder(state["b_dec"].shape[1], len(mask), config["k"], n_a, n_b,
                        config.get("tied", False))
        if not torch.equal(cc.dec_mask, mask):
            raise ValueError("its latents are not ordered A-exclusive, B-exclusive, shared")
        state = dict(cc.named_buffers()) | state  # what an older file lacks: mean, scale, masks
        cc.load_state_dict({n: t.float() for n, t in state.items()})
    except Exception as e:  # truncated, foreign, pickled code, other shapes: a dozen types
        raise Problem(f"{name} holds no crosscoder that can be read: {first_line(e)}") from None
    return cc.to(device)


# ---------------------------------------------------------------------------------------------
# 5. The main job
# ---------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
PRESETS = {  # which models, data, layer and sizes
    "tiny": dict(model_a=f"{HERE}/tiny/toolrl", model_b=f"{HERE}/tiny/base", layer=3,
                 tool_texts=f"{HERE}/tiny/tools.jsonl", plain_texts=f"{HERE}/tiny/text.jsonl",
                 n_texts=3000, dict=512, k=8, excl=.1, excl_b=0., tie_shared=True, steps=1200,
                 batch=512, lr=1e-3),
    "paper": dict(model_a="chengq9/ToolRL-Qwen2.5-3B", model_b="Qwen/Qwen2.5-3B", layer=13,
                  tool_texts="emrecanacikgoz/ToolRL",
                  plain_texts="HuggingFaceFW/fineweb:sample-10BT",
                  n_texts=40_000, dict=8192, k=45, excl=.1, excl_b=.1, tie_shared=True, steps=9000,
                  batch=1024, lr=1e-4),
}
L1 = {"dfc": 2e-5, "paper": 1e-3}  # default lambdas: 1 to 10 % of the loss; as published


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise Problem(f"{message} (see --help)")


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value
    return parse


def parse_args(argv):
    p = Parser(prog="dfc.py", description="Train a Dedicated Feature Crosscoder on two models.")
    whole, share, weight = number(int, 1), number(float, 0, .5), number(float, 0)
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="models, data, layer, sizes")
    p.add_argument("--recipe", choices=L1, default="dfc", help="how to train; paper = as published")
    p.add_argument("--model-a", help="the RL-tuned model: a folder or a hub name")
    p.add_argument("--model-b", help="its base; the same as --model-a for the null experiment")
    p.add_argument("--tool-texts", help=".jsonl of tool rows, .txt, or hub dataset[:config]")
    p.add_argument("--plain-texts", help="the same with plain texts")
    p.add_argument("--n-texts", type=whole, help="training texts of each of the two kinds")
    p.add_argument("--layer", type=number(int, 0), help="output of this block, counted from 0")
    p.add_argument("--positions", choices=["last", "all"], default="last", help="vectors per text")
    p.add_argument("--dict", type=whole, help="latents L")
    p.add_argument("--k", type=whole, help="active latents per pair of vectors")
    p.add_argument("--excl", type=share, help="A-exclusive share of latents; 0 = plain crosscoder")
    p.add_argument("--excl-b", type=share, help="B-exclusive share (default: as --excl, where that "
                   "is given or the recipe is paper; else the preset's)")
    p.add_argument("--tie-shared", action=argparse.BooleanOptionalAction,
                   help="one decoder row for both models in shared latents")
    p.add_argument("--l1-shared", type=weight, help="lambda of the shared latents")
    p.add_argument("--l1-excl", type=weight, help="lambda of the exclusive latents")
    p.add_argument("--steps", type=whole, help="training steps")
    p.add_argument("--batch", type=whole, help="vectors in a step")
    p.add_argument("--lr", type=weight, help="highest learning rate of Adam")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of weights, texts and batches")
    p.add_argument("--out", type=Path, help="run folder (default: runs/NAME); activations are kept "
                   "beside it, in cache/")
    p.add_argument("--resume", action="store_true", help="continue a killed run, skip a whole one")
    return settle(p.parse_args(argv))


def settle(args):
    """Fill in what was not asked for: the recipe's word goes before the preset's."""
    preset = dict(PRESETS[args.preset])
    if args.excl is not None or args.recipe == "paper":
        preset["excl_b"] = preset["excl"] if args.excl is None else args.excl
    if args.recipe == "paper" or args.excl == 0:
        preset["tie_shared"] = False  # tied and without exclusive latents, A and B could not differ
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("l1_shared", "l1_excl"):
        if getattr(args, name) is None:
            setattr(args, name, L1[args.recipe])
    for name in ("model_a", "model_b"):  # one spelling of a folder, so that runs can be compared
        if Path(getattr(args, name)).is_dir():
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    if args.k > args.dict:
        raise Problem(f"--k {args.k} is larger than the dictionary, --dict {args.dict}: lower it")
    if args.tie_shared and not args.excl + args.excl_b:
        raise Problem("--tie-shared without exclusive latents leaves no room for a difference")
    args.out = args.out or Path("runs") / run_name(args)
    return args


def run_name(args):
    """The published name of a setting (dfc-D8k-excl10-k45), then what is ours. Other models, texts
    or steps need their own --out."""
    exclusive = args.excl + args.excl_b > 0
    size = f"D{args.dict}" if args.dict % 1024 or args.dict < 8192 else f"D{args.dict // 1024}k"
    name = f"dfc-{size}-excl{100 * args.excl:g}" if exclusive else f"cc-{size}"
    name += "-freeexcl" * (exclusive and args.l1_excl == 0) + "-nol1" * (args.l1_shared == 0)
    name += f"-k{args.k}" + f"-b{100 * args.excl_b:g}" * (args.excl_b != args.excl)
    name += "-tied" * args.tie_shared + "-paper" * (args.recipe == "paper")
    return name + f"-layer{args.layer}-seed{args.seed}"


CONTRASTS = {"needs/none": ("needs", "none"), "tool/plain": ("tool", "plain")}


@torch.no_grad()
def measure(cc, sets, shares):
    """The figures of the report, from {name: x_NMD}: FVE on dev texts made as the training texts
    are, L0 and live latents on the training texts."""
    codes = {name: torch.cat([cc.encode(v.to(cc.b_dec.device)).cpu() for v in x.split(1024)])
             for name, x in sets.items() if name != "train"}
    rate = sum(cc.encode(v.to(cc.b_dec.device)).gt(0).float().sum(0)
               for v in sets["train"].split(1024)) / len(sets["train"])
    held_out = torch.cat([sets["tool"], sets["plain"]]).float().to(cc.b_dec.device)
    explained = fve(held_out, torch.cat([cc(v)[0] for v in held_out.split(1024)])).tolist()
    out = {"fve": dict(zip("AB", explained)), "l0": {}, "live": {}, "loss_share": shares,
           "ranking": {}}
    for name, part in cc.partitions().items():
        out["l0"][name] = rate[part].sum().item()
        out["live"][name] = (rate[part] > 0).float().mean().item() if len(rate[part]) else 0.
        out["ranking"][name] = {
            contrast: rank_latents(codes[p], codes[q], part)[:5]
            for contrast, (p, q) in CONTRASTS.items() if min(len(codes[p]), len(codes[q])) > 1}
    return out


def report(args, m):
    """The result as a few aligned lines."""
    c, (a, b) = m["counts"], (os.path.relpath(n) if Path(n).exists() else n
                              for n in (args.model_a, args.model_b))
    print(f"pair      A {a}   B {b}   layer {args.layer}, width {c['width']}")
    print(f"data      {c['train']} vectors, {c['outliers']} left out as outliers; dev: "
          + ", ".join(f"{c[n]} {n}" for n in ("needs", "none", "tool", "plain")))
    tied = "tied" if args.tie_shared else "untied"
    print(f"latents   {args.dict}, k {args.k}, A-exclusive {c['n_a']}, B-exclusive {c['n_b']}, "
          f"shared {tied}, recipe {args.recipe}, seed {args.seed}")
    print(f"FVE       A {m['fve']['A']:.3f}   B {m['fve']['B']:.3f}   (dev)")
    for title, key in (("L0", "l0"), ("live", "live")):
        print(f"{title:10s}" + "   ".join(f"{NAMES[n]} {v:.2f}" for n, v in m[key].items()))
    print("loss      " + "   ".join(f"{n} {100 * v:.1f} %" for n, v in m["loss_share"].items()))
    print(f"seconds   collect {m['seconds']['collect']:.0f}   train {m['seconds']['train']:.0f}")
    for part in ("a_excl", "shared"):
        for contrast, rows in m["ranking"][part].items():
            if rows:
                print(f"\n{NAMES[part] + ', ' + contrast:28s} latent      d   AUROC   "
                      f"fires on {contrast}")
            for r in rows:
                print(f"{'':28s} {r['feature_idx']:6d} {r['cohens_d']:6.2f}  {r['auroc']:6.3f}   "
                      f"{r['fire_rate_tool']:.2f} / {r['fire_rate_nontool']:.2f}")


def software():
    import transformers
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
            "transformers": transformers.__version__}


def gather(args, device, with_train=True):
    """Texts, then both models' vectors for them -> ({set: x_NMD}, outliers taken out of "train");
    with_train False: the dev sets alone."""
    from transformers import AutoTokenizer
    tool = read_rows(args.tool_texts)
    plain = read_rows(args.plain_texts, 2 * args.n_texts)
    tokenizer = load_part(AutoTokenizer, args.model_a)
    sets = corpus(tool, plain, tokenizer, args.n_texts, args.recipe, args.seed)
    train_texts = sets.pop("train")
    wanted = [([t for texts in sets.values() for t in texts], "last")]
    if with_train:
        wanted.append((train_texts, args.positions))
    get_model = functools.cache(load_model)  # both models once, for all the texts
    x = [collect_pair(args.model_a, args.model_b, texts, args.layer, where,
                      args.out.parent / "cache", device, get_model) for texts, where in wanted]
    out = dict(zip(sets, x[0].split([len(texts) for texts in sets.values()])))
    if not with_train:
        return out, 0
    norms = x[1].float().norm(dim=2)
    keep = (norms <= 10 * norms.median(0).values).all(1)  # attention sinks: a few huge vectors
    return out | {"train": x[1][keep]}, int((~keep).sum())


def start(args, x_NMD):
    """The crosscoder before training, on the device of its vectors."""
    torch.manual_seed(args.seed)
    n_a, n_b = int(args.excl * args.dict), int(args.excl_b * args.dict)
    cc = Crosscoder(x_NMD.shape[2], args.dict, args.k, n_a, n_b, args.tie_shared).to(x_NMD.device)
    cc.fit_scale(x_NMD)
    if args.recipe == "paper":
        with torch.no_grad():  # published: encoder and decoder drawn independently, no fair start
            cc.W_enc.normal_(std=cc.W_enc.std().item())
    else:
        cc.fair_start(x_NMD[batch_indices(len(x_NMD), 4096, 0, args.seed).to(x_NMD.device)])
    return cc


def run(args):
    """Collect, train, save and report; returns the metrics."""
    done, checkpoint = args.out / "metrics.json", args.out / "checkpoint.pt"
    if done.exists() or checkpoint.exists():
        if not args.resume:
            raise Problem(f"{args.out} holds a run: --resume continues it, --out starts another")
        check_same(args)
        if done.exists():
            print(f"{args.out} is finished; nothing to do")
            return json.loads(done.read_text())
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    config = as_json(args)
    write(args.out / "run.json", lambda f: f.write_text(json.dumps(config, indent=1)))
    sets, outliers = gather(args, device)
    collected, x = time.time(), sets["train"].to(device)
    cc = start(args, x)
    shares = train(cc, x, args.steps, args.batch, args.lr, args.l1_shared, args.l1_excl, args.seed,
                   args.recipe, checkpoint=checkpoint)
    trained = time.time()
    m = measure(cc, sets, shares)
    m |= {"seconds": {"collect": collected - began, "train": trained - collected},
          "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
          "versions": software(), "seed": args.seed, "config": config,
          "counts": {n: len(s) for n, s in sets.items()} | {
              "outliers": outliers, "width": x.shape[2], "n_a": cc.n_a, "n_b": cc.n_b}}
    save(cc, args.out, layer=args.layer, recipe=args.recipe)
    write(done, lambda f: f.write_text(json.dumps(m, indent=1)))
    checkpoint.unlink(missing_ok=True)
    report(args, m)
    print(f"\nsaved {args.out}")
    return m


def as_json(args):
    """The settings as run.json holds them."""
    return json.loads(json.dumps(vars(args), default=str))


def check_same(args):
    """A run is continued only with the settings it was begun with."""
    before, now = json.loads((args.out / "run.json").read_text()), as_json(args)
    other = [n for n in now if n not in ("resume", "out") and before.get(n) != now[n]]
    if other:
        raise Problem(f"{args.out} was begun with another {', '.join(other)}: use the same, or "
                      f"another --out")


def cli(main, argv=None):
    """Run a program's main; what the user can mend is one line on stderr and status 2."""
    try:
        main(argv)
        return 0
    except Problem as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"{Path(sys.argv[0]).name}: {e.strerror or e}: {e.filename or ''} (is it there? "
              f"space? permission?)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here (dfc.py with --resume)",
              file=sys.stderr)
        return 130


def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli(main))
