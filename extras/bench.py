"""How fast dfc is, beside the published loops and other libraries.

    python extras/bench.py            # training, whole runs and steps: eight minutes on 2 cores
    python extras/bench.py collect    # activations: half a minute
    python extras/bench.py generate   # patched answers, which every grid is made of: a minute

"published" is the authors' way, written again. Training: fp32, dense products over all latents, a
second forward pass for statistics, .item() in every step. Collection: batches of 8 texts in their
order, all layers kept. Answers: one prompt at a time, read again for every version. Contenders
take turns, so that other load on the machine hits all alike. Printed are the median, the range, and
the ratio to the first line. Only ratios within one run mean anything.

The number to claim is that of a whole run, with dead latents and their revival: single steps on
fresh weights are faster.
Two other libraries train TopK autoencoders of both vectors laid end to end, which are the same
products. The constraint keeps torch as it is. torchvision comes along, fits no CPU build of torch
and then breaks transformers:

    pip install -c requirements.txt dictionary-learning eai-sparsify; pip uninstall torchvision

Shapes as in dfc.py: N vectors, B of a batch, M = 2 models, D width, L latents, k active ones, T
tokens, E both vectors of a pair laid end to end.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
import dfc
import eval_toolcall as ev

DEVICE = dfc.Settings.device
if DEVICE == "cpu":
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # eai-sparsify: triton compiles for GPUs only


# ---- 1. Clocks -----------------------------------------------------------------------------------
def seconds(act):
    """How long act() takes, until the GPU is done as well."""
    began = time.perf_counter()
    act()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(title, contenders, turns=5):
    """Print how long each contender takes, in milliseconds a part. They take turns, and the first
    turn only warms up. contenders: {name: (a function, how many parts it does)}; a part is a step,
    a text or an answer."""
    times = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, (act, parts) in contenders.items():
            spent = 1e3 * seconds(act) / parts
            if turn > 0:
                times[name].append(spent)

    print(f"\n{title}")
    first = None
    for name, spent in times.items():
        median = statistics.median(spent)
        first = first or median
        print(f"  {name:40s}{median:9.1f} ms ({min(spent):.1f}-{max(spent):.1f})  "
              f"{median / first:.2f} x")


# ---- 2. Training ---------------------------------------------------------------------------------
def published_training(x_NMD, L, k, batch, n):
    """n steps of the published loop, as a function."""
    cc = dfc.Crosscoder(x_NMD.shape[2], L, k, L // 10, L // 10).to(DEVICE)
    opt = torch.optim.Adam(cc.parameters(), lr=1e-4)

    def act():
        for _ in range(n):
            x_BMD = x_NMD[torch.randint(len(x_NMD), (batch,), device=DEVICE)].float()

            # forward, backward, step
            xhat_BMD, f_BL = cc(x_BMD)
            loss = (x_BMD - xhat_BMD).pow(2).mean() + 1e-3 * f_BL.abs().mean()
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
            opt.step()

            # for its log: variance of the error, active latents
            with torch.no_grad():
                xhat_BMD, f_BL = cc(x_BMD)
                (x_BMD - xhat_BMD).var().item()
                f_BL.gt(0).sum(1).float().mean().item()
    return act


def our_training(x_NMD, L, k, batch, n, **how):
    """n steps of ours, as a function."""
    cc = dfc.Crosscoder(x_NMD.shape[2], L, k, L // 10, tied=True).to(DEVICE)
    cc.fit_scale(x_NMD)
    cc.fair_start(x_NMD[:4096])
    return lambda: dfc.train(cc, x_NMD, n, batch, **how)


def other_libraries(x_NMD, L, k, batch):
    """A step of each as a contender, if both are installed."""
    try:
        from dictionary_learning.trainers.top_k import TopKTrainer
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError as e:
        print(f"\nother libraries are left out: {e}")
        return {}
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

    return {"dictionary-learning, TopKTrainer": (lambda: trainer.update(2000, x_BE), 1),
            "eai-sparsify, SparseCoder": (sparsify_step, 1)}


def whole_run(s, sample=20):
    """The training of python dfc.py with these settings, between two times `sample` steps of the
    published loop."""
    x_NMD = dfc.activations(s, "train", s.n_texts, s.seed, s.whole_prompts)
    size = (x_NMD, s.dict, s.k, s.batch)
    published = published_training(*size, sample)
    published()  # warms up

    before = seconds(published)
    spent = seconds(our_training(*size, s.steps))
    samples = [s.steps / sample * each for each in (before, seconds(published))]

    print(f"\na whole run, {s.steps} steps of {s.batch} pairs, {s.dict} latents, k {s.k}\n"
          f"  published {statistics.mean(samples):.1f} s, scaled from {sample} steps before and "
          f"after ({min(samples):.1f}-{max(samples):.1f})\n"
          f"  dfc, with revival {spent:.1f} s  {statistics.mean(samples) / spent:.2f} x")


def single_steps(D, L, k, batch, n):
    """Race n steps on random vectors. On these no latent is dead, unless dead_after says that all
    are."""
    x_NMD = torch.randn(4 * batch, 2, D, device=DEVICE)
    size = (x_NMD, L, k, batch)
    contenders = {
        "dfc, no latent dead": (our_training(*size, n), n),
        "dfc, every latent counted as dead": (our_training(*size, n, dead_after=-1), n),
        "published": (published_training(*size, n), n),
    }
    contenders.update(other_libraries(*size))
    race(f"a training step, width {D}, {L} latents, k {k}, {batch} pairs", contenders)


def train():
    """The number to claim, then single steps."""
    whole_run(dfc.Settings(dict=8192, k=45, out="runs/bench"))  # its vectors go to runs/cache
    single_steps(128, 8192, 45, 1024, 5)
    if DEVICE == "cuda":
        single_steps(2048, 8192, 45, 1024, 100)


# ---- 3. Collection and answers -------------------------------------------------------------------
def collect():
    s = dfc.Settings()
    model, tokenizer = dfc.load_model(s.model_a, DEVICE)
    texts = dfc.tool_texts(s.tool_texts, tokenizer, "train", 150)
    texts += dfc.plain_texts(s.plain_texts, tokenizer, "train", 150)

    @torch.no_grad()
    def published():
        for i in range(0, len(texts), 8):
            batch = tokenizer(texts[i:i + 8], return_tensors="pt", padding=True).to(DEVICE)
            h_BTD = model(**batch, output_hidden_states=True).hidden_states[s.layer + 1]
            last_B = batch["attention_mask"].sum(1) - 1
            h_BTD[range(len(h_BTD)), last_B].float().cpu()

    def ours():
        dfc.collect([model], tokenizer, texts, s.layer)

    n = len(texts)
    race(f"collection, a text of {n}", {"dfc": (ours, n), "published": (published, n)})


def generate(versions=8, some=3):
    s = dfc.Settings()
    model, tokenizer = dfc.load_model(s.model_a, DEVICE)
    _, prompts = ev.load_prompts(s.tool_texts, tokenizer, "test", 4096)
    prompts = prompts[:40]

    def answer(prompts, versions):  # adds zeros: what is added does not matter to the clock
        v_VND = torch.zeros(versions, len(prompts), 1)
        ev.generate(model, tokenizer, prompts, 64, s.layer, v_VND)

    def published():
        for prompt in prompts[:some]:
            for _ in range(versions):
                answer([prompt], 1)

    race(f"an answer, {versions} versions of {len(prompts)} prompts; published: the first {some}", {
        "dfc": (lambda: answer(prompts, versions), versions * len(prompts)),
        "published": (published, versions * some),
    }, turns=3)


# ---- 4. The program ------------------------------------------------------------------------------
def main(argv=None):
    jobs = {"train": train, "collect": collect, "generate": generate}
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("job", nargs="?", choices=jobs, default="train")
    args = p.parse_args(argv)

    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    jobs[args.job]()


if __name__ == "__main__":
    raise SystemExit(dfc.cli(main))
