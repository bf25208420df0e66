"""A published crosscoder as a run, which eval_toolcall.py, steer.py and grid.py can open.

The authors' files are model.pt (W_enc (2, D, L), b_enc (L), W_dec (L, 2, D), b_dec (2, D) and the
masks of a DFC), config.json (sizes) and hparams.json (layer and training; where it says nothing,
preset and recipe do). Models and texts are the preset's.

The mean and scale of the vectors that it was trained on are lost. There each coordinate had its
own, of plain and tool texts apart. Fitted again are those of 300 tool texts, for prompts are tool
texts: of plain text such a run tells little.

    python extras/published.py antebe1/dfc-D8k-excl10-k45     # the paper's pair: a GPU, the hub
    python steer.py runs/antebe1--dfc-D8k-excl10-k45
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import cached_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dfc

HPARAMS = {  # what hparams.json says, as an option of dfc.py
    "layer": "layer",
    "steps": "steps",
    "lr": "lr",
    "train_batch": "batch",
    "sparsity_coef": "l1-shared",
    "exclusive_sparsity_coef": "l1-excl",
}


def read_json(name, file):
    """What a JSON file of a folder or hub name holds."""
    return json.loads(Path(cached_file(name, file) or f"{name}/{file}").read_text())


def read_checkpoint(name):
    """The crosscoder in a folder or a hub name, frozen; nothing in it is executed. Raises
    ValueError, also where its latents lie in another order than ours: A, B, shared."""
    sizes = read_json(name, "config.json")
    names = "activation_dim", "dict_size", "k", "n_a", "n_b"
    missing = [key for key in names if key not in sizes]
    if missing:
        raise ValueError(f"its config.json tells no {', '.join(missing)}")
    cc = dfc.Crosscoder(*[sizes[key] for key in names])
    state = torch.load(cached_file(name, "model.pt"), map_location="cpu", weights_only=True)
    weights = {key: state[key] for key, _ in cc.named_parameters()}  # their masks are left out
    cc.load_state_dict(weights, strict=False)  # mean and scale keep 0 and 1
    cc.confine(cc.W_enc, cc.W_dec)
    if not all(torch.equal(weights[key], own) for key, own in cc.named_parameters()):
        raise ValueError("weights that n_a and n_b forbid are not zero")
    return cc.requires_grad_(False)


def read_training(name):
    """What hparams.json tells, as options of dfc.py. Where there is no such file nothing, and a
    line that says so. Raises OSError where the hub does not answer."""
    try:
        theirs = read_json(name, "hparams.json")
    except OSError as e:
        if "does not appear to have a file" not in str(e):
            raise
        print(f"{name} has no hparams.json: layer and training are taken from the preset")
        return {}
    return {HPARAMS[key]: value for key, value in theirs.items() if key in HPARAMS}


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("name", help="a crosscoder of the authors: folder or hub name")
    p.add_argument("--preset", default="paper", help="whose models and texts: paper or tiny")
    p.add_argument("--out", help="run folder (default: runs/ and the name)")
    args = p.parse_args(argv)
    with dfc.errors_about(args.name):
        cc = read_checkpoint(args.name)
        training = read_training(args.name)

    # its own sizes, layer and training
    L = len(cc.b_enc)
    asked = {"preset": args.preset, "recipe": "paper", "dict": L, "k": cc.k,
             "excl": cc.n_a / L, "excl-b": cc.n_b / L, **training,
             "out": args.out or f"runs/{args.name.strip('/').replace('/', '--')}"}
    s = dfc.parse_args([f"--{key}={value}" for key, value in asked.items()])
    if Path(s.out).exists():
        raise ValueError(f"{s.out} is there already: give another --out")

    # both models' vectors of tool texts, chunks as published
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = Path(s.out).parent / "cache"
    tokenizer = dfc.load_tokenizer(s.model_a, s.model_b)
    rows = list(dfc.read_rows(s.tool_texts, dfc.TOOL_ROW))
    vectors = {}  # {split: x_NMD}
    for split in ("train", "dev"):
        texts = dfc.tool_chunks(
            [row for row in rows if dfc.split_of(row) == split], tokenizer, 300)
        vectors[split] = dfc.collect_pair(s.model_a, s.model_b, texts, s.layer, cache, device)
    with dfc.errors_about(f"{args.name} with {s.model_a}"):  # their widths may differ
        cc.fit_scale(vectors["train"], each=True)

    metrics = {**dfc.measure(cc, vectors["train"], vectors["dev"]), "config": asdict(s),
               "crosscoder": args.name, "loss": {}}  # nobody wrote the loss down
    with dfc.atomically(Path(s.out)) as folder:
        dfc.save(cc, folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    fve = metrics["fve"]
    print(f"saved   {s.out}; of the variance of dev tool texts explained: A {fve['A']:.3f}, "
          f"B {fve['B']:.3f}")


if __name__ == "__main__":
    dfc.leave(dfc.cli(main))
