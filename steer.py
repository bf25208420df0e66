"""One latent up, down and into the base: does it carry what reinforcement learning added?

Take the A-exclusive latent that best separates prompts that need a tool from prompts in the same
template that do not (on dev rows), and change it at the prompt's last token, where the answer
begins (on test rows). S are the latents that are changed, one or several:

    written_n = sum_{l in S} f_nl W_dec[l, A] scale_A        (8) what S writes into A at prompt n
    delta_n   = (alpha - 1) written_n                        (9) added to A

    down     alpha = 0 takes the latents away
    up       alpha > 1 exaggerates them: the smallest that on dev rows is as good as the best
    into B   (8) with f the latents' mean or maximum on dev prompts, added to B: one vector for all
    as in A  c written_n added to B: in proportion to A's activation, so B is given A's decision

An effect alone shows little: many directions of that length move a hesitating model. So each stands
beside directions of the same length, prompt by prompt: 10 random ones and other live latents of the
same partition, those that separate best. Two more need no dictionary, the differences of means
A - B (on prompts that need a tool) and needs - none (of A, between the two kinds of prompt). The
last is also added to B as it is used without a dictionary: the same to all prompts, or as long as
A's own vector reaches along it. The verdict is computed from exact calls alone. Beside it stand the
false calls, tool calls on prompts that need none, for a push that always makes the model call
passes too:

    no                    the effect's 95 % interval reaches 0 or the strongest random direction
    beyond random         it lies beyond both
    beyond every control  it lies beyond every other latent and both differences of means as well

    python steer.py                          # the newest run of dfc.py: two minutes
    python steer.py --thorough               # more controls, every token, plain text: four minutes
    python steer.py --prompt "Wake me up at 7:15."     # your own words: seconds

Shapes as in dfc.py: N prompts, P, Q two sets of them, M = 2 models, D width, L latents, S the
chosen latents, V versions of each answer, T tokens.
Where we leave the paper: the controls; dev and test rows apart; prompts that hold the question; the
ranking by prompts in the same template (in ranking.csv also tool texts against plain text, as in
the paper). B-exclusive latents are not steered: by the mask they write nothing into A.
"""

import argparse
import csv
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dfc import (
    answer_prefix,
    atomically,
    cli,
    hooked,
    load_texts,
    prompt_of,
    residual_stream,
    token_ids,
)
from eval_toolcall import (
    collect_both,
    generate,
    load_prompts,
    needs_tool,
    open_run,
    paired,
    save_result,
    score,
    tool_names,
)

ALPHAS = (0., 1., 1.25, 1.5, 2., 2.5, 3., 4., 6., 8., 16., 32.)


# ---- 1. Which latent? ----------------------------------------------------------------------------
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


def exclusivity(cc, x_NMD, f_NL):
    """(nu_error_L, nu_recon_L): is what a latent writes into A in B's activations too?

    Latent Scaling (arXiv 2504.02922): beta(y) = sum_n <f_n d, y_n> / sum_n |f_n d|^2 fits the
    latent's A row d to y; nu = beta of B / beta of A. y is the model's reconstruction less its
    mean (theirs: the whole of it), or its error plus what this latent put into it. In normalised
    units: in raw ones nu carries scale_B / scale_A. Only A has it: |nu_error| < .2 and |nu_recon|
    < .5. A beta may be negative, where other latents write the opposite; inf: it never fires."""
    zhat_NMD = torch.einsum("nl,lmd->nmd", f_NL, cc.W_dec) + cc.b_dec
    error_NMD = cc.normalise(x_NMD) - zhat_NMD
    d_LD = cc.W_dec[:, 0]

    def beta(y_NMD):  # times |f d|^2, which cancels in nu
        return torch.einsum("nmd,ld,nl->lm", y_NMD, d_LD, f_NL)

    put_LM = f_NL.pow(2).sum(0)[:, None] * (cc.W_dec * d_LD[:, None]).sum(2)
    error_LM = beta(error_NMD) + put_LM
    recon_LM = beta(zhat_NMD - zhat_NMD.mean(0))
    nu_error_L = error_LM[:, 1] / error_LM[:, 0]
    nu_recon_L = recon_LM[:, 1] / recon_LM[:, 0]
    return nu_error_L.nan_to_num(float("inf")), nu_recon_L.nan_to_num(float("inf"))


def rank_latents(cc, x, f):
    """Rows with the names of the authors' ranking.csv and some of ours, best separated first, of
    latents larger on the first set of a contrast; x: {"needs", "none", "tool", "plain": x_NMD}, f
    what they encode to."""
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
            row = {"contrast": f"{first}/{second}", "partition": partition_of(cc, latent),
                   "feature_idx": latent}
            for name, value_L in columns.items():
                row[name] = value_L[latent].item()
            if row["cohens_d"] > 0:
                rows.append(row)
    return rows


def partition_of(cc, latent):
    """The name of the partition that holds a latent."""
    for name, part in cc.parts().items():
        if part.start <= latent < part.stop:
            return name


@dataclass
class Prompts:
    """Prompts up to the assistant's turn, and what both models hold at their last token."""

    rows: list           # tool rows, dicts
    texts: list          # the prompts
    x_NMD: torch.Tensor  # both models' vectors
    f_NL: torch.Tensor   # the latents they encode to
    needs_N: torch.Tensor  # does the right answer call a tool?


def read_prompts(run, split, most=None):
    """The prompts of a split, at most `most` of each kind. Raises ValueError."""
    s = run.settings
    rows, texts = load_prompts(s.tool_texts, run.tokenizer, split, run.longest_prompt, most)
    x_NMD = collect_both(run.models, run.tokenizer, texts, s.layer)
    needs_N = torch.tensor([needs_tool(row) for row in rows])
    return Prompts(rows, texts, x_NMD, run.cc.encode(x_NMD), needs_N)


def first_of_each_kind(prompts, most):
    """At most `most` prompts of each kind."""
    seen = Counter()
    keep = []
    for i, row in enumerate(prompts.rows):
        kind = row.get("kind", needs_tool(row))
        if seen[kind] < most:
            keep.append(i)
        seen[kind] += 1
    rows = [prompts.rows[i] for i in keep]
    texts = [prompts.texts[i] for i in keep]
    return Prompts(rows, texts, prompts.x_NMD[keep], prompts.f_NL[keep], prompts.needs_N[keep])


@dataclass
class Survey:
    """What dev rows tell of the latents, and of directions that need no dictionary."""

    dev: Prompts                      # all dev prompts
    ranking: list                     # rows of rank_latents()
    live_L: torch.Tensor              # is a latent active on any dev prompt or dev text?
    a_minus_b_D: torch.Tensor         # mean A - mean B on prompts that need a tool
    needs_minus_none_D: torch.Tensor  # A's mean where a tool is needed - where none is
    middle_D: torch.Tensor            # between these two means


def survey_latents(run):
    """Rank the latents on dev rows. Raises ValueError where rows of a kind are missing."""
    s = run.settings
    dev = read_prompts(run, "dev")
    n_needs = int(dev.needs_N.sum())
    if not 1 < n_needs < len(dev.rows) - 1:
        raise ValueError("among dev rows two must need a tool and two must not")

    # the two contrasts: within the template, and as in the paper
    texts = load_texts(s.tool_texts, s.plain_texts, run.tokenizer, "dev", 300)
    x_NMD = collect_both(run.models, run.tokenizer, texts, s.layer)
    x = {"needs": dev.x_NMD[dev.needs_N], "none": dev.x_NMD[~dev.needs_N],
         "tool": x_NMD[:300], "plain": x_NMD[300:]}
    f = {name: run.cc.encode(x_NMD) for name, x_NMD in x.items()}

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
    """The latents of a partition that fire more where a tool is needed, best separated first."""
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
                         f"A; {partition} ones that fire more where a tool is needed: {best[:9]}")
    return latents


# ---- 2. What is added ----------------------------------------------------------------------------
def written(cc, f_NL, latents):
    """(8) What latents write into A -> (N, D), in raw units."""
    return f_NL[:, latents] @ (cc.W_dec[latents, 0] * cc.scale[0])


def delta(cc, f_NL, latents, alpha):
    """(9) What scaling latents by alpha adds to A -> (N, D), in raw units."""
    return (alpha - 1) * written(cc, f_NL, latents)


def take_away(cc, latents, along_D=None):
    """An edit for hooked(): subtract at each token what exclusive latents of A would write there if
    they survived the top k, which A alone cannot tell; along_D: its length along this direction."""
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
    """{name: directions of length 1, (n, D)} that an effect has to beat. Other latents: the live
    ones of the partition, at most most_latents, those that separate best."""
    part = cc.parts()[partition_of(cc, latents[0])]
    f_NL = survey.dev.f_NL
    d_L = cohens_d(f_NL[survey.dev.needs_N], f_NL[~survey.dev.needs_N])
    others = []
    for latent in d_L.argsort(descending=True).tolist():
        if part.start <= latent < part.stop and survey.live_L[latent] and latent not in latents:
            others.append(latent)
    return {
        "random": random_units(10, survey.a_minus_b_D),
        "latents": F.normalize(cc.W_dec[others[:most_latents], 0], dim=1),
        "A - B": F.normalize(survey.a_minus_b_D[None]),
        "needs - none": F.normalize(survey.needs_minus_none_D[None]),
    }


def as_long_as(v_ND, units):
    """{name: (n, D)} -> {name: (n, N, D)}: along each direction, as long as v at each prompt."""
    length_N1 = v_ND.norm(dim=1, keepdim=True)
    return {name: length_N1 * u_nD[:, None] for name, u_nD in units.items()}


# ---- 3. Measure ----------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What a model answers to prompts."""

    exact: list         # 0 or 1 for each prompt that needs a tool
    false_calls: float  # tool calls on prompts that need none, in percent of these
    texts: list         # the answers to all prompts


def outcomes(model, tokenizer, prompts, layer, v_VND, max_new):
    """[Outcome] of each version: v_VND[v] is added at the prompts' last tokens."""
    out = []
    keep_V = [1.] * len(v_VND)
    said = generate(model, tokenizer, prompts.texts, max_new, layer, keep_V, v_VND)
    for texts in said:
        exact = []
        called = []
        for text, row, needs in zip(texts, prompts.rows, prompts.needs_N.tolist()):
            s = score(text, row)
            if needs:
                exact.append(s["exact"])
            else:
                called.append(s["called"])
        out.append(Outcome(exact, 100 * float(np.mean(called or [0])), texts))
    return out


class Intervention(NamedTuple):
    """Something done to a model at the prompts' last tokens."""

    kind: str            # "down", "up", "into B" or "as in A"
    model: str           # "A" or "B": which is changed
    text: str            # what is done, in words
    v_ND: torch.Tensor   # what is added
    controls: dict       # {name: (n, N, D)}: what is added instead; {}: it is a control itself
    hoped: int = 1       # -1: calls should fall, +1: rise


def best_strength(run, model, prompts, unit_ND, strengths):
    """The smallest strength whose multiple of unit_ND has as many exact calls less false calls, in
    percent of their rows, as the best one less its standard error: rows are few, and the larger
    the push, the more any direction does. By exact calls alone one that calls always would win."""
    v_VND = torch.stack([strength * unit_ND for strength in strengths])
    found = outcomes(run.models[model], run.tokenizer, prompts, run.settings.layer, v_VND,
                     run.max_new)
    gain = [100 * np.mean(o.exact) - o.false_calls for o in found]
    exact = found[np.argmax(gain)].exact
    error = 100 * np.std(exact) / len(exact) ** .5  # of the best one's exact calls
    return min(c for c, g in zip(strengths, gain) if g >= max(gain) - error)


def list_interventions(run, survey, latents, dev, test, units):
    """All that is done to the models on test prompts, a line of the table each. Strengths are
    chosen on dev prompts."""
    cc = run.cc
    dev_ND = written(cc, dev.f_NL, latents)
    test_ND = written(cc, test.f_NL, latents)
    needs_SL = survey.dev.f_NL[survey.dev.needs_N]

    # what needs no dictionary: the same to all, or as long as A's own vector reaches along it
    mean_D = survey.needs_minus_none_D

    def reach(prompts):
        unit_D = F.normalize(mean_D, dim=0)
        along_N = (prompts.x_NMD[:, 0] - survey.middle_D) @ unit_D
        return along_N.relu()[:, None] * unit_D

    # strengths
    more = [alpha - 1 for alpha in ALPHAS if alpha > 1]
    copies = (.25, .5, 1, 2, 4, 8)
    alpha = 1 + best_strength(run, "A", dev, dev_ND, more)
    copy = best_strength(run, "B", dev, dev_ND, copies)
    constant = best_strength(run, "B", dev, mean_D.expand_as(dev_ND), copies)
    along = best_strength(run, "B", dev, reach(dev), copies)

    def all_prompts(f_L):  # what latents write with the same activations everywhere
        return written(cc, f_L[None], latents).expand_as(test_ND)

    def controlled(kind, model, text, v_ND, hoped=1):
        # taken away, a control is taken away too: hence the sign
        controls = as_long_as(v_ND, units)
        controls = {name: hoped * v_nND for name, v_nND in controls.items()}
        return Intervention(kind, model, text, v_ND, controls, hoped)

    return [
        controlled("down", "A", "taken away from A", -test_ND, hoped=-1),
        controlled("up", "A", f"scaled by alpha = {alpha:g} in A", (alpha - 1) * test_ND),
        controlled("into B", "B", "its mean added to B", all_prompts(needs_SL.mean(0))),
        controlled("into B", "B", "its maximum added to B", all_prompts(needs_SL.amax(0))),
        controlled("as in A", "B", f"its activation in A x {copy:g} added to B", copy * test_ND),
        Intervention("as in A", "B", f"constant needs - none x {constant:g} added to B",
                     constant * mean_D.expand_as(test_ND), {}),
        Intervention("as in A", "B", f"A along needs - none x {along:g} added to B",
                     along * reach(test), {}),
    ]


def measure(run, prompts, intervention):
    """(the outcome of an intervention, {name: [outcome of each control]})."""
    v_VND = torch.cat([intervention.v_ND[None], *intervention.controls.values()])
    model = run.models[intervention.model]
    own, *others = outcomes(model, run.tokenizer, prompts, run.settings.layer, v_VND, run.max_new)
    controls = {}
    for name, v_nND in intervention.controls.items():
        controls[name] = others[:len(v_nND)]
        others = others[len(v_nND):]
    return own, controls


def measure_every_token(run, prompts, latents, random_nD):
    """The same of latents taken away from A at every token of prompt and answer; controls are
    random directions."""
    model = run.models["A"]
    nothing_VND = torch.zeros(1, *prompts.x_NMD[:, 0].shape)
    found = []
    for along_D in (None, *random_nD):
        with hooked(model, run.settings.layer, take_away(run.cc, latents, along_D)):
            found += outcomes(model, run.tokenizer, prompts, run.settings.layer, nothing_VND,
                              run.max_new)
    return found[0], {"random": found[1:]}


@torch.no_grad()
def measure_plain_text(run, latents, random_nD, texts):
    """Change of A's cross-entropy, the mean over texts of nats a token, when latents are taken away
    at every token, beside random directions of that length."""
    model = run.models["A"]
    ids = [tokens for tokens in token_ids(run.tokenizer, texts) if len(tokens) > 1]

    def losses(edit):
        out = []
        with hooked(model, run.settings.layer, edit):
            for tokens in ids:
                ids_1T = torch.tensor([tokens], device=model.device)
                out.append(model(input_ids=ids_1T, labels=ids_1T).loss.item())
        return out

    clean = losses(lambda h: h)
    own = paired(losses(take_away(run.cc, latents)), clean, unit=1)
    controls = [paired(losses(take_away(run.cc, latents, u_D)), clean, unit=1) for u_D in random_nD]
    return {"nats": own, "random": [change["pp"] for change in controls]}


# ---- 4. Compare: intervals and verdict -----------------------------------------------------------
@dataclass
class Claim:
    """An intervention's effect beside its controls; all figures in percent, or points of it."""

    kind: str           # as in Intervention
    text: str
    effect: dict        # change of exact calls {pp, lo, hi}
    false_calls: float
    clean: dict         # before: {exact, false_calls}
    controls: dict      # {name: [{pp, lo, hi, false_calls}]}
    verdict: str


def compare(kind, text, hoped, clean, own, controls):
    """Outcomes -> the Claim."""
    effect = paired(own.exact, clean.exact)
    changes = {}
    for name, found in controls.items():
        changes[name] = [{**paired(o.exact, clean.exact), "false_calls": o.false_calls}
                         for o in found]
    before = {"exact": 100 * float(np.mean(clean.exact)), "false_calls": clean.false_calls}
    decided = verdict(effect, changes, hoped)
    if len(own.exact) < 20:
        decided = "too few rows"  # a bootstrap of a few says nothing
    return Claim(kind, text, effect, own.false_calls, before, changes, decided)


def verdict(effect, controls, hoped):
    """The verdict on an effect {pp, lo, hi} beside {name: [{pp, ...}]}; hoped -1: calls should
    fall, +1: rise. Not corrected for the number of claims."""
    if not controls:
        return "a control itself"
    least = min(hoped * effect["lo"], hoped * effect["hi"])
    beyond = {}
    for name, changes in controls.items():
        strongest = max((hoped * change["pp"] for change in changes), default=0)
        beyond[name] = least > max(0, strongest)

    if all(beyond.values()) and len(beyond) > 1:  # at every token only random ones are tried
        return "beyond every control"
    return "beyond random" if beyond["random"] else "no"


@dataclass
class Result:
    """What becomes of one latent, or a set of them; metrics.json keeps it."""

    latents: list
    rows: dict                # test prompts: {"needs", "none"}
    ranking: list             # the latents' rows of the ranking
    claims: list              # of Claim
    plain_text: dict | None   # of measure_plain_text(), with --thorough


def steer(run, survey, latents, most_rows=40, thorough=False):
    """The whole table of latents on test rows -> (Result, {what was done: answers}, prompts)."""
    dev = first_of_each_kind(survey.dev, 30)
    test = read_prompts(run, "test", most_rows)
    units = control_units(run.cc, survey, latents, 60 if thorough else 20)

    # clean answers, then each intervention
    nothing_VND = torch.zeros(1, *test.x_NMD[:, 0].shape)
    clean = {}
    for m, model in run.models.items():
        clean[m], = outcomes(model, run.tokenizer, test, run.settings.layer, nothing_VND,
                             run.max_new)
    claims = []
    texts = {}
    for todo in list_interventions(run, survey, latents, dev, test, units):
        own, controls = measure(run, test, todo)
        texts[todo.text] = own.texts
        claims.append(compare(todo.kind, todo.text, todo.hoped, clean[todo.model], own, controls))

    # at every token: what an exclusive latent reads can be told from A alone
    plain_text = None
    if thorough and max(latents) < run.cc.n_a:
        own, controls = measure_every_token(run, test, latents, units["random"])
        text = "taken away from A at every token"
        texts[text] = own.texts
        claims.append(compare("down, every token", text, -1, clean["A"], own, controls))
        s = run.settings
        plain = load_texts(s.tool_texts, s.plain_texts, run.tokenizer, "test", 60)[60:]
        plain_text = measure_plain_text(run, latents, units["random"], plain)

    n_needs = int(test.needs_N.sum())
    rows = {"needs": n_needs, "none": len(test.rows) - n_needs}
    own_rows = [row for row in survey.ranking if row["feature_idx"] in latents]
    return Result(latents, rows, own_rows, claims, plain_text), texts, test


# ---- 5. Print ------------------------------------------------------------------------------------
CONTROLS = ("random", "latents", "A - B", "needs - none")


def print_result(result, folder, layer):
    """The table; every figure in percent or percentage points."""
    names = " ".join(map(str, result.latents))
    print(f"\n{folder}, layer {layer}, latent {names}; test rows: {result.rows['needs']} that need "
          f"a tool, {result.rows['none']} that do not\n")
    print(f"{'':38s}exact calls, %                 false    changes by controls, pp (most false "
          "calls)")
    heads = "".join(f"{name:>15s}" for name in CONTROLS)
    print(f"{'':38s}clean  change, pp, 95 %     calls, %{heads}   verdict")
    for claim in result.claims:
        change = "{pp:+.0f} [{lo:+.0f}, {hi:+.0f}]".format(**claim.effect)
        cells = "".join(f"{control_cell(claim.controls.get(name)):>15s}" for name in CONTROLS)
        print(f"{claim.text:38s}{claim.clean['exact']:5.0f}  {change:20s}{claim.false_calls:10.0f}"
              f"{cells}   {claim.verdict}")
    print("verdict: does the interval of exact calls lie beyond 0 and random, or every control?")

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


# ---- 6. Your own prompt, and where a latent fires ------------------------------------------------
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
    alphas = [1., *alphas]
    f_NL = run.cc.encode(collect_both(run.models, run.tokenizer, [prompt], layer))
    v_VND = torch.stack([delta(run.cc, f_NL, latents, alpha) for alpha in alphas])
    said = generate(run.models["A"], run.tokenizer, [prompt], run.max_new, layer,
                    [1.] * len(v_VND), v_VND)
    for alpha, (answer,) in zip(alphas, said):
        print(f"\n--- alpha = {alpha:g}\n{answer}")

    # the clean answer read again, token by token
    clean = said[0][0].removeprefix(answer_prefix(prompt))
    n_prompt = len(token_ids(run.tokenizer, prompt))
    ids = token_ids(run.tokenizer, prompt + clean)
    ids_1T = torch.tensor([ids], device=f_NL.device)
    x = [residual_stream(model, ids_1T, layer)[0] for model in run.models.values()]
    f_TL = run.cc.encode(torch.stack(x, 1))
    for latent in latents:
        print(f"\nlatent {latent} fires at (answer: after {n_prompt}):")
        for i in f_TL[:, latent].nonzero()[:, 0].tolist():
            print(f"{i + 1:5d} {run.tokenizer.decode(ids[i])!r:20s}{f_TL[i, latent]:8.2f}")


# ---- 7. The program ------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", help="run folder (default: the newest)")
    p.add_argument("--preset", choices=["tiny", "paper"], help="for a crosscoder without a run: "
                   "whose models and texts")
    p.add_argument("--latents", nargs="+", type=int, help="which to change, together (default: the "
                   "A-exclusive one that separates dev rows best)")
    p.add_argument("--rows", type=int, default=40, help="test rows of each kind, which is a row's "
                   "\"kind\" or whether it needs a tool (40)")
    p.add_argument("--thorough", action="store_true", help="60 other latents as controls, not 20; "
                   "the latents taken away at every token, also from plain text")
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
    run = open_run(args.run, args.preset)
    survey = survey_latents(run)
    latents = choose_latents(run.cc, survey.ranking, args.latents)
    if args.prompt is not None:
        return steer_own_words(run, latents, args.prompt, args.alpha)

    result, texts, test = steer(run, survey, latents, args.rows, args.thorough)
    print_result(result, run.folder, run.settings.layer)

    # the table, every answer, the ranking
    lines = []
    for i, row in enumerate(test.rows):
        answers = {what: said[i] for what, said in texts.items()}
        lines.append({"prompt": test.texts[i], "gold": row["output"], **answers})
    steering = {**asdict(result), "seconds": time.time() - began}
    save_result(run.folder, "steering", steering, lines, "steer.jsonl")
    with atomically(run.folder / "ranking.csv") as part, open(part, "w", newline="") as file:
        table = csv.DictWriter(file, survey.ranking[0])
        table.writeheader()
        table.writerows(survey.ranking)


if __name__ == "__main__":
    sys.exit(cli(main))
