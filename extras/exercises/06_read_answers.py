"""Exercise 6 of ../EXERCISES.md: read the answers.

    python extras/exercises/06_read_answers.py runs/tiny
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # dfc.py lies two folders up
from dfc import read_rows
from eval_toolcall import parse_calls, tool_names


def question(line):
    return line["prompt"].split("<user>")[1].split("</user>")[0].strip()


def main(folder):
    count = Counter()
    examples = []
    for line in read_rows(f"{folder}/steer.jsonl", ()):
        said = line["its maximum added to B"]
        if parse_calls(line["gold"]).calls:
            count["prompts that need a tool"] += 1
            if said == line["clean A"]:
                count["- B's answer is A's, letter by letter"] += 1
            continue

        count["prompts that need none"] += 1
        for name, values in parse_calls(said).calls:
            count["- false calls"] += 1
            if name == tool_names({"instruction": line["prompt"]})[0]:
                count["- of the first tool in the list"] += 1
            if values == "{}":
                count["- without any value"] += 1
            examples.append(f"{question(line)}\n     {name} {values}")
    for what, n in count.items():
        print(f"{n:4d} {what}")

    print("\nB, maximum added: every twelfth false call")
    print("\n".join(examples[::12]))

    print("\nB, no latent: all answers")
    for line in read_rows(f"{folder}/eval.jsonl", ()):
        print("\n" + question(line))
        print(line["answers"]["B"]["no latent"])


if __name__ == "__main__":
    main(sys.argv[1])
