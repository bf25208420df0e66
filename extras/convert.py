"""OpenAI-style rows, `messages` and `tools`, as the rows that dfc.py reads.

    python extras/convert.py chats.jsonl rows.jsonl
    python dfc.py --preset qwen --tool-texts rows.jsonl

The last message of a row is the assistant's and becomes `output`: its tool calls, or its text. The
messages before it become `input`, the system message and the tools `instruction`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dfc.py lies one folder up
from dfc import atomically, cli, errors_about


def convert(chat):
    """A chat {"messages", "tools"[, "split"]} -> a row of ours."""
    *before, last = chat["messages"]

    # the tools as a numbered list, which the chance lines read
    lines = [message["content"] for message in before if message["role"] == "system"]
    for i, tool in enumerate(chat.get("tools") or [], 1):
        function = tool["function"]
        schema = function.get("parameters", {}).get("properties", {})
        lines += [f"{i}. Name: {function['name']}",
                  f"Description: {function.get('description', '')}",
                  f"Parameters: {json.dumps(schema)}"]

    # the right answer: a call a line, arguments as an object
    calls = []
    for call in last.get("tool_calls") or []:
        arguments = call["function"].get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        calls.append(json.dumps({"name": call["function"]["name"], "parameters": arguments}))
    output = last.get("content") or ""
    if calls:
        output = "\n".join(["<tool_call>", *calls, "</tool_call>"])

    turns = [message for message in before if message["role"] != "system"]
    said = [f"<{turn['role']}> {turn.get('content') or ''} </{turn['role']}>" for turn in turns]
    return {"instruction": "\n".join(lines), "input": "\n".join(said), "output": output,
            "split": chat.get("split")}  # without one it is drawn


def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("chats", type=Path, help="a .jsonl of {messages, tools}")
    p.add_argument("rows", type=Path, help="the .jsonl to write")
    args = p.parse_args(argv)

    rows = []
    for number, line in enumerate(args.chats.read_text().splitlines(), 1):
        with errors_about(f"{args.chats}, line {number}"):
            rows.append(convert(json.loads(line)))
    with atomically(args.rows) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows in {args.rows}")


if __name__ == "__main__":
    sys.exit(cli(main))
