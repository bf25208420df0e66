"""dfc: what did reinforcement learning add to a model? Ask a Dedicated Feature Crosscoder.

Model A is an RL-tuned language model that calls tools, B the frozen base it came from. Run both
over the same texts, take the residual stream at one layer, and learn ONE sparse dictionary for the
pair. Some latents may read and write A only, some (by default none) B only, the rest are shared and
write the same into both: what RL added has to go through the A-exclusive ones. (arXiv 2606.26474;
the DFC is from arXiv 2602.11729.)

    z_m    = (x_m - mean_m) / scale_m                (1) one vector per model m, mean square 1;
                                                         what the paper calls z is f here
    pre    = sum_m z_m W_enc[m] + b_enc              (2) forbidden (m, latent) weights are zero
    f      = the k largest of pre, if above 0        (3) all others are zero: relu, then top k
    zhat_m = sum_l f_l W_dec[l, m] + b_dec[m]        (4) and xhat_m = zhat_m scale_m + mean_m
    loss   = mean (z - zhat)^2                       (5)
             + sum_l lambda_l f_l ||W_dec[l]||       (6) L1, in the form of [d]
             + revival of dead latents               (7)

    latents = [ A-exclusive: n_a | B-exclusive: n_b | shared ]     n = share * L, rounded down
    n_a = n_b = 0 is the plain crosscoder; a share of 0.5 is two sparse autoencoders in one top k.

Shapes, named by suffix (x_BMD): B vectors in a batch, N in all, M = 2 models (0 = A, 1 = B),
D residual width, L latents, k active ones, T tokens, E = M D (a pair laid end to end).

    python dfc.py                          # the embedded pair: half a minute on 2 CPU cores
    python dfc.py --dict 8192 --k 45       # the paper's smaller dictionary on it: a minute
    python dfc.py --excl 0                 # the plain crosscoder
    python dfc.py --recipe paper           # trained the published way, for comparison
    python dfc.py --preset smol            # a real language model, made by extras/smol.py
    python dfc.py --preset paper           # Qwen2.5-3B against ToolRL-Qwen2.5-3B (a GPU, the hub)

Where we leave the paper is marked, with the reason: [a] shared latents are tied, [b] all latents
start with equal chances, [c] mean and scale are kept, one scale a model, [d] L1 is a sum, [e] dead
latents are revived, [f] the learning rate falls, [g] whole prompts are among the texts. --recipe
paper undoes all of it, but keeps mean and scale. Sections 1 to 4 are the method.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from itertools import count, cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, logging

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded pair


# ---- 1. Settings ---------------------------------------------------------------------------------
def option(default, text):
    """A setting: its value for the embedded pair, and what it is."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """All that a run depends on. Each is an option of dfc.py (n_texts is --n-texts) and is saved in
    the run's metrics.json. Written here are the values of --preset tiny and --recipe dfc."""

    preset: str = option("tiny", "which models, texts, layer and sizes; smol's: extras/smol.py")
    recipe: str = option("dfc", "how to train: as this file says (dfc), or as published (paper)")
    out: str = option("", "run folder; none: runs/ and what was asked for")

    model_a: str = option(f"{TINY}/toolrl", "the RL-tuned model: a folder or a hub name")
    model_b: str = option(f"{TINY}/base", "its base; for the null experiment A once more")
    tool_texts: str = option(f"{TINY}/tools.jsonl", "tool rows: a .jsonl file or a dataset")
    plain_texts: str = option(f"{TINY}/text.jsonl", "rows of plain text, likewise")
    n_texts: int = option(3000, "training texts of each of the two kinds, at most")
    layer: int = option(2, "vectors are the output of this block, counted from 0")
    max_new: int = option(64, "longest answer of the evaluation, in tokens")

    dict: int = option(512, "latents L: the dictionary's size")
    k: int = option(8, "active latents per pair of vectors")
    excl: float = option(.1, "A-exclusive share of the latents; 0 = the plain crosscoder")
    steps: int = option(1200, "training steps")
    batch: int = option(512, "pairs of vectors in a step")
    lr: float = option(1e-3, "highest learning rate of Adam")
    seed: int = option(0, "of weights, texts and batches")

    excl_b: float = option(0., "B-exclusive share; with --recipe paper as large as A's")
    tie_shared: bool = option(True, "one decoder row for both models in shared latents")
    l1_shared: float = option(2e-5, "lambda of shared latents, in (6)")
    l1_excl: float = option(2e-5, "lambda of exclusive latents")

    @property
    def n_a(self):
        return latents_in(self.excl, self.dict)

    @property
    def n_b(self):
        return latents_in(self.excl_b, self.dict)


PRESETS = {  # the options that each stands for
    "tiny": "",
    "smol": "--model-a runs/smollm2/toolrl --model-b runs/smollm2/base --n-texts 6000 "
            "--plain-texts runs/smollm2/plain.jsonl --layer 28 --dict 1024 --k 16",
    "paper": "--model-a chengq9/ToolRL-Qwen2.5-3B --model-b Qwen/Qwen2.5-3B --n-texts 40000 "
             "--tool-texts emrecanacikgoz/ToolRL --plain-texts HuggingFaceFW/fineweb:sample-10BT "
             "--layer 13 --max-new 512 --dict 8192 --k 45 --steps 9000 --batch 1024 --lr 1e-4"}
RECIPES = {  # likewise; what no option can say is where `recipe` or `published` stands below
    "dfc": "",
    "paper": "--no-tie-shared --l1-shared 1e-3 --l1-excl 1e-3"}


# ---- 2. The crosscoder ---------------------------------------------------------------------------
class Crosscoder(nn.Module):
    """A sparse dictionary over pairs of vectors, some latents confined to one model (Figure 1). The
    forward pass needs no mask: forbidden weights begin at zero, confine() keeps their gradients at
    zero, and so Adam leaves them there.

    [a] tied: a shared latent writes one row into both models. Untied, a difference between A and B
    can hide in a shared latent; tied and n_b = 0, it has nowhere to go but the A-exclusive ones."""

    def __init__(self, d_model, n_latents, k, n_a=0, n_b=0, tied=False):
        super().__init__()
        if not 1 <= k <= n_latents or min(n_a, n_b) < 0 or n_a + n_b > n_latents:
            raise ValueError(f"k {k}, exclusive {n_a} + {n_b} do not fit into {n_latents} latents")
        self.k = k
        self.n_a = n_a
        self.n_b = n_b
        self.tied = tied
        shared = slice(n_a + n_b, n_latents)

        # decoder: random rows of length 1
        W_dec = F.normalize(torch.randn(n_latents, 2, d_model), dim=-1)
        if tied:
            W_dec[shared] = W_dec[shared, :1]

        # encoder [b]: a latent begins by reading what it writes. A shared one reads both models,
        # so it is halved: pre = (z_A . row_A + z_B . row_B) / 2, the mean over the models. What
        # is still unequal between the partitions, fair_start() makes equal
        W_enc = W_dec.permute(1, 2, 0).contiguous()
        W_enc[..., shared] /= 2

        self.confine(W_enc, W_dec)
        self.W_enc = nn.Parameter(W_enc)                             # (M, D, L)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))            # (L,)
        self.W_dec = nn.Parameter(W_dec)                             # (L, M, D)
        self.b_dec = nn.Parameter(torch.zeros(2, d_model))           # (M, D)
        self.register_buffer("mean", torch.zeros(2, d_model))        # (M, D)
        self.register_buffer("scale", torch.ones(2, d_model))        # (M, D)

    def parts(self):
        """{name: slice of latents}, in the order in which they lie; empty ones are left out."""
        a, b, end = self.n_a, self.n_a + self.n_b, len(self.b_enc)
        parts = {"A-exclusive": slice(0, a), "B-exclusive": slice(a, b), "shared": slice(b, end)}
        return {name: part for name, part in parts.items() if part.start < part.stop}

    @torch.no_grad()
    def confine(self, W_enc, W_dec):
        """In place, on the weights before training and on their gradients in each step: what may
        not be read or written becomes zero, tied rows become their mean."""
        a, b = self.n_a, self.n_a + self.n_b
        W_enc[1, :, :a] = 0   # A-exclusive latents do not read B
        W_dec[:a, 1] = 0      # and do not write into it
        W_enc[0, :, a:b] = 0  # nor do B-exclusive ones with A
        W_dec[a:b, 0] = 0
        if self.tied:
            W_dec[b:] = W_dec[b:].mean(1, keepdim=True)

    def normalise(self, x_BMD):
        """(1) Raw activations -> zero mean, mean square one per model."""
        return (x_BMD.float() - self.mean) / self.scale

    def preactivate(self, z_BMD):
        """(2) Normalised vectors -> pre_BL."""
        return torch.addmm(self.b_enc, z_BMD.flatten(1), self.W_enc.flatten(0, 1))

    def encode(self, x_BMD):
        """(1) to (3): raw activations -> f_BL, zero but for the k largest of each pair."""
        pre_BL = self.preactivate(self.normalise(x_BMD))
        f_Bk, index_Bk = keep_largest(pre_BL, self.k)
        return torch.zeros_like(pre_BL).scatter(1, index_Bk, f_Bk)

    def decode_normalised(self, f_BL):
        """(4) f_BL -> zhat_BMD."""
        return torch.einsum("bl,lmd->bmd", f_BL, self.W_dec) + self.b_dec

    def decode(self, f_BL):
        """f_BL -> xhat_BMD in raw activation units."""
        return self.decode_normalised(f_BL) * self.scale + self.mean

    def forward(self, x_BMD):
        f_BL = self.encode(x_BMD)
        return self.decode(f_BL), f_BL

    @torch.no_grad()
    def fit_scale(self, x_NMD, each=False):
        """[c] Keep the training vectors' mean and root mean square, so that encode() takes and
        decode() returns raw activations. Published, both are lost before the evaluation. One scale
        for all coordinates of a model: directions stay as they are. each: one for each coordinate,
        as published (there of each corpus apart, which one crosscoder cannot keep)."""
        self.mean.copy_(x_NMD.float().mean(0))
        self.scale.copy_((x_NMD - self.mean).pow(2).mean((0, 2))[:, None].sqrt())
        if each:
            self.scale *= self.normalise(x_NMD).std(0).clamp(min=1e-6)

    @torch.no_grad()
    def fair_start(self, x_BMD):
        """[b] Give the pre-activations of all partitions the same spread, that of the last one (the
        shared latents, if there are any). An exclusive latent reads one model where a shared one
        reads two; drawn as published it is at first picked less often, by a factor of several or
        of dozens."""
        pre_BL = self.preactivate(self.normalise(x_BMD))
        parts = list(self.parts().values())
        spread = [pre_BL[:, part].std().clamp(min=1e-8) for part in parts]
        for part, own in zip(parts, spread):
            self.W_enc[..., part] *= spread[-1] / own


def keep_largest(pre_BL, k):
    """(3) The k largest of each row, none below zero: (f_Bk, index_Bk)."""
    largest = pre_BL.topk(k, dim=-1, sorted=False)
    return largest.values.relu(), largest.indices


def decode_active(f_Bk, index_Bk, W_dec):
    """(4) less b_dec -> zhat_BMD. The same as decode_normalised(), but only the rows of the k
    active latents are fetched and summed: L / k times less work."""
    zhat_BE = F.embedding_bag(
        index_Bk, W_dec.flatten(1), per_sample_weights=f_Bk.float(), mode="sum")
    return zhat_BE.unflatten(1, W_dec.shape[1:])


# ---- 3. Losses and the training loop -------------------------------------------------------------
def l1_penalty(mean_L, lambda_L, W_dec):
    """(6), with mean_L the mean of f over the batch. [d]

    Ours: a sum over latents, each weighed by the length of its row, or f could be shrunk for free
    by longer rows. lambda = 2e-5 makes it 1 to 10 % of the loss.
    The paper's formula is the sum of f. --recipe paper takes the mean over latents, as the authors'
    code does (whose exclusive term counts shared latents, too): with lambda = 1e-3 that is 0.1 % of
    the loss."""
    return (lambda_L * mean_L * W_dec.flatten(1).norm(dim=1)).sum()


def aux_loss(cc, z_BMD, zhat_BMD, pre_BL, dead_L):
    """(7) [e] Revive dead latents: let them explain what the living leave over (AuxK, arXiv
    2406.04093 A.2):

        sum over partitions of  mean (z - zhat - sum_l f_l W_dec[l])^2
        f: the 2 k largest of the partition's dead latents; mean over the models that it writes

    z - zhat is detached: the dead learn from the error and do not push the living. Each partition
    has places of its own, or the many shared latents would win them all. A latent whose pre is
    below 0 on all of these vectors learns nothing in this step."""
    writes = {"A-exclusive": slice(0, 1), "B-exclusive": slice(1, 2), "shared": slice(0, 2)}
    some = 1 + len(z_BMD) // 4  # a quarter of the batch: the whole of it revived no more latents
    residual_BMD = (z_BMD - zhat_BMD).detach()[:some]

    total = z_BMD.new_zeros(())
    for name, part in cc.parts().items():
        dead = part.start + dead_L[part].nonzero()[:, 0]
        if not len(dead):
            continue
        f_Bk, place_Bk = keep_largest(pre_BL[:some, dead], min(len(dead), 2 * cc.k))
        guess_BMD = decode_active(f_Bk, dead[place_Bk], cc.W_dec)
        total += (residual_BMD - guess_BMD)[:, writes[name]].pow(2).mean()
    return total


def schedule(step, steps):
    """[f] Factor of the learning rate: 5 % warm-up, linear to zero over the last 20 %. A constant
    rate leaves the noise of the last batches in the weights."""
    warm_up = (step + 1) / (.05 * steps)
    decay = (steps - step) / (.2 * steps)
    return min(1, warm_up, decay)


def batches(n, batch, seed):
    """Indices of one batch after another, for ever: every vector at most once an epoch, each epoch
    in a new order; the last vectors of it, too few for a batch, are left out."""
    rng = torch.Generator()
    batch = min(batch, n)
    for epoch in count():
        order = torch.randperm(n, generator=rng.manual_seed(seed * 1_000_003 + epoch))
        yield from order[:n - n % batch].split(batch)


def train(cc, x_NMD, steps, batch=512, lr=1e-3, l1_shared=2e-5, l1_excl=2e-5, seed=0, recipe="dfc",
          aux=1 / 32, dead_after=100):
    """Fit a crosscoder, after fit_scale(), to raw vectors x_NMD on their device -> {term: share of
    the loss} over the last tenth of the steps. l1_*: the lambdas; aux: weight of aux_loss; a latent
    silent for dead_after steps counts as dead. recipe "paper": L1 as a mean over all latents, no
    revival, constant rate. Raises ValueError where training diverges."""
    published = recipe == "paper"
    order = batches(len(x_NMD), batch, seed)
    # bf16 is for the product in (2) alone, in training, and for large dictionaries: the training of
    # a small one must not depend on the kind of device
    bf16 = has_bf16(x_NMD.device) and len(cc.b_enc) >= 4096
    opt = torch.optim.Adam(cc.parameters(), lr=lr, fused=True)
    cc.confine(cc.W_enc, cc.W_dec)  # in case the weights were drawn anew

    lambda_L = torch.full_like(cc.b_enc, l1_shared)
    lambda_L[:cc.n_a + cc.n_b] = l1_excl
    silent_L = torch.zeros_like(lambda_L)  # steps since a latent was active
    total = lambda_L.new_zeros(3)          # of each loss term, over the last tenth

    for step in tqdm(range(steps), "train", leave=False, disable=None):
        # batch
        z_BMD = cc.normalise(x_NMD[next(order).to(x_NMD.device)])

        # forward
        with torch.autocast(x_NMD.device.type, torch.bfloat16, bf16):
            pre_BL = cc.preactivate(z_BMD)
        f_Bk, index_Bk = keep_largest(pre_BL, cc.k)
        zhat_BMD = decode_active(f_Bk, index_Bk, cc.W_dec) + cc.b_dec

        # the mean of f over the batch; a latent with mean 0 was silent
        f_over_B = (f_Bk.float() / len(f_Bk)).flatten()
        mean_L = torch.zeros_like(lambda_L).index_add(0, index_Bk.flatten(), f_over_B)
        silent_L = torch.where(mean_L > 0, 0, silent_L + 1)

        # loss
        mse = (z_BMD - zhat_BMD).pow(2).mean()
        if published:
            l1 = (lambda_L * mean_L).mean()
            revival = torch.zeros_like(mse)
        else:
            l1 = l1_penalty(mean_L, lambda_L, cc.W_dec)
            revival = aux * aux_loss(cc, z_BMD, zhat_BMD, pre_BL, silent_L > dead_after)
        terms = torch.stack([mse, l1, revival])

        # backward
        opt.zero_grad()
        terms.sum().backward()
        cc.confine(cc.W_enc.grad, cc.W_dec.grad)  # tied rows get one gradient: they stay equal
        nn.utils.clip_grad_norm_(cc.parameters(), 1.)

        # step
        if not published:
            opt.param_groups[0]["lr"] = lr * schedule(step, steps)
        opt.step()
        if step >= int(.9 * steps):
            total += terms.detach()

    if not all(t.isfinite().all() for t in (total, *cc.parameters())):
        raise ValueError(f"training diverged, nothing is saved: lower --lr {lr:g}")
    return dict(zip(("mse", "l1", "aux"), (total / total.sum()).tolist()))


def fve(x_BMD, xhat_BMD):
    """Fraction of variance explained per model, (M,): 1 is perfect, predicting the mean gives 0."""
    error_M = (x_BMD - xhat_BMD).double().pow(2).sum((0, 2))
    variance_M = (x_BMD - x_BMD.double().mean(0)).pow(2).sum((0, 2))
    return 1 - error_M / variance_M


# ---- 4. Activations ------------------------------------------------------------------------------
def load_model(name, device):
    """(model, frozen; its tokenizer) of a folder or a hub name. In the precision of its file, for
    rounding could hide what RL changed; in fp32 where the device would be slow at bf16. Raises
    ValueError, also where weights are missing, which the library would draw at random."""
    dtype = "auto" if has_bf16(device) else torch.float32
    with errors_about(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True)
        missing = [*report["missing_keys"], *report["mismatched_keys"]]
        if missing:
            raise ValueError(f"{len(missing)} weights are not in its file, such as {missing[0]}; "
                             f"unused: {sorted(report['unexpected_keys'])[:3]}")
        return model.to(device).eval().requires_grad_(False), tokenizer


def token_ids(tokenizer, texts):
    """Lists of token ids; no token is added, for a chat template has put in its own."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@contextlib.contextmanager
def hooked(model, layer, edit):
    """Within it block `layer`, counted from 0, puts out edit(h_BTD) for h_BTD (paper section 4).
    The blocks (model.model.layers in Llama and Qwen) are found in any model as the first list of
    modules with as many entries as there are layers."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList))
    blocks = next(m for m in lists if len(m) == depth)

    def hook(module, args, out):
        if isinstance(out, tuple):  # some put out more than the residual stream
            return edit(out[0]), *out[1:]
        return edit(out)

    handle = blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class DeepEnough(Exception):
    """Raised in a hook when the layer wanted is done: no more of the pass is needed."""


@torch.no_grad()
def residual_stream(model, ids_BT, layer):
    """h_BTD after block `layer`, and no block or vocabulary head beyond it: layer 13 is
    hidden_states[14]; of the last block it is the output before the final norm."""
    found = []

    def take(h_BTD):
        found.append(h_BTD)
        raise DeepEnough

    with contextlib.suppress(DeepEnough), hooked(model, layer, take):
        model(input_ids=ids_BT, use_cache=False)
    h_BTD = found[0]
    if h_BTD.shape[:-1] != ids_BT.shape:
        raise ValueError(f"a block of {type(model).__name__} puts out {tuple(h_BTD.shape)}, which "
                         "is not (texts, tokens, width)")
    return h_BTD


def batches_by_length(ids, most_tokens):
    """Places of token lists, in batches of like length with at most most_tokens when padded; a
    longer list is a batch of its own."""
    batch = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[i]) > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def longest_text(*models):
    """In tokens: what all models have positions for, at most 4,096."""
    configs = [model.config.get_text_config() for model in models]
    positions = [getattr(config, "max_position_embeddings", 4096) for config in configs]
    return min(4096, *positions)


def collect(model, tokenizer, texts, layer, longest=None):
    """The residual vector at each text's last token -> (N, D) fp16 on the CPU (paper section 3).
    Padding is on the right, where causal attention never looks: the batch does not matter. A text
    of more than `longest` tokens loses its beginning. Raises ValueError."""
    config = model.config.get_text_config()
    longest = longest or longest_text(model)
    ids = [tokens[-longest:] for tokens in token_ids(tokenizer, texts)]
    last = config.num_hidden_layers - 1
    if not 0 <= layer <= last or not all(ids):
        raise ValueError(f"no layer {layer} of 0 to {last}, or a text without a token")

    x_ND = torch.empty(len(ids), config.hidden_size, dtype=torch.float16)
    most_tokens = 8192 if model.device.type == "cuda" else 1024
    for batch in tqdm(list(batches_by_length(ids, most_tokens)), "collect", leave=False,
                      disable=None):
        rows = [torch.tensor(ids[i]) for i in batch]
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        last_B = [len(row) - 1 for row in rows]
        h_BTD = residual_stream(model, ids_BT, layer)
        x_ND[batch] = h_BTD[range(len(rows)), last_B].half().cpu()

    if not x_ND.isfinite().all():
        raise ValueError(f"vectors of layer {layer} are not finite in fp16: try another layer")
    return x_ND


def collect_both(models, tokenizer, texts, layer):
    """collect() of both models, {"A": model, "B": model}, for the same token ids -> x_NMD on their
    device. Raises ValueError."""
    longest = longest_text(*models.values())
    x = [collect(model, tokenizer, texts, layer, longest) for model in models.values()]
    with errors_about("these models as a pair"):  # their widths may differ
        return torch.stack(x, 1).float().to(models["A"].device)


def collect_pair(name_a, name_b, texts, layer, cache, device):
    """collect_both() of two models by their names -> x_NMD, fp16 on the CPU. Kept in a file of the
    folder `cache`, so that 48 settings collect once. Raises ValueError."""
    file = Path(cache) / f"{fingerprint(name_a, name_b, texts, layer, device)}.npy"
    if not file.exists():
        model_a, tokenizer = load_model(name_a, device)
        model_b, _ = load_model(name_b, device)
        x_NMD = collect_both({"A": model_a, "B": model_b}, tokenizer, texts, layer)
        with atomically(file) as part:
            np.save(part, x_NMD.half().cpu().numpy())
    return torch.from_numpy(np.load(file))


# ---- 5. Texts ------------------------------------------------------------------------------------
TOOL_ROW = ("instruction", "input", "output")  # the texts that a row holds


def load_texts(tool_file, plain_file, tokenizer, split, n, cache, recipe="dfc", seed=0):
    """(at most n tool texts, at most n plain texts) of a split of the rows. Raises ValueError where
    there are none."""
    rows = [row for row in read_rows(tool_file, TOOL_ROW) if split_of(row) == split]
    if recipe == "paper":
        tool_texts = tool_chunks(rows, tokenizer, n)
    else:
        tool_texts = tool_prompts(rows, tokenizer, n, seed)

    # some tokenizers put a BOS token in front of every text: Gemma's does, Qwen's does not. Chat
    # templates bring their own
    bos = tokenizer.decode(tokenizer("")["input_ids"])
    plain_texts = [bos + piece for piece in plain_chunks(plain_file, tokenizer, split, n, cache)]
    if not tool_texts or not plain_texts:
        raise ValueError(f"too few texts for {split}: {len(tool_texts)}, {len(plain_texts)} plain")
    return tool_texts, plain_texts


def tool_prompts(rows, tokenizer, n, seed):
    """n texts. [g] Half are whole prompts: they end at the token at which eval_toolcall.py and
    steer.py look and patch, which no text of the published mix does. Half are prompts with their
    answers, cut at a random blank. Rows are used again where they are too few."""
    dialogues = read_dialogues(rows, tokenizer)
    texts = [prompt for prompt, _ in islice(cycle(dialogues), n // 2)]

    rng = random.Random(seed)
    for prompt, answer in islice(cycle(dialogues), n - len(texts)):
        text = prompt + answer
        blanks = [blank.start() for blank in re.finditer(r"\s", text)]
        cut = rng.choice(blanks or [len(text)])
        texts.append(text[:cut] or text)
    return texts


def tool_chunks(rows, tokenizer, n):
    """The first n chunks of prompts with their answers, as published."""
    pieces = []
    for prompt, answer in read_dialogues(rows, tokenizer):
        pieces += chunks(f"{prompt}\n{answer}", tokenizer)
    return pieces[:n]


def read_dialogues(rows, tokenizer):
    """[(a row's prompt, the rest of its right answer)]."""
    dialogues = []
    for row in rows:
        prompt = prompt_of(row, tokenizer)
        dialogues.append((prompt, row["output"].removeprefix(answer_prefix(prompt))))
    return dialogues


def prompt_of(row, tokenizer):
    """The row up to the assistant's turn, in the tokenizer's chat template (how ToolRL trains)."""
    messages = [{"role": "system", "content": row["instruction"]},
                {"role": "user", "content": row["input"]}]
    with errors_about(f"the chat template of {tokenizer.name_or_path}"):  # it may have no system
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if row["instruction"].strip() not in prompt or row["input"].strip() not in prompt:
            raise ValueError("it leaves out the system message or the question")
        return prompt


def answer_prefix(prompt):
    """What the template has already said of the answer: the thought's tag, or nothing."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def plain_chunks(name, tokenizer, split, n, cache):
    """The first n chunks of plain texts of a split. Those of a dataset are kept in the folder
    `cache`: a second setting needs no network."""
    file = Path(cache) / f"{hash_of([name, tokenizer.name_or_path, split, n])}.json"
    if file.exists():
        return json.loads(file.read_text())

    pieces = []
    for row in read_rows(name, ("text",), stream=True):
        if split_of(row) == split:
            pieces += chunks(row["text"], tokenizer)
        if len(pieces) >= n:
            break
    pieces = pieces[:n]
    if not name.endswith(".jsonl"):
        with atomically(file) as part:
            part.write_text(json.dumps(pieces))
    return pieces


def chunks(text, tokenizer, size=30):
    """Pieces of `size` tokens or more that end where a sentence does (paper section 3, data); a
    shorter rest is left out, unless it is all there is."""
    pieces = []
    piece = []
    length = 0
    for sentence in filter(str.strip, re.split(r"(?<=[.!?])\s+|\n+", text)):
        piece.append(sentence)
        length += len(token_ids(tokenizer, sentence))
        if length >= size:
            pieces.append(" ".join(piece))
            piece = []
            length = 0

    if piece and not pieces:
        pieces.append(" ".join(piece))
    return pieces


def read_rows(name, names, stream=False):
    """Yields rows, dicts with at least these texts, of a .jsonl file or a hub dataset "owner/name"
    or "owner/name:config"; stream: without a copy on the disk. A row in which one of the texts is
    null is left out, and counted where all rows are read. Raises ValueError naming file and row
    (blank lines are not counted), OSError."""
    rows = open_rows(name, stream)
    done = 0
    left_out = 0
    try:
        for row in rows:
            texts = [row[key] for key in names]
            if None in texts:
                left_out += 1
            else:
                "".join(texts).encode()  # raises on what is not valid Unicode
                yield row
            done += 1
    except (LookupError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{name}, row {done + 1}, needs the texts {names}: {e}") from e
    if left_out:
        print(f"{name}: {left_out} of {done} rows left out, a text is null", file=sys.stderr)


def split_of(row):
    """train | dev | test: the row's own "split", else by a hash of the row, 80 : 10 : 10. Raises
    ValueError."""
    text = json.dumps(row, sort_keys=True, default=str)
    drawn = {0: "dev", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")
    split = row.get("split") or drawn
    if split not in ("train", "dev", "test"):
        raise ValueError(f"a split is train, dev or test, not {split!r} as in {text[:120]} ...")
    return split


# ---- 6. Save, load, the program ------------------------------------------------------------------
def save(cc, folder):
    """model.safetensors and config.json: the authors' names and shapes plus mean and scale, less
    their masks, which n_a and n_b tell."""
    folder.mkdir()
    save_file(cc.state_dict(), folder / "model.safetensors")
    config = {"activation_dim": cc.W_dec.shape[2], "dict_size": len(cc.W_dec), "k": cc.k,
              "n_a": cc.n_a, "n_b": cc.n_b, "tied": cc.tied}
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, device="cpu"):
    """The crosscoder of a run folder, frozen. Raises ValueError."""
    with errors_about(folder):
        config = json.loads(Path(folder, "config.json").read_text())
        names = "activation_dim", "dict_size", "k", "n_a", "n_b", "tied"
        cc = Crosscoder(*[config[name] for name in names])
        cc.load_state_dict(load_file(f"{folder}/model.safetensors"))
        return cc.to(device).requires_grad_(False)


def parse_args(argv=None):
    """The settings that a command line asks for. Raises ValueError."""
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0],
                                argument_default=argparse.SUPPRESS)  # what is not given is absent
    choices = {"preset": PRESETS, "recipe": RECIPES}
    for f in fields(Settings):
        how = {"type": f.type, "choices": choices.get(f.name)}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata['help']} ({f.default})".replace("%", "%%")
        p.add_argument(f"--{f.name.replace('_', '-')}", help=text, **how)
    asked = vars(p.parse_args(argv))

    # what is asked for wins over what preset and recipe say
    preset = vars(p.parse_args(PRESETS[asked.get("preset", "tiny")].split()))
    recipe = vars(p.parse_args(RECIPES[asked.get("recipe", "dfc")].split()))
    s = Settings(**(preset | recipe | asked))
    if s.recipe == "paper" and "excl_b" not in asked:
        s.excl_b = s.excl
    if s.n_a + s.n_b == 0:
        s.tie_shared = False  # [a] with nothing exclusive A and B could not differ
    if not s.out:  # named by all that was asked for
        s.out = f"runs/{s.preset}"
        for f in fields(Settings)[1:]:
            if f.name in asked:
                s.out += f"-{f.name}{Path(str(asked[f.name])).name}"

    if min(s.n_texts, s.steps, s.batch) < 1 or not 0 <= s.seed < 2 ** 31:
        raise ValueError("--n-texts, --steps, --batch must be 1 or more, --seed from 0 to 2^31 - 1")
    Crosscoder(1, s.dict, s.k, s.n_a, s.n_b)  # sizes that do not fit raise here already
    return s


def train_run(s, device):
    """Collect, train, measure, save. The folder gets its name when all is in it."""
    # 1. collect; the dev texts are the same for all settings
    began = time.time()
    cache = Path(s.out).parent / "cache"
    tokenizer = load_tokenizer(s.model_a, s.model_b)
    tool_texts, plain_texts = load_texts(
        s.tool_texts, s.plain_texts, tokenizer, "train", s.n_texts, cache, s.recipe, s.seed)
    tool_dev, plain_dev = load_texts(s.tool_texts, s.plain_texts, tokenizer, "dev", 300, cache)
    x_NMD, dev_NMD = (  # training vectors, dev vectors
        collect_pair(s.model_a, s.model_b, texts, s.layer, cache, device).to(device)
        for texts in (tool_texts + plain_texts, tool_dev + plain_dev))
    collected = time.time()

    # 2. train
    torch.manual_seed(s.seed)
    cc = Crosscoder(x_NMD.shape[2], s.dict, s.k, s.n_a, s.n_b, s.tie_shared).to(device)
    cc.fit_scale(x_NMD, each=s.recipe == "paper")
    if s.recipe == "paper":  # an encoder drawn for itself, with the spread of ours, zeros and all
        cc.W_enc.data.normal_(std=cc.W_enc.std().item())
    else:
        cc.fair_start(x_NMD[next(batches(len(x_NMD), 4096, s.seed))])
    loss = train(cc, x_NMD, s.steps, s.batch, s.lr, s.l1_shared, s.l1_excl, s.seed, s.recipe)

    # 3. measure and save
    metrics = {
        **measure(cc, x_NMD, dev_NMD),
        "seconds": {"collect": collected - began, "train": time.time() - collected},
        "loss": loss,
        "config": asdict(s),
        "device": device,
        "bf16": has_bf16(device),  # the device's; else models and products were in fp32
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with atomically(Path(s.out)) as folder:
        save(cc, folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))


@torch.no_grad()
def measure(cc, x_NMD, dev_NMD):
    """{"fve": of dev vectors, "l0": active latents a pair, "live": share of latents that ever
    fire}, the first per model, the others per partition and of training vectors."""
    xhat_NMD, _ = cc(dev_NMD)
    active_L = sum((cc.encode(x_BMD) > 0).sum(0) for x_BMD in x_NMD.split(1024))
    fires_L = active_L / len(x_NMD)

    out = {"fve": dict(zip("AB", fve(dev_NMD.float(), xhat_NMD).tolist())), "l0": {}, "live": {}}
    for name, part in cc.parts().items():
        out["l0"][name] = fires_L[part].sum().item()
        out["live"][name] = (fires_L[part] > 0).float().mean().item()
    return out


def main(argv=None):
    s = parse_args(argv)
    found = Path(s.out).exists()
    if not found:
        train_run(s, "cuda" if torch.cuda.is_available() else "cpu")
    metrics = read_metrics(s.out)  # nothing but a run of ours is ever taken for one
    other = [name for name, value in asdict(s).items()
             if name != "out" and metrics["config"][name] != value]
    if other:
        raise ValueError(f"{s.out} is a run with another {', '.join(other)}: give another --out")

    lines = {"fve": "of the variance of dev texts", "l0": "active latents a pair",
             "live": "of the latents ever fire", "loss": "of the loss"}
    for name, text in lines.items():
        values = "".join(f"{key} {value:.4g}   " for key, value in metrics[name].items())
        print(f"{name:8s}{values}{text}")
    state = "found, not trained again:" if found else "saved  "
    print(f"{state} {s.out}; next: python eval_toolcall.py {s.out}, python steer.py {s.out}")


# ---- 7. Plumbing: what a reader of the method may skip -------------------------------------------
def latents_in(share, n_latents):
    """share * n_latents, rounded down as in the paper. Raises ValueError where it is below one."""
    if not 0 <= share <= 1 or 0 < share * n_latents < 1:
        raise ValueError(f"a share of {share:g} of {n_latents} latents: 0, or one latent to all")
    return int(share * n_latents + 1e-6)  # .29 * 100 is 28.999999999999996


def has_bf16(device):
    """Whether the device multiplies in bf16: CUDA does, and some CPUs."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # old torch does not tell
    return torch.device(device).type == "cuda" or bool(known.get("avx512_bf16"))


@contextlib.contextmanager
def errors_about(name):
    """What fails within, in one of a dozen ways, becomes a ValueError that begins with the name."""
    try:
        yield
    except Exception as e:  # truncated, foreign or missing files, other shapes, no network
        raise ValueError(f"cannot use {name}: {e}") from e


@contextlib.contextmanager
def atomically(path):
    """Yields a place to write to, which becomes `path` when all went well: no file or folder of
    that name is ever half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as home:
        part = Path(home, path.name)
        yield part
        part.replace(path)


def hash_of(what):
    """A name for what JSON can hold."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def load_tokenizer(name_a, name_b):
    """A's tokenizer, which serves both models. Raises ValueError where B's has other ids."""
    with errors_about(f"{name_a} with {name_b} (folders or hub names; smol's: extras/smol.py)"):
        a = AutoTokenizer.from_pretrained(name_a)
        b = AutoTokenizer.from_pretrained(name_b)
    if a.get_vocab() != b.get_vocab():
        raise ValueError(f"{name_a} and {name_b} differ in vocabulary: ids must agree")
    if "strftime_now" in str(a.chat_template):
        print(f"{name_a}: its chat template puts today's date into prompts; tomorrow they differ",
              file=sys.stderr)
    return a


def open_rows(name, stream):
    """The rows of read_rows(), as they come."""
    if name.endswith(".jsonl"):
        return map(json.loads, filter(bytes.strip, Path(name).read_bytes().splitlines()))
    path, _, config = name.partition(":")
    with errors_about(f"the dataset {name} (no .jsonl; needs: pip install datasets)"):
        from datasets import load_dataset
        return load_dataset(path, config or None, split="train", streaming=stream)


def fingerprint(name_a, name_b, texts, layer, device):
    """A hash of all that collected vectors depend on. Of a model in a local folder these are also
    its files' time stamps; of one on the hub the folder's name, which holds the commit. Raises
    ValueError."""
    what = [texts, layer, device, has_bf16(device)]  # the last decides on the models' precision
    for name in (name_a, name_b):
        with errors_about(name):
            folder = Path(cached_file(name, "config.json")).parent
        what.append(str(folder))
        for file in sorted(folder.iterdir()):
            if not file.is_symlink():
                what.append([file.name, file.stat().st_mtime_ns])
    return hash_of(what)


def read_metrics(folder):
    """metrics.json of a finished run. Raises ValueError where there is none of ours."""
    with contextlib.suppress(Exception):  # in whatever way it is damaged
        metrics = json.loads(Path(folder, "metrics.json").read_text())
        if metrics["config"].keys() >= asdict(Settings()).keys():
            return metrics
    raise ValueError(f"{folder} is no finished run of dfc.py: no metrics.json, or a damaged one "
                     "(python extras/published.py makes a run of a published crosscoder)")


def cli(main, argv=None):
    """main(argv). What the user can mend, a ValueError, an OSError or too little memory, becomes
    one line and exit status 2; the rest are bugs."""
    if not sys.stderr.isatty():  # on a terminal the hub's retries and downloads are seen
        logging.disable_progress_bar()
        logging.get_logger("huggingface_hub").setLevel(logging.ERROR)
        os.environ |= {"DATASETS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        return main(argv)
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        cause = e
        while below := cause.__cause__ or cause.__context__:  # what the hub answered, below what
            cause = below                                     # libraries made of it
        said = f"{e}" if str(cause) in str(e) else f"{e} ({cause})"
        said = re.sub(r"(https?://[^\s?]+)\?[^\s)]+", r"\1", said)  # a signed address is a key
        print(f"{Path(sys.argv[0]).name}: {' '.join(said.split())[:600]}", file=sys.stderr)
        return 2


def leave(status):
    """End the program, at once: threads of datasets' reader would abort the interpreter later."""
    sys.stdout.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    leave(cli(main))
