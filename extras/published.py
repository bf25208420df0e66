"""A published crosscoder as a run, which eval_toolcall.py, steer.py and grid.py can open.

The authors' files are model.pt (W_enc (2, D, L), b_enc (L), W_dec (L, 2, D), b_dec (2, D), and
masks if it is a DFC), config.json (sizes) and hparams.json (layer and training). What these do not
say is taken from the preset and from --recipe paper. Models and texts are the preset's.

The mean and scale of its training vectors were never saved. So they are fitted again, one of each
for every coordinate, on 300 tool texts: prompts are tool texts. (The authors had one for plain
texts besides.) On plain texts do not trust such a run.

    python extras/published.py antebe1/dfc-D8k-excl10-k45     # the paper's pair: a GPU, the hub
    python steer.py runs/antebe1--dfc-D8k-excl10-k45
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import cached_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
import dfc

SIZES = ("activation_dim", "dict_size", "k", "n_a", "n_b")  # of config.json, and of a Crosscoder
HPARAMS = {  # a name in hparams.json: the option of dfc.py
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
    ValueError, also if its partitions lie in another order than ours."""
    config = read_json(name, "config.json")
    missing = [size for size in SIZES if size not in config]
    if missing:
        raise ValueError(f"its config.json lacks {', '.join(missing)}")
    cc = dfc.Crosscoder(**{size: config[size] for size in SIZES})

    state = torch.load(cached_file(name, "model.pt"), map_location="cpu", weights_only=True)
    weights = {key: state[key] for key, _ in cc.named_parameters()}  # without the masks
    cc.load_state_dict(weights, strict=False)  # mean and scale keep 0 and 1
    cc.confine(cc.W_enc, cc.W_dec)
    if not all(torch.equal(weights[key], own) for key, own in cc.named_parameters()):
        raise ValueError("weights that n_a and n_b forbid are not zero")
    return cc.requires_grad_(False)


def read_training(name):
    """What hparams.json says, as options of dfc.py. Without such a file: nothing, and a line is
    printed. Raises OSError if the hub does not answer."""
    try:
        theirs = read_json(name, "hparams.json")
    except OSError as e:
        if "does not appear to have a file" not in str(e):
            raise
        print(f"{name} has no hparams.json: layer and training are taken from the preset")
        return {}
    return {HPARAMS[key]: value for key, value in theirs.items() if key in HPARAMS}


def collect_tool_texts(s):
    """The pair's vectors at chunks of tool texts, as published, 300 of the train and 300 of the dev
    rows -> a list of two x_NMD. Raises ValueError."""
    tokenizer = AutoTokenizer.from_pretrained(s.model_a)
    train, dev = (dfc.tool_texts(s.tool_texts, tokenizer, split, 300, whole_prompts=False)
                  for split in ("train", "dev"))
    models = (dfc.load_model(name, s.device)[0] for name in (s.model_a, s.model_b))
    x_NMD = dfc.collect(models, tokenizer, train + dev, s.layer, s.longest)
    return x_NMD.split([len(train), len(dev)])


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("name", help="a crosscoder of the authors: folder or hub name")
    p.add_argument("--preset", default="qwen", help="whose models and texts: qwen or tiny")
    p.add_argument("--out", help="run folder (default: runs/ and the name)")
    args = p.parse_args(argv)
    with dfc.errors_about(args.name):
        cc = read_checkpoint(args.name)
        training = read_training(args.name)

    # settings: its own sizes, layer and training
    L = len(cc.b_enc)
    options = {"preset": args.preset, "recipe": "paper", "dict": L, "k": cc.k,
               "excl": cc.n_a / L, "excl-b": cc.n_b / L, **training,
               "out": args.out or f"runs/{args.name.strip('/').replace('/', '--')}"}
    s = dfc.parse_args([f"--{name}={value}" for name, value in options.items()])
    if Path(s.out).exists():
        raise ValueError(f"{s.out} is there already: give another --out")

    # mean and scale
    dfc.check_pair(s)
    train_NMD, dev_NMD = collect_tool_texts(s)
    with dfc.errors_about(f"{args.name} with {s.model_a}"):  # their widths may differ
        cc.fit_scale(train_NMD, s.by_coordinate)

    # the run
    metrics = dfc.measure(cc, train_NMD, dev_NMD)
    metrics.update(config=vars(s), files=dfc.fingerprint("", s), crosscoder=args.name, loss={})
    with dfc.atomically(Path(s.out)) as folder:
        cc.save_pretrained(folder)
        (folder / "README.md").unlink()  # an empty model card
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print("saved   {}; of the variance of dev tool texts it explains: A {A:.3f}, B {B:.3f}".format(
        s.out, **metrics["fve"]))


if __name__ == "__main__":
    raise SystemExit(dfc.cli(main))
