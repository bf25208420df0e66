"""Steer single latents: do they carry what reinforcement learning added?

A is the model tuned by RL, B its base; dfc.py trained the crosscoder, by equations (1) to (7). Rank
its latents by how well they separate prompts that need a tool from prompts, in the same template,
that need none. Change the best A-exclusive one at the prompt's last token, where the answer begins,
and count exact calls. With S the latents that are changed, one or several,

    written_n = sum_{l in S} f_nl W_dec[l, A] scale_A      (8) what S writes into A at prompt n

    ablated in A              - written_n
    scaled by alpha in A      (alpha - 1) written_n        (9) the paper's steering
    its maximum added to B    written, each f_l at its maximum on dev prompts: one vector for all
    copied from A into B      c written_n; this leaks A's decision into B

Near a decision almost any vector changes the answer. Controls of the same length on each prompt:

    random         10 random directions
    latents        the 20 other latents of the same partition that separate best
    A - B          the mean of A minus the mean of B, on prompts that need a tool
    diff of means  the mean of A on prompts that need a tool minus that on prompts that need none

The margin is how much more the latents do than the strongest control. Latents, alpha and c are
chosen on dev prompts; what is printed is of test prompts. Note:
- The strongest control is picked on the test prompts, which favours the controls.
- alpha and c are tuned for the latents alone, which favours the latents (best_strength).
- Where the latents are silent, controls do nothing: under "copied" they leak A's decision, too.
Suffixes are shapes, as in dfc.py; here V are versions, U directions, R answers to one prompt.

    python steer.py                                    # the newest run of dfc.py: two minutes
    python steer.py --samples 5                        # sampled answers: a quarter of an hour
    python steer.py --prompt "Wake me up at 7:15."     # your own words: seconds
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dfc import answer_prefix, atomically, cli, prompt_of, residual_stream, token_ids
from eval_toolcall import (
    at_least_one,
    generate,
    load_prompts,
    needs_tool,
    open_run,
    paired,
    save_result,
    score,
    tool_names,
)

ALPHAS = (1.25, 1.5, 2., 2.5, 3., 4., 6., 8., 16., 32.)  # tried when latents are scaled up


# ---- 1. Prompts ----------------------------------------------------------------------------------
@dataclass
class Prompts:
    """Prompts up to the assistant's turn, and what both models hold at their last token."""

    rows: list             # tool rows, dicts
    texts: list            # the prompts themselves
    x_NMD: torch.Tensor    # both models' vectors
    f_NL: torch.Tensor     # the latents they encode to
    needs_N: torch.Tensor  # does the right answer call a tool?


def read_prompts(run, split, most=None):
    """The prompts of a split, at most `most` of each kind. Raises ValueError, also if fewer than
    two need a tool, or fewer than two do not."""
    rows, texts = load_prompts(
        run.settings.tool_texts, run.tokenizer, split, run.longest_prompt, most)
    needs_N = torch.tensor([needs_tool(row) for row in rows])
    if not 1 < needs_N.sum() < len(rows) - 1:
        raise ValueError(f"among {split} rows two must need a tool and two must not")
    x_NMD = run.vectors(texts)
    return Prompts(rows, texts, x_NMD, run.cc.encode(x_NMD), needs_N)


# ---- 2. Which latent? ----------------------------------------------------------------------------
def cohens_d(f_PL, f_QL):
    """(mean P - mean Q) / sqrt((var P + var Q) / 2) per latent (paper section 4, ranking). P and Q
    are two sets of prompts or texts."""
    f_PL = f_PL.cpu().double()  # some devices have no double
    f_QL = f_QL.cpu().double()
    spread_L = ((f_PL.var(0) + f_QL.var(0)) / 2).sqrt()
    return (f_PL.mean(0) - f_QL.mean(0)) / spread_L.clamp(min=1e-12)


def auroc(f_PL, f_QL):
    """P(a value of P is larger than one of Q), ties counted half, per latent."""
    values = []
    for f_P, f_Q in zip(f_PL.cpu().T, f_QL.cpu().T):
        difference_PQ = f_P[:, None] - f_Q
        values.append((difference_PQ.sign().mean() + 1) / 2)
    return torch.stack(values)


def rank_latents(cc, f_NL, needs_N):
    """A row for each latent, the best separated first. needs_N: which prompts need a tool. The
    columns have the names of the authors' ranking.csv ("tool" and "nontool")."""
    f_PL = f_NL[needs_N]
    f_QL = f_NL[~needs_N]
    columns = {
        "cohens_d": cohens_d(f_PL, f_QL),
        "auroc": auroc(f_PL, f_QL),
        "fire_rate_tool": (f_PL > 0).float().mean(0),
        "fire_rate_nontool": (f_QL > 0).float().mean(0),
        "mean_tool": f_PL.mean(0),
        "mean_nontool": f_QL.mean(0)}
    rows = []
    for latent in columns["cohens_d"].argsort(descending=True).tolist():
        row = {"partition": partition_of(cc, latent), "feature_idx": latent}
        for name, value_L in columns.items():
            row[name] = value_L[latent].item()
        rows.append(row)
    return rows


def partition_of(cc, latent):
    """The name of the partition that holds a latent."""
    for part in cc.partitions():
        if part.latents.start <= latent < part.latents.stop:
            return part.name


def best_latents(ranking, partition):
    """The latents of a partition that are larger where a tool is needed, best separated first."""
    return [row["feature_idx"] for row in ranking
            if row["partition"] == partition and row["cohens_d"] > 0]


def choose_latents(cc, ranking, asked=None):
    """The latents asked for, or the best A-exclusive one (of a plain crosscoder the best of all).
    Raises ValueError unless they are of one partition that writes into A."""
    partition = "A-exclusive" if cc.n_a else "shared"
    best = best_latents(ranking, partition)
    latents = sorted(set(asked or best[:1]))
    homes = {partition_of(cc, latent) for latent in latents}
    if not latents:
        raise ValueError(f"no {partition} latent is larger where a tool is needed: give --latents")
    if len(homes) > 1 or homes & {None, "B-exclusive"}:
        raise ValueError(f"latents {latents}: name some of one partition that writes A, such as "
                         f"{best[:9]}")
    return latents


# ---- 3. What is added, and the control directions ------------------------------------------------
def written(cc, f_NL, latents):
    """(8) What latents write into A -> (N, D), in raw units."""
    return f_NL[:, latents] @ (cc.W_dec[latents, 0] * cc.scale[0])


def difference_of_means(v_ND, needs_N):
    """The mean over prompts that need a tool, minus the mean over those that need none -> (D,)."""
    return v_ND[needs_N].mean(0) - v_ND[~needs_N].mean(0)


def control_directions(cc, dev, others, seed=0):
    """{name: directions of length 1, (U, D)} that an effect has to beat. others: latents. The seed
    draws the random ones: the dictionary's, so that each dictionary has random ones of its own."""
    a_ND, b_ND = dev.x_NMD.unbind(1)
    gap_ND = (a_ND - b_ND)[dev.needs_N]
    rng = torch.Generator().manual_seed(seed)
    directions = {"random": torch.randn(10, a_ND.shape[1], generator=rng).to(a_ND)}
    directions["latents"] = cc.W_dec[others, 0] * cc.scale[0]
    directions["A - B"] = gap_ND.mean(0)[None]
    directions["diff of means"] = difference_of_means(a_ND, dev.needs_N)[None]
    return {name: F.normalize(d_UD) for name, d_UD in directions.items() if len(d_UD)}


# ---- 4. Measure a change beside its controls -----------------------------------------------------
class Outcome(NamedTuple):
    """What a model answers to prompts."""

    exact: list         # for each prompt that needs a tool 0 or 1, or the mean of sampled answers
    false_calls: float  # calls on prompts that need none, in percent of these answers
    answers: list       # to all prompts, texts; sampled: to all prompts, and to all again


def outcomes(run, m, prompts, v_VND):
    """[Outcome] of model m ("A" or "B") in each version: v_VND[v] is added at the last tokens. None
    is one version without a change. Answers are greedy, or S = run.samples of them are sampled."""
    s = run.settings
    times = max(1, run.samples)
    seed = 0 if run.samples else None
    texts = prompts.texts * times
    rows = prompts.rows * times
    if v_VND is not None:
        v_VND = v_VND.repeat(1, times, 1)
    versions = generate(run.models[m], run.tokenizer, texts, s.max_new, s.layer, v_VND, seed=seed)

    out = []
    for answers in versions:
        scores = [score(answer, row) for answer, row in zip(answers, rows)]
        pairs = [[each["exact"], each["called"]] for each in scores]
        exact_RN, called_RN = np.array(pairs).T.reshape(2, times, -1)
        exact = exact_RN[:, prompts.needs_N].mean(0).tolist()
        false_calls = 100 * called_RN[:, ~prompts.needs_N].mean()
        out.append(Outcome(exact, false_calls, answers))
    return out


def best_strength(run, m, prompts, v_ND, strengths):
    """The c with which c v_ND is added to model m, by dev prompts and the one-standard-error rule:

        gain(c) = exact calls - false calls, each in percent of its prompts
        the smallest c with gain(c) >= best gain - standard error of its exact calls

    The longer a vector, the more any direction does: hence the smallest that is as good as the best
    within the noise. Without the false calls a vector would win that makes the model call always.
    """
    found = outcomes(run, m, prompts, torch.stack([c * v_ND for c in strengths]))
    gain = [100 * np.mean(outcome.exact) - outcome.false_calls for outcome in found]
    exact = found[np.argmax(gain)].exact
    error = 100 * np.std(exact) / len(exact) ** .5
    return min(c for c, g in zip(strengths, gain) if g >= max(gain) - error)


def measure_change(run, m, prompts, v_ND, directions, clean, sign=1):
    """What adding v_ND to model m changes, beside controls that are as long on each prompt -> (what
    metrics.json keeps of it, the answers). clean: the Outcome without a change. sign: -1 if calls
    should fall. Then controls are subtracted, and the strongest is the one that takes most."""
    # own and controls in one go, the controls one kind after another
    length_N1 = v_ND.norm(dim=1, keepdim=True)
    controls_UND = sign * length_N1 * torch.cat(list(directions.values()))[:, None]
    own, *others = outcomes(run, m, prompts, torch.cat([v_ND[None], controls_UND]))
    kinds = [name for name, u_UD in directions.items() for _ in u_UD]

    changes = {name: [] for name in directions}
    for kind, outcome in zip(kinds, others):
        change = paired(outcome.exact, clean.exact)
        changes[kind].append({**change, "false_calls": outcome.false_calls})

    strongest = max(others, key=lambda outcome: sign * np.mean(outcome.exact))
    margin = paired(np.multiply(sign, own.exact), np.multiply(sign, strongest.exact))
    result = {
        "model": m,
        "clean": {"exact": 100 * np.mean(clean.exact), "false_calls": clean.false_calls},
        "effect": paired(own.exact, clean.exact),
        "false_calls": own.false_calls,
        "controls": changes,
        "margin": margin}
    return result, own.answers


def steer(run, latents, ranking, dev, most_rows):
    """All changes on test prompts -> (what metrics.json keeps, {change: answers}, the prompts)."""
    cc = run.cc
    few_dev = read_prompts(run, "dev", 30)  # speed: each of sixteen strengths answers them all
    test = read_prompts(run, "test", most_rows)
    dev_ND = written(cc, few_dev.f_NL, latents)
    test_ND = written(cc, test.f_NL, latents)

    # strengths, chosen on dev prompts: alpha - 1 and c
    added = [alpha - 1 for alpha in ALPHAS]
    alpha = 1 + best_strength(run, "A", few_dev, dev_ND, added)
    c = best_strength(run, "B", few_dev, dev_ND, (.25, .5, 1, 2, 4, 8))

    # what is added
    f_1L = dev.f_NL[dev.needs_N].amax(0, keepdim=True)
    maximum_ND = written(cc, f_1L, latents).expand_as(test_ND)
    changes = {
        "ablated in A": ("A", -test_ND),
        f"scaled by {alpha:g} in A": ("A", (alpha - 1) * test_ND),
        "its maximum added to B": ("B", maximum_ND),
        f"copied from A into B, x {c:g}": ("B", c * test_ND)}

    # control directions; other latents in the order of the ranking
    part = partition_of(cc, latents[0])
    others = [row["feature_idx"] for row in ranking
              if row["partition"] == part and row["feature_idx"] not in latents]
    directions = control_directions(cc, dev, others[:20], run.settings.seed)

    # clean answers, then each change
    answers = {}
    clean = {}
    results = {}
    for m in "AB":
        clean[m] = outcomes(run, m, test, None)[0]
        answers[f"clean {m}"] = clean[m].answers
    for name, (m, v_ND) in changes.items():
        sign = -1 if name == "ablated in A" else 1
        results[name], answers[name] = measure_change(
            run, m, test, v_ND, directions, clean[m], sign)

    chosen = [row for row in ranking if row["feature_idx"] in latents]
    n_needs = int(test.needs_N.sum())
    steering = {
        "latents": latents,
        "ranking": chosen,
        "rows": {"needs": n_needs, "none": len(test.rows) - n_needs},
        "changes": results}
    return steering, answers, test


# ---- 5. The table --------------------------------------------------------------------------------
def print_table(steering):
    """What steer() found, in percent and percentage points; of several controls the range of
    changes, and the most false calls."""
    for row in steering["ranking"]:
        print("latent {feature_idx}, {partition}: on dev d {cohens_d:.2f}, AUROC {auroc:.3f}, "
              "active on {fire_rate_tool:.2f} and {fire_rate_nontool:.2f}".format(**row))
    print(f"\n{'':40s}{'clean exact, %':>14s}   {'change [95 %]':22s}{'false calls, %':>20s}")

    for name, result in steering["changes"].items():
        change = "{pp:+.0f} [{lo:+.0f}, {hi:+.0f}]".format(**result["effect"])
        print(f"{name:40s}{result['clean']['exact']:14.0f}   {change:22s}"
              f"{result['false_calls']:20.0f}")

        for control, found in result["controls"].items():
            pp = [change["pp"] for change in found]
            most = max(change["false_calls"] for change in found)
            span = f"{min(pp):+.0f}" if len(pp) == 1 else f"{min(pp):+.0f} to {max(pp):+.0f}"
            title = f"    {control} ({len(found)})"
            print(f"{title:57s}{span:22s}{most:20.0f}")

        margin = "{pp:+.0f} [{lo:+.0f}, {hi:+.0f}]".format(**result["margin"])
        print(f"{'    margin over the strongest':57s}{margin}")


# ---- 6. Your own prompt --------------------------------------------------------------------------
def own_prompt(run, text):
    """A user's words in the prompt of the test row that shares most words with them. Nothing checks
    that its tools fit: they are printed."""
    rows, _ = load_prompts(run.settings.tool_texts, run.tokenizer, "test", run.longest_prompt)
    words = set(text.lower().split())

    def in_common(row):
        return len(words & set(f"{row['instruction']} {row['input']}".lower().split()))

    row = max(rows, key=in_common)
    print(f"tools: {', '.join(tool_names(row))}")
    head, tag, _ = row["input"].partition("<user>")  # ToolRL's way
    said = f"{head}<user> {text} </user>" if tag else text
    return prompt_of({**row, "input": said}, run.tokenizer)


@torch.no_grad()
def steer_own_words(run, latents, text, alphas):
    """Print answers to one prompt: A's, clean and with the latents scaled by each alpha; B's, clean
    and with what they write into A added twice. Then print the tokens of A's clean one, prompt and
    answer, at which the latents are active."""
    s = run.settings
    prompt = own_prompt(run, text)
    n_prompt = len(token_ids(run.tokenizer, prompt))
    if n_prompt > run.longest_prompt:
        raise ValueError(f"the prompt has {n_prompt} tokens: {run.longest_prompt} at most")
    x_1MD = run.vectors([prompt])
    written_1D = written(run.cc, run.cc.encode(x_1MD), latents)
    versions = [("A", f"A, alpha = {alpha:g}", alpha - 1) for alpha in (1., *alphas)]
    versions += [("B", "B", 0.), ("B", "B, twice what the latents write into A added", 2.)]
    answers = []
    for m, title, factor in versions:
        v_VND = factor * written_1D[None]
        [[answer]] = generate(run.models[m], run.tokenizer, [prompt], s.max_new, s.layer, v_VND)
        print(f"\n--- {title}\n{answer}")
        answers.append(answer)

    # read the clean answer again, without what generate() put around it (its tokens may differ
    # from those generated)
    clean = prompt + answers[0].removeprefix(answer_prefix(prompt)).removesuffix(" [cut]")
    ids_1T = torch.tensor(token_ids(run.tokenizer, [clean]), device=written_1D.device)
    x_MTD = [residual_stream(model, ids_1T, s.layer)[0] for model in run.models.values()]
    f_TL = run.cc.encode(torch.stack(x_MTD, 1))
    for latent in latents:
        print(f"\nlatent {latent} is active at tokens (those after {n_prompt} are the answer)")
        for i in f_TL[:, latent].nonzero().flatten().tolist():
            token = run.tokenizer.decode(ids_1T[0, i])
            print(f"{i + 1:5d} {token!r:20s}{f_TL[i, latent]:8.2f}")


# ---- 7. The program ------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", help="run folder (default: the newest)")
    p.add_argument("--latents", nargs="+", type=int, help="which to change, together (default: the "
                   "A-exclusive one that separates dev prompts best)")
    p.add_argument("--rows", type=at_least_one, default=40, help="test rows of each kind, "
                   "which is a row's \"kind\" or whether it needs a tool (40)")
    p.add_argument("--samples", type=at_least_one, default=0, help="score this many answers a "
                   "prompt, sampled at temperature 1 (default: one greedy answer)")
    p.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: cuda if there is one)")
    p.add_argument("--prompt", help="steer answers to these words of a user: print the texts, "
                   "and at which tokens the latents are active")
    p.add_argument("--alpha", nargs="+", type=float, help="of --prompt (default: 0, ablated)")
    args = p.parse_args(argv)
    if args.alpha and not args.prompt:
        p.error("--alpha goes with --prompt; without, strengths are chosen on dev prompts")
    return args


def main(argv=None):
    args = parse_args(argv)
    began = time.time()
    run = open_run(args.run, device=args.device)
    run.samples = args.samples
    dev = read_prompts(run, "dev")
    ranking = rank_latents(run.cc, dev.f_NL, dev.needs_N)
    latents = choose_latents(run.cc, ranking, args.latents)
    if args.prompt:
        return steer_own_words(run, latents, args.prompt, args.alpha or [0.])

    steering, answers, test = steer(run, latents, ranking, dev, args.rows)

    # the numbers, the answers (sampled: the first of each; none to controls), the ranking
    steering["seconds"] = time.time() - began
    lines = []
    for i, row in enumerate(test.rows):
        line = {name: texts[i] for name, texts in answers.items()}
        lines.append({"prompt": test.texts[i], "gold": row["output"], **line})
    kind = "_sampled" if args.samples else ""
    save_result(run.folder, f"steering{kind}", steering, lines, f"steer{kind}.jsonl")
    with atomically(run.folder / "ranking.jsonl") as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in ranking))

    print("\n{}, layer {}; test prompts: {needs} need a tool, {none} need none".format(
        run.folder, run.settings.layer, **steering["rows"]))
    print_table(steering)


if __name__ == "__main__":
    raise SystemExit(cli(main))
