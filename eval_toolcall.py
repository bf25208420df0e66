"""Score tool calls so that the number means something.

    python eval_toolcall.py                          # the newest run of dfc.py: 35 s
    python eval_toolcall.py runs/a runs/b --show 3   # several at once; print three rows as well
    python eval_toolcall.py --score outputs.jsonl    # rows {prediction, ground_truth[, tools]}
    ... | python eval_toolcall.py --score -          # the same from standard input; no torch needed

Evaluated is what a crosscoder keeps of tool use: A and its base B answer the test rows, clean, then
with their activation at the prompt's last token replaced by the crosscoder's reconstruction, its
parts, and controls. Every answer goes to eval.jsonl in the run folder, the totals to metrics.json.

An example and its verdict (the tools are get_weather, get_time, get_weather_alerts):

    gold        <think> t </think>
                <tool_call>
                {"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}
                </tool_call>
    prediction  the same with "days": 5
    verdict     exact 0   name 1   called 1   toolrl 1 + 1.5   paper_overall 2

Scores, each a pure function of text:

    exact          the multiset of calls equals the gold one (names, keys, values; any order);
                   where no call is wanted, a non-empty answer and no call. The headline.
    name, called   the multiset of names equals the gold one; any well-formed call at all. A call
                   without its closing tag counts for these two, and is never exact
    false_call     called, where no call is wanted
    toolrl         ToolRL's reward (arXiv 2504.13958): format {0, 1} + correctness [-3, 3]
    paper_*        the rubric of arXiv 2606.26474: format = a <tool_call> and a "name" anywhere;
                   tool = the first "name" equals, contains or is contained in any listed tool;
                   overall = -1 + format + 2 tool. Calling tool 1 with {} scores 100 %: hence the
                   chance lines, three answers that never read the question.

Shapes: N prompts, M = 2 models (A, B), D width, L latents, V versions of an answer (what is patched
in), R = N V rows of one batch in flight, T tokens. "Needs:" in a docstring: what to copy along with
the piece.
"""

import argparse
import contextlib
import copy
import itertools
import json
import random
import re
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# 1. Rows: one plain record from each of four formats
# ---------------------------------------------------------------------------------------------

TURN = {"role": str, "content": str | None, "tool_calls": list | None}
FORMATS = {  # the fields of each; a row is of the first whose keys it all has
    "ToolRL": {"instruction": str, "input": str, "output": str},
    "verl": {"prompt": [TURN], "reward_model": {"ground_truth": str | list}},
    "score-only": {"prediction": str, "ground_truth": str | list},
    "chat": {"messages": [TURN]},
}


class RowError(ValueError):
    """Rows that cannot be read; the message names the row or the field. Ends the program."""


class TooLong(ValueError):
    """A row whose prompt does not fit, however much of its dialogue is cut. It is left out."""


def format_of(row):
    """The name of a row's format. Raises RowError. Needs: FORMATS, RowError, check."""
    check(row, {}, "a row")
    for name, shape in FORMATS.items():
        if shape.keys() <= row.keys():
            return name
    raise RowError(f"unknown row format with the keys {sorted(row)}")


def one_format(row, first):
    """RowError if two rows are of two formats. Needs: RowError, format_of."""
    kind, before = format_of(row), format_of(first)
    if kind != before:
        raise RowError(f"{kind} format, but {before} before")


def check(value, shape, name=""):
    """RowError naming the field where a value is not of its shape: a type, a list of one shape,
    or an object with at least these fields. Needs: RowError."""
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", kind)
        raise RowError(f"{name} must be {wanted}, got {type(value).__name__}")
    for key, inner in shape.items() if kind is dict else ():
        check(value.get(key), inner, f"{name}.{key}".lstrip("."))
    for item in value if kind is list and shape else ():
        check(item, shape[0], name + "[]")


def to_record(row):
    """{messages, tools, listed, calls, gold} from a row of any format.

    messages: [{role, content, ...}], None for score-only rows;  tools: list of names;  listed: the
    row's own list of tools for the chat template, None where the system text holds it;
    calls: [{name, parameters}], [] = no call wanted;  gold: its raw text, None if there is none.
    Raises RowError naming the field that is wrong, CallError when the gold does not parse.
    Needs: FORMATS, RowError, check, format_of, gold_calls, listed_tools, tool_names.
    """
    kind = format_of(row)
    check(row, FORMATS[kind])
    if kind == "ToolRL":
        turns, gold = [("system", row["instruction"]), ("user", row["input"])], row["output"]
        messages = [{"role": role, "content": content} for role, content in turns]
    elif kind == "verl":
        messages, gold = row["prompt"], row["reward_model"]["ground_truth"]
    elif kind == "score-only":
        messages, gold = None, row["ground_truth"]
    else:
        if not row["messages"] or row["messages"][-1]["role"] != "assistant":
            raise RowError("messages must end in the assistant's turn, which is the gold")
        *messages, last = row["messages"]
        gold = last.get("tool_calls") or last.get("content") or ""
    system = [m.get("content") or "" for m in messages or [] if m["role"] == "system"]
    tools, listed = tool_names("\n".join(system)), None
    if row.get("tools") is not None:
        tools, listed = listed_tools(row["tools"])
    return {"messages": messages, "tools": tools, "listed": listed, "calls": gold_calls(gold),
            "gold": gold if isinstance(gold, str) else None}


def tool_names(text):
    """Names in a ToolRL system text ("1. Name: get_weather"), in order; they may hold blanks."""
    return re.findall(r"^[ \t]*\d+\.[ \t]*Name:[ \t]*(\S.*?)\s*$", text, re.M)


def listed_tools(tools):
    """(names, the list) of a list of tools, also as JSON text: {name: ...} or OpenAI's {function:
    {name: ...}}; of plain names, which no chat template can show, (names, None).
    Needs: RowError, check."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        check(tools, [])
        names = [t if isinstance(t, str) else t.get("function", t)["name"] for t in tools]
        check(names, [str])
        return names, None if names == tools else tools
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RowError("tools must be a list of names or of objects with a name") from None


def gold_calls(gold):
    """Calls of a gold answer, a text or a list; [] means that no call is wanted. Needs: CallError,
    as_call, parse_calls."""
    if isinstance(gold, list):
        return [as_call(c.get("function", c) if isinstance(c, dict) else c) for c in gold]
    calls = parse_calls(gold)
    if not calls and re.match(r'\s*[\[{].*"name".*"(parameters|arguments)"', gold, re.S):
        raise CallError(f"a call without <tool_call> tags: {gold[:60]!a}")
    return [{"name": c["name"], "parameters": c["parameters"]} for c in calls]  # closed or not


# ---------------------------------------------------------------------------------------------
# 2. Parse
# ---------------------------------------------------------------------------------------------


class CallError(ValueError):
    """A tool-call block holds something else than calls; .calls are the well-formed ones."""
    calls = ()


def parse_calls(text):
    """The calls in an answer, [] if there are none. Raises CallError and nothing else.

    Read is what follows the last </think>, since thoughts mention the tags: every <tool_call> ...
    </tool_call> block, with one JSON object in all (Hermes) or one on each line (ToolRL). A last
    block without its closing tag is read too, its calls marked {"unclosed": True}.
    Needs: CallError, loads, as_call.
    """
    if not isinstance(text, str):
        raise CallError(f"not text: {type(text).__name__}")
    calls, wrong = [], None
    for block in text.rsplit("</think>", 1)[-1].split("<tool_call>")[1:]:
        body, closed, _ = block.partition("</tool_call>")
        try:
            loads(body)
            pieces = [body]  # Hermes
        except CallError:    # ToolRL
            pieces = [line for line in body.split("\n") if line.strip()] or [body]
        for piece in pieces:
            try:
                calls.append(as_call(loads(piece)) | ({} if closed else {"unclosed": True}))
            except CallError as e:
                wrong = wrong or e
    if wrong:
        wrong.calls = calls
        raise wrong
    return calls


def loads(text):
    """The value of JSON text. Needs: CallError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CallError(f"not JSON ({type(e).__name__}): {text[:60]!a}") from None


def as_call(obj):
    """{name, parameters} from a call with "parameters" or "arguments" (an object or JSON text).
    Needs: CallError, loads, shallow."""
    if not isinstance(obj, dict) or not isinstance(obj.get("name"), str):
        raise CallError("not a call: an object with a name is wanted")
    values = obj.get("parameters", obj.get("arguments"))
    values = loads(values) if isinstance(values, str) else values
    if not isinstance(values, dict) or not shallow(values):
        raise CallError(f"no object of parameters in the call of {obj['name'][:60]!a}")
    return {"name": obj["name"], "parameters": values}


def shallow(value, levels=50):
    """At most `levels` levels: equal() recurses, and some hundreds end in a RecursionError."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(shallow(v, levels - 1) for v in inner)


# ---------------------------------------------------------------------------------------------
# 3. Score
# ---------------------------------------------------------------------------------------------


def equal(a, b):
    """JSON equality: 3 equals 3.0, but neither equals "3" or true (in Python, 1 == True)."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def same_calls(calls, gold):
    """Whether two lists of calls are equal as multisets; a call marked unclosed equals none, for
    the mark is one key more.
    Needs: equal."""
    return len(calls) == len(gold) and all(  # > 0: NaN equals nothing, itself included
        sum(equal(g, c) for c in calls) == sum(equal(g, h) for h in gold) > 0 for g in gold)


def has_response(output, gold):
    """A non-empty <response>; plain text where the row's format has no such tag. A thought that
    does not end is no answer."""
    _, thought, answer = output.rpartition("</think>")
    if "<think>" in output and not thought:
        return False
    inside, closed, _ = answer.partition("<response>")[2].partition("</response>")
    tagged = closed or "<response>" in (gold or "")
    return bool(closed and inside.strip()) if tagged else bool(answer.strip())


def toolrl_format(output, gold):
    """1 if the whole output has the kind of the gold text (think; call and/or response), else 0."""
    output, call, response = output.strip(), "<tool_call>" in gold, "<response>" in gold
    once = ["<tool_call>", "</tool_call>"] * call + ["<response>", "</response>"] * response
    pattern = (r"<think>.*?</think>" + r"\n<tool_call>\n.*?\n</tool_call>" * call
               + r"\n<response>.*?</response>" * response)
    return int(all(output.count(tag) == 1 for tag in once)
               and bool(re.fullmatch(pattern, output, re.S)))


def jaccard(a, b):
    """Intersection over union of two multisets; 1 if they are equal."""
    a, b = Counter(list(a)), Counter(list(b))  # list: of a dict the keys, not keys with counts
    return (a & b).total() / (a | b).total() if a != b else 1.


def toolrl_correctness(output, calls):
    """ToolRL's [-3, 3]: 6 (J(names) + sum of matches) / (1 + sum over gold calls (1 + keys)) - 3.
    Each gold call in order uses up the best call of its name, unless that matches in nothing.
    Needs: jaccard."""
    if not calls:
        return 0.
    try:
        body, _ = output.split("<tool_call>")[1].split("</tool_call>", 1)
        found = [json.loads(line) for line in body.strip().split("\n")]
        total = jaccard([c["name"] for c in found], [c["name"] for c in calls])
        found = [(c["name"], c["parameters"], c["parameters"].keys()) for c in found]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return -3.
    for name, gold in [(c["name"], c["parameters"]) for c in calls]:
        worth = [jaccard(keys, gold) + sum(k in keys and params[k] == v for k, v in gold.items())
                 if name == other else 0. for other, params, keys in found]
        if max(worth, default=0.) > 0:
            total += max(worth)
            found.pop(worth.index(max(worth)))
    return 6 * total / (1 + sum(1 + len(c["parameters"]) for c in calls)) - 3


def paper_rubric(output, tools):
    """The published (format, tool): substrings either way, on the first "name" anywhere."""
    found = re.search(r'"name"\s*:\s*"([^"]*)"', output)
    name = found.group(1).lower() if found else ""
    return (int("<tool_call>" in output and bool(found)),
            int(bool(name) and any(name in t.lower() or t.lower() in name for t in tools)))


def score(output, record):
    """All scores of one output against one record of to_record(); pure. An answer with anything
    but calls in its blocks is never exact, even if some are well-formed and count as called.
    Needs: CallError, has_response, paper_rubric, parse_calls, same_calls, toolrl_correctness,
    toolrl_format."""
    gold, wanted = record["gold"], record["calls"]
    try:
        calls, broken = parse_calls(output), False
    except CallError as e:
        calls, broken = e.calls, True
    called = bool(calls)
    fits = same_calls(calls, wanted) if wanted else not called and has_response(output, gold)
    named = Counter(c["name"] for c in calls) == Counter(c["name"] for c in wanted)
    kind = gold if gold is not None else "<tool_call>" if wanted else "<response>"
    form, correct = toolrl_format(output, kind), toolrl_correctness(output, wanted)
    p_form, p_tool = paper_rubric(output, record["tools"])
    return {"exact": int(fits and not broken), "name": int(named and not broken),
            "called": int(called), "false_call": int(called and not wanted),
            "toolrl": form + correct, "toolrl_format": form, "toolrl_correctness": correct,
            "paper_format": p_form, "paper_tool": p_tool,
            "paper_overall": -1 + p_form + 2 * p_tool}


# ---------------------------------------------------------------------------------------------
# 4. Totals, chance, and scoring a file
# ---------------------------------------------------------------------------------------------

MEANS = ("toolrl", "toolrl_correctness", "paper_overall")  # all other scores are 0 or 1 a row


def wilson(hits, n, z=1.96):
    """A share in percent with its 95 % interval, which has a width also at 0 and at n hits."""
    centre, half = hits + z * z / 2, z * (hits * (n - hits) / n + z * z / 4) ** .5
    low, high = (100 * (centre + s * half) / (n + z * z) for s in (-1, 1))
    return {"pct": 100 * hits / n, "hits": hits, "n": n,
            "lo": low if hits else 0., "hi": high if hits < n else 100.}  # exact at both ends


def totals(scores, records):
    """{"all", "needs", "none": {"n": rows, score: total}}: all rows, those that need a tool, those
    that want none; a group without rows is absent. A total is {pct, hits, n, lo, hi} (wilson) or,
    for MEANS, {mean, n}; paper_* count only the rows that list tools. Needs: MEANS, wilson."""
    pairs, out = list(zip(scores, records, strict=True)), {}
    for group, wants in (("all", (True, False)), ("needs", (True,)), ("none", (False,))):
        some = [(s, r) for s, r in pairs if bool(r["calls"]) in wants]
        if not some:
            continue
        out[group] = {"n": len(some)}
        for name in some[0][0]:
            values = [s[name] for s, r in some if r["tools"] or not name.startswith("paper")]
            hits, n = sum(values), len(values)
            if values:
                out[group][name] = {"mean": hits / n, "n": n} if name in MEANS else wilson(hits, n)
    return out


def chance(records, seed=0):
    """{line: totals} of three answers that never read the question, on the rows that list tools.
    Needs: score, totals."""
    def call(name):
        line = json.dumps({"name": name, "parameters": {}})
        return f"<think> . </think>\n<tool_call>\n{line}\n</tool_call>"
    listed, rng = [r for r in records if r["tools"]], random.Random(seed)
    lines = {"first tool, {}": [call(r["tools"][0]) for r in listed],
             "random tool, {}": [call(rng.choice(r["tools"])) for r in listed],
             "a response": ["<think> . </think>\n<response> Yes. </response>"] * len(listed)}
    return {name: totals(list(map(score, outputs, listed)), listed)
            for name, outputs in lines.items() if listed}


def print_table(result, chances):
    """Totals and chance lines, one line each; the last line is the headline. Needs: headline."""
    names = {"all": "all", "needs": "a tool is needed", "none": "no tool is wanted"}
    lines = {names[group]: t for group, t in result.items()}
    lines |= {f"chance: {name}": t["all"] for name, t in chances.items()}
    print(" " * 23 + "     n  exact %        95 %  name %  called %  toolrl  paper_tool %")
    for name, t in lines.items():
        tool = f"{t['paper_tool']['pct']:.1f}" if "paper_tool" in t else "-"
        span = f"{t['exact']['lo']:.1f}-{t['exact']['hi']:.1f}"
        print(f"{name:23s}{t['n']:6d}{t['exact']['pct']:9.1f}{span:>12s}{t['name']['pct']:8.1f}"
              f"{t['called']['pct']:10.1f}{t['toolrl']['mean']:8.2f}{tool:>14s}")
    print("\n" + headline("exact", result["all"]["exact"]))


def headline(name, total):
    """exact n/total (pct%, 95% lo-hi)"""
    return "{} {hits}/{n} ({pct:.1f}%, 95% {lo:.1f}-{hi:.1f})".format(name, **total)


def read_jsonl(name):
    """[(number of the line, its JSON value)] of a file, or of standard input for "-".
    Needs: RowError."""
    data, rows = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes(), []
    try:
        lines = data.decode("utf-8-sig").split("\n")  # not splitlines: JSON may hold U+2028
    except UnicodeDecodeError as e:
        raise RowError(f"row {data.count(10, 0, e.start) + 1} is not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as e:
            raise RowError(f"row {number} is not JSON ({getattr(e, 'msg', e)})") from None
    return rows


def score_rows(rows):
    """([(scores, record)], {number: why its gold does not parse}) of numbered rows, all of one
    format, each with a prediction. Raises RowError naming the row. Needs: CallError, RowError,
    check, one_format, score, to_record."""
    scored, unread = [], {}
    for number, row in rows:
        try:
            one_format(row, rows[0][1])
            check(row, {"prediction": str})
            record = to_record(row)
            scored.append((score(row["prediction"], record), record))
        except CallError as e:
            unread[number] = e
        except RowError as e:
            raise RowError(f"row {number}: {e}") from None
    if not scored:
        why = [f": the gold of row {n} does not parse: {e}" for n, e in unread.items()]
        raise RowError("no row to score" + "".join(why[:1]))
    return scored, unread


def say_unread(unread, n):
    """Of n rows, {number: why} that are left out: how many, which (the first ten), and one why."""
    if unread:
        which = ", ".join(map(str, list(unread)[:10])) + ", ..." * (len(unread) > 10)
        print(f"left out, prompt or gold cannot be used: {len(unread)} of {n}, row {which} "
              f"({next(iter(unread.values()))})\n")


def score_file(name):
    """The job of --score. Needs: chance, print_table, read_jsonl, say_unread, score_rows,
    totals."""
    scored, unread = score_rows(read_jsonl(name))
    say_unread(unread, len(scored) + len(unread))
    scores, records = zip(*scored)
    print_table(totals(scores, records), chance(records))


# ---------------------------------------------------------------------------------------------
# 5. Generate: greedy, batched, patched at the prompt's last token
# ---------------------------------------------------------------------------------------------


def prompt_of(record, tokenizer, style="chat", limit=None):
    """(prompt, tokens cut) of a record. "chat": system and user through the tokenizer's chat
    template, up to the assistant's turn (how ToolRL trains and tests); "paper": the system text
    alone, raw (what the published figures used: it does not hold the question).
    Above `limit` tokens the dialogue loses its beginning, the system text with the tools stays.
    Raises RowError where there is no template or the tools would not be in the prompt, and TooLong
    where cutting cannot help.
    Needs: RowError, TooLong."""
    if style == "chat" and tokenizer.chat_template is None:
        raise RowError("this tokenizer has no chat template (--prompt paper needs none)")
    if not record["messages"]:
        raise RowError("a row without messages has no prompt")
    turns, cut = [t | {"content": t.get("content") or ""} for t in record["messages"]], 0

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def render():
        if style == "paper":
            return "\n".join(t["content"] for t in turns if t["role"] == "system")
        try:
            return tokenizer.apply_chat_template(turns, tools=record.get("listed"), tokenize=False,
                                                 add_generation_prompt=True)
        except Exception as e:  # the template's own words, for instance on a role it does not know
            raise RowError(f"the chat template refuses it: {str(e)[:100]}") from None
    prompt = render()
    for turn in [t for t in turns if limit is not None and t["role"] != "system"]:
        while turn["content"] and (over := len(tokens(prompt)) - limit) > 0:
            ids = tokens(turn["content"])
            turn["content"] = tokenizer.decode(ids[over:]).lstrip("\ufffd")  # half a character
            prompt, cut = render(), cut + len(ids[:over])
    if not prompt.strip():
        raise RowError("its prompt is empty")
    if record.get("tools") and not any(name in prompt for name in record["tools"]):
        raise RowError("its tools are not in the prompt: not in the system text, nor shown by the "
                       "chat template")
    if limit is not None and len(tokens(prompt)) > limit:
        raise TooLong(f"its system text alone has more than {limit} tokens")
    return prompt, cut


@contextlib.contextmanager
def patch(model, layer, edit, positions="last"):
    """While it lasts, the output of block `layer` is edit(h), h of shape (rows, tokens, D): at the
    last prompt token, once, in the first pass ("last": prompts padded on the left); or at every
    token of every pass ("all"). Gone afterwards, also after an exception. (Paper section 4.)
    Needs: blocks."""
    import torch
    from dfc import blocks
    first = True

    def hook(_, __, out):
        nonlocal first
        if positions == "last" and not first:
            return None
        first, h = False, out[0] if isinstance(out, tuple) else out
        h = edit(h) if positions == "all" else torch.cat([h[:, :-1], edit(h[:, -1:])], 1)
        return (h, *out[1:]) if isinstance(out, tuple) else h
    handle = blocks(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def end_tokens(model, tokenizer):
    """Ids that end an answer: the model's own, and the turn's end in common chat templates, which
    a base model's configuration does not name."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    vocabulary = tokenizer.get_vocab()
    common = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")
    return sorted(ends | {vocabulary[t] for t in common if t in vocabulary})


def prefill(model, tokenizer, prompts, batch_tokens=8192, share=True):
    """Batches of prompts of like length, padded on the left: [(rows, ids, mask, cache)], rows their
    places among the prompts, ids and mask (R, T). The cache holds keys and values of every token
    but the last: a patch there does not change them, so they are computed once for all answers
    (at Qwen2.5-3B's size 37 KB a token). share False: no cache, for patches at every token.
    Needs: cut_batches."""
    import torch
    from transformers import DynamicCache
    from dfc import cut_batches
    lists = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    order, out = sorted(range(len(lists)), key=lambda i: len(lists[i])), []
    for rows in cut_batches(order, lists, batch_tokens):
        width, cache = len(lists[rows[-1]]), None
        pads = [[0] * (width - len(lists[i])) for i in rows]
        ids = torch.tensor([pad + lists[i] for pad, i in zip(pads, rows)]).to(model.device)
        mask = torch.tensor([pad + [1] * (width - len(pad)) for pad in pads]).to(model.device)
        if share and width > 1:
            cache = DynamicCache(config=model.config)
            places = mask.cumsum(1) - 1
            with torch.no_grad():
                model.base_model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1],
                                 position_ids=places.clamp(min=0)[:, :-1], past_key_values=cache)
        out.append((rows, ids, mask, cache))
    return out


def with_room(cache, copies, room):
    """A cache with each prompt's keys and values `copies` times and room for so many more tokens.
    The library's own grows by torch.cat, which copies all of it at every token: on a CPU that took
    three quarters of the time of an answer."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        def __init__(self, full):
            super().__init__()
            self.lazy_initialization(full.keys, full.values)
            self.rooms = [torch.nn.functional.pad(t.repeat_interleave(copies, 0), (0, 0, 0, room))
                          for t in (full.keys, full.values)]
            self.keys, self.values = (r[..., :full.keys.shape[-2], :] for r in self.rooms)

        def update(self, keys, values, *_, **__):
            start, end = self.keys.shape[-2], self.keys.shape[-2] + keys.shape[-2]
            for buffer, new in zip(self.rooms, (keys, values)):
                buffer[..., start:end, :] = new
            self.keys, self.values = (r[..., :end, :] for r in self.rooms)
            return self.keys, self.values

    def own(layer):
        if type(layer) is DynamicLayer:
            return Roomy(layer)
        layer = copy.deepcopy(layer)  # of another kind, for instance with a sliding window
        layer.batch_repeat_interleave(copies)
        return layer
    out = copy.copy(cache)
    out.layers = [own(layer) for layer in cache.layers]
    return out


def answer(model, tokenizer, batch, max_new, copies=1):
    """Greedy answers to one batch of prefill(), `copies` of each prompt side by side.
    Needs: end_tokens, with_room."""
    rows, ids, mask, cache = batch
    ids, mask = (t.repeat_interleave(copies, 0) for t in (ids, mask))
    cache = with_room(cache, copies, max_new + 1) if cache is not None else None
    ends = end_tokens(model, tokenizer)
    out = model.generate(  # all spelled out: a model's own file may ask for sampling or penalties
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=max_new,
        use_cache=True, do_sample=False, num_beams=1, repetition_penalty=1., temperature=1.,
        top_p=1., top_k=50, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
    said = [itertools.takewhile(lambda token: token not in ends, row)  # what follows is padding
            for row in out[:, ids.shape[1]:].tolist()]
    return tokenizer.batch_decode([list(row) for row in said], skip_special_tokens=True)


def generate(model, tokenizer, batches, max_new=64, layer=None, vectors_VND=None, add=False,
             positions="last", at_once=32_768):
    """Greedy answers to the prompts of prefill() -> [V][N] texts.

    Each prompt is answered V times, with vectors_VND[v, n] in place of (add: added to) the output
    of block `layer` at its last token (positions: see patch); without vectors once, clean. at_once
    bounds the tokens in flight. Raises ValueError for positions "all" on shared prefixes, which
    such a patch would not reach. Needs: answer, edit_with, patch."""
    if positions == "all" and any(cache is not None for *_, cache in batches):
        raise ValueError('positions "all" needs prefill(..., share=False)')
    versions = 1 if vectors_VND is None else len(vectors_VND)
    out = [[None] * sum(len(rows) for rows, *_ in batches) for _ in range(versions)]
    for batch in batches:
        rows, step = batch[0], max(1, at_once // batch[1].numel())
        for first in range(0, versions, step):
            some = range(first, min(first + step, versions))
            around = contextlib.nullcontext()
            if vectors_VND is not None:
                v_RD = vectors_VND[first:some.stop, rows].transpose(0, 1).flatten(0, 1)
                around = patch(model, layer, edit_with(v_RD, add), positions)
            with around:
                texts = answer(model, tokenizer, batch, max_new, len(some))
            for i, text in enumerate(texts):
                out[some[i % len(some)]][rows[i // len(some)]] = text
    return out


def edit_with(v_RD, add=False):
    """An edit for patch(): vectors, one a row, in place of or added to what is there, (R, T, D)."""
    def edit(h):
        v = v_RD[:, None].to(h)
        return h + v if add else v.expand_as(h)
    return edit


# ---------------------------------------------------------------------------------------------
# 6. Reconstruction, and what it has to beat
# ---------------------------------------------------------------------------------------------


def reconstructions(cc, x_NMD, raw=False, seeds=3):
    """{"A": {version: vectors_ND}, "B": ...}: what takes the place of each model's own activation.

    The pair is encoded together. Into both: the activation itself (a check: nothing may change),
    the reconstruction, its parts (b_dec with one partition's latents; b_dec alone), and the
    activation plus noise as long as the reconstruction's error. Into B also the reconstruction when
    A's vector was its mean or another prompt's: what changes then came in from A. raw: as
    published, mean and scale left out (README, "What the published pipeline gets wrong").
    Needs: NAMES, unscaled."""
    import torch
    from dfc import NAMES
    out = {"A": {}, "B": {}}

    def put(version, v_NMD, into=(0, 1)):
        for m in into:
            out["AB"[m]][version] = v_NMD[:, m]
    with torch.no_grad():
        x_NMD = x_NMD.float()
        xhat_NMD, f_NL = cc(x_NMD)
        put("own activation", x_NMD)
        put("reconstruction", xhat_NMD)
        if raw:
            put("reconstruction, raw", unscaled(cc)(x_NMD)[0])
        for name, part in cc.partitions().items():
            kept_NL = torch.zeros_like(f_NL)
            kept_NL[:, part] = f_NL[:, part]
            writes = [m for m in (0, 1) if cc.dec_mask[part, m].any()]  # none of an empty part
            put(f"{NAMES[name]} alone", cc.decode(kept_NL), writes)
        put("b_dec alone", cc.decode(torch.zeros_like(f_NL)))
        for seed in range(seeds):
            rng = torch.Generator().manual_seed(seed)
            e_NMD = torch.randn(x_NMD.shape, generator=rng).to(x_NMD)
            size = (xhat_NMD - x_NMD).norm(dim=2) / e_NMD.norm(dim=2)
            put(f"noise, seed {seed}", x_NMD + e_NMD * size[..., None])
        a_ND, b_ND = x_NMD.unbind(1)
        a_mean_ND = a_ND.mean(0).expand_as(a_ND)
        for whose, other_ND in (("mean", a_mean_ND), ("another's", a_ND.roll(1, 0))):
            put(f"recon., A {whose}", cc(torch.stack([other_ND, b_ND], 1))[0], [1])
    return out


def unscaled(cc):
    """The same crosscoder as the published evaluation uses it: on raw vectors."""
    cc = copy.deepcopy(cc)
    cc.mean.zero_()
    cc.scale.fill_(1)
    return cc


def paired(after, before, unit=100, times=2000, seed=0):
    """{pp, lo, hi, n}: mean difference of two scores of the same rows, times unit (100: percentage
    points), with a 95 % bootstrap interval over rows (percentile). None without rows."""
    import numpy as np
    difference = unit * (np.asarray(after, float) - np.asarray(before, float))
    if not len(difference):
        return None
    draws = np.random.default_rng(seed).integers(len(difference), size=(times, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return {"pp": float(difference.mean()), "lo": float(low), "hi": float(high),
            "n": len(difference)}


def summary(outputs, records):
    """(scores, result) of {model: {version: texts}}: scores[model][version] one score() a row,
    result[model][version] = {totals, delta}, delta against clean on the rows that need a tool.
    Needs: paired, score, totals."""
    scores, result = {model: {} for model in outputs}, {model: {} for model in outputs}
    compared = {"exact": [i for i, r in enumerate(records) if r["calls"]]}
    compared["paper_tool"] = [i for i in compared["exact"] if records[i]["tools"]]
    for model, versions in outputs.items():
        for version, texts in versions.items():  # "clean" is the first
            rows = [score(t, r) for t, r in zip(texts, records, strict=True)]
            scores[model][version], clean = rows, scores[model].get("clean", rows)
            delta = {name: paired([rows[i][name] for i in some], [clean[i][name] for i in some])
                     for name, some in compared.items()}
            result[model][version] = {"totals": totals(rows, records), "delta": delta}
    return scores, result


def print_versions(result, chances, question=True):
    """One block a model, one line a version, and the chance lines. question False: the prompt does
    not hold the question, and no exact is printed."""
    def line(name, total, delta):
        shown = f"{name:19s}"
        for column, group in (("exact", "needs"), ("called", "needs"), ("false_call", "none"),
                              ("paper_tool", "needs")):
            known = question or column != "exact"
            v, d = total.get(group, {}).get(column), delta.get(column)
            shown += f"{v['pct']:8.1f}" if known and v else f"{'-':>8s}"
            if column in ("exact", "paper_tool"):
                change = f"{d['pp']:+.1f} [{d['lo']:+.1f}, {d['hi']:+.1f}]" if known and d else ""
                shown += f"  {change:21s}"
        print(shown.rstrip())
    for model, versions in result.items():
        n = {group: total["n"] for group, total in versions["clean"]["totals"].items()}
        print(f"\ninto {model}: {n.get('needs', 0)} rows that need a tool; false calls on "
              f"{n.get('none', 0)} that do not\n{'exact %':>27s}  {'change, 95 %':21s}"
              f"called % false %  tool %  change, 95 %")
        for name, v in versions.items():
            line(name, v["totals"], {} if name == "clean" else v["delta"])
    print("\nchance" if chances else "")
    for name, total in chances.items():
        line(name, total, {})


# ---------------------------------------------------------------------------------------------
# 7. The program: evaluate crosscoders
# ---------------------------------------------------------------------------------------------

FIELDS = {"model_a": str, "model_b": str, "tool_texts": str, "layer": int, "recipe": str,
          "preset": str}  # what is read of run.json
MAX_NEW = {"tiny": 64, "paper": 512}  # tokens of an answer; tiny/'s answers end within 50
MAX_PROMPT = 4096  # tokens; what dfc.collect reads of a text


def newest(where="runs"):
    """The run folder whose training ended last. Raises dfc.Problem."""
    from dfc import Problem
    done = [f.parent for f in Path(where).glob("*/model.safetensors")
            if (f.parent / "metrics.json").exists()]
    if not done:
        raise Problem(f"no finished run in {where}: make one with python dfc.py")
    return max(done, key=lambda f: (f / "model.safetensors").stat().st_mtime)


def open_run(name, preset, device):
    """(crosscoder, settings, folder of results) of a run of dfc.py; of a crosscoder alone with the
    models and texts of a preset and the layer its own file names: its results go to
    runs/OWNER--NAME. Raises dfc.Problem."""
    import dfc
    if preset is None and not (Path(name) / "run.json").exists():
        raise dfc.Problem(f"{name} is no run of dfc.py: a crosscoder alone needs --preset as well")
    folder = dfc.resolve(str(name))
    if preset is None:
        if not (folder / "metrics.json").exists():
            raise dfc.Problem(f"{folder} is half a run: finish it with dfc.py --resume")
        return dfc.load(folder, device), read_json(folder / "run.json", FIELDS), folder
    own = read_json(folder / "config.json") | read_json(folder / "hparams.json")
    settings = dfc.PRESETS[preset] | {"preset": preset, "recipe": own.get("recipe", "dfc")}
    settings["layer"] = own.get("layer", settings["layer"])
    return dfc.load(folder, device), settings, Path("runs") / "--".join(Path(name).parts[-2:])


def open_runs(names, device, crosscoder=None, preset=None):
    """open_run() for some runs and a crosscoder alone, or, without either, for the newest run; all
    of one pair of models and texts. Raises dfc.Problem."""
    from dfc import Problem
    if preset and not crosscoder:
        raise Problem("--preset is for --crosscoder: a run knows its own models and texts")
    runs = [open_run(name, None, device) for name in names]
    if crosscoder:
        runs.append(open_run(crosscoder, preset, device))
    runs = runs or [open_run(newest(), None, device)]
    if len({(s["model_a"], s["model_b"], s["tool_texts"]) for _, s, _ in runs}) > 1:
        raise Problem("these runs are of different models or texts: evaluate them apart")
    return runs


def load_both(runs, device):
    """({"A": model, "B": model}, A's tokenizer) of open_runs(): its template serves both models.
    Raises dfc.Problem."""
    import dfc
    settings = runs[0][1]
    (a, tokenizer), (b, other) = (dfc.load_model(settings[m], device)
                                  for m in ("model_a", "model_b"))
    if tokenizer.get_vocab() != other.get_vocab():
        raise dfc.Problem(f"{settings['model_a']} and {settings['model_b']} differ in vocabulary")
    for cc, _, folder in runs:
        for m, model in (("model_a", a), ("model_b", b)):
            width, wanted = cc.b_dec.shape[1], model.config.get_text_config().hidden_size
            if width != wanted:
                raise dfc.Problem(f"{folder} is {width} wide, {settings[m]} {wanted}: they do not "
                                  f"belong together")
    return {"A": a, "B": b}, tokenizer


def room(models, max_new):
    """Tokens that a prompt may have. Raises dfc.Problem where an answer leaves it none."""
    from dfc import Problem
    most = min(m.config.get_text_config().max_position_embeddings for m in models.values())
    if most <= max_new:
        raise Problem(f"--max-new {max_new} leaves no room for a prompt: the models hold {most} "
                      f"tokens")
    return min(most - max_new, MAX_PROMPT)


def read_split(settings, tokenizer, style="chat", most=None, limit=MAX_PROMPT, split="test"):
    """[(row, record, prompt)] of a split, prompts of at most `limit` tokens; what is left out or
    cut is said. Raises dfc.Problem."""
    import dfc
    kept, unread, cut, rows = [], {}, [], dfc.read_rows(settings["tool_texts"])
    rows = [(n, row) for n, row in enumerate(rows, 1) if dfc.split_of(row) == split]
    if most is not None and most < len(rows):
        rows = sorted(random.Random(0).sample(rows, most), key=lambda r: r[0])
    for number, row in rows:
        try:
            one_format(row, rows[0][1])
            record = to_record(row)
            prompt, lost = prompt_of(record, tokenizer, style, limit)
            kept.append((row, record, prompt))
            cut += [lost] if lost else []
        except (CallError, TooLong) as e:
            unread[number] = e
        except RowError as e:
            raise dfc.Problem(f"{settings['tool_texts']}, row {number}: {e}") from None
    say_unread(unread, len(rows))
    if cut:
        print(f"{len(cut)} prompts longer than {limit} tokens: {sum(cut)} tokens cut from the "
              f"left of their dialogues")
    if not kept:
        raise dfc.Problem(f"no {split} row of {settings['tool_texts']} can be scored")
    return kept


def opened(prompt):
    """What the template has begun to say for the assistant: some open <think>."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def pair_vectors(models, tokenizer, prompts, layers):
    """{layer: x_NMD}: both models' vectors at the prompts' last tokens."""
    import dfc
    import torch
    a, b = (dfc.collect(m, tokenizer, prompts, layers) for m in models.values())
    return {layer: torch.stack([a[layer], b[layer]], 1).float() for layer in layers}


def evaluate(args):
    """Evaluate crosscoders of one pair: models loaded once, clean answers made once."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = open_runs(args.runs, device, args.crosscoder, args.preset)
    how = {"prompt": args.prompt, "rows": args.rows,
           "max_new": args.max_new or MAX_NEW[runs[0][1]["preset"]]}
    todo = []
    for run in runs:  # what is evaluated already comes first
        done = read_metrics(run[2]).get("evaluation", {}).get("how")
        if done == how | identity(run):
            report(run[2], args.show)
        else:
            todo.append(run)
    if todo:
        for folder in evaluate_runs(todo, how, device):
            report(folder, args.show)


def identity(run):
    """What an evaluation hangs on besides its flags: models, texts, layer, crosscoder."""
    cc, settings, _ = run
    weights = [zlib.crc32(t.cpu().contiguous().numpy()) for t in cc.state_dict().values()]
    return {k: settings[k] for k in ("model_a", "model_b", "tool_texts", "layer")} | {
        "weights": zlib.crc32(repr((weights, cc.k)).encode())}


def evaluate_runs(runs, how, device):
    """Answers of both models, clean and patched, scored and saved in each run's folder; yields the
    folders as they are done."""
    import torch
    models, tokenizer = load_both(runs, device)
    kept = read_split(runs[0][1], tokenizer, how["prompt"], how["rows"],
                      room(models, how["max_new"]))
    _, records, prompts = zip(*kept)
    x = pair_vectors(models, tokenizer, prompts, sorted({s["layer"] for _, s, _ in runs}))
    batches = {m: prefill(models[m], tokenizer, prompts) for m in models}

    def answers(m, *change):
        texts = generate(models[m], tokenizer, batches[m], how["max_new"], *change)
        return [[opened(p) + t for p, t in zip(prompts, row)] for row in texts]
    clean = {m: {"clean": answers(m)[0]} for m in models}
    for run in runs:
        (cc, settings, folder), began, outputs = run, time.time(), {}
        layer = settings["layer"]
        versions = reconstructions(cc, x[layer].to(device), settings["recipe"] == "paper")
        for m, vectors in versions.items():
            texts = answers(m, layer, torch.stack(list(vectors.values())))
            outputs[m] = clean[m] | dict(zip(vectors, texts))
        keep(folder, kept, outputs, how | identity(run), time.time() - began)
        yield folder


def keep(folder, kept, outputs, how, seconds):
    """Every row to eval.jsonl, then the totals into metrics.json (its key "evaluation")."""
    from dfc import software
    records = [record for _, record, _ in kept]
    scores, result = summary(outputs, records)
    write_rows(folder / "eval.jsonl", kept, outputs, scores)
    add_metrics(folder, "evaluation", {
        "how": how, "models": result, "chance": chance(records), "seconds": seconds,
        "versions": software()})


def write_rows(path, kept, outputs, scores):
    """One line a row: kind (the row's own word, if it has one), prompt, gold, calls; per model and
    version the output and its scores."""
    from dfc import write
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (row, record, prompt) in enumerate(kept):
        said = {m: {v: {"output": texts[i]} | scores[m][v][i] for v, texts in versions.items()}
                for m, versions in outputs.items()}
        lines.append(json.dumps({"kind": row.get("kind"), "prompt": prompt, "gold": record["gold"],
                                 "calls": record["calls"], "outputs": said}) + "\n")
    write(path, lambda f: f.write_text("".join(lines)))


def add_metrics(folder, key, value):
    """Put a result beside what metrics.json of the run holds already."""
    from dfc import write
    metrics = read_metrics(folder) | {key: value}
    write(folder / "metrics.json", lambda f: f.write_text(json.dumps(metrics, indent=1)))


def read_metrics(folder):
    """What metrics.json of a run folder holds, {} if there is none. Raises dfc.Problem."""
    return read_json(folder / "metrics.json")


def read_json(file, shape={}):
    """The object in a JSON file, {} if there is no file. Raises dfc.Problem."""
    from dfc import Problem
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        check(value, shape)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise Problem(f"{file} is damaged ({e}): remove or mend it") from None
    return value


def report(folder, examples):
    """The table of an evaluated run, some rows if asked for, and the headline."""
    e = read_metrics(folder)["evaluation"]
    question = e["how"]["prompt"] == "chat"
    print(f"\n{folder}, layer {e['how']['layer']}, prompt {e['how']['prompt']}")
    print_versions(e["models"], e["chance"], question)
    print("published change of tool %, mean and sd over 48 settings of another pair: into A "
          "+31.1, 9.7\n(clean 19), into B +6.8, 5.0 (clean 0)")
    if examples:
        for _, row in read_jsonl(folder / "eval.jsonl")[:examples]:
            print_row(row)
    name, total = "exact" if question else "called", e["models"]["A"]["reconstruction"]["totals"]
    print("\n" + headline(name, total["all"][name]) + "   A, reconstruction, all rows")


def print_row(row):
    """One row of eval.jsonl, for reading."""
    print(f"\n--- {row['kind'] or 'row'}\n{row['prompt'].strip()[-300:]}\ngold: {row['gold']}")
    for m, versions in row["outputs"].items():
        for v in ("clean", "reconstruction"):
            print(f"{m}, {v}: {versions[v]['output']}   [exact {versions[v]['exact']}]")


def parse_args(argv):
    p = argparse.ArgumentParser(prog="eval_toolcall.py", description=__doc__.split("\n")[0])
    p.print_usage = lambda *_: None  # an error is one line
    p.add_argument("runs", nargs="*", type=Path, help="run folders (default: the newest)")
    p.add_argument("--crosscoder", help="a crosscoder without a run: folder or hub name")
    p.add_argument("--preset", choices=MAX_NEW, help="models and texts for --crosscoder")
    p.add_argument("--prompt", choices=["chat", "paper"], default="chat",
                   help="chat template with the question; paper = system text alone")
    p.add_argument("--rows", type=int, help="at most this many test rows, drawn by chance")
    p.add_argument("--max-new", type=int, help="tokens of an answer (64; 512 for --preset paper)")
    p.add_argument("--show", type=int, default=0, metavar="N", help="print N rows as well")
    p.add_argument("--score", metavar="FILE",
                   help="only score JSONL rows with prediction and gold; - reads standard input")
    args = p.parse_args(argv)
    for flag, value, least in (("--rows", args.rows, 1), ("--max-new", args.max_new, 1),
                               ("--show", args.show, 0)):
        if value is not None and value < least:
            p.error(f"{flag} must be {least} or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.score:
        return score_file(args.score)
    from dfc import cli  # only now: scoring works without torch
    return cli(evaluate, args)


def run(main, argv=None):
    """The exit status of a program: what the user can mend is one line on stderr and status 2."""
    try:
        return main(argv) or 0
    except (RowError, OSError) as e:
        print(f"eval_toolcall.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run(main))
