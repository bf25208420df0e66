"""What dfc costs, beside the published loops and other libraries.

    python extras/bench.py            # training, whole runs and steps: eight minutes on 2 cores
    python extras/bench.py collect    # activations: half a minute
    python extras/bench.py generate   # patched answers, the unit of every grid: a minute
    python extras/bench.py real       # Qwen2.5-3B's shape, random weights, every stage: a minute

"published" is the published way, written again. Training: fp32, dense products over all latents, a
second forward pass for statistics, .item() in every step. Collection: batches of 8 texts in their
order, all layers kept. Answers: one prompt at a time, and all of it again for every version.
Contenders take turns, so that what else the machine does hits all alike; printed are the median,
the range, and how many times the first line. Only ratios within one run mean anything.

The figure to claim is the whole run's, with dead latents and their revival: single steps on fresh
weights are faster. It is measured with the encoder's product in bf16, where bf16 pays, and without.
Two other libraries train TopK autoencoders of both vectors laid end to end, the same products. The
constraint keeps torch as it is; torchvision, which comes along, fits no CPU build of torch and then
breaks transformers:

    pip install -c requirements.txt dictionary-learning eai-sparsify; pip uninstall torchvision

Shapes as in dfc.py: N vectors, B of a batch, M = 2 models, D width, L latents, k active ones, T
tokens, E both vectors of a pair laid end to end; V versions of an answer.
"""

import argparse
import contextlib
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
import dfc
import eval_toolcall as ev
import steer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # eai-sparsify: triton compiles for GPUs only


# ---- 1. Clocks -----------------------------------------------------------------------------------

class Contender(NamedTuple):
    """Something whose time is taken."""

    name: str
    act: Callable
    parts: int    # how many steps, texts or answers act() does


def seconds(act):
    """How long act() takes, with what it left on the GPU."""
    began = time.perf_counter()
    act()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(title, contenders, turns=5):
    """Print the milliseconds of one part of each, in turns; the first turn only warms up."""
    times = {contender.name: [] for contender in contenders}
    for turn in range(turns + 1):
        for name, act, parts in contenders:
            spent = 1e3 * seconds(act) / parts
            if turn > 0:
                times[name].append(spent)

    print(f"\n{title}")
    first = statistics.median(times[contenders[0].name])
    for name, spent in times.items():
        median = statistics.median(spent)
        print(f"  {name:40s}{median:9.1f} ms ({min(spent):.1f}-{max(spent):.1f})  "
              f"{median / first:.2f} x", flush=True)


# ---- 2. Training ---------------------------------------------------------------------------------

def published_step(cc, opt, x_NMD, batch):
    """A step of the published loop -> (variance of the error, latents active), for its log."""
    index_B = torch.randint(len(x_NMD), (batch,), device=DEVICE)
    x_BMD = x_NMD[index_B].float()

    # forward, backward, step
    xhat_BMD, f_BL = cc(x_BMD)
    loss = (x_BMD - xhat_BMD).pow(2).mean() + 1e-3 * f_BL.abs().mean()
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
    opt.step()

    # statistics
    with torch.no_grad():
        xhat_BMD, f_BL = cc(x_BMD)
        active_B = f_BL.gt(0).sum(1).float()
        return (x_BMD - xhat_BMD).var().item(), active_B.mean().item()


def published_training(x_NMD, L, k, batch, n):
    """n steps of the published loop, as a function."""
    cc = dfc.Crosscoder(x_NMD.shape[2], L, k, L // 10, L // 10).to(DEVICE)
    opt = torch.optim.Adam(cc.parameters(), lr=1e-4)

    def act():
        for _ in range(n):
            published_step(cc, opt, x_NMD, batch)
    return act


def our_training(x_NMD, L, k, batch, n, **how):
    """n steps of ours, as a function."""
    cc = dfc.Crosscoder(x_NMD.shape[2], L, k, L // 10, tied=True).to(DEVICE)
    return lambda: dfc.train(cc, x_NMD, n, batch, **how)


def other_libraries(x_NMD, L, k, batch):
    """A step of each as a Contender, if both are installed."""
    try:
        from dictionary_learning.trainers.top_k import TopKTrainer
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError as e:
        print(f"\nother libraries left out: {e}")
        return []
    x_BE = x_NMD[:batch].flatten(1)
    width = x_BE.shape[1]
    trainer = TopKTrainer(10 ** 6, width, L, k, 0, "", lr=1e-4, seed=0, device=DEVICE)

    coder = SparseCoder(width, SparseCoderConfig(num_latents=L, k=k), device=DEVICE)
    opt = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    dead_L = torch.zeros(L, dtype=torch.bool, device=DEVICE)

    def sparsify_step():  # its own loop needs a language model
        coder.set_decoder_norm_to_unit_norm()
        coder(x_BE, dead_mask=dead_L).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()

    return [Contender("dictionary-learning, TopKTrainer", lambda: trainer.update(2000, x_BE), 1),
            Contender("eai-sparsify, SparseCoder", sparsify_step, 1)]


def whole_runs(s, sample):
    """What python dfc.py does with these settings, with and without bf16, in turns with `sample`
    steps of the published loop."""
    tokenizer = AutoTokenizer.from_pretrained(s.model_a)
    tool_texts, plain_texts = dfc.load_texts(
        s.tool_texts, s.plain_texts, tokenizer, "train", s.n_texts, "runs/cache")
    x_NMD = dfc.collect_pair(s.model_a, s.model_b, tool_texts + plain_texts, s.layer, "runs/cache",
                             DEVICE).to(DEVICE)
    published = published_training(x_NMD, s.dict, s.k, s.batch, sample)

    def ours():
        cc = dfc.Crosscoder(x_NMD.shape[2], s.dict, s.k, s.n_a, s.n_b, s.tie_shared).to(DEVICE)
        cc.fit_scale(x_NMD)
        cc.fair_start(x_NMD[:4096])
        dfc.train(cc, x_NMD, s.steps, s.batch, s.lr, s.l1_shared, s.l1_excl)

    precisions = {"fp32": False}
    if dfc.bf16_pays(x_NMD.device, s.dict):
        precisions = {"bf16": True, "fp32": False}

    published()  # warms up
    samples = [seconds(published)]
    times = {}
    for precision, bf16 in precisions.items():
        with mock.patch.object(dfc, "bf16_pays", return_value=bf16):
            times[precision] = seconds(ours)
        samples.append(seconds(published))

    print(f"\na whole run, {s.steps} steps of {s.batch} pairs, {s.dict} latents, k {s.k}")
    scaled = [s.steps / sample * spent for spent in samples]
    theirs = statistics.mean(scaled)
    print(f"  published{theirs:28.1f} s, scaled from {sample} steps before and after each of ours "
          f"({min(scaled):.1f}-{max(scaled):.1f})")
    for precision, spent in times.items():
        print(f"  dfc, with revival, {precision}{spent:14.1f} s  {theirs / spent:.2f} x")


def single_steps(D, L, k, batch, n):
    """Race n steps on random vectors, in which no latent is dead unless all are said to be."""
    x_NMD = torch.randn(4 * batch, 2, D, device=DEVICE)
    size = (x_NMD, L, k, batch)
    race(f"a training step, width {D}, {L} latents, k {k}, {batch} pairs", [
        Contender("dfc, no latent dead", our_training(*size, n), n),
        Contender("dfc, every latent taken for dead", our_training(*size, n, dead_after=-1), n),
        Contender("published", published_training(*size, n), n),
        *other_libraries(*size),
    ])


def train():
    """The figure to claim, then single steps."""
    whole_runs(dfc.parse_args(["--dict", "8192", "--k", "45"]), sample=20)
    single_steps(128, 8192, 45, 1024, 5)
    if DEVICE == "cuda":
        single_steps(2048, 8192, 45, 1024, 100)


# ---- 3. Collection and answers -------------------------------------------------------------------

class Pair(NamedTuple):
    """The embedded pair."""

    models: dict     # {"A", "B"}
    tokenizer: object
    texts: list      # training texts
    prompts: list    # of test rows
    layer: int


def embedded_pair(n_texts, n_prompts):
    """The Pair, with as many texts of each of the two kinds, and prompts."""
    s = dfc.parse_args([])
    model_a, tokenizer = dfc.load_model(s.model_a, DEVICE)
    model_b, _ = dfc.load_model(s.model_b, DEVICE)
    tool_texts, plain_texts = dfc.load_texts(
        s.tool_texts, s.plain_texts, tokenizer, "train", n_texts, "runs/cache")
    _, prompts = ev.load_prompts(s.tool_texts, tokenizer, "test", longest=4096)
    models = {"A": model_a, "B": model_b}
    return Pair(models, tokenizer, tool_texts + plain_texts, prompts[:n_prompts], s.layer)


def collect():
    pair = embedded_pair(150, 1)
    model = pair.models["A"]
    texts = pair.texts

    @torch.no_grad()
    def published():
        for i in range(0, len(texts), 8):
            batch = pair.tokenizer(texts[i:i + 8], return_tensors="pt", padding=True).to(DEVICE)
            h_BTD = model(**batch, output_hidden_states=True).hidden_states[pair.layer + 1]
            last_B = batch["attention_mask"].sum(1) - 1
            h_BTD[range(len(h_BTD)), last_B].float().cpu()

    def ours():
        dfc.collect(model, pair.tokenizer, texts, pair.layer)

    race(f"collection, a text of {len(texts)}", [
        Contender("dfc", ours, len(texts)),
        Contender("published", published, len(texts)),
    ])


def generate(versions=8, some=3):
    pair = embedded_pair(1, 40)
    prompts = pair.prompts
    x_NMD = ev.collect_both(pair.models, pair.tokenizer, prompts, pair.layer)
    b_minus_a_ND = x_NMD[:, 1] - x_NMD[:, 0]
    v_VND = torch.stack([b_minus_a_ND * v / versions for v in range(versions)])

    def answer(prompts, v_VND):
        ev.generate(pair.models["A"], pair.tokenizer, prompts, 64, pair.layer, [1.] * len(v_VND),
                    v_VND)

    def published():
        for n in range(some):
            for v in range(versions):
                answer(prompts[n:n + 1], v_VND[v:v + 1, n:n + 1])

    race(f"an answer, {versions} versions of {len(prompts)} prompts; published: the first {some}", [
        Contender("dfc", lambda: answer(prompts, v_VND), versions * len(prompts)),
        Contender("published", published, versions * some),
    ], turns=3)


# ---- 4. The real pair's shape --------------------------------------------------------------------

@contextlib.contextmanager
def reported(name):
    """Print the seconds of what is done within, and the peak of memory so far."""
    began = time.time()
    yield
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"{name:44s}{time.time() - began:8.1f} s {peak:7.1f} GiB at most", flush=True)


def real(steps=3):
    """Qwen2.5-3B's shape, random weights, 2 of 36 layers on a CPU: what fits, what it costs."""
    tiny = embedded_pair(100, 4)
    n_layers = 36 if DEVICE == "cuda" else 2
    layer = 13 if DEVICE == "cuda" else 1
    config = Qwen2Config(
        hidden_size=2048, num_hidden_layers=n_layers, num_attention_heads=16,
        num_key_value_heads=2, intermediate_size=11008, vocab_size=151_936,
        tie_word_embeddings=True)

    models = {}
    with reported(f"two models, {n_layers} of 36 layers"), torch.device(DEVICE):
        for m in "AB":
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            models[m] = model.eval()

    with reported(f"collect layer {layer}, {len(tiny.texts)} texts"):
        x_NMD = ev.collect_both(models, tiny.tokenizer, tiny.texts, layer)

    # as many vectors as two batches need
    x_NMD = x_NMD.repeat(math.ceil(2048 / len(x_NMD)), 1, 1)
    cc = dfc.Crosscoder(2048, 8192, 45, 819, tied=True).to(DEVICE)
    cc.fit_scale(x_NMD)
    with reported(f"train, 8192 latents, {steps} steps of 1024 pairs"):
        dfc.train(cc, x_NMD, steps, batch=1024)
    cc.requires_grad_(False)

    with reported(f"steer, 30 versions of {len(tiny.prompts)} prompts, 16 tokens"):
        x_NMD = ev.collect_both(models, tiny.tokenizer, tiny.prompts, layer)
        f_NL = cc.encode(x_NMD)
        v_VND = torch.stack([steer.delta(cc, f_NL, list(range(n)), 2.) for n in range(1, 31)])
        ev.generate(models["A"], tiny.tokenizer, tiny.prompts, 16, layer, [1.] * 30, v_VND)


# ---- 5. The program ------------------------------------------------------------------------------

def main(argv=None):
    jobs = {"train": train, "collect": collect, "generate": generate, "real": real}
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("job", nargs="?", choices=jobs, default="train")
    args = p.parse_args(argv)

    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    jobs[args.job]()


if __name__ == "__main__":
    dfc.leave(dfc.cli(main))
