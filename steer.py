"""One latent up, down and into the base: does it carry what reinforcement learning added?

Take the A-exclusive latent that best separates prompts that need a tool from prompts in the same
template that do not (on dev rows), and change it at the prompt's last token, where the answer
begins (on test rows):

    delta_n = sum_{l in S} (alpha - 1) f_nl W_dec[l, A] scale_A       added to A at prompt n

    down     alpha = 0 takes the latents S away
    up       alpha > 1 exaggerates them: the smallest that on dev rows is as good as the best
    into B   c W_dec[l, A] scale_A added to B, c the latent's mean or maximum on dev prompts
    as in A  c f_nl W_dec[l, A] scale_A added to B: in proportion to A's activation on each prompt

An effect alone shows little: many directions of that length move a hesitating model. So each stands
beside directions of the same length, prompt by prompt: 10 random ones and every other live latent
of the same partition (of more than 60, those that separate best). Two more need no dictionary, the
differences of means A - B (on prompts that need a tool) and needs - none (of A). The last is also
added to B as it is used without a dictionary: the same to all prompts, or as long as A's own vector
reaches along it. The verdict is computed from exact calls alone. Beside it stand the false calls,
tool calls on prompts that need none, because a push that always makes the model call passes too:

    no                    the effect's 95 % interval reaches 0 or the strongest random direction
    beyond random         it lies beyond both
    beyond every control  it lies beyond every other latent and both differences of means as well

    python steer.py                          # the newest run of dfc.py: four minutes
    python steer.py runs/a runs/null         # beside the null: a run of A against itself
    python steer.py --prompt "Wake me up at 7:15."     # your own words: seconds

Shapes as in dfc.py: N prompts, P, Q two sets of them, M = 2 models, D width, L latents, S the
chosen latents, V versions of each answer, T tokens.
Where we leave the paper: the controls; dev and test rows apart; prompts that hold the question; the
ranking by prompts in the same template (in ranking.csv also tool texts against plain text, as in
the paper). B-exclusive latents are not steered: by the mask they write nothing into A.
"""

import argparse
import csv
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from dfc import cli, hooked, opened, prompt_of, residual, texts_of, token_ids, whole
from eval_toolcall import (generate, keep, needs_tool, open_run, pair_at, paired, rows_of, score,
                           tool_names)

ALPHAS = (0., 1., 1.25, 1.5, 2., 2.5, 3., 4., 6., 8., 16., 32.)

# ---- 1. Which latent? ----------------------------------------------------------------------------
def cohens_d(f_PL, f_QL):
    """(mean P - mean Q) / sqrt((var P + var Q) / 2) per latent. (Paper section 4, ranking.)"""
    spread = ((f_PL.double().var(0) + f_QL.double().var(0)) / 2).sqrt()
    return (f_PL.double().mean(0) - f_QL.double().mean(0)) / spread.clamp(min=1e-12)

def auroc(f_PL, f_QL):
    """P(a value of P is larger than one of Q), ties counted half, per latent."""
    pairs = ((p[:, None], q) for p, q in zip(f_PL.T, f_QL.T))
    return torch.stack([((p > q).double() + (p == q).double() / 2).mean() for p, q in pairs])

def exclusivity(cc, x_NMD, f_NL):
    """(nu_error, nu_recon), each (L,): is what a latent writes into A in B's activations too?

    Latent Scaling (arXiv 2504.02922): beta(y) = sum_n <f_n d, y_n> / sum_n |f_n d|^2 fits the
    latent's A row d to y; nu = beta of B / beta of A. y is the model's reconstruction less its
    mean (theirs: the whole of it), or its error plus what this latent put into it. In normalised
    units: in raw ones nu carries scale_B / scale_A. Only A has it: |nu_error| < .2 and |nu_recon|
    < .5. A beta may be negative, where other latents write the opposite; inf: it never fires."""
    zhat_NMD = torch.einsum("nl,lmd->nmd", f_NL, cc.W_dec) + cc.b_dec
    e_NMD, d_LD = cc.normalise(x_NMD) - zhat_NMD, cc.W_dec[:, 0]
    put_LM = f_NL.pow(2).sum(0)[:, None] * (cc.W_dec * d_LD[:, None]).sum(2)

    def beta(y_NMD):  # times |f d|^2, which cancels in nu
        return torch.einsum("nmd,ld,nl->lm", y_NMD, d_LD, f_NL)
    betas = beta(e_NMD) + put_LM, beta(zhat_NMD - zhat_NMD.mean(0))
    return [(b_LM[:, 1] / b_LM[:, 0]).nan_to_num(float("inf")) for b_LM in betas]

def ranking(cc, x, f):
    """Rows with the names of the authors' ranking.csv and some of ours, best separated first, of
    latents larger on the first set of a contrast; x: {"needs", "none", "tool", "plain": x_NMD}, f
    what they encode to."""
    rows = []
    nu_error, nu_recon = exclusivity(cc, torch.cat(list(x.values())), torch.cat(list(f.values())))
    for first, second in (("needs", "none"), ("tool", "plain")):
        p, q = f[first], f[second]
        columns = {"cohens_d": cohens_d(p, q), "auroc": auroc(p, q),
                   "fire_rate_tool": (p > 0).float().mean(0),
                   "fire_rate_nontool": (q > 0).float().mean(0),
                   "mean_tool": p.mean(0), "mean_nontool": q.mean(0),
                   "nu_error": nu_error, "nu_recon": nu_recon}
        order = columns["cohens_d"].argsort(descending=True).tolist()
        rows += [{"contrast": f"{first}/{second}", "partition": part_of(cc, i),
                  "feature_idx": i} | {n: c[i].item() for n, c in columns.items()}
                 for i in order if columns["cohens_d"][i] > 0]
    return rows

def part_of(cc, latent):
    """The name of the partition that holds a latent."""
    return next(name for name, s in cc.parts().items() if s.start <= latent < s.stop)

def specific(row):
    """Does a row of the ranking pass for a tool latent that only A has?"""
    return (row["contrast"] == "needs/none" and row["partition"] == "A-exclusive"
            and row["auroc"] >= .9 and abs(row["nu_error"]) < .2 and abs(row["nu_recon"]) < .5)

# ---- 2. Steering ---------------------------------------------------------------------------------
def delta(cc, f_NL, latents, alpha):
    """sum over the latents of (alpha - 1) f_l W_dec[l, A] -> (N, D), in raw units."""
    return (alpha - 1) * f_NL[:, latents] @ (cc.W_dec[latents, 0] * cc.scale[0])

def taken_away(cc, latents, along_D=None):
    """An edit for hooked(): subtract at each token what exclusive latents of A would write there if
    they survived the top k, which A alone cannot tell; along_D: its length along this direction."""
    def edit(h_RTD):
        z_RTD = (h_RTD.float() - cc.mean[0]) / cc.scale[0]
        f_RTS = torch.relu(z_RTD @ cc.W_enc[0][:, latents] + cc.b_enc[latents])
        wrote_RTD = f_RTS @ (cc.W_dec[latents, 0] * cc.scale[0])
        if along_D is not None:
            wrote_RTD = wrote_RTD.norm(dim=-1, keepdim=True) * along_D
        return h_RTD - wrote_RTD.to(h_RTD)
    return edit

def random_units(n, like_D):
    """(n, D) random directions of length 1, always the same."""
    g = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(n, len(like_D), generator=g), dim=1).to(like_D)

# ---- 3. The scene: a run, its models, prompts with their latents ---------------------------------
def stage(name, preset):
    """A run with what steering it needs. Raises ValueError."""
    r = open_run(name, preset)
    r.dev = place(r, "dev")
    if not 1 < sum(r.dev.needs) < len(r.dev.needs) - 1:
        raise ValueError("among dev rows two must need a tool and two must not")
    x_NMD = pair_at(r.models, r.tokenizer, texts_of(r.s, r.tokenizer, "dev", 300), r.s.layer)
    x = {"needs": r.dev.x_NMD[r.dev.needs], "none": r.dev.x_NMD[~r.dev.needs],
         "tool": x_NMD[:300], "plain": x_NMD[300:]}
    r.f = {name: r.cc.encode(x_NMD) for name, x_NMD in x.items()}
    r.ranked = ranking(r.cc, x, r.f)
    needs_MD, none_MD = x["needs"].mean(0), x["none"].mean(0)
    r.mean = {"A - B": needs_MD[0] - needs_MD[1], "needs - none": needs_MD[0] - none_MD[0]}
    r.middle = (needs_MD[0] + none_MD[0]) / 2
    return r

def place(r, split, most=None):
    """Prompts of a split, at most `most` of each kind, with their vectors and latents."""
    rows, prompts = rows_of(r, split, most)
    x_NMD = pair_at(r.models, r.tokenizer, prompts, r.s.layer)
    return argparse.Namespace(rows=rows, prompts=prompts, x_NMD=x_NMD, f_NL=r.cc.encode(x_NMD),
                              needs=torch.tensor([needs_tool(row) for row in rows]))

def outcomes(r, p, m, v_VND, everywhere=None):
    """What model m ("A", "B") does when v_VND is added at the prompt's last token, or under an edit
    at every token: for each version (exact of the rows that need a tool, false calls of the others
    in percent, texts)."""
    out = []
    for texts in generate(r.models[m], r.tokenizer, p.prompts, r.max_new, r.s.layer,
                          [1] * len(v_VND), v_VND, everywhere):
        scores = [score(text, row) for text, row in zip(texts, p.rows)]
        exact = [s["exact"] for s, needs in zip(scores, p.needs) if needs]
        false = [s["called"] for s, needs in zip(scores, p.needs) if not needs]
        out.append((exact, 100 * float(np.mean(false or [0])), texts))
    return out

# ---- 4. One latent: effects, controls, verdict ---------------------------------------------------
def controls_of(r, latents):
    """{name: directions of length 1, (n, D)} that an effect has to beat. Other latents: all live
    ones of the partition; of a part with more than 60, those that separate best."""
    part, d_L = r.cc.parts()[part_of(r.cc, latents[0])], cohens_d(r.f["needs"], r.f["none"])
    live_L = torch.cat(list(r.f.values())).gt(0).any(0)
    others = [i for i in d_L.argsort(descending=True).tolist()
              if part.start <= i < part.stop and live_L[i] and i not in latents][:60]
    return {"random": random_units(10, r.cc.b_dec[0]),
            "latents": F.normalize(r.cc.W_dec[others, 0], dim=1),
            "A - B": F.normalize(r.mean["A - B"][None]),
            "needs - none": F.normalize(r.mean["needs - none"][None])}

def judge(effect, controls, hoped):
    """The verdict on an effect {pp, lo, hi} beside {name: [{pp, ...}]}; hoped -1: calls should
    fall, +1: rise. Not corrected for the number of claims."""
    if not controls:
        return "a control itself"
    least = min(hoped * effect["lo"], hoped * effect["hi"])
    beyond = {name: least > max([0, *(hoped * c["pp"] for c in some)])
              for name, some in controls.items()}
    every = all(beyond.values()) and len(beyond) > 1  # at every token only random ones are tried
    return "beyond every control" if every else "beyond random" if beyond["random"] else "no"

def as_long(v_ND, units, sign=1):
    """{name: controls (n, N, D)}: along each unit direction, as long as v is at each prompt."""
    return {name: sign * v_ND.norm(dim=1, keepdim=True) * u_nD[:, None]
            for name, u_nD in units.items()}

def claim(r, p, m, kind, text, v_ND, controls, sign=1):
    """One row of the table: the effect of adding v_ND to model m beside controls {name: (n, N, D)}.
    sign -1: calls should fall."""
    clean, own, *others = outcomes(r, p, m, torch.cat([0 * v_ND[None], v_ND[None],
                                                       *controls.values()]))
    return verdict(kind, text, clean, own, {
        name: [others.pop(0) for _ in some] for name, some in controls.items()}, sign)

def verdict(kind, text, clean, own, others, sign):
    """The row that metrics.json keeps, from outcomes."""
    controls = {name: [paired(exact, clean[0]) | {"false_calls": false} for exact, false, _ in some]
                for name, some in others.items()}
    effect = paired(own[0], clean[0])
    return {"kind": kind, "text": text, "effect": effect, "false_calls": own[1],
            "clean": {"exact": 100 * sum(clean[0]) / len(clean[0]), "false_calls": clean[1]},
            "controls": controls, "texts": own[2], "verdict": judge(effect, controls, sign) if
            len(own[0]) >= 20 else "too few rows"}  # a bootstrap of a few says nothing

def at_every_token(r, p, latents, units):
    """The claim "down" at every token of prompt and answer, beside random directions."""
    still = torch.zeros(1, *p.x_NMD[:, 0].shape)
    clean, = outcomes(r, p, "A", still)
    own, *others = [outcomes(r, p, "A", still, taken_away(r.cc, latents, u))[0]
                    for u in (None, *units["random"])]
    return verdict("down, every token", "taken away from A at every token", clean, own,
                   {"random": others}, -1)

def best_strength(r, p, m, unit_ND, strengths):
    """The smallest strength whose multiple of unit_ND has as many exact calls less false calls, in
    percent of their rows, as the best one less its standard error: rows are few, and the larger
    the push, the more any direction does. By exact calls alone one that calls always would win."""
    found = outcomes(r, p, m, torch.stack([c * unit_ND for c in strengths]))
    gain = [100 * np.mean(exact) - false for exact, false, _ in found]
    exact = found[np.argmax(gain)][0]
    enough = max(gain) - 100 * np.std(exact) / len(exact) ** .5  # of its exact calls
    return min(c for c, g in zip(strengths, gain) if g >= enough)

def as_in_a(r, dev, p, latents, units):
    """Rows of what B does when the latents are added in proportion to their activation in A on each
    prompt, a copy of what A has decided; and what can be had without a dictionary: needs - none,
    the same to every prompt, or as long as A's own vector reaches along it beyond the middle of
    both kinds of prompt. Each has the strength that is best on dev."""
    v_D, rows = r.mean["needs - none"], []
    u_D = F.normalize(v_D, dim=0)
    ways = {"its activation in A": lambda q: delta(r.cc, q.f_NL, latents, 2),
            "constant needs - none": lambda q: v_D.expand(len(q.rows), -1),
            "A along needs - none": lambda q: (
                (q.x_NMD[:, 0] - r.middle) @ u_D).relu()[:, None] * u_D}
    for name, way in ways.items():
        c = best_strength(r, dev, "B", way(dev), [.25, .5, 1, 2, 4, 8])
        v_ND = c * way(p)
        rows.append(claim(r, p, "B", "as in A", f"{name} x {c:g} added to B", v_ND,
                          as_long(v_ND, {} if rows else units)))
    return rows

@torch.no_grad()
def on_plain_text(r, latents, units):
    """Change of A's cross-entropy, the mean over 60 plain test texts of nats a token, when latents
    are taken away at every token, beside 10 random directions of that length."""
    ids = [torch.tensor([i], device=r.cc.mean.device) for i in token_ids(
        r.tokenizer, texts_of(r.s, r.tokenizer, "test", 60)[60:])]

    def loss(edit):
        with hooked(r.models["A"], r.s.layer, edit):
            return [r.models["A"](input_ids=i, labels=i).loss.item() for i in ids if i.numel() > 1]
    clean = loss(lambda h: h)
    changes = [paired(loss(taken_away(r.cc, latents, u)), clean, unit=1)
               for u in (None, *units["random"])]
    return {"nats": changes[0], "random": [c["pp"] for c in changes[1:]]}

def one_latent(r, args, latents):
    """The table of a latent, or a set of them, on test rows -> what metrics.json keeps."""
    dev, p = place(r, "dev", 30), place(r, "test", args.rows)
    units, f_NL = controls_of(r, latents), r.dev.f_NL[r.dev.needs]
    needs = sum(p.needs.tolist())
    out = {"latents": latents, "rows": {"needs": needs, "none": len(p.rows) - needs},
           "ranking": [row for row in r.ranked if row["feature_idx"] in latents]}
    if max(latents) < r.cc.n_a:  # what an exclusive latent reads can be told from A alone
        out["plain_text"] = on_plain_text(r, latents, units)
    alpha = 1 + best_strength(r, dev, "A", delta(r.cc, dev.f_NL, latents, 2),
                              [a - 1 for a in ALPHAS if a > 1])
    tests = [("down", "A", "taken away from A", delta(r.cc, p.f_NL, latents, 0), -1),
             ("up", "A", f"scaled by alpha = {alpha:g} in A", delta(r.cc, p.f_NL, latents, alpha),
              1)]
    tests += [("into B", "B", f"its {name} added to B",
               delta(r.cc, c_L[None], latents, 2).expand(len(p.rows), -1), 1)
              for name, c_L in (("mean", f_NL.mean(0)), ("maximum", f_NL.max(0).values))]
    rows = [claim(r, p, m, kind, text, v_ND, as_long(v_ND, units, sign), sign)
            for kind, m, text, v_ND, sign in tests]
    rows += as_in_a(r, dev, p, latents, units)
    if "plain_text" in out:
        rows.append(at_every_token(r, p, latents, units))
    texts = {c["text"]: c.pop("texts") for c in rows}
    lines = [{"prompt": prompt, "gold": row["output"]} | {what: t[i] for what, t in texts.items()}
             for i, (row, prompt) in enumerate(zip(p.rows, p.prompts))]
    return out | {"alpha": alpha, "claims": rows}, lines

def chosen(r, args):
    """The latents asked for, or the best A-exclusive one on dev (of a plain crosscoder, of all)."""
    part = "A-exclusive" if r.cc.n_a else "shared"
    best = [row["feature_idx"] for row in r.ranked
            if row["contrast"] == "needs/none" and row["partition"] == part]
    latents, parts = args.latents or best[:1], r.cc.parts().items()
    home = [name for name, s in parts if {*latents} <= {*range(s.start, s.stop)}]
    if not latents or len({*latents}) < len(latents) or home in ([], ["B-exclusive"]):
        raise ValueError(f"latents {latents}: name distinct ones of one partition that writes into "
                         f"A; {part} ones that fire more where a tool is needed: {best[:9]}")
    return latents

def print_result(r, out):
    """The table; every figure in percent or percentage points."""
    names = "random", "latents", "A - B", "needs - none"
    print("\n{}, layer {}, latent {}; test rows: {needs} that need a tool, {none} that do not\n"
          .format(r.folder, r.s.layer, " ".join(map(str, out["latents"])), **out["rows"])
          + f"{'':38s}exact calls, %                 false    changes by controls, pp (most false "
          f"calls)\n{'':38s}clean  change, pp, 95 %     calls, %" + "".join(
              f"{name:>15s}" for name in names) + "   verdict")
    for c in out["claims"]:
        cells = ""
        for some in (c["controls"].get(name, []) for name in names):
            ends = [f"{end(x['pp'] for x in some):.0f}" for end in (min, max) if some]
            most = max((x["false_calls"] for x in some), default=0)
            span = "..".join(dict.fromkeys(ends)) + f" ({most:.0f})"
            cells += f"{span if some else '-':>15s}"
        change = "{pp:+.0f} [{lo:+.0f}, {hi:+.0f}]".format(**c["effect"])
        print(f"{c['text']:38s}{c['clean']['exact']:5.0f}  {change:20s}{c['false_calls']:10.0f}"
              f"{cells}   {c['verdict']}")
    print("verdict: does the interval of exact calls lie beyond 0 and random, or every control?")
    for row in out["ranking"]:
        print("dev rows, latent {feature_idx}, {contrast}: d {cohens_d:.2f}, AUROC {auroc:.3f}, "
              "fires on {fire_rate_tool:.2f} / {fire_rate_nontool:.2f}, nu_error {nu_error:.2f}, "
              "nu_recon {nu_recon:.2f}".format(**row))
    if text := out.get("plain_text"):
        print("plain text, taken away at every token: {pp:+.3f} nats [{lo:+.3f}, {hi:+.3f}]".format(
            **text["nats"]) + f", random {min(text['random']):+.3f}..{max(text['random']):+.3f}")

# ---- 5. Your own prompt, and where a latent fires ------------------------------------------------
def own_prompt(r, text):
    """The prompt of a user's words in the test row that has most words in common with them: a call
    can only be right if its tool is listed."""
    rows, _ = rows_of(r, "test")
    words = set(text.lower().split())
    row = max(rows, key=lambda row: len(words & {
        *(row["instruction"] + row["input"]).lower().split()}))
    print(f"tools: {', '.join(tool_names(row['instruction']))}")
    head, tag, _ = row["input"].partition("<user>")  # ToolRL's way
    return prompt_of(row | {"input": f"{head}<user> {text} </user>" if tag else text}, r.tokenizer)

@torch.no_grad()
def own_words(r, args, latents):
    """A's answers to one prompt, clean (alpha = 1) and steered, and the tokens of the clean one, of
    prompt and answer, at which the latents survive the top k."""
    prompt, alphas = own_prompt(r, args.prompt), [1., *args.alpha]
    f_NL = r.cc.encode(pair_at(r.models, r.tokenizer, [prompt], r.s.layer))
    v_VND = torch.stack([delta(r.cc, f_NL, latents, a) for a in alphas])
    said = generate(r.models["A"], r.tokenizer, [prompt], r.max_new, r.s.layer, [1] * len(v_VND),
                    v_VND)
    for alpha, (text,) in zip(alphas, said):
        print(f"\n--- alpha = {alpha:g}\n{text}")
    ids = token_ids(r.tokenizer, prompt + said[0][0].removeprefix(opened(prompt)))
    f_TL = r.cc.encode(torch.stack([
        residual(m, torch.tensor([ids], device=f_NL.device), r.s.layer)[0]
        for m in r.models.values()], 1))
    for latent in latents:
        print(f"\nlatent {latent} fires at (answer: after {len(token_ids(r.tokenizer, prompt))}):")
        for i in f_TL[:, latent].nonzero()[:, 0].tolist():
            print(f"{i + 1:5d} {r.tokenizer.decode(ids[i])!r:20s}{f_TL[i, latent]:8.2f}")

# ---- 6. The program ------------------------------------------------------------------------------
def main(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", help="run folder (default: the newest)")
    p.add_argument("null", nargs="?", help="a run of A against itself, to compare with")
    p.add_argument("--preset", choices=["tiny", "paper"], help="for a crosscoder without a run: "
                   "whose models and texts")
    p.add_argument("--latents", nargs="+", type=int, help="which to change, together (default: the "
                   "A-exclusive one that separates dev rows best)")
    p.add_argument("--alpha", nargs="+", type=float, default=[0.],
                   help="strengths for --prompt (0: taken away)")
    p.add_argument("--rows", type=int, default=40, help="test rows of each kind, which is a row's "
                   "\"kind\" or whether it needs a tool (40)")
    p.add_argument("--prompt", help="steer A's answer to these words of a user: print the texts, "
                   "and at which tokens the latents fire")
    args = p.parse_args(argv)
    began, r = time.time(), stage(args.run, args.preset)
    latents = chosen(r, args)
    if args.prompt is not None:
        return own_words(r, args, latents)
    ranked = {"run": r.ranked} | ({"null": stage(args.null, None).ranked} if args.null else {})
    out, lines = one_latent(r, args, latents)
    print_result(r, out)
    out["specific"] = {name: sum(map(specific, rows)) for name, rows in ranked.items()}
    for name, n in out["specific"].items():
        print(f"{name}: {n} A-exclusive latents pass as tool latents that only A has (AUROC >= .9, "
              "|nu_error| < .2, |nu_recon| < .5)")
    keep(r.folder, "steering", out | {"seconds": time.time() - began}, lines, "steer.jsonl")
    with whole(r.folder / "ranking.csv") as part, open(part, "w", newline="") as f:
        table = csv.DictWriter(f, r.ranked[0])
        table.writeheader()
        table.writerows(r.ranked)

if __name__ == "__main__":
    sys.exit(cli(main))
