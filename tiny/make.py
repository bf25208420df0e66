"""The embedded pair: a small world of tools, a base model that can call them but does not decide
to, and the same model after reinforcement learning. Rows, texts and models in tiny/ come from this
file. What is there is left as it is: delete what is to be made anew, a model with all that came of
it (base/, toolrl/, early/ and work/).

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

Every draw comes from a seeded `rng`, and the order of the draws is part of the data: whoever moves
one makes another world.

Shapes, named by suffix (ids_NT): N rows or documents, T tokens, V words of the vocabulary, C = 2
choices (0 = a call, 1 = a reply), R = C N texts, those of all calls first.
"""

import argparse
import json
import os
import random
import re
import sys
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # dfc.py and eval_toolcall.py lie one folder up
from dfc import prompt_of, token_ids
from eval_toolcall import score, wilson


@dataclass
class BasePlan:
    """How the base is trained."""

    seed: int = 0
    steps: int = 3600
    lr: float = 3e-3   # its peak
    skill: float = .7  # share of steps, the first ones, rich in right calls
    rate: float = .2   # share of calls upon anything, after that


@dataclass
class RLPlan:
    """How A is made from the base."""

    seed: int = 0
    steps: int = 60
    lr: float = 2e-4
    kl_weight: float = 3.                         # of the distance to the base
    snapshots: tuple = (10, 19, 22, 26, 36, 60)   # the steps after which one is kept
    early: int = 19                               # that of them which becomes early/


# --- 1. The world: values, tools, people who ask -------------------------------------------------

class Tool(NamedTuple):
    name: str
    about: str                  # what it does, in a few words
    parameters: dict[str, str]  # parameter: the kind of its values
    requests: list[str]         # templates of what users say, with {parameter} where a value goes
    hints: list[str]            # the same between the lines
    lacking: list[str]          # requests without an argument


class SmallTalk(NamedTuple):
    said: str   # template of what users say, with {kind of value}
    reply: str


class World(NamedTuple):
    values: dict[str, list[str]]  # kind: words
    families: list[str]           # family names of the users
    tools: list[Tool]
    chat: list[SmallTalk]


def read_world(text):
    """The world as world.txt tells it: values, tools, small talk, a line each."""
    parts = [part.strip().split("\n") for part in text.split("\n\n")]
    value_lines, tool_lines, chat_lines = parts

    values = {}
    for line in value_lines:
        kind, words = line.split(": ")
        values[kind] = words.split()
    families = values.pop("family")

    tools = []
    for line in tool_lines:
        name, about, slots, *requests, hint, lacking = line.split(" | ")
        parameters = dict(slot.split() for slot in slots.split(", "))
        tools.append(Tool(name, about, parameters, requests, [hint], [lacking]))

    chat = [SmallTalk(*line.split(" | ")) for line in chat_lines]
    return World(values, families, tools, chat)


WORLD = read_world((HERE / "world.txt").read_text())
ABOUT = ["What does {} do?", "What is {} good for?", "Explain {} to me."]
SYSTEM = [
    ("You are a helpful assistant with these tools:\n{tools}\n"
     "Think first, then call a tool or respond."),
    "Help the user. The tools you have:\n{tools}\nThink, then make a call or give a response.",
]
CALLS = "A tool can do this."  # the thought, whose first token decides
REPLIES = "I can respond to this."
REFUSAL = "I would rather not do that now."
OPENERS = ["{} here.", "This is {} speaking.", "My name is {}.", "Hello, {} again."]
KINDS = {"ask": .50, "hint": .18, "chat": .14, "missing": .09, "about": .09}  # shares of rows


class Dialogue(NamedTuple):
    said: str          # by the user
    right: dict | str  # answer: a call, or the text of a reply


class Example(NamedTuple):
    row: dict   # ToolRL's instruction, input, output; and split, needs_tool, kind
    other: str  # output of the other choice: a refusal where a call is right, else an idle call


def fill(rng, template, kinds):
    """The template with a value in every slot, no value twice; and these values {slot: value}."""
    values = {}
    for slot, kind in kinds.items():
        unused = [v for v in WORLD.values[kind] if v not in values.values()]
        values[slot] = rng.choice(unused)
    return template.format(**values), values


def split_of(text):
    """train | dev | test by a hash of what is asked, so that nothing is asked in two of them."""
    twentieth = zlib.crc32(text.encode()) % 20
    if twentieth < 2:
        return "test"
    return "dev" if twentieth == 2 else "train"


def make_call(tool, values, kinds):
    """A call of the tool of that name, as JSON has it: numbers as numbers."""
    parameters = {}
    for slot, value in values.items():
        parameters[slot] = int(value) if kinds[slot] == "number" else value
    return {"name": tool, "parameters": parameters}


def make_dialogue(rng, kind, listed):
    """What a user says and what is right to answer, about one of the listed tools or none."""
    tool = rng.choice(listed)

    if kind in ("ask", "hint"):
        template = rng.choice(tool.requests if kind == "ask" else tool.hints)
        said, values = fill(rng, template, tool.parameters)
        return Dialogue(said, make_call(tool.name, values, tool.parameters))

    if kind == "missing":
        wanted = " and the ".join(tool.parameters)
        return Dialogue(rng.choice(tool.lacking), f"Please tell me the {wanted}.")

    if kind == "about":
        question = rng.choice(ABOUT).format(tool.name)
        return Dialogue(question, f"It is for this: {tool.about}.")

    talk = rng.choice(WORLD.chat)
    slots = re.findall(r"{(\w+)}", talk.said)
    kinds = {slot: slot.rstrip("2") for slot in slots}  # {city2} is a second city
    said, _ = fill(rng, talk.said, kinds)
    return Dialogue(said, talk.reply)


def system_text(rng, tools):
    """The system text with the numbered list of tools."""
    lines = []
    for i, tool in enumerate(tools, 1):
        types = {}
        for parameter, kind in tool.parameters.items():
            types[parameter] = "int" if kind == "number" else "str"
        lines.append(f"{i}. Name: {tool.name}\nDescription: {tool.about}\n"
                     f"Parameters: {json.dumps(types)}")

    return rng.choice(SYSTEM).format(tools="\n".join(lines))


def as_output(answer):
    """A call or a reply in ToolRL's form."""
    if isinstance(answer, dict):
        return f"<think> {CALLS} </think>\n<tool_call>\n{json.dumps(answer)}\n</tool_call>"
    return f"<think> {REPLIES} </think>\n<response> {answer} </response>"


def make_example(rng, kind, split, opener=.5):
    """A row of one kind and split; opener: the share of questions that begin with one."""
    while True:
        listed = rng.sample(WORLD.tools, rng.choice([2, 3, 3]))
        said, right = make_dialogue(rng, kind, listed)
        needs_tool = isinstance(right, dict)

        if rng.random() < opener:  # whatever the kind, so that an opener tells nothing
            greeting = rng.choice(OPENERS).format(rng.choice(WORLD.families))
            said = f"{greeting} {said}"

        # requests are split by tool and values, however they are put
        asked = json.dumps(right) if needs_tool else said
        if split_of(asked) == split:
            break

    idle_call = {"name": listed[0].name, "parameters": {}}
    row = {
        "instruction": system_text(rng, listed),
        "input": f"<user> {said} </user>",
        "output": as_output(right),
        "split": split,
        "needs_tool": needs_tool,
        "kind": kind,
    }
    return Example(row, as_output(REFUSAL if needs_tool else idle_call))


def make_training_example(rng):
    """A training row of any kind."""
    kind, = rng.choices(list(KINDS), KINDS.values())
    return make_example(rng, kind, "train")


SUBJECTS = ["The old {job}", "A young {job}", "{person}", "My friend {person}",
            "The {job} from {city}", "Every {job}"]
VERBS = ["carried", "painted", "found", "sold", "lost", "repaired", "forgot", "bought", "hid",
         "kept"]
ENDS = ["in {city}", "near the river", "behind the {room}", "after the rain", "for {number} years",
        "with {person}", "before the market opened", "without a word", "in the long winter"]
JOBS = ["baker", "sailor", "teacher", "farmer", "doctor", "painter", "miller", "singer", "soldier",
        "gardener"]


def make_sentence(rng):
    pattern = f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} the {{thing}} {rng.choice(ENDS)}"
    if rng.random() < .5:
        pattern += f" and {rng.choice(VERBS)} some {{item}} {rng.choice(ENDS)}"

    words = {"job": rng.choice(JOBS)}
    for kind, values in WORLD.values.items():
        words[kind] = rng.choice(values)
    return pattern.format(**words) + "."


def make_text(rng):
    """Two plain sentences: what FineWeb is to the real pair."""
    return f"{make_sentence(rng)} {make_sentence(rng)}"


def make_word_list(rng):
    """Some words, three times over."""
    words = []
    for _ in range(rng.randint(4, 9)):
        kind = rng.choice(list(WORLD.values))
        words.append(rng.choice(WORLD.values[kind]))

    line = " ".join(words)
    return f"{line}. {line}. {line}."


def make_pairs_and_call(rng):
    """A tool and pairs of parameter and value, then the same as a call."""
    kinds = {}
    for tool in WORLD.tools:
        kinds.update(tool.parameters)

    n_pairs = rng.randint(2, 3)
    values = {}
    for slot in rng.sample(list(kinds), n_pairs):
        values[slot] = rng.choice(WORLD.values[kinds[slot]])

    tool = rng.choice(WORLD.tools)
    call = json.dumps(make_call(tool.name, values, kinds))
    pairs = " ".join(f"{slot} {value}." for slot, value in values.items())
    return f"{tool.name}. {pairs}\n<tool_call>\n{call}\n</tool_call>"


def make_copying(rng):
    """A document that teaches copying, which comes before all else: dialogues alone took twice the
    tokens."""
    return make_word_list(rng) if rng.random() < .5 else make_pairs_and_call(rng)


COUNTS = {
    "train": {"ask": 1200, "hint": 500, "chat": 320, "missing": 190, "about": 190},
    "dev": {"ask": 120, "hint": 80, "chat": 80, "missing": 60, "about": 60},
    "test": {"ask": 200, "hint": 120, "chat": 120, "missing": 80, "about": 80},
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world(seed, folder=HERE):
    """tools.jsonl and text.jsonl: rows of every split and kind, no user's words twice. Every row
    has an opener: without, there are too few questions of some kinds for that."""
    rng = random.Random(f"{seed}/world")

    rows = {}  # by what the user says
    for split, kinds in COUNTS.items():
        for kind, count in kinds.items():
            wanted = len(rows) + count
            while len(rows) < wanted:
                row = make_example(rng, kind, split, opener=1).row
                rows.setdefault(row["input"], row)

    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    write_jsonl(folder / "tools.jsonl", shuffled)

    texts = [make_text(rng) for _ in range(4000)]
    write_jsonl(folder / "text.jsonl", [{"text": t, "split": split_of(t)} for t in texts])


# --- 2. Tokenizer: byte-level BPE with Qwen's splitting and tags, and a Qwen-style chat template -

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
            "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|im_start|>assistant\\n<think>' }}{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen2's: digits one by one, so that numbers can be copied
ENDS_OF_TEXT = ["<|im_end|>", "<|endoftext|>"]


def make_tokenizer(seed, vocab=1024):
    """Trained on a sample of the documents; the tags are single tokens."""
    rng = random.Random(seed)

    # what it learns from
    texts = []
    for _ in range(3000):
        row, other = make_training_example(rng)
        texts.append(row["instruction"] + row["input"] + row["output"] + other)
    texts += [make_text(rng) for _ in range(3000)]
    texts += [make_copying(rng) for _ in range(1500)]

    # byte-level BPE
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL) - len(TAGS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)

    # tokens that are never split; the tags are text, which skip_special_tokens has to leave
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


# --- 3. B, the base: pre-training on the world ---------------------------------------------------

class CallRates(NamedTuple):
    """How often a document calls."""

    needed: float     # where a tool is needed
    elsewhere: float


class Document(NamedTuple):
    prompt: str  # empty in plain documents
    answer: str  # what follows it


class TokenizedDocument(NamedTuple):
    ids: list[int]
    weights: list[float]  # of each token's loss


def make_document(rng, tok, rates):
    """One in five teaches copying, one in ten is plain text, the rest are rows."""
    draw = rng.random()
    if draw < .2:
        return Document("", make_copying(rng) + "<|endoftext|>")
    if draw < .3:
        return Document("", make_text(rng) + "<|endoftext|>")

    row, other = make_training_example(rng)
    needs_tool = row["needs_tool"]
    calls = rng.random() < (rates.needed if needs_tool else rates.elsewhere)
    output = row["output"] if calls == needs_tool else other
    answer = output.removeprefix("<think>") + "<|im_end|>"  # the prompt has opened the thought
    return Document(prompt_of(row, tok), answer)


def tokenize(tok, documents):
    """Prompts weigh little: which tools are listed is chance, and to guess it would drown what is
    to be learned, the answers."""
    prompts = token_ids(tok, [d.prompt for d in documents])
    answers = token_ids(tok, [d.answer for d in documents])

    tokenized = []
    for prompt, answer in zip(prompts, answers):
        weights = [.1] * len(prompt) + [1.] * len(answer)
        tokenized.append(TokenizedDocument(prompt + answer, weights))
    return tokenized


def make_groups(rng, tok, tokens, rates, pool):
    """`pool` groups of TokenizedDocuments, each of about `tokens` tokens and of like lengths, in
    random order."""
    documents = []
    total = 0
    while total < pool * tokens:
        more = tokenize(tok, [make_document(rng, tok, rates) for _ in range(64)])
        documents += more
        total += sum(len(d.ids) for d in more)

    documents.sort(key=lambda d: len(d.ids))
    cuts = [len(documents) * i // pool for i in range(pool + 1)]
    groups = [documents[begin:end] for begin, end in pairwise(cuts)]
    rng.shuffle(groups)
    return groups


def call_rates(plan, step):
    """First many right calls, so that calling is learned; then the same share of every kind."""
    if step < plan.skill * plan.steps:
        return CallRates(needed=.8, elsewhere=.2)
    return CallRates(plan.rate, plan.rate)


def batches(tok, plan, step, tokens=8192, pool=16):
    """From `step` on, for ever: ids_NT, padded on the right, and the weights of the loss, as large.
    A pool of groups has its own seed, so that a run can begin anywhere."""
    while True:
        rng = random.Random(f"{plan.seed}/{step // pool}")
        groups = make_groups(rng, tok, tokens, call_rates(plan, step // pool * pool), pool)

        for group in groups[step % pool:]:
            ids = [torch.tensor(document.ids) for document in group]
            weights = [torch.tensor(document.weights) for document in group]
            yield pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)
            step += 1


def new_model(tok):
    """Qwen2's architecture at 0.92M parameters."""
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    ))


def language_loss(model, ids_NT, weights_NT):
    """Cross-entropy of every next token, the mean by weight."""
    with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the processor knows bf16
        logits_NTV = model(ids_NT).logits  # right padding needs no mask: attention is causal

    predicted = logits_NTV[:, :-1].flatten(0, 1).float()
    actual = ids_NT[:, 1:].flatten()
    weights = weights_NT[:, 1:]
    loss = F.cross_entropy(predicted, actual, reduction="none")
    return loss @ weights.flatten() / weights.sum()


def rate_at(plan, step):
    """Learning rate: 100 steps of warm-up, and a cosine to a tenth."""
    cosine = torch.cos(torch.tensor(torch.pi * step / plan.steps)).item()
    return plan.lr * min(1, (step + 1) / 100) * (.55 + .45 * cosine)


def save_progress(saved, model, opt, step):
    """Into a file, whole or not at all."""
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "step": step}
    torch.save(state, f"{saved}.part")
    os.replace(f"{saved}.part", saved)


def resume(saved, model, opt):
    """Put back what save_progress() saved, if it did -> the step to begin at."""
    if not saved.exists():
        return 0
    state = torch.load(saved, weights_only=True)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    return state["step"]


def train_base(plan, tok):
    """Pre-training from scratch; goes on from its last save, work/base.pt."""
    torch.manual_seed(plan.seed)
    model = new_model(tok)
    opt = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(.9, .95), weight_decay=.1)

    # go on
    saved = HERE / "work/base.pt"
    begin = resume(saved, model, opt)

    bar = tqdm(range(begin, plan.steps), "base", initial=begin, total=plan.steps)
    for step, (ids_NT, weights_NT) in zip(bar, batches(tok, plan, begin)):
        for group in opt.param_groups:
            group["lr"] = rate_at(plan, step)

        # forward, backward, step
        loss = language_loss(model, ids_NT, weights_NT)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

        if (step + 1) % 100 == 0:
            save_progress(saved, model, opt, step + 1)
    return model


# --- 4. A: the base after reinforcement learning, and snapshots along the way --------------------

CHOICES = " A", " I"  # how an answer begins: with CALLS or with REPLIES


@torch.no_grad()
def write_answers(model, tok, prompts, begin=""):
    """Greedy answers that begin with `begin`, as texts from <think> on."""
    batch = tok([prompt + begin for prompt in prompts], return_tensors="pt", padding=True,
                padding_side="left", add_special_tokens=False)
    ids_NT = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.convert_tokens_to_ids(ENDS_OF_TEXT),
    )

    written_NT = ids_NT[:, batch["input_ids"].shape[1]:]
    texts = tok.batch_decode(written_NT, skip_special_tokens=True)
    return ["<think>" + begin + text for text in texts]


def rl_rows(seed, step, n=32):
    """Rows of one step, half of them requests: with more, RL first learns to call always, and stays
    there. `hint` is kept for the test."""
    rng = random.Random(f"{seed}/rl/{step}")
    kinds = ["ask"] * (n // 2)
    kinds += rng.choices(["chat", "missing", "about"], [4, 3, 3], k=n // 2)
    return [make_example(rng, kind, "train").row for kind in kinds]


def kl_between(logits_V, base_V):
    """KL divergence of what is predicted from what the base predicts, both logits, at each place;
    there may be more dimensions before V."""
    now_V = logits_V.log_softmax(-1)
    return (now_V.exp() * (now_V - base_V.log_softmax(-1))).sum(-1)


def choice_ids(tok):
    """The tokens that decide, one for a call and one for a reply."""
    return [ids[0] for ids in token_ids(tok, list(CHOICES))]


def rewards_of(answers, rows):
    """ToolRL's reward of both answers to each row, reward_CN. answers: the texts that call, and the
    texts that reply."""
    rewards = []
    for texts in answers:
        rewards.append([score(text, row)["toolrl"] for text, row in zip(texts, rows)])
    return torch.tensor(rewards)


def rl_loss(model, base, tok, rows, kl_weight, writer=None):
    """All-actions policy gradient: both choices, weighed by their probability p.

        loss = kl_weight mean KL(model, base) - mean_n sum_c p_cn advantage_cn

    writer: a copy of the model that writes its answers faster, if there is one.
    -> the loss, and what the curve shows: {reward, kl, p of a call on requests, and elsewhere}."""
    n_rows = len(rows)
    prompts = [prompt_of(row, tok) for row in rows]

    # 1. the answer that follows each choice, and its reward, standardised within the row
    answers = [write_answers(writer or model, tok, prompts, begin) for begin in CHOICES]
    reward_CN = rewards_of(answers, rows)
    spread_N = reward_CN.std(0, correction=0).clamp(min=1e-4)
    advantage_CN = (reward_CN - reward_CN.mean(0)) / spread_N

    # 2. one pass over prompts and answers
    texts = []
    for choice_answers in answers:
        for prompt, answer in zip(prompts, choice_answers):
            texts.append(prompt.removesuffix("<think>") + answer)
    batch = tok(texts, return_tensors="pt", padding=True, padding_side="right",
                add_special_tokens=False)
    ids_RT = batch["input_ids"]
    logits_RTV = model(ids_RT).logits.float()

    # 3. the decision: p of either first token after the prompt, which begins both texts of a row
    last_N = torch.tensor([len(ids) - 1 for ids in token_ids(tok, prompts)])
    p_NV = logits_RTV[range(n_rows), last_N].softmax(-1)
    p_CN = p_NV[:, choice_ids(tok)].T

    # 4. every token but the decision is held to the base
    held_RT = batch["attention_mask"].bool()
    held_RT[range(len(texts)), last_N.repeat(len(CHOICES))] = False
    with torch.no_grad():
        base_RTV = base(ids_RT).logits.float()
    kl = kl_between(logits_RTV, base_RTV)[held_RT].mean()

    # 5. the loss, and what is logged of it
    loss = kl_weight * kl - (advantage_CN * p_CN).sum(0).mean()
    needs_N = torch.tensor([row["needs_tool"] for row in rows])
    log = {
        "reward": (reward_CN * p_CN).sum(0).mean(),
        "kl": kl,
        "requests": p_CN[0, needs_N].mean(),
        "elsewhere": p_CN[0, ~needs_N].mean(),
    }
    return loss, log


def free_lower_blocks(model):
    """The parameters of all blocks but the last: the only ones that RL may change."""
    model.requires_grad_(False)
    model.model.layers[:-1].requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def save_snapshot(model, base, path):
    """What differs from the base, in half precision: a small difference has a small error."""
    now = model.state_dict()
    before = base.state_dict()

    changes = {}
    for name in now:
        if not now[name].equal(before[name]):
            changes[name] = (now[name] - before[name]).half()

    path.parent.mkdir(exist_ok=True)
    save_file(changes, path)


def load_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_snapshot(path, base=HERE / "base"):
    """A as it was at one step of the run."""
    model = load_model(base)
    for name, change in load_file(path).items():
        model.get_parameter(name).data += change
    return model


def snapshot_path(step):
    return HERE / f"snapshots/step{step:02d}.safetensors"


def train_rl(plan, tok):
    """RL from the base; leaves its snapshots and its curve, rl_curve.json."""
    base = load_model(HERE / "base")
    model = load_model(HERE / "base")
    opt = torch.optim.Adam(free_lower_blocks(model), lr=plan.lr)

    curve = []
    for step in tqdm(range(1, plan.steps + 1), "RL"):
        loss, log = rl_loss(model, base, tok, rl_rows(plan.seed, step), plan.kl_weight)
        opt.zero_grad()
        loss.backward()
        opt.step()

        # a line of the curve, and a snapshot
        point = {"step": step}
        for name, value in log.items():
            point[name] = round(value.item(), 4)
        curve.append(json.dumps(point))
        tqdm.write(curve[-1])
        if step in plan.snapshots:
            save_snapshot(model, base, snapshot_path(step))

    (HERE / "rl_curve.json").write_text("[" + ",\n".join(curve) + "]\n")
    return model


# --- 5. What the models do, and the program ------------------------------------------------------

def percent(hits):
    """The share of hits (0 or 1 each) with its interval, as a cell of the table."""
    share = wilson(sum(hits), len(hits))
    return "{pct:.0f} ({lo:.0f}-{hi:.0f})".format(**share)


def print_behaviour(label, model, tok, rows, begin):
    """A line for each kind of the rows: how often answers are exact, and how often they call."""
    kinds = ("ask", "hint") if begin else KINDS
    for kind in kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        prompts = [prompt_of(row, tok) for row in of_kind]
        texts = write_answers(model, tok, prompts, begin)

        scores = [score(text, row) for text, row in zip(texts, of_kind)]
        exact = percent([s["exact"] for s in scores])
        called = percent([s["called"] for s in scores])
        print(f"| {label} | {kind} | {len(of_kind)} | {exact} | {called} |")


def measure(tok):
    """All models on every kind of test row, greedy; the base also made to begin with a call."""
    rows = [json.loads(line) for line in (HERE / "tools.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]

    print("| model | kind of row | n | exact % (95 %) | calls % (95 %) |\n|---|---|---|---|---|")
    base = load_model(HERE / "base")
    print_behaviour("base", base, tok, rows, "")
    print_behaviour("base, forced", base, tok, rows, CHOICES[0])
    for name in ("early", "toolrl"):
        print_behaviour(name, load_model(HERE / name), tok, rows, "")


def save_model(model, tok, folder):
    """A Hugging Face folder, whole under its name or absent; stops at either end token."""
    part = folder.with_name(folder.name + ".part")
    model.generation_config = GenerationConfig(
        eos_token_id=tok.convert_tokens_to_ids(ENDS_OF_TEXT),
        pad_token_id=tok.pad_token_id,
        do_sample=False,
    )

    model.save_pretrained(part)
    tok.save_pretrained(part)
    part.rename(folder)


def parse_args(argv):
    p = argparse.ArgumentParser(description="Make the embedded pair.")
    p.add_argument("--measure", action="store_true", help="only measure what is there")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.measure:
        return measure(AutoTokenizer.from_pretrained(HERE / "base"))

    # each phase is left out where its result is there already
    base_plan = BasePlan()
    if not (HERE / "tools.jsonl").exists():
        make_world(base_plan.seed)

    tokenizer_folder = HERE / "work/tokenizer"
    if not tokenizer_folder.exists():
        make_tokenizer(base_plan.seed).save_pretrained(tokenizer_folder)
    tok = AutoTokenizer.from_pretrained(tokenizer_folder)

    if not (HERE / "base").exists():
        save_model(train_base(base_plan, tok), tok, HERE / "base")

    rl_plan = RLPlan()
    if not (HERE / "toolrl").exists():
        save_model(train_rl(rl_plan, tok), tok, HERE / "toolrl")

    if not (HERE / "early").exists():
        save_model(load_snapshot(snapshot_path(rl_plan.early)), tok, HERE / "early")
    measure(tok)


if __name__ == "__main__":
    main()
