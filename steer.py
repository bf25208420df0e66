"""One latent up, down and into the base: does it carry what reinforcement learning added?

Take the A-exclusive latent that best separates prompts that need a tool from prompts in the same
template that do not. Change it at the prompt's last token, where the answer begins. Count the exact
calls.

What is done. S are the latents that are changed, one or several; c is a strength:

    written_n = sum_{l in S} f_nl W_dec[l, A] scale_A        (8) what S writes into A at prompt n

    kind     into  what is added at prompt n
    down     A     (alpha - 1) written_n with alpha = 0      (9) the latents are taken away
    up       A     (alpha - 1) written_n with alpha > 1          they are exaggerated
    into B   B     written_n with one f for all prompts: the mean, or the maximum, of f on dev
                   prompts that need a tool
    as in A  B     c written_n: in proportion to f in A, so B is given A's decision

What it is compared with. Many directions move a hesitating model, so each change stands beside
controls: pushes of the same length on each prompt, along another direction:

    random        10 random directions
    latents       other live latents of the same partition, those that separate best
    A - B         the difference of the models' means on prompts that need a tool
    needs - none  the difference of A's means between the two kinds of prompt

The last needs no dictionary. It is also tried as one would use it without one. With u its unit
vector and m the point halfway between the two means:

    constant      c (needs - none) on all prompts
    A along       c max(0, <x_nA - m, u>) u: as far as A's own vector reaches along it

The margin is the effect less that of the control, of its kind, that does most on the same prompts.
As it is chosen there, it is of many equal ones the luckiest: the margin errs on the low side. The
verdict on exact calls, by bootstrap intervals over prompts:

    too few rows          fewer than 20 prompts that need a tool
    a control itself      nothing to compare with
    no                    the 95 % interval of the effect, or of its margin over random directions,
                          does not lie beyond 0
    beyond random         both do
    beyond every control  so do the margins over the three other kinds of control

A line of what is printed, shortened:

                        exact calls, %          changes by controls, pp        margin over the
                        clean  change, 95 %     random  latents  A - B  needs - none   strongest
    taken away from A      91  -90 [-96, -82]    -2..1    -2..1    -10       -91    -1 [-5, +0]

The verdict does not see false calls, tool calls on prompts that need none: they stand beside it.
The latent, alpha and c are chosen on dev rows, everything is reported on test rows.

    python steer.py                          # the newest run of dfc.py: two minutes
    python steer.py --thorough               # more controls, every token, plain text: four minutes
    python steer.py --prompt "Wake me up at 7:15."     # your own words: seconds

Shapes as in dfc.py: N prompts, P, Q two sets of them, M = 2 models, D width, L latents, S the
chosen latents, V versions of each answer, U directions, R answers in flight, T tokens.
Where we leave the paper: the controls; dev and test rows apart; prompts that hold the question; the
ranking by prompts in the same template (in ranking.csv also tool texts against plain text, as the
paper ranks). B-exclusive latents are not steered: by the mask they write nothing into A.
"""

import argparse
import csv
import math
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dfc import (
    answer_prefix,
    atomically,
    cli,
    collect_both,
    hooked,
    leave,
    load_texts,
    longest_text,
    prompt_of,
    residual_stream,
    token_ids,
)
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

CONTROLS = ("random", "latents", "A - B", "needs - none")
ALPHAS = (1.25, 1.5, 2., 2.5, 3., 4., 6., 8., 16., 32.)  # of up


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
    """The prompts of a split, at most `most` of each kind. Raises ValueError, also where fewer than
    two need a tool, or two do not."""
    s = run.settings
    rows, texts = load_prompts(s.tool_texts, run.tokenizer, split, run.longest_prompt, most)
    x_NMD = collect_both(run.models, run.tokenizer, texts, s.layer)
    needs_N = torch.tensor([needs_tool(row) for row in rows])
    if not 1 < needs_N.sum() < len(rows) - 1:
        raise ValueError(f"among {split} rows two must need a tool and two must not")
    return Prompts(rows, texts, x_NMD, run.cc.encode(x_NMD), needs_N)


# ---- 2. Which latent? ----------------------------------------------------------------------------
def cohens_d(f_PL, f_QL):
    """(mean P - mean Q) / sqrt((var P + var Q) / 2) per latent. (Paper section 4, ranking.)"""
    spread_L = ((f_PL.double().var(0) + f_QL.double().var(0)) / 2).sqrt()
    return (f_PL.double().mean(0) - f_QL.double().mean(0)) / spread_L.clamp(min=1e-12)


def auroc(f_PL, f_QL):
    """P(a value of P is larger than one of Q), ties counted half, per latent."""
    values = []
    for p, q in zip(f_PL.T, f_QL.T):
        larger = (p[:, None] > q).double()
        ties = (p[:, None] == q).double()
        values.append((larger + ties / 2).mean())
    return torch.stack(values)


def rank_latents(cc, x, f):
    """A row for each latent that is larger on the first set of a contrast, best separated first.
    x: {"needs", "none", "tool", "plain": x_NMD}; f: what they encode to. Names are those of the
    authors' ranking.csv, so that "tool" and "nontool" are a contrast's first and second set."""
    every_x_NMD = torch.cat(list(x.values()))
    every_f_NL = torch.cat(list(f.values()))
    nu_error_L, nu_recon_L = exclusivity(cc, every_x_NMD, every_f_NL)

    rows = []
    for first, second in (("needs", "none"), ("tool", "plain")):
        f_PL = f[first]
        f_QL = f[second]
        columns = {
            "cohens_d": cohens_d(f_PL, f_QL),
            "auroc": auroc(f_PL, f_QL),
            "fire_rate_tool": (f_PL > 0).float().mean(0),
            "fire_rate_nontool": (f_QL > 0).float().mean(0),
            "mean_tool": f_PL.mean(0),
            "mean_nontool": f_QL.mean(0),
            "nu_error": nu_error_L,
            "nu_recon": nu_recon_L,
        }

        for latent in columns["cohens_d"].argsort(descending=True).tolist():
            if not columns["cohens_d"][latent] > 0:  # nor is that of a single text, nan
                break
            row = {"contrast": f"{first}/{second}", "partition": partition_of(cc, latent),
                   "feature_idx": latent}
            for name, value_L in columns.items():
                row[name] = value_L[latent].item()
            rows.append(row)
    return rows


def partition_of(cc, latent):
    """The name of the partition that holds a latent."""
    for name, part in cc.parts().items():
        if part.start <= latent < part.stop:
            return name


@dataclass
class Survey:
    """What dev rows tell of the latents, and of directions that need no dictionary."""

    dev: Prompts                      # all dev prompts
    ranking: list                     # rows of rank_latents()
    live_L: torch.Tensor              # is a latent active on any dev prompt or dev text?
    a_minus_b_D: torch.Tensor         # mean A - mean B on prompts that need a tool
    needs_minus_none_D: torch.Tensor  # A's mean where a tool is needed - where none is
    middle_D: torch.Tensor            # halfway between these two means


def survey_latents(run):
    """Rank the latents on dev rows. Raises ValueError."""
    s = run.settings
    dev = read_prompts(run, "dev")

    # two contrasts: prompts in the same template, and tool texts against plain text
    tool_texts, plain_texts = load_texts(
        s.tool_texts, s.plain_texts, run.tokenizer, "dev", 300, run.folder.parent / "cache")
    x = {
        "needs": dev.x_NMD[dev.needs_N],
        "none": dev.x_NMD[~dev.needs_N],
        "tool": collect_both(run.models, run.tokenizer, tool_texts, s.layer),
        "plain": collect_both(run.models, run.tokenizer, plain_texts, s.layer),
    }
    f = {name: run.cc.encode(x_PMD) for name, x_PMD in x.items()}

    needs_MD = x["needs"].mean(0)
    none_MD = x["none"].mean(0)
    return Survey(
        dev=dev,
        ranking=rank_latents(run.cc, x, f),
        live_L=torch.cat(list(f.values())).gt(0).any(0),
        a_minus_b_D=needs_MD[0] - needs_MD[1],
        needs_minus_none_D=needs_MD[0] - none_MD[0],
        middle_D=(needs_MD[0] + none_MD[0]) / 2,
    )


def best_latents(ranking, partition):
    """The latents of a partition that are larger where a tool is needed, best separated first."""
    return [row["feature_idx"] for row in ranking
            if row["contrast"] == "needs/none" and row["partition"] == partition]


def choose_latents(cc, ranking, asked=None):
    """The latents asked for, or the best A-exclusive one on dev (of a plain crosscoder, of all).
    Raises ValueError unless they are distinct and of one partition that writes into A."""
    partition = "A-exclusive" if cc.n_a else "shared"
    best = best_latents(ranking, partition)
    latents = asked or best[:1]
    homes = {partition_of(cc, latent) for latent in latents}
    if len(homes) != 1 or homes & {None, "B-exclusive"} or len(set(latents)) < len(latents):
        raise ValueError(f"latents {latents}: name distinct ones of one partition that writes into "
                         f"A; {partition} ones that are larger where a tool is needed: "
                         f"{best[:9] or 'none'}")
    return latents


# ---- 3. What is added ----------------------------------------------------------------------------
def written(cc, f_NL, latents):
    """(8) What latents write into A -> (N, D), in raw units."""
    return f_NL[:, latents] @ (cc.W_dec[latents, 0] * cc.scale[0])


def delta(cc, f_NL, latents, alpha):
    """(9) What scaling latents by alpha adds to A -> (N, D), in raw units."""
    return (alpha - 1) * written(cc, f_NL, latents)


def take_away(cc, latents, along_D=None):
    """An edit for hooked(): subtract at every token what exclusive latents of A write there, as if
    all survived the top k: whether they do depends on B's vector too. along_D: subtract as much
    along this direction instead."""
    def edit(h_RTD):
        z_RTD = (h_RTD.float() - cc.mean[0]) / cc.scale[0]
        f_RTS = torch.relu(z_RTD @ cc.W_enc[0][:, latents] + cc.b_enc[latents])
        written_RTD = f_RTS @ (cc.W_dec[latents, 0] * cc.scale[0])
        if along_D is not None:
            written_RTD = written_RTD.norm(dim=-1, keepdim=True) * along_D
        return h_RTD - written_RTD.to(h_RTD)
    return edit


def random_units(n, like_D):
    """(n, D) random directions of length 1, always the same."""
    rng = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(n, len(like_D), generator=rng), dim=1).to(like_D)


def control_units(cc, survey, latents, most_latents):
    """{name: directions of length 1, (U, D)} that an effect has to beat. Other latents: the live
    ones of the partition, at most most_latents, those that separate best."""
    part = cc.parts()[partition_of(cc, latents[0])]
    f_NL = survey.dev.f_NL
    d_L = cohens_d(f_NL[survey.dev.needs_N], f_NL[~survey.dev.needs_N])  # also below 0
    others = []
    for latent in d_L.argsort(descending=True).tolist():
        if part.start <= latent < part.stop and survey.live_L[latent] and latent not in latents:
            others.append(latent)
    directions = {
        "random": random_units(10, survey.a_minus_b_D),
        "latents": cc.W_dec[others[:most_latents], 0] * cc.scale[0],
        "A - B": survey.a_minus_b_D[None],
        "needs - none": survey.needs_minus_none_D[None],
    }
    # a direction of length 0, such as A - B where B is A, is no control
    return {name: F.normalize(d_UD[d_UD.norm(dim=1) > 0]) for name, d_UD in directions.items()}


def as_long_as(v_ND, units):
    """{name: (U, D)} -> {name: (U, N, D)}: along each direction, of v's length at each prompt."""
    length_N1 = v_ND.norm(dim=1, keepdim=True)
    return {name: length_N1 * u_UD[:, None] for name, u_UD in units.items()}


def reach_along(x_ND, direction_D, middle_D):
    """A push along a direction, as far as each vector reaches along it beyond a middle, which is
    the threshold of a linear probe -> (N, D)."""
    unit_D = F.normalize(direction_D, dim=0)
    reach_N = ((x_ND - middle_D) @ unit_D).relu()
    return reach_N[:, None] * unit_D


# ---- 4. Measure ----------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What a model answers to prompts."""

    exact: list         # 0 or 1 for each prompt that needs a tool
    false_calls: float  # well-formed calls on prompts that need none, in percent of these
    answers: list       # to all prompts, texts


def outcomes(model, tokenizer, prompts, layer, v_VND, max_new):
    """[Outcome] of each version: v_VND[v] is added at the prompts' last tokens."""
    out = []
    keep_V = [1.] * len(v_VND)
    for answers in generate(model, tokenizer, prompts.texts, max_new, layer, keep_V, v_VND):
        exact = []
        called = []
        for answer, row, needs in zip(answers, prompts.rows, prompts.needs_N.tolist()):
            s = score(answer, row)
            if needs:
                exact.append(s["exact"])
            else:
                called.append(s["called"])
        out.append(Outcome(exact, 100 * float(np.mean(called or [0])), answers))
    return out


def outcomes_in(run, m, prompts, v_VND):
    """outcomes() in model m ("A" or "B") of a run."""
    s = run.settings
    return outcomes(run.models[m], run.tokenizer, prompts, s.layer, v_VND, s.max_new)


def clean_outcomes(run, prompts):
    """{"A", "B": the Outcome when nothing is added}."""
    nothing_VND = torch.zeros(1, len(prompts.texts), 1)
    return {m: outcomes_in(run, m, prompts, nothing_VND)[0] for m in "AB"}


class Intervention(NamedTuple):
    """Something done to a model at the prompts' last tokens."""

    kind: str            # "down", "up", "into B" or "as in A"
    m: str               # "A" or "B": the model that is changed
    text: str            # what is done, in words
    v_ND: torch.Tensor   # what is added
    controls: dict       # {name: (U, N, D)}: what is added instead; {}: it is a control itself
    sign: int = 1        # -1: calls should fall, +1: rise; controls are pushed the same way


def best_strength(run, m, prompts, unit_ND, strengths):
    """The strength c of a push c unit_ND into model m ("A" or "B"), by dev prompts and the
    one-standard-error rule:

        gain(c) = exact calls - false calls, each in percent of its prompts
        the smallest c with gain(c) >= best gain - standard error of the best one's exact calls

    The larger the push, the more any direction does: hence the smallest. By exact calls alone, a
    push would win that makes the model call always."""
    v_VND = torch.stack([c * unit_ND for c in strengths])
    found = outcomes_in(run, m, prompts, v_VND)
    gain = [100 * np.mean(outcome.exact) - outcome.false_calls for outcome in found]
    exact = found[np.argmax(gain)].exact
    error = 100 * np.std(exact) / len(exact) ** .5
    return min(c for c, g in zip(strengths, gain) if g >= max(gain) - error)


def with_controls(kind, m, text, v_ND, units, sign=1):
    """An intervention beside pushes as long. Where a latent is taken away, so are the controls:
    hence the sign."""
    controls = as_long_as(v_ND, units)
    controls = {name: sign * v_UND for name, v_UND in controls.items()}
    return Intervention(kind, m, text, v_ND, controls, sign)


class Strengths(NamedTuple):
    """How strong, chosen on dev prompts."""

    alpha: float     # of up
    c: float         # of "as in A"
    constant: float  # of needs - none, the same for all prompts
    along: float     # of needs - none, as far as A reaches along it


def choose_strengths(run, survey, latents, few_dev):
    """The Strengths. Six of each are tried in B, those of ALPHAS in A."""
    in_b = (.25, .5, 1, 2, 4, 8)
    added = [alpha - 1 for alpha in ALPHAS]  # (9): alpha - 1 times (8) is added
    written_ND = written(run.cc, few_dev.f_NL, latents)
    constant_ND = survey.needs_minus_none_D.expand_as(written_ND)
    along_ND = reach_along(few_dev.x_NMD[:, 0], survey.needs_minus_none_D, survey.middle_D)
    return Strengths(
        alpha=1 + best_strength(run, "A", few_dev, written_ND, added),
        c=best_strength(run, "B", few_dev, written_ND, in_b),
        constant=best_strength(run, "B", few_dev, constant_ND, in_b),
        along=best_strength(run, "B", few_dev, along_ND, in_b),
    )


def list_interventions(cc, survey, latents, test, strengths, units):
    """All that is done to the models on test prompts, each a line of the table."""
    written_ND = written(cc, test.f_NL, latents)

    # one f for all prompts, the mean or maximum of dev prompts
    f_PL = survey.dev.f_NL[survey.dev.needs_N]
    mean_ND = written(cc, f_PL.mean(0, keepdim=True), latents).expand_as(written_ND)
    maximum_ND = written(cc, f_PL.amax(0, keepdim=True), latents).expand_as(written_ND)

    # without a dictionary
    constant_ND = survey.needs_minus_none_D.expand_as(written_ND)
    along_ND = reach_along(test.x_NMD[:, 0], survey.needs_minus_none_D, survey.middle_D)

    return [
        with_controls("down", "A", "taken away from A", delta(cc, test.f_NL, latents, 0), units,
                      sign=-1),
        with_controls("up", "A", f"scaled by alpha = {strengths.alpha:g} in A",
                      delta(cc, test.f_NL, latents, strengths.alpha), units),
        with_controls("into B", "B", "its mean added to B", mean_ND, units),
        with_controls("into B", "B", "its maximum added to B", maximum_ND, units),
        with_controls("as in A", "B", f"its activation in A x {strengths.c:g} added to B",
                      strengths.c * written_ND, units),
        Intervention("as in A", "B", f"constant needs - none x {strengths.constant:g} added to B",
                     strengths.constant * constant_ND, {}),
        Intervention("as in A", "B", f"A along needs - none x {strengths.along:g} added to B",
                     strengths.along * along_ND, {}),
    ]


def measure(run, prompts, intervention):
    """(the outcome of an intervention, {name: [outcome of each control]})."""
    v_VND = torch.cat([intervention.v_ND[None], *intervention.controls.values()])
    own, *others = outcomes_in(run, intervention.m, prompts, v_VND)
    controls = {}
    for name, v_UND in intervention.controls.items():
        controls[name] = others[:len(v_UND)]
        others = others[len(v_UND):]
    return own, controls


def measure_every_token(run, prompts, latents, random_UD):
    """measure() of latents taken away from A at every token of prompt and answer; controls are
    random directions."""
    nothing_VND = torch.zeros(1, len(prompts.texts), 1)
    found = []
    for along_D in (None, *random_UD):
        with hooked(run.models["A"], run.settings.layer, take_away(run.cc, latents, along_D)):
            found += outcomes_in(run, "A", prompts, nothing_VND)
    return found[0], {"random": found[1:]}


@torch.no_grad()
def measure_plain_text(run, latents, random_UD, texts):
    """Change of A's cross-entropy, the mean over texts of nats a token, when latents are taken away
    at every token, beside random directions of that length ("pp" are nats here)."""
    model = run.models["A"]
    longest = longest_text(model)
    ids = [tokens[:longest] for tokens in token_ids(run.tokenizer, texts) if len(tokens) > 1]

    def losses(edit):
        out = []
        with hooked(model, run.settings.layer, edit):
            for tokens in ids:
                ids_1T = torch.tensor([tokens], device=model.device)
                out.append(model(input_ids=ids_1T, labels=ids_1T).loss.item())
        return out

    clean = losses(lambda h: h)
    own = paired(losses(take_away(run.cc, latents)), clean, unit=1)
    controls = [paired(losses(take_away(run.cc, latents, u_D)), clean, unit=1) for u_D in random_UD]
    return {"nats": own, "random": [change["pp"] for change in controls]}


# ---- 5. Compare: intervals and verdict -----------------------------------------------------------
@dataclass
class Claim:
    """An intervention's effect beside its controls; all figures in percent, or points of it."""

    kind: str           # of the Intervention, or "down, every token"
    text: str
    sign: int
    effect: dict        # change of exact calls {pp, lo, hi}
    false_calls: float
    clean: dict         # before: {exact, false_calls}
    controls: dict      # {name: [{pp, lo, hi, false_calls}]}
    margins: dict       # {name: over the strongest such control {pp, lo, hi}; > 0: beyond it}
    verdict: str


def compare(kind, text, sign, clean, own, controls):
    """Outcomes -> the Claim."""
    changes = {}
    margins = {}
    for name, found in controls.items():
        changes[name] = [{**paired(o.exact, clean.exact), "false_calls": o.false_calls}
                         for o in found]
        if found:
            strongest = max(found, key=lambda outcome: sign * np.mean(outcome.exact))
            margins[name] = paired(sign * np.array(own.exact), sign * np.array(strongest.exact))

    effect = paired(own.exact, clean.exact)
    before = {"exact": 100 * float(np.mean(clean.exact)), "false_calls": clean.false_calls}
    decided = verdict(effect, margins, sign)
    if len(own.exact) < 20:
        decided = "too few rows"  # a bootstrap of a few says nothing
    return Claim(kind, text, sign, effect, own.false_calls, before, changes, margins, decided)


def verdict(effect, margins, sign):
    """The verdict on an effect and its margins {name: ...}, each {pp, lo, hi}; sign -1: calls
    should fall, +1: rise. A control that was not tried is not beaten. Not corrected for the number
    of claims."""
    if not margins:
        return "a control itself"
    beyond_0 = min(sign * effect["lo"], sign * effect["hi"]) > 0
    beyond = [name for name, margin in margins.items() if margin["lo"] > 0]
    if not beyond_0 or "random" not in beyond:
        return "no"
    every = {"random", "latents", "A - B", "needs - none"}
    return "beyond every control" if every <= set(beyond) else "beyond random"


@dataclass
class Result:
    """What becomes of one latent, or a set of them; metrics.json keeps the last one."""

    latents: list
    rows: dict                # test prompts: {"needs", "none"}
    ranking: list             # the latents' rows of the ranking
    claims: list              # of Claim
    plain_text: dict | None   # of measure_plain_text(), with --thorough


def steer(run, survey, latents, most_rows=40, thorough=False):
    """The whole table of latents on test rows -> (Result, {what was done: answers}, prompts)."""
    test = read_prompts(run, "test", most_rows)
    units = control_units(run.cc, survey, latents, 60 if thorough else 20)
    strengths = choose_strengths(run, survey, latents, read_prompts(run, "dev", 30))
    interventions = list_interventions(run.cc, survey, latents, test, strengths, units)

    # clean answers, then each intervention
    clean = clean_outcomes(run, test)
    answers = {f"clean {m}": outcome.answers for m, outcome in clean.items()}
    claims = []
    for push in interventions:
        own, controls = measure(run, test, push)
        answers[push.text] = own.answers
        claims.append(compare(push.kind, push.text, push.sign, clean[push.m], own, controls))

    # at every token: what an exclusive latent reads can be told from A alone
    plain_text = None
    if thorough and max(latents) < run.cc.n_a:
        own, controls = measure_every_token(run, test, latents, units["random"])
        text = "taken away from A at every token"
        answers[text] = own.answers
        claims.append(compare("down, every token", text, -1, clean["A"], own, controls))
        s = run.settings
        _, plain = load_texts(s.tool_texts, s.plain_texts, run.tokenizer, "test", 60,
                              run.folder.parent / "cache")
        plain_text = measure_plain_text(run, latents, units["random"], plain)

    n_needs = int(test.needs_N.sum())
    rows = {"needs": n_needs, "none": len(test.rows) - n_needs}
    own_rows = [row for row in survey.ranking if row["feature_idx"] in latents]
    return Result(latents, rows, own_rows, claims, plain_text), answers, test


# ---- 6. Print ------------------------------------------------------------------------------------
def print_result(result, folder, layer):
    """The table; every figure in percent or percentage points."""
    names = " ".join(map(str, result.latents))
    print(f"\n{folder}, layer {layer}, latent {names}; test rows: {result.rows['needs']} that need "
          f"a tool, {result.rows['none']} that do not\n")
    print(f"{'':39s}exact calls, %                 false    changes by controls, pp (most false "
          f"calls){'':20s}margin over the")
    heads = "".join(f"{name:>16s}" for name in CONTROLS)
    print(f"{'':39s}clean  change, pp, 95 %     calls, %{heads}   strongest, 95 %     verdict")
    for claim in result.claims:
        change = "{pp:+.0f} [{lo:+.0f}, {hi:+.0f}]".format(**claim.effect)
        cells = "".join(f"{control_cell(claim.controls.get(name)):>16s}" for name in CONTROLS)
        print(f"{claim.text:39s}{claim.clean['exact']:5.0f}  {change:20s}{claim.false_calls:10.0f}"
              f"{cells}   {margin_cell(claim.margins):20s}{claim.verdict}")
    print("verdict: do the intervals of the change and of its margins over controls lie beyond 0?")

    for row in result.ranking:
        print("dev rows, latent {feature_idx}, {contrast}: d {cohens_d:.2f}, AUROC {auroc:.3f}, "
              "fires on {fire_rate_tool:.2f} / {fire_rate_nontool:.2f}, nu_error {nu_error:.2f}, "
              "nu_recon {nu_recon:.2f}".format(**row))
    if result.plain_text:
        own = "{pp:+.3f} nats [{lo:+.3f}, {hi:+.3f}]".format(**result.plain_text["nats"])
        random = result.plain_text["random"]
        print(f"plain text, taken away at every token: {own}, random {min(random):+.3f}.."
              f"{max(random):+.3f}")


def control_cell(changes):
    """The range of some controls' changes, and their most false calls."""
    if not changes:
        return "-"
    pp = [change["pp"] for change in changes]
    most = max(change["false_calls"] for change in changes)
    low, high = f"{min(pp):.0f}", f"{max(pp):.0f}"
    return f"{low} ({most:.0f})" if low == high else f"{low}..{high} ({most:.0f})"


def margin_cell(margins):
    """The margin over the strongest control."""
    if not margins:
        return "-"
    smallest = min(margins.values(), key=lambda margin: margin["pp"])
    return "{pp:+.0f} [{lo:+.0f}, {hi:+.0f}]".format(**smallest)


# ---- 7. Your own prompt, and where a latent fires ------------------------------------------------
def own_prompt(run, text):
    """The prompt of a user's words in the test row that has most words in common with them: a call
    can only be right if its tool is listed."""
    rows, _ = load_prompts(run.settings.tool_texts, run.tokenizer, "test", run.longest_prompt)
    words = set(text.lower().split())

    def in_common(row):
        return len(words & set((row["instruction"] + row["input"]).lower().split()))

    row = max(rows, key=in_common)
    print(f"tools: {', '.join(tool_names(row['instruction']))}")
    head, tag, _ = row["input"].partition("<user>")  # ToolRL's way
    said = f"{head}<user> {text} </user>" if tag else text
    return prompt_of({**row, "input": said}, run.tokenizer)


@torch.no_grad()
def steer_own_words(run, latents, text, alphas):
    """Print A's answers to one prompt, clean and with the latents scaled by each alpha, and the
    tokens of the clean one, of prompt and answer, at which the latents survive the top k."""
    layer = run.settings.layer
    prompt = own_prompt(run, text)
    n_prompt = len(token_ids(run.tokenizer, prompt))
    if n_prompt > run.longest_prompt:
        raise ValueError(f"a prompt of {n_prompt} tokens: {run.longest_prompt} at most")
    alphas = [1., *alphas]
    f_NL = run.cc.encode(collect_both(run.models, run.tokenizer, [prompt], layer))
    v_VND = torch.stack([delta(run.cc, f_NL, latents, alpha) for alpha in alphas])
    said = generate(run.models["A"], run.tokenizer, [prompt], run.settings.max_new, layer,
                    [1.] * len(v_VND), v_VND)
    for alpha, (answer,) in zip(alphas, said):
        print(f"\n--- alpha = {alpha:g}\n{answer}")

    # the clean answer read again, token by token
    clean = said[0][0].removeprefix(answer_prefix(prompt))
    ids = token_ids(run.tokenizer, prompt + clean)
    ids_1T = torch.tensor([ids], device=f_NL.device)
    x = [residual_stream(model, ids_1T, layer)[0] for model in run.models.values()]
    f_TL = run.cc.encode(torch.stack(x, 1))
    for latent in latents:
        print(f"\nlatent {latent} fires at (answer: after {n_prompt}):")
        for i in f_TL[:, latent].nonzero()[:, 0].tolist():
            print(f"{i + 1:5d} {run.tokenizer.decode(ids[i])!r:20s}{f_TL[i, latent]:8.2f}")


# ---- 8. Latent Scaling: two columns of ranking.csv, which no verdict uses -----------------------
def exclusivity(cc, x_NMD, f_NL):
    """(nu_error_L, nu_recon_L): is what a latent writes into A in B's activations too?

    Latent Scaling (arXiv 2504.02922): how much of the latent's A row d is in a model's y?

        beta_m(y) = sum_n <f_n d, y_nm> / sum_n |f_n d|^2           nu = beta_B / beta_A
        nu_recon:   y = zhat less its mean over prompts (theirs: zhat as it is)
        nu_error:   y = z - zhat + f_n W_dec[l, m], the error without this latent

    Both are 0 for what only A has and 1 for what both have alike; |nu_error| < .2 and |nu_recon| <
    .5 count as A's own. In normalised units, for in raw ones nu carries scale_B / scale_A. A beta
    is negative where other latents write the opposite; +-1e9 stands for a division by zero."""
    zhat_NMD = cc.decode_normalised(f_NL)
    error_NMD = cc.normalise(x_NMD) - zhat_NMD
    d_LD = cc.W_dec[:, 0]

    def numerator(y_NMD):  # of beta; the denominator cancels in nu
        return torch.einsum("nmd,ld,nl->lm", y_NMD, d_LD, f_NL)

    # in nu_error y is another one for each latent: its own part of the numerator is added after,
    # sum_n <f_n d, f_n W_dec[l, m]> = sum_n f_n^2 <d, W_dec[l, m]>
    own_LM = f_NL.pow(2).sum(0)[:, None] * (cc.W_dec * d_LD[:, None]).sum(2)
    error_LM = numerator(error_NMD) + own_LM
    recon_LM = numerator(zhat_NMD - zhat_NMD.mean(0))

    nu_error_L, nu_recon_L = (b_LM[:, 1] / b_LM[:, 0] for b_LM in (error_LM, recon_LM))
    return nu_error_L.nan_to_num(1e9, 1e9, -1e9), nu_recon_L.nan_to_num(1e9, 1e9, -1e9)


# ---- 9. The program ------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", help="run folder (default: the newest)")
    p.add_argument("--latents", nargs="+", type=int, help="which to change, together (default: the "
                   "A-exclusive one that separates dev rows best)")
    p.add_argument("--rows", type=at_least_one, default=40, help="test rows of each kind, "
                   "which is a row's \"kind\" or whether it needs a tool (40)")
    p.add_argument("--thorough", action="store_true", help="60 other latents as controls, not 20; "
                   "exclusive latents taken away at every token, also from plain text")
    p.add_argument("--prompt", help="steer A's answer to these words of a user: print the texts, "
                   "and at which tokens the latents fire")
    p.add_argument("--alpha", nargs="+", type=float, help="strengths for --prompt (0: taken away)")
    args = p.parse_args(argv)
    if args.alpha and args.prompt is None:
        raise ValueError("--alpha goes with --prompt; without, strengths are chosen on dev rows")
    args.alpha = args.alpha or [0.]
    if not all(map(math.isfinite, args.alpha)):
        raise ValueError("--alpha takes finite numbers")
    return args


def main(argv=None):
    args = parse_args(argv)
    began = time.time()
    run = open_run(args.run)
    survey = survey_latents(run)
    latents = choose_latents(run.cc, survey.ranking, args.latents)
    if args.prompt is not None:
        return steer_own_words(run, latents, args.prompt, args.alpha)

    result, answers, test = steer(run, survey, latents, args.rows, args.thorough)
    print_result(result, run.folder, run.settings.layer)

    # the figures; the answers, less those to controls; the ranking
    lines = []
    for i, row in enumerate(test.rows):
        said = {what: texts[i] for what, texts in answers.items()}
        lines.append({"prompt": test.texts[i], "gold": row["output"], **said})
    steering = {**asdict(result), "seconds": time.time() - began}
    save_result(run.folder, "steering", steering, lines, "steer.jsonl")
    with atomically(run.folder / "ranking.csv") as part, open(part, "w", newline="") as file:
        table = csv.DictWriter(file, list(survey.ranking[0]) if survey.ranking else [])
        table.writeheader()
        table.writerows(survey.ranking)


if __name__ == "__main__":
    leave(cli(main))
