"""One latent up, down and into the base: does it carry what reinforcement learning added?

Take the A-exclusive latent that best separates prompts that need a tool from prompts that do not
(on dev rows), and change it at the prompt's last token (on test rows), where the answer begins:

    delta_n = sum_{l in S} (alpha - 1) f_nl W_dec[l, m]       added to model m, prompt n, raw units

    m is the latents' own model; alpha = 1 changes nothing, alpha = 0 takes the latents S away,
    above 1 exaggerates them. Into the other model goes c W_dec[l, m], with c the latent's mean or
    maximum on dev prompts, or a multiple of the maximum that does best there.

An effect alone shows little: many directions of that length break an answer. So each stands beside
other directions of the same length: 10 random ones, 10 other live latents of the same partition
(other tool latents among them, if there are any), and two that need no dictionary, the differences
of means A - B and needs - none. Strengths are chosen on dev rows for the latent, not for its
controls. The verdict is computed, one for each claim: no, beyond random, beyond every control.

    python steer.py                                        # the newest run
    python steer.py --latents 42 --alpha 0 --prompt "..."  # your own latents, strength and prompt
    python steer.py --monitor "..."                        # where in a text does the latent fire?
    python steer.py --grid                                 # extras/grid.py: how many, how strong?

A B-exclusive latent can hold the same difference with its sign flipped ("B lacks this"): then it is
taken away from B, and its B direction is added to A. Both kinds go through the same code.

Shapes as in dfc.py: N prompts, M = 2 models, D width, L latents, S the chosen latents, V versions
of each answer, T tokens. Throughout, s is a scene (one run with its models: stage) and p are
prompts placed in it (their vectors, latents and prefixes: place). "Needs:" in a docstring: what to
copy along with the piece.
Where we leave the paper: controls, dev and test rows apart, prompts that hold the question, and the
ranking by prompts in the same template; the paper contrasts tool texts with plain text (in
ranking.csv too). Left out on purpose: scaling latents at more than one layer at once.
"""

import argparse
import contextlib
import csv
import io
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from dfc import (CONTRASTS, NAMES, Parser, Problem, blocks, cli, gather, number, rank_latents,
                 read_rows, residuals, software, split_of, write)
from eval_toolcall import (MAX_NEW, add_metrics, answer, edit_with, generate, load_both, open_run,
                           open_runs, opened, pair_vectors, paired, patch, prefill,
                           print_versions, prompt_of, read_json, read_split, room, score, summary,
                           write_rows)

# ---------------------------------------------------------------------------------------------
# 1. Which latents? Ranking and exclusivity
# ---------------------------------------------------------------------------------------------

ALPHAS = (0., 1., 2., 4., 6., 16., 32., 64.)

LIMITS = {"auroc": .9, "nu_error": .2, "nu_recon": .5}  # of a tool latent that only A has


def part_of(cc, latents):
    """The partition that holds all of these latents; "shared" where they are of several."""
    return next((name for name, part in cc.partitions().items()
                 if all(part.start <= i < part.stop for i in latents)), "shared")


def home_of(cc, latents):
    """The model whose latents these are: 0 = A, also for shared ones; 1 = B. Needs: part_of."""
    return int(part_of(cc, latents) == "b_excl")


def in_b(cc):
    """(L,) whether B is a latent's home: true of the B-exclusive ones."""
    every = torch.arange(len(cc.b_enc))
    return (every >= cc.n_a) & (every < cc.n_a + cc.n_b)


def raw_decoder(cc):
    """W_dec (L, M, D) in raw activation units."""
    return (cc.decoder() * cc.scale[:, None]).detach()


def exclusivity(cc, x_NMD, f_NL):
    """[nu_error, nu_recon], each (L,): is what a latent writes into A in B's activations too?

    Latent Scaling (arXiv 2504.02922): beta(y) = sum_n <f d, y_n> / sum_n |f d|^2 fits the latent's
    A direction d to y; nu = beta of B / beta of A (for a B-exclusive latent the other way round). y
    is the reconstruction less the training mean, or the error plus what this latent put into it:
    nothing, where it may not write. Specific to its model: |nu_error| < .2, |nu_recon| < .5; inf
    where the latent never fires. A beta may be negative: then the shared latents write the
    opposite, and nu compares how much of it each model holds (the embedded pair's tool latent: -0.7
    in A, -2.6 in B, nu_recon 3.9). Needs: in_b, raw_decoder."""
    W_LMD, xhat_NMD, every = raw_decoder(cc), cc.decode(f_NL), torch.arange(len(cc.b_enc))
    home = in_b(cc).long()
    d_LD = W_LMD[every, home]
    put_LM = f_NL.pow(2).sum(0)[:, None] * (W_LMD * d_LD[:, None]).sum(2)

    def beta(y_NMD):
        return torch.stack([((y_NMD[:, m] @ d_LD.T) * f_NL).sum(0) for m in range(2)], 1)
    betas = beta(x_NMD - xhat_NMD) + put_LM, beta(xhat_NMD - cc.mean)  # |f d|^2 cancels in nu
    return [(b[every, 1 - home] / b[every, home]).nan_to_num(float("inf")) for b in betas]


def mirrors(cc):
    """(mirror_excl, mirror_shared), each (L,): the largest cosine of a latent's own direction with
    one that the other model's exclusive, or another shared, latent writes into the other model; 0
    if there is none. A twin there would mean that the other model has the same feature after all.
    Needs: in_b, raw_decoder."""
    W_LMD, parts = F.normalize(raw_decoder(cc), dim=-1), cc.partitions()
    out = W_LMD.new_zeros(2, len(W_LMD))
    for own, there, twins in ((~in_b(cc), 1, parts["b_excl"]), (in_b(cc), 0, parts["a_excl"])):
        for row, part in zip(out, (twins, parts["shared"])):
            cosine = W_LMD[own, 1 - there] @ W_LMD[part, there].T
            cosine[own.nonzero() == torch.arange(part.start, part.stop)] = -1  # not itself
            if cosine.numel():
                row[own] = cosine.max(1).values
    return out


def ranking(cc, sets):
    """Rows of rank_latents() for both contrasts, with partition, contrast, nu and mirrors.
    Needs: CONTRASTS, exclusivity, mirrors, part_of, rank_latents."""
    with torch.no_grad():
        device = cc.b_dec.device
        x = {name: sets[name].float().to(device) for name in ("needs", "none", "tool", "plain")}
        f = {name: cc.encode(v) for name, v in x.items()}
        nu = exclusivity(cc, *(torch.cat(list(sides.values())) for sides in (x, f)))
        columns = dict(zip(("nu_error", "nu_recon", "mirror_excl", "mirror_shared"),
                           [*nu, *mirrors(cc)]))
    rows = []
    for contrast, (p, q) in CONTRASTS.items():
        for row in rank_latents(f[p], f[q]) if min(len(f[p]), len(f[q])) > 1 else ():
            i = row["feature_idx"]
            rows.append(row | {"contrast": contrast, "partition": part_of(cc, [i])}
                        | {name: v[i].item() for name, v in columns.items()})
    return rows


def specific(row):
    """Does a row of the ranking pass every criterion of a tool latent that only A has?
    Needs: LIMITS."""
    return (row["contrast"] == "needs/none" and row["partition"] == "a_excl"
            and row["auroc"] >= LIMITS["auroc"]
            and all(abs(row[nu]) < LIMITS[nu] for nu in ("nu_error", "nu_recon")))


def write_ranking(folder, rows):
    """ranking.csv: the authors' columns first, then ours. Needs: write."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0] if rows else ())
    table.writeheader()
    table.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "ranking.csv", lambda f: f.write_text(text.getvalue()))


def best_latent(rows, part):
    """The first latent of a partition by Cohen's d, needs against none; None if there is none."""
    return next((r["feature_idx"] for r in rows if r["partition"] == part
                 and r["contrast"] == "needs/none"), None)


# ---------------------------------------------------------------------------------------------
# 2. Steering
# ---------------------------------------------------------------------------------------------


def steering(model, layer, delta_ND, positions="last"):
    """The piece to copy (outputs_of does the same for many deltas at once): while it lasts,
    delta_ND, a vector a prompt, is added to the output of block `layer` at the prompt's last token
    ("last", the paper) or at every token ("all"). Needs: edit_with, patch."""
    return patch(model, layer, edit_with(delta_ND, add=True), positions)


def written(cc, f_NL, latents, m):
    """(N, D): what some latents write into model m, in raw units. Needs: raw_decoder."""
    return f_NL[:, latents] @ raw_decoder(cc)[latents, m]


def token_values(cc, h, latents, m):
    """(..., |S|): what exclusive latents of model m read in its activations h alone, before the
    top k: whether they would survive it depends on the other model too."""
    z = (h.float() - cc.mean[m]) / cc.scale[m]
    return torch.relu(z @ cc.W_enc[m][:, latents] + cc.b_enc[latents]).detach()


def taken_away(cc, latents, m, along=None):
    """An edit for patch(): subtract at each token what the latents would write there if they all
    survived the top k, which one model alone cannot tell; `along`: the same length along this unit
    vector instead. Needs: raw_decoder, token_values."""
    W_SD = raw_decoder(cc)[latents, m]

    def edit(h):
        wrote = token_values(cc, h, latents, m) @ W_SD
        if along is not None:
            wrote = wrote.norm(dim=-1, keepdim=True) * along
        return h - wrote.to(h)
    return edit


@contextlib.contextmanager
def projected_out(model, directions_SD):
    """No block's output has a component along these directions, at any token. Needs: blocks,
    patch."""
    basis = torch.linalg.qr(directions_SD.T.float()).Q                            # (D, S)

    def edit(h):
        return h - ((h.float() @ basis) @ basis.T).to(h)
    with contextlib.ExitStack() as stack:
        for layer in range(len(blocks(model))):
            stack.enter_context(patch(model, layer, edit, "all"))
        yield


def random_units(n, like_D, seed=0):
    """(n, D) random directions."""
    u = torch.randn(n, len(like_D), generator=torch.Generator().manual_seed(seed))
    return F.normalize(u, dim=1).to(like_D)


def same_length(delta_ND, units_VD):
    """(V, N, D): other directions, each prompt's delta keeping its length."""
    return delta_ND.norm(dim=1)[None, :, None] * units_VD[:, None]


# ---------------------------------------------------------------------------------------------
# 3. The scene: a crosscoder, its models, prompts with their latents
# ---------------------------------------------------------------------------------------------


def stage(args):
    """A list of scenes, one per run: cc, settings, folder, layer, models, tokenizer, sets (dev
    activations), ranked (rows of the ranking), positions, max_new and limit (tokens of an answer
    and of a prompt), device. Raises Problem."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = open_runs(args.runs, device, args.crosscoder, args.preset)
    if not args.grid and len({s["layer"] for _, s, _ in runs}) > 1:
        raise Problem("these runs are of different layers: --grid compares them, else give one")
    if args.grid and (args.latents or args.clamp is not None):
        raise Problem("--grid takes latents by rank and scales them: no --latents, no --clamp")
    for cc, _, folder in runs:
        check_latents(cc, args.latents or [], folder)
    models, tokenizer = load_both(runs, device)
    scenes = []
    for cc, settings, folder in runs:
        sets = dev_sets(settings, folder, device)
        max_new = args.max_new or MAX_NEW[settings["preset"]]
        scenes.append(SimpleNamespace(
            cc=cc, settings=settings, folder=folder, models=models, layer=settings["layer"],
            tokenizer=tokenizer, sets=sets, ranked=ranking(cc, sets), positions=args.positions,
            max_new=max_new, limit=room(models, max_new), device=device))
    return scenes


def check_latents(cc, latents, folder):
    """Raises Problem for latents that are not there, or that have no model in common."""
    if max(latents, default=0) >= len(cc.b_enc):
        raise Problem(f"latent {max(latents)} is outside {folder}'s dictionary of {len(cc.b_enc)}")
    if len({home_of(cc, [i]) for i in latents}) > 1:
        raise Problem(f"B-exclusive latents of {folder} and others steer different models: name "
                      f"them apart")


def dev_sets(settings, folder, device):
    """{"needs", "none", "tool", "plain": x_NMD} of the dev rows, as the run itself was measured."""
    args = SimpleNamespace(**{"seed": 0, "positions": "last"} | settings | {"out": folder})
    return gather(args, device, with_train=False)[0]


def rows_of(s, split, most, needs=False):
    """[(row, record, prompt)] of a split, `most` of each kind; needs: those that need a tool.
    Raises Problem if none does."""
    kept = read_split(s.settings, s.tokenizer, limit=s.limit, split=split)
    kept = some_of_each([k for k in kept if k[1]["calls"] or not needs], most)
    if not any(record["calls"] for _, record, _ in kept):
        raise Problem(f"no {split} row of {s.settings['tool_texts']} needs a tool")
    return kept


def some_of_each(kept, most):
    """The first `most` rows of each kind; rows without a kind go by whether a tool is needed."""
    seen, out = {}, []
    for row, record, prompt in kept:
        kind = row.get("kind", bool(record["calls"]))
        seen[kind] = seen.get(kind, 0) + 1
        out += [(row, record, prompt)] * (seen[kind] <= most)
    return out


def place(s, kept):
    """Prompts ready to steer: records, prompts, f (N, L), batches (models' prefixes, as they are
    first used)."""
    _, records, prompts = zip(*kept)
    x = pair_vectors(s.models, s.tokenizer, prompts, [s.layer])[s.layer].to(s.device)
    with torch.no_grad():
        f = s.cc.encode(x)
    return SimpleNamespace(records=records, prompts=prompts, f=f, batches={})


def outputs_of(s, p, m, deltas=None):
    """[V][N] texts of model m ("A", "B") under deltas_VND; clean ones without."""
    if m not in p.batches:
        share = s.positions == "last"  # at "all" every token changes, and nothing can be shared
        p.batches[m] = prefill(s.models[m], s.tokenizer, p.prompts, share=share)
    texts = generate(s.models[m], s.tokenizer, p.batches[m], s.max_new, s.layer, deltas, add=True,
                     positions=s.positions)
    return [[opened(q) + t for q, t in zip(p.prompts, row)] for row in texts]


def outputs_in(s, p, m, context):
    """[N] texts of model m, each batch answered inside context(), no prefix shared."""
    out = [None] * len(p.prompts)
    for batch in prefill(s.models[m], s.tokenizer, p.prompts, share=False):
        with context():
            texts = answer(s.models[m], s.tokenizer, batch, s.max_new)
        for i, text in zip(batch[0], texts):
            out[i] = opened(p.prompts[i]) + text
    return out


def check_fires(p, latents, clamp):
    """Raises Problem for latents that never fire on these prompts and are meant to be scaled."""
    if clamp is None and not p.f[:, latents].any():
        raise Problem(f"latents {latents} never fire here: scaling does nothing, --clamp gives "
                      f"them a value")


def own_deltas(s, p, latents, alphas, clamp):
    """{version: delta_ND} for the latents' own model: scaled by each alpha or, where clamp is not
    None, set to it."""
    home = home_of(s.cc, latents)
    if clamp is not None:
        return {f"clamp {clamp:g}": (clamp - p.f[:, latents]) @ raw_decoder(s.cc)[latents, home]}
    f_ND = written(s.cc, p.f, latents, home)
    return {f"alpha = {a:g}": (a - 1) * f_ND for a in alphas}


def exacts(texts, p):
    """0 or 1 a prompt."""
    return [score(t, r)["exact"] for t, r in zip(texts, p.records)]


# ---------------------------------------------------------------------------------------------
# 4. One latent (or a set of them): effects, controls, verdict
# ---------------------------------------------------------------------------------------------

def directions(s, latents, n=10):
    """({name: units}, the latents drawn) that a claim's direction has to beat: n random directions
    and n other live latents of the same partition, (n, D); the differences of means, A - B (1, D)
    and needs - none (M, D), one for each model to be changed."""
    W_LD, x = raw_decoder(s.cc)[:, home_of(s.cc, latents)], s.sets
    part = s.cc.partitions()[part_of(s.cc, latents)]
    with torch.no_grad():
        fired = sum(s.cc.encode(v.float().to(s.device)).gt(0).float().sum(0) for v in x.values())
    live = [i for i in range(part.start, part.stop) if fired[i] > 0 and i not in latents
            and W_LD[i].norm() > 0]
    some = np.random.default_rng(0).permutation(live)[:n].tolist()
    mean = {name: v.float().mean(0).to(s.device) for name, v in x.items()}
    return {"random": random_units(n, W_LD[0]),
            "latents": F.normalize(W_LD[some], dim=1),
            "A - B": F.normalize(mean["needs"][:1] - mean["needs"][1:]),
            "needs - none": F.normalize(mean["needs"] - mean["none"])}, some


def hope(home):
    """What exact calls should do when latents of this model are taken away: -1 fall (A's), +1 rise
    (B's, which hold what B lacks); the opposite when they are strengthened or put elsewhere."""
    return 2 * home - 1


def claims_of(s, p, latents, up, c):
    """[(title, model changed, delta_ND, sign, hoped)]: sign -1 where latents are taken away, and so
    are its controls; hoped +1 or -1, should exact calls rise or fall.

    up: {version: delta_ND} of own_deltas(), the latents strengthened; c: {name: (|S|,)}, values at
    which they are put into the other model."""
    home, W_SD = home_of(s.cc, latents), raw_decoder(s.cc)[latents, home_of(s.cc, latents)]
    own, other, hoped = "AB"[home], "AB"[1 - home], hope(home)
    claims = [(f"{own} without it", own, -written(s.cc, p.f, latents, home), -1, hoped)]
    claims += [(f"{own}, {version}", own, delta, 1, -hoped) for version, delta in up.items()]
    return claims + [(f"{other} + its {name}", other, (v @ W_SD).expand(len(p.prompts), -1), 1,
                      -hoped) for name, v in c.items()]


def judge(effect, controls, hoped, least_rows=20):
    """"no", "beyond random" (random directions and other latents) or "beyond every control": the
    effect's whole interval lies beyond 0 and beyond each of them, in the direction hoped for. Not
    corrected for the number of claims; of fewer than 20 rows an interval says nothing."""
    if effect["n"] < least_rows:
        return "too few rows"
    least = min(hoped * effect["lo"], hoped * effect["hi"])
    beyond = {name: all(least > hoped * c for c in values) for name, values in controls.items()}
    if least <= 0 or not all(beyond.get(name, True) for name in ("random", "latents")):
        return "no"
    every = {"A - B", "needs - none"} <= beyond.keys() and all(beyond.values())
    return "beyond every control" if every else "beyond random"


def against_controls(s, p, claims, latents, clean):
    """A row per claim: its effect on exact (paired interval), each control's, the verdict."""
    rows, (every, drawn) = [], directions(s, latents)
    for title, m, delta_ND, sign, hoped in claims:
        units = every | {"needs - none": every["needs - none"]["AB".index(m)][None]}
        signs = {"random": 1, "latents": sign, "A - B": hoped, "needs - none": hoped}
        stacked = torch.cat([signs[name] * same_length(delta_ND, u) for name, u in units.items()])
        texts = outputs_of(s, p, m, torch.cat([delta_ND[None], stacked]))
        effect, *others = [paired(exacts(t, p), exacts(clean[m], p)) for t in texts]
        controls = {name: [others.pop(0)["pp"] for _ in u] for name, u in units.items()}
        rows.append({"claim": title, "effect": effect, "controls": controls, "drawn": drawn,
                     "verdict": judge(effect, controls, hoped)})
    return rows


def everywhere(s, p, latents, clean):
    """The two claims of necessity at every token of prompt and answer, against random directions:
    what the latents write is taken away at this layer (in its length, along each control); their
    directions are gone from every layer (as many random ones, whatever their length there). For
    exclusive latents, which can be read off one model alone."""
    home = home_of(s.cc, latents)
    m, W_SD = "AB"[home], raw_decoder(s.cc)[latents, home]
    model, rows = s.models[m], []

    def gone_here(u_SD):
        along = None if u_SD is None else u_SD[0]
        return patch(model, s.layer, taken_away(s.cc, latents, home, along), "all")

    def gone_everywhere(u_SD):
        return projected_out(model, W_SD if u_SD is None else u_SD)
    edits = {f"{m} without it, every token": gone_here,
             f"{m}, projected out of every layer": gone_everywhere}
    random_VSD = random_units(10 * len(W_SD), W_SD[0]).view(-1, *W_SD.shape)
    for title, context in edits.items():
        effect, *others = [
            paired(exacts(outputs_in(s, p, m, lambda: context(u)), p), exacts(clean[m], p))
            for u in (None, *random_VSD)]
        controls = {"random": [c["pp"] for c in others]}
        rows.append({"claim": title, "effect": effect, "controls": controls,
                     "verdict": judge(effect, controls, hope(home))})
    return rows


@torch.no_grad()
def cross_entropy(model, tokenizer, texts, context):
    """(N,) mean cross-entropy in nats per token of plain texts, inside context()."""
    out = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = ids[:, :512].to(model.device)
        with context():
            logits = model(input_ids=ids).logits[0, :-1].float()
        out.append(F.cross_entropy(logits, ids[0, 1:]).item())
    return np.array(out)


def on_plain_text(s, latents, n):
    """Change in cross-entropy on n plain test texts when the latents are taken away at every token,
    beside 10 random directions of the same lengths; with an interval over texts. None without."""
    home = home_of(s.cc, latents)
    rows = [r["text"] for r in read_rows(s.settings["plain_texts"], 20 * n)
            if split_of(r) == "test" and len(r["text"].split()) > 3][:n]
    if not rows:
        return None
    model = s.models["AB"[home]]

    def under(u):
        edit = taken_away(s.cc, latents, home, u)
        return cross_entropy(model, s.tokenizer, rows, lambda: patch(model, s.layer, edit, "all"))
    clean = cross_entropy(model, s.tokenizer, rows, contextlib.nullcontext)
    effect = paired(under(None), clean, unit=1)
    return {"nats": effect["pp"], "lo": effect["lo"], "hi": effect["hi"], "n": len(rows),
            "clean": float(clean.mean()), "random": [
                float((under(u) - clean).mean()) for u in random_units(10, s.cc.b_dec[0])]}


def null_run(s):
    """(folder, hits) of a run beside this one whose models are the same twice: how many of its
    A-exclusive latents pass for tool latents of A alone? (None, the command) if there is none."""
    sizes = {"layer": s.layer, "dict_size": len(s.cc.b_enc), "k": s.cc.k, "n_a": s.cc.n_a,
             "n_b": s.cc.n_b}
    for folder in sorted(f.parent for f in s.folder.parent.glob("*/metrics.json")):
        with contextlib.suppress(Problem):  # a damaged run beside this one
            run, config = (read_json(folder / name) for name in ("run.json", "config.json"))
            if run.get("model_a") == run.get("model_b") == s.settings["model_a"] and all(
                    config.get(key) == size for key, size in sizes.items()):
                cc, settings, _ = open_run(folder, None, s.device)
                rows = ranking(cc, dev_sets(settings, folder, s.device))
                return str(folder), sum(map(specific, rows))
    return None, f"make one with {null_command(s)}"


def null_command(s):
    """The command that trains this run's null: A in both places, the same sizes."""
    name = s.settings["model_a"]
    name = os.path.relpath(name) if Path(name).exists() else name
    # + .5: int(share * L) gives n again
    shares = (f"{(n + .5) / len(s.cc.b_enc):.6f}" if n else 0 for n in (s.cc.n_a, s.cc.n_b))
    flags = "--preset {} --model-a {} --model-b {} --dict {} --k {} --layer {}".format(
        s.settings["preset"], name, name, len(s.cc.b_enc), s.cc.k, s.layer)
    return "python dfc.py {} --excl {} --excl-b {} --out {}/null".format(
        flags, *shares, s.folder.parent)


def strengths(s, latents, alphas, top_S, n):
    """(alpha above 1, multiple of the latents' maxima) with most exact calls on dev rows (fewest,
    for what B lacks): scaled up at home, and put into the other model. None: no alpha above 1."""
    up, times, home = [a for a in alphas if a > 1], (1, 2, 4, 8), home_of(s.cc, latents)
    p = place(s, rows_of(s, "dev", n, needs=True))
    f_ND, W_SD = written(s.cc, p.f, latents, home), raw_decoder(s.cc)[latents, home]
    out = []
    for m, values, deltas in (
            ("AB"[home], up, [(a - 1) * f_ND for a in up]),
            ("AB"[1 - home], times, [(t * top_S @ W_SD).expand_as(f_ND) for t in times])):
        texts = outputs_of(s, p, m, torch.stack(deltas)) if values else []
        hits = [-hope(home) * sum(exacts(t, p)) for t in texts]
        out.append(values[int(np.argmax(hits))] if hits else None)
    return out


def one_latent(s, args):
    """The table of a latent (or a set): effects, claims beside controls, one text, the verdict. Of
    a run with B-exclusive latents also the best of those."""
    results = [effects(s, args, args.latents or [chosen(s)])]
    best_b = best_latent(s.ranked, "b_excl")
    if not args.latents and s.cc.n_a and best_b is not None:
        try:
            results.append(effects(s, args, [best_b]))
        except Problem as e:  # it fires on dev rows, but not on these
            print(f"\nB-exclusive: {e}")
    pass_here, (null, found) = sum(map(specific, s.ranked)), null_run(s)
    print("\ntool latents of A alone, A-exclusive with AUROC >= {auroc}, |nu_error| < {nu_error}, "
          "|nu_recon| < {nu_recon}:".format(**LIMITS), pass_here, "of", s.cc.n_a)
    print(f"null, {null}: {found} pass" if null else f"null: no such run here; {found}")
    add_metrics(s.folder, "steering", {"results": results, "null": (null, found),
                                       "versions": software(), "specific": pass_here})
    for r in results:
        print(f"verdict   latent {' '.join(map(str, r['latents']))}: " + "; ".join(
            f"{c['claim']}: {c['verdict']}" for c in r["claims"]))


def effects(s, args, latents):
    """Everything about one set of latents on test rows; prints it and returns it."""
    began, home = time.time(), home_of(s.cc, latents)
    kept = rows_of(s, "test", args.rows)
    p, m, other = place(s, kept), "AB"[home], "AB"[1 - home]
    check_fires(p, latents, args.clamp)
    f_dev = s.cc.encode(s.sets["needs"].float().to(s.device))[:, latents].detach()
    c = {"mean": f_dev.mean(0), "maximum": f_dev.max(0).values}
    alpha, times = strengths(s, latents, args.alpha, c["maximum"], min(30, args.rows))
    if times > 1:
        c[f"maximum x {times}"] = times * c["maximum"]
    outputs = answers(s, p, args, latents, c)
    scores, result = summary(outputs, p.records)
    print(f"\n{s.folder}, layer {s.layer}, {NAMES[part_of(s.cc, latents)]} latent"
          f"{'s' * (len(latents) > 1)} {' '.join(map(str, latents))}, positions {s.positions}")
    print_versions(result, {})
    needs = place(s, [k for k in kept if k[1]["calls"]])
    clean = {name: [t for t, r in zip(o["clean"], p.records) if r["calls"]]
             for name, o in outputs.items()}
    up = own_deltas(s, needs, latents, [alpha] if alpha else [], args.clamp)
    rows = against_controls(s, needs, claims_of(s, needs, latents, up, c), latents, clean)
    exclusive, text = part_of(s.cc, latents) != "shared", None
    if exclusive:
        rows += everywhere(s, needs, latents, clean)
        text = on_plain_text(s, latents, args.rows)
    print_claims(rows)
    about = [r for r in s.ranked if r["feature_idx"] in latents and r["contrast"] == "needs/none"]
    print_about(about, text, other)
    print_example(p, outputs, m, other)
    write_rows(s.folder / f"steer-{'-'.join(map(str, latents))}.jsonl", kept, outputs, scores)
    return {"latents": latents, "rows": args.rows, "positions": s.positions, "alpha": alpha,
            "times": times, "models": result, "claims": rows, "ranking": about, "plain_text": text,
            "seconds": time.time() - began}


def answers(s, p, args, latents, c):
    """{model: {version: texts}}: clean, changed at home, put into the other model."""
    home, n = home_of(s.cc, latents), len(p.prompts)
    W_SD, own = raw_decoder(s.cc)[latents, home], own_deltas(s, p, latents, args.alpha, args.clamp)
    into = {f"+ its {name}": (v @ W_SD).expand(n, -1) for name, v in c.items()}
    x = s.sets["needs"].float().mean(0).to(s.device)
    into["+ mean difference"] = (x[home] - x[1 - home]).expand(n, -1)
    out = {}
    for m, deltas in (("AB"[home], own), ("AB"[1 - home], into)):
        texts = outputs_of(s, p, m, torch.stack(list(deltas.values())))
        out[m] = {"clean": outputs_of(s, p, m)[0]} | dict(zip(deltas, texts))
    return out


def chosen(s):
    """The best A-exclusive latent on dev rows; a plain crosscoder's best latent of all."""
    part = "a_excl" if s.cc.n_a else "b_excl" if s.cc.n_b else "shared"
    latent = best_latent(s.ranked, part)
    if latent is None:
        raise Problem(f"no {NAMES[part]} latent of {s.folder} fires more where a tool is needed: "
                      f"name others with --latents, or train another crosscoder")
    return latent


def print_claims(rows):
    """Claim, effect, the range of each kind of control, verdict."""
    print(f"\n{'change of exact, pp':33s} effect, 95 %         random    latents  A - B"
          f"  needs-none")
    for r in rows:
        e, spans = r["effect"], []
        for name in ("random", "latents", "A - B", "needs - none"):
            values = r["controls"].get(name, [])
            spans.append("..".join(f"{v:.0f}" for v in sorted({min(values), max(values)}))
                         if values else "-")
        effect = f"{e['pp']:+.1f} [{e['lo']:+.1f}, {e['hi']:+.1f}]"
        print(f"{r['claim']:33s}{effect:>21s}{spans[0]:>9s}{spans[1]:>10s}{spans[2]:>7s}"
              f"{spans[3]:>12s}  {r['verdict']}")


def print_about(about, text, other):
    """Exclusivity (of latents that fire more where a tool is needed) and plain text."""
    print()
    for r in about:
        print(f"latent {r['feature_idx']}: d {r['cohens_d']:.2f}, AUROC {r['auroc']:.3f}, nu_error "
              f"{r['nu_error']:.2f}, nu_recon {r['nu_recon']:.2f}, mirror in {other}-exclusive "
              f"{r['mirror_excl']:.2f}, in shared {r['mirror_shared']:.2f} (dev, needs/none)")
    if text:
        print(f"plain text, taken away at every token: cross-entropy {text['nats']:+.3f} nats "
              f"[{text['lo']:+.3f}, {text['hi']:+.3f}] (clean {text['clean']:.2f}, "
              f"{text['n']} texts); random {min(text['random']):+.3f}..{max(text['random']):+.3f}")


def print_example(p, outputs, m, other):
    """One prompt's answers before and after (the paper's Figure 5)."""
    i = next((i for i, r in enumerate(p.records)
              if r["calls"] and score(outputs[m]["clean"][i], r)["exact"]), 0)
    print(f"\nquestion: {p.records[i]['messages'][-1]['content']}")
    for name, version in ((m, "clean"), (m, list(outputs[m])[1]), (other, "clean"),
                          (other, list(outputs[other])[-2])):  # the last is the mean difference
        print(f"  {name}, {version}: {outputs[name][version][i]!r}")
    print()


# ---------------------------------------------------------------------------------------------
# 5. Your own prompt, and where a latent fires
# ---------------------------------------------------------------------------------------------


def own_prompt(s, text):
    """One prompt placed in the scene: the text as the user's words, in the form of the test row
    whose system text has most words in common with it: a call can only be right if its tool is
    listed."""
    words = set(text.lower().split())

    def common_words(record):
        listed = [t["content"] or "" for t in record["messages"] if t["role"] == "system"]
        return len(words & set(" ".join(listed).lower().split()))
    kept = read_split(s.settings, s.tokenizer, limit=s.limit)
    record = max((record for _, record, _ in kept), key=common_words)
    system = [t for t in record["messages"] if t["role"] == "system"]
    user = [t for t in record["messages"] if t["role"] == "user"][-1]
    wrapped = user["content"].strip().startswith("<user>")  # as ToolRL does
    said = f"<user> {text} </user>" if wrapped else text
    record |= {"messages": system + [user | {"content": said}], "calls": [], "gold": None}
    print(f"tools: {', '.join(record['tools'])}")
    return place(s, [({}, record, prompt_of(record, s.tokenizer, limit=s.limit)[0])])


def steer_prompt(s, args):
    """Clean and steered answers to one prompt."""
    p, latents = own_prompt(s, args.prompt), args.latents or [chosen(s)]
    check_fires(p, latents, args.clamp)
    values = ", ".join(f"{v:.2f}" for v in p.f[0, latents].tolist())
    print(f"latents {latents}: {values} at its last token")
    deltas, m = own_deltas(s, p, latents, args.alpha, args.clamp), "AB"[home_of(s.cc, latents)]
    texts = outputs_of(s, p, m, torch.stack(list(deltas.values())))
    for name, text in [("clean", outputs_of(s, p, m)[0]), *zip(deltas, texts)]:
        print(f"\n--- {m}, {name}\n{text[0]}")


@torch.no_grad()
def monitor(s, args):
    """Each token of a prompt and of A's answer with the latent's values: bar and number are what it
    reads there (an exclusive latent: in its own model alone); * where it survives the top k, which
    depends on both models."""
    p, latents = own_prompt(s, args.monitor), args.latents or [chosen(s)]
    text = p.prompts[0] + outputs_of(s, p, "A")[0][0].removeprefix(opened(p.prompts[0]))
    ids = torch.tensor([s.tokenizer(text, add_special_tokens=False)["input_ids"]], device=s.device)
    x_TMD = torch.stack([residuals(m, ids, [s.layer])[s.layer][0] for m in s.models.values()], 1)
    end = len(s.tokenizer(p.prompts[0], add_special_tokens=False)["input_ids"]) - 1
    pre_TL, f_TL = s.cc.preactivations(s.cc.normalise(x_TMD)), s.cc.encode(x_TMD)
    for latent in latents:
        top = pre_TL[:, latent].max().item() or 1.
        print(f"\nlatent {latent}   (| ends the prompt, * survives the top {s.cc.k})")
        for i, token in enumerate(ids[0].tolist()):
            value = pre_TL[i, latent].item()
            print(f"{s.tokenizer.decode([token])!r:>20s} {value:7.2f} "
                  f"{'*' if f_TL[i, latent] > 0 else ' '}{'|' if i == end else ' '} "
                  f"{'#' * round(40 * value / top)}")


# ---------------------------------------------------------------------------------------------
# 6. The program
# ---------------------------------------------------------------------------------------------


def parse_args(argv):
    p = Parser(prog="steer.py", description=__doc__.split("\n")[0])
    finite = number(float, -1e9, 1e9)
    p.add_argument("runs", nargs="*", type=Path, help="run folders (default: the newest)")
    p.add_argument("--crosscoder", help="a crosscoder without a run: folder or hub name")
    p.add_argument("--preset", choices=MAX_NEW, help="models and texts for --crosscoder")
    p.add_argument("--latents", nargs="+", type=number(int, 0), help="default: the best one on dev")
    p.add_argument("--alpha", nargs="+", type=finite, default=ALPHAS, help="strengths; 1 = clean")
    p.add_argument("--clamp", type=finite, help="set the latents to this value instead of scaling")
    p.add_argument("--positions", choices=["last", "all"], default="last", help="steered tokens")
    p.add_argument("--rows", type=number(int, 1), default=60, help="rows of each kind")
    p.add_argument("--max-new", type=number(int, 1), help="tokens of an answer")
    job = p.add_mutually_exclusive_group()
    job.add_argument("--prompt", type=words, help="steer this user message and print the texts")
    job.add_argument("--monitor", type=words, metavar="PROMPT", help="print where the latent fires")
    job.add_argument("--grid", action="store_true", help="number of latents by strength")
    return p.parse_args(argv)


def words(text):
    """An argparse type: text that holds something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the prompt is empty: give the user's words")
    return text


def main(argv=None):
    args = parse_args(argv)
    scenes = stage(args)
    for s in scenes:
        write_ranking(s.folder, s.ranked)
    if args.grid:
        from extras.grid import grids
        return grids(scenes, args)
    work = steer_prompt if args.prompt else monitor if args.monitor else one_latent
    for s in scenes:
        work(s, args)


if __name__ == "__main__":
    sys.exit(cli(main))
