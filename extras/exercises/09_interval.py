"""Exercise 9 of ../EXERCISES.md: how sure is a difference?

    pytest extras/exercises/09_interval.py              # fails until the fault is fixed
    python extras/exercises/09_interval.py runs/tiny    # before and after: where does it matter?
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # dfc.py lies two folders up
from dfc import read_rows
from eval_toolcall import needs_tool, score


def interval(after, before, times=2000):
    """(low, high) of the mean of after - before, in percentage points. after, before: 0 or 1 for
    each prompt, in the same order."""
    rng = np.random.default_rng(1)
    n = len(before)
    after = np.array(after)[rng.integers(n, size=(times, n))]
    before = np.array(before)[rng.integers(n, size=(times, n))]
    differences = 100 * (after.mean(1) - before.mean(1))
    return np.percentile(differences, [2.5, 97.5])


def test_it_has_the_width_of_paired_differences_and_none_if_all_prompts_change_alike():
    rng = np.random.default_rng(0)
    before = (rng.random(400) < .6).astype(int)
    after = before ^ (rng.random(400) < .2)  # one prompt of five changes

    low, high = interval(after, before, times=10_000)

    # with many prompts the interval is close to mean +- 1.96 standard errors
    differences = 100 * (after - before)
    width = 2 * 1.96 * differences.std() / len(differences) ** .5
    assert high - low < width + .7, "too wide: do a prompt's two answers stay together?"
    assert high - low > width - .7, "too narrow: it holds 95 % of the means, of pairs as they are"
    assert abs((low + high) / 2 - differences.mean()) < .4, "not around the mean of after - before"
    assert list(interval(before, before)) == [0, 0], "no prompt changes, but it has a width"


def main(folder):
    lines = list(read_rows(f"{folder}/steer.jsonl", ()))
    for after, before in (("ablated in A", "clean A"), ("its maximum added to B", "clean A")):
        exact = {after: [], before: []}
        for line in lines:
            gold = {"output": line["gold"]}
            if needs_tool(gold):
                for name, values in exact.items():
                    values.append(int(score(line[name], gold)["exact"]))
        low, high = interval(exact[after], exact[before])
        print(f"{after} minus {before}: {low:+.1f} to {high:+.1f}")


if __name__ == "__main__":
    main(sys.argv[1])
