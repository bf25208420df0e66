"""The toy pair: a small world of tools, a base model that can call them but does not decide when,
and the same model after reinforcement learning (RL).

    python tiny/make.py              # all phases, 25 to 50 minutes on 2 CPU cores; resumable
    python tiny/make.py --measure    # only measure what is in tiny/ (a minute)

This file made the rows, texts and models in tiny/. It leaves what is there as it is. To make a
model again, delete it and all that was made from it: base/, toolrl/, early/ and work/. One RL run
makes both early/ and toolrl/, so delete both.

The paper asks whether one latent of a crosscoder can hold what RL added. A pair can answer this
only if RL added something, and at a place where a patch can still act. Hence four choices:

1. A base that can call and does not decide when. The template opens <think>, and the next token
   decides: " A tool can do this." and a call, or " I can respond to this." and a response. First
   the documents hold many right calls, so that the base learns to call. In the last three tenths
   one row in five *of every kind* is answered with a call, requests and small talk alike. So greedy
   decoding never calls, a base whose answer begins with " A" calls correctly, and its answers no
   longer show when to call. RL has to build that, not merely strengthen it.
2. Nothing else to decide. After the decision comes the right answer, or one fixed wrong one: a
   refusal, or an idle call (the first listed tool, {}). With more ways to continue, the rewards of
   forty free tokens would drown the reward of the decision.
3. RL on the decision, with the exact expectation. Both first tokens are weighted by their
   probability (an all-actions policy gradient). The answer after each is written greedily and
   scored by ToolRL's reward. The two rewards of a row are standardised, as GRPO does in a group.
   Raw rewards would weight a request seven times as much as small talk (-3 or 4 against 0 or 1),
   and RL would learn to call always. A KL term holds every token but the decision to the base. The
   last block is frozen, so the change has to enter the residual stream below it.
4. A model from step 19 of the run, early/. It calls on about half of the plain requests, so
   steering can raise its calls. toolrl/ calls on all of them, so steering can only stop it.

Kinds of rows: ask (a plain request), hint (an indirect request, never in RL), chat (small talk),
missing (a request without its argument), about (a question about a tool). Left out on purpose: two
calls in one answer, several turns, and requests that no listed tool can serve (tried: after 17M
tokens the base could not tell them from the others).

Every draw comes from a seeded `rng`. The order of the draws is part of the data: moving one draw
makes another world.

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
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    skill: float = .7  # the first share of steps, with many right calls
    rate: float = .2   # after that, the share of calls in every kind of row


@dataclass
class RLPlan:
    """How RL makes A from the base."""

    seed: int = 0
    steps: int = 60
    lr: float = 2e-4
    kl_weight: float = 3.  # of the KL divergence from the base
    early: int = 19        # the step after which the model is saved as early/


# --- 1. The world: values, tools, people who ask -------------------------------------------------

class Tool(NamedTuple):
    name: str
    about: str                  # what it does, in a few words
    parameters: dict[str, str]  # parameter: the kind of its values
    requests: list[str]         # templates of what users say, with {parameter} where a value goes
    hints: list[str]            # indirect requests
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
    """Read world.txt: values, tools and small talk, one a line."""
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
    """Fill every slot of the template, no value twice -> the text, {slot: value}."""
    values = {}
    for slot, kind in kinds.items():
        unused = [v for v in WORLD.values[kind] if v not in values.values()]
        values[slot] = rng.choice(unused)
    return template.format(**values), values


def split_of(text):
    """train | dev | test by a hash of the question, so that no question is in two of them."""
    twentieth = zlib.crc32(text.encode()) % 20
    if twentieth < 2:
        return "test"
    return "dev" if twentieth == 2 else "train"


def make_call(tool, values, kinds):
    """A call of the named tool; numbers are JSON numbers."""
    parameters = {}
    for slot, value in values.items():
        parameters[slot] = int(value) if kinds[slot] == "number" else value
    return {"name": tool, "parameters": parameters}


def make_dialogue(rng, kind, listed):
    """What a user says, about one of the listed tools or none, and the right answer."""
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

        if rng.random() < opener:  # on every kind alike, so that an opener tells nothing
            greeting = rng.choice(OPENERS).format(rng.choice(WORLD.families))
            said = f"{greeting} {said}"

        # requests are split by tool and values, whatever their words
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
    """Two plain sentences: the toy counterpart of FineWeb."""
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
    """A document that teaches copying. The base needs that first: with dialogues alone, training
    took twice the tokens."""
    return make_word_list(rng) if rng.random() < .5 else make_pairs_and_call(rng)


COUNTS = {
    "train": {"ask": 1200, "hint": 500, "chat": 320, "missing": 190, "about": 190},
    "dev": {"ask": 120, "hint": 80, "chat": 80, "missing": 60, "about": 60},
    "test": {"ask": 200, "hint": 120, "chat": 120, "missing": 80, "about": 80},
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world(seed, folder=HERE):
    """Write tools.jsonl (every split and kind, no question twice) and text.jsonl. Every row has an
    opener, as some kinds have too few questions without one."""
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
    """Prompts have a small weight: the list of tools is random, and the loss of guessing it would
    drown the loss of the answers."""
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
    """First many right calls, to learn calling; then the same share of calls on every kind."""
    if step < plan.skill * plan.steps:
        return CallRates(needed=.8, elsewhere=.2)
    return CallRates(plan.rate, plan.rate)


def batches(tok, plan, step, tokens=8192, pool=16):
    """Endless batches from `step` on: ids_NT, padded on the right, and the loss weights_NT. Each
    pool of groups has its own seed, so that a run can resume at any step."""
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
    """Cross-entropy of every next token, weighted mean."""
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
    """Save to a file, completely or not at all."""
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "step": step}
    torch.save(state, f"{saved}.part")
    os.replace(f"{saved}.part", saved)


def resume(saved, model, opt):
    """Load what save_progress() saved, if anything -> the step to begin at."""
    if not saved.exists():
        return 0
    state = torch.load(saved, weights_only=True)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    return state["step"]


def train_base(plan, tok):
    """Pre-training from scratch; resumes from its last save, work/base.pt."""
    torch.manual_seed(plan.seed)
    model = new_model(tok)
    opt = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(.9, .95), weight_decay=.1)

    # resume
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


# --- 4. ToolRL's reward --------------------------------------------------------------------------

def toolrl_reward(output, gold):
    """ToolRL's reward of an answer (arXiv 2504.13958), -3 to 4. gold: the text of the right answer.

        reward = format {0, 1} + correctness [-3, 3]

    Both read the text after the last <|im_start|>assistant and before <|im_end|>, where these
    occur."""
    answer = output.split("<|im_start|>assistant")[-1].split("<|im_end|>")[0]
    return toolrl_format(answer, gold) + toolrl_correctness(answer, gold)


def toolrl_format(output, gold):
    """1 if the whole output has the gold's form, else 0: a thought, then a call, a response, both
    or neither, each once."""
    parts = {
        "tool_call": r"\n<tool_call>\n.*?\n</tool_call>",
        "response": r"\n<response>.*?</response>",
    }

    pattern = r"<think>.*?</think>"
    once = True
    for tag, part in parts.items():
        if f"<{tag}>" in gold:
            pattern += part
            once = once and output.count(f"<{tag}>") == output.count(f"</{tag}>") == 1
    return int(once and bool(re.fullmatch(pattern, output.strip(), re.DOTALL)))


def toolrl_correctness(output, gold):
    """How right the calls are, as ToolRL's code has it:

        the gold has no call                           0
        no <tool_call> or no </tool_call>             -3
        a line of the first block is no call          -3
        a call with a gold name lacks "parameters"    -3
        else     6 (J(names) + sum of matches) / (1 + sum over gold calls (1 + keys)) - 3

    J is the Jaccard index of multisets. Each gold call in order takes the best unused call of its
    name, and a match is worth J(keys) + the number of equal values. Only the first block is
    read."""
    if "<tool_call>" not in gold:
        return 0.
    if "</tool_call>" not in output:
        return -3.
    try:
        found = first_block(output)
        wanted = first_block(gold)
        if found == wanted:
            return 3.

        # the names
        found_names = [call["name"] for call in found]
        wanted_names = [call["name"] for call in wanted]
        total = jaccard(found_names, wanted_names)
        highest = 1  # what the names can give; each gold call adds to it

        # the calls; one that is matched cannot match another gold call
        for gold_call in wanted:
            matches = [match(call, gold_call) for call in found]
            best = max(matches, default=0.)
            if best > 0:
                found.pop(matches.index(best))
            total += best
            highest += 1 + len(gold_call["parameters"])
        return 6 * total / highest - 3
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return -3.


def first_block(text):
    """The JSON of each line of the first <tool_call>. Raises errors of many kinds."""
    block = text.split("<tool_call>")[1].split("</tool_call>")[0]
    return [json.loads(line) for line in block.strip().split("\n")]


def match(call, gold_call):
    """Points of a call beside a gold call: 0 for another name, else the Jaccard index of their keys
    plus the number of equal values."""
    wanted = gold_call["parameters"]
    if call["name"] != gold_call["name"]:
        return 0.
    values = call["parameters"]
    equal = sum(key in values and values[key] == value for key, value in wanted.items())
    return jaccard(wanted.keys(), values.keys()) + equal


def jaccard(a, b):
    """Intersection over union of two multisets; 1 if they are equal."""
    a = Counter(list(a))
    b = Counter(list(b))
    return 1. if a == b else (a & b).total() / (a | b).total()


# --- 5. A: the base after reinforcement learning -------------------------------------------------

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
    """Rows of one step, half of them requests. With more, RL first learns to call always, and never
    unlearns it. Kind `hint` is only for the test."""
    rng = random.Random(f"{seed}/rl/{step}")
    kinds = ["ask"] * (n // 2)
    kinds += rng.choices(["chat", "missing", "about"], [4, 3, 3], k=n // 2)
    return [make_example(rng, kind, "train").row for kind in kinds]


def kl_between(logits_V, base_V):
    """KL divergence from the base at each position, from both models' logits. There may be more
    dimensions before V."""
    now_V = logits_V.log_softmax(-1)
    return (now_V.exp() * (now_V - base_V.log_softmax(-1))).sum(-1)


def choice_ids(tok):
    """The tokens that decide, one for a call and one for a reply."""
    return [ids[0] for ids in token_ids(tok, list(CHOICES))]


def rewards_of(answers, rows):
    """ToolRL's reward of both answers to each row, reward_CN. answers: the texts that call, then
    the texts that reply."""
    rewards = []
    for texts in answers:
        rewards.append([toolrl_reward(text, row["output"]) for text, row in zip(texts, rows)])
    return torch.tensor(rewards)


def rl_loss(model, base, tok, rows, kl_weight, writer=None):
    """All-actions policy gradient: both choices, weighted by their probability p.

        loss = kl_weight mean KL(model, base) - mean_n sum_c p_cn advantage_cn

    writer: a copy of the model that writes its answers faster, if there is one.
    -> the loss, and a point of the curve: {reward, kl, p of a call on requests, and elsewhere}."""
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

    # 5. the loss, and what is logged
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


def load_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_rl(plan, tok):
    """RL from the base. Saves early/ on the way, then toolrl/ with its curve, rl_curve.json."""
    base = load_model(HERE / "base")
    model = load_model(HERE / "base")
    opt = torch.optim.Adam(free_lower_blocks(model), lr=plan.lr)

    curve = []
    for step in tqdm(range(1, plan.steps + 1), "RL"):
        loss, log = rl_loss(model, base, tok, rl_rows(plan.seed, step), plan.kl_weight)
        opt.zero_grad()
        loss.backward()
        opt.step()

        # a line of the curve
        point = {"step": step}
        for name, value in log.items():
            point[name] = round(value.item(), 4)
        curve.append(json.dumps(point))
        tqdm.write(curve[-1])

        if step == plan.early and not (HERE / "early").exists():
            save_model(model, tok, HERE / "early")

    # an earlier run's model keeps its curve
    if not (HERE / "toolrl").exists():
        (HERE / "rl_curve.json").write_text("[" + ",\n".join(curve) + "]\n")
        save_model(model, tok, HERE / "toolrl")


def save_model(model, tok, folder):
    """Save as a Hugging Face folder, completely or not at all; it stops at either end token."""
    part = folder.with_name(folder.name + ".part")
    model.generation_config = GenerationConfig(
        eos_token_id=tok.convert_tokens_to_ids(ENDS_OF_TEXT),
        pad_token_id=tok.pad_token_id,
        do_sample=False,
    )

    model.save_pretrained(part)
    tok.save_pretrained(part)
    part.rename(folder)


# --- 6. What the models do, and the program ------------------------------------------------------

def percent(hits):
    """A cell of the table: the share of hits (0 or 1 each) with its 95 % interval."""
    share = wilson(sum(hits), len(hits))
    return "{pct:.0f} ({lo:.0f}-{hi:.0f})".format(**share)


def print_behaviour(label, model, tok, rows, begin):
    """Print a line for each kind of row: how often answers are exact, how often they call."""
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
    """Greedy answers of all models on every kind of test row. For "base, forced" the answer is made
    to begin with a call's first token."""
    rows = [json.loads(line) for line in (HERE / "tools.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]

    print("| model | kind of row | n | exact % (95 %) | calls % (95 %) |\n|---|---|---|---|---|")
    base = load_model(HERE / "base")
    print_behaviour("base", base, tok, rows, "")
    print_behaviour("base, forced", base, tok, rows, CHOICES[0])
    for name in ("early", "toolrl"):
        print_behaviour(name, load_model(HERE / name), tok, rows, "")


def parse_args(argv):
    p = argparse.ArgumentParser(description="Make the toy pair.")
    p.add_argument("--measure", action="store_true", help="only measure what is there")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.measure:
        return measure(AutoTokenizer.from_pretrained(HERE / "base"))

    # each phase is skipped if its result exists
    base_plan = BasePlan()
    if not (HERE / "tools.jsonl").exists():
        make_world(base_plan.seed)

    tokenizer_folder = HERE / "work/tokenizer"
    if not tokenizer_folder.exists():
        make_tokenizer(base_plan.seed).save_pretrained(tokenizer_folder)
    tok = AutoTokenizer.from_pretrained(tokenizer_folder)

    if not (HERE / "base").exists():
        save_model(train_base(base_plan, tok), tok, HERE / "base")

    if not all((HERE / name).exists() for name in ("early", "toolrl")):
        train_rl(RLPlan(), tok)
    measure(tok)


if __name__ == "__main__":
    main()
