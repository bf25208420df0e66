"""dfc: what did reinforcement learning add to a model? Ask a Dedicated Feature Crosscoder.

Model A is an RL-tuned language model that calls tools, B the frozen base it came from. Run both
over the same texts, take the residual stream at one layer, and learn ONE sparse dictionary for the
pair. Some latents may read and write A only, some (by default none) B only, the rest are shared and
write the same into both: what RL added has to go through the A-exclusive ones. (arXiv 2606.26474;
the DFC is from arXiv 2602.11729.)

    z_m    = (x_m - mean_m) / scale_m                   one vector per model m, mean square 1
    pre    = relu( sum_m z_m W_enc[m] + b_enc )         forbidden (m, latent) weights are zero
    f      = the k largest of pre, the rest zero
    zhat_m = sum_l f_l W_dec[l, m] + b_dec[m]           xhat_m = zhat_m scale_m + mean_m
    loss   = mean (z - zhat)^2 + sum_l lambda_l f_l |W_dec[l]| + revival of dead latents

    latents = [ A-exclusive: n_a | B-exclusive: n_b | shared ]     n = int(share * L)
    n_a = n_b = 0 is the plain crosscoder; a share of 0.5 is two sparse autoencoders in one top k.

Shapes, named by suffix (x_BMD): B vectors in a batch, N in all, M = 2 models (0 = A, 1 = B),
D residual width, L latents, k active ones, T tokens, E = M D (a pair laid end to end).

    python dfc.py                          # the embedded pair: half a minute on 2 CPU cores
    python dfc.py --dict 8192 --k 45       # the paper's smaller dictionary on it: a minute
    python dfc.py --excl 0                 # the plain crosscoder
    python dfc.py --recipe paper           # trained the published way, for comparison
    python dfc.py --preset paper           # Qwen2.5-3B against ToolRL-Qwen2.5-3B (a GPU, the hub)

Where we leave the paper is marked [1] ... [7] with its reason; --recipe paper undoes 2 to 7.
"""

import argparse
import contextlib
import hashlib
import json
import random
import re
import sys
import tempfile
import time
import zlib
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

# ---- 1. The crosscoder ---------------------------------------------------------------------------
class Crosscoder(nn.Module):
    """A sparse dictionary over pairs of vectors, some latents confined to one model (Figure 1). The
    forward pass needs no mask: confine() on the weights once, and on each gradient, is enough.
    [5] tied: a shared latent writes one row into both models. Untied, a difference between A and B
    can hide in a shared latent; tied and n_b = 0, it has nowhere to go but the A-exclusive ones."""

    def __init__(self, d_model, n_latents, k, n_a=0, n_b=0, tied=False):
        super().__init__()
        if not 1 <= k <= n_latents or min(n_a, n_b) < 0 or n_a + n_b > n_latents:
            raise ValueError(f"k {k}, exclusive {n_a} + {n_b} do not fit into {n_latents} latents")
        self.k, self.n_a, self.n_b, self.tied = k, n_a, n_b, tied
        shared = slice(n_a + n_b, None)
        W_dec = F.normalize(torch.randn(n_latents, 2, d_model), dim=-1)
        if tied:
            W_dec[shared] = W_dec[shared, :1]
        W_enc = W_dec.permute(1, 2, 0).contiguous()  # [3] a latent begins by reading what it writes
        W_enc[..., shared] /= 2                      # a shared one the mean of its two rows
        self.confine(W_enc, W_dec)
        self.W_enc = nn.Parameter(W_enc)                                         # (M, D, L)
        self.W_dec = nn.Parameter(W_dec)                                         # (L, M, D)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))                        # (L,)
        self.b_dec = nn.Parameter(torch.zeros(2, d_model))                       # (M, D)
        self.register_buffer("mean", torch.zeros(2, d_model))                    # (M, D)
        self.register_buffer("scale", torch.ones(2))                             # (M,)

    def parts(self):
        """{name: slice of latents}, in the order in which they lie; empty ones are left out."""
        a, b, L = self.n_a, self.n_a + self.n_b, len(self.b_enc)
        parts = {"A-exclusive": slice(0, a), "B-exclusive": slice(a, b), "shared": slice(b, L)}
        return {name: part for name, part in parts.items() if part.start < part.stop}

    @torch.no_grad()
    def confine(self, W_enc, W_dec):
        """In place: what may not be read or written becomes zero, tied rows their mean."""
        a, b = self.n_a, self.n_a + self.n_b
        for forbidden in (W_enc[1, :, :a], W_enc[0, :, a:b], W_dec[:a, 1], W_dec[a:b, 0]):
            forbidden.zero_()
        if self.tied:
            W_dec[b:] = W_dec[b:].mean(1, keepdim=True)

    def normalise(self, x_BMD):
        """Raw activations -> zero mean, mean square one per model."""
        return (x_BMD.float() - self.mean) / self.scale[:, None]

    def top(self, z_BMD):
        """The k largest pre-activations of normalised vectors: (f_Bk, index_Bk, pre_BL)."""
        pre_BL = torch.addmm(self.b_enc, z_BMD.flatten(1), self.W_enc.flatten(0, 1))
        largest = pre_BL.topk(self.k, dim=-1, sorted=False)
        return largest.values.relu(), largest.indices, pre_BL

    def encode(self, x_BMD):
        """Raw activations -> f_BL, zero but for the k largest of each pair."""
        f_Bk, index_Bk, pre_BL = self.top(self.normalise(x_BMD))
        return torch.zeros_like(pre_BL).scatter(1, index_Bk, f_Bk)

    def decode(self, f_BL):
        """f_BL -> xhat_BMD in raw activation units."""
        z_BMD = torch.einsum("bl,lmd->bmd", f_BL, self.W_dec) + self.b_dec
        return z_BMD * self.scale[:, None] + self.mean

    def forward(self, x_BMD):
        f_BL = self.encode(x_BMD)
        return self.decode(f_BL), f_BL

    @torch.no_grad()
    def fit_scale(self, x_NMD):
        """[1] Keep the training vectors' mean and root mean square: encode and decode speak raw
        units. Published, both are lost between training and evaluation."""
        self.mean.copy_(x_NMD.float().mean(0))
        self.scale.copy_((x_NMD - self.mean).pow(2).mean((0, 2)).sqrt().clamp(min=1e-8))

    @torch.no_grad()
    def fair_start(self, x_BMD):
        """[3] Give every partition's pre-activations the spread of the last, the shared one's. An
        exclusive latent reads one model where a shared one reads two; drawn as published it is at
        first picked 9 to 28 times less often."""
        pre_BL, parts = self.top(self.normalise(x_BMD))[2], list(self.parts().values())
        spread = [pre_BL[:, part].std().clamp(min=1e-8) for part in parts]
        for part, own in zip(parts, spread):
            self.W_enc[..., part] *= spread[-1] / own

# ---- 2. Losses, and a gradient that touches only active latents ----------------------------------
class Sparse(torch.autograd.Function):
    """(zhat_BMD without b_dec, f_Bk) of picked latents: what decode() gives, with gradients only of
    what was picked, where autograd's own would be as large as the dictionary. f was computed from
    W_enc and b_enc without a graph: they are arguments only to receive their gradients."""

    @staticmethod
    def forward(ctx, z_BMD, f_Bk, index_Bk, W_enc, b_enc, W_dec):
        with torch.enable_grad():
            f_Bk = f_Bk.detach().float().requires_grad_()
            zhat_BE = F.embedding_bag(index_Bk, W_dec.detach().flatten(1), mode="sum",
                                      per_sample_weights=f_Bk)
        ctx.kept = z_BMD.flatten(1), f_Bk, index_Bk, zhat_BE, W_dec.shape
        return zhat_BE.detach().view_as(z_BMD), f_Bk.detach()

    @staticmethod
    def backward(ctx, g_BMD, g_Bk):
        z_BE, f_Bk, index_Bk, zhat_BE, shape = ctx.kept
        g_BE = g_BMD.flatten(1).contiguous()
        g_Bk = (g_Bk + torch.autograd.grad(zhat_BE, f_Bk, g_BE)[0]) * (f_Bk > 0)
        g_L = g_BE.new_zeros(shape[0]).index_add_(0, index_Bk.flatten(), g_Bk.flatten())
        # A latent's row is a weighted sum of rows of z, or g. Sorted by latent, these need neither
        # atomic additions nor the outer product in memory.
        latent, place = index_Bk.flatten().sort(stable=True)
        start_L = torch.searchsorted(latent, torch.arange(shape[0], device=latent.device))
        gW_enc, gW_dec = (F.embedding_bag(
            place // index_Bk.shape[1], y_BE, start_L, mode="sum",
            per_sample_weights=w_Bk.flatten()[place]).view(shape)
            for w_Bk, y_BE in ((g_Bk, z_BE), (f_Bk, g_BE)))
        return None, None, None, gW_enc.permute(1, 2, 0), g_L, gW_dec

def aux_loss(cc, z_BMD, zhat_BMD, pre_BL, dead_L):
    """[4] Revive dead latents: those of each partition explain what the living leave over (AuxK,
    arXiv 2406.04093 A.2). The residual is detached and b_dec stays out: they learn from the error
    and do not push the rest. A partition answers only for the models it writes, and alone, or the
    many shared latents would win every place; 2 k of each, on a quarter of the batch, which revives
    as well as all of it."""
    z_BMD, zhat_BMD, pre_BL = (t[:1 + len(t) // 4] for t in (z_BMD, zhat_BMD, pre_BL.detach()))
    residual, total = (z_BMD - zhat_BMD).detach(), z_BMD.new_zeros(())
    models = {"A-exclusive": slice(0, 1), "B-exclusive": slice(1, 2), "shared": slice(0, 2)}
    for name, part in cc.parts().items():
        dead = dead_L[part].nonzero()[:, 0] + part.start
        if len(dead):
            best = pre_BL[:, dead].relu().topk(min(len(dead), 2 * cc.k), sorted=False)
            guess_BMD, _ = Sparse.apply(z_BMD, best.values, dead[best.indices], cc.W_enc, cc.b_enc,
                                        cc.W_dec)
            total += (residual - guess_BMD)[:, models[name]].pow(2).mean()
    return total

def fve(x_BMD, xhat_BMD):
    """Fraction of variance explained per model, (M,): 1 is perfect, predicting the mean gives 0."""
    error = (x_BMD - xhat_BMD).double().pow(2).sum((0, 2))
    return 1 - error / (x_BMD - x_BMD.double().mean(0)).pow(2).sum((0, 2)).clamp(min=1e-30)

# ---- 3. Activations ------------------------------------------------------------------------------
@contextlib.contextmanager
def named(name):
    """What fails within, in one of a dozen ways, becomes a ValueError with the name."""
    try:
        yield
    except Exception as e:  # truncated, foreign or missing files, other shapes, no network
        raise ValueError(f"cannot use {name}: {e}") from e

def load_model(name, device):
    """(model, frozen; its tokenizer) of a folder or a hub name. On CUDA in the precision of its
    file, for rounding could hide what RL changed; elsewhere fp32. Raises ValueError."""
    with named(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto" if device == "cuda" else torch.float32)
        model = model.to(device).eval().requires_grad_(False)
        return model, AutoTokenizer.from_pretrained(name)

def file_of(name, file):
    """The path of a folder's file, there or not, or of a hub name's. Raises OSError, ValueError."""
    return Path(cached_file(name, file) or Path(name, file))

def token_ids(tokenizer, texts):
    """Lists of token ids; no token is added, for a chat template has put in its own."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]

@contextlib.contextmanager
def hooked(model, layer, edit):
    """Within it block `layer`, counted from 0, puts out edit(h_BTD) for h_BTD (paper section 4).
    The blocks are the first list with as many entries as there are layers."""
    n = model.config.get_text_config().num_hidden_layers
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    handle = blocks[layer].register_forward_hook(lambda _, __, h_BTD: edit(h_BTD))
    try:
        yield
    finally:
        handle.remove()

class DeepEnough(Exception):
    """Raised in a hook when the layer wanted is done: no more of the pass is needed."""

@torch.no_grad()
def residual(model, ids_BT, layer):
    """h_BTD after block `layer`, and no block or vocabulary head beyond it: layer 13 is
    hidden_states[14]; of the last block it is the output before the final norm."""
    found = []
    def keep(h_BTD):
        found.append(h_BTD)
        raise DeepEnough
    with contextlib.suppress(DeepEnough), hooked(model, layer, keep):
        model(input_ids=ids_BT, use_cache=False)
    return found[0]

def alike(ids, batch_tokens):
    """Places of token lists, in batches of like length with at most batch_tokens when padded."""
    batch = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch

def collect(model, tokenizer, texts, layer):
    """The residual vector at each text's last token -> (N, D) fp16 on the CPU (paper section 3).
    Padding is on the right, where causal attention never looks: the batch does not matter. A text
    longer than the model's positions (or 4,096) loses its beginning. Raises ValueError."""
    config = model.config.get_text_config()
    most, depth = 8192 if model.device.type == "cuda" else 1024, config.num_hidden_layers
    ids = [i[-min(4096, config.max_position_embeddings):] for i in token_ids(tokenizer, texts)]
    if not 0 <= layer < depth or not all(ids):
        raise ValueError(f"no layer {layer} of 0 to {depth - 1}, or a text without a token")
    out = torch.empty(len(ids), config.hidden_size, dtype=torch.float16)
    for rows in tqdm(list(alike(ids, most)), "collect", leave=False):  # most: tokens of a batch
        some = [torch.tensor(ids[i], device=model.device) for i in rows]
        h_BTD = residual(model, nn.utils.rnn.pad_sequence(some, batch_first=True), layer)
        out[rows] = h_BTD[range(len(rows)), [len(i) - 1 for i in some]].half().cpu()
    if not out.isfinite().all():
        raise ValueError(f"vectors of layer {layer} are not finite in fp16: try another layer")
    return out

def collect_pair(name_a, name_b, texts, layer, cache, device):
    """Both models' vectors for the same token ids (A's tokenizer) -> x_NMD, fp16 on the CPU. Kept
    in the folder `cache` under a hash of what changes them, so that 48 settings collect once;
    of the models' files (on the hub, links in a folder named by the commit) the time stamps."""
    what = [texts, layer, device]
    for name in (name_a, name_b):
        with named(name):
            folder = file_of(name, "config.json").parent
            what += [str(folder), *((f.name, f.stat().st_mtime_ns) for f in sorted(folder.iterdir())
                                    if not f.is_symlink())]
    file = Path(cache) / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.npy"
    if not file.exists():
        with whole(file) as part:
            (a, tokenizer), (b, other) = load_model(name_a, device), load_model(name_b, device)
            if tokenizer.get_vocab() != other.get_vocab():
                raise ValueError(f"{name_a} and {name_b} differ in vocabulary: ids must agree")
            x = [collect(model, tokenizer, texts, layer).numpy() for model in (a, b)]
            np.save(part, np.stack(x, 1))  # raises its own ValueError where widths differ
    return torch.from_numpy(np.load(file))

@contextlib.contextmanager
def whole(path):
    """Yields a place to write to, which becomes `path` when all went well: no file or folder of
    that name is ever half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as home:
        yield (part := Path(home, path.name))
        part.replace(path)

# ---- 4. Texts ------------------------------------------------------------------------------------
TOOL_ROW, PLAIN_ROW = ("instruction", "input", "output"), ("text",)  # the texts that a row holds

def read_rows(name, fields):
    """Yields rows, dicts with at least these texts, of a .jsonl file or a hub dataset "owner/name"
    or "owner/name:config". Raises ValueError naming file and row, OSError."""
    if name.endswith(".jsonl"):
        found = (json.loads(row) for row in Path(name).read_bytes().splitlines() if row.strip())
    else:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(f"{name} is no .jsonl; for a dataset: pip install datasets") from None
        path, _, config = name.partition(":")
        found = load_dataset(path, config or None, split="train", streaming=True)
    done = 0
    try:
        for row in found:
            "".join(row[field] for field in fields).encode()  # half a surrogate pair ends here
            done += 1
            yield row
    except Exception as e:  # a dozen types, when it comes over a network
        raise ValueError(f"{name}, row {done + 1}, needs the texts {fields}: {e}") from e

def split_of(row):
    """train | dev | test: the row's own "split", else by a hash of the row, 80 : 10 : 10."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    split = row.get("split") or {0: "dev", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")
    if split in ("train", "dev", "test"):
        return split
    raise ValueError(f"a row's split is {split!r}: train, dev or test is wanted")

def prompt_of(row, tokenizer):
    """The row up to the assistant's turn, in the tokenizer's chat template (how ToolRL trains)."""
    with named(f"the chat template of {tokenizer.name_or_path}"):  # it may know no system role
        return tokenizer.apply_chat_template([
            {"role": "system", "content": row["instruction"]},
            {"role": "user", "content": row["input"]}], tokenize=False, add_generation_prompt=True)

def opened(prompt):
    """What the template has already said of the answer: the thought's tag, or nothing."""
    return "<think>" * prompt.rstrip().endswith("<think>")

def chunks(text, tokenizer, size=30):
    """Pieces of `size` tokens or a little more that end where a sentence does (paper section 3,
    data); a shorter rest is left out, unless it is all there is."""
    pieces, piece, length = [], [], 0
    for sentence in filter(str.strip, re.split(r"(?<=[.!?])\s+|\n+", text)):
        piece.append(sentence)
        length += len(token_ids(tokenizer, sentence))
        if length >= size:
            pieces, piece, length = pieces + [" ".join(piece)], [], 0
    return pieces if pieces or not piece else [" ".join(piece)]

def tool_texts(rows, tokenizer, n, recipe, seed):
    """n texts from tool rows. [6] Half are whole prompts up to the assistant's turn, where latents
    are ranked and patched, a place that the published mix never contains; half the same with the
    answer, cut at a random blank. recipe "paper": ends of chunks of about 30 tokens only."""
    prompts = [prompt_of(row, tokenizer) for row in rows]
    golds = [row["output"].removeprefix(opened(p)) for p, row in zip(prompts, rows)]
    if recipe == "paper":
        return [c for p, g in zip(prompts, golds) for c in chunks(f"{p}\n{g}", tokenizer)][:n]
    rng, out = random.Random(seed), list(islice(cycle(prompts), n // 2))
    for text in islice(cycle(p + g for p, g in zip(prompts, golds)), n - len(out)):
        out.append(text[:rng.choice([blank.start() for blank in re.finditer(r"\s", text)])])
    return out

def texts_of(s, tokenizer, split, n, recipe="dfc", seed=0):
    """At most n tool texts, then at most n plain texts, of a split of the rows that the settings s
    name. Raises ValueError where there are none."""
    tools, plain = ((row for row in read_rows(name, fields) if split_of(row) == split)
                    for name, fields in ((s.tool_texts, TOOL_ROW), (s.plain_texts, PLAIN_ROW)))
    pieces = list(islice((c for row in plain for c in chunks(row["text"], tokenizer)), n))
    texts = tool_texts(list(tools), tokenizer, n, recipe, seed)
    if not texts or not pieces:
        raise ValueError(f"{len(texts)} tool and {len(pieces)} plain texts for {split}: too few")
    return texts + pieces

# ---- 5. Train, save, load ------------------------------------------------------------------------
def batches(n, batch, seed):
    """Indices of one batch after another, every vector at most once an epoch, each epoch in a new
    order; the last vectors of it, too few for a batch, are left out."""
    rng, batch = torch.Generator(), min(batch, n)
    for epoch in count():
        order = torch.randperm(n, generator=rng.manual_seed(seed * 1_000_003 + epoch))
        yield from order[:n - n % batch].split(batch)

def train(cc, x_NMD, steps, batch=1024, lr=1e-4, l1_shared=2e-5, l1_excl=2e-5, seed=0, recipe="dfc",
          aux=1 / 32, dead_after=100):
    """Fit a crosscoder to raw vectors x_NMD on their device -> {term: share of the loss} over the
    last tenth of the steps. l1_*: the lambdas; aux: weight of aux_loss; a latent silent for
    dead_after steps counts as dead. recipe "paper": L1 as a mean over all latents, no revival,
    constant rate. Raises ValueError where training diverges."""
    order, published = batches(len(x_NMD), batch, seed), recipe == "paper"
    cc.confine(cc.W_enc, cc.W_dec)
    opt = torch.optim.Adam(cc.parameters(), lr=lr, fused=True)
    weight_L = torch.full_like(cc.b_enc.data, l1_shared)
    weight_L[:cc.n_a + cc.n_b] = l1_excl
    silent_L, shares = torch.zeros_like(weight_L), weight_L.new_zeros(3)
    for step in tqdm(range(steps), "train", leave=False):
        if not published:  # [7] 5 % warm-up, linear to zero over the last 20 %: a constant rate
            # leaves the noise of the last batches in the weights
            opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / (.05 * steps),
                                                 (steps - step) / (.2 * steps))
        z_BMD = cc.normalise(x_NMD[next(order).to(x_NMD.device, non_blocking=True)])
        # The encoder's product, and with it the choice and the values of f, is bf16 on CUDA; it
        # needs no graph, for Sparse brings its own
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, x_NMD.is_cuda):
            f_Bk, index_Bk, pre_BL = cc.top(z_BMD)
        zhat_BMD, f_Bk = Sparse.apply(z_BMD, f_Bk, index_Bk, cc.W_enc, cc.b_enc, cc.W_dec)
        zhat_BMD = zhat_BMD + cc.b_dec
        mse = (z_BMD - zhat_BMD).pow(2).mean()
        mean_L = torch.zeros_like(weight_L).index_add(0, index_Bk.flatten(),
                                                      f_Bk.flatten() / len(f_Bk))
        silent_L = (silent_L + 1) * (mean_L == 0)
        if published:
            l1, revival = (weight_L * mean_L).mean(), 0 * mse
        else:  # [2] a sum, weighed by the rows' length: published, lambda = 1e-3 weighs 0.1 % of
            # the loss, and f could be shrunk for free by longer rows
            l1 = (weight_L * mean_L * cc.W_dec.flatten(1).norm(dim=1)).sum()
            revival = aux * aux_loss(cc, z_BMD, zhat_BMD, pre_BL, silent_L > dead_after)
        terms = torch.stack([mse, l1, revival])
        opt.zero_grad()
        terms.sum().backward()
        cc.confine(cc.W_enc.grad, cc.W_dec.grad)
        nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        opt.step()
        shares += terms.detach() * (step >= int(.9 * steps))
    if not all(p.isfinite().all() for p in (shares, *cc.parameters())):
        raise ValueError(f"training diverged, nothing is saved: lower --lr {lr:g}")
    return dict(zip(("mse", "l1", "aux"), (shares / shares.sum()).tolist()))

def save(cc, folder, **more):
    """model.safetensors and config.json: the authors' names and shapes plus mean and scale, less
    their masks, which n_a and n_b tell."""
    folder.mkdir()
    save_file(cc.state_dict(), folder / "model.safetensors")
    config = {"activation_dim": cc.W_dec.shape[2], "dict_size": len(cc.W_dec), "k": cc.k,
              "n_a": cc.n_a, "n_b": cc.n_b, "tied": cc.tied} | more
    (folder / "config.json").write_text(json.dumps(config, indent=1))

def load(name, device="cpu"):
    """A crosscoder, frozen, from a run folder or the hub; the authors' too (model.pt, read without
    executing anything; their mean and scale are lost: 0 and 1). Raises ValueError."""
    with named(name):
        c = json.loads(file_of(name, "config.json").read_text())
        cc = Crosscoder(*map(c.get, ("activation_dim", "dict_size", "k", "n_a", "n_b", "tied")))
        state = load_file(file_of(name, "model.safetensors")) if "tied" in c else torch.load(
            file_of(name, "model.pt"), map_location="cpu", weights_only=True)
        state = {key: t.float() for key, t in state.items() if not key.endswith("mask")}
        cc.load_state_dict(dict(cc.named_buffers()) | state)
        cc.confine(cc.W_enc, cc.W_dec)
        return cc.to(device).requires_grad_(False)

# ---- 6. The program ------------------------------------------------------------------------------
TINY = f"{Path(__file__).resolve().parent}/tiny"
SETTINGS = {  # name: (on the embedded pair, on the paper's pair, help)
    "model_a": (f"{TINY}/toolrl", "chengq9/ToolRL-Qwen2.5-3B", "the RL-tuned model: folder or hub"),
    "model_b": (f"{TINY}/base", "Qwen/Qwen2.5-3B", "its base; for the null experiment A once more"),
    "tool_texts": (f"{TINY}/tools.jsonl", "emrecanacikgoz/ToolRL", "tool rows: .jsonl or dataset"),
    "plain_texts": (f"{TINY}/text.jsonl", "HuggingFaceFW/fineweb:sample-10BT", "plain rows"),
    "n_texts": (3000, 40_000, "training texts of each of the two kinds"),
    "layer": (2, 13, "vectors are the output of this block, counted from 0"),
    "dict": (512, 8192, "latents L"),
    "k": (8, 45, "active latents per pair of vectors"),
    "excl": (.1, .1, "A-exclusive share of the latents; 0 = the plain crosscoder"),
    "steps": (1200, 9000, "training steps"),
    "batch": (512, 1024, "vectors in a step"),
    "lr": (1e-3, 1e-4, "highest learning rate of Adam"),
    "seed": (0, 0, "of weights, texts and batches")}
RECIPE = {  # name: (as this file trains, as published, help)
    "excl_b": (0., None, "B-exclusive share; None = as large as A's"),
    "tie_shared": (True, False, "one decoder row for both models in shared latents"),
    "l1_shared": (2e-5, 1e-3, "lambda of shared latents"),  # 2e-5 by [2]: 1 to 10 % of the loss
    "l1_excl": (2e-5, 1e-3, "lambda of exclusive latents")}

def parse_args(argv):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0],
                                epilog="In brackets: what --preset tiny; paper fills in, and for "
                                "the last four options --recipe dfc; paper.")
    p.add_argument("--preset", choices=["tiny", "paper"], default="tiny", help="which models, "
                   "texts, layer and sizes: the embedded pair's (default) or the paper's")
    p.add_argument("--recipe", choices=["dfc", "paper"], default="dfc",
                   help="how to train: as this file says (default), or as published")
    p.add_argument("--out", type=Path, help="run folder (default: runs/ and what was asked for)")
    for name, (ours, paper, text) in (SETTINGS | RECIPE).items():
        how = {"action": argparse.BooleanOptionalAction} if ours is True else {"type": type(ours)}
        p.add_argument(f"--{name.replace('_', '-')}", help=f"{text} ({ours}; {paper})", **how)
    s = p.parse_args(argv)
    asked = {name: vars(s)[name] for name in SETTINGS | RECIPE if vars(s)[name] is not None}
    s.out = s.out or Path("runs", s.preset + "-recipepaper" * (s.recipe == "paper") + "".join(
        f"-{name}{Path(str(value)).name}" for name, value in asked.items()))
    for table, paper in ((SETTINGS, s.preset == "paper"), (RECIPE, s.recipe == "paper")):
        vars(s).update({name: values[paper] for name, values in table.items()} | asked)
    s.excl_b = s.excl if s.excl_b is None else s.excl_b
    s.n_a, s.n_b = int(s.excl * s.dict), int(s.excl_b * s.dict)
    s.tie_shared &= s.n_a + s.n_b > 0  # [5] with nothing exclusive A and B could not differ
    if min(s.n_texts, s.steps, s.batch) < 1 or not 0 <= s.seed < 2 ** 31:
        raise ValueError("--n-texts, --steps, --batch must be 1 or more, --seed from 0 to 2^31")
    return s

def run(s, device):
    """Collect, train, measure, save. The folder gets its name when all is in it."""
    began = time.time()
    with named(s.model_a):
        tokenizer = AutoTokenizer.from_pretrained(s.model_a)
    x_NMD, dev_NMD = (collect_pair(s.model_a, s.model_b, texts_of(s, tokenizer, *which), s.layer,
                                   s.out.parent / "cache", device).to(device) for which in (
        ("train", s.n_texts, s.recipe, s.seed), ("dev", 300)))  # dev: the same for all settings
    collected = time.time()
    torch.manual_seed(s.seed)
    cc = Crosscoder(x_NMD.shape[2], s.dict, s.k, s.n_a, s.n_b, s.tie_shared).to(device)
    cc.fit_scale(x_NMD)
    if s.recipe == "paper":  # encoder and decoder drawn independently
        cc.W_enc.data.normal_(std=cc.W_enc.std().item())
    else:
        cc.fair_start(x_NMD[next(batches(len(x_NMD), 4096, s.seed))])
    loss = train(cc, x_NMD, s.steps, s.batch, s.lr, s.l1_shared, s.l1_excl, s.seed, s.recipe)
    with torch.no_grad():
        fires_L = sum((cc.encode(v) > 0).sum(0) for v in x_NMD.split(1024)) / len(x_NMD)
        fires = {name: fires_L[part] for name, part in cc.parts().items()}
        m = {"fve": dict(zip("AB", fve(dev_NMD.float(), cc(dev_NMD)[0]).tolist())),  # of dev texts
             "l0": {name: f.sum().item() for name, f in fires.items()},  # active ones per pair
             "live": {name: (f > 0).float().mean().item() for name, f in fires.items()},  # ever
             "seconds": {"collect": collected - began, "train": time.time() - collected},
             "loss": loss, "config": vars(s), "device": device,
             "versions": {p.__name__: p.__version__ for p in (torch, np, transformers)}}
    with whole(s.out) as folder:
        save(cc, folder, layer=s.layer)
        (folder / "metrics.json").write_text(json.dumps(m, indent=1, default=str))

def read_metrics(folder):
    """metrics.json of a finished run. Raises ValueError where there is none of ours."""
    with contextlib.suppress(Exception):  # in whatever way it is damaged
        m = json.loads((Path(folder) / "metrics.json").read_text())
        if m["config"].keys() >= SETTINGS.keys():
            return m
    raise ValueError(f"{folder} is no finished run of dfc.py: no metrics.json, or a damaged one")

def cli(main, argv=None):
    """main(argv). What the user can mend, a ValueError, an OSError or too little memory, becomes
    one line and exit status 2; the rest are bugs."""
    logging.disable_progress_bar()
    logging.get_logger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        return main(argv)
    except (ValueError, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())[:400]}", file=sys.stderr)
        return 2

def main(argv=None):
    s = parse_args(argv)
    if not s.out.exists():
        run(s, "cuda" if torch.cuda.is_available() else "cpu")
    m = read_metrics(s.out)  # nothing but a run of ours is ever taken for one
    if other := [k for k, v in vars(s).items() if k != "out" and m["config"].get(k) != v]:
        raise ValueError(f"{s.out} is a run with another {', '.join(other)}: give another --out")
    for name, text in (("fve", "of the variance of dev texts"), ("l0", "active latents a pair"),
                       ("live", "of the latents ever fire"), ("loss", "of the loss")):
        print(f"{name:8s}" + "".join(f"{k} {v:.4g}   " for k, v in m[name].items()) + text)
    print(f"saved   {s.out}; next: python eval_toolcall.py {s.out}, python steer.py {s.out}")

if __name__ == "__main__":
    sys.exit(cli(main))
