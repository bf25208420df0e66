"""Score tool calls so that the number means something, and see what a reconstruction keeps of them.

A and its base B answer the test rows: clean, then with their residual vector at the prompt's last
token replaced by the crosscoder's reconstruction (paper section 4, sufficiency), by its parts, and
by what the reconstruction has to beat.

    python eval_toolcall.py                          # the newest run of dfc.py: a minute
    python eval_toolcall.py runs/a runs/b            # several
    python eval_toolcall.py --score answers.jsonl    # your own rows {output, prediction}: seconds

Scores, each a pure function of text:

    exact          the headline: the multiset of calls equals the gold one (names, keys, values;
                   3 is 3.0 and not "3"). Where no call is wanted: a non-empty response, no call
    name           the multiset of names equals the gold one. Of exact and name all blocks must be
                   closed and hold calls alone
    called         any well-formed call at all
    false_call     called, where no call is wanted
    toolrl         ToolRL's reward (arXiv 2504.13958): format {0, 1} + correctness [-3, 3]
    paper_*        the rubric of arXiv 2606.26474: format = a <tool_call> and a "name" anywhere;
                   tool = the first "name" equals, contains or is contained in any tool that the
                   row's instruction lists ("1. Name: get_weather");
                   overall = -1 + format + 2 tool. Calling tool 1 with {} scores 100 %: hence the
                   chance lines, three answers that never read the question.

An example and its verdict:

    gold        <think> t </think>
                <tool_call>
                {"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}
                </tool_call>
    prediction  the same with "days": 5
    verdict     exact 0   name 1   called 1   paper_overall 2
                toolrl 1 + 1.5: the format, and 6 * 3 / 4 - 3, as name, keys and city earn 3 of
                the 4 points of name, keys, city and days

Shapes: N prompts, M = 2 models (A, B), D width, V versions of an answer (what is patched in),
B prompts of a batch, R answers in flight (B prompts in some versions), T tokens.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

from dfc import (
    TOOL_ROW,
    Crosscoder,
    Settings,
    answer_prefix,
    atomically,
    batches_by_length,
    cli,
    collect_both,
    hooked,
    leave,
    load,
    load_model,
    longest_text,
    prompt_of,
    read_metrics,
    read_rows,
    split_of,
    token_ids,
)


# ---- 1. Parse and score --------------------------------------------------------------------------
class Parsed(NamedTuple):
    """The calls of an answer."""

    calls: list  # of (name, its parameters as canonical JSON)
    tidy: bool   # every block is closed and holds calls alone: exact and name ask for it

    @property
    def names(self):
        return [name for name, _ in self.calls]


def after_thought(text):
    """What an answer says; nothing where its thought does not end. The first </think> ends it: a
    later one may stand in a value."""
    thought, end_tag, answer = text.partition("</think>")
    if end_tag:
        return answer
    return "" if "<think>" in thought else text


def parse_calls(text):
    """The calls of an answer; raises nothing.

    Only what follows the thought is read, for thoughts mention the tags. A <tool_call> block holds
    JSON objects, one a line (ToolRL), or a single one with "arguments" (Hermes)."""
    calls = []
    tidy = True
    for block in after_thought(text).split("<tool_call>")[1:]:
        body, end_tag, _ = block.partition("</tool_call>")
        found = parse_block(body)
        calls += found.calls
        tidy = tidy and found.tidy and end_tag != ""
    return Parsed(calls, tidy)


def parse_block(body):
    """The calls between two tags; a line that is no call is skipped, and the rest still read."""
    read = json.JSONDecoder(parse_float=as_number).raw_decode
    calls = []
    tidy = body.strip() != ""
    while body.strip():
        body = body.strip()
        try:
            call, end = read(body)
            if not isinstance(call["name"], str):
                raise TypeError("a name is a text")
            calls.append((call["name"], parameters_of(call)))
            body = body[end:]
        except (ValueError, LookupError, TypeError, RecursionError):
            tidy = False
            body = body.partition("\n")[2]
    return Parsed(calls, tidy)


def as_number(text):
    """A decimal of JSON: 3.0 is 3, as in ToolRL's reward."""
    value = float(text)
    return int(value) if value.is_integer() else value


def parameters_of(call):
    """A call's parameters as canonical JSON: equal texts are equal values. In OpenAI's format they
    may be JSON in a text, and "" or null where there are none."""
    values = call["parameters"] if "parameters" in call else call["arguments"]
    if values is None or values == "":
        values = {}
    if isinstance(values, str):
        values = json.loads(values, parse_float=as_number)
    if not isinstance(values, dict):
        raise TypeError("parameters have names")
    return json.dumps(values, sort_keys=True)


def needs_tool(row):
    """Does the gold answer call a tool?"""
    return "<tool_call>" in after_thought(row["output"])


def responds(output, gold):
    """A non-empty <response>; plain text where the gold has no such tag."""
    answer = after_thought(output)
    _, tag, rest = answer.partition("<response>")
    inside, end_tag, _ = rest.partition("</response>")
    if tag and end_tag:
        return inside.strip() != ""
    if "<response>" in gold:
        return False
    return answer.strip() != ""


def toolrl_format(output, gold):
    """1 if the whole output has the gold's kind (a thought, a call and/or a response), else 0."""
    parts = {"tool_call": r"\n<tool_call>\n.*?\n</tool_call>",
             "response": r"\n<response>.*?</response>"}
    pattern = r"<think>.*?</think>"
    once = True
    for tag, part in parts.items():
        if f"<{tag}>" in gold:
            pattern += part
            once = once and output.count(f"<{tag}>") == output.count(f"</{tag}>") == 1
    return int(once and bool(re.fullmatch(pattern, output.strip(), re.DOTALL)))


def toolrl_correctness(output, gold):
    """ToolRL's reward of the calls, as its code has it:

        the gold has no call                           0
        no </tool_call> anywhere in the output        -3
        a line of the first block is no call          -3
        a call with a gold name lacks "parameters"    -3
        else     6 (J(names) + sum of matches) / (1 + sum over gold calls (1 + keys)) - 3

    J is the Jaccard index; each gold call in turn takes the best call that is left. Of several
    blocks (Hermes) the first alone is read."""
    if "<tool_call>" not in gold:
        return 0.
    if "</tool_call>" not in output:
        return -3.
    try:
        found = first_block(output)
        wanted = first_block(gold)
        if found == wanted:
            return 3.

        found_names = [call["name"] for call in found]
        wanted_names = [call["name"] for call in wanted]
        total = jaccard(found_names, wanted_names)
        highest = 1  # what the names can give; each gold call adds to it
        for gold_call in wanted:
            matches = [match(call, gold_call) for call in found]
            best = max(matches, default=0.)
            if best > 0:  # what is taken serves no other gold call
                found.pop(matches.index(best))
            total += best
            highest += 1 + len(gold_call["parameters"])
        return 6 * total / highest - 3
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return -3.


def first_block(text):
    """The JSON of each line of the first <tool_call>, as ToolRL reads it. Raises much."""
    block = text.split("<tool_call>")[1].split("</tool_call>")[0]
    return [json.loads(line) for line in block.strip().split("\n")]


def match(call, gold_call):
    """What a call is worth beside a gold one: 0 for another name, else the Jaccard index of their
    keys and 1 for every equal value."""
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


def tool_names(text):
    """Names in a ToolRL system text ("1. Name: get_weather"), in order; they may hold blanks."""
    return re.findall(r"^[ \t]*\d+\.[ \t]*Name:[ \t]*(\S.*?)\s*$", text, re.MULTILINE)


def listed_tools(row):
    """The names of the tools that a row's instruction lists; none where it has no instruction."""
    return tool_names(str(row.get("instruction") or ""))


def score(output, row):
    """{score: value} of one answer to a tool row; pure."""
    gold = row["output"]

    # of a whole transcript the last answer
    output = output.split("<|im_start|>assistant")[-1].split("<|im_end|>")[0]

    # ours
    said = parse_calls(output)
    wanted = parse_calls(gold)
    names_fit = Counter(said.names) == Counter(wanted.names)
    calls_fit = Counter(said.calls) == Counter(wanted.calls)
    if not wanted.calls:
        calls_fit = calls_fit and responds(output, gold)

    # ToolRL's reward
    form = toolrl_format(output, gold)
    correct = toolrl_correctness(output, gold)

    # the paper's rubric
    tools = [tool.lower() for tool in listed_tools(row)]
    named = re.findall(r'"name"\s*:\s*"([^"]*)"', output.lower())
    first = named[0] if named else ""
    paper_format = int("<tool_call>" in output and bool(named))
    paper_tool = int(first != "" and any(first in tool or tool in first for tool in tools))

    return {
        "exact": int(said.tidy and calls_fit),
        "name": int(said.tidy and names_fit),
        "called": int(bool(said.calls)),
        "false_call": int(bool(said.calls) and not wanted.calls),
        "toolrl": form + correct,
        "toolrl_format": form,
        "toolrl_correctness": correct,
        "paper_format": paper_format,
        "paper_tool": paper_tool,
        "paper_overall": -1 + paper_format + 2 * paper_tool,
    }


# ---- 2. Totals, chance, intervals ----------------------------------------------------------------
REWARDS = ("toolrl", "toolrl_correctness", "paper_overall")  # all other scores are 0 or 1


def wilson(hits, n, z=1.96):
    """{pct, lo, hi}: a share in percent with its 95 % interval, which has a width also at 0 and at
    n hits."""
    centre = hits + z * z / 2
    half = z * (hits * (n - hits) / n + z * z / 4) ** .5
    low = 100 * (centre - half) / (n + z * z)
    high = 100 * (centre + half) / (n + z * z)
    return {"pct": 100 * hits / n, "lo": low if hits else 0., "hi": high if hits < n else 100.}


def paired(after, before, unit=100, times=2000, seed=0):
    """{pp, lo, hi}: mean difference of two scores of the same rows, times unit (100: percentage
    points), with a 95 % bootstrap interval over rows. It has no width where all change alike, which
    is no certainty."""
    difference = unit * (np.asarray(after, float) - np.asarray(before, float))
    draws = np.random.default_rng(seed).integers(len(difference), size=(times, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return {"pp": float(difference.mean()), "lo": float(low), "hi": float(high)}


def totals(scores, rows):
    """{"all", "needs", "none": {"n", score: {pct, lo, hi} or, for rewards, {mean}}} over all rows,
    those that need a tool and those that do not; a group without rows is absent."""
    groups = {"all": scores, "needs": [], "none": []}
    for s, row in zip(scores, rows):
        groups["needs" if needs_tool(row) else "none"].append(s)

    out = {}
    for group, members in groups.items():
        if not members:
            continue
        out[group] = {"n": len(members)}
        for name in members[0]:
            total = sum(s[name] for s in members)
            mean = {"mean": total / len(members)}
            out[group][name] = mean if name in REWARDS else wilson(total, len(members))
    return out


def chance(rows, seed=0):
    """{line: totals} of three answers that never read the question, on the rows that list tools."""
    rows = [row for row in rows if listed_tools(row)]
    if not rows:
        return {}
    rng = random.Random(seed)
    lines = {"first tool with {}": [], "random tool with {}": [], "always a response": []}
    for row in rows:
        names = listed_tools(row)
        lines["first tool with {}"].append(empty_call(names[0]))
        lines["random tool with {}"].append(empty_call(rng.choice(names)))
        lines["always a response"].append("<think> . </think>\n<response> Yes. </response>")

    out = {}
    for name, texts in lines.items():
        scores = [score(text, row) for text, row in zip(texts, rows)]
        out[f"chance: {name}"] = totals(scores, rows)
    return out


def empty_call(name):
    """An answer that calls a tool without parameters."""
    line = json.dumps({"name": name, "parameters": {}})
    return f"<think> . </think>\n<tool_call>\n{line}\n</tool_call>"


# ---- 3. Generate: greedy, batched, patched -------------------------------------------------------
@torch.no_grad()
def generate(model, tokenizer, prompts, max_new, layer=0, keep_V=(1.,), v_VND=None, at_once=40_000):
    """Greedy answers, each prompt in V versions -> [V][N] texts. (Paper section 4.)

    In version v the output h of block `layer` at prompt n's last token becomes keep_V[v] h +
    v_VND[v, n], once: keep 1 adds, keep 0 replaces, the default changes nothing and is "clean".

        tokens 1 ... T-1      the last token T           the answer
        read once, kept in    read once for a version,   greedy, from the version's
        the cache             with its patch             own copy of the cache

    at_once bounds the tokens in flight."""
    ids = token_ids(tokenizer, prompts)
    keep_V = torch.tensor(keep_V, dtype=model.dtype, device=model.device)
    if v_VND is None:
        v_VND = torch.zeros(len(keep_V), len(prompts), 1)
    v_VND = v_VND.to(keep_V)

    # 1. which tokens end an answer
    ends = end_tokens(model, tokenizer)

    answers = [[None] * len(prompts) for _ in keep_V]
    bar = tqdm(total=len(keep_V) * len(prompts), desc="answers", leave=False, disable=None)
    for batch in batches_by_length(ids, at_once // 4):  # leaves room for some versions of a batch
        # 2. pad on the left, so that all prompts end at the same place
        ids_BT, mask_BT = pad_left([ids[n] for n in batch], model.device)

        # 3. one prefill for all versions, of everything but the last token
        cache = prefill(model, ids_BT[:, :-1], mask_BT[:, :-1])

        # 4. answer, as many versions together as fit
        fit = max(1, at_once // (len(batch) * (ids_BT.shape[1] + max_new)))
        for versions in torch.arange(len(keep_V)).split(fit):
            v_VBD = v_VND[versions][:, batch]
            said = answer_versions(
                model, ids_BT, mask_BT, cache, layer, keep_V[versions], v_VBD, max_new, ends)

            for v, version in zip(versions.tolist(), said):
                for n, tokens in zip(batch, version):
                    answers[v][n] = answer_prefix(prompts[n]) + tokenizer.decode(tokens)
                    bar.update()
    bar.close()
    return answers


def answer_versions(model, ids_BT, mask_BT, cache, layer, keep_V, v_VBD, max_new, ends):
    """The answers of a batch of prompts in some versions, [V][B] token lists. cache: of all tokens
    but the last."""
    n_versions = len(v_VBD)
    n_prompts = len(ids_BT)

    # all answers in one batch; of 3 versions of 2 prompts, prompt_R is 0 1 0 1 0 1
    prompt_R = torch.arange(n_prompts, device=model.device).repeat(n_versions)
    keep_R11 = keep_V.repeat_interleave(n_prompts)[:, None, None]
    v_R1D = v_VBD.flatten(0, 1)[:, None]

    def patch(h_R1D):
        return keep_R11 * h_R1D + v_R1D

    # reorder_cache() works in place, by index_select: it can repeat rows
    own_cache = copy.deepcopy(cache)
    own_cache.reorder_cache(prompt_R)
    said = decode_greedily(
        model, ids_BT[prompt_R, -1:], mask_BT[prompt_R], own_cache, layer, patch, max_new, ends)
    return [said[i:i + n_prompts] for i in range(0, len(said), n_prompts)]


def end_tokens(model, tokenizer):
    """The ids of all tokens that end an answer: those that the model's and the tokenizer's files
    name, and the usual ends of a turn, for a base's own file knows only the end of a text."""
    known = tokenizer.get_vocab()
    usual = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")
    ends = {known[token] for token in usual if token in known}
    for config in (tokenizer, model.config.get_text_config(), model.generation_config):
        own = getattr(config, "eos_token_id", None)
        if own is not None:
            ends.update(own if isinstance(own, list) else [own])
    return torch.tensor(sorted(ends), device=model.device)


def pad_left(ids, device):
    """Token lists -> ids_BT and mask_BT (1: a token, 0: padding), padded on the left."""
    ids_BT = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(ids):
        ids_BT[i, -len(row):] = torch.tensor(row)
        mask_BT[i, -len(row):] = 1
    return ids_BT.to(device), mask_BT.to(device)


def prefill(model, ids_BT, mask_BT):
    """The cache of keys and values after these tokens; empty where there are none. The base model
    is the model without its vocabulary head: no logits are wanted."""
    cache = DynamicCache(config=model.config)
    if ids_BT.shape[1] > 0:
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        model.base_model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT,
                         **{cache_argument(model): cache})
    return cache


def decode_greedily(model, next_R1, mask_RT, cache, layer, patch, max_new, ends):
    """Token lists, each without the token that ended it. next_R1 are the prompts' last tokens: at
    these alone, in the first pass, patch() edits the output of block `layer`. mask_RT covers them
    and what is in the cache. (model.generate would follow the sampling, penalties and least lengths
    that a model's file may ask for.)"""
    keep_cache = {cache_argument(model): cache, "use_cache": True}
    answers = [[] for _ in next_R1]
    active = list(range(len(answers)))
    for step in range(max_new):
        first = step == 0
        with hooked(model, layer, patch) if first else contextlib.nullcontext():
            out = model(input_ids=next_R1, attention_mask=mask_RT,
                        position_ids=mask_RT.sum(1, keepdim=True) - 1, **keep_cache)
        next_R = out.logits[:, -1].argmax(-1)

        # an answer that ends leaves the batch
        going = torch.isin(next_R, ends, invert=True).nonzero()[:, 0]
        if len(going) < len(active):
            cache.reorder_cache(going)
            mask_RT = mask_RT[going]
            next_R = next_R[going]
            active = [active[row] for row in going.tolist()]
        if not active:
            break

        for i, token in zip(active, next_R.tolist()):
            answers[i].append(token)
        next_R1 = next_R[:, None]
        mask_RT = F.pad(mask_RT, (0, 1), value=1)
    return answers


# ---- 4. Reconstruction, and what it has to beat --------------------------------------------------
@torch.no_grad()
def reconstructions(cc, x_NMD, raw=False):
    """{"A": {version: what takes the place of its own activation, (N, D)}, "B": ...}.

    The pair is encoded together. Into both models: the activation itself (nothing may change), the
    reconstruction, its parts (one partition's latents; no latent, "mean only": mean and b_dec),
    the activation with noise of the same norm as the reconstruction's error. raw: also as
    published, without mean and scale ([c] in dfc.py). Into B also what beside_another_a() gives."""
    x_NMD = x_NMD.float()
    xhat_NMD, f_NL = cc(x_NMD)
    both = {"own activation": x_NMD, "reconstruction": xhat_NMD}

    # its parts
    for name, part in cc.parts().items():
        only_NL = torch.zeros_like(f_NL)
        only_NL[:, part] = f_NL[:, part]
        both[f"{name} alone"] = cc.decode(only_NL)
    both["mean only"] = cc.decode(torch.zeros_like(f_NL))

    # noise of the same norm as the error
    error_NM = (xhat_NMD - x_NMD).norm(dim=2)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        noise_NMD = torch.randn(x_NMD.shape, generator=rng).to(x_NMD)
        size_NM = error_NM / noise_NMD.norm(dim=2)
        both[f"noise, seed {seed}"] = x_NMD + noise_NMD * size_NM[..., None]

    if raw:
        published = copy.deepcopy(cc)
        published.mean.zero_()
        published.scale.fill_(1)
        both["reconstruction, raw"] = published(x_NMD)[0]

    into_a = {name: v_NMD[:, 0] for name, v_NMD in both.items()}
    into_b = {name: v_NMD[:, 1] for name, v_NMD in both.items()}
    return {"A": into_a, "B": {**into_b, **beside_another_a(cc, x_NMD)}}


def beside_another_a(cc, x_NMD):
    """B's reconstruction when A's vector is not the prompt's own, but the mean or another prompt's
    (the row's before, which may need a tool as well). Latents are encoded from A and B together: if
    B calls tools with its reconstruction and not with these, the calls came in from A's vector."""
    a_ND, b_ND = x_NMD.unbind(1)
    others = {"mean A": a_ND.mean(0).expand_as(a_ND), "another's A": a_ND.roll(1, 0)}
    out = {}
    for name, other_ND in others.items():
        xhat_NMD, _ = cc(torch.stack([other_ND, b_ND], 1))
        out[f"reconstruction, {name}"] = xhat_NMD[:, 1]
    return out


# ---- 5. Opening a run ----------------------------------------------------------------------------
@dataclass
class Run:
    """A trained crosscoder with the pair of models it belongs to."""

    settings: Settings  # what it was trained with
    cc: Crosscoder      # frozen
    models: dict        # {"A": the RL-tuned model, "B": its base}
    tokenizer: object   # A's, which serves both
    folder: Path        # of dfc.py; results go there

    @property
    def longest_prompt(self):
        """In tokens: what the models' positions leave beside an answer."""
        return longest_text(*self.models.values()) - self.settings.max_new


def open_run(folder=None, get=load_model):
    """The run in a folder of dfc.py, by default the newest in runs/. get: load_model, or a cached
    one, where several runs share their models. Raises ValueError."""
    if not folder:
        done = Path("runs").glob("*/model.safetensors")
        newest = max(done, key=lambda file: file.stat().st_ctime, default=None)
        if not newest:
            raise ValueError("no finished run is named, nor in runs/: make one with python dfc.py")
        folder = newest.parent
    config = read_metrics(folder)["config"]
    settings = Settings(**{f.name: config[f.name] for f in fields(Settings)})

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cc = load(folder, device)
    model_a, tokenizer = get(settings.model_a, device)
    model_b, _ = get(settings.model_b, device)
    return Run(settings, cc, {"A": model_a, "B": model_b}, tokenizer, Path(folder))


def is_readable(row):
    """Is the gold answer exact against itself? It is not where a tag stands in a value, say."""
    return score(row["output"], row)["exact"] == 1


def describe(rows):
    """How many rows need a tool, in words."""
    return f"{sum(map(needs_tool, rows))} of {len(rows)} need a tool"


def load_prompts(tool_file, tokenizer, split, longest, most=None, template="chat"):
    """(rows, prompts) of a split, at most `most` of each kind (the row's "kind" if it has one, else
    whether it needs a tool). A prompt of more than `longest` tokens, or a row whose gold is not
    readable, is left out and counted. template "paper": the system text alone, as published. Raises
    ValueError where no row needs a tool."""
    rows = []
    prompts = []
    seen = Counter()
    left_out = 0
    for row in read_rows(tool_file, TOOL_ROW):
        kind = str(row.get("kind", needs_tool(row)))
        if split_of(row) != split or (most is not None and seen[kind] >= most):
            continue
        prompt = row["instruction"] if template == "paper" else prompt_of(row, tokenizer)
        if len(token_ids(tokenizer, prompt)) > longest or not is_readable(row):
            left_out += 1
            continue
        rows.append(row)
        prompts.append(prompt)
        seen[kind] += 1

    if left_out:
        print(f"{left_out} {split} rows left out: longer than the model's positions, or gold "
              "unreadable")
    check_call_format(rows)
    if not any(map(needs_tool, rows)):
        raise ValueError(f"no {split} row of {tool_file} that can be used needs a tool")
    return rows, prompts


# ---- 6. The program ------------------------------------------------------------------------------
def print_totals(lines):
    """{line: totals [with "change": {pp, lo, hi}]} as a table, both kinds of rows apart."""
    print(f"{'':28s}rows that need a tool:{'':31s}rows that do not:")
    print(f"{'':28s}exact %  change, 95 %{'':12s}called %  toolrl  paper_tool exact %  "
          "false calls %")
    for name, total in lines.items():
        left = right = change = ""
        if "change" in total:
            change = "{pp:+.1f} [{lo:+.1f}, {hi:+.1f}]".format(**total["change"])
        if "needs" in total:
            needs = total["needs"]
            left = (f"{needs['exact']['pct']:7.1f}  {change:23s}{needs['called']['pct']:10.1f}"
                    f"{needs['toolrl']['mean']:8.2f}{needs['paper_tool']['pct']:9.1f}")
        if "none" in total:
            none = total["none"]
            right = f"{none['exact']['pct']:11.1f}{none['false_call']['pct']:15.1f}"
        print(f"{name:28s}{left:59s}{right}".rstrip())


def evaluate(run, most_rows, template):
    """Answer, score, save and print one run's versions."""
    began = time.time()
    s = run.settings
    rows, prompts = load_prompts(
        s.tool_texts, run.tokenizer, "test", run.longest_prompt, most_rows, template)
    x_NMD = collect_both(run.models, run.tokenizer, prompts, s.layer)
    patches = reconstructions(run.cc, x_NMD, raw=s.recipe == "paper")
    chances = chance(rows)

    # answers of both models: clean, then with each patch in place of the activation
    texts = {}
    result = {}
    for m, versions in patches.items():
        v_VND = torch.stack([torch.zeros_like(x_NMD[:, 0]), *versions.values()])
        keep_V = [1.] + [0.] * len(versions)
        said = generate(run.models[m], run.tokenizer, prompts, s.max_new, s.layer, keep_V, v_VND)
        texts[m] = dict(zip(["clean", *versions], said))
        result[m] = compare_with_clean(texts[m], rows)

        print(f"\n{run.folder}, layer {s.layer}, into {m}; test rows: {describe(rows)}")
        shown = result[m] | chances if m == "A" else result[m]
        print_totals(shown)

    # every answer, and the totals
    lines = []
    for i, row in enumerate(rows):
        answers = {}
        for m, versions in texts.items():
            answers[m] = {name: said[i] for name, said in versions.items()}
        lines.append({"prompt": prompts[i], "gold": row["output"], "answers": answers})
    evaluation = {"models": result, "chance": chances, "rows": len(rows), "template": template,
                  "seconds": time.time() - began}
    save_result(run.folder, "evaluation", evaluation, lines, "eval.jsonl")
    print(headline("A, reconstruction", result["A"]["reconstruction"]["all"]))


def compare_with_clean(texts, rows):
    """{version: texts}, "clean" the first -> {version: totals}, of the others with "change": of
    exact calls on the rows that need a tool."""
    out = {}
    exact = {}
    for version, said in texts.items():
        scores = [score(text, row) for text, row in zip(said, rows)]
        out[version] = totals(scores, rows)
        exact[version] = [s["exact"] for s, row in zip(scores, rows) if needs_tool(row)]
        if version != "clean":
            out[version]["change"] = paired(exact[version], exact["clean"])
    return out


def headline(name, total):
    """A closing line: exact calls on all rows, with their interval and n."""
    share = "{pct:.1f} % (95 % {lo:.1f} to {hi:.1f})".format(**total["exact"])
    return f"{name}: exact on {share} of all {total['n']} rows"


def score_file(name):
    """The job of --score: rows {output, prediction[, instruction]} of a .jsonl file."""
    all_rows = list(read_rows(name, ("output", "prediction")))
    rows = [row for row in all_rows if is_readable(row)]
    if not rows:
        raise ValueError(f"{name} holds no row whose gold answer is exact against itself")
    check_call_format(rows)
    print(f"{len(all_rows) - len(rows)} of {len(all_rows)} rows left out: gold unreadable")
    print(describe(rows))
    listing = sum(bool(listed_tools(row)) for row in rows)
    if listing < len(rows):
        print(f"{listing} rows have an instruction that lists tools: of these alone are the chance "
              "lines, and on the others paper_tool is 0")

    result = totals([score(row["prediction"], row) for row in rows], rows)
    print_totals({name: result, **chance(rows)})
    print(headline(name, result["all"]))


def save_result(folder, key, value, lines, file):
    """Put a result into metrics.json, in place of an earlier one, and the rows behind it into a
    file."""
    metrics = read_metrics(folder)
    metrics[key] = value
    with atomically(folder / file) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with atomically(folder / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=1))


def at_least_one(text):
    """An argument that counts something."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    p.add_argument("--template", choices=["chat", "paper"], default="chat", help="prompts: "
                   "chat template with the question (default); as published the system text alone")
    p.add_argument("--rows", type=at_least_one, help="test rows of each kind, which is "
                   "a row's \"kind\" or whether it needs a tool (default: all)")
    p.add_argument("--score", metavar="FILE", help="score your own answers, nothing else: a .jsonl "
                   "of rows {output: the right answer, prediction: yours[, instruction]}")
    args = p.parse_args(argv)

    if args.score is not None:
        return score_file(args.score)
    get = functools.cache(load_model)  # runs of one pair share its models
    for name in args.runs or [None]:
        evaluate(open_run(name, get), args.rows, args.template)


# ---- 7. Plumbing ---------------------------------------------------------------------------------
def cache_argument(model):
    """What this version of transformers calls the cache: it was renamed within version 5. Raises
    ValueError for a model that keeps none."""
    for name in ("cache", "past_key_values"):
        if name in inspect.signature(model.forward).parameters:
            return name
    raise ValueError(f"{type(model).__name__} keeps no cache of what it has read")


def check_call_format(rows):
    """Raises ValueError where no gold answer has a call that we can see, but some look like one."""
    call_like = r'\[TOOL_CALLS\]|<\|python_tag\|>|"name"\s*:'
    other = [row["output"] for row in rows if re.search(call_like, after_thought(row["output"]))]
    if other and not any(map(needs_tool, rows)):
        raise ValueError(f"no gold answer calls a tool between <tool_call> tags, but: {other[0]}")


if __name__ == "__main__":
    leave(cli(main))
