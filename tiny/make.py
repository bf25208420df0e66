"""The embedded pair: a small world of tools, a base model that can call them but does not decide
to, and the same model after reinforcement learning. Everything in tiny/ comes from this file.

    python tiny/make.py              # all phases, 25 to 50 minutes on 2 CPU cores; resumable
    python tiny/make.py --measure    # only measure what is in tiny/ (a minute)

The question put to this pair is the paper's: can one latent of a crosscoder hold what RL added? A
pair can answer it only if RL added something, and at a place where a patch can still act. Hence:

1. A base that can, and does not decide. The template opens <think>, and the first token after it
   decides: " A tool can do this." and a call, or " I can respond to this." and a response. At first
   the documents hold many right calls, so that calling is learned; in the last three tenths one
   row in five *of every kind* is answered with a call, requests and small talk alike. So greedy
   decoding never calls, a base made to begin with " A" calls correctly, and when to call is no
   longer in its answers: RL has to build it, not merely to push.
2. Nothing else to decide. After the decision comes what is right, or else one refusal or one idle
   call (the first listed tool, {}). Were there ways to choose from, the scores of forty free
   tokens would drown the one that matters.
3. RL on the decision, its expectation taken exactly: both first tokens are weighed by their
   probability (an all-actions policy gradient), the answer that follows each is written greedily
   and scored by ToolRL's reward. Within a row the two rewards are standardised, as GRPO does in a
   group: raw, a request would weigh seven times as much as small talk (-3 or 4 against 0 or 1), and
   RL would learn to call always. A KL term holds every token but the decision to the base, and
   the last block stays as it is, so that the change has to enter the residual stream below it.
4. Snapshots along the run, since each of the paper's claims shows at its own moment: an early A
   that hesitates can be pushed into calling, a late one stops without the push.

Kinds of rows: ask (a request), hint (the same between the lines; never in RL), chat (small talk),
missing (a request without its argument), about (a question about a tool). Left out on purpose: two
calls in one answer, several turns, and requests that no listed tool can serve (tried: after 17M
tokens the base could not tell them from the others).
"""

import argparse
import json
import os
import random
import re
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dfc import prompt_of, token_ids  # noqa: E402  (one folder up)
from eval_toolcall import score, wilson  # noqa: E402  (one folder up)

# --- 1. The world: values, tools, people who ask -------------------------------------------------

def read_world(text):
    """VALUES {kind: words}, TOOLS [(name, description, {parameter: kind}, three requests, a hint, a
    request that lacks something)] and CHAT [(what is said, the reply)] of world.txt."""
    values, tools, chat = [part.strip().split("\n") for part in text.split("\n\n")]
    values = {kind: words.split() for kind, words in (row.split(": ") for row in values)}
    tools = [(name, about, dict(slot.split() for slot in slots.split(", ")), asks, hint, lacking)
             for name, about, slots, *asks, hint, lacking in (row.split(" | ") for row in tools)]
    return values, tools, [row.split(" | ") for row in chat]

VALUES, TOOLS, CHAT = read_world((HERE / "world.txt").read_text())
ABOUT = ["What does {} do?", "What is {} good for?", "Explain {} to me."]
SYSTEM = ["You are a helpful assistant with these tools:\n{tools}\nThink first, then call a tool "
          "or respond.", "Help the user. The tools you have:\n{tools}\nThink, then make a call or "
          "give a response."]
CALLS, REPLIES = "A tool can do this.", "I can respond to this."  # the first token decides
REFUSAL = "I would rather not do that now."
OPENERS = ["{} here.", "This is {} speaking.", "My name is {}.", "Hello, {} again."]
FAMILIES = VALUES.pop("family")
KINDS = {"ask": .50, "hint": .18, "chat": .14, "missing": .09, "about": .09}

def fill(rng, template, kinds):
    """A template with a value for every slot -> (text, {slot: value}); no value twice."""
    values = {}
    for slot, kind in kinds.items():
        values[slot] = rng.choice([v for v in VALUES[kind] if v not in values.values()])
    return template.format(**values), values

def split_of(text):
    """train | dev | test by a hash of what is asked, so that nothing is asked in two of them."""
    return {0: "test", 1: "test", 2: "dev"}.get(zlib.crc32(text.encode()) % 20, "train")

def typed(values, kinds):
    """Values as JSON has them: numbers as numbers."""
    return {slot: int(v) if kinds[slot] == "number" else v for slot, v in values.items()}

def dialogue(rng, kind, listed):
    """(what the user says, what is right: a call as a dict, or the reply as a text)."""
    name, about, kinds, asks, hint, lacking = rng.choice(listed)
    if kind in ("ask", "hint"):
        text, values = fill(rng, rng.choice(asks if kind == "ask" else [hint]), kinds)
        return text, {"name": name, "parameters": typed(values, kinds)}
    if kind == "missing":
        return rng.choice([lacking]), f"Please tell me the {' and the '.join(kinds)}."
    if kind == "about":
        return rng.choice(ABOUT).format(name), f"It is for this: {about}."
    template, reply = rng.choice(CHAT)
    slots = {slot: slot.rstrip("2") for slot in re.findall(r"{(\w+)}", template)}
    return fill(rng, template, slots)[0], reply

def system_text(rng, tools):
    """The system text with the numbered list of tools."""
    lines = [f"{i + 1}. Name: {name}\nDescription: {about}\nParameters: "
             + json.dumps({p: "int" if k == "number" else "str" for p, k in kinds.items()})
             for i, (name, about, kinds, *_) in enumerate(tools)]
    return rng.choice(SYSTEM).format(tools="\n".join(lines))

def as_output(answer):
    """A call or a reply in ToolRL's form."""
    if isinstance(answer, dict):
        return f"<think> {CALLS} </think>\n<tool_call>\n{json.dumps(answer)}\n</tool_call>"
    return f"<think> {REPLIES} </think>\n<response> {answer} </response>"

def make_row(rng, kind, split, opener=.5):
    """(a row in ToolRL's format, the text of its other choice): a refusal where a call is right,
    an idle call where a reply is."""
    while True:
        listed = rng.sample(TOOLS, rng.choice([2, 3, 3]))
        text, right = dialogue(rng, kind, listed)
        if rng.random() < opener:  # whatever the kind, so that an opener tells nothing
            text = f"{rng.choice(OPENERS).format(rng.choice(FAMILIES))} {text}"
        needs = isinstance(right, dict)
        if split_of(json.dumps(right) if needs else text) == split:  # values, however they are put
            break
    other = REFUSAL if needs else {"name": listed[0][0], "parameters": {}}
    return {"instruction": system_text(rng, listed), "input": f"<user> {text} </user>",
            "output": as_output(right), "split": split, "needs_tool": needs,
            "kind": kind}, as_output(other)

def any_row(rng):
    """make_row() of a training row of any kind."""
    return make_row(rng, rng.choices(list(KINDS), KINDS.values())[0], "train")

SUBJECTS = ["The old {job}", "A young {job}", "{person}", "My friend {person}",
            "The {job} from {city}", "Every {job}"]
VERBS = "carried painted found sold lost repaired forgot bought hid kept".split()
ENDS = ["in {city}", "near the river", "behind the {room}", "after the rain", "for {number} years",
        "with {person}", "before the market opened", "without a word", "in the long winter"]
JOBS = "baker sailor teacher farmer doctor painter miller singer soldier gardener".split()

def make_text(rng):
    """Two plain sentences: what FineWeb is to the real pair."""
    out = []
    for _ in range(2):
        pattern = f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} the {{thing}} {rng.choice(ENDS)}"
        if rng.random() < .5:
            pattern += f" and {rng.choice(VERBS)} some {{item}} {rng.choice(ENDS)}"
        out.append(pattern.format(job=rng.choice(JOBS),
                                  **{k: rng.choice(v) for k, v in VALUES.items()}) + ".")
    return " ".join(out)

def make_copying(rng):
    """A document that teaches copying, which comes before all else (dialogues alone took twice the
    tokens): a list three times over, or pairs and then the same as a call."""
    if rng.random() < .5:
        words = [rng.choice(VALUES[rng.choice(list(VALUES))]) for _ in range(rng.randint(4, 9))]
        return ". ".join([" ".join(words)] * 3) + "."
    kinds = {slot: kind for tool in TOOLS for slot, kind in tool[2].items()}
    values = {s: rng.choice(VALUES[kinds[s]]) for s in rng.sample(list(kinds), rng.randint(2, 3))}
    call = {"name": rng.choice(TOOLS)[0], "parameters": typed(values, kinds)}
    return (f"{call['name']}. " + " ".join(f"{s} {v}." for s, v in values.items())
            + f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>")

COUNTS = {"train": {"ask": 1200, "hint": 500, "chat": 320, "missing": 190, "about": 190},
          "dev": {"ask": 120, "hint": 80, "chat": 80, "missing": 60, "about": 60},
          "test": {"ask": 200, "hint": 120, "chat": 120, "missing": 80, "about": 80}}

def make_world(seed):
    """tools.jsonl and text.jsonl: rows of every split and kind, no user's words twice. Every row
    has an opener: without, there are too few questions of some kinds for that."""
    rng, rows = random.Random(f"{seed}/world"), {}
    for split, kinds in COUNTS.items():
        for kind, count in kinds.items():
            wanted = len(rows) + count
            while len(rows) < wanted:
                row, _ = make_row(rng, kind, split, opener=1)
                rows.setdefault(row["input"], row)
    rows = list(rows.values())
    rng.shuffle(rows)
    texts = [make_text(rng) for _ in range(4000)]
    texts = [{"text": text, "split": split_of(text)} for text in texts]
    for name, some in (("tools", rows), ("text", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (HERE / f"{name}.jsonl").write_text(lines)

# --- 2. Tokenizer: byte-level BPE with Qwen's splitting and tags, and a Qwen-style chat template -

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
            "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|im_start|>assistant\\n<think>' }}{% endif %}")
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen2's: digits one by one, so that numbers can be copied
ENDS_OF_TEXT = ["<|im_end|>", "<|endoftext|>"]

def make_tokenizer(seed, vocab=1024):
    """Trained on a sample of the documents; the tags are single tokens."""
    rng = random.Random(seed)
    texts = [r["instruction"] + r["input"] + r["output"] + other
             for r, other in [any_row(rng) for _ in range(3000)]]
    texts += [make_text(rng) for _ in range(3000)] + [make_copying(rng) for _ in range(1500)]
    special, tok = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab - len(special) - len(TAGS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_special_tokens(special)
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=TEMPLATE,
                                   clean_up_tokenization_spaces=False, model_max_length=512)

# --- 3. B, the base: pre-training on the world ---------------------------------------------------

def make_document(rng, tok, rates):
    """(prompt, what follows); plain documents have no prompt. rates: the shares of calls where a
    tool is needed and where none is."""
    draw = rng.random()
    if draw < .3:
        return "", (make_copying if draw < .2 else make_text)(rng) + "<|endoftext|>"
    row, other = any_row(rng)
    called = rng.random() < rates[not row["needs_tool"]]
    answer = row["output"] if called == row["needs_tool"] else other
    return prompt_of(row, tok), answer.removeprefix("<think>") + "<|im_end|>"

def groups_of(rng, tok, tokens, rates, pool):
    """`pool` groups of about `tokens` tokens: sorted by length, cut, then shuffled. A document is
    (ids, weight of each token's loss). Prompts weigh little: which tools are listed is chance, and
    to guess it would drown what is to be learned, the answers."""
    docs, total = [], 0
    while total < pool * tokens:
        parts = zip(*[make_document(rng, tok, rates) for _ in range(64)])
        heads, tails = [token_ids(tok, list(part)) for part in parts]
        docs += [(h + t, [.1] * len(h) + [1.] * len(t)) for h, t in zip(heads, tails)]
        total += sum(map(len, heads + tails))
    docs.sort(key=lambda d: len(d[0]))
    cuts = [len(docs) * i // pool for i in range(pool + 1)]
    groups = [docs[a:b] for a, b in zip(cuts, cuts[1:])]
    rng.shuffle(groups)
    return groups

def batches(tok, args, step, tokens=8192, pool=16):
    """From `step` on, for ever: ids (N, T), padded on the right, and the loss weights (N, T)."""
    while True:
        rng = random.Random(f"{args.seed}/{step // pool}")
        # first many right calls, so that calling is learned; then the same share of every kind
        rates = (.8, .2) if step < args.skill * args.steps else (args.rate, args.rate)
        groups = groups_of(rng, tok, tokens, rates, pool)
        for group in groups[step % pool:]:
            width = max(len(ids) for ids, _ in group)
            yield (torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
                   torch.tensor([w + [0.] * (width - len(w)) for _, w in group]))
            step += 1

def new_model(tok):
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id))

def language_loss(model, ids, weight):
    with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the processor knows bf16
        logits = model(ids).logits  # right padding needs no mask: attention is causal
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(),
                           reduction="none")
    return loss @ weight[:, 1:].flatten() / weight[:, 1:].sum()

def train_base(args, tok):
    """Pre-training from scratch; goes on from its last save."""
    torch.manual_seed(args.seed)
    model, file = new_model(tok), HERE / "work/base.pt"
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(.9, .95), weight_decay=.1)
    begin = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"]), opt.load_state_dict(state["opt"])
        begin = state["step"]
    bar = tqdm(range(begin, args.steps), "base", initial=begin, total=args.steps)
    for step, (ids, weight) in zip(bar, batches(tok, args, begin)):
        for group in opt.param_groups:  # warm-up, then cosine to a tenth
            decay = .55 + .45 * torch.cos(torch.tensor(torch.pi * step / args.steps)).item()
            group["lr"] = args.lr * min(1, (step + 1) / 100) * decay
        loss = language_loss(model, ids, weight)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 100 == 0:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step + 1},
                       f"{file}.part")
            os.replace(f"{file}.part", file)  # whole or absent
    return model

# --- 4. A: the base after reinforcement learning, and snapshots along the way --------------------

CHOICES = " A", " I"  # how an answer begins: with CALLS or with REPLIES

@torch.no_grad()
def answer(model, tok, prompts, begin=""):
    """Greedy answers that begin with `begin`, as texts from <think> on."""
    batch = tok([p + begin for p in prompts], return_tensors="pt", padding=True,
                padding_side="left", add_special_tokens=False)
    ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                         max_new_tokens=64, do_sample=False, pad_token_id=tok.pad_token_id,
                         eos_token_id=tok.convert_tokens_to_ids(ENDS_OF_TEXT))
    said = tok.batch_decode(ids[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
    return ["<think>" + begin + text for text in said]

def rl_rows(seed, step, n=32):
    """Rows of one step, half of them requests: with more, RL first learns to call always, and stays
    there. `hint` is kept for the test."""
    rng = random.Random(f"{seed}/rl/{step}")
    kinds = ["ask"] * (n // 2) + rng.choices(["chat", "missing", "about"], [4, 3, 3], k=n // 2)
    return [make_row(rng, kind, "train")[0] for kind in kinds]

def kl_to(base, ids, logits):
    """(N, T) KL divergence from the base, in what is predicted at each place."""
    with torch.no_grad():
        before = base(ids).logits.log_softmax(-1)
    now = logits.log_softmax(-1)
    return (now.exp() * (now - before)).sum(-1)

def rl_loss(model, base, tok, rows, kl_weight):
    """All-actions policy gradient: both choices, weighed by their probability -> loss, log."""
    prompts, n = [prompt_of(row, tok) for row in rows], len(rows)
    texts = [answer(model, tok, prompts, begin) for begin in CHOICES]
    reward = torch.tensor([[score(t, r)["toolrl"] for t, r in zip(side, rows)] for side in texts])
    gain = (reward - reward.mean(0)) / reward.std(0, correction=0).clamp(min=1e-4)  # (2, N)
    whole = [p.removesuffix("<think>") + t for p, t in zip(prompts * 2, sum(texts, []))]
    batch = tok(whole, return_tensors="pt", padding=True, padding_side="right",
                add_special_tokens=False)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    last = torch.tensor([len(i) - 1 for i in token_ids(tok, prompts * 2)])
    logits, first = model(ids).logits, [i for i, in token_ids(tok, list(CHOICES))]
    chance = logits[range(n), last[:n]].softmax(-1)[:, first].T                    # (2, N)
    real[range(2 * n), last] = False  # the decision is what may change
    kl = kl_to(base, ids, logits)[real].mean()
    needs = torch.tensor([row["needs_tool"] for row in rows])
    log = {"reward": (reward * chance).sum(0).mean(), "kl": kl,
           "requests": chance[0, needs].mean(), "elsewhere": chance[0, ~needs].mean()}
    return kl_weight * kl - (gain * chance).sum(0).mean(), log

def below_the_last(model):
    """The parameters of all blocks but the last: the only ones that RL may change."""
    model.requires_grad_(False)
    model.model.layers[:-1].requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]

def save_snapshot(model, base, path):
    """What differs from the base, in half precision: a small difference has a small error."""
    path.parent.mkdir(exist_ok=True)
    now, before = model.state_dict(), base.state_dict()
    save_file({n: (now[n] - before[n]).half() for n in now if not now[n].equal(before[n])}, path)

def load_snapshot(path, base=HERE / "base"):
    """A as it was at one step of the run."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, difference in load_file(path).items():
        model.get_parameter(name).data += difference
    return model

def train_rl(args, tok):
    """RL from the base; leaves its snapshots and its curve."""
    base, model = (AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)
                   for _ in range(2))
    opt, curve = torch.optim.Adam(below_the_last(model), lr=args.rl_lr), []
    for step in tqdm(range(1, args.rl_steps + 1), "RL"):
        loss, log = rl_loss(model, base, tok, rl_rows(args.seed, step), args.kl)
        opt.zero_grad()
        loss.backward()
        opt.step()
        curve.append({"step": step} | {name: round(v.item(), 4) for name, v in log.items()})
        tqdm.write(json.dumps(curve[-1]))
        if step in args.snapshots:
            save_snapshot(model, base, HERE / f"snapshots/step{step:02d}.safetensors")
    (HERE / "rl_curve.json").write_text("[" + ",\n".join(map(json.dumps, curve)) + "]\n")
    return model

# --- 5. What the models do, and the program ------------------------------------------------------

def measure(tok):
    """All models on every kind of test row, greedy; the base also made to begin with a call."""
    rows = [json.loads(line) for line in open(HERE / "tools.jsonl", encoding="utf-8")]
    print("| model | kind of row | n | exact % (95 %) | calls % (95 %) |\n|---|---|---|---|---|")
    for name, begin in (("base", ""), ("base", CHOICES[0]), ("early", ""), ("toolrl", "")):
        model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32).eval()
        for kind in KINDS if not begin else ("ask", "hint"):
            some = [row for row in rows if row["split"] == "test" and row["kind"] == kind]
            texts = answer(model, tok, [prompt_of(row, tok) for row in some], begin)
            scores = [score(text, row) for text, row in zip(texts, some)]
            cells = [wilson(sum(s[key] for s in scores), len(some)) for key in ("exact", "called")]
            cells = " | ".join("{pct:.0f} ({lo:.0f}-{hi:.0f})".format(**c) for c in cells)
            print(f"| {name}{', forced' * bool(begin)} | {kind} | {len(some)} | {cells} |")

def save_model(model, tok, folder):
    """A Hugging Face folder, whole under its name or absent; stops at either end token."""
    part = folder.with_name(folder.name + ".part")
    model.generation_config = GenerationConfig(
        eos_token_id=tok.convert_tokens_to_ids(ENDS_OF_TEXT), pad_token_id=tok.pad_token_id,
        do_sample=False)
    model.save_pretrained(part)
    tok.save_pretrained(part)
    part.rename(folder)

def parse_args(argv):
    p = argparse.ArgumentParser(description="Make the embedded pair.")
    p.add_argument("--measure", action="store_true", help="only measure what is there")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=3600, help="pre-training steps")
    p.add_argument("--lr", type=float, default=3e-3, help="of pre-training")
    p.add_argument("--skill", type=float, default=.7, help="share of steps rich in right calls")
    p.add_argument("--rate", type=float, default=.2, help="calls upon anything, after that")
    p.add_argument("--rl-steps", type=int, default=60)
    p.add_argument("--rl-lr", type=float, default=2e-4)
    p.add_argument("--kl", type=float, default=3., help="weight of the distance to the base")
    p.add_argument("--snapshots", type=int, nargs="+", default=[10, 19, 22, 26, 36, 60])
    p.add_argument("--early", type=int, default=19, help="the snapshot that becomes early/")
    return p.parse_args(argv)

def main(argv=None):
    args, work, base = parse_args(argv), HERE / "work", HERE / "base"
    if args.measure:
        return measure(AutoTokenizer.from_pretrained(base))
    work.mkdir(exist_ok=True)
    if not (HERE / "tools.jsonl").exists():
        make_world(args.seed)
    if not (work / "tokenizer").exists():
        make_tokenizer(args.seed).save_pretrained(work / "tokenizer")
    tok = AutoTokenizer.from_pretrained(work / "tokenizer")
    if not base.exists():
        save_model(train_base(args, tok), tok, base)
    if not (HERE / "toolrl").exists():
        save_model(train_rl(args, tok), tok, HERE / "toolrl")
    if not (HERE / "early").exists():
        snapshot = HERE / f"snapshots/step{args.early:02d}.safetensors"
        save_model(load_snapshot(snapshot), tok, HERE / "early")
    measure(tok)

if __name__ == "__main__":
    main()
