"""What dfc costs beside the machine's limits, the published loops and other libraries.

    python extras/bench.py             # training steps and collection: 1 to 2 minutes on 2 cores
    python extras/bench.py generate    # batched answers against one prompt at a time
    python extras/bench.py grid        # the steering grid against a loop over cells and prompts

Contenders take turns, so that what else the machine does hits all alike. Printed: the median, (the
range) and how many times the first line. Only ratios of one run mean anything. "dense count": 10 B
2D L operations (encoder and decoder, forward and backward) at the rate of the encoder's product and
Adam's 28 bytes for each of 4 D L weights at the speed of a copy. A step can be below it: all but
the encoder's forward product touches k of L latents. "published": fp32, masked dense weights, a
second forward for statistics, .item() in every step. Others: TopK autoencoders of both vectors laid
end to end, which are the same products.
"""

import contextlib
import io
import os
import resource
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dfc  # noqa: E402
import eval_toolcall as ev  # noqa: E402
import steer  # noqa: E402
from extras import grid as grid_of  # noqa: E402

DEVICE, TINY = "cuda" if torch.cuda.is_available() else "cpu", dfc.PRESETS["tiny"]
Shape = namedtuple("Shape", "D L k batch")


def timed(act, n=1, each=1):
    """A contender: a function that returns the milliseconds of each of `each` parts of act()."""
    def run():
        torch.cuda.synchronize() if DEVICE == "cuda" else None
        began = time.perf_counter()
        for _ in range(n):
            act()
        torch.cuda.synchronize() if DEVICE == "cuda" else None
        return 1e3 * (time.perf_counter() - began) / n / each
    return run


def race(title, contenders, turns=5):
    print(f"\n{title}")
    times = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            times[name] += [run()] * (turn > 0)  # the first turn warms up
    first = sorted(next(iter(times.values())))[turns // 2]
    for name, t in times.items():
        median = sorted(t)[turns // 2]
        print(f"  {name:36s}{median:9.1f} ms ({min(t):.1f}-{max(t):.1f}), {median / first:.2f} x",
              flush=True)


def start(s, tied=True):
    torch.manual_seed(0)
    x = torch.randn(4 * s.batch, 2, s.D, device=DEVICE)
    return x, dfc.Crosscoder(s.D, s.L, s.k, s.L // 10, 0 if tied else s.L // 10, tied).to(DEVICE)


def ours(s, **how):
    x, cc = start(s)
    n = 200 if DEVICE == "cuda" else 10  # with all that precedes the first step
    return timed(lambda: dfc.train(cc, x, n, s.batch, **how), each=n)


def published(s):
    x, cc = start(s, tied=False)
    opt = torch.optim.Adam(cc.parameters(), lr=1e-4)

    def step():
        z = x[torch.randint(len(x), (s.batch,), device=DEVICE)]
        zhat, f = cc(z)  # the plain definition
        opt.zero_grad()
        ((z - zhat).pow(2).mean() + 1e-3 * f.abs().mean()).backward()
        torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        opt.step()
        with torch.no_grad():
            zhat, f = cc(z)
            return (z - zhat).var().item(), f.gt(0).sum(1).float().mean().item()
    return timed(step, 3)


def others(s):
    try:
        from dictionary_learning.trainers.top_k import TopKTrainer
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError as e:
        print(f"\nothers: pip install dictionary-learning eai-sparsify ({e})")
        return {}
    x, none_dead = start(s)[0][:s.batch].flatten(1), torch.zeros(s.L, dtype=torch.bool)
    trainer = TopKTrainer(10 ** 6, 2 * s.D, s.L, s.k, 0, "", lr=1e-4, seed=0, device=DEVICE)
    coder = SparseCoder(2 * s.D, SparseCoderConfig(num_latents=s.L, k=s.k), device=DEVICE)
    opt = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def step():  # its own loop needs a language model
        coder.set_decoder_norm_to_unit_norm()
        coder(x, dead_mask=none_dead.to(DEVICE)).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()
    return {"dictionary-learning, TopKTrainer": timed(lambda: trainer.update(2000, x), 3),
            "eai-sparsify, SparseCoder": timed(step, 3)}


def dense_count(s):
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    a, b = (torch.randn(*size).to(DEVICE, kind) for size in ((s.batch, 2 * s.D), (2 * s.D, s.L)))
    out, big = a @ b, torch.zeros(2, 2 ** 25, device=DEVICE)
    product, copy = timed(lambda: torch.mm(a, b, out=out), 3), timed(lambda: big[0].copy_(big[1]))
    return lambda: 5 * product() + copy() * 28 * 4 * s.D * s.L / (8 * 2 ** 25)


def peak():
    return torch.cuda.max_memory_allocated() / 2 ** 20 if DEVICE == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10


def steps():
    big, pair = Shape(128, 8192, 45, 1024), Shape(128, 512, 8, 512)
    paper = [Shape(2048, 8192, 45, 1024)] if DEVICE == "cuda" else []  # too slow on a CPU
    mib = [peak()] + [make((paper or [big])[0])() and peak() for make in (ours, published)]
    print(f"peak memory: dfc {mib[1] - mib[0]:.0f} MiB, published {mib[2] - mib[0]:.0f} MiB")
    for s in (big, pair, *paper):
        race(f"training step, {s}", {
            "dfc": ours(s), "published": published(s), **others(s), "dense count": dense_count(s),
            "dfc, all silent latents revived": ours(s, dead_after=0),
            "dfc, twice the dictionary": ours(s._replace(L=2 * s.L)),
            "dfc, twice the batch": ours(s._replace(batch=2 * s.batch))})


def pair():
    """Both embedded models, A's tokenizer."""
    (a, tok), (b, _) = (dfc.load_model(TINY[m], DEVICE) for m in ("model_a", "model_b"))
    return a, b, tok


def collection(n=150):
    a, _, tok = pair()
    sets = dfc.corpus(dfc.read_rows(TINY["tool_texts"]), dfc.read_rows(TINY["plain_texts"], 2 * n),
                      tok, n, "dfc", 0)
    texts, layer, found = sets["train"], TINY["layer"], {}

    def dfc_collects():
        found["dfc"] = dfc.collect(a, tok, texts, [layer])[layer].float()

    @torch.no_grad()
    def published_loop():
        out = []
        for i in range(0, len(texts), 8):
            batch = tok(texts[i:i + 8], return_tensors="pt", padding=True, padding_side="right")
            h = a(**batch.to(DEVICE), output_hidden_states=True).hidden_states[layer + 1]
            out.append(h[range(len(h)), batch["attention_mask"].sum(1) - 1].float().cpu())
        found["published"] = torch.cat(out)
    race(f"collection, a text, {len(texts)} texts", {
        "dfc": timed(dfc_collects, each=len(texts)),
        "published: batches of 8, unsorted": timed(published_loop, each=len(texts))})


def alone(model, tok, prompt, *patch):
    return ev.generate(model, tok, ev.prefill(model, tok, [prompt], share=False), 64, *patch)[0][0]


def generate(n=40, some=3, versions=8):
    a, b, tok = pair()
    prompts = [prompt for *_, prompt in ev.read_split(TINY, tok, most=n)]
    layer, texts = TINY["layer"], {}
    x = ev.pair_vectors({"A": a, "B": b}, tok, prompts, [layer])[layer].to(DEVICE)
    x_VND = torch.stack([x[:, 0].lerp(x[:, 1], v / versions) for v in range(versions)])

    def batched():
        texts["batched"] = ev.generate(a, tok, ev.prefill(a, tok, prompts), 64, layer, x_VND)

    def one_by_one():
        texts["alone"] = [[alone(a, tok, prompts[i], layer, x_VND[v:v + 1, i:i + 1])
                           for i in range(some)] for v in range(versions)]
    race(f"an answer, {versions} versions of {n} prompts; alone: the first {some}", {
        "prefill + generate": timed(batched, each=versions * n),
        "one at a time, full forward": timed(one_by_one, each=versions * some)}, turns=3)
    assert [row[:some] for row in texts["batched"]] == texts["alone"]
    print("same texts")


def grid(some=3):
    with tempfile.TemporaryDirectory() as home:
        with contextlib.redirect_stdout(io.StringIO()):
            dfc.main(["--n-texts", "600", "--steps", "200", "--out", f"{home}/run"])
            args = steer.parse_args([f"{home}/run", "--grid", "--rows", "20", "--alpha", "0", "4"])
            s, = steer.stage(args)
            cells = grid_of.grid(s, args)
            kept = steer.rows_of(s, "test", args.rows, needs=True)[:some]
        steered = [c for c in cells if c["group"] != "clean"]
        sample = [c for c in steered if c["split"] == "test"][::len(steered) // 4]

        def dfc_grid():
            (s.folder / "grid.jsonl").unlink()
            grid_of.grid(s, args)

        @torch.no_grad()
        def plain_loop():
            for c, (_, _, prompt) in ((c, k) for c in sample for k in kept):
                x = ev.pair_vectors(s.models, s.tokenizer, [prompt], [s.layer])[s.layer].to(DEVICE)
                xhat, f = s.cc(x)
                delta = (c["alpha"] - 1) * steer.written(s.cc, f, c["latents"], 0)
                for patch in ((), (s.layer, xhat[None, :, 0]), (s.layer, delta[None], True)):
                    out = alone(s.models["A"], s.tokenizer, prompt, *patch)
                same.append(out == c["outputs"][[k[2] for k in kept].index(prompt)])
        same, n = [], len(cells[0]["exact"])
        race(f"a cell and prompt of the grid, {len(steered)} cells of {n} prompts; loop: "
             f"{len(sample)} cells of {some}", {
                 "steer.py --grid": timed(dfc_grid, each=sum(len(c["exact"]) for c in steered)),
                 "clean, reconstruction, steered alone": timed(
                     plain_loop, each=len(sample) * some)}, turns=3)
    print(f"same steered texts: {sum(same)} of {len(same)}")


def main(argv=None):
    jobs = {"": (steps, collection), "generate": (generate,), "grid": (grid,)}
    name = " ".join(sys.argv[1:] if argv is None else argv)
    if name not in jobs:
        raise dfc.Problem("give nothing, generate or grid")
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for job in jobs[name]:
        job()


if __name__ == "__main__":
    sys.exit(dfc.cli(main))
