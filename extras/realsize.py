"""The real pair's path at its full width, without its weights: a Qwen2.5-3B-shaped pair with random
weights goes through collect, train, evaluate and steer; shapes, seconds and memory of each stage.

    python extras/realsize.py                # CPU: 2 of 36 layers, few texts and steps, a minute
    python extras/realsize.py --layers 36 --texts 80000 --steps 200 --prompts 40    # one GPU

Random weights answer nonsense, so no score means anything here: this shows that shapes fit, what it
costs and what it needs. Texts are the embedded pair's, of about 30 tokens, in its tokenizer.
"""

import argparse
import contextlib
import json
import resource
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import dfc  # noqa: E402
import eval_toolcall as ev  # noqa: E402
import steer  # noqa: E402

STAGES = []


def memory(device):
    """Peak in GiB: allocated on a GPU, of the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


@contextlib.contextmanager
def stage(name, device):
    """Time a stage and note the peak of memory; yields a list to say what it handled."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    said, began = [], time.time()
    yield said
    if device == "cuda":
        torch.cuda.synchronize()
    row = {"stage": name, "seconds": time.time() - began, "peak_gib": memory(device),
           "what": " ".join(map(str, said))}
    STAGES.append(row)
    print(f"{name:24s}{row['seconds']:9.1f} s {row['peak_gib']:7.1f} GiB  {row['what']}",
          flush=True)


def shaped(layers, device, seed):
    """Qwen2.5-3B's shape (its config.json), bf16, random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    config = Qwen2Config(hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16,
                         num_key_value_heads=2, intermediate_size=11008, vocab_size=151_936,
                         tie_word_embeddings=True, max_position_embeddings=32_768)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Qwen2ForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)


def texts_and_prompts(tokenizer, n, prompts):
    """n plain texts of about 30 tokens, and rendered prompts with their records."""
    rows = dfc.read_rows(f"{HERE}/tiny/text.jsonl")
    pieces = [c for r in rows for c in dfc.chunks(r["text"], tokenizer)]
    test = [r for r in dfc.read_rows(f"{HERE}/tiny/tools.jsonl") if dfc.split_of(r) == "test"]
    records = [ev.to_record(r) for r in test[:prompts]]
    return [pieces[i % len(pieces)] for i in range(n)], records, [
        ev.prompt_of(r, tokenizer)[0] for r in records]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--layers", type=int, default=2, help="of Qwen2.5-3B's 36")
    p.add_argument("--texts", type=int, default=200)
    p.add_argument("--steps", type=int, default=3, help="training steps of 1,024 vectors")
    p.add_argument("--dicts", type=int, nargs="+", default=[8192, 16384])
    p.add_argument("--prompts", type=int, default=4, help="prompts of evaluation and grid")
    p.add_argument("--max-new", type=int, default=16)
    p.add_argument("--out", type=Path, help="write the stages there as JSON")
    args = p.parse_args(argv)
    from transformers import AutoTokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, layer = AutoTokenizer.from_pretrained(HERE / "tiny/toolrl"), min(13, args.layers - 1)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {args.layers} of 36 "
          f"layers, vectors of layer {layer}\n{'stage':26s}{'time':>11s}{'peak':>12s}")
    texts, records, prompts = texts_and_prompts(tokenizer, args.texts, args.prompts)
    with stage("make the pair, bf16", device) as said:
        models = {m: shaped(args.layers, device, i) for i, m in enumerate("AB")}
        count = sum(t.numel() for t in models["A"].parameters())
        said.append(f"{count / 1e9:.2f}e9 parameters each")
    with stage("collect", device) as said:
        x = torch.stack([dfc.collect(m, tokenizer, texts, [layer])[layer]
                         for m in models.values()], 1)
        said += [len(texts), "texts ->", tuple(x.shape), x.dtype]
    # more rows than texts where there are few: only the cost of a step is of interest
    x = x[torch.arange(max(len(x), 2048)) % len(x)].to(device)
    for n in args.dicts:
        torch.manual_seed(0)
        cc = dfc.Crosscoder(2048, n, 45, n // 10, 0, True).to(device)
        cc.fit_scale(x)
        with stage(f"train, dictionary {n}", device) as said:
            dfc.train(cc, x, args.steps, 1024)
            said += [args.steps, "steps of 1024 vectors"]
        STAGES[-1]["ms_per_step"] = 1e3 * STAGES[-1]["seconds"] / args.steps
    with stage("evaluate", device) as said:
        pair = ev.pair_vectors(models, tokenizer, prompts, [layer])[layer].to(device)
        batches = {m: ev.prefill(models[m], tokenizer, prompts) for m in models}
        for m, versions in ev.reconstructions(cc, pair).items():
            stacked = torch.stack(list(versions.values()))
            out = ev.generate(models[m], tokenizer, batches[m], args.max_new, layer, stacked)
            said += [m, f"{len(out)} x {len(prompts)} answers,"]
        scores = [ev.score(t, r) for row in out for t, r in zip(row, records)]
        said += [len(scores), "scored"]
    with stage("steer, a 30-cell grid", device) as said:
        f = cc.encode(pair).detach()
        order = f.mean(0).argsort(descending=True).tolist()
        deltas = torch.stack([(a - 1) * steer.written(cc, f, order[:n], 0)
                              for n in (1, 2, 4, 8, 16) for a in (0., 2., 4., 8., 16., 32.)])
        out = ev.generate(models["A"], tokenizer, batches["A"], args.max_new, layer, deltas, True)
        said += [len(out), "cells x", len(prompts), "prompts,", args.max_new, "tokens"]
    if args.out:
        args.out.write_text(json.dumps({"layers": args.layers, "versions": dfc.software(),
                                        "stages": STAGES}, indent=1))


if __name__ == "__main__":
    sys.exit(dfc.cli(main))
