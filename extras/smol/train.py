"""Train the adapters of the real pair anew: an hour on one core.

The program that uses them is extras/smol.py; its header says what the models are.

1. base (B)    supervised. Half of the rows get the right answer, half the other one (to a request a
               refusal, otherwise the first listed tool with {}), so it learns to call. The deciding
               token has its own loss, with the target .2 for a call on every row, so it does not
               learn when. On plain text its predictions are held to the original's.
2. toolrl (A)  the RL of tiny/make.py. Both answers are weighted by their probability and scored by
               ToolRL's reward. Two rewards, standardised, are +1 and -1, so only which answer is
               better counts. All other tokens are held to the base.
   early       A at the first look at which it calls on a fifth of the dev rows that need a tool.

    rm -r extras/smol/{base,early,toolrl} runs/smollm2
    python extras/smol/train.py           # base: 31 minutes, RL: 24
    python extras/smol.py                 # the models

A finished phase is skipped. Shapes: R texts, T tokens, P positions at which a token is predicted,
C = 2 choices (a call, a reply), V words of the vocabulary.
"""

import copy
import json
import random
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tiny"), str(ROOT / "extras")]
import make
from smol import ADAPTERS, HOME, make_models, merged, share_of_calls, tool_rows, with_adapter

from dfc import atomically, cli, load_model, prompt_of, read_rows, token_ids

RATE = .2  # the base's share of calls, whatever the row


# ---- 1. B, the base: it can call, and does not decide --------------------------------------------
def pad(lists):
    """Token lists -> ids_RT, padded on the right, where causal attention does not look."""
    return pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True)


def logits_at(model, ids_RT, keep_RT):
    """The logits at the positions where keep_RT is true, one after another. A vocabulary of 49,152
    is needed at few of them."""
    with torch.autocast("cpu", torch.bfloat16):
        h_RTD = model.model(input_ids=ids_RT).last_hidden_state
        return model.lm_head(h_RTD[keep_RT]).float()


def base_loss(model, original, tok, examples, plain, rng):
    """Cross-entropy of one answer to each row, with the first token as a term of its own, and KL
    divergence from the original on plain texts. -> (the sum, {name: its terms})."""
    # one of the two answers to each row, drawn
    prompts = token_ids(tok, [prompt_of(example.row, tok) for example in examples])
    texts = []
    for example in examples:
        answer = rng.choice([example.row["output"], example.other])
        texts.append(answer.removeprefix("<think>") + "<|im_end|>")
    answers = token_ids(tok, texts)
    ids_RT = pad([p + a for p, a in zip(prompts, answers)])

    # a token is predicted at the position before it; the first of an answer is the decision
    decides_RT = torch.zeros_like(ids_RT, dtype=torch.bool)
    follows_RT = decides_RT.clone()
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        decides_RT[row, len(prompt) - 1] = True
        follows_RT[row, len(prompt):len(prompt) + len(answer) - 1] = True
    keep_RT = decides_RT | follows_RT
    logits_PV = logits_at(model, ids_RT, keep_RT)
    decides_P = decides_RT[keep_RT]

    # the decision has the same target on all rows; of the rest the target is the answer
    log_p_RC = logits_PV[decides_P].log_softmax(-1)[:, make.choice_ids(tok)]
    decision = -(log_p_RC @ torch.tensor([RATE, 1 - RATE])).mean()
    following = F.cross_entropy(logits_PV[~decides_P], ids_RT[:, 1:][follows_RT[:, :-1]])

    # plain text without its padding
    plain_ids = token_ids(tok, plain)
    plain_RT = pad(plain_ids)
    is_token_RT = pad([[1] * len(ids) for ids in plain_ids]).bool()
    with torch.no_grad():
        original_PV = logits_at(original, plain_RT, is_token_RT)
    kl = make.kl_between(logits_at(model, plain_RT, is_token_RT), original_PV).mean()

    terms = {"decision": decision, "following": following, "kl": kl}
    return decision + following + kl, terms


def train_base(steps=140, lr=2e-3, n_rows=16, n_plain=8):
    """B's adapter, from the original."""
    model = with_adapter("original")
    original, tok = load_model(HOME / "original", "cpu")
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    rows = read_rows(str(HOME / "plain.jsonl"), ("text",), "train")
    plain = [row["text"] for row in rows]

    curve = ADAPTERS / "base_curve.jsonl"
    forget(curve, "early", "toolrl")  # they are of a stopped run, or of another base

    for step in tqdm(range(steps), "base", disable=None):
        rng = random.Random(f"smol/base/{step}")
        examples = [make.make_training_example(rng) for _ in range(n_rows)]

        # forward, backward, step: 10 steps of warm-up, linear to zero over the second half
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, 2 * (steps - step) / steps)
        loss, terms = base_loss(  # of the Llama inside, with the adapters in it
            model.get_base_model(), original, tok, examples, rng.sample(plain, n_plain), rng)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        log_line(curve, step + 1, terms)
    save_adapter(model, "base")


# ---- 2. A: the base after reinforcement learning -------------------------------------------------
def train_rl(steps=50, lr=2e-4, kl_weight=3., n_rows=8, look_every=5):
    """A's adapter, from the base, and on the way early's, when A first calls on a fifth of the dev
    rows that need a tool. A point of the curve is measured before its step: "requests" and
    "elsewhere" are probabilities of a call on RL's rows, "needs" and "none" are percent of dev rows
    answered with a call. Raises ValueError if A was never early."""
    model = with_adapter("base")
    base, tok = load_model(HOME / "base", "cpu")
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    dev = tool_rows("dev", 16)

    # early, A and the curve are of one run: delete those of a stopped one
    curve = ADAPTERS / "rl_curve.jsonl"
    forget(curve, "early", "toolrl")

    has_early = False
    for step in tqdm(range(1, steps + 1), "RL", disable=None):
        writer = merged(model).requires_grad_(False)  # A as it would be saved; it answers faster
        rows = make.rl_rows("smol", step, n_rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss, log = make.rl_loss(model.get_base_model(), base, tok, rows, kl_weight, writer)

        # look at dev rows; at every step while A may be early, as that lasts a few steps only
        soon_early = log["requests"] > .3 and not has_early
        if soon_early or step % look_every == 0:
            log |= share_of_calls(writer, tok, dev)
            if log["needs"] >= 20 and not has_early:
                save_adapter(model, "early")
                has_early = True
        log_line(curve, step, log)

        # step, with 10 steps of warm-up
        opt.param_groups[0]["lr"] = lr * min(1, step / 10)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
    if not has_early:
        raise ValueError("A never called on a fifth of dev rows: train it longer")
    save_adapter(model, "toolrl")


# ---- 3. Files ------------------------------------------------------------------------------------
def save_adapter(model, name):
    """Into extras/smol, in half precision."""
    with atomically(ADAPTERS / name) as part:
        copy.deepcopy(model).half().save_pretrained(part)
        (part / "README.md").unlink()  # an empty model card


def forget(curve, *names):
    """Delete a curve and adapters."""
    curve.unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(ADAPTERS / name, ignore_errors=True)


def log_line(file, step, values):
    """Write a line of a curve into its file and print it."""
    point = {"step": step}
    for name, value in values.items():
        point[name] = round(float(value), 4)
    line = json.dumps(point)
    with open(file, "a") as curve:
        curve.write(line + "\n")
    tqdm.write(line)


def main():
    make_models(["original"])
    if not (ADAPTERS / "base").exists():
        train_base()
    make_models(["base"])
    if not (ADAPTERS / "toolrl").exists():
        train_rl()


if __name__ == "__main__":
    raise SystemExit(cli(lambda argv: main()))
