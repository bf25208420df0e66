"""Score tool calls so that the number means something, and see what a reconstruction keeps of them.

A and its base B answer the test rows: clean, then with their residual vector at the prompt's last
token replaced by the crosscoder's reconstruction (paper section 4, sufficiency), by its parts, and
by what the reconstruction has to beat.

    python eval_toolcall.py                          # the newest run of dfc.py: a minute
    python eval_toolcall.py runs/a runs/b            # several
    python eval_toolcall.py antebe1/dfc-D8k-excl10-k45 --preset paper      # a published crosscoder
    python eval_toolcall.py --score answers.jsonl    # your own rows {output, prediction}: seconds

An example and its verdict:

    gold        <think> t </think>
                <tool_call>
                {"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}
                </tool_call>
    prediction  the same with "days": 5
    verdict     exact 0   name 1   called 1   toolrl 1 + 1.5   paper_overall 2

Scores, each a pure function of text:

    exact          the multiset of calls equals the gold one (names, keys, values; 3 is not "3");
                   where no call is wanted, a non-empty response and no call. The headline.
    name, called   the multiset of names equals the gold one; any well-formed call at all
    false_call     called, where no call is wanted
    toolrl         ToolRL's reward (arXiv 2504.13958): format {0, 1} + correctness [-3, 3]
    paper_*        the rubric of arXiv 2606.26474: format = a <tool_call> and a "name" anywhere;
                   tool = the first "name" equals, contains or is contained in any listed tool;
                   overall = -1 + format + 2 tool. Calling tool 1 with {} scores 100 %: hence the
                   chance lines, three answers that never read the question.

Shapes: N prompts, M = 2 models (A, B), D width, V versions of an answer (what is patched in),
R rows of a batch in flight, T tokens.
"""

import argparse
import copy
import functools
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from dfc import (TOOL_ROW, alike, cli, collect, file_of, hooked, load, load_model, named,
                 opened, parse_args, prompt_of, read_metrics, read_rows, split_of, texts_of,
                 token_ids, whole)

# ---- 1. Parse and score --------------------------------------------------------------------------
def parse_calls(text):
    """([(name, its parameters as canonical JSON)], tidy) of an answer; raises nothing.

    Read is what follows the last </think>, since thoughts mention the tags: in each <tool_call>
    block one JSON object after another, on lines of their own (ToolRL) or one a block with
    "arguments" (Hermes). tidy: every block is closed and holds calls and nothing else."""
    calls, tidy, read = [], True, json.JSONDecoder().raw_decode
    for block in text.rpartition("</think>")[2].split("<tool_call>")[1:]:
        body, closed, _ = block.partition("</tool_call>")
        tidy &= bool(closed and body.strip())
        while body := body.strip():
            try:
                call, end = read(body)
                values = call["parameters"] if "parameters" in call else call["arguments"]
                values = json.loads(values) if isinstance(values, str) else values
                calls.append((call["name"] + "", json.dumps(dict(values.items()), sort_keys=True)))
                body = body[end:]
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                tidy, body = False, body.partition("\n")[2]
    return calls, tidy

def needs_tool(row):
    """Does the gold answer call a tool? A thought may mention the tag: read is what follows it."""
    return "<tool_call>" in row["output"].rpartition("</think>")[2]

def responds(output, gold):
    """A non-empty <response>; plain text where the gold has no such tag. A thought that does not
    end is no answer."""
    _, thought, answer = output.rpartition("</think>")
    inside, closed, _ = answer.partition("<response>")[2].partition("</response>")
    if closed or "<response>" in gold:
        return bool(closed and inside.strip())
    return bool(answer.strip()) and ("<think>" not in output or bool(thought))

def toolrl_format(output, gold):
    """1 if the whole output has the gold's kind (a thought, a call and/or a response), else 0."""
    parts = {"tool_call": r"\n<tool_call>\n.*?\n</tool_call>",
             "response": r"\n<response>.*?</response>"}
    tags = [tag for tag in parts if f"<{tag}>" in gold]
    once = all(output.count(f"<{tag}>") == output.count(f"</{tag}>") == 1 for tag in tags)
    pattern = r"<think>.*?</think>" + "".join(parts[tag] for tag in tags)
    return int(once and bool(re.fullmatch(pattern, output.strip(), re.S)))

def jaccard(a, b):
    """Intersection over union of two multisets; 1 if they are equal. Of dicts: of their keys."""
    a, b = Counter(list(a)), Counter(list(b))
    return (a & b).total() / (a | b).total() if a != b else 1.

def toolrl_correctness(output, gold):
    """ToolRL's [-3, 3]: 6 (J(names) + sum of matches) / (1 + sum over gold calls (1 + keys)) - 3;
    each gold call in order uses up the best call of its name. 0 where the gold has no call, -3
    where a line of the first block is no call. What is looked at, and when, is as in its code."""
    if "<tool_call>" not in gold:
        return 0.
    try:
        found, wanted = ([json.loads(line) for line in text.split("<tool_call>")[1].split(
            "</tool_call>")[0].strip().split("\n")] for text in (output, gold))
        if found == wanted or "</tool_call>" not in output:
            return 3. if "</tool_call>" in output else -3.
        total, most = jaccard(*([c["name"] for c in calls] for calls in (found, wanted))), 1
        for name, values in ((c["name"], c["parameters"]) for c in wanted):
            worth = [jaccard(values.keys(), c["parameters"].keys()) + sum(
                k in c["parameters"] and c["parameters"][k] == v for k, v in values.items())
                if c["name"] == name else 0. for c in found]
            most += 1 + len(values)
            if max(worth, default=0.) > 0:
                total += max(worth)
                found.pop(worth.index(max(worth)))
        return 6 * total / most - 3
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return -3.

def tool_names(text):
    """Names in a ToolRL system text ("1. Name: get_weather"), in order; they may hold blanks."""
    return re.findall(r"^[ \t]*\d+\.[ \t]*Name:[ \t]*(\S.*?)\s*$", text, re.M)

def score(output, row):
    """All scores of one answer to a tool row; pure."""
    gold, tools = row["output"], [t.lower() for t in tool_names(row.get("instruction") or "")]
    output = output.split("<|im_start|>assistant")[-1].split("<|im_end|>")[0]
    (calls, tidy), (wanted, _) = parse_calls(output), parse_calls(gold)
    names = Counter(n for n, _ in calls) == Counter(n for n, _ in wanted)
    fits = Counter(calls) == Counter(wanted) and (bool(wanted) or responds(output, gold))
    first = (re.findall(r'"name"\s*:\s*"([^"]*)"', output.lower()) + [None])[0]
    p_form = int("<tool_call>" in output and first is not None)
    p_tool = int(bool(first) and any(first in tool or tool in first for tool in tools))
    form, correct = toolrl_format(output, gold), toolrl_correctness(output, gold)
    return {"exact": int(tidy and fits), "name": int(tidy and names), "called": int(bool(calls)),
            "false_call": int(bool(calls) and not wanted), "toolrl": form + correct,
            "toolrl_format": form, "toolrl_correctness": correct, "paper_format": p_form,
            "paper_tool": p_tool, "paper_overall": -1 + p_form + 2 * p_tool}

# ---- 2. Totals, chance, intervals ----------------------------------------------------------------
def wilson(hits, n, z=1.96):
    """A share in percent with its 95 % interval, which has a width also at 0 and at n hits."""
    centre, half = hits + z * z / 2, z * (hits * (n - hits) / n + z * z / 4) ** .5
    low, high = (100 * (centre + s * half) / (n + z * z) for s in (-1, 1))
    return {"pct": 100 * hits / n, "lo": low if hits else 0., "hi": high if hits < n else 100.}

def paired(after, before, unit=100, times=2000, seed=0):
    """{pp, lo, hi}: mean difference of two scores of the same rows, times unit (100: percentage
    points), with a 95 % bootstrap interval over rows, of no width where all change alike."""
    difference = unit * (np.asarray(after, float) - np.asarray(before, float))
    draws = np.random.default_rng(seed).integers(len(difference), size=(times, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return {"pp": float(difference.mean()), "lo": float(low), "hi": float(high)}

def totals(scores, rows):
    """{"all", "needs", "none": {"n", score: {pct, lo, hi} or, for rewards, {mean}}} over all rows,
    those that need a tool and those that do not; a group without rows is absent."""
    groups = {"all": scores, "needs": [s for s, r in zip(scores, rows) if needs_tool(r)],
              "none": [s for s, r in zip(scores, rows) if not needs_tool(r)]}
    return {group: {"n": len(some)} | {
        name: {"mean": sum(s[name] for s in some) / len(some)}
        if name in ("toolrl", "toolrl_correctness", "paper_overall")
        else wilson(sum(s[name] for s in some), len(some)) for name in some[0]}
        for group, some in groups.items() if some}

def chance(rows, seed=0):
    """{line: totals} of three answers that never read the question, on the rows that list tools."""
    def call(name):
        line = json.dumps({"name": name, "parameters": {}})
        return f"<think> . </think>\n<tool_call>\n{line}\n</tool_call>"
    rows = [r for r in rows if tool_names(r.get("instruction") or "")]
    tools, rng = [tool_names(r["instruction"]) for r in rows], random.Random(seed)
    lines = {"first tool with {}": [call(t[0]) for t in tools],
             "random tool with {}": [call(rng.choice(t)) for t in tools],
             "always a response": ["<think> . </think>\n<response> Yes. </response>"] * len(rows)}
    return {f"chance: {name}": totals(list(map(score, texts, rows)), rows)
            for name, texts in lines.items() if rows}

def print_totals(lines):
    """{line: totals [with "change": {pp, lo, hi}]} as a table, both kinds of rows apart."""
    print(f"{'':28s}rows that need a tool:{'':29s}rows that do not:\n{'':28s}exact %  change, 95 %"
          f"{'':10s}called %  toolrl  paper %    exact %  false calls %")
    for name, t in lines.items():
        d, needs, none = t.get("change"), t.get("needs"), t.get("none")
        change = f"{d['pp']:+.1f} [{d['lo']:+.1f}, {d['hi']:+.1f}]" if d else ""
        left = (f"{needs['exact']['pct']:7.1f}  {change:21s}{needs['called']['pct']:10.1f}"
                f"{needs['toolrl']['mean']:8.2f}{needs['paper_tool']['pct']:9.1f}") if needs else ""
        right = f"{none['exact']['pct']:11.1f}{none['false_call']['pct']:15.1f}" if none else ""
        print(f"{name:28s}{left:57s}{right}".rstrip())

def score_file(name):
    """The job of --score: rows {output, prediction[, instruction]} of a .jsonl file."""
    every = list(read_rows(name, ("output", "prediction")))
    rows = [row for row in every if parse_calls(row["output"])[1]]
    if not rows:
        raise ValueError(f"{name} holds no row whose gold can be read")
    print(f"{len(every) - len(rows)} of {len(every)} rows left out: gold unreadable")
    result = totals([score(row["prediction"], row) for row in rows], rows)
    print_totals({name: result} | chance(rows))
    print(headline(name, result["all"]))

def headline(name, total):
    return name + ": exact on {pct:.1f} % (95 % {lo:.1f} to {hi:.1f})".format(
        **total["exact"]) + f" of {total['n']} rows"

# ---- 3. Generate: greedy, batched, patched -------------------------------------------------------
@torch.no_grad()
def generate(model, tokenizer, prompts, max_new, layer=0, keep_V=(1,), v_VND=None, everywhere=None,
             at_once=40_000):
    """Greedy answers, each prompt V times -> [V][N] texts.

    In version v the output h of block `layer` at prompt n's last token becomes keep_V[v] h +
    v_VND[v, n], once: keep 1 adds, keep 0 replaces, the default changes nothing and is "clean". A
    patch there leaves the keys and values before it as they are: they are computed once for all
    versions. everywhere: an edit (R, T, D) -> same at every token of prompt and answer instead.
    at_once bounds the tokens in flight."""
    ids, known = token_ids(tokenizer, prompts), tokenizer.get_vocab()
    stops = {tokenizer.eos_token, "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>"}
    ends = sorted(known[t] for t in stops & known.keys())  # a base's own file lacks the turn's end
    out, device = [[None] * len(prompts) for _ in keep_V], model.device
    keep_V = torch.tensor(keep_V, dtype=model.dtype, device=device)
    for rows in alike(ids, at_once // 4):
        width = len(ids[rows[-1]])
        pads = [width - len(ids[i]) for i in rows]
        ids_RT = torch.tensor([[0] * pad + ids[i] for pad, i in zip(pads, rows)], device=device)
        mask_RT = torch.arange(width, device=device) >= torch.tensor(pads, device=device)[:, None]
        cache = DynamicCache(config=model.config)
        if not everywhere and width > 1:
            model.base_model(input_ids=ids_RT[:, :-1], attention_mask=mask_RT[:, :-1].long(),
                             position_ids=(mask_RT.cumsum(1) - 1).clamp(min=0)[:, :-1],
                             past_key_values=cache)
        for some in torch.arange(len(keep_V)).split(at_once // len(rows) // (width + max_new) or 1):
            edit = everywhere or once(keep_V[some].repeat(len(rows))[:, None], None if v_VND is None
                                      else v_VND[some][:, rows].transpose(0, 1).flatten(0, 1))
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(some))
            with hooked(model, layer, edit):  # all spelled out: a model's file may ask for sampling
                said = model.generate(
                    input_ids=ids_RT.repeat_interleave(len(some), 0), past_key_values=own,
                    attention_mask=mask_RT.repeat_interleave(len(some), 0).long(),
                    max_new_tokens=max_new, do_sample=False, num_beams=1, repetition_penalty=1.,
                    use_cache=True, eos_token_id=ends, pad_token_id=ends[0])[:, width:].tolist()
            for r, answer in enumerate(said):
                end = next((i for i, token in enumerate(answer) if token in ends), None)
                n, v = rows[r // len(some)], some[r % len(some)]
                out[v][n] = opened(prompts[n]) + tokenizer.decode(answer[:end])
    return out

def once(keep_R1, v_RD=None):
    """An edit for hooked(): the last token becomes keep h + v in the first pass, and no more."""
    done = []
    def edit(h_RTD):
        if done:
            return h_RTD
        done.append(True)
        last = keep_R1 * h_RTD[:, -1] + (0 if v_RD is None else v_RD.to(h_RTD))
        return torch.cat([h_RTD[:, :-1], last[:, None]], 1)
    return edit

# ---- 4. Reconstruction, and what it has to beat --------------------------------------------------
@torch.no_grad()
def reconstructions(cc, x_NMD, raw=False):
    """{"A": {version: what takes the place of its own activation, (N, D)}, "B": ...}.

    The pair is encoded together. Into both: the activation itself (nothing may change), the
    reconstruction, its parts (one partition's latents; none of them, "mean only"), the activation
    with noise as long as the reconstruction's error. Into B also the reconstruction with A's vector
    replaced by its mean or another prompt's: B's latents were encoded from A's state too, so what
    changes then came in from A. raw: as published, without mean and scale ([1] in dfc.py)."""
    x_NMD = x_NMD.float()
    xhat_NMD, f_NL = cc(x_NMD)
    both = {"own activation": x_NMD, "reconstruction": xhat_NMD}
    for name, part in cc.parts().items():
        only_NL = torch.zeros_like(f_NL)
        only_NL[:, part] = f_NL[:, part]
        both[f"{name} alone"] = cc.decode(only_NL)
    both["mean only"] = cc.decode(torch.zeros_like(f_NL))
    for seed in range(3):
        e_NMD = torch.randn(x_NMD.shape, generator=torch.Generator().manual_seed(seed)).to(x_NMD)
        size = (xhat_NMD - x_NMD).norm(dim=2) / e_NMD.norm(dim=2)
        both[f"noise, seed {seed}"] = x_NMD + e_NMD * size[..., None]
    if raw:
        published = copy.deepcopy(cc)
        published.mean.zero_(), published.scale.fill_(1)
        both["reconstruction, raw"] = published(x_NMD)[0]
    out = {m: {name: v[:, i] for name, v in both.items()} for i, m in enumerate("AB")}
    for whose, a_ND in (("mean A", x_NMD[:, 0].mean(0).expand_as(x_NMD[:, 0])),
                        ("another's A", x_NMD[:, 0].roll(1, 0))):
        out["B"][f"reconstruction, {whose}"] = cc(torch.stack([a_ND, x_NMD[:, 1]], 1))[0][:, 1]
    return out

# ---- 5. The program ------------------------------------------------------------------------------
def open_run(name, preset=None, get=load_model):
    """A run: settings s, crosscoder cc, models {"A", "B"}, tokenizer, folder of results, max_new
    tokens an answer. name: a folder of dfc.py, None for the newest; with a preset, a crosscoder
    alone, which tells its layer. get: load_model, or one that remembers. Raises ValueError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done = sorted(Path("runs").glob("*/model.safetensors"), key=lambda f: f.stat().st_ctime)
    if not name and (preset or not done):
        raise ValueError("no finished run is named, nor in runs/: make one with python dfc.py")
    folder = Path(name) if name else done[-1].parent
    if preset:
        folder, own = Path("runs", f"{preset}-{name.replace('/', '--')}"), {}
        for file in ("config.json", "hparams.json"):  # the authors keep the layer apart
            own |= {} if "layer" in own else json.loads(file_of(name, file).read_text())
        config = vars(parse_args(["--preset", preset, "--recipe", "paper"]))
        config |= {"layer": own.get("layer", config["layer"]), "out": str(folder),
                   "crosscoder": name}
    else:
        config = {"crosscoder": str(folder)} | read_metrics(folder)["config"]
    s = argparse.Namespace(**config)
    cc, (a, tokenizer), (b, _) = load(s.crosscoder, device), *(
        get(model, device) for model in (s.model_a, s.model_b))
    models = {"A": a, "B": b}
    if not cc.mean.any():
        print(f"{s.crosscoder} comes without mean and scale: fitted again, on 600 training texts")
        texts = texts_of(s, tokenizer, "train", 300, "paper")
        with named(s.crosscoder):  # its vectors may be wider than the models'
            cc.fit_scale(pair_at(models, tokenizer, texts, s.layer))
    if not (folder / "metrics.json").exists():  # a crosscoder's first use: results go there
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({"config": config}))
    return argparse.Namespace(s=s, cc=cc, models=models, tokenizer=tokenizer, folder=folder,
                              max_new=64 if s.preset == "tiny" else 512)

def rows_of(r, split, most=None, template="chat"):
    """(rows, prompts) of a split of run r, at most `most` of each kind; a prompt that with its
    answer would not fit the model's positions (or 4,096), or a row whose gold is no call that can
    be read, is left out and counted. template "paper": the system text alone, as published."""
    seen, kept, out = Counter(), [], 0
    most_tokens = r.models["A"].config.get_text_config().max_position_embeddings
    for row in read_rows(r.s.tool_texts, TOOL_ROW):
        kind = row.get("kind", needs_tool(row))
        if split_of(row) == split and (most is None or seen[kind] < most):
            prompt = row["instruction"] if template == "paper" else prompt_of(row, r.tokenizer)
            length = len(token_ids(r.tokenizer, prompt)) + r.max_new
            fits = length <= min(4096, most_tokens) and parse_calls(row["output"])[1]
            kept += [(row, prompt)] * fits
            seen[kind], out = seen[kind] + fits, out + (not fits)
    if out:
        print(f"{out} {split} rows left out: longer than the model's positions, or gold unreadable")
    if not any(needs_tool(row) for row, _ in kept):
        raise ValueError(f"no {split} row of {r.s.tool_texts} that can be used needs a tool")
    return tuple(map(list, zip(*kept)))

def pair_at(models, tokenizer, prompts, layer):
    """x_NMD: both models' vectors at the prompts' last tokens."""
    return torch.stack([collect(m, tokenizer, prompts, layer) for m in models.values()],
                       1).float().to(models["A"].device)

def compare(texts, rows):
    """{version: texts}, the first of them clean -> {version: totals, the others' with "change"}: of
    exact on the rows that need a tool."""
    needs, out = [i for i, row in enumerate(rows) if needs_tool(row)], {}
    for version, said in texts.items():
        scores = [score(text, row) for text, row in zip(said, rows)]
        exact = [scores[i]["exact"] for i in needs]
        clean = exact if not out else clean
        out[version] = totals(scores, rows) | ({"change": paired(exact, clean)} if out else {})
    return out

def keep(folder, key, value, lines, file):
    """Put a result beside what metrics.json holds already, and the rows behind it into a file."""
    before = read_metrics(folder)
    with whole(folder / file) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with whole(folder / "metrics.json") as part:
        part.write_text(json.dumps(before | {key: value}, indent=1))

def evaluate(r, args):
    """Answer, score, save and print one run's versions."""
    began, layer = time.time(), r.s.layer
    rows, prompts = rows_of(r, "test", args.rows, args.template)
    x_NMD, texts, result = pair_at(r.models, r.tokenizer, prompts, layer), {}, {}
    chances = chance(rows)
    for m, versions in reconstructions(r.cc, x_NMD, r.s.recipe == "paper").items():
        v_VND = torch.stack([torch.zeros_like(x_NMD[:, 0]), *versions.values()])
        said = generate(r.models[m], r.tokenizer, prompts, r.max_new, layer,
                        [1] + [0] * len(versions), v_VND)
        texts[m] = dict(zip(["clean", *versions], said))
        result[m] = compare(texts[m], rows)
        print(f"\n{r.folder}, layer {layer}, into {m}, {len(rows)} test rows")
        print_totals(result[m] | (chances if m == "A" else {}))
    lines = [{"prompt": prompt, "gold": row["output"], "answers": {
        m: {name: said[i] for name, said in versions.items()} for m, versions in texts.items()}}
        for i, (row, prompt) in enumerate(zip(rows, prompts))]
    keep(r.folder, "evaluation", {"models": result, "chance": chances, "rows": len(rows),
                                  "template": args.template, "seconds": time.time() - began},
         lines, "eval.jsonl")
    print(headline("A, reconstruction", result["A"]["reconstruction"]["all"]))

def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", help="run folders (default: the newest)")
    p.add_argument("--preset", choices=["tiny", "paper"], help="for crosscoders without a run: "
                   "whose models and texts, and the layer unless the crosscoder names its own")
    p.add_argument("--template", choices=["chat", "paper"], default="chat", help="prompts: "
                   "chat template with the question (default); as published the system text alone")
    p.add_argument("--rows", type=int, help="test rows of each kind, which is a row's \"kind\" or "
                   "whether it needs a tool (default: all)")
    p.add_argument("--score", metavar="FILE", help="score your own answers, nothing else: a .jsonl "
                   "of rows {output: the right answer, prediction: yours}")
    args = p.parse_args(argv)
    if args.score is not None:
        return score_file(args.score)
    get = functools.cache(load_model)  # runs of one pair share its models
    for name in args.runs or [None]:
        evaluate(open_run(name, args.preset, get), args)

if __name__ == "__main__":
    sys.exit(cli(main))
