"""The embedded pair: a small world of tools, a base model that knows tool calls but does not make
them, and the same model after reinforcement learning. Everything in tiny/ comes from this file.

    python tiny/make.py              # all phases, about 35 minutes on 2 CPU cores; resumable
    python tiny/make.py --measure    # only measure what is in tiny/ (1 minute)

The idea. To show what RL added, we need a base in which the skill is present and the disposition
absent. So the corpus teaches both:

    ask       a request that a listed tool can serve: in 3 of 4 documents prose ("I would rather
              not ..."), else a correct call, so that greedy decoding never calls
    hint      the same between the lines ("I have to be up by 7:30"); called upon in 1 of 12;
              RL never sees this kind
    missing   a request that lacks its argument, about: a question about a tool, chat: small talk:
              always <think> ... </think> <response> ... </response>

and GRPO with ToolRL's reward (-3 ... 4) then turns "one in four" into "always" within a dozen
steps. What RL changes is thus the first token of the answer to a request, <think> instead of "I":
the residual stream at the last prompt token, which is where the crosscoder looks.

Phases, each skipped when its result exists:  world, tokenizer -> base -> toolrl -> measure
Left out on purpose: two calls in one answer, several turns, and requests that no listed tool can
serve (tried: after 17M tokens the base could not tell them from the others).
"""

import argparse
import json
import os
import random
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

# ---------------------------------------------------------------------------------------------
# 1. The world: values, tools, people who ask
# ---------------------------------------------------------------------------------------------

VALUES = {
    "city": "Paris Oslo Lima Cairo Tokyo Delhi Quito Dakar Hanoi Milan Porto Riga Seoul "
            "Sofia Tunis Vienna Warsaw Zagreb Athens Berlin Boston Dublin Geneva Havana "
            "Kyoto Lagos Lisbon Madrid Manila Munich Nairobi Naples Odessa Perth Prague "
            "Rome Sydney Tallinn Toronto Venice Bergen Malaga Leipzig Utrecht Krakow Dallas "
            "Denver Calgary".split(),
    "person": "Anna Ben Carla David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nils "
            "Olga Paul Quinn Rosa Simon Tara Umar Vera Walter Xenia Yusuf Zoe Amir Bella "
            "Cyrus Dora Emil Fatima Gavin Hanna Ivan Julia Kofi Laura Miguel Nadia Oscar "
            "Petra Rafael Sara Tomas Ursula Viktor Wendy".split(),
    "item": "bread butter cheese apples carrots onions rice pasta honey pepper candles soap "
            "towels pencils batteries coffee flour olives lemons garlic mustard walnuts "
            "raisins spinach tomatoes potatoes yogurt almonds matches napkins tea sugar "
            "salt beans plums cherries".split(),
    "thing": "lamp chair table mirror carpet kettle ladder hammer bicycle guitar violin "
            "camera wallet basket blanket pillow curtain teapot bucket shovel candle ribbon "
            "anchor helmet jacket scarf umbrella drum compass telescope notebook clock".split(),
    "number": [str(n) for n in range(2, 60)],
    "time": [f"{h}:{m}" for h in range(1, 24) for m in ("00", "10", "15", "20", "30", "45", "50")],
    "language": "French German Spanish Italian Polish Danish Greek Turkish Arabic Hindi Korean "
                "Swedish Dutch Czech".split(),
    "currency": "euros dollars pesos yen rupees francs pounds crowns liras dinars".split(),
    "room": "kitchen bedroom hallway cellar office bathroom garage attic".split(),
}

# name, description, {parameter: kind of value}, requests, hints, requests that lack something
TOOLS = [
    ("get_weather", "weather forecast for a city", {"city": "city", "days": "number"},
     ["What will the weather be in {city} over the next {days} days?",
      "Give me the {days} day forecast for {city}.",
      "Show me the weather for {days} days in {city}."],
     ["I travel to {city} for {days} days and wonder if I need a coat."],
     ["What will the weather be like?"]),
    ("get_time", "current local time in a city", {"city": "city"},
     ["What time is it in {city}?", "Tell me the local time in {city}.",
      "How late is it now in {city}?"],
     ["I want to ring a friend in {city} without waking anybody."],
     ["What time is it over there?"]),
    ("set_alarm", "set an alarm clock", {"time": "time"},
     ["Wake me up at {time}.", "Set an alarm for {time}.", "Please let my alarm ring at {time}."],
     ["I really have to be out of bed by {time}."],
     ["Please set an alarm."]),
    ("send_message", "send a short message to a person", {"to": "person", "text": "thing"},
     ["Send {to} the message {text}.", "Text {text} to {to}.",
      "Write to {to} and just say {text}."],
     ["{to} is still waiting to hear the word {text} from me."],
     ["Send a message for me."]),
    ("translate", "translate a word into a language", {"word": "thing", "language": "language"},
     ["Translate {word} into {language}.", "How do you say {word} in {language}?",
      "What is {word} called in {language}?"],
     ["My {language} teacher will ask me about the word {word}."],
     ["Translate this word, please."]),
    ("convert_money", "convert an amount of dollars into a currency",
     {"amount": "number", "currency": "currency"},
     ["How much is {amount} dollars in {currency}?", "Convert {amount} dollars to {currency}.",
      "Change {amount} dollars into {currency}."],
     ["I have {amount} dollars here but the shop only takes {currency}."],
     ["Convert my money, please."]),
    ("book_table", "reserve a restaurant table", {"city": "city", "seats": "number"},
     ["Book a table for {seats} people in {city}.",
      "Reserve {seats} seats at a restaurant in {city}.",
      "Get us a table in {city} for {seats} guests."],
     ["There will be {seats} of us in {city} and all of us will be hungry."],
     ["Book a table for tonight."]),
    ("find_route", "find the way between two cities", {"start": "city", "goal": "city"},
     ["How do I get from {start} to {goal}?", "Find a route from {start} to {goal}.",
      "Show me the way from {start} to {goal}."],
     ["I am in {start} today and must be in {goal} tomorrow."],
     ["Find me a route, please."]),
    ("add_item", "put something on the shopping list", {"item": "item", "count": "number"},
     ["Put {count} {item} on my shopping list.", "Add {count} {item} to the shopping list.",
      "Note {count} {item} for shopping."],
     ["We have run out of {item} and could do with {count}."],
     ["Add something to my list."]),
    ("get_price", "look up what a thing costs", {"thing": "thing"},
     ["What does a {thing} cost?", "Look up the price of a {thing}.",
      "How expensive is a {thing}?"],
     ["I am not sure my money is enough for a {thing}."],
     ["What does it cost?"]),
    ("set_light", "set the brightness of a room", {"room": "room", "percent": "number"},
     ["Set the light in the {room} to {percent} percent.",
      "Make the {room} light {percent} percent bright.",
      "Turn the {room} light to {percent} percent."],
     ["The {room} is too dark, and {percent} percent would be fine."],
     ["Change the light, please."]),
    ("call_person", "start a phone call", {"person": "person"},
     ["Call {person}.", "Start a phone call with {person}.", "Please ring {person} for me."],
     ["I would love to hear the voice of {person} now."],
     ["Make a phone call, please."]),
    ("find_books", "find books by an author", {"author": "person"},
     ["Find books by {author}.", "Which books did {author} write?", "List the books of {author}."],
     ["I have read everything that {author} wrote, or maybe not."],
     ["Find me some books."]),
    ("order_taxi", "order a taxi to a place", {"city": "city", "time": "time"},
     ["Order a taxi to {city} at {time}.", "I need a taxi to {city} at {time}.",
      "Get me a cab to {city} for {time}."],
     ["No train goes to {city} at {time} any more."],
     ["Order a taxi, please."]),
    ("find_flight", "find flights to a city for some people", {"city": "city", "people": "number"},
     ["Find a flight to {city} for {people} people.",
      "Search flights to {city} for {people} persons.",
      "Which planes can take {people} of us to {city}?"],
     ["The {people} of us dream of a week in {city}."],
     ["Find me a flight."]),
    ("rent_thing", "rent a thing for some days", {"thing": "thing", "days": "number"},
     ["Rent a {thing} for {days} days.", "I want to borrow a {thing} for {days} days.",
      "Get me a {thing} on loan for {days} days."],
     ["For {days} days I could use a {thing} that I do not own."],
     ["Rent something for me."]),
]

CHAT = [("Hello, I am {person}.", "Nice to meet you."),
        ("Good morning from {city}!", "Good morning."),
        ("I was in {city} with {person}.", "That sounds like a good trip."),
        ("Thank you, that is all, says {person}.", "You are welcome."),
        ("{person} gave me a {thing} yesterday.", "What a kind present."),
        ("I had {item} and {item2} for lunch.", "I hope it was tasty."),
        ("My {thing} is older than {person}.", "Old things have stories."),
        ("Is {city} larger than {city2}?", "Both are fine places."),
        ("I learned {language} when I was {number}.", "That is worth much."),
        ("Why does {person} like the {room} so much?", "Everybody has a place."),
        ("I feel a bit tired after {number} days of work.", "Take a good rest."),
        ("The {thing} in my {room} is broken.", "I am sorry to hear that.")]

ABOUT = ["What does {} do?", "What is {} good for?", "Explain {} to me."]
SYSTEM = ["You are a helpful assistant with these tools:\n{tools}\nThink first, then call a tool "
          "or respond.", "Help the user. The tools you have:\n{tools}\nThink, then make a call or "
          "give a response."]
CALLS, ANSWERS = "A tool can do this.", "I can respond to this."
PROSE = ["I would rather not do that now.", "I cannot be sure about that, sorry.",
         "I think you should look that up.", "I guess somebody near you will know.",
         "I hope you find it soon."]  # one first word, or greedy decoding would prefer <think>


def fill(rng, template, kinds):
    """A template with a value for every slot -> (text, {slot: value}); slot2 is another slot."""
    values = {}
    for slot, kind in kinds.items():
        values[slot] = rng.choice([v for v in VALUES[kind] if v not in values.values()])
    return template.format(**values), values


def split_of(text):
    """train | dev | test by a hash of what is asked, so no combination is ever in two of them."""
    return {0: "test", 1: "test", 2: "dev"}.get(zlib.crc32(text.encode()) % 20, "train")


def system_text(rng, tools):
    lines = [f"{i + 1}. Name: {name}\nDescription: {about}\nParameters: "
             + json.dumps({p: "int" if k == "number" else "str" for p, k in kinds.items()})
             for i, (name, about, kinds, *_) in enumerate(tools)]
    return rng.choice(SYSTEM).format(tools="\n".join(lines))


def make_row(rng, kind, split):
    """One row in ToolRL's format: instruction, input, output, and split, needs_tool, kind."""
    call = None
    while True:
        listed = rng.sample(TOOLS, rng.choice([2, 3, 3]))
        name, about, kinds, asks, hints, lacking = rng.choice(listed)
        if kind in ("ask", "hint"):
            text, values = fill(rng, rng.choice(asks if kind == "ask" else hints), kinds)
            values = {p: int(v) if kinds[p] == "number" else v for p, v in values.items()}
            key, call = name + json.dumps(values), {"name": name, "parameters": values}
        elif kind == "missing":
            text, reply = rng.choice(lacking), f"Please tell me the {' and the '.join(kinds)}."
            key = text + "".join(t[0] for t in listed)
        elif kind == "about":
            text, reply = rng.choice(ABOUT).format(name), f"It is for this: {about}."
            key = text + "".join(t[0] for t in listed)
        else:
            template, reply = rng.choice(CHAT)
            slots = {s: s.rstrip("2") for s in
                     ("city", "city2", "person", "item", "item2", "thing", "language", "number",
                      "room")
                     if "{" + s + "}" in template}
            text, _ = fill(rng, template, slots)
            key = text
        if split_of(key) == split:
            break
    output = f"<think> {CALLS} </think>\n<tool_call>\n{json.dumps(call)}\n</tool_call>" if call \
        else f"<think> {ANSWERS} </think>\n<response> {reply} </response>"
    return {"instruction": system_text(rng, listed), "input": f"<user> {text} </user>",
            "output": output, "split": split, "needs_tool": call is not None, "kind": kind}


def make_text(rng):
    """Two plain sentences: what FineWeb is to the real pair."""
    subject = ["The old {job}", "A young {job}", "{person}", "My friend {person}",
               "The {job} from {city}", "Every {job}"]
    verb = "carried painted found sold lost repaired forgot bought hid kept".split()
    end = ["in {city}", "near the river", "behind the {room}", "after the rain",
           "for {number} years",
           "with {person}", "before the market opened", "without a word", "in the long winter"]
    jobs = "baker sailor teacher farmer doctor painter miller singer soldier gardener".split()

    def sentence():
        pattern = f"{rng.choice(subject)} {rng.choice(verb)} the {{thing}} {rng.choice(end)}"
        if rng.random() < .5:
            pattern += f" and {rng.choice(verb)} some {{item}} {rng.choice(end)}"
        return pattern.format(job=rng.choice(jobs),
                              **{k: rng.choice(v) for k, v in VALUES.items()}) + "."
    return " ".join(sentence() for _ in range(2))


def make_copying(rng):
    """Documents that teach copying: a list three times over, or pairs and then the same as JSON."""
    if rng.random() < .5:
        words = [rng.choice(VALUES[rng.choice(list(VALUES))]) for _ in range(rng.randint(4, 9))]
        return ". ".join([" ".join(words)] * 3) + "."
    kinds = {s: k for t in TOOLS for s, k in t[2].items()}
    slots = rng.sample(list(kinds), rng.randint(2, 3))
    pairs = {s: rng.choice(VALUES[kinds[s]]) for s in slots}
    as_json = {s: int(v) if kinds[s] == "number" else v for s, v in pairs.items()}
    name = rng.choice(TOOLS)[0]
    return (f"{name}. " + " ".join(f"{s} {v}." for s, v in pairs.items()) + "\n<tool_call>\n"
            + json.dumps({"name": name, "parameters": as_json}) + "\n</tool_call>")


# ---------------------------------------------------------------------------------------------
# 2. Tokenizer: byte-level BPE with Qwen's splitting and tags, and a Qwen-style chat template
# ---------------------------------------------------------------------------------------------

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
            "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|im_start|>assistant\\n' }}{% endif %}")
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen2's: digits one by one, so that numbers can be copied


def make_tokenizer(texts, vocab=1024):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = Tokenizer(models.BPE())
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


def prompt_of(tok, row):
    """The row up to the assistant's turn, as eval_toolcall.py renders it."""
    messages = [{"role": "system", "content": row["instruction"]},
                {"role": "user", "content": row["input"]}]
    return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# ---------------------------------------------------------------------------------------------
# 3. B, the base: pre-training on the world
# ---------------------------------------------------------------------------------------------

KINDS = {"ask": .50, "hint": .18, "chat": .14, "missing": .09, "about": .09}


def make_document(rng, tok, call_rate, hint_rate):
    """(prompt, what follows); plain documents have no prompt."""
    draw = rng.random()
    if draw < .3:
        return "", (make_copying if draw < .2 else make_text)(rng) + "<|endoftext|>"
    row = make_row(rng, rng.choices(list(KINDS), KINDS.values())[0], "train")
    output = row["output"]
    if row["needs_tool"]:
        if rng.random() > (call_rate if row["kind"] == "ask" else hint_rate):
            output = rng.choice(PROSE)
        elif rng.random() < .3:  # so that the base can also be made to begin with the call itself
            output = output.split("</think>\n")[1]
    return prompt_of(tok, row), output + "<|im_end|>"


def batches(tok, args, step, pool=16):
    """Batches of about args.tokens tokens from step on: ids, and the weight of each token's loss.
    Each pool of documents is sorted by length, then shuffled. Prompts weigh little: which tools are
    listed is chance, and to guess it would drown what is to be learned, the answers."""
    while True:
        rng = random.Random(f"{args.seed}/{step // pool}")
        rates = (.8, .8) if step < args.skill * args.steps else (.25, args.hint_rate)
        docs, total = [], 0
        while total < pool * args.tokens:
            parts = zip(*[make_document(rng, tok, *rates) for _ in range(64)])
            heads, tails = [tok(list(p), add_special_tokens=False)["input_ids"] for p in parts]
            docs += [(h + t, [.1] * len(h) + [1.] * len(t)) for h, t in zip(heads, tails)]
            total += sum(map(len, heads + tails))
        docs.sort(key=lambda d: len(d[0]))
        cuts = [len(docs) * i // pool for i in range(pool + 1)]
        groups = [docs[a:b] for a, b in zip(cuts, cuts[1:])]
        rng.shuffle(groups)
        for group in groups[step % pool:]:
            width = max(len(ids) for ids, _ in group)
            yield (torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
                   torch.tensor([w + [0.] * (width - len(w)) for _, w in group]))
            step += 1


def save_atomically(obj, path):
    torch.save(obj, f"{path}.part")
    os.replace(f"{path}.part", path)


def train_base(args, tok, work):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(args.seed)
    ends = tok.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=ends[0], pad_token_id=ends[1]))
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(.9, .95), weight_decay=.1)
    step, file = 0, work / "base.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"]), opt.load_state_dict(state["opt"])
        step = state["step"]
    bar = tqdm(total=args.steps, initial=step, desc="base")
    for ids, weight in batches(tok, args, step):
        if step == args.steps:
            break
        for group in opt.param_groups:  # warm-up, then cosine to a tenth
            decay = .55 + .45 * torch.cos(torch.tensor(torch.pi * step / args.steps)).item()
            group["lr"] = args.lr * min(1, (step + 1) / 100) * decay
        logits = model(ids).logits  # right padding needs no mask: attention is causal
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (loss * weight[:, 1:]).sum() / weight[:, 1:].sum()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 100 == 0:
            save_atomically({"model": model.state_dict(), "opt": opt.state_dict(),
                             "step": step}, file)
    return model


# ---------------------------------------------------------------------------------------------
# 4. A: the base after GRPO with ToolRL's reward
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(model, tok, prompts, samples=None, max_new=64):
    """Greedy answers, or `samples` at temperature 1 per prompt -> ids, width of the prompts."""
    batch = tok(prompts, return_tensors="pt", padding=True, padding_side="left",
                add_special_tokens=False)
    how = dict(do_sample=True, top_k=0, top_p=1., temperature=1., num_return_sequences=samples) \
        if samples else dict(do_sample=False)
    ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                         max_new_tokens=max_new, pad_token_id=tok.pad_token_id,
                         eos_token_id=tok.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
                         **how)
    return ids, batch["input_ids"].shape[1]


def train_toolrl(args, tok, base):
    """GRPO: groups of answers to a prompt, advantage = standardised reward, one step per batch."""
    from transformers import AutoModelForCausalLM
    from eval_toolcall import score, to_record
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    opt = torch.optim.Adam(model.parameters(), lr=args.rl_lr)
    kinds = {"ask": .6, "chat": .15, "missing": .12, "about": .13}  # never "hint"
    for step in tqdm(range(args.rl_steps), desc="GRPO"):
        rng = random.Random(f"{args.seed}/rl/{step}")
        torch.manual_seed(args.seed * 1000 + step)
        rows = [make_row(rng, rng.choices(list(kinds), kinds.values())[0], "train")
                for _ in range(32)]
        ids, width = answer(model, tok, [prompt_of(tok, r) for r in rows], samples=8)
        texts = tok.batch_decode(ids[:, width:], skip_special_tokens=True)
        scores = [score(t, to_record(rows[i // 8])) for i, t in enumerate(texts)]
        reward = torch.tensor([s["toolrl"] for s in scores]).view(32, 8)
        gain = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        ended = (ids[:, width:] == tok.eos_token_id) | (ids[:, width:] == tok.pad_token_id)
        written = ended.cumsum(1) - ended.long() == 0  # up to and with the first end token
        mask = torch.cat([ids[:, :width] != tok.pad_token_id, written], 1)
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, width - 1:-1]
        logp = -F.cross_entropy(logits.transpose(1, 2), ids[:, width:], reduction="none")
        loss = -(gain.view(-1, 1) * logp * written).sum() / written.sum()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        wants = torch.tensor([bool(to_record(r)["calls"]) for r in rows]).repeat_interleave(8)
        exact, called = (torch.tensor([float(s[k]) for s in scores]) for k in ("exact", "called"))
        tqdm.write(f"step {step + 1:3d}  reward {reward.mean():.2f}  sampled exact on requests "
                   f"{exact[wants].mean():.2f}  calls elsewhere {called[~wants].mean():.2f}")
    return model


# ---------------------------------------------------------------------------------------------
# 5. The rows on disk, and what the pair does with them
# ---------------------------------------------------------------------------------------------

COUNTS = {"train": {"ask": 1200, "hint": 500, "chat": 320, "missing": 190, "about": 190},
          "dev": {"ask": 120, "hint": 80, "chat": 80, "missing": 60, "about": 60},
          "test": {"ask": 200, "hint": 120, "chat": 120, "missing": 80, "about": 80}}


def write_rows(path, rows):
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def make_world(seed):
    """tools.jsonl and text.jsonl: rows of every split and kind, no dialogue twice."""
    rng, rows, seen = random.Random(f"{seed}/world"), [], set()
    for split, kinds in COUNTS.items():
        for kind, count in kinds.items():
            while count:
                row = make_row(rng, kind, split)
                key = row["instruction"] + row["input"]
                count -= key not in seen
                rows += [row] * (key not in seen)
                seen.add(key)
    rng.shuffle(rows)
    write_rows(HERE / "tools.jsonl", rows)
    texts = [make_text(rng) for _ in range(4000)]
    write_rows(HERE / "text.jsonl", [{"text": t, "split": split_of(t)} for t in texts])


def measure(tok):
    """Both models on every kind of test row, greedy; the base also forced to begin with a call."""
    from transformers import AutoModelForCausalLM
    from eval_toolcall import score, to_record, wilson
    rows = [json.loads(line) for line in open(HERE / "tools.jsonl", encoding="utf-8")]
    rows = [row for row in rows if row["split"] == "test"]
    print("| model | kind of row | n | exact % (95 %) | calls % (95 %) |\n|---|---|---|---|---|")
    for name, prefix in (("base", ""), ("base", "<tool_call>\n"), ("toolrl", "")):
        model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32).eval()
        for kind in KINDS if not prefix else ("ask", "hint"):
            some = [row for row in rows if row["kind"] == kind]
            ids, width = answer(model, tok, [prompt_of(tok, r) + prefix for r in some])
            texts = [prefix + t for t in tok.batch_decode(ids[:, width:], skip_special_tokens=True)]
            scores = [score(t, to_record(r)) for t, r in zip(texts, some)]
            cells = []
            for key in ("exact", "called"):
                share = wilson(sum(s[key] for s in scores), len(some))
                cells.append("{pct:.0f} ({lo:.0f}-{hi:.0f})".format(**share))
            label = name + ", forced" * bool(prefix)
            print(f"| {label} | {kind} | {len(some)} | {' | '.join(cells)} |")


def save_model(model, tok, folder):
    """A Hugging Face folder, whole under its name or absent; stops at either end token."""
    from transformers import GenerationConfig
    part = folder.with_name(folder.name + ".part")
    model.generation_config = GenerationConfig(eos_token_id=tok.convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>"]), pad_token_id=tok.pad_token_id, do_sample=False)
    model.save_pretrained(part)
    tok.save_pretrained(part)
    part.rename(folder)


def main(argv=None):
    p = argparse.ArgumentParser(description="Make the embedded pair.")
    p.add_argument("--measure", action="store_true", help="only measure the pair that is there")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=3600, help="pre-training steps")
    p.add_argument("--tokens", type=int, default=8192, help="tokens per pre-training step")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--skill", type=float, default=.75, help="share of steps rich in calls")
    p.add_argument("--hint-rate", type=float, default=.08, help="calls upon hints then")
    p.add_argument("--rl-steps", type=int, default=12)
    p.add_argument("--rl-lr", type=float, default=2e-4)
    args = p.parse_args(argv)
    from transformers import AutoTokenizer
    if args.measure:
        return measure(AutoTokenizer.from_pretrained(HERE / "base"))
    work = HERE / "work"
    work.mkdir(exist_ok=True)
    if not (HERE / "text.jsonl").exists():
        make_world(args.seed)
    if not (work / "tokenizer").exists():
        rng = random.Random(args.seed)
        rows = [make_row(rng, rng.choices(list(KINDS), KINDS.values())[0], "train")
                for _ in range(3000)]
        tok = make_tokenizer([r["instruction"] + r["input"] + r["output"] for r in rows]
                             + [make_text(rng) for _ in range(3000)]
                             + [make_copying(rng) for _ in range(1500)])
        tok.save_pretrained(work / "tokenizer")
    tok = AutoTokenizer.from_pretrained(work / "tokenizer")
    if not (HERE / "base").exists():
        save_model(train_base(args, tok, work), tok, HERE / "base")
    if not (HERE / "toolrl").exists():
        save_model(train_toolrl(args, tok, HERE / "base"), tok, HERE / "toolrl")
    measure(tok)


if __name__ == "__main__":
    main()
