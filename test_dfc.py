"""The specification of dfc: what is true of every piece, one sentence a test, in the order of the
three files. Where there is one, a piece is compared with a slow, obvious version of it.

    pytest        # a minute on 2 CPU cores, without a GPU and without a network
"""
import os  # set before the libraries look at it

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import ast
import copy
import json
import random
import re
import runpy
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import dfc
import eval_toolcall as ev
import steer
from extras import grid, table, toy

ROOT = Path(dfc.__file__).resolve().parent
TINY = ROOT / "tiny"
torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

@pytest.fixture(scope="session")
def pair():
    """The embedded pair: {"A": model, "B": model}, and its tokenizer."""
    (a, tokenizer), (b, _) = (dfc.load_model(str(TINY / n), "cpu") for n in ("toolrl", "base"))
    return {"A": a, "B": b}, tokenizer

def close(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol)

def as_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

def rows_in(name, split=None):
    rows = dfc.read_rows(str(name), ())
    return [row for row in rows if split in (None, row.get("split"))]

# ---- 1. The crosscoder ---------------------------------------------------------------------------
def small(n_a=4, n_b=3, tied=False, k=5, L=32, D=8):
    return dfc.Crosscoder(D, L, k, n_a, n_b, tied)

def fit(cc, x, steps=30, **how):
    cc.fit_scale(x)
    cc.fair_start(x)
    return dfc.train(cc, x, steps, **{"batch": 64, "lr": 1e-2, "dead_after": 2} | how)

def scaled(*sizes):
    """A crosscoder of vectors of width 16, whose raw units are not its own."""
    cc = dfc.Crosscoder(16, 32, *sizes).requires_grad_(False)
    cc.fit_scale(torch.randn(100, 2, 16) * torch.tensor([[3.], [.5]]) + 2)
    torch.nn.init.normal_(cc.b_enc, std=.1), torch.nn.init.normal_(cc.b_dec, std=.1)
    return cc

def test_top_k_encoder_and_decoder_match_a_python_loop():
    cc, x = scaled(5, 4, 3), torch.randn(6, 2, 16) * 3 + 1
    xhat, f = cc(x)
    for b in range(6):
        z = (x[b] - cc.mean) / cc.scale[:, None]
        pre = [((z * cc.W_enc[:, :, l]).sum() + cc.b_enc[l]).item() for l in range(32)]
        best = sorted(pre)[-5:]
        slow = torch.tensor([p if p in best and p > 0 else 0. for p in pre])
        zhat = cc.b_dec + sum(slow[l] * cc.W_dec[l] for l in range(32))
        assert close(f[b], slow) and close(xhat[b], zhat * cc.scale[:, None] + cc.mean)

def test_an_empty_partition_is_the_plain_crosscoder():
    cc, x = small(0, 0), torch.randn(256, 2, 8)
    fit(cc, x)
    assert cc.parts() == {"shared": slice(0, 32)} and cc.W_enc.all() and cc.W_dec.all()
    z = cc.normalise(x).flatten(1)  # that is: one sparse autoencoder of the pair laid end to end
    zhat = kept(z @ cc.W_enc.flatten(0, 1) + cc.b_enc, 5) @ cc.W_dec.flatten(1)
    assert close(cc.normalise(cc(x)[0]), zhat.view(256, 2, 8) + cc.b_dec)

@pytest.mark.parametrize("n_a, n_b, tied", [(4, 3, False), (4, 0, True), (16, 16, False)])
def test_exclusive_latents_never_touch_the_other_model(n_a, n_b, tied):
    cc, x, n = small(n_a, n_b, tied, k=2), torch.randn(256, 2, 8), n_a + n_b
    cc.W_enc.data[..., ::2] *= .1
    assert fit(cc, x)["aux"] > 0  # trained, also by the auxiliary loss
    for cc in (cc, copy.deepcopy(cc)):
        pre = cc.top(cc.normalise(x))[2]
        for m, part in enumerate((slice(0, n_a), slice(n_a, n))):
            other = x.clone()
            other[:, 1 - m] = torch.randn(256, 8)
            assert torch.equal(cc.top(cc.normalise(other))[2][:, part], pre[:, part])
        written = cc.decode(9 * torch.eye(32)) - cc.decode(torch.zeros(1, 32))
        assert written[:n].any(2).tolist() == [[l < n_a, l >= n_a] for l in range(n)]
        if n < 32:  # one decoder row for both models, where shared latents are tied
            assert torch.equal(*cc.W_dec[n:].unbind(1)) is tied

def test_a_fair_start_gives_every_partition_the_same_spread():
    cc, x = dfc.Crosscoder(32, 600, 8, 200, 200, True), torch.randn(1000, 2, 32)
    x[:, 1] = x[:, 0] + x[:, 1] / 2
    cc.fit_scale(x), cc.fair_start(x)
    pre = cc.top(cc.normalise(x))[2]
    a, b, shared = (pre[:, part].std().item() for part in cc.parts().values())
    assert a == pytest.approx(shared, rel=.01) == b

# ---- 2. Losses -----------------------------------------------------------------------------------
def kept(pre, k):
    """pre with all but the k largest of each row set to zero, and none below zero."""
    top = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())

def slow_train(cc, x, steps, batch, lr, l1_shared, l1_excl, dead_after, recipe):
    """train() by its formulas, with dense products and autograd, and SGD."""
    n, silent, order = cc.n_a + cc.n_b, 0, dfc.batches(len(x), batch, 0)
    price = torch.tensor([l1_excl] * n + [l1_shared] * (len(cc.b_enc) - n))
    for step in range(steps):
        z, rate = cc.normalise(x[next(order)]), 1
        pre = torch.einsum("bmd,mdl->bl", z, cc.W_enc) + cc.b_enc
        f = kept(pre, cc.k)
        zhat = (f @ cc.W_dec.flatten(1)).view_as(z) + cc.b_dec
        loss = (z - zhat).pow(2).mean()
        if recipe == "paper":
            loss = loss + (price * f).mean()
        else:
            rate = min(1, (step + 1) / (.05 * steps), (steps - step) / (.2 * steps))
            loss = loss + (price * f * cc.W_dec.flatten(1).norm(dim=1)).sum(1).mean()
            silent = (silent + 1) * (f.sum(0) == 0)
            for part in cc.parts().values():
                dead = torch.zeros(len(price), dtype=torch.bool)
                dead[part] = silent[part] > dead_after
                some = kept(pre.relu() * dead, min(int(dead.sum()), 2 * cc.k))
                guess = (some @ cc.W_dec.flatten(1)).view_as(z)
                error = ((z - zhat).detach() - guess)[:batch // 4 + 1]
                error = error[:, cc.W_dec[part].any(0).any(1)]  # of the models it writes
                loss = loss + dead.any() * error.pow(2).mean() / 32
        cc.zero_grad()
        loss.backward()
        cc.confine(cc.W_enc.grad, cc.W_dec.grad)
        torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        for p in cc.parameters():
            p.data -= lr * rate * p.grad

@pytest.mark.parametrize("n_a, n_b, tied, recipe", [
    (0, 0, False, "dfc"), (12, 0, True, "dfc"), (12, 9, False, "dfc"), (12, 9, False, "paper")])
def test_the_sparse_gradient_trains_as_dense_products_and_autograd_do(
        n_a, n_b, tied, recipe, monkeypatch):
    x, made = torch.randn(600, 2, 8) * 2 + 1, []
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, **_: torch.optim.SGD(p, lr))
    for train in (dfc.train, slow_train):  # by SGD, for Adam does not see a gradient's length
        torch.manual_seed(1)
        cc = small(n_a, n_b, tied, k=3, L=96)
        cc.fit_scale(x)
        cc.W_enc.data[..., ::2] *= .2  # so that many are dead
        train(cc, x, steps=20, batch=64, lr=1., l1_shared=1e-2, l1_excl=3e-2, dead_after=2,
              recipe=recipe)
        made.append(cc.parameters())
    for fast, slow in zip(*made):
        assert close(fast, slow, 1e-5), (fast - slow).abs().max()

def test_latents_that_start_too_weak_to_be_picked_are_revived():
    x, live = torch.randn(2000, 2, 16), []
    for aux in (0., 1 / 32):
        torch.manual_seed(1)
        cc = dfc.Crosscoder(16, 128, 4, 16, 16)
        cc.fit_scale(x)
        cc.W_enc.data[..., ::2] *= .2
        dfc.train(cc, x, 400, batch=128, lr=3e-3, dead_after=5, aux=aux)
        live.append((cc.encode(x) > 0).any(0)[::2].float().mean().item())
    assert live[1] > live[0] + .3

def test_predicting_the_mean_gives_fve_0_and_the_truth_1():
    x = torch.randn(50, 2, 8) * 100 + 1000
    xhat = torch.stack([x[:, 0], x[:, 1].mean(0).expand(50, 8)], 1)
    assert dfc.fve(x, xhat).tolist() == pytest.approx([1, 0], abs=1e-9)

# ---- 3. Activations ------------------------------------------------------------------------------
def random_model(family, **more):
    sizes = dict(vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    window = {"sliding_window": 16} if family in ("Mistral", "Gemma2") else {}
    config = getattr(transformers, f"{family}Config")(**sizes | window | more)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)

@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma2"])
def test_collect_equals_hidden_states_of_single_texts_whatever_the_batch(family, pair):
    model, (_, tokenizer) = random_model(family, max_position_embeddings=200), pair
    book = " ".join(row["text"] for row in rows_in(TINY / "text.jsonl")[:200])
    texts = [book[i:i + n] for i, n in enumerate((3, 300, 1, 990, 17, 400, 5, 30))]
    for layer in (0, 1, 2):
        got = dfc.collect(model, tokenizer, texts, layer)
        for text, h in zip(texts, got.float() if layer < 2 else model.model.norm(got.float())):
            ids = torch.tensor([tokenizer(text)["input_ids"]])[:, -200:]  # it loses its beginning
            states = model(ids, output_hidden_states=True).hidden_states
            assert close(h, states[layer + 1][0, -1], 8e-3)  # kept in fp16

def test_a_hook_edits_one_blocks_output_and_is_gone_after_an_exception():
    model, ids = random_model("Llama"), torch.tensor([[5, 6, 7]])
    logits, clean = model(ids).logits, dfc.residual(model, ids, 1)
    with pytest.raises(ZeroDivisionError), dfc.hooked(model, 1, lambda h: h + 1):
        assert close(dfc.residual(model, ids, 1), clean + 1)
        assert not close(model(ids).logits, logits) and 1 / 0
    assert torch.equal(model(ids).logits, logits)

def test_activations_are_kept_under_what_changes_them_and_never_half_written(
        tmp_path, monkeypatch):
    shutil.copytree(TINY / "toolrl", a := tmp_path / "a")
    loads, load_model, cache = [], dfc.load_model, tmp_path / "cache"
    monkeypatch.setattr(dfc, "load_model", lambda *names: loads.append(1) or load_model(*names))
    def collected(text="two words", layer=1):  # and were models loaded for it?
        loads.clear()
        pair = str(a), str(TINY / "base")
        return dfc.collect_pair(*pair, ["one", text], layer, cache, "cpu"), bool(loads)
    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr(np, "save", lambda path, _: path.write_bytes(b"half") and open("/no space"))
        collected()
    assert not any(cache.iterdir())
    (first, new), (again, newer) = collected(), collected()
    assert new and not newer and torch.equal(first, again)
    assert collected(layer=0)[1] and collected("two wordz")[1] and not collected()[1]
    os.utime(a / "model.safetensors")
    assert collected()[1]

# ---- 4. Texts ------------------------------------------------------------------------------------
THINK = "<think> t </think>\n"
RESPONSE = THINK + "<response> hi </response>"
WEATHER = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'
SHORT = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TIME = '{"name": "get_time", "parameters": {"tz": "CET"}}'

def block(*calls):
    return "<tool_call>\n" + "\n".join(calls) + "\n</tool_call>"

def says(*calls):
    return THINK + block(*calls)

def row_of(gold):
    tools = "1. Name: get_weather\n2. Name: get_time\n3. Name: get_weather_alerts"
    return {"instruction": tools, "input": "q", "output": gold}

ONE, TWO, NONE = row_of(says(WEATHER)), row_of(says(SHORT, TIME)), row_of(RESPONSE)

def test_a_row_belongs_to_one_split_and_needs_a_tool_where_its_answer_calls_one():
    counts = Counter(dfc.split_of({"text": str(i)}) for i in range(2000))
    assert 150 < counts["dev"] < 250 and 150 < counts["test"] < 250
    assert dfc.split_of({"text": "0", "split": "dev"}) == "dev" and ev.needs_tool(ONE)
    assert not ev.needs_tool(row_of("<think> no <tool_call>? </think>\n<response> a </response>"))

def test_half_of_the_tool_texts_are_whole_prompts_and_half_go_on_into_the_answer(pair):
    row = rows_in(TINY / "tools.jsonl", "train")[0]
    prompt = dfc.prompt_of(row, pair[1])
    whole = prompt + row["output"].removeprefix(dfc.opened(prompt))
    texts = dfc.tool_texts([row], pair[1], 40, "dfc", 0)
    assert texts[:20] == [prompt] * 20 and len(set(texts[20:])) > 5 and whole.count("<think>") == 1
    assert all(whole.startswith(text) and whole[len(text)].isspace() for text in texts[20:])

# ---- 5. Train, save, load ------------------------------------------------------------------------
def test_what_is_saved_and_loaded_has_the_authors_names_and_speaks_raw_units(tmp_path):
    cc, x = small(tied=True), torch.randn(400, 2, 8) * torch.tensor([[.05], [90.]]) + 7
    fit(cc, x, 300)
    dfc.save(cc, tmp_path / "run")
    again, z = dfc.load(str(tmp_path / "run")), cc.normalise(x)
    assert z.mean(0).abs().max() < 1e-3 and close(z.pow(2).mean((0, 2)), torch.ones(2), 1e-3)
    assert (again.k, again.n_a, again.n_b, again.tied) == (5, 4, 3, True)
    assert torch.equal(again(x)[0], cc(x)[0]) and dfc.fve(x, again(x)[0]).min() > .5
    state = load_file(tmp_path / "run" / "model.safetensors")
    assert {name: "x".join(map(str, t.shape)) for name, t in state.items()} == dict(
        W_enc="2x8x32", b_enc="32", W_dec="32x2x8", b_dec="2x8", mean="2x8", scale="2")

def published(folder, D=8, n=2, k=4, **masks):
    """A folder in the form of the paper's checkpoints, from random weights -> its crosscoder."""
    cc, folder = dfc.Crosscoder(D, 64, k, n, n), Path(folder)
    state = {n: t for n, t in cc.state_dict().items() if n not in ("mean", "scale")}
    folder.mkdir(parents=True)
    torch.save(state | masks, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(
        {"activation_dim": D, "dict_size": 64, "k": k, "n_a": n, "n_b": n}))
    (folder / "hparams.json").write_text('{"layer": 2}')
    return cc

class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)

def test_the_authors_checkpoints_load_and_foreign_cut_or_pickled_ones_are_refused_and_not_run(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masks = {"enc_mask": torch.ones(2, 64), "dec_mask": torch.ones(64, 2)}
    for n, more in ((2, masks), (0, {})):
        ours, theirs, x = published(f"ok{n}", n=n, **more), dfc.load(f"ok{n}"), torch.randn(5, 2, 8)
        assert (theirs.k, theirs.n_a, theirs.n_b) == (4, n, n)
        assert torch.equal(theirs(x)[0], ours(x)[0])  # without mean and scale, which are lost
    published("pickle", b_enc=Bomb()), published("shape", b_enc=x), dfc.save(small(), Path("cut"))
    os.truncate("cut/model.safetensors", 900)
    for name in ("pickle", "shape", "cut", "nothing", str(TINY / "base")):
        with pytest.raises(ValueError, match=name):
            dfc.load(name)
    assert not Path("exploded").exists()

@pytest.mark.parametrize("same", [False, True])
def test_planted_exclusive_features_are_recovered_and_two_equal_models_yield_none(same):
    x, d = toy.plant(C=40, D=32, N=4000, active=3)  # concepts 0 to 7 are A's alone, 8 to 15 B's
    if same:
        x[:, 1] = x[:, 0]
    cc, specific = toy.fit(x, .125, True, k=3, steps=500).requires_grad_(False), 0
    recalls = [toy.grade(cc, x, d, m)[0] for m in (0, 1)]
    for c in range(8):  # is a latent of A alone the one that "needs" concept c?
        ordered = x[(x[:, 0] @ d[c, 0]).argsort()]
        sets = dict(zip("none needs plain tool".split(), 2 * (ordered[:200], ordered[-200:])))
        specific += any(map(steer.specific, steer.ranking(
            cc, sets, {name: cc.encode(sets[name]) for name in sets})))
    assert specific == 0 if same else min(*recalls, specific / 8) >= .75, (recalls, specific)

# ---- 6. The program dfc.py -----------------------------------------------------------------------
def call(program, *argv):
    """A program's exit status."""
    try:
        return dfc.cli(program.main, [str(a) for a in argv]) or 0
    except SystemExit as e:  # argparse
        return e.code

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(A folder with few.jsonl, the two shortest tool rows of every kind and split, run, and null,
    A against itself; the flags of both); from then on at most 60 texts of a kind are collected."""
    home, kinds, texts_of = tmp_path_factory.mktemp("world"), {}, dfc.texts_of
    for row in sorted(rows_in(TINY / "tools.jsonl"), key=lambda row: len(row["instruction"])):
        kinds.setdefault((row["split"], row["kind"]), []).append(row)
    (home / "few.jsonl").write_text(as_lines(*(row for rows in kinds.values() for row in rows[:2])))
    flags = ["--tool-texts", f"{home}/few.jsonl",
             *"--n-texts 60 --steps 200 --dict 96 --excl .12".split()]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dfc, "texts_of", lambda s, tokenizer, split, n, *more: texts_of(
            s, tokenizer, split, min(n, 60), *more))
        assert call(dfc, *flags, "--out", home / "run") == 0
        assert call(dfc, *flags, "--out", home / "null", "--model-b", TINY / "toolrl") == 0
        yield home, flags

def files(home):
    return {f: f.read_bytes() for f in home.rglob("*") if f.is_file() and f.parent.name != "cache"}

def test_recipe_and_preset_fill_in_what_is_not_asked_for_and_each_run_has_a_folder_of_its_own():
    asked = {"--excl 0": (0, 0, False, 2e-5), "--excl .05": (25, 0, True, 2e-5),
             "--excl-b .05": (51, 25, True, 2e-5), "--recipe paper": (51, 51, False, 1e-3),
             "--recipe paper --tie-shared --l1-shared 0": (51, 51, True, 0),
             "--recipe paper --preset paper": (819, 819, False, 1e-3)}
    made = [dfc.parse_args(flags.split()) for flags in asked]
    assert [(s.n_a, s.n_b, s.tie_shared, s.l1_shared) for s in made] == list(asked.values())
    assert len({s.out for s in made}) == len(asked)

@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_leaves_nothing_a_finished_one_stays_and_equal_seeds_give_equal_weights(
        seed, world, tmp_path, monkeypatch):
    (home, flags), save = world, dfc.save
    flags = [*flags, "--seed", seed, "--out", tmp_path / "run"]
    shutil.copytree(home / "cache", tmp_path / "cache")
    def killed(*args, **more):
        save(*args, **more)
        assert not (tmp_path / "run").exists()  # not at this moment either
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(dfc, "save", killed)
        call(dfc, *flags)
    assert not files(tmp_path)
    assert call(dfc, *flags) == 0  # begun again
    done = files(tmp_path)
    assert call(dfc, *flags) == 0 and call(dfc, *flags, "--k", 4) == 2 and files(tmp_path) == done
    a, b = (load_file(folder / "run" / "model.safetensors") for folder in (tmp_path, home))
    assert all(torch.equal(a[n], b[n]) for n in a) is (seed == 0)

@pytest.fixture(scope="session")
def bad(world, tmp_path_factory):
    """A folder with rows, models and runs of every kind that cannot be used, by name."""
    home, row = tmp_path_factory.mktemp("bad"), rows_in(TINY / "tools.jsonl")[0]
    for name in ("RUN", "DAMAGED", "FOREIGN"):
        shutil.copytree(world[0] / "run", home / name)
    shutil.copytree(TINY / "base", home / "MODEL")
    published(home / "PICKLE", b_enc=Bomb())
    for name, text in {
            "FILE": "", "EMPTY.jsonl": " \n", "BROKEN.jsonl": '{"text": "a"}\n{"text": \n',
            "ONE.jsonl": as_lines(row), "TWO.jsonl": as_lines(row, row | {"split": "validation"}),
            "LONE.jsonl": as_lines(row | {"prediction": ""}) + json.dumps(row | {
                "input": "\ud800", "prediction": "\ud800"}),
            "MODEL/chat_template.jinja": "{{ raise_exception('no system role') }}",
            "DAMAGED/metrics.json": '{"config": {"mod', "FOREIGN/metrics.json": "{}"}.items():
        (home / name).write_text(text)
    return home

BAD = """
do not fit:      dfc.py --k 9999; dfc.py --excl .6 --excl-b .6
--seed:          dfc.py --seed 9223372036854775808
memory:          dfc.py --dict 1000000000000
diverged:        dfc.py --lr 1e9
layer 9:         dfc.py --layer 9
MISSING:         dfc.py --model-a MISSING; dfc.py --model-b MISSING
no system role:  dfc.py --model-a MODEL
too few:         dfc.py --tool-texts ONE.jsonl
validation:      dfc.py --tool-texts TWO.jsonl
row 2:           dfc.py --tool-texts LONE.jsonl; eval_toolcall.py --score LONE.jsonl
row 2:           dfc.py --plain-texts BROKEN.jsonl
jsonl:           dfc.py --plain-texts nowhere.jsonl; eval_toolcall.py --score ""
no row:          eval_toolcall.py --score EMPTY.jsonl
FILE:            dfc.py --out FILE/run
another seed:    dfc.py --out RUN --seed 5
no finished run: dfc.py --out MODEL; dfc.py --out FILE; dfc.py --out DAMAGED; dfc.py --out FOREIGN
no finished run: eval_toolcall.py; eval_toolcall.py DAMAGED; steer.py nothing
cannot use:      eval_toolcall.py PICKLE --preset tiny; dfc.py --model-b .; dfc.py --model-b tiny
--alpha:         steer.py RUN --alpha strong
distinct:        steer.py RUN --latents 1 1; steer.py RUN --latents 999"""

@pytest.mark.parametrize("says, command", [
    (says, command) for says, commands in (line.split(":", 1) for line in BAD.split("\n")[1:])
    for command in commands.split(";")])
def test_bad_input_is_one_line_and_status_2_and_nothing_is_lost(
        says, command, bad, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(bad)
    program, *argv = shlex.split(command)
    if program == "dfc.py":
        argv = [*world[1], "--out", tmp_path / "run", *argv]
    before = files(bad)
    assert call({"dfc.py": dfc, "steer.py": steer}.get(program, ev), *argv) == 2
    err = capfd.readouterr().err.strip()
    assert says in err and len(err.splitlines()) == 1
    assert files(bad) == before and not files(tmp_path)

# ---- 7. Scores -----------------------------------------------------------------------------------
@pytest.mark.parametrize("row, output, expected", [  # ToolRL's format, correctness; paper; exact
    (ONE, says(WEATHER), "1 3 2 1"), (ONE, says(SHORT), "1 .75 2 0"),
    (ONE, says(WEATHER.replace("3", "5")), "1 1.5 2 0"),
    (ONE, says(WEATHER.replace("3", '"3"')), "1 1.5 2 0"),
    (ONE, says(WEATHER.replace("3}", '3, "x": 1}')), "1 2.5 2 0"),
    (ONE, says('{"name": "get_weather", "parameters": {}}'), "1 -1.5 2 0"),
    (ONE, says(WEATHER.replace("weather", "time")), "1 -3 2 0"),
    (ONE, says(WEATHER.replace("parameters", "arguments")), "1 -3 2 1"),
    (ONE, says(WEATHER.replace("3}", "3,}")), "1 -3 2 0"),
    (ONE, says(WEATHER, TIME), "1 2.25 2 0"), (ONE, block(WEATHER), "0 3 2 1"),
    (ONE, THINK + "<tool_call>\n" + WEATHER, "0 -3 2 0"), (ONE, RESPONSE, "0 -3 -1 0"),
    (TWO, says(SHORT), "1 0 2 0"), (TWO, says(TIME, SHORT), "1 3 2 1"),
    (row_of(says(SHORT, WEATHER)), says(SHORT), "1 -.5 2 0"),
    (NONE, says(WEATHER), "0 0 2 0"), (NONE, RESPONSE, "1 0 -1 1"),
    # what ToolRL's code decides where its formula leaves a choice
    (ONE, says(WEATHER, '{"name": "x"}'), "1 2.25 2 0"),  # no gold call has the name
    (ONE, says(WEATHER, '{"name": "get_weather"}'), "1 -3 2 0"),
    (ONE, says('{"name": "get_weather", "parameters": []}'), "1 -3 2 0"),
    (ONE, THINK + f"<tool_call>\n{WEATHER}\n<tool_call>\n</tool_call>", "0 3 2 0"),
    (ONE, "<think> </tool_call> </think>\n<tool_call>\n" + WEATHER, "0 3 2 0"),
    (ONE, says(WEATHER) + "<|im_end|>\nmore", "1 3 2 1"), (NONE, RESPONSE + "\nSo.", "0 0 -1 1")])
def test_the_scorers_golden_table(output, row, expected):
    s = ev.score(output, row)
    names = "toolrl_format", "toolrl_correctness", "paper_overall", "exact"
    assert [s[name] for name in names] == pytest.approx([float(v) for v in expected.split()])
    assert s["toolrl"] == s["toolrl_format"] + s["toolrl_correctness"]

def test_the_parser_raises_nothing_whatever_goes_in():
    rng = random.Random(0)
    pieces = ["<tool_call>", "</tool_call>", "</think>", "\n", WEATHER, "{", "}", '"name"', ":",
              "[" * 3000, "null", "\x00", "\ud800", '{"name": 3}', '"arguments": "{}"', "1e999",
              "9" * 5000, '{"name": "a", "arguments": "[1"}']
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        calls, _ = ev.parse_calls(text)
        assert all(name + "" == name and json.loads(values).items() is not None
                   for name, values in calls)
        ev.score(text, TWO), ev.score(text, NONE)

def test_hermes_blocks_are_the_same_calls_and_what_is_broken_is_called_but_never_exact():
    hermes = "\n".join(block(c.replace("parameters", "arguments")) for c in (SHORT, TIME))
    assert ev.parse_calls(hermes) == ev.parse_calls(block(SHORT, TIME))
    as_text = json.dumps({"name": "get_time", "arguments": '{"tz": "CET"}'}, indent=1)
    assert ev.parse_calls(block(as_text)) == ([("get_time", '{"tz": "CET"}')], True)
    for broken in (hermes.removesuffix("</tool_call>"), block(SHORT, TIME, "{"), block() + hermes):
        s = ev.score(THINK + broken, TWO)
        assert (s["called"], s["name"], s["exact"]) == (1, 0, 0)
    assert ev.parse_calls(f"<think> {block(WEATHER)} </think> no") == ([], True)

def test_exact_is_equality_as_json_has_it_and_a_response_where_no_call_is_wanted():
    call_f = '{"name": "f", "parameters": {"x": %s}}'
    for a, b, same in (("3", '"3"', 0), ("1", "true", 0),
                       ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1)):
        assert ev.score(says(call_f % a), row_of(says(call_f % b)))["exact"] == same
    for text, *exact in (("Yes.", 0, 1), (RESPONSE, 1, 1), (THINK, 0, 0), ("<think> If", 0, 0),
                         (THINK + "<response> </response>", 0, 0)):  # has the gold the tag?
        assert [ev.score(text, row)["exact"] for row in (NONE, row_of("It rains."))] == exact

def test_wilson_and_the_paired_bootstrap_are_the_textbooks():
    for hits, low, high in ((8, 49.02, 94.33), (0, 0, 27.75)):
        share = ev.wilson(hits, 10)
        assert list(share.values()) == pytest.approx([10 * hits, low, high], abs=.01)
    after, before = np.random.default_rng(1).integers(0, 2, (2, 400))
    pp, half = 100 * (after - before).mean(), 1.96 * 100 * (after - before).std() / 20
    got = ev.paired(after, before)
    assert list(got.values()) == pytest.approx([pp, pp - half, pp + half], abs=.5)

def test_totals_keep_rows_that_need_a_tool_apart_and_chance_never_reads_the_question():
    rows, said = [ONE, TWO, NONE, NONE], [block(WEATHER), block(SHORT), RESPONSE, block(TIME)]
    t = ev.totals([ev.score(text, row) for text, row in zip(said, rows)], rows)
    assert {group: [v["n"], *(v[name]["pct"] for name in ("exact", "called", "false_call"))]
            for group, v in t.items()} == {
        "all": [4, 50, 75, 25], "needs": [2, 50, 100, 0], "none": [2, 50, 50, 50]}
    assert t["needs"]["toolrl"] == {"mean": (3 + 0) / 2}
    empty = row_of(says('{"name": "get_weather", "parameters": {}}'))
    lines = ev.chance([empty, ONE, NONE, NONE | {"instruction": "no tools"}])
    first, none = (lines[f"chance: {name}"]["all"] for name in (
        "first tool with {}", "always a response"))
    assert first["n"] == 3 and first["paper_tool"]["pct"] == 100  # not the row without tools
    assert first["exact"]["pct"] == none["exact"]["pct"] == pytest.approx(100 / 3)

def test_score_reads_a_file_of_your_own_answers(tmp_path, capsys):
    rows = [ONE | {"prediction": says(WEATHER)}, ONE | {"prediction": "\u2028 no"}]
    bare = {"output": "Hi.", "prediction": "Hello."}  # lists no tools: not in the chance lines
    (tmp_path / "a.jsonl").write_text(as_lines(*rows, bare) + "\r\n")
    assert call(ev, "--score", tmp_path / "a.jsonl") == 0
    out = capsys.readouterr().out  # exact, called, toolrl, paper; exact and false calls
    assert re.search(r"a.jsonl +50.0 +50.0 +0.50 +50.0 +100.0 +0.0\n", out)
    assert out.count("\nchance: ") == 3

# ---- 8. Generate, reconstruct --------------------------------------------------------------------
def slowly(model, tokenizer, prompt, max_new, edit):
    """A greedy answer, one token at a time, nothing kept from one pass to the next. edit(h_TD, n):
    what becomes of block 1's output, the first n tokens of which are the prompt."""
    ids, said = tokenizer(prompt)["input_ids"], []
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    while len(said) < max_new and not ends & set(said):
        with dfc.hooked(model, 1, lambda h: edit(h[0].clone(), len(ids))[None]):
            said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
    return dfc.opened(prompt) + tokenizer.decode([token for token in said if token not in ends])

@pytest.mark.parametrize("family", ["the pair", "Llama", "Mistral", "Gemma2"])
def test_batched_answers_patched_once_or_at_every_token_equal_one_prompt_one_token_at_a_time(
        family, pair):
    models, tokenizer = pair
    model = models["A"] if family == "the pair" else random_model(family)
    rows = rows_in(TINY / "tools.jsonl", "test")[:5]
    prompts = sorted((dfc.prompt_of(row, tokenizer) for row in rows), key=len)[::-1]
    own = dfc.collect(model, tokenizer, prompts, 1).float()
    nothing, *v = torch.zeros_like(own), *(2 * own.std() * torch.randn(3, *own.shape))
    keep_V, v_VND = (1, 0, 1, 0, .5), torch.stack([nothing, own, *v])
    said = ev.generate(model, tokenizer, prompts, 16, 1, keep_V, v_VND, at_once=2000)
    assert said[0] == ev.generate(model, tokenizer, prompts, 16)[0] != said[2]  # a patch of nothing
    assert said[0] == said[1] or family != "the pair"  # its own activation, in fp16
    for keep, v_ND, texts in zip(keep_V, v_VND, said):
        for v_D, prompt, text in zip(v_ND, prompts, texts):
            def patch(h_TD, n):  # at the prompt's last token alone
                h_TD[n - 1] = keep * h_TD[n - 1] + v_D
                return h_TD
            assert text == slowly(model, tokenizer, prompt, 16, patch)
    got, = ev.generate(model, tokenizer, prompts, 16, 1, everywhere=lambda h: h + v[0][0])
    assert got == [slowly(model, tokenizer, p, 16, lambda h, _: h + v[0][0]) for p in prompts]

def test_reconstructions_are_what_the_decoder_says():
    cc, x = scaled(5, 4, 3), torch.randn(6, 2, 16) * 3 + 2
    got, (xhat, f), scale = ev.reconstructions(cc, x, raw=True), cc(x), cc.scale[:, None]
    nothing = cc.b_dec * scale + cc.mean
    slow = {"own activation": x, "reconstruction": xhat, "mean only": nothing.expand(6, 2, 16),
            "reconstruction, raw": (cc(x * scale + cc.mean)[0] - cc.mean) / scale}
    for name, part in cc.parts().items():
        wrote = torch.einsum("nl,lmd->nmd", f[:, part], cc.W_dec[part])
        slow[f"{name} alone"] = nothing + wrote * scale
    for m, versions in enumerate(got.values()):
        assert all(close(versions[name], slow[name][:, m]) for name in slow)
        noise = [versions[f"noise, seed {i}"] - x[:, m] for i in range(3)]
        assert not close(noise[0], noise[1])
        assert all(close(e.norm(dim=1), (xhat - x)[:, m].norm(dim=1)) for e in noise)
    for i in range(6):
        for name, a in (("mean A", x[:, 0].mean(0)), ("another's A", x[i - 1, 0])):
            other = cc(torch.stack([a, x[i, 1]])[None])[0]
            assert close(got["B"][f"reconstruction, {name}"][i], other[0, 1])

def test_prompts_that_do_not_fit_are_left_out_and_counted(world, pair, capsys):
    s, (models, tokenizer) = argparse.Namespace(tool_texts=f"{world[0]}/few.jsonl"), pair
    r = argparse.Namespace(s=s, models=models, tokenizer=tokenizer, max_new=64)
    test = rows_in(s.tool_texts, "test")
    prompts = [dfc.prompt_of(row, tokenizer) for row in test]
    assert ev.rows_of(r, "test") == (test, prompts)
    lengths = list(map(len, dfc.token_ids(tokenizer, prompts)))
    r.max_new = models["A"].config.max_position_embeddings - max(lengths) + 1
    fit, _ = ev.rows_of(r, "test")
    assert fit == [row for row, n in zip(test, lengths) if n < max(lengths)]
    assert capsys.readouterr().out.startswith(f"{len(test) - len(fit)} test rows left out")
    few, bare = ev.rows_of(r, "test", 1, "paper")
    assert len({row["kind"] for row in few}) == len(few) and bare[0] == few[0]["instruction"]

# ---- 9. Steering ---------------------------------------------------------------------------------
def test_cohens_d_is_the_textbook_value_and_auroc_counts_pairs_ties_half():
    p, q = torch.tensor([[2.], [4.], [6.]]), torch.tensor([[1.], [2.], [3.]])
    assert steer.cohens_d(p, q).item() == pytest.approx(2 / ((4 + 1) / 2) ** .5)
    p, q = torch.randint(0, 4, (30, 3)).float(), torch.randint(0, 3, (20, 3)).float()
    slow = [np.mean([(a > b) + .5 * (a == b) for a in p[:, l] for b in q[:, l]]) for l in range(3)]
    assert steer.auroc(p, q).tolist() == pytest.approx(slow)

def test_latent_scaling_tells_a_feature_of_a_alone_from_one_b_has_too_in_any_units():
    cc, f = dfc.Crosscoder(8, 5, 5, 2).requires_grad_(False), torch.rand(500, 5)
    cc.W_dec.zero_(), cc.b_dec.fill_(5)
    for latent, m, place in ((0, 0, 0), (1, 0, 1), (2, 0, 3), (2, 1, 3), (3, 0, 4), (4, 1, 5)):
        cc.W_dec[latent, m, place] = 1
    for scale in torch.tensor([[1., 1.], [10., .1]]):
        cc.scale.copy_(scale)
        x = cc.decode(f)
        x[:, 1, 1] += f[:, 1] * scale[1]  # B has 1 as well: the mask alone hides it
        error, recon = steer.exclusivity(cc, x, f)
        assert error[:4].tolist() == pytest.approx([0, 1, 1, 0], abs=1e-4)
        assert recon[:4].tolist() == pytest.approx([0, 0, 1, 0], abs=1e-4)
    row = dict(contrast="needs/none", partition="A-exclusive", auroc=.95, nu_error=-.1, nu_recon=.4)
    assert steer.specific(row) and not any(steer.specific(row | {name: other}) for name, other in (
        ("partition", "shared"), ("auroc", .89), ("nu_error", -.2), ("nu_recon", 9)))

def test_delta_is_the_formula_alpha_one_the_identity_and_alpha_zero_takes_away():
    cc, h, latents = scaled(32, 4, 3), torch.randn(6, 16) * 3, [3, 6, 20]
    f = cc.encode(torch.stack([h, h], 1))  # k = L: all survive
    for alpha in (0., 1., 4.):  # 6 is B-exclusive and adds nothing
        slow = sum((alpha - 1) * f[:, l, None] * cc.W_dec[l, 0] * cc.scale[0] for l in latents)
        assert close(steer.delta(cc, f, latents, alpha), slow) and slow.any() == (alpha != 1)
    gone, u = steer.delta(cc, f, [0, 2], 0), F.normalize(torch.randn(16), dim=0)
    assert gone.any() and close(steer.taken_away(cc, [0, 2])(h), h + gone)  # at every token
    along = gone.norm(dim=1, keepdim=True) * u
    assert close(steer.taken_away(cc, [0, 2], u)(h), h - along)

@pytest.fixture(scope="session")
def scene(world):
    """The world's run, ready to steer, and its best A-exclusive latent."""
    r = steer.stage(str(world[0] / "run"), None)
    r.max_new = 12
    return r, steer.chosen(r, argparse.Namespace(latents=None))

def test_latents_are_ranked_by_two_contrasts_of_dev_texts_in_the_authors_columns(scene):
    r, rows = scene[0], rows_in(scene[0].s.tool_texts, "dev")
    plain = [piece for row in rows_in(r.s.plain_texts) for piece in dfc.chunks(
        row["text"], r.tokenizer) if dfc.split_of(row) == "dev"][:300]
    needs, none = ([dfc.prompt_of(row, r.tokenizer) for row in rows if ev.needs_tool(row) is yes]
                   for yes in (True, False))
    names = "cohens_d auroc fire_rate_tool fire_rate_nontool"
    for contrast, *sets in (("needs/none", needs, none), ("tool/plain", dfc.tool_texts(
            rows, r.tokenizer, 300, "dfc", 0), plain)):
        p, q = (r.cc.encode(ev.pair_at(r.models, r.tokenizer, texts, r.s.layer)) for texts in sets)
        slow_5L = torch.stack([steer.cohens_d(p, q), steer.auroc(p, q),
                               (p > 0).float().mean(0), (q > 0).float().mean(0)])
        best = sorted(slow_5L[0][slow_5L[0] > 0].tolist())[::-1]
        got = [row for row in r.ranked if row["contrast"] == contrast]
        assert [row["cohens_d"] for row in got] == pytest.approx(best, rel=1e-2)
        for row in got:
            slow = slow_5L[:, row["feature_idx"]].tolist()
            assert [row[n] for n in names.split()] == pytest.approx(slow, rel=1e-2, abs=1e-3)
            assert (row["partition"] == "A-exclusive") is (row["feature_idx"] < r.cc.n_a)

def test_controls_are_all_other_live_latents_and_have_each_prompts_length(scene, monkeypatch):
    (r, latents), seen, dev = scene, [], scene[0].dev
    units, texts = steer.controls_of(r, latents), steer.texts_of(r.s, r.tokenizer, "dev", 300)
    f = r.cc.encode(torch.cat([dev.x_NMD, ev.pair_at(r.models, r.tokenizer, texts, r.s.layer)]))
    live = [l for l in range(r.cc.n_a) if f[:, l].any() and l not in latents]
    (a, b), none = dev.x_NMD[dev.needs].mean(0), dev.x_NMD[~dev.needs][:, 0].mean(0)
    slow = {"latents": r.cc.W_dec[live, 0].detach(), "A - B": (a - b)[None],
            "needs - none": (a - none)[None]}
    for name, rows in slow.items():
        cosines = units[name] @ F.normalize(rows, dim=1).T
        assert len(units[name]) == len(rows) > 0 and close(cosines.amax(0), torch.tensor(1.))
    monkeypatch.setattr(steer, "outcomes", lambda r, p, m, v_VND, *_: seen.append(v_VND) or [
        ([0], 0., [])] * len(v_VND))
    delta, every = torch.randn(5, 128), torch.cat(list(units.values()))[:, None]
    steer.claim(r, None, "A", "down", "", delta, steer.as_long(delta, units, -1), -1)
    assert torch.equal(seen[-1][:2], torch.stack([0 * delta, delta]))
    assert close(seen[-1][2:], -delta.norm(dim=1, keepdim=True) * every)
    monkeypatch.setattr(steer, "best_strength", lambda *args: 3.)
    steer.as_in_a(r, dev, dev, latents, units)
    assert close(seen[-3][1], 3 * steer.delta(r.cc, dev.f_NL, latents, 2))
    assert close(seen[-2][1], 3 * (a - none).expand_as(seen[-2][1]))  # the same to all prompts
    along, u = dev.x_NMD[:, 0] - (a + none) / 2, F.normalize(a - none, dim=0)
    assert close(seen[-1][1], 3 * (along @ u).relu()[:, None] * u)

VERDICTS = """
 10  20  rise   5   3   8   9   beyond every control
 10  20  rise   5   .   8   9   beyond every control
 10  20  rise  12   3   8   9   no
 10  20  rise   5  12   8   9   beyond random
  0  20  rise  -5  -3  -8  -9   no
-20 -10  fall  -5   3   0   9   beyond every control
-20 -10  fall -12   3   0   0   no
-20 -10  fall  -5   -   -   -   beyond random"""

@pytest.mark.parametrize("line", VERDICTS.splitlines()[1:])
def test_a_verdict_needs_the_whole_interval_beyond_each_control(line):
    lo, hi, hoped, *changes = line.split(maxsplit=7)
    names, verdict = ("random", "latents", "A - B", "needs - none"), changes.pop()
    controls = {name: [{"pp": float(c) / i} for i in (1, 2) if c != "."]  # no other live latent
                for name, c in zip(names, changes) if c != "-"}
    effect = {"lo": float(lo), "hi": float(hi)}
    assert steer.judge(effect, controls, 1 if hoped == "rise" else -1) == verdict

def test_the_strength_is_the_smallest_as_good_as_the_best_by_exact_less_false_calls(monkeypatch):
    does = {.5: ([0] * 9, 0.), 1: ([1] * 8 + [0], 5.), 2: ([1] * 8 + [0], 0.), 4: ([1] * 9, 90.)}
    monkeypatch.setattr(steer, "outcomes", lambda r, p, m, v_VND: [
        (*does[v.item()], []) for v in v_VND])
    for strengths, best in (([.5, 1, 2, 4], 1), ([.5, 4], 4), ([.5, 2, 4], 2)):
        assert steer.best_strength(None, None, "A", torch.ones(1), strengths) == best

# ---- 10. The whole method ------------------------------------------------------------------------
def test_a_run_is_evaluated_and_steered_and_keeps_every_answer_total_and_claim(world, capsys):
    run, null, rows = world[0] / "run", world[0] / "null", rows_in(world[0] / "few.jsonl", "test")
    assert call(ev, run) == call(steer, run, null, "--rows", 1) == 0
    after = json.loads((run / "metrics.json").read_text())
    answers = [json.loads(line)["answers"] for line in open(run / "eval.jsonl")]
    for m, versions in after["evaluation"]["models"].items():
        for name, total in versions.items():
            hits = sum(ev.score(a[m][name], row)["exact"] for a, row in zip(answers, rows))
            assert total["all"]["exact"] == pytest.approx(ev.wilson(hits, len(rows)))
            change = total["needs"]["exact"]["pct"] - versions["clean"]["needs"]["exact"]["pct"]
            assert name == "clean" or total["change"]["pp"] == pytest.approx(change)
        assert all(a[m]["own activation"] == a[m]["clean"] for a in answers)
    steering = after["steering"]
    assert {claim["verdict"] for claim in steering["claims"]} == {"too few rows"}
    assert " ".join(f"{c['kind']} {len(c['controls'])}" for c in steering["claims"]) == (
        "down 4 up 4 into B 4 into B 4 as in A 4 as in A 0 as in A 0 down, every token 1")
    assert len(steering["plain_text"]["random"]) == 10 and sum(steering["rows"].values()) == 5
    assert steering["specific"].keys() == {"run", "null"} and 0 < sum(after["l0"].values()) < 8.01
    assert "cohens_d,auroc,fire_rate_tool,fire_rate_nontool" in (run / "ranking.csv").read_text()
    assert call(table, run) == 0  # the sweep's table, the published figures beside ours
    assert "+31.2 ± 9.7, +6.7 ± 4.9" in capsys.readouterr().out

def test_a_prompt_of_your_own_is_answered_clean_and_steered_and_shows_where_the_latent_fires(
        scene, capsys):
    r, latents = scene
    text = rows_in(r.s.tool_texts, "test")[2]["instruction"]
    steer.own_words(r, argparse.Namespace(prompt=text, alpha=[0.]), latents)
    out, prompt = capsys.readouterr().out, steer.own_prompt(r, text)
    assert prompt.count(text) == 2  # said to the row whose tools have most words in common with it
    f_NL = r.cc.encode(ev.pair_at(r.models, r.tokenizer, [prompt], r.s.layer))
    v_VND = torch.stack([steer.delta(r.cc, f_NL, latents, alpha) for alpha in (1, 0)])
    (clean,), (steered,) = ev.generate(r.models["A"], r.tokenizer, [prompt], 12, r.s.layer, (1, 1),
                                       v_VND)
    assert f"alpha = 1\n{clean}" in out and f"alpha = 0\n{steered}" in out
    ids = torch.tensor([dfc.token_ids(r.tokenizer, prompt.removesuffix("<think>") + clean)])
    x_TMD = torch.stack([dfc.residual(m, ids, r.s.layer)[0] for m in r.models.values()], 1)
    fires = {i: f for i, f in enumerate(r.cc.encode(x_TMD)[:, latents[0]].tolist(), 1) if f}
    shown = re.findall(r"^ *(\d+) +['\"].* ([\d.]+)$", out, re.M)
    assert {int(i): float(f) for i, f in shown} == pytest.approx(fires, abs=.01) and fires

def test_a_published_crosscoder_is_evaluated_again_and_again_and_steered(
        world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dfc.SETTINGS, "tool_texts", (f"{world[0]}/few.jsonl", None, ""))
    published("theirs/dfc-D8k", D=128, n=20, k=16)
    for program, more in ((ev, ["--rows", 1]), (steer, ["--prompt", "Hi"])):
        assert call(program, "theirs/dfc-D8k", "--preset", "tiny", *more) == 0
    metrics, = Path("runs").glob("*/metrics.json")
    assert call(ev, metrics.parent, "--rows", 1) == 0  # its results, by their folder
    result = json.loads(metrics.read_text())
    assert "reconstruction, raw" in result["evaluation"]["models"]["B"]

# ---- 11. The embedded pair, the README, the pieces -----------------------------------------------
def test_no_question_of_a_test_row_is_asked_in_train_or_dev_and_every_gold_answer_is_exact():
    asked, kinds = {True: set(), False: set()}, Counter()
    for row in rows_in(TINY / "tools.jsonl"):
        asked[row["split"] == "test"].add(row["input"].strip().lower())
        kinds[row["kind"]] += row["split"] == "test"
        assert ev.score(row["output"], row)["exact"] == 1
        assert ev.needs_tool(row) is (row["kind"] in ("ask", "hint"))
    assert min(kinds.values()) >= 60 and not asked[True] & asked[False]

def test_the_pair_behaves_as_its_readme_says(pair):
    table = re.findall(r"^\| (base|toolrl) \| (\w+) \| \d+ \| \d+ \((\d+)-(\d+)\)",
                       (TINY / "README.md").read_text(), re.M)
    for name, kind, low, high in table:
        rows = [row for row in rows_in(TINY / "tools.jsonl", "test") if row["kind"] == kind][:20]
        prompts, m = [dfc.prompt_of(row, pair[1]) for row in rows], "AB"[name == "base"]
        said, = ev.generate(pair[0][m], pair[1], prompts, 64)
        exact = ev.wilson(sum(ev.score(text, row)["exact"] for text, row in zip(said, rows)), 20)
        assert exact["lo"] <= int(high) and int(low) <= exact["hi"] and len(table) == 10

def test_every_command_of_the_readme_is_understood(monkeypatch):
    parse = argparse.ArgumentParser.parse_args
    def parse_only(*args):
        parse(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    lines = re.findall(r"^ {4}([^#\n]*)", (ROOT / "README.md").read_text(), re.M)
    commands = re.findall(r"\bpython ([\w/]+\.py)([^&;\n]*)", "\n".join(lines))
    assert commands
    for program, argv in commands:
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(argv)])
        with pytest.raises(KeyboardInterrupt):
            runpy.run_path(str(ROOT / program), run_name="__main__")

def test_the_piece_in_the_readme_runs():
    exec(re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1], {})

PIECES = {  # a piece and what to copy with it: an example
    "Crosscoder": "Crosscoder(16, 32, 5, 4, 3, True)(x)",
    "train batches Sparse aux_loss":
        "train(cc.requires_grad_(), x, 9, 16, 1e-2, dead_after=2), cc.W_enc",
    "fve": "fve(x, cc(x)[0])",
    "collect alike token_ids residual hooked blocks DeepEnough":
        "collect(model, tokenizer, ['abc', 'de'], 1)",
    "chunks token_ids": "chunks('One two. Three four! Five.', tokenizer, 4)",
    "reconstructions": "reconstructions(cc, x, True)", "taken_away": "taken_away(cc, [0])(x[:, 0])",
    "score parse_calls responds toolrl_format toolrl_correctness jaccard tool_names":
        "score(gold, {'output': gold})",
    "generate alike token_ids opened hooked blocks once":
        "generate(model, tokenizer, ['An alarm', 'Hi'], 3, 1, (0,), x[None, :2, 0])"}

@pytest.mark.parametrize("names", PIECES, ids=lambda names: names.split()[0])
def test_each_piece_can_be_copied_alone(names, pair):
    here, copied, made = {}, {}, []  # the three files; a file with the piece and the libraries
    for module in (dfc, ev, steer):
        here |= vars(module)
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if (getattr(node, "name", "") in names.split() or isinstance(node, ast.Import)
                    or getattr(node, "module", "dfc") not in ("dfc", "eval_toolcall")):
                exec(ast.unparse(node), copied)
    for there in (here, copied):
        torch.manual_seed(0)
        made.append(str(eval(PIECES[names], there | {
            "cc": scaled(5, 4, 3), "x": torch.randn(80, 2, 16), "tokenizer": pair[1],
            "model": random_model("Qwen2"), "gold": says(SHORT)})))
    assert made[0] == made[1]

# ---- 12. Extras ---------------------------------------------------------------------------------
def test_grid_cells_equal_steering_one_prompt_at_a_time_and_are_not_done_again(
        scene, tmp_path, monkeypatch):
    r = argparse.Namespace(**vars(scene[0]) | {"folder": tmp_path, "max_new": 40})
    cells = [(1.,), (0., *scene[1]), (4., *scene[1])]
    p = steer.place(r, "test", 1)
    found = grid.answer(r, p, cells)
    for alpha, *some in cells:
        d_ND = steer.delta(r.cc, p.f_NL, some, alpha)
        said = [ev.generate(r.models["A"], r.tokenizer, [prompt], 40, r.s.layer, (1,),
                            d_D[None, None])[0][0] for prompt, d_D in zip(p.prompts, d_ND)]
        exact = [ev.score(text, row)["exact"] for text, row in zip(said, p.rows)]
        assert found[alpha, *some]["exact"] == [e for e, needs in zip(exact, p.needs) if needs]
    monkeypatch.setattr(grid, "outcomes", None)
    assert grid.answer(r, p, cells)[cells[1]]["exact"] == found[cells[1]]["exact"]

def test_the_best_cell_is_chosen_on_dev_and_reported_on_test():
    def place(*cells):
        keys = (1.,), (2., 5), (4., 5)
        return {key: {"exact": e, "false_calls": false} for key, (e, false) in zip(keys, cells)}
    dev = place(([0, 0], 0), ([0, 1], 0), ([1, 1], 90))
    test = place(([0, 0], 0), ([1, 1], 3), ([1, 0], 60))
    for less_false, chosen in ((0, (4, 50, 60)), (1, (2, 100, 3))):
        best = grid.best_of(dev, test, {("A", 1, 2.): [5], ("A", 1, 4.): [5]}, less_false)
        assert (best["alpha"], best["test"]["pp"], best["false_calls"]) == chosen

