"""Score tool calls so that the number means something.

    python eval_toolcall.py --score outputs.jsonl    # rows {prediction, ground_truth[, tools]}
    ... | python eval_toolcall.py --score -          # the same from standard input; no torch needed

One real row and its verdict (the tools are get_weather, get_time, get_weather_alerts):

    gold        <think> t </think>
                <tool_call>
                {"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}
                </tool_call>
    prediction  the same with "days": 5
    verdict     exact 0   name 1   called 1   toolrl 1 + 1.5   paper_overall 2

Scores, each a pure function of text:

    exact          the multiset of calls equals the gold one (names, keys, values; any order);
                   where no call is wanted, a non-empty answer and no call. The headline.
    name, called   the multiset of names equals the gold one; any well-formed call at all
    false_call     called, where no call is wanted
    toolrl         ToolRL's reward (arXiv 2504.13958): format {0, 1} + correctness [-3, 3]
    paper_*        the rubric of arXiv 2606.26474: format = a <tool_call> and a "name" anywhere;
                   tool = the first "name" equals, contains or is contained in any listed tool;
                   overall = -1 + format + 2 tool. Calling tool 1 with {} scores 100 %: hence the
                   chance lines, three answers that never read the question.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# 1. Rows: one plain record from each of four formats
# ---------------------------------------------------------------------------------------------

TURN = {"role": str, "content": str | None, "tool_calls": list | None}
FORMATS = {  # what a row of each must hold; the first whose keys are all there
    "ToolRL": {"instruction": str, "input": str, "output": str},
    "verl": {"prompt": [TURN], "reward_model": {"ground_truth": str | list}},
    "score-only": {"prediction": str, "ground_truth": str | list},
    "chat": {"messages": [TURN]},
}


class RowError(ValueError):
    """Rows that cannot be read; the message names the row or the field. Ends the program."""


def format_of(row):
    """The name of a row's format. Raises RowError."""
    check(row, {}, "a row")
    for name, shape in FORMATS.items():
        if shape.keys() <= row.keys():
            return name
    raise RowError(f"unknown row format with the keys {sorted(row)}")


def check(value, shape, name=""):
    """RowError naming the field where a value is not of its shape: a type, a list of one shape,
    or an object with at least these fields."""
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", kind)
        raise RowError(f"{name} must be {wanted}, got {type(value).__name__}")
    for key, inner in shape.items() if kind is dict else ():
        check(value.get(key), inner, f"{name}.{key}".lstrip("."))
    for item in value if kind is list and shape else ():
        check(item, shape[0], name + "[]")


def to_record(row):
    """{messages, tools, calls, gold} from a row of any format.

    messages: [{role, content}], None for score-only rows;  tools: list of names;
    calls: [{name, parameters}], [] = no call wanted;  gold: its raw text, None if there is none.
    Raises RowError naming the field that is wrong, CallError when the gold does not parse.
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
        *messages, last = row["messages"] or [{"role": None}]
        if last["role"] != "assistant":
            raise RowError("messages must end in the assistant's turn, which is the gold")
        gold = last.get("tool_calls") or last.get("content") or ""
    system = [m.get("content") or "" for m in messages or [] if m["role"] == "system"]
    listed = row.get("tools")
    tools = tool_names("\n".join(system)) if listed is None else listed_names(listed)
    return {"messages": messages, "tools": tools, "calls": gold_calls(gold),
            "gold": gold if isinstance(gold, str) else None}


def tool_names(text):
    """Names in a ToolRL system text ("1. Name: get_weather"), in order; they may hold blanks."""
    return re.findall(r"^[ \t]*\d+\.[ \t]*Name:[ \t]*(\S.*?)\s*$", text, re.M)


def listed_names(tools):
    """Names from a list of tools, also as JSON text: plain names, {name: ...} or OpenAI's
    {function: {name: ...}}."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        check(tools, [])
        names = [t if isinstance(t, str) else t.get("function", t)["name"] for t in tools]
        check(names, [str])
        return names
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RowError("tools must be a list of names or of objects with a name") from None


def gold_calls(gold):
    """Calls of a gold answer, a text or a list; [] means that no call is wanted."""
    if isinstance(gold, list):
        return [as_call(c.get("function", c) if isinstance(c, dict) else c) for c in gold]
    calls = parse_calls(gold)
    if not calls and re.match(r'\s*[\[{].*"name".*"(parameters|arguments)"', gold, re.S):
        raise CallError(f"a call without <tool_call> tags: {gold[:60]!a}")
    return [{"name": c["name"], "parameters": c["parameters"]} for c in calls]


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
    """
    if not isinstance(text, str):
        raise CallError(f"not text: {type(text).__name__}")
    calls, wrong = [], None
    for block in text.rsplit("</think>", 1)[-1].split("<tool_call>")[1:]:
        body, closed, _ = block.partition("</tool_call>")
        try:
            _loads(body)
            pieces = [body]
        except CallError:
            pieces = [line for line in body.split("\n") if line.strip()] or [body]
        for piece in pieces:
            try:
                calls.append(as_call(_loads(piece)) | ({} if closed else {"unclosed": True}))
            except CallError as e:
                wrong = wrong or e
    if wrong:
        wrong.calls = calls
        raise wrong
    return calls


def _loads(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CallError(f"not JSON ({type(e).__name__}): {text[:60]!a}") from None


def as_call(obj):
    """{name, parameters} from a call with "parameters" or "arguments" (an object or JSON text)."""
    if not isinstance(obj, dict) or not isinstance(obj.get("name"), str):
        raise CallError("not a call: an object with a name is wanted")
    values = obj.get("parameters", obj.get("arguments"))
    values = _loads(values) if isinstance(values, str) else values
    if not isinstance(values, dict) or not _shallow(values):
        raise CallError(f"no object of parameters in the call of {obj['name'][:60]!a}")
    return {"name": obj["name"], "parameters": values}


def _shallow(value, levels=50):
    """Few enough levels: comparing two values nested 500 deep ends in a RecursionError."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(v, levels - 1) for v in inner)


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
    """Whether two lists of calls are equal as multisets; a call marked unclosed equals none."""
    return len(calls) == len(gold) and all(  # > 0: NaN equals nothing, itself included
        sum(equal(g, c) for c in calls) == sum(equal(g, h) for h in gold) > 0 for g in gold)


def has_response(output, gold):
    """A non-empty <response>; plain text where the row's format has no such tag."""
    answer = output.rsplit("</think>", 1)[-1]
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
    a, b = Counter(list(a)), Counter(list(b))
    return (a & b).total() / (a | b).total() if a != b else 1.


def toolrl_correctness(output, calls):
    """ToolRL's [-3, 3]: 6 (J(names) + sum of matches) / (1 + sum over gold calls (1 + keys)) - 3.
    Each gold call in order uses up the best call of its name, unless that matches in nothing."""
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
    but calls in its blocks is never exact, even if some are well-formed and count as called."""
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
# 4. Totals, chance, and the program
# ---------------------------------------------------------------------------------------------

MEANS = ("toolrl", "toolrl_correctness", "paper_overall")  # what is no share


def wilson(hits, n, z=1.96):
    """A share in percent with its 95 % interval, which has a width also at 0 and at n hits."""
    centre, half = hits + z * z / 2, z * (hits * (n - hits) / n + z * z / 4) ** .5
    low, high = (100 * (centre + s * half) / (n + z * z) for s in (-1, 1))
    return {"pct": 100 * hits / n, "hits": hits, "n": n,
            "lo": low if hits else 0., "hi": high if hits < n else 100.}  # exact at both ends


def totals(scores, records):
    """{"all", "needs", "none": {"n": rows, score: total}}: all rows, those that need a tool, those
    that want none; a group without rows is absent. A total is {pct, hits, n, lo, hi} (wilson) or,
    for MEANS, {mean, n}; paper_* count only the rows that list tools. Needs: wilson, MEANS."""
    pairs, out = list(zip(scores, records, strict=True)), {}
    for group, wants in (("all", (True, False)), ("needs", (True,)), ("none", (False,))):
        some = [(s, r) for s, r in pairs if bool(r["calls"]) in wants]
        for name in some[0][0] if some else ():
            values = [s[name] for s, r in some if r["tools"] or not name.startswith("paper")]
            total = wilson if name not in MEANS else lambda s, n: {"mean": s / n, "n": n}
            if values:
                out.setdefault(group, {"n": len(some)})[name] = total(sum(values), len(values))
    return out


def chance(records, seed=0):
    """{line: totals} of three answers that never read the question, on the rows that list tools."""
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
    """Totals and chance lines, one line each; the last line is the headline."""
    names = {"all": "all", "needs": "a tool is needed", "none": "no tool is wanted"}
    lines = {names[group]: t for group, t in result.items()}
    lines |= {f"chance: {name}": t["all"] for name, t in chances.items()}
    print(" " * 23 + "     n  exact %        95 %  name %  called %  toolrl  paper_tool %")
    for name, t in lines.items():
        tool = f"{t['paper_tool']['pct']:.1f}" if "paper_tool" in t else "-"
        span = f"{t['exact']['lo']:.1f}-{t['exact']['hi']:.1f}"
        print(f"{name:23s}{t['n']:6d}{t['exact']['pct']:9.1f}{span:>12s}{t['name']['pct']:8.1f}"
              f"{t['called']['pct']:10.1f}{t['toolrl']['mean']:8.2f}{tool:>14s}")
    e = result["all"]["exact"]
    print(f"\nexact {e['hits']}/{e['n']} ({e['pct']:.1f}%, 95% {e['lo']:.1f}-{e['hi']:.1f})")


def read_jsonl(name):
    """[(number of the line, its JSON value)] of a file, or of standard input for "-"."""
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
    format, each with a prediction. Raises RowError naming the row."""
    scored, unread = [], {}
    for number, row in rows:
        try:
            if format_of(row) != format_of(rows[0][1]):
                raise RowError(f"{format_of(row)} format, but {format_of(rows[0][1])} before")
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


def main(argv=None):
    p = argparse.ArgumentParser(prog="eval_toolcall.py", description="Score tool calls.")
    p.print_usage = lambda *_: None  # an error is one line
    p.add_argument("--score", metavar="FILE", required=True,
                   help="JSONL rows with a prediction and a gold; - reads standard input")
    scored, unread = score_rows(read_jsonl(p.parse_args(argv).score))
    if unread:
        print(f"left out, the gold does not parse: {len(unread)} of {len(scored) + len(unread)}, "
              f"row {', '.join(map(str, unread))} ({next(iter(unread.values()))})\n")
    scores, records = zip(*scored)
    print_table(totals(scores, records), chance(records))


def run(main, argv=None):
    """The exit status of a program: what the user can mend is one line on stderr and status 2."""
    try:
        main(argv)
    except (RowError, OSError) as e:
        print(f"eval_toolcall.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
