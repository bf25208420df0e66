"""Score tool calls, and see how many survive when a crosscoder reconstructs a model's state.

A and its base B answer the test prompts. Then they answer again, and their residual vector at the
prompt's last token is replaced: by the crosscoder's reconstruction of it (paper section 4), by
parts of that reconstruction, and by controls.

    python eval_toolcall.py                          # the newest run of dfc.py: a minute
    python eval_toolcall.py runs/a runs/b            # several runs
    python eval_toolcall.py --score answers.jsonl    # your own rows {output, prediction}: seconds

Scores, each a pure function of text:

    exact         the calls are the right ones: names, keys and values, in any order; 3 is 3.0 and
                  not "3"; other text does not count. Where no call is wanted: a response, no call
    called        any object in a <tool_call> that parses as a call
    false_call    called, where no call is wanted
    paper_format  the paper's rubric: a <tool_call> and a "name" anywhere
    paper_tool    the paper's rubric: the first "name" equals, contains or is contained in the name
                  of a tool that the row lists ("1. Name: get_weather")

paper_tool never looks at the right answer: any listed tool will do, with any values, even where no
call is wanted. Calling the first tool with {} scores 100 %. Hence the chance lines, three answers
that never read the question. Suffixes are shapes: N prompts, B of a batch, V versions of their
last vectors, M models (A, B), D residual width, L latents, T tokens. An example:

    right answer    <think> t </think>
                    <tool_call>
                    {"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}
                    </tool_call>
    prediction      the same with "days": 5
    scores          exact 0, called 1, paper_format 1, paper_tool 1
"""

import argparse
import copy
import functools
import inspect
import json
import random
import re
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
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
    collect,
    hooked,
    load,
    load_model,
    prompt_of,
    read_metrics,
    read_rows,
    token_ids,
)


# ---- 1. Generate: batched, patched ---------------------------------------------------------------
@torch.no_grad()
def generate(model, tokenizer, prompts, max_new, layer=0, v_VND=None, replace=False,
             seed=None, most_tokens=16_384):
    """Answers to N prompts, V times over; each time another vector is added to the residual vector
    at a prompt's last token, or put in its place -> [V][N] texts (paper section 4).

    In version v, v_VND[v, n] is added to the output of block `layer` at the last token of prompt n,
    or replaces it, once, before the answer begins. Without v_VND nothing is changed.

        1. read tokens 1 ... T-1 of the prompt once, and keep them in the cache
        2. in each version, read token T with its vector added or put in place
        3. write the answer token by token, from the version's copy of the cache

    seed: None for greedy answers, a number for samples at temperature 1. Versions share the noise
    of the first token. Answers of max_new tokens end in " [cut]". most_tokens bounds a batch.
    Raises ValueError if logits are not finite."""
    ids = token_ids(tokenizer, prompts)
    ends = end_tokens(model, tokenizer)
    if v_VND is None:
        v_VND = torch.zeros(1, len(ids), 1)  # 0 is added to every coordinate

    answers = [[None] * len(ids) for _ in v_VND]
    bar = tqdm(total=len(v_VND) * len(ids), desc="answers", leave=False, disable=None)
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    for batch in batches_by_length(ids, most_tokens):
        # padded on the left, all prompts end at the same place
        rows = [torch.tensor(ids[n], device=model.device) for n in batch]
        ids_BT = pad(rows)
        mask_BT = pad([torch.ones_like(row) for row in rows])

        # 1. all but the last token, once for all versions
        cache = DynamicCache(config=model.config)
        if ids_BT.shape[1] > 1:
            read_BT = mask_BT[:, :-1]
            model.base_model(  # without its vocabulary head
                input_ids=ids_BT[:, :-1], attention_mask=read_BT,
                position_ids=(read_BT.cumsum(1) - 1).clamp(min=0), **{cache_argument(model): cache})

        # 2. and 3. answer in each version
        for v, v_ND in enumerate(v_VND):
            noise = None
            if seed is not None:
                noise = torch.Generator(model.device).manual_seed(seed + batch[0])
            said = decode(model, ids_BT[:, -1:], mask_BT, copy.deepcopy(cache), layer,
                          v_ND[batch], replace, max_new, ends, noise)
            for n, tokens in zip(batch, said):
                cut = " [cut]" if len(tokens) == max_new else ""
                answers[v][n] = answer_prefix(prompts[n]) + tokenizer.decode(tokens) + cut
            bar.update(len(batch))
    bar.close()
    return answers


def decode(model, next_B1, mask_BT, cache, layer, v_BD, replace, max_new, ends, noise=None):
    """A token list for each prompt, without the token that ended it: greedy, or sampled with a
    torch.Generator. next_B1 are the prompts' last tokens: at these alone, in the first pass, block
    `layer` is patched. mask_BT covers them and what is in the cache. (model.generate would follow
    the temperature, penalties and minimum lengths that a model's own files ask for.)"""
    def patch(h_B1D):
        v_B1D = v_BD[:, None].to(h_B1D)
        return v_B1D if replace else h_B1D + v_B1D

    keep_cache = {cache_argument(model): cache, "use_cache": True}
    answers = [[] for _ in next_B1]
    active = list(answers)  # those that have not ended
    for step in range(max_new):
        with hooked(model, layer, patch) if step == 0 else nullcontext():
            out = model(input_ids=next_B1, attention_mask=mask_BT,
                        position_ids=mask_BT.sum(1, keepdim=True) - 1, **keep_cache)
        logits = out.logits[:, -1].float()  # (B, size of the vocabulary)
        if not logits.isfinite().all():
            raise ValueError(f"logits of {model.name_or_path} are not finite: a weight is not, or "
                             f"a vector put in is too long for {model.dtype} (lengths up to "
                             f"{v_BD.norm(dim=1).max():.3g})")
        if noise:  # minus log of exponential noise is Gumbel noise: the argmax is a sample
            logits -= torch.empty_like(logits).exponential_(generator=noise).log()
        next_B = logits.argmax(-1)

        # an answer that ends leaves the batch, and its row leaves the cache
        going = torch.isin(next_B, ends, invert=True).nonzero().flatten()
        if len(going) < len(active):
            cache.reorder_cache(going)
            mask_BT = mask_BT[going]
            next_B = next_B[going]
            active = [active[row] for row in going.tolist()]
        if not active:
            break

        for answer, token in zip(active, next_B.tolist()):
            answer.append(token)
        next_B1 = next_B[:, None]
        mask_BT = F.pad(mask_BT, (0, 1), value=1)
    return answers


def end_tokens(model, tokenizer):
    """The ids of all tokens that end an answer: those named in the model's and the tokenizer's
    files, and the usual ends of a turn, because a base's files only name the end of a text."""
    known = tokenizer.get_vocab()
    usual = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")
    ends = {known[token] for token in usual if token in known}
    for config in (tokenizer, model.config.get_text_config(), model.generation_config):
        own = getattr(config, "eos_token_id", None)
        if own is not None:
            ends.update(own if isinstance(own, list) else [own])
    return torch.tensor(sorted(ends), device=model.device)


# ---- 2. Reconstruction and its controls ----------------------------------------------------------
@torch.no_grad()
def reconstructions(cc, x_NMD, m):
    """{name: what replaces the vectors of model m (0 is A, 1 is B), (N, D)}, in the order of the
    table. A partition is left out if it does not write model m."""
    xhat_NMD, f_NL = cc(x_NMD)
    x_ND = x_NMD[:, m]
    xhat_ND = xhat_NMD[:, m]
    patches = {"own vector": x_ND, "reconstruction": xhat_ND}  # the first should change nothing

    # parts of it, and what is left without any latent: the mean and b_dec
    for part in cc.partitions():
        if part.models.start <= m < part.models.stop:
            only_NL = torch.zeros_like(f_NL)
            only_NL[:, part.latents] = f_NL[:, part.latents]
            patches[f"{part.name} alone"] = cc.decode(only_NL)[:, m]
    patches["no latent"] = cc.decode(0 * f_NL)[:, m]

    # noise as long as the error
    rng = torch.Generator().manual_seed(0)
    noise_ND = torch.randn(x_ND.shape, generator=rng).to(x_ND)
    patches["noise"] = x_ND + F.normalize(noise_ND) * (xhat_ND - x_ND).norm(dim=1, keepdim=True)

    # the pair is encoded together, so B's reconstruction may carry what only A's vector says
    if m == 1:
        a_ND = x_NMD[:, 0]
        order_N = torch.randperm(len(a_ND), generator=rng)
        another_ND = a_ND[order_N.roll(1)[order_N.argsort()]]  # the next in a random order
        for name, other_ND in (("mean A", a_ND.mean(0)), ("another A", another_ND)):
            other_NMD = torch.stack([other_ND.expand_as(a_ND), x_ND], 1)
            patches[f"reconstruction, {name}"] = cc(other_NMD)[0][:, 1]
    return patches


# ---- 3. Score ------------------------------------------------------------------------------------
def score(prediction, row):
    """{score: 0 or 1} of one answer to a tool row, whose "output" is the right answer."""
    prediction = first_turn(prediction)
    gold = row["output"]

    # ours
    said = parse_calls(prediction)
    wanted = parse_calls(gold)
    right = said.tidy and Counter(said.calls) == Counter(wanted.calls)
    if not wanted.calls:
        right = right and responds(prediction, gold)

    # the paper's rubric
    tools = [tool.lower() for tool in tool_names(row)]
    named = re.findall(r'"name"\s*:\s*"([^"]*)"', prediction.lower())
    first = named[0] if named else ""

    return {
        "exact": int(right),
        "called": int(bool(said.calls)),
        "false_call": int(bool(said.calls) and not wanted.calls),
        "paper_format": int("<tool_call>" in prediction and bool(named)),
        "paper_tool": int(first != "" and any(first in tool or tool in first for tool in tools)),
    }


def first_turn(prediction):
    """An answer up to the first token that ends a turn: what a model says after it is no answer."""
    prediction = prediction.removesuffix(" [cut]")
    return re.split(r"<\|(?:im_end|endoftext|eot_id)\|>|<end_of_turn>|<｜end", prediction)[0]


def needs_tool(row):
    """Does the right answer call a tool?"""
    return bool(parse_calls(row["output"]).calls)


def responds(prediction, gold):
    """Is there a <response> that is not empty? Plain text will do if the right answer has no such
    tag."""
    answer = after_thought(prediction)
    _, tag, rest = answer.partition("<response>")
    inside, end_tag, _ = rest.partition("</response>")
    if tag and end_tag:
        return inside.strip() != ""
    return "<response>" not in gold and answer.strip() != ""


def tool_names(row):
    """The tools that a row's instruction lists ("1. Name: get_weather"), in order. Names may hold
    blanks."""
    pattern = r"(?m)^[ \t]*\d+\.[ \t]*Name:[ \t]*(\S.*?)\s*$"
    return re.findall(pattern, str(row.get("instruction") or ""))


class Parsed(NamedTuple):
    """The calls of an answer."""

    calls: list  # of (name, its parameters as canonical JSON)
    tidy: bool   # every block is closed and holds nothing but calls: `exact` asks for it


def parse_calls(text):
    """The calls of an answer; raises nothing.

    Only the text after the thought counts, as thoughts mention the tags. A <tool_call> block holds
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
    """The calls between two tags. A line that is no call is skipped, and the rest still read."""
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


def parameters_of(call):
    """A call's parameters as canonical JSON: equal texts are equal values. In OpenAI's format they
    are JSON in a string. Absent, null, "" and [] are no parameters."""
    values = call.get("parameters") or call.get("arguments") or {}
    if isinstance(values, str):
        values = json.loads(values, parse_float=as_number)
    if not isinstance(values, dict):
        raise TypeError("parameters have names")
    return json.dumps(values, sort_keys=True)


def as_number(text):
    """A decimal of JSON: 3.0 is 3, as in ToolRL's reward."""
    value = float(text)
    return int(value) if value.is_integer() else value


def after_thought(text):
    """The text after the first </think>; empty if the thought never closes. (A later tag may stand
    in a value.)"""
    thought, end_tag, answer = text.partition("</think>")
    if end_tag:
        return answer
    return "" if "<think>" in thought else text


# ---- 4. Totals, intervals, chance, the table -----------------------------------------------------
def wilson(hits, n, z=1.96):
    """{pct, lo, hi}: a share in percent with its 95 % interval, which unlike the normal one has a
    width even at 0 and at n hits."""
    centre = hits + z * z / 2
    half = z * (hits * (n - hits) / n + z * z / 4) ** .5
    low, high = (100 * end / (n + z * z) for end in (centre - half, centre + half))
    return {"pct": 100 * hits / n, "lo": low if hits else 0., "hi": high if hits < n else 100.}


def paired(after, before):
    """{pp, lo, hi}: mean difference of two scores of the same rows in percentage points, with a
    95 % bootstrap interval over rows. If all rows change alike its width is zero; do not read that
    as certainty."""
    difference = 100 * np.subtract(after, before, dtype=float)
    draws = np.random.default_rng(0).integers(len(difference), size=(2000, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return {"pp": difference.mean(), "lo": low, "hi": high}


def totals(scores, rows):
    """score() of the answers to some rows -> {"all", "needs", "none": {"n", "exact": {pct, lo, hi},
    and so on for each score}}, of all rows, of those that need a tool and of those that need none.
    A group without rows is absent."""
    groups = {"all": scores, "needs": [], "none": []}
    for each, row in zip(scores, rows):
        groups["needs" if needs_tool(row) else "none"].append(each)

    out = {}
    for group, members in groups.items():
        if members:
            out[group] = {"n": len(members)}
            for name in members[0]:
                out[group][name] = wilson(sum(each[name] for each in members), len(members))
    return out


def chance_answers(rows):
    """{name: an answer to each row} that never reads the question. Empty if a row lists no tool."""
    tools = [tool_names(row) for row in rows]
    if not all(tools):
        return {}
    rng = random.Random(0)
    call = '<think> . </think>\n<tool_call>\n{{"name": {}, "parameters": {{}}}}\n</tool_call>'
    first = [call.format(json.dumps(names[0], ensure_ascii=False)) for names in tools]
    drawn = [call.format(json.dumps(rng.choice(names), ensure_ascii=False)) for names in tools]
    always = ["<think> . </think>\n<response> Yes. </response>"] * len(rows)
    return {"first tool with {}": first, "random tool with {}": drawn, "always a response": always}


def tabulate(answers, rows):
    """{name: an answer to each row} -> (a table to print, {name: totals}). If the first line is
    named "clean", the other totals hold the "change" from it: of exact calls, on the rows that need
    a tool. The table of {"clean": [right, right], "patched": [wrong, right]} and one row of each
    kind is

                            1 need a tool:                                  1 need none:
                            exact %  change [95 %]         called % paper_tool %   exact %  false %
    clean                     100.0                           100.0        100.0     100.0      0.0
    patched                     0.0  -100.0 [-100, -100]      100.0        100.0     100.0      0.0
    """
    n_needs = sum(map(needs_tool, rows))
    lines = [
        f"{'':28s}{n_needs} need a tool:{'':34s}{len(rows) - n_needs} need none:",
        f"{'':28s}exact %  change [95 %]         called % paper_tool %   exact %  false %",
    ]
    out = {}
    exact = {}  # of each line, on the rows that need a tool
    for name, said in answers.items():
        scores = [score(text, row) for text, row in zip(said, rows)]
        out[name] = totals(scores, rows)
        exact[name] = [each["exact"] for each, row in zip(scores, rows) if needs_tool(row)]

        left = right = change = ""
        if "needs" in out[name]:
            if "clean" in exact and name != "clean":
                out[name]["change"] = paired(exact[name], exact["clean"])
                change = "{pp:+.1f} [{lo:+.0f}, {hi:+.0f}]".format(**out[name]["change"])
            needs = out[name]["needs"]
            left = (f"{needs['exact']['pct']:7.1f}  {change:23s}{needs['called']['pct']:7.1f}"
                    f"{needs['paper_tool']['pct']:13.1f}")
        if "none" in out[name]:
            none = out[name]["none"]
            right = f"{none['exact']['pct']:10.1f}{none['false_call']['pct']:9.1f}"
        lines.append(f"{name:28s}{left:52s}{right}".rstrip())

    # answers that are cut say nothing of what the model would have done
    cut = sum(text.endswith(" [cut]") for said in answers.values() for text in said)
    if cut:
        lines.append(f"{cut} of {len(answers) * len(rows)} answers were cut at dfc.py's --max-new")
    return "\n".join(lines), out


# ---- 5. A run, its models and prompts ------------------------------------------------------------
@dataclass
class Run:
    """A trained crosscoder with the pair of models it belongs to."""

    settings: Settings  # what it was trained with
    cc: Crosscoder      # frozen
    models: dict        # {"A": the RL-tuned model, "B": its base}
    tokenizer: object   # A's, which serves both
    folder: Path        # of dfc.py; results go there
    samples: int = 0    # answers to a prompt, sampled at temperature 1; 0: one greedy answer

    @property
    def longest_prompt(self):
        """The longest prompt, in tokens, that leaves room for an answer."""
        return self.settings.longest - self.settings.max_new

    def vectors(self, texts):
        """Both models' vectors at the texts' last tokens -> x_NMD, on the crosscoder's device."""
        s = self.settings
        return collect(
            self.models.values(), self.tokenizer, texts, s.layer, s.longest).to(self.cc.mean)


def open_run(folder=None, get=load_model, device=""):
    """The run in a folder of dfc.py, by default the newest in runs/. get: load_model, or a cached
    one if several runs share their models. device: by default cuda if there is one, whatever the
    run was trained on. Raises ValueError."""
    if not folder:
        done = Path("runs").glob("*/model.safetensors")
        newest = max(done, key=lambda file: file.stat().st_ctime, default=None)
        if not newest:
            raise ValueError("no finished run is named, nor in runs/: make one with python dfc.py")
        folder = newest.parent
    settings = Settings(**read_metrics(folder)["config"])

    device = device or Settings.device
    model_a, tokenizer = get(settings.model_a, device)
    model_b, _ = get(settings.model_b, device)
    cc = load(folder, device)
    return Run(settings, cc, {"A": model_a, "B": model_b}, tokenizer, Path(folder))


def is_readable(row):
    """Do we understand the right answer: is it exact against itself? It is not if a tag stands in a
    value, or if it calls a tool in a format of Mistral, Llama, OpenAI, DeepSeek, Qwen-Agent, ReAct,
    Gemma or Python instead of in <tool_call>."""
    other_format = (r'(?m)\[TOOL_CALLS\]|<\|python_tag|<\|channel|<｜tool|<function|<invoke|✿'
                    r'|^Action:|```tool_code|^\[\w+\(|"(?:arguments|parameters)"\s*:')
    if "<tool_call>" not in row["output"] and re.search(other_format, row["output"]):
        return False
    return score(row["output"], row)["exact"] == 1


def load_prompts(tool_file, tokenizer, split, longest, most=None, template="chat"):
    """(rows, prompts) of a split, at most `most` of each kind (the row's "kind", otherwise whether
    it needs a tool). A prompt of more than `longest` tokens, or a row whose right answer is not
    readable, is left out and counted. template "paper": the system text alone, as published. Raises
    ValueError if no row needs a tool."""
    rows = []
    prompts = []
    seen = Counter()
    left_out = 0
    for row in read_rows(tool_file, TOOL_ROW, split):
        kind = row.get("kind", needs_tool(row))
        if seen[kind] == most:
            continue
        prompt = row["instruction"] if template == "paper" else prompt_of(row, tokenizer)
        if len(token_ids(tokenizer, prompt)) > longest or not is_readable(row):
            left_out += 1
            continue
        rows.append(row)
        prompts.append(prompt)
        seen[kind] += 1

    if left_out:
        print(f"{left_out} {split} rows left out: too long for the model, or answer unreadable")
    if not any(map(needs_tool, rows)):
        raise ValueError(f"{tool_file}: no {split} row that can be used has a <tool_call>")
    return rows, prompts


# ---- 6. The program ------------------------------------------------------------------------------
def evaluate(run, most_rows, template):
    """Answer, score, save and print all versions of one run."""
    began = time.time()
    s = run.settings
    rows, prompts = load_prompts(
        s.tool_texts, run.tokenizer, "test", run.longest_prompt, most_rows, template)
    x_NMD = run.vectors(prompts)

    # both models: clean, then patched
    texts = {}
    tables = {}
    into = {}
    for m, name in enumerate("AB"):
        patches = reconstructions(run.cc, x_NMD, m)
        if s.by_coordinate:  # as published: the evaluation forgot to normalise (dfc.fit_scale)
            raw = copy.deepcopy(run.cc)
            raw.mean.zero_()
            raw.scale.fill_(1)
            patches["reconstruction, raw"] = raw(x_NMD)[0][:, m]
        model = run.models[name]
        v_VND = torch.stack(list(patches.values()))
        clean, = generate(model, run.tokenizer, prompts, s.max_new)
        patched = generate(model, run.tokenizer, prompts, s.max_new, s.layer, v_VND, replace=True)
        texts[name] = {"clean": clean, **dict(zip(patches, patched))}
        tables[name], into[name] = tabulate(texts[name], rows)

    # save, print
    table_chance, chance = tabulate(chance_answers(rows), rows)
    lines = []
    for i, row in enumerate(rows):
        answers = {}
        for name, versions in texts.items():
            answers[name] = {version: said[i] for version, said in versions.items()}
        lines.append({"prompt": prompts[i], "gold": row["output"], "answers": answers})
    evaluation = {"models": into, "chance": chance, "rows": len(rows),
                  "template": template, "seconds": time.time() - began}
    save_result(run.folder, "evaluation", evaluation, lines, "eval.jsonl")

    print(f"\n{run.folder}, layer {s.layer}, test prompts, into A\n{tables['A']}"
          f"\n\ninto B\n{tables['B']}"
          f"\n\nanswers that never read the question\n{table_chance}")


def score_file(name):
    """The job of --score: rows {output, prediction[, instruction]} of a .jsonl file. Raises
    ValueError."""
    every = list(read_rows(name, ("output", "prediction")))
    rows = [row for row in every if is_readable(row)]
    left_out = len(every) - len(rows)
    if not rows or (left_out and not any(map(needs_tool, rows))):  # likely another call format
        raise ValueError(f"{name}: no row whose right answer we can read has a <tool_call>")
    start = r"<\|im_start|<\|start_header_id|<start_of_turn>|<｜User|\[INST\]"
    for row in rows:
        if re.search(start, first_turn(row["prediction"])):
            raise ValueError(f"{name}: a prediction is a whole transcript, give the answer alone: "
                             f"{row['prediction'][:80]!r}")

    print(f"{left_out} of {len(every)} rows left out: right answer unreadable")
    chance = chance_answers(rows)
    if not chance:
        print("not every row's instruction lists its tools: no chance lines, and paper_tool is 0 "
              "where none is listed")
    table, _ = tabulate({"your answers": [row["prediction"] for row in rows], **chance}, rows)
    print(table)


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
    p.add_argument("--template", choices=["chat", "paper"], default="chat", help="prompts: chat "
                   "template with the question (default), or as published the system text alone")
    p.add_argument("--rows", type=at_least_one, help="test rows of each kind, which is "
                   "a row's \"kind\" or whether it needs a tool (default: all)")
    p.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: cuda if there is one)")
    p.add_argument("--score", metavar="FILE", help="only score your own answers: a .jsonl "
                   "of rows {output: the right answer, prediction: yours[, instruction]}")
    args = p.parse_args(argv)

    if args.score is not None:
        return score_file(args.score)
    get = functools.cache(load_model)  # runs of one pair share its models
    for name in args.runs or [None]:
        evaluate(open_run(name, get, args.device), args.rows, args.template)


# ---- 7. Plumbing ---------------------------------------------------------------------------------
def cache_argument(model):
    """What this version of transformers calls the cache: it was renamed within version 5. Raises
    ValueError for a model without one."""
    for name in ("cache", "past_key_values"):
        if name in inspect.signature(model.forward).parameters:
            return name
    raise ValueError(f"{type(model).__name__} keeps no cache of what it has read")


if __name__ == "__main__":
    raise SystemExit(cli(main))
