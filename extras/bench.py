"""What dfc costs, beside the published loops and other libraries.

    python extras/bench.py            # training: a whole run, and steps: six minutes on 2 CPU cores
    python extras/bench.py collect    # activations: half a minute
    python extras/bench.py generate   # patched answers, the unit of every grid: a minute
    python extras/bench.py real       # Qwen2.5-3B's shape, random weights, every stage: a minute

"published" is the published way, written again. Training: fp32, dense products over all latents, a
second forward pass for statistics, .item() in every step. Collection: batches of 8 texts in their
order, all layers kept. Answers: one prompt at a time, and all of it again for every version.
Contenders take turns, so that what else the machine does hits all alike; printed are the median,
the range, and how many times the first line. Only ratios within one run mean anything.

The figure to claim is the whole run's, with dead latents and their revival: single steps on fresh
weights are faster. Two other libraries train TopK autoencoders of both vectors laid end to end, the
same products. The constraint keeps torch as it is; torchvision, which comes along, fits no CPU
build of torch and then breaks transformers:

    pip install -c requirements.txt dictionary-learning eai-sparsify; pip uninstall torchvision
"""

import argparse
import contextlib
import os
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dfc
import eval_toolcall as ev
import steer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # eai-sparsify: triton compiles for GPUs only

# ---- 1. Clocks -----------------------------------------------------------------------------------

def seconds(act):
    """How long act() takes, with what it left on the GPU."""
    began = time.perf_counter()
    act()
    torch.cuda.synchronize() if DEVICE == "cuda" else None
    return time.perf_counter() - began

def race(title, contenders, turns=5):
    """{name: (act, parts)} -> milliseconds of one part, in turns; the first only warms up."""
    times = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, (act, parts) in contenders.items():
            times[name] += [1e3 * seconds(act) / parts] * (turn > 0)
    print(f"\n{title}")
    first = sorted(next(iter(times.values())))[turns // 2]
    for name, t in times.items():
        median = sorted(t)[turns // 2]
        print(f"  {name:40s}{median:9.1f} ms ({min(t):.1f}-{max(t):.1f})  {median / first:.2f} x",
              flush=True)

# ---- 2. Training ---------------------------------------------------------------------------------

def published_steps(x_NMD, L, k, batch, n):
    """n steps of the published loop, as a function."""
    cc = dfc.Crosscoder(x_NMD.shape[2], L, k, L // 10, L // 10).to(DEVICE)
    opt = torch.optim.Adam(cc.parameters(), lr=1e-4)

    def step():
        z_BMD = x_NMD[torch.randint(len(x_NMD), (batch,), device=DEVICE)].float()
        zhat_BMD, f_BL = cc(z_BMD)
        opt.zero_grad()
        ((z_BMD - zhat_BMD).pow(2).mean() + 1e-3 * f_BL.abs().mean()).backward()
        torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        opt.step()
        with torch.no_grad():
            zhat_BMD, f_BL = cc(z_BMD)
            return (z_BMD - zhat_BMD).var().item(), f_BL.gt(0).sum(1).float().mean().item()
    return lambda: [step() for _ in range(n)]

def our_steps(x_NMD, L, k, batch, n, **how):
    """n steps of ours, as a function."""
    cc = dfc.Crosscoder(x_NMD.shape[2], L, k, L // 10, 0, True).to(DEVICE)
    return lambda: dfc.train(cc, x_NMD, n, batch, **how)

def others(x_NMD, L, k, batch, n):
    """One step of each other library, if both are installed."""
    try:
        from dictionary_learning.trainers.top_k import TopKTrainer
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError as e:
        print(f"\nother libraries left out: {e}")
        return {}
    x_BE, none_dead = x_NMD[:batch].flatten(1).float(), torch.zeros(L, dtype=torch.bool).to(DEVICE)
    trainer = TopKTrainer(10 ** 6, x_BE.shape[1], L, k, 0, "", lr=1e-4, seed=0, device=DEVICE)
    coder = SparseCoder(x_BE.shape[1], SparseCoderConfig(num_latents=L, k=k), device=DEVICE)
    opt = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def step():  # its own loop needs a language model
        coder.set_decoder_norm_to_unit_norm()
        coder(x_BE, dead_mask=none_dead).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()
    return {"dictionary-learning, TopKTrainer": (lambda: trainer.update(2000, x_BE), 1),
            "eai-sparsify, SparseCoder": (step, 1)}

def train(sample=20):
    """The figure to claim, python dfc.py --dict 8192 --k 45 between two samples of the published
    loop; then single steps."""
    s = dfc.parse_args(["--dict", "8192", "--k", "45"])
    texts = dfc.texts_of(s, AutoTokenizer.from_pretrained(s.model_a), "train", s.n_texts)
    x_NMD = dfc.collect_pair(s.model_a, s.model_b, texts, s.layer, "runs/cache", DEVICE).to(DEVICE)
    cc = dfc.Crosscoder(x_NMD.shape[2], s.dict, s.k, s.n_a, s.n_b, s.tie_shared).to(DEVICE)
    cc.fit_scale(x_NMD)
    cc.fair_start(x_NMD[:4096])
    published = published_steps(x_NMD, s.dict, s.k, s.batch, sample)
    published()  # warms up
    before = seconds(published)
    ours = seconds(lambda: dfc.train(cc, x_NMD, s.steps, s.batch, s.lr, s.l1_shared, s.l1_excl))
    theirs = [s.steps / sample * t for t in (before, seconds(published))]
    print(f"\na whole run, {s.steps} steps of {s.batch} pairs, {s.dict} latents, k {s.k}\n"
          f"  dfc, with revival{ours:12.1f} s\n  published{sum(theirs) / 2:20.1f} s, scaled from "
          f"{sample} steps before ({theirs[0]:.1f}) and {sample} after ({theirs[1]:.1f})\n"
          f"  {sum(theirs) / 2 / ours:.2f} x", flush=True)
    steps(128, 8192, 45, 1024, 5)
    if DEVICE == "cuda":
        steps(2048, 8192, 45, 1024, 100)

def steps(D, L, k, batch, n):
    """n single steps on random vectors, in which no latent is dead unless all are said to be."""
    x_NMD = torch.randn(4 * batch, 2, D, device=DEVICE)
    size = x_NMD, L, k, batch, n
    race(f"a training step, width {D}, {L} latents, k {k}, {batch} pairs", {
        "dfc, no latent dead": (our_steps(*size), n),
        "dfc, every latent taken for dead": (our_steps(*size, dead_after=-1), n),
        "published": (published_steps(*size), n)} | others(*size))

# ---- 3. Collection and answers -------------------------------------------------------------------

def embedded(n):
    """(settings, {"A", "B"}, tokenizer, 2 n texts, n test prompts) of the embedded pair."""
    s = dfc.parse_args([])
    (a, tokenizer), (b, _) = (dfc.load_model(name, DEVICE) for name in (s.model_a, s.model_b))
    models = {"A": a, "B": b}
    r = argparse.Namespace(s=s, models=models, tokenizer=tokenizer, max_new=64)
    prompts = ev.rows_of(r, "test")[1][:n]
    return s, models, tokenizer, dfc.texts_of(s, tokenizer, "train", n), prompts

def collect():
    s, models, tokenizer, texts, _ = embedded(150)

    @torch.no_grad()
    def published():
        for i in range(0, len(texts), 8):
            batch = tokenizer(texts[i:i + 8], return_tensors="pt", padding=True).to(DEVICE)
            h_BTD = models["A"](**batch, output_hidden_states=True).hidden_states[s.layer + 1]
            h_BTD[range(len(h_BTD)), batch["attention_mask"].sum(1) - 1].float().cpu()
    race(f"collection, a text of {len(texts)}", {
        "dfc": (lambda: dfc.collect(models["A"], tokenizer, texts, s.layer), len(texts)),
        "published": (published, len(texts))})

def generate(versions=8, some=3):
    s, models, tokenizer, _, prompts = embedded(40)
    x_NMD = ev.pair_at(models, tokenizer, prompts, s.layer)
    v_VND = torch.stack([(x_NMD[:, 1] - x_NMD[:, 0]) * v / versions for v in range(versions)])

    def answers(n, v):
        return ev.generate(models["A"], tokenizer, prompts[n], 64, s.layer, [1] * len(v_VND[v]),
                           v_VND[v, n])
    each = [(slice(i, i + 1), slice(v, v + 1)) for i in range(some) for v in range(versions)]
    race(f"an answer, {versions} versions of {len(prompts)} prompts; published: the first {some}", {
        "dfc": (lambda: answers(slice(None), slice(None)), versions * len(prompts)),
        "published": (lambda: [answers(n, v) for n, v in each], len(each))}, turns=3)

# ---- 4. The real pair's shape --------------------------------------------------------------------

@contextlib.contextmanager
def stage(name):
    """Print the seconds of a stage and the peak of memory so far."""
    began = time.time()
    yield
    torch.cuda.synchronize() if DEVICE == "cuda" else None
    peak = (torch.cuda.max_memory_allocated() / 2 ** 30 if DEVICE == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
    print(f"{name:44s}{time.time() - began:8.1f} s {peak:7.1f} GiB at most", flush=True)

def real(steps=3):
    """Qwen2.5-3B's shape, random weights, 2 of 36 layers on a CPU: what fits, what it costs."""
    s, _, tokenizer, texts, prompts = embedded(100)
    n, layer = (36, 13) if DEVICE == "cuda" else (2, 1)
    config = Qwen2Config(hidden_size=2048, num_hidden_layers=n, num_attention_heads=16,
                         num_key_value_heads=2, intermediate_size=11008, vocab_size=151_936,
                         tie_word_embeddings=True)
    with stage(f"two models, {n} of 36 layers"), torch.device(DEVICE):
        models = {m: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
                  for m in "AB"}
    with stage(f"collect layer {layer}, {len(texts)} texts"):
        x_NMD = torch.stack([dfc.collect(m, tokenizer, texts, layer) for m in models.values()], 1)
    x_NMD = x_NMD.repeat(-(-2048 // len(x_NMD)), 1, 1).to(DEVICE)
    cc = dfc.Crosscoder(2048, 8192, 45, 819, 0, True).to(DEVICE)
    cc.fit_scale(x_NMD)
    with stage(f"train, 8192 latents, {steps} steps of 1024 pairs"):
        dfc.train(cc, x_NMD, steps)
    prompts = prompts[:4]
    x_NMD = ev.pair_at(models, tokenizer, prompts, layer)
    with stage(f"reconstruct into B, {len(prompts)} prompts, 16 tokens"):
        v_VND = torch.stack(list(ev.reconstructions(cc, x_NMD)["B"].values())).detach()
        ev.generate(models["B"], tokenizer, prompts, 16, layer, [0] * len(v_VND), v_VND)
    with stage("steer, 30 cells of a grid, the same prompts"):
        f_NL = cc.encode(x_NMD).detach()
        v_VND = torch.stack([steer.delta(cc, f_NL, list(range(i)), 2.) for i in range(1, 31)])
        ev.generate(models["A"], tokenizer, prompts, 16, layer, [1] * 30, v_VND.detach())

# ---- 5. The program ------------------------------------------------------------------------------

def main(argv=None):
    jobs = {job.__name__: job for job in (train, collect, generate, real)}
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("job", nargs="?", choices=jobs, default="train")
    job = p.parse_args(argv).job
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    jobs[job]()

if __name__ == "__main__":
    sys.exit(dfc.cli(main))
