"""dfc: what did reinforcement learning add to a language model? Train a crosscoder and look.

Model A is a language model that RL taught to call tools, B the frozen base it came from. Both read
the same texts, and we record their residual streams at one layer. A crosscoder is one sparse
dictionary that reconstructs both vectors of a pair. In a Dedicated Feature Crosscoder (DFC) some
latents read and write A only, some B only, and the rest are shared. (Paper: arXiv 2606.26474. The
DFC is from arXiv 2602.11729.)

    z_m    = (x_m - mean_m) / scale_m               (1) the normalised vector of model m
    pre    = sum_m z_m W_enc[m] + b_enc             (2) forbidden (m, latent) weights are zero
    f      = the k largest of pre, if positive      (3) all others are 0 (the paper's z)
    zhat_m = sum_l f_l W_dec[l, m] + b_dec[m]       (4) and xhat_m = zhat_m scale_m + mean_m
    loss   = mean (z - zhat)^2                      (5) over pairs, models and coordinates
             + mean sum_l lambda_l f_l |W_dec[l]|   (6) L1 penalty; the length is over both models
             + revive * aux                         (7) revival of dead latents, see aux_loss()

    latents = [ A-exclusive: n_a | B-exclusive: n_b | shared ]

n_a = n_b = 0 is the plain crosscoder, the paper's baseline; n_a = n_b = L / 2 is two autoencoders
that share the k places. By default n_b = 0: what only B has must be written by shared latents and
cancelled in A. So an A-exclusive latent can mean "added by RL" or "removed by RL".

Suffixes are shapes, as in x_BMD: B vectors of a batch, N in all, M = 2 models (0 is A, 1 is B), D
residual width, L latents, k active latents, T tokens, E = M D.

    python dfc.py                          # the toy pair in tiny/: half a minute on an idle laptop
    python dfc.py --dict 8192 --k 45       # as many latents as the paper's smaller dictionaries
    python dfc.py --excl 0                 # the plain crosscoder (its latents are not tied)
    python dfc.py --recipe paper           # trained as published; --preset qwen: its models
    python dfc.py --preset smol            # a real language model, made by extras/smol.py
    bash run_sweep.sh                      # the paper's 48 settings, scaled to the toy pair
"""

import argparse
import contextlib
import hashlib
import inspect
import json
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, fields
from itertools import count, cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file, logging


# ---- 1. The crosscoder ---------------------------------------------------------------------------
class Partition(NamedTuple):
    """Latents that read and write the same models."""

    name: str       # "A-exclusive", "B-exclusive" or "shared"
    latents: slice  # where they lie in the dictionary
    models: slice   # which models they read and write


class Crosscoder(nn.Module, PyTorchModelHubMixin):
    """A sparse dictionary for pairs of vectors (paper, Figure 1).

    The weights between an exclusive latent and the other model start at zero. confine() zeroes
    their gradients, so they stay zero, and the forward pass needs no mask.

    tied: a shared latent writes the same row into both models (--tie-shared). Untied, a difference
    between A and B can hide in a shared latent, whose two rows differ. Tied, it must use exclusive
    latents. Without exclusive latents tied models could differ by mean, scale and b_dec only, so
    there `tied` has no effect.

    random_encoder: as published, the encoder is drawn apart from the decoder (--no-fair-start).

    The hub's mixin gives save_pretrained() and from_pretrained(). They use model.safetensors and
    config.json with the names and shapes of the authors' files, and two more: mean and scale."""

    def __init__(self, activation_dim, dict_size, k, n_a=0, n_b=0, tied=False,
                 random_encoder=False):
        super().__init__()
        if not 1 <= k <= dict_size or n_a + n_b > dict_size:
            raise ValueError(f"k {k}, exclusive {n_a} + {n_b} do not fit into {dict_size} latents")
        self.k = k
        self.n_a = n_a
        self.n_b = n_b
        self.tied = tied and n_a + n_b > 0
        shared = slice(n_a + n_b, dict_size)

        # decoder: random rows of length 1
        W_dec = F.normalize(torch.randn(dict_size, 2, activation_dim), dim=-1)
        if self.tied:
            W_dec[shared] = W_dec[shared, :1]

        # encoder: a latent reads the direction that it writes. A shared latent reads it in two
        # models and takes the mean, hence the half
        W_enc = W_dec.permute(1, 2, 0).contiguous()
        W_enc[..., shared] /= 2
        self.confine(W_enc, W_dec)
        if random_encoder:
            W_enc.normal_(std=W_enc.std().item())
            self.confine(W_enc, W_dec)

        self.W_enc = nn.Parameter(W_enc)                             # (M, D, L)
        self.b_enc = nn.Parameter(torch.zeros(dict_size))            # (L,)
        self.W_dec = nn.Parameter(W_dec)                             # (L, M, D)
        self.b_dec = nn.Parameter(torch.zeros(2, activation_dim))    # (M, D)
        self.register_buffer("mean", torch.zeros(2, activation_dim))  # (M, D)
        self.register_buffer("scale", torch.ones(2, activation_dim))  # (M, D)

    def partitions(self):
        """The partitions in the order in which they lie. Empty ones are left out."""
        a, b = self.n_a, self.n_a + self.n_b
        every = [
            Partition("A-exclusive", slice(0, a), slice(0, 1)),
            Partition("B-exclusive", slice(a, b), slice(1, 2)),
            Partition("shared", slice(b, len(self.b_enc)), slice(0, 2))]
        return [part for part in every if part.latents.start < part.latents.stop]

    @torch.no_grad()
    def confine(self, W_enc, W_dec):
        """Zero, in place, what exclusive latents may not read or write, and replace the two rows of
        a tied latent by their mean. For weights before training and for gradients in each step.
        (The true gradient of a tied row is the sum of the two. Adam does not see the factor of 2;
        clipping does, slightly.)"""
        a, b = self.n_a, self.n_a + self.n_b
        W_enc[1, :, :a] = W_dec[:a, 1] = 0      # A-exclusive latents do not read or write B
        W_enc[0, :, a:b] = W_dec[a:b, 0] = 0    # B-exclusive latents do not read or write A
        if self.tied:
            W_dec[b:] = W_dec[b:].mean(1, keepdim=True)

    def normalise(self, x_BMD):
        """(1) Raw vectors -> z_BMD."""
        return (x_BMD.float() - self.mean) / self.scale

    def preactivate(self, z_BMD):
        """(2) Normalised vectors -> pre_BL."""
        return torch.addmm(self.b_enc, z_BMD.flatten(1), self.W_enc.flatten(0, 1))

    def encode(self, x_BMD):
        """(1) to (3): raw vectors -> f_BL, zero but for the k largest of each pair."""
        pre_BL = self.preactivate(self.normalise(x_BMD))
        f_Bk, index_Bk = keep_largest(pre_BL, self.k)
        return torch.zeros_like(pre_BL).scatter(1, index_Bk, f_Bk)

    def decode(self, f_BL):
        """(4) f_BL -> xhat_BMD in raw units."""
        zhat_BMD = torch.einsum("bl,lmd->bmd", f_BL, self.W_dec) + self.b_dec
        return zhat_BMD * self.scale + self.mean

    def forward(self, x_BMD):
        f_BL = self.encode(x_BMD)
        return self.decode(f_BL), f_BL

    @torch.no_grad()
    def fit_scale(self, x_NMD, by_coordinate=False):
        """Set mean and scale of (1) from the training vectors. They are saved with the weights, so
        encode() takes raw vectors and decode() returns them. The published code saves neither, and
        evaluates on vectors that are not normalised.

        The scale is one number for each model, the root mean square of x - mean: directions within
        a model are kept.
        by_coordinate: the standard deviation of each coordinate, as published (there, one for tool
        texts and another for plain texts; a crosscoder can keep one)."""
        self.mean.copy_(x_NMD.float().mean(0))
        self.scale.copy_((x_NMD - self.mean).pow(2).mean((0, 2))[:, None].sqrt())
        if by_coordinate:
            self.scale *= self.normalise(x_NMD).std(0).clamp(min=1e-6)

    @torch.no_grad()
    def fair_start(self, x_BMD):
        """Scale the encoder once: then the pre-activations of all partitions have the same spread,
        that of the last partition (the shared latents, if there are any).

        An exclusive latent reads one model, a shared one two. With the published initialisation
        exclusive latents are at first selected 9 to 28 times less often (k 160 and 45, L 8192), and
        many never become active."""
        pre_BL = self.preactivate(self.normalise(x_BMD))
        wanted = pre_BL[:, self.partitions()[-1].latents].std()
        for part in self.partitions():
            self.W_enc[..., part.latents] *= wanted / pre_BL[:, part.latents].std()


def keep_largest(pre_BL, k):
    """(3) The k largest of each row, negative ones set to 0 -> (f_Bk, index_Bk)."""
    largest = pre_BL.topk(k, sorted=False)
    return largest.values.relu(), largest.indices


def decode_active(f_Bk, index_Bk, W_dec):
    """(4) without b_dec -> zhat_BMD. Equal to the dense product over all latents, but it only
    fetches the rows of the k active ones: L / k times less work."""
    zhat_BE = F.embedding_bag(
        index_Bk, W_dec.flatten(1), per_sample_weights=f_Bk.float(), mode="sum")
    return zhat_BE.unflatten(1, W_dec.shape[1:])  # E = M D, both models' vectors end to end


# ---- 2. Losses and the training loop -------------------------------------------------------------
def l1_penalty(mean_L, lambda_L, W_dec, l1_mean=False):
    """(6), where mean_L is the mean of f over the batch.

    A sum over latents, each weighted by the length of its two rows together. Unweighted, the
    dictionary could shrink f for free and make the rows longer. With rows of equal length a shared
    latent costs sqrt(2) times as much as an exclusive one. On the toy pair lambda = 2e-5 makes the
    penalty 2 % of the loss.
    l1_mean: a mean over latents, unweighted, as the published code has it. Its lambda = 1e-3 makes
    the penalty 0.1 % of the loss, so the paper's "penalised" and "free" settings hardly differ."""
    if l1_mean:
        return (lambda_L * mean_L).mean()
    return (lambda_L * mean_L * W_dec.flatten(1).norm(dim=1)).sum()


def aux_loss(cc, z_BMD, zhat_BMD, pre_BL, dead_L):
    """(7): train dead latents on the error of the live ones (AuxK, arXiv 2406.04093, appendix A.2).

        aux = sum over partitions of  mean (z - zhat - sum_l f_l W_dec[l])^2

    Here f holds the 2 k largest of a partition's dead latents, and the mean is over the models that
    they write. Each partition has 2 k places of its own, or the many shared latents would fill them
    all. The error is detached: live latents must not learn from it. A dead latent whose pre is
    negative on all of these vectors learns nothing in this step."""
    n_pairs = 1 + len(z_BMD) // 4  # speed: on the toy a quarter of the batch revived as many
    error_BMD = (z_BMD - zhat_BMD).detach()[:n_pairs]

    total = z_BMD.new_zeros(())
    for part in cc.partitions():
        dead = part.latents.start + dead_L[part.latents].nonzero().flatten()
        if len(dead):
            # place: a position in `dead`; dead[place]: in the dictionary
            f_Bk, place_Bk = keep_largest(pre_BL[:n_pairs, dead], min(len(dead), 2 * cc.k))
            guess_BMD = decode_active(f_Bk, dead[place_Bk], cc.W_dec)
            total += (error_BMD - guess_BMD)[:, part.models].pow(2).mean()
    return total


def batches(n, batch, seed):
    """Endless batches of indices. Each epoch is a new order of all n, given by seed and epoch. What
    is left at its end, too few for a batch, is dropped."""
    rng = torch.Generator()
    batch = min(batch, n)
    for epoch in count():
        order = torch.randperm(n, generator=rng.manual_seed(seed * 1_000_003 + epoch))
        yield from order[:n - n % batch].split(batch)


def train(cc, x_NMD, steps, batch=512, lr=1e-3, l1_mean=False, l1_shared=2e-5, l1_excl=2e-5,
          revive=1 / 32, schedule=True, dead_after=100, seed=0):
    """Train a crosscoder, after fit_scale(), on raw vectors x_NMD that are on its device.

    l1_mean, l1_shared, l1_excl: form and lambdas of (6). revive: weight of (7). schedule: warm up
    and let the learning rate fall. dead_after: steps of silence until a latent counts as dead.
    -> {"mse", "l1", "aux": share of the loss} in the last step. Raises ValueError if training
    diverges."""
    order = batches(len(x_NMD), batch, seed)
    opt = torch.optim.Adam(cc.parameters(), lr=lr, fused=True)

    # speed: from 4,096 latents on the product (2) is in bf16. The latents it selects can differ a
    # little from those of encode(), and from those of a device without bf16
    bf16 = has_bf16(x_NMD.device) and len(cc.b_enc) >= 4096

    lambda_L = torch.full_like(cc.b_enc, l1_shared)
    lambda_L[:cc.n_a + cc.n_b] = l1_excl
    silent_L = torch.zeros_like(lambda_L)  # steps since a latent was last active

    for step in tqdm(range(steps), "train", leave=False, disable=None):
        # batch
        z_BMD = cc.normalise(x_NMD[next(order).to(x_NMD.device)])

        # forward
        with torch.autocast(x_NMD.device.type, torch.bfloat16, bf16):
            pre_BL = cc.preactivate(z_BMD)
        f_Bk, index_Bk = keep_largest(pre_BL, cc.k)
        zhat_BMD = decode_active(f_Bk, index_Bk, cc.W_dec) + cc.b_dec

        # mean of f over the batch; a latent whose mean is 0 was silent
        shares = (f_Bk.float() / len(f_Bk)).flatten()
        mean_L = torch.zeros_like(lambda_L).index_add(0, index_Bk.flatten(), shares)
        silent_L = torch.where(mean_L > 0, 0, silent_L + 1)

        # loss
        mse = (z_BMD - zhat_BMD).pow(2).mean()
        penalty = l1_penalty(mean_L, lambda_L, cc.W_dec, l1_mean)
        revival = torch.zeros_like(mse)
        if revive:  # a latent that is never selected has no gradient and would stay dead
            revival = revive * aux_loss(cc, z_BMD, zhat_BMD, pre_BL, silent_L > dead_after)
        terms = torch.stack([mse, penalty, revival])

        # backward
        opt.zero_grad()
        terms.sum().backward()
        cc.confine(cc.W_enc.grad, cc.W_dec.grad)  # tied rows get one gradient: they stay equal
        nn.utils.clip_grad_norm_(cc.parameters(), 1.)  # as published

        # step
        if schedule:  # a constant rate leaves the noise of the last batches in the weights
            warm_up = (step + 1) / (.05 * steps)
            fall = (steps - step) / (.2 * steps)
            opt.param_groups[0]["lr"] = lr * min(1, warm_up, fall)
        opt.step()

        if step % 50 == 0 or step + 1 == steps:
            if not all(t.isfinite().all() for t in [mse, *cc.parameters()]):
                raise ValueError(f"training diverged: lower --lr {lr:g}, or the vectors do not fit "
                                 "into fp16 and are not finite: take another layer")
    return dict(zip(("mse", "l1", "aux"), (terms / terms.sum()).tolist()))


def fve(x_BMD, xhat_BMD):
    """Fraction of variance explained per model, (M,): 1 is perfect, predicting the mean gives 0."""
    x_BMD = x_BMD.cpu().double()
    error_M = (x_BMD - xhat_BMD.cpu()).pow(2).mean(0).sum(1)
    return 1 - error_M / x_BMD.var(0, correction=0).sum(1)


# ---- 3. Activations ------------------------------------------------------------------------------
def load_model(name, device):
    """(model, frozen; its tokenizer) of a folder or a hub name, in the checkpoint's precision:
    rounding could hide what RL changed. Raises ValueError, also if weights are missing, which the
    library would draw at random."""
    with errors_about(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        if find_adapter_config_file(name):  # without peft the library would leave it out
            raise ValueError("an adapter: merge it into its base first (peft: merge_and_unload)")
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", output_loading_info=True)
        missing = report["missing_keys"]
        if missing:
            raise ValueError(f"{len(missing)} weights are not in its file, such as {min(missing)}")
        return model.to(device).requires_grad_(False), tokenizer


def token_ids(tokenizer, texts):
    """Lists of token ids. Adds no token: a chat template has put in its own."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@contextlib.contextmanager
def hooked(model, layer, edit):
    """A context in which block `layer`, counted from 0, outputs edit(h_BTD) instead of h_BTD (paper
    section 4). The blocks (model.model.layers in Llama and Qwen) are found in any model as the
    first list of modules that is as long as the model is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.get_decoder().modules()
             if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found or not 0 <= layer < depth:
        raise ValueError(f"no layer {layer} of 0 to {depth - 1} in {type(model).__name__}")

    def hook(module, args, out):
        if isinstance(out, tuple):  # some models output more than the residual stream
            return edit(out[0]), *out[1:]
        return edit(out)

    handle = found[0][layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class LayerReached(Exception):
    """Ends a forward pass early: no later layer is needed."""


@torch.no_grad()
def residual_stream(model, ids_BT, layer):
    """h_BTD after block `layer`, which transformers calls hidden_states[layer + 1]; of the last
    block it is the output before the final norm. Later blocks and the vocabulary head do not run.
    """
    def stop(h_BTD):
        raise LayerReached(h_BTD)

    try:
        with hooked(model, layer, stop):
            model(input_ids=ids_BT, use_cache=False)
    except LayerReached as reached:
        return reached.args[0]


def batches_by_length(ids, most_tokens):
    """Batches of indices of token lists of similar length, each with at most most_tokens when
    padded. A longer list is a batch of its own."""
    batch = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[i]) > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def collect(models, tokenizer, texts, layer, longest=4096):
    """The residual vector of each model at each text's last token (paper section 3) -> x_NMD, on
    the CPU, in fp16 to save memory.

    models: A and B, which read the same token ids. A text of more than `longest` tokens loses its
    beginning. Padding is on the right, where causal attention does not look, so the batch does not
    matter. Raises ValueError."""
    ids = [tokens[-longest:] for tokens in token_ids(tokenizer, texts)]
    x = []
    for model in models:
        x_ND = torch.empty(len(ids), model.config.get_text_config().hidden_size).half()
        most_tokens = 8192 if model.device.type == "cuda" else 1024
        for batch in tqdm([*batches_by_length(ids, most_tokens)], "collect", leave=False,
                          disable=None):
            rows = [torch.tensor(ids[i]) for i in batch]
            ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            last_B = [len(row) - 1 for row in rows]
            h_BTD = residual_stream(model, ids_BT, layer)
            x_ND[batch] = h_BTD[range(len(rows)), last_B].half().cpu()
        x.append(x_ND)
        del model  # if `models` loads them as it goes, this frees one before the next

    return torch.stack(x, 1)


# ---- 4. Texts ------------------------------------------------------------------------------------
TOOL_ROW = ("instruction", "input", "output")  # the texts of a tool row: system, user, right answer


def tool_texts(file, tokenizer, split, n, seed=0, whole_prompts=True):
    """n tool texts from the rows of a split.

    whole_prompts: half of the texts are whole prompts. eval_toolcall.py and steer.py change a
    prompt's last token, so the crosscoder should have seen such tokens. The other half, for
    variety, are prompts with a part of their answers, cut at a random blank. Both take the rows in
    the order of the file, and again from the first if they are too few.

    Not whole_prompts: the paper's way, at most n chunks of prompts with their answers. No chunk
    ends where an answer begins."""
    dialogues = []  # (prompt, the rest of its right answer)
    for row in read_rows(file, TOOL_ROW, split):
        prompt = prompt_of(row, tokenizer)
        dialogues.append((prompt, row["output"].removeprefix(answer_prefix(prompt))))
    if not whole_prompts:
        return chunks((f"{prompt}\n{answer}" for prompt, answer in dialogues), tokenizer, n)

    texts = [prompt for prompt, _ in islice(cycle(dialogues), n // 2)]
    rng = random.Random(seed)
    for prompt, answer in islice(cycle(dialogues), n - len(texts)):
        text = prompt + answer
        blanks = [blank.start() for blank in re.finditer(r"(?<!^)\s", text)]
        texts.append(text[:rng.choice(blanks)])
    return texts


def plain_texts(name, tokenizer, split, n):
    """At most n chunks of the plain texts of a split. Some tokenizers begin every text with a BOS
    token (Gemma's does, Qwen's does not); prompts get theirs from the chat template."""
    bos = tokenizer.decode(tokenizer("")["input_ids"])
    texts = (row["text"] for row in read_rows(name, ("text",), split, stream=True))
    return [bos + piece for piece in chunks(texts, tokenizer, n)]


def chunks(texts, tokenizer, n, size=30):
    """The first n pieces of some texts, each of `size` tokens or more, that end where a sentence
    does (paper section 3); line breaks between sentences become blanks. A shorter rest is dropped,
    unless it is all that a text has."""
    pieces = []
    for text in texts:
        piece = []
        length = 0
        before = len(pieces)
        for sentence in filter(str.strip, re.split(r"(?<=[.!?])\s+|\n+", text)):
            piece.append(sentence)
            length += len(token_ids(tokenizer, sentence))
            if length >= size:
                pieces.append(" ".join(piece))
                piece = []
                length = 0

        if piece and len(pieces) == before:
            pieces.append(" ".join(piece))
        if len(pieces) >= n:
            break
    return pieces[:n]


def prompt_of(row, tokenizer):
    """A row up to the assistant's turn, in the tokenizer's chat template. Raises ValueError."""
    messages = [{"role": "system", "content": row["instruction"]},
                {"role": "user", "content": row["input"]}]
    with errors_about(f"the chat template of {tokenizer.name_or_path}"):  # it may have no system
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not all(message["content"].strip() in prompt for message in messages):
            raise ValueError("it leaves out the system message or the question")
        prompt.encode()  # raises on what a terminal sent in another encoding
        return prompt


def answer_prefix(prompt):
    """The part of the answer that the chat template has already written: "<think>", or nothing."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def read_rows(name, names, split=None, stream=False):
    """Yield the rows of a split (or all), dicts with at least these texts, of a .jsonl file or of a
    hub dataset ("owner/name" or "owner/name:config"; stream: without a copy on disk). Raises
    ValueError that names file and row (blank lines are not counted), and OSError."""
    if name.endswith(".jsonl"):
        rows = map(json.loads, filter(bytes.strip, Path(name).read_bytes().splitlines()))
    else:
        path, _, config = name.partition(":")
        with errors_about(f"the dataset {name} (no .jsonl; needs: pip install datasets)"):
            from datasets import load_dataset
            rows = load_dataset(path, config or None, split="train", streaming=stream)

    done = 0
    try:
        for row in rows:
            "".join([row[key] for key in names]).encode()  # raises if one is no text
            if split in (None, split_of(row)):
                yield row
            done += 1
    except (LookupError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{name}, row {done + 1} (a row has the texts {names}): {e}") from e


def split_of(row):
    """train, dev or test: the row's own "split", otherwise drawn by a hash of the row, 80 : 10 :
    10. Raises ValueError."""
    tenths = ["dev", "test"] + 8 * ["train"]
    text = json.dumps(row, sort_keys=True, default=str)
    split = row.get("split") or tenths[zlib.crc32(text.encode()) % 10]
    if split not in tenths:
        raise ValueError(f"a split is train, dev or test, not {split!r}")
    return split


# ---- 5. The program ------------------------------------------------------------------------------
ROOT = Path(__file__).resolve().parent


@dataclass
class Settings:
    """All that a run depends on, with the values of the toy pair. Each is an option of dfc.py
    (n_texts is --n-texts) and is saved in the run's metrics.json."""

    preset: str = "tiny"    # which models, texts and sizes: tiny, smol or qwen
    recipe: str = "dfc"     # how to train: as here (dfc) or as published (paper)
    out: str = ""           # run folder; by default runs/ and what is given
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # or cuda:1, mps

    model_a: str = "tiny/toolrl"           # the RL-tuned model: a folder or a hub name
    model_b: str = "tiny/base"             # its base
    tool_texts: str = "tiny/tools.jsonl"   # tool rows: a .jsonl file or a hub dataset
    plain_texts: str = "tiny/text.jsonl"   # rows of plain text, likewise
    n_texts: int = 3000     # training texts of each kind
    layer: int = 2          # record the output of this block, counted from 0
    longest: int = 512      # tokens of a prompt and its answer, as many as the models can read
    max_new: int = 64       # of these, tokens of the answer

    dict: int = 512         # latents L
    k: int = 8              # active latents of a pair of vectors
    excl: float = .1        # A-exclusive share of the latents; 0 is the plain crosscoder
    steps: int = 1200       # training steps
    batch: int = 512        # pairs of vectors in a step
    lr: float = 1e-3        # highest learning rate of Adam
    l1_shared: float = 2e-5  # lambda of shared latents in (6)
    l1_excl: float = 2e-5    # lambda of exclusive latents in (6)
    seed: int = 0           # of weights, batches and texts
    text_seed: int = -1     # of where tool texts are cut; -1: as seed. Fixed, dictionaries share x

    # where we depart from the paper, and where the reason stands
    excl_b: float = 0.          # B-exclusive share; -1: as large as A's, as published (header)
    tie_shared: bool = True     # shared latents write one row into both models (Crosscoder)
    fair_start: bool = True     # encoder: the decoder transposed, partitions of equal spread
    by_coordinate: bool = False  # the scale of (1) for each coordinate, not each model (fit_scale)
    l1_mean: bool = False       # (6) as a mean over latents, not a weighted sum (l1_penalty)
    revive: float = 1 / 32      # weight of (7); 0 leaves dead latents dead (aux_loss)
    schedule: bool = True       # warm up, and let the learning rate fall (train)
    whole_prompts: bool = True  # half of the tool texts are whole prompts (tool_texts)

    def __post_init__(self):
        for name, value in vars(self).items():  # the project's own files, wherever it is run from
            if str(value).startswith("tiny/"):
                setattr(self, name, f"{ROOT}/{value}")


PRESETS = {  # the options that each stands for
    "tiny": "",
    "smol": """
        --model-a runs/smollm2/toolrl --model-b runs/smollm2/base
        --plain-texts runs/smollm2/plain.jsonl --n-texts 6000 --text-seed 0
        --layer 28 --longest 2048 --dict 1024 --k 16""",
    "qwen": """
        --model-a chengq9/ToolRL-Qwen2.5-3B --model-b Qwen/Qwen2.5-3B
        --tool-texts emrecanacikgoz/ToolRL --plain-texts HuggingFaceFW/fineweb:sample-10BT
        --n-texts 40000 --layer 13 --longest 4096 --max-new 512
        --dict 8192 --k 45 --steps 9000 --batch 1024 --lr 1e-4"""}
RECIPES = {
    "dfc": "",
    "paper": """
        --excl-b -1 --no-tie-shared --no-fair-start --by-coordinate --no-whole-prompts
        --l1-mean --l1-shared 1e-3 --l1-excl 1e-3 --revive 0 --no-schedule"""}


def parse_args(argv=None):
    """The settings of a command line: first the preset's options, then the recipe's, then those
    given, and the last one wins. Raises ValueError."""
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, epilog=inspect.getsource(Settings),
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                argument_default=argparse.SUPPRESS)  # what is not given is absent
    choices = {"preset": PRESETS, "recipe": RECIPES}
    for f in fields(Settings):
        how = {"type": f.type, "choices": choices.get(f.name)}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        p.add_argument(f"--{f.name.replace('_', '-')}", help=argparse.SUPPRESS, **how)

    # parsed twice: to learn preset and recipe, then with their options in front
    argv = sys.argv[1:] if argv is None else argv
    given = vars(p.parse_args(argv))
    preset = PRESETS[given.get("preset", "tiny")]
    recipe = RECIPES[given.get("recipe", "dfc")]
    s = Settings(**vars(p.parse_args([*f"{preset} {recipe}".split(), *argv])))
    if not s.out:  # named by what is given
        s.out = f"runs/{s.preset}"
        for name in sorted(given.keys() - {"preset", "device"}):
            s.out += f"-{name}" + re.sub(r"[^\w.+-]", "-", Path(str(given[name])).name)

    if min(s.n_texts, s.steps, s.batch) < 1:
        raise ValueError("--n-texts, --steps and --batch must be 1 or more")
    new_crosscoder(s, activation_dim=1)  # raises if its sizes do not fit
    return s


def new_crosscoder(s, activation_dim):
    """An untrained crosscoder with these settings. Raises ValueError."""
    sizes = []
    for share in (s.excl, s.excl if s.excl_b == -1 else s.excl_b):
        if not 0 <= share <= 1 or 0 < share * s.dict < 1:
            raise ValueError(f"--excl {s.excl:g} --excl-b {s.excl_b:g}: a share is 0, or at least "
                             f"one of {s.dict} latents")
        sizes.append(int(share * s.dict + 1e-6))  # as in the paper; .29 * 100 is 28.999999999999996
    return Crosscoder(activation_dim, s.dict, s.k, *sizes, s.tie_shared, not s.fair_start)


def activations(s, split, n, seed=0, whole_prompts=True):
    """The pair's vectors at n tool texts and at most n plain texts of a split -> x_NMD. Kept in a
    file beside the run, so that runs with other crosscoders need not collect again. If several
    processes want it, one collects and the others wait. Raises ValueError."""
    what = [s.model_a, s.model_b, split, n, seed, whole_prompts, s.layer, s.longest, s.device]
    file = Path(s.out).parent / "cache" / f"{fingerprint(what, s)}.pt"
    with FileLock(f"{file}.lock"):
        with contextlib.suppress(Exception):  # absent, or damaged in whatever way
            return torch.load(file).to(s.device)

        # texts
        began = time.time()
        tokenizer = AutoTokenizer.from_pretrained(s.model_a)
        tool = tool_texts(s.tool_texts, tokenizer, split, n, seed, whole_prompts)
        plain = plain_texts(s.plain_texts, tokenizer, split, n)
        if not plain:
            raise ValueError(f"{s.plain_texts}: no text of the {split} split")

        # vectors; the models are loaded one after the other
        models = (load_model(name, s.device)[0] for name in (s.model_a, s.model_b))
        x_NMD = collect(models, tokenizer, tool + plain, s.layer, s.longest)
        with atomically(file) as unfinished:
            torch.save(x_NMD, unfinished)
    sys.stderr.write(f"collected {len(x_NMD)} {split} texts, {len({*tool, *plain})} of them "
                     f"distinct, in {time.time() - began:.0f} s\n")
    return x_NMD.to(s.device)


def train_run(s):
    """Collect, train, measure, save. The folder gets its name when all is in it."""
    # 1. collect; the dev texts are the same for all settings
    began = time.time()
    text_seed = s.seed if s.text_seed < 0 else s.text_seed
    x_NMD = activations(s, "train", s.n_texts, text_seed, s.whole_prompts)
    dev_NMD = activations(s, "dev", 300)
    if x_NMD[:, 0].equal(x_NMD[:, 1]):
        sys.stderr.write("A's vectors equal B's: the models do not differ at this layer\n")

    # 2. train
    torch.manual_seed(s.seed)
    cc = new_crosscoder(s, x_NMD.shape[2]).to(s.device)
    cc.fit_scale(x_NMD, s.by_coordinate)
    if s.fair_start:
        cc.fair_start(x_NMD[next(batches(len(x_NMD), 4096, s.seed))])
    loss = train(cc, x_NMD, s.steps, s.batch, s.lr, s.l1_mean, s.l1_shared, s.l1_excl, s.revive,
                 s.schedule, seed=s.seed)

    # 3. measure and save
    metrics = {
        **measure(cc, x_NMD, dev_NMD),
        "loss": loss,
        "seconds": time.time() - began,
        "files": fingerprint("", s),
        "config": vars(s),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    with errors_about(s.out), atomically(Path(s.out)) as folder:
        cc.save_pretrained(folder)
        (folder / "README.md").unlink()  # an empty model card
        # it is written as 0600; give it the mode of the others
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
        # the project's own files stay relative, so that it can be moved
        (folder / "metrics.json").write_text(
            json.dumps(metrics, indent=1).replace(f"{ROOT}/tiny/", "tiny/"))


@torch.no_grad()
def measure(cc, x_NMD, dev_NMD):
    """{"fve": of dev vectors, per model; "l0": active latents of a pair, "live": share of latents
    that are ever active, both of training vectors, per partition}."""
    xhat_NMD, _ = cc(dev_NMD)
    rate_L = sum((cc.encode(x_BMD) > 0).sum(0) for x_BMD in x_NMD.split(1024)) / len(x_NMD)

    out = {"fve": dict(zip("AB", fve(dev_NMD, xhat_NMD).tolist())), "l0": {}, "live": {}}
    for part in cc.partitions():
        out["l0"][part.name] = rate_L[part.latents].sum().item()
        out["live"][part.name] = (rate_L[part.latents] > 0).float().mean().item()
    return out


def main(argv=None):
    s = parse_args(argv)
    found = Path(s.out).exists()
    if not found:
        check_pair(s)
        train_run(s)
    metrics = read_metrics(s.out)  # raises if it is no finished run
    saved = Settings(**metrics["config"])
    other = {name for name, _ in vars(s).items() ^ vars(saved).items()} - {"out", "device"}
    if other:
        raise ValueError(f"{s.out} is a run with another {', '.join(other)}: give another --out")
    if metrics["files"] != fingerprint("", s):
        sys.stderr.write(f"{s.out} was trained before its models or rows changed or moved\n")

    lines = {
        "fve": "variance of dev texts explained: 1 is all of it, below .5 train longer",
        "l0": f"active latents of a pair: they sum to k = {s.k}, unless few pre are positive",
        "live": "share of latents ever active: near 0, the partition learned nothing",
        "loss": "shares of the loss in the last step: mse should be most of it"}
    for name, text in lines.items():
        values = "".join(f"{key} {value:.3g}   " for key, value in metrics[name].items())
        print(f"{name:6s}{values:56s}{text}")
    print(f"{'found' if found else 'saved'} {s.out}, next: python eval_toolcall.py {s.out}; "
          f"python steer.py {s.out}")


# ---- 6. Plumbing: what a reader of the method may skip -------------------------------------------
def load(folder, device="cpu"):
    """The crosscoder of a run folder, frozen. Raises ValueError."""
    with errors_about(folder), contextlib.redirect_stdout(None):  # the library prints a line
        return Crosscoder.from_pretrained(folder, strict=True).to(device).requires_grad_(False)


def read_metrics(folder):
    """metrics.json of a finished run. Raises ValueError if there is none of ours."""
    with contextlib.suppress(Exception):  # in whatever way it is damaged
        metrics = json.loads(Path(folder, "metrics.json").read_text())
        Settings(**metrics["config"])
        return metrics
    raise ValueError(f"{folder} is no finished run of dfc.py: no metrics.json, or a damaged one "
                     "(python extras/published.py makes a run of a published crosscoder)")


def check_pair(s):
    """Look at models and rows before any work is done, and print what they are. Raises ValueError
    on what can be seen without loading a model."""
    # the models: the same tokens and width, enough positions
    names = s.model_a, s.model_b
    with errors_about(f"{s.model_a} with {s.model_b} (folders or hub names)"):
        a, b = (AutoConfig.from_pretrained(name).get_text_config() for name in names)
        ids_a, ids_b = (AutoTokenizer.from_pretrained(name).get_vocab().items() for name in names)
        differ = sorted(ids_a ^ ids_b)
        if differ or a.hidden_size != b.hidden_size:
            raise ValueError(f"their widths are {a.hidden_size} and {b.hidden_size}, and "
                             f"{len(differ)} tokens differ: {differ[:3]}")
    if not 0 < s.max_new < s.longest <= getattr(a, "max_position_embeddings", s.longest):
        raise ValueError(f"--max-new {s.max_new} must be 1 or more and less than --longest "
                         f"{s.longest}, which must lie within A's positions")
    sys.stderr.write(f"models  {a.num_hidden_layers} blocks of width {a.hidden_size}, "
                     f"{len(ids_a)} tokens\n")

    # the rows: some that call a tool in each split
    rows = read_rows(s.tool_texts, TOOL_ROW)
    calls = Counter((split_of(row), "<tool_call>" in row["output"]) for row in rows)
    for split in ("train", "dev", "test"):
        sys.stderr.write(f"{split:8s}{calls[split, True]} rows call a tool, "
                         f"{calls[split, False]} do not\n")
        if not calls[split, True]:
            raise ValueError(f"{s.tool_texts}: no {split} row has a <tool_call>")


def has_bf16(device):
    """Whether the device multiplies in bf16: CUDA does, and some CPUs."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # old torch does not tell
    return torch.device(device).type == "cuda" or known.get("avx512_bf16", False)


def fingerprint(what, s):
    """A hash of `what` (anything that JSON can hold), and of the names and time stamps of the files
    of a run's models and rows (of a link, of what it points to). A model of the hub is known by its
    commit, a dataset of the hub by its name."""
    stamps = [what, s.tool_texts, s.plain_texts]
    for name in (s.model_a, s.model_b):
        stamps.append(Path(cached_file(name, "config.json")).parent.name)
    for path in map(Path, (s.model_a, s.model_b, s.tool_texts, s.plain_texts)):
        for file in [path, *sorted(path.glob("*"))]:
            if file.is_file():
                stamps.append([file.name, file.stat().st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


@contextlib.contextmanager
def atomically(path):
    """Yields a temporary path, which becomes `path` if all went well: no file or folder of that
    name is ever half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as home:
        unfinished = Path(home, path.name)
        yield unfinished
        if not path.is_dir():  # another process may have been faster
            unfinished.replace(path)


@contextlib.contextmanager
def errors_about(name):
    """Any exception within becomes a ValueError that begins with the name."""
    try:
        yield
    except Exception as e:  # truncated, foreign or missing files, no network
        raise ValueError(f"cannot use {name}: {e}") from e


def cli(main, argv=None):
    """main(argv), but a ValueError or an OSError, which a user can mostly fix, becomes one line and
    exit status 2."""
    if not sys.stderr.isatty():  # a bar is for a terminal
        logging.disable_progress_bar()
    logging.set_verbosity_error()  # missing weights are an error of ours, in one line
    try:
        return main(argv)
    except (ValueError, OSError) as e:
        cause = e
        while below := cause.__cause__ or cause.__context__:  # what the hub answered
            cause = below
        said = f"{e}" if str(cause) in str(e) else f"{e} ({cause})"
        print(f"{Path(sys.argv[0]).name}: {' '.join(said.split())[:600]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(main))
