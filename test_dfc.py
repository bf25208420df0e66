"""The specification of dfc: what is true of every piece, one sentence a test, in the order of the
three files. Where there is one, a piece is compared with a slow, obvious version of it.

    pytest        # a minute on 2 CPU cores, without a GPU and without a network
"""
# ruff: noqa: S102 - what is executed are this project's own examples

import os

# before the libraries look at it
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import ast
import copy
import dataclasses
import functools
import json
import random
import re
import runpy
import shlex
import shutil
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import constants
from pytest import approx, raises
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import dfc
import eval_toolcall as ev
import steer
from extras import grid, latent_scaling, published, saturation, table, toy
from tiny import make

ROOT = Path(dfc.__file__).resolve().parent
TINY = ROOT / "tiny"
torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings


once = pytest.fixture(scope="session")  # made once, for all tests
each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@once
def models():
    """The toy pair."""
    return {name: dfc.load_model(str(TINY / name), "cpu")[0] for name in ("toolrl", "base")}


@once
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY / "toolrl")


def close(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol)


def as_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def cells_of(table):
    """The cells of each line of a table; two blanks or more part them."""
    return [re.split(" {2,}", line) for line in re.findall(r"\S.*", table)]


def rows_in(file, split=None):
    return [row for row in dfc.read_rows(str(file), ())
            if split in (None, row.get("split"))]


# ---- 1. The crosscoder ---------------------------------------------------------------------------
def small(n_a=4, n_b=3, tied=False, k=5, L=32, D=8):
    return dfc.Crosscoder(D, L, k, n_a, n_b, tied)


def scaled(k, n_a, n_b):
    """A crosscoder of vectors of width 16, whose raw units are not its own."""
    cc = dfc.Crosscoder(16, 32, k, n_a, n_b).requires_grad_(False)
    cc.mean.normal_(2)
    cc.scale.uniform_(.5, 3)
    cc.b_enc.normal_(std=.1)
    cc.b_dec.normal_(std=.1)
    return cc


def fit(cc, x_NMD, steps=30):
    cc.fit_scale(x_NMD)
    cc.fair_start(x_NMD)
    return dfc.train(cc, x_NMD, steps, batch=64, lr=1e-2, dead_after=2)


def slow_forward(cc, x_MD):
    """(1) to (4) for one pair, a latent at a time -> (xhat_MD, f_L)."""
    z_MD = (x_MD - cc.mean) / cc.scale
    pre = [float((z_MD * cc.W_enc[:, :, l]).sum() + b) for l, b in enumerate(cc.b_enc)]

    best = sorted(pre)[-cc.k:]
    f_L = torch.tensor([p if p in best and p > 0 else 0. for p in pre])

    zhat_MD = cc.b_dec.clone()
    for f, row_MD in zip(f_L, cc.W_dec):
        zhat_MD += f * row_MD
    return zhat_MD * cc.scale + cc.mean, f_L


def kept(pre_BL, k):
    """pre_BL with all but the k largest of each row set to zero, and none below zero."""
    top = pre_BL.topk(k)
    return torch.zeros_like(pre_BL).scatter(1, top.indices, top.values.relu())


def test_top_k_encoder_and_decoder_match_a_python_loop():
    cc = scaled(5, 4, 3)
    x_BMD = torch.randn(6, 2, 16) * 3 + 1

    xhat_BMD, f_BL = cc(x_BMD)

    for x_MD, xhat_MD, f_L in zip(x_BMD, xhat_BMD, f_BL):
        slow_xhat_MD, slow_f_L = slow_forward(cc, x_MD)
        assert close(f_L, slow_f_L)
        assert close(xhat_MD, slow_xhat_MD)


def test_an_empty_partition_is_the_plain_crosscoder():
    cc = small(n_a=0, n_b=0)
    x_NMD = torch.randn(256, 2, 8)

    fit(cc, x_NMD)

    assert [part.name for part in cc.partitions()] == ["shared"]
    assert cc.W_enc.all()
    assert cc.W_dec.all()

    # that is: one sparse autoencoder of the pair laid end to end
    z_NE = cc.normalise(x_NMD).flatten(1)
    f_NL = kept(z_NE @ cc.W_enc.flatten(0, 1) + cc.b_enc, 5)
    zhat_NE = f_NL @ cc.W_dec.flatten(1) + cc.b_dec.flatten()
    xhat_NMD, _ = cc(x_NMD)
    assert close(cc.normalise(xhat_NMD).flatten(1), zhat_NE)


@each("n_a, n_b, tied", [(4, 3, False), (4, 0, True), (16, 16, False)])
def test_exclusive_latents_never_touch_the_other_model(n_a, n_b, tied):
    n = n_a + n_b
    cc = small(n_a, n_b, tied, k=2)
    cc.W_enc.data[..., ::2] *= .1  # too weak to be picked
    x_NMD = torch.randn(256, 2, 8)

    loss = fit(cc, x_NMD)

    assert loss["aux"] > 0  # trained, also by the auxiliary loss
    own = [[True, False]] * n_a + [[False, True]] * n_b
    for trained in (cc, copy.deepcopy(cc)):
        # the models that a latent reads, and those that it writes
        assert trained.W_enc.any(1).T[:n].tolist() == own
        assert trained.W_dec.any(2)[:n].tolist() == own

        # one decoder row for both models, where shared latents are tied
        if n < 32:
            rows_a, rows_b = trained.W_dec[n:].unbind(1)
            assert torch.equal(rows_a, rows_b) is tied


def test_a_fair_start_gives_every_partition_the_same_spread():
    cc = dfc.Crosscoder(32, 600, 8, 200, 200, True)
    x_NMD = torch.randn(1000, 2, 32)
    x_NMD[:, 1] += 2 * x_NMD[:, 0]  # they are alike

    shared_MDL = cc.W_enc[..., 400:].clone()
    assert torch.equal(shared_MDL, cc.W_dec[400:].permute(1, 2, 0) / 2)  # the mean of two models
    cc.fit_scale(x_NMD)
    cc.fair_start(x_NMD)

    assert torch.equal(cc.W_enc[..., 400:], shared_MDL)
    pre_NL = cc.preactivate(cc.normalise(x_NMD))
    spread = [pre_NL[:, part.latents].std().item() for part in cc.partitions()]
    assert spread == approx([spread[-1]] * 3, rel=.01)


# ---- 2. Losses -----------------------------------------------------------------------------------
def slow_revival(cc, z_BMD, zhat_BMD, pre_BL, dead_L):
    """(7), before its weight: the dead latents of one partition after another."""
    quarter = len(z_BMD) // 4 + 1
    error_BMD = (z_BMD - zhat_BMD).detach()
    total = torch.zeros(())
    for part in cc.partitions():
        eager_L = torch.zeros_like(dead_L)
        eager_L[part.latents] = dead_L[part.latents]
        if eager_L.any():
            f_BL = kept(pre_BL * eager_L, 2 * cc.k)
            guess_BMD = torch.einsum("bl,lmd->bmd", f_BL, cc.W_dec)
            writes_M = cc.W_dec[part.latents].any(0).any(1)
            total = total + (error_BMD - guess_BMD)[:quarter, writes_M].pow(2).mean()
    return total


def slow_train(cc, x_NMD, steps, batch, lr, l1_mean, l1_shared, l1_excl, revive, schedule,
               dead_after):
    """train() by its formulas, with dense products, and SGD."""
    n_exclusive = cc.n_a + cc.n_b
    lambda_L = torch.full([len(cc.b_enc)], l1_shared)
    lambda_L[:n_exclusive] = l1_excl
    silent_L = torch.zeros_like(lambda_L)
    order = dfc.batches(len(x_NMD), batch, 0)

    for step in range(steps):
        # forward
        z_BMD = cc.normalise(x_NMD[next(order)])
        pre_BL = cc.preactivate(z_BMD)
        f_BL = kept(pre_BL, cc.k)
        zhat_BMD = torch.einsum("bl,lmd->bmd", f_BL, cc.W_dec) + cc.b_dec
        silent_L = torch.where(f_BL.any(0), 0, silent_L + 1)

        # loss
        loss = (z_BMD - zhat_BMD).pow(2).mean()
        if l1_mean:
            loss = loss + (lambda_L * f_BL).mean()
        else:
            length_L = cc.W_dec.flatten(1).norm(dim=1)
            loss = loss + (lambda_L * f_BL * length_L).sum(1).mean()
        dead_L = silent_L > dead_after
        loss = loss + revive * slow_revival(cc, z_BMD, zhat_BMD, pre_BL, dead_L)

        # step
        rate = lr
        if schedule:
            rate = lr * min(1, (step + 1) / (.05 * steps), (steps - step) / (.2 * steps))
        cc.zero_grad()
        loss.backward()
        cc.confine(cc.W_enc.grad, cc.W_dec.grad)
        torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        for p in cc.parameters():
            p.data -= rate * p.grad


@each("n_a, n_b, tied, l1_mean, revive, schedule", [
    (0, 0, False, False, 1 / 32, True),
    (12, 0, True, False, 1 / 32, True),
    (12, 9, False, False, 1 / 32, False),
    (12, 9, False, True, 0, False),
])
def test_training_on_active_latents_alone_equals_dense_products(
        n_a, n_b, tied, l1_mean, revive, schedule, monkeypatch):
    x_NMD = torch.randn(600, 2, 8) * 2 + 1

    def sgd(parameters, lr, fused):
        return torch.optim.SGD(parameters, lr)

    def trained(train):
        torch.manual_seed(1)
        cc = small(n_a, n_b, tied, k=3, L=96)
        cc.fit_scale(x_NMD)
        cc.W_enc.data[..., ::2] *= .2  # so that many are dead
        cc.W_dec.data *= 3             # and gradients are clipped
        train(cc, x_NMD, steps=40, batch=64, lr=1., l1_mean=l1_mean, l1_shared=1e-2, l1_excl=3e-2,
              revive=revive, schedule=schedule, dead_after=2)
        return cc.parameters()

    monkeypatch.setattr(torch.optim, "Adam", sgd)  # Adam does not see a gradient's length
    for fast, slow in zip(trained(dfc.train), trained(slow_train)):
        assert close(fast, slow, 1e-5)


def test_predicting_the_mean_gives_fve_0_and_the_truth_1():
    x_NMD = torch.randn(50, 2, 8) * 100 + 1000
    xhat_NMD = x_NMD.clone()
    xhat_NMD[:, 1] = x_NMD[:, 1].mean(0)

    assert dfc.fve(x_NMD, xhat_NMD).tolist() == approx([1, 0], abs=1e-9)


# ---- 3. Activations ------------------------------------------------------------------------------
SIZES = """
vocab_size=1024 hidden_size=16 intermediate_size=32 num_hidden_layers=3 num_attention_heads=2
num_key_value_heads=1 pad_token_id=0 num_experts=4 num_local_experts=4 num_experts_per_tok=2
moe_intermediate_size=16 shared_expert_intermediate_size=16 full_attention_interval=3
linear_num_key_heads=2 linear_num_value_heads=2 linear_key_head_dim=8 linear_value_head_dim=8
"""  # each family takes what it knows of these, and what is its own
FAMILIES = """
Llama
Qwen2
Qwen3       head_dim=8
Qwen3Moe    head_dim=8
Qwen3Next   head_dim=8 (two blocks of three have no attention)
Mistral     head_dim=8 sliding_window=16
Mixtral     head_dim=8
Gemma2      head_dim=8 sliding_window=16
Gemma3Text  head_dim=8 sliding_window=16
Phi3
Olmo2
GPTNeoX
GPT2
Falcon
Bloom       (its blocks put out tuples, and it has no greatest position)
"""


def random_model(family, **more):
    """A small model of one of the library's families."""
    own = re.search(f"^{family} *(.*)", FAMILIES, re.MULTILINE)[1]
    sizes = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", SIZES + own)}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@once
def book():
    """Plain text, of some 4,000 characters."""
    return " ".join(row["text"] for row in rows_in(TINY / "text.jsonl")[:40])


@each("family", re.findall(r"^\w+", FAMILIES, re.MULTILINE))
def test_collect_equals_hidden_states_of_single_texts_whatever_the_batch(family, tokenizer, book):
    model = random_model(family)
    texts = [book[i:i + n] for i, n in enumerate((3, 300, 1, 17))]

    for layer, longest in ((0, 4096), (1, 4096), (1, 50)):
        x_NMD = dfc.collect([model, model], tokenizer, texts, layer, longest).float()  # by fp16

        for text, x_MD in zip(texts, x_NMD):
            ids_1T = torch.tensor([tokenizer(text)["input_ids"][-longest:]])
            states = model(ids_1T, output_hidden_states=True).hidden_states
            assert close(x_MD, states[layer + 1][0, -1], 1e-2)


def test_a_hook_edits_one_blocks_output_and_is_gone_after_an_exception():
    model = random_model("Llama")
    ids_1T = torch.tensor([[5, 6, 7]])
    h_1TD = dfc.residual_stream(model, ids_1T, 1)
    logits = model(ids_1T).logits

    with raises(ZeroDivisionError), dfc.hooked(model, 1, lambda h_1TD: h_1TD + 1):
        edited_1TD = dfc.residual_stream(model, ids_1T, 1)
        edited_logits = model(ids_1T).logits
        raise ZeroDivisionError

    assert close(edited_1TD, h_1TD + 1)
    assert not close(edited_logits, logits)
    assert torch.equal(model(ids_1T).logits, logits)


def test_activations_are_kept_under_all_that_changes_them(tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(TINY / "toolrl", tmp_path / name)
    rows = shutil.copy(TINY / "tools.jsonl", tmp_path)
    s = dfc.Settings(model_a=f"{tmp_path}/a", model_b=f"{tmp_path}/b", tool_texts=rows,
                     out=f"{tmp_path}/run")
    loaded = []

    def collect(models, tokenizer, texts, layer, longest):
        loaded.append(texts)
        return torch.full([len(texts), 2, 4], float(layer))

    def is_new(n=2, split="dev", **changed):
        loaded.clear()
        there = dataclasses.replace(s, **changed)
        x_NMD = dfc.activations(there, split, n, there.seed, there.whole_prompts)
        assert x_NMD.eq(there.layer).all()
        assert len(x_NMD) == 2 * n
        return bool(loaded)

    monkeypatch.setattr(dfc, "collect", collect)

    # the same again, and something else
    assert is_new()
    assert not is_new()
    for changed in ({"layer": 0}, {"n": 3}, {"split": "train"}, {"seed": 1}, {"longest": 100},
                    {"whole_prompts": False}):
        assert is_new(**changed)
    for touched in ("a/model.safetensors", "b/model.safetensors", "tools.jsonl"):
        os.utime(tmp_path / touched)
        assert is_new()

    # what a link points to, and not the time of its folder; a damaged file
    weights = tmp_path / "b/model.safetensors"
    for there in ("base", "early"):
        weights.unlink()
        weights.symlink_to(TINY / there / "model.safetensors")
        assert is_new()
    os.utime(tmp_path / "a")
    assert not is_new()
    for file in (tmp_path / "cache").glob("*.pt"):
        os.truncate(file, 60)
    assert is_new()


# ---- 4. Texts ------------------------------------------------------------------------------------
TOOLS = "1. Name: get_weather\n2. Name: get_time\n3. Name: get_weather_alerts"
WORDS = dict(cells_of("""
[         <tool_call>
]         </tool_call>
THINK     <think> t </think>
OPEN      <think> t
RESPONSE  <response> hi </response>
WEATHER   {"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}
SHORT     {"name": "get_weather", "parameters": {"city": "Paris"}}
EMPTY     {"name": "get_weather", "parameters": {}}
LIST      {"name": "get_weather", "parameters": []}
BARE      {"name": "get_weather"}
PART      {"name": "weather", "parameters": {}}
LONGER    {"name": "my_get_time", "parameters": {}}
TIME      {"name": "get_time", "parameters": {"tz": "CET"}}
RENAMED   {"name": "get_time", "parameters": {"city": "Paris", "days": 3}}
FIVE      {"name": "get_weather", "parameters": {"city": "Paris", "days": 5}}
TEXT      {"name": "get_weather", "parameters": {"city": "Paris", "days": "3"}}
DECIMAL   {"name": "get_weather", "parameters": {"city": "Paris", "days": 3.0}}
MORE      {"name": "get_weather", "parameters": {"city": "Paris", "days": 3, "x": 1}}
COMMA     {"name": "get_weather", "parameters": {"city": "Paris", "days": 3,}}
HERMES    {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}
INT       {"name": "f", "parameters": {"x": 1}}
TRUE      {"name": "f", "parameters": {"x": true}}
AB        {"name": "f", "parameters": {"x": {"a": 1, "b": 2}}}
BA        {"name": "f", "parameters": {"x": {"b": 2, "a": 1}}}
"""))  # OPEN is a thought that does not end


def spell(words):
    """A text of these words, a line each; those that are not in WORDS stand for themselves."""
    return "\n".join(WORDS.get(word, word) for word in words.split())


def row_of(words):
    return {"instruction": TOOLS, "input": "q", "output": spell(words)}


ONE = row_of("THINK [ WEATHER ]")
TWO = row_of("THINK [ SHORT TIME ]")
NONE = row_of("THINK RESPONSE")


def test_a_row_belongs_to_one_split_and_needs_a_tool_where_its_answer_calls_one():
    counts = Counter(dfc.split_of({"text": str(i)}) for i in range(2000))
    doubts = row_of("<think> no [ ? </think> RESPONSE")

    assert 150 < min(counts["dev"], counts["test"]) < 250
    assert dfc.split_of({"text": "0", "split": "dev"}) == "dev"
    assert ev.needs_tool(ONE)
    assert not ev.needs_tool(doubts)


def test_half_of_the_tool_texts_are_whole_prompts_and_half_go_on_into_the_answer(
        tokenizer, tmp_path):
    row = rows_in(TINY / "tools.jsonl", "train")[0]
    (tmp_path / "one.jsonl").write_text(as_lines(row))
    prompt = dfc.prompt_of(row, tokenizer)
    whole = prompt + row["output"].removeprefix(dfc.answer_prefix(prompt))

    texts = dfc.tool_texts(f"{tmp_path}/one.jsonl", tokenizer, "train", 40)

    assert whole.count("<think>") == 1
    assert texts[:20] == [prompt] * 20
    assert len(texts) == 40
    assert len(set(texts[20:])) > 5
    for text in texts[20:]:
        assert whole.startswith(text)
        assert whole[len(text)].isspace()

    # as published: chunks that end with a sentence, none a whole prompt
    pieces = dfc.tool_texts(f"{tmp_path}/one.jsonl", tokenizer, "train", 40, whole_prompts=False)
    assert prompt not in pieces
    assert min(map(len, dfc.token_ids(tokenizer, pieces))) >= 30


def test_plain_text_begins_as_the_tokenizer_begins_it_and_prompts_as_the_template_does(
        tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    start = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[start])

    tool_texts = dfc.tool_texts(str(TINY / "tools.jsonl"), tokenizer, "dev", 3)
    plain_texts = dfc.plain_texts(str(TINY / "text.jsonl"), tokenizer, "dev", 3)

    assert all(text.startswith("<|endoftext|>") for text in plain_texts)
    assert not any(text.startswith("<|endoftext|>") for text in tool_texts)


def test_rows_of_a_data_set_are_those_of_its_file(tmp_path):
    pytest.importorskip("datasets")
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(as_lines(ONE, TWO))

    assert list(dfc.read_rows(str(file.parent), dfc.TOOL_ROW)) == [ONE, TWO]


def test_a_model_may_be_a_name_of_the_hub(tmp_path, monkeypatch):
    """Here as the hub's client keeps it, out of the hub's reach."""
    repo = tmp_path / "models--owner--name"
    shutil.copytree(TINY / "toolrl", repo / "snapshots/1")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    s = dfc.Settings(model_a="owner/name", model_b=str(TINY / "toolrl"), out=f"{tmp_path}/run")
    x_NMD = dfc.activations(s, "dev", 2)

    assert torch.equal(x_NMD[:, 0], x_NMD[:, 1])


# ---- 5. Train, save, load ------------------------------------------------------------------------
def publish(folder, D=8, n=2, k=4, **more):
    """A folder in the form of the paper's checkpoints, from random weights -> its crosscoder."""
    cc = dfc.Crosscoder(D, 64, k, n, n)
    state = cc.state_dict()
    del state["mean"], state["scale"]
    if n > 0:
        state.update(enc_mask=torch.ones(2, 64), dec_mask=torch.ones(64, 2))
    config = {"activation_dim": D, "dict_size": 64, "k": k, "n_a": n, "n_b": n}

    folder = Path(folder)
    folder.mkdir(parents=True)
    torch.save({**state, **more}, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hparams.json").write_text('{"layer": 1, "steps": 9, "exclusive_sparsity_coef": 0}')
    return cc


class Bomb:
    """What explodes when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def is_specific(cc, x_NMD, f_PL, f_QL):
    """Is there an A-exclusive latent that separates P from Q and that A alone has?"""
    nu_error_L, nu_recon_L = latent_scaling.exclusivity(cc, x_NMD, cc.encode(x_NMD))
    for row in steer.rank_latents(cc, f_PL, f_QL):
        l = row["feature_idx"]
        alone = abs(nu_error_L[l]) < .2 and abs(nu_recon_L[l]) < .5
        if row["partition"] == "A-exclusive" and row["auroc"] >= .9 and alone:
            return True
    return False


def test_what_is_saved_and_loaded_has_the_authors_names_and_speaks_raw_units(tmp_path):
    cc = small(tied=True)
    x_NMD = torch.randn(400, 2, 8) * torch.tensor([[.05], [90.]]) + 7
    fit(cc, x_NMD, 300)
    cc.save_pretrained(tmp_path / "run")

    again = dfc.load(str(tmp_path / "run"))
    state = load_file(tmp_path / "run" / "model.safetensors")

    assert (again.k, again.n_a, again.n_b, again.tied) == (5, 4, 3, True)
    shapes = {name: list(weights.shape) for name, weights in state.items()}
    assert shapes == json.loads("""{
        "W_enc": [2, 8, 32], "b_enc": [32], "W_dec": [32, 2, 8], "b_dec": [2, 8],
        "mean": [2, 8], "scale": [2, 8]
    }""")

    # raw in, raw out
    xhat_NMD, _ = again(x_NMD)
    assert torch.equal(xhat_NMD, cc(x_NMD)[0])
    assert dfc.fve(x_NMD, xhat_NMD).min() > .5


def test_cut_and_foreign_crosscoders_are_refused(tmp_path):
    small().save_pretrained(tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 900)

    for folder in (tmp_path / "cut", tmp_path / "nothing", TINY / "base"):
        with raises(ValueError, match=str(folder)):
            dfc.load(folder)


@each("same", [False, True])
def test_planted_exclusive_features_are_recovered_and_two_equal_models_yield_none(same):
    x_NMD, d_CMD = toy.plant(C=40, D=32, N=4000, active=3)  # concepts 0 to 7 are A's alone
    if same:
        x_NMD[:, 1] = x_NMD[:, 0]

    cc = toy.fit(x_NMD, .125, tied=True, k=3, steps=500).requires_grad_(False)

    # is a latent of A alone the one that "needs" concept c?
    specific = 0
    for c in range(8):
        ordered_NMD = x_NMD[(x_NMD[:, 0] @ d_CMD[c, 0]).argsort()]
        f_PL = cc.encode(ordered_NMD[-200:])
        f_QL = cc.encode(ordered_NMD[:200])
        ends_NMD = torch.cat([ordered_NMD[-200:], ordered_NMD[:200]])
        specific += is_specific(cc, ends_NMD, f_PL, f_QL)

    if same:
        assert specific == 0
    else:
        assert specific >= 6
        assert toy.grade(cc, x_NMD, d_CMD, 0).recall >= .75
        assert toy.grade(cc, x_NMD, d_CMD, 1).recall >= .75


# ---- 6. The program dfc.py -----------------------------------------------------------------------
def call(program, *argv):
    """A program's exit status."""
    try:
        return dfc.cli(program.main, list(map(str, argv))) or 0
    except SystemExit as e:  # argparse
        return e.code


def files(home):
    """{file: its bytes} of a folder, less the cache of activations."""
    return {file: file.read_bytes() for file in home.rglob("*")
            if file.is_file() and file.parent.name != "cache"}


class World(NamedTuple):
    home: Path    # a folder with tool rows and a run
    rows: Path    # the two shortest tool rows of every kind and split
    run: Path
    flags: list   # how it was trained


@once
def world(tmp_path_factory):
    """A trained run; from then on dfc.py collects at most 60 texts of a kind."""
    home = tmp_path_factory.mktemp("world")
    kinds = {}
    for row in sorted(rows_in(TINY / "tools.jsonl"), key=lambda row: len(row["instruction"])):
        kinds.setdefault((row["split"], row["kind"]), []).append(row)
    few = [row for rows in kinds.values() for row in rows[:2]]
    (home / "few.jsonl").write_text(as_lines(*few))

    flags = f"--tool-texts {home}/few.jsonl --n-texts 60 --steps 200 --dict 96 --excl .12"
    world = World(home, home / "few.jsonl", home / "run", flags.split())
    activations = dfc.activations

    def few(s, split, n, *more):
        return activations(s, split, min(n, 60), *more)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(dfc, "activations", few)
        assert call(dfc, *world.flags, "--out", world.run) == 0
        yield world


ASKED = """
--excl 0                                      0 0 False 2e-05
--excl .05                                    25 0 True 2e-05
--excl-b .05                                  51 25 True 2e-05
--recipe paper                                51 51 False 0.001
--recipe paper --excl 0                       0 0 False 0.001
--recipe paper --tie-shared --l1-shared 0     51 51 True 0.0
--recipe paper --preset paper                 819 819 False 0.001
"""  # n_a, n_b, tied, l1_shared


def test_recipe_and_preset_fill_in_what_is_not_asked_for_and_each_run_has_a_folder_of_its_own():
    folders = set()
    for flags, expected in cells_of(ASKED):
        s = dfc.parse_args(flags.split())
        cc = dfc.new_crosscoder(s, 1)
        assert f"{cc.n_a} {cc.n_b} {cc.tied} {s.l1_shared}" == expected
        folders.add(s.out)

    assert len(folders) == 7


def test_the_published_recipe_switches_every_departure_off():
    paper = dfc.parse_args(["--recipe", "paper"])

    departures = "excl_b tie_shared fair_start by_coordinate l1_mean revive schedule whole_prompts"
    for name in departures.split():
        assert getattr(paper, name) != getattr(dfc.Settings(), name)

    # an encoder of its own, where ours reads what it writes
    for settings, alike in ((paper, False), (dfc.Settings(), True)):
        cc = dfc.new_crosscoder(settings, 8)
        assert torch.equal(cc.W_enc[0, :, 0], cc.W_dec[0, 0]) is alike


@each("seed", [0, 1])
def test_a_killed_run_leaves_nothing_a_finished_one_stays_and_equal_seeds_give_equal_weights(
        seed, world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = [*world.flags, "--seed", seed, "--out", run]
    shutil.copytree(world.home / "cache", tmp_path / "cache")
    save = dfc.Crosscoder.save_pretrained

    def save_and_die(*args):
        save(*args)
        assert not run.exists()  # not at this moment either
        raise KeyboardInterrupt

    # killed
    with monkeypatch.context() as m, raises(KeyboardInterrupt):
        m.setattr(dfc.Crosscoder, "save_pretrained", save_and_die)
        call(dfc, *flags)
    assert not files(tmp_path)

    # begun again, then asked for once more, then with another setting
    assert call(dfc, *flags) == 0
    done = files(tmp_path)
    assert call(dfc, *flags) == 0
    assert call(dfc, *flags, "--k=4") == 2
    assert files(tmp_path) == done

    # the world's run has seed 0
    theirs = (world.run / "model.safetensors").read_bytes()
    assert (done[run / "model.safetensors"] == theirs) is (seed == 0)


def test_texts_weights_and_batches_depend_on_the_seed_and_dev_texts_are_only_measured(
        tmp_path, monkeypatch):
    drawn = []

    def activations(s, split, n, seed=0, whole_prompts=True):
        drawn.append((split, seed))
        return torch.arange(160.).reshape(10, 2, 8).sin() + 9 * (split == "dev")

    def train(cc, x_NMD, *how, seed):
        drawn.append((cc.W_dec.sum().item(), seed, x_NMD.mean() > 5))
        return {}

    def measure(cc, x_NMD, dev_NMD):
        assert dev_NMD.mean() > 5 > x_NMD.mean()
        return {}

    for stub in (activations, train, measure):
        monkeypatch.setattr(dfc, stub.__name__, stub)
    for seed in (3, 4):
        dfc.train_run(dfc.parse_args(["--seed", str(seed), "--out", f"{tmp_path}/{seed}"]))

    assert drawn[0::3] == [("train", 3), ("train", 4)]
    assert drawn[1::3] == [("dev", 0), ("dev", 0)]
    (weights_3, *rest_3), (weights_4, *rest_4) = drawn[2::3]
    assert weights_3 != weights_4
    assert [rest_3, rest_4] == [[3, False], [4, False]]


def test_an_epochs_order_depends_on_the_seed_and_the_epoch():
    orders = [torch.cat(list(islice(dfc.batches(50, 10, seed), 10))) for seed in (0, 1)]

    assert not torch.equal(orders[0], orders[1])
    for order in orders:
        assert order[:50].sort().values.tolist() == list(range(50))
        assert not torch.equal(order[:50], order[50:])


def test_trained_as_published_each_coordinate_has_a_scale(world):
    run = world.home / "paper"

    assert call(dfc, *world.flags, "--recipe=paper", "--steps=1", "--out", run) == 0

    assert dfc.load(run).scale.std(1).all()
    cc = small()
    x_NMD = torch.randn(400, 2, 8) * torch.rand(8) + 3
    cc.fit_scale(x_NMD, by_coordinate=True)
    assert close(cc.normalise(x_NMD).std(0), torch.ones(2, 8), .01)


FILES = """
--- FILE
--- EMPTY.jsonl
\t
--- BROKEN.jsonl
{"text": "a"}
{"text":
--- NULL.jsonl
{"text": "a"}
{"text": null}
--- ONE.jsonl
{"instruction": "i", "input": "q", "output": "a", "split": "train"}
--- LONE.jsonl
{"instruction": "i", "input": "q", "output": "a", "prediction": "a"}
{"instruction": "i", "input": "\\ud800", "output": "a", "prediction": "\\ud800"}
--- OTHER.jsonl
{"output": "[TOOL_CALLS] []", "prediction": "no"}
--- MODEL/chat_template.jinja
{{ raise_exception('no system role') }}
--- DROPS/chat_template.jinja
{{ messages[1]['content'] }}
--- DAMAGED/metrics.json
{"config": {"mod
--- FOREIGN/metrics.json
{}
"""


@once
def bad(world, tmp_path_factory):
    """A folder with rows, models and runs of every kind that cannot be used, by name."""
    home = tmp_path_factory.mktemp("bad")
    for name in ("RUN", "DAMAGED", "FOREIGN"):
        shutil.copytree(world.run, home / name)
    for name in ("MODEL", "DROPS", "PARTLY"):
        shutil.copytree(TINY / "base", home / name)
    publish(home / "PICKLE", b_enc=Bomb())

    # a block left out
    weights = load_file(TINY / "base" / "model.safetensors")
    some = {name: w for name, w in weights.items() if ".layers.3." not in name}
    save_file(some, home / "PARTLY" / "model.safetensors", {"format": "pt"})

    for file in FILES.split("--- ")[1:]:
        name, _, text = file.partition("\n")
        (home / name).write_text(text)
    return home


BAD = """
do not fit       dfc.py --k 9999
do not fit       dfc.py --excl .6 --excl-b .6
1 or more        dfc.py --steps 0
--max-new        dfc.py --max-new 0
--longest        dfc.py --longest 9999
diverged         dfc.py --lr 1e9
layer 9          dfc.py --layer 9
MISSING          dfc.py --model-a MISSING
MISSING          dfc.py --model-b MISSING
no system role   dfc.py --model-a MODEL
leaves out       dfc.py --model-a DROPS
not in its file  dfc.py --model-a PARTLY
--excl 0.001     dfc.py --excl .001
--excl inf       dfc.py --excl inf
cannot use       dfc.py --model-b .
cannot use       dfc.py --model-b tiny
no train row     dfc.py --tool-texts ONE.jsonl
row 2            dfc.py --tool-texts LONE.jsonl
row 2            dfc.py --plain-texts BROKEN.jsonl
row 2            dfc.py --plain-texts NULL.jsonl
jsonl            dfc.py --plain-texts nowhere.jsonl
FILE             dfc.py --out FILE/run
another seed     dfc.py --out RUN --seed 5
no finished run  dfc.py --out MODEL
no finished run  dfc.py --out FILE
no finished run  dfc.py --out DAMAGED
no finished run  dfc.py --out FOREIGN
no finished run  eval_toolcall.py
no finished run  eval_toolcall.py DAMAGED
no finished run  steer.py nothing
cannot use       published.py PICKLE --preset tiny
row 2            eval_toolcall.py --score LONE.jsonl
no row           eval_toolcall.py --score EMPTY.jsonl
<tool_call>      eval_toolcall.py --score OTHER.jsonl
less than 1      eval_toolcall.py RUN --rows 0
jsonl            eval_toolcall.py --score ""
--alpha          steer.py RUN --alpha strong
--prompt         steer.py RUN --alpha 2
not finite       steer.py RUN --prompt Hi --alpha nan
distinct         steer.py RUN --latents 1 1
distinct         steer.py RUN --latents 999
"""


@each("said, command", cells_of(BAD))
def test_bad_input_is_one_line_and_status_2_and_nothing_is_lost(
        said, command, bad, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(bad)
    program, *argv = shlex.split(command)
    if program == "dfc.py":
        argv = [*world.flags, "--out", tmp_path / "run", *argv]
    before = files(bad)

    programs = {"dfc.py": dfc, "eval_toolcall.py": ev, "steer.py": steer, "published.py": published}
    status = call(programs[program], *argv)

    *look, error = capfd.readouterr().err.splitlines()
    assert status == 2
    assert said in error
    assert not [line for line in look if not re.match("models|train|dev|test|collected", line)]
    assert files(bad) == before
    assert not files(tmp_path)
    assert not Path("exploded").exists()


def test_an_error_line_ends_with_what_the_hub_answered(capsys):
    def main(argv):
        with dfc.errors_about("owner/name"):
            try:
                raise OSError("429 for https://hub/file")
            except OSError as e:
                raise OSError("check your connection") from e

    assert dfc.cli(main) == 2

    error = capsys.readouterr().err
    assert "owner/name: check your connection (429 for https://hub/file)" in error


# ---- 7. Scores -----------------------------------------------------------------------------------
GOLDEN = """
1   3     2  1   THINK [ WEATHER ]         THINK [ WEATHER ]
1   0.75  2  0   THINK [ WEATHER ]         THINK [ SHORT ]
1   1.5   2  0   THINK [ WEATHER ]         THINK [ FIVE ]
1   1.5   2  0   THINK [ WEATHER ]         THINK [ TEXT ]
1   2.5   2  0   THINK [ WEATHER ]         THINK [ MORE ]
1  -1.5   2  0   THINK [ WEATHER ]         THINK [ EMPTY ]
1  -3     2  0   THINK [ WEATHER ]         THINK [ RENAMED ]
1  -3     2  1   THINK [ WEATHER ]         THINK [ HERMES ]
1  -3     2  0   THINK [ WEATHER ]         THINK [ COMMA ]
1   2.25  2  0   THINK [ WEATHER ]         THINK [ WEATHER TIME ]
0   3     2  1   THINK [ WEATHER ]         [ WEATHER ]
0   3     2  0   THINK [ WEATHER ]         OPEN [ WEATHER ]
0  -3     2  0   THINK [ WEATHER ]         THINK [ WEATHER
0  -3    -1  0   THINK [ WEATHER ]         THINK RESPONSE
1   0     2  0   THINK [ SHORT TIME ]      THINK [ SHORT ]
1   3     2  1   THINK [ SHORT TIME ]      THINK [ TIME SHORT ]
1  -0.5   2  0   THINK [ SHORT WEATHER ]   THINK [ SHORT ]
0   0     2  0   THINK RESPONSE            THINK [ WEATHER ]
1   0    -1  1   THINK RESPONSE            THINK RESPONSE
"""  # ToolRL's format and correctness; paper_overall; exact; the gold answer; what is said
CHOICES = """
1   2.25  2  0   THINK [ WEATHER ]         THINK [ WEATHER {"name":"x"} ]
1   2.25  2  0   THINK [ WEATHER ]         THINK [ WEATHER WEATHER ]
1  -3     2  0   THINK [ WEATHER ]         THINK [ WEATHER BARE ]
1  -3     2  0   THINK [ WEATHER ]         THINK [ LIST ]
0   3     2  0   THINK [ WEATHER ]         THINK [ WEATHER [ ]
0   3     2  0   THINK [ WEATHER ]         OPEN ] </think> [ WEATHER
1   3     2  1   THINK [ WEATHER ]         THINK [ WEATHER ] <|im_end|> more
0   0    -1  1   THINK RESPONSE            THINK RESPONSE So.
"""  # what ToolRL's code decides where its formula leaves a choice
EXACT = """
1   1.5   2  0   THINK [ TEXT ]            THINK [ WEATHER ]
1   3     2  1   THINK [ WEATHER ]         THINK [ DECIMAL ]
1  -3     2  0   THINK [ WEATHER ]         THINK [ PART ]
1  -3     2  0   THINK [ WEATHER ]         THINK [ LONGER ]
1   3     0  0   THINK [ TRUE ]            THINK [ INT ]
1   3     0  1   THINK [ BA ]              THINK [ AB ]
0   0    -1  0   THINK RESPONSE            Yes.
0   0    -1  1   Sunny.                    Yes.
0   0    -1  1   Sunny.                    THINK RESPONSE
0   0    -1  0   THINK RESPONSE            THINK
1   0    -1  0   Sunny.                    THINK
0   0    -1  0   THINK RESPONSE            OPEN
0   0    -1  0   Sunny.                    OPEN
1   0    -1  0   THINK RESPONSE            THINK <response> </response>
0   0    -1  0   Sunny.                    THINK <response> </response>
"""  # exact is equality as JSON has it, and a response where no call is wanted


@each("line", cells_of(GOLDEN + CHOICES + EXACT), ids=" ".join)
def test_the_scorers_golden_table(line):
    form, correctness, paper, exact, *words = line
    gold, said = map(spell, words)
    row = row_of(words[0])

    s = ev.score(said, row)

    assert s["exact"] == int(exact)
    assert -1 + s["paper_format"] + 2 * s["paper_tool"] == int(paper)
    assert make.toolrl_reward(said, gold) == approx(float(form) + float(correctness))


def test_the_parser_raises_nothing_whatever_goes_in():
    rng = random.Random(0)
    pieces = ["\n", "\x00", "\ud800", "[" * 3000, "9" * 5000]
    pieces += """<tool_call> </tool_call> </think> { } "name" : null 1e999 "arguments":"{}"
        {"name":3,"parameters":{}} {"name":"a","parameters":{}}
        {"name":"a","arguments":"[1"}""".split()  # noqa: SIM905

    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))

        for name, values in ev.parse_calls(text).calls:
            assert isinstance(name, str)
            assert isinstance(json.loads(values), dict)
        for row in (TWO, NONE):
            ev.score(text, row)
            make.toolrl_reward(text, row["output"])


def test_hermes_blocks_are_the_same_calls_and_what_is_broken_is_called_but_never_exact():
    hermes = spell("[ SHORT ] [ TIME ]").replace("parameters", "arguments")
    as_text = spell(r'[ { "name": "get_time", "arguments": "{\"tz\":\"CET\"}" } ]')

    assert ev.parse_calls(hermes) == ev.parse_calls(spell("[ SHORT TIME ]"))
    assert ev.parse_calls(as_text) == ([("get_time", '{"tz": "CET"}')], True)
    for nothing in ('""', "null", "{}"):
        no_parameters = spell(f'[ {{"name":"f","arguments":{nothing}}} ]')
        assert ev.parse_calls(no_parameters) == ([("f", "{}")], True)
    assert ev.parse_calls(spell("<think> [ WEATHER ] </think> no")) == ([], True)

    not_closed = hermes.removesuffix("</tool_call>")
    for broken in (not_closed, spell("[ SHORT TIME { ]"), spell("[ ]") + hermes):
        s = ev.score(broken, TWO)
        assert s["called"] == 1
        assert s["exact"] == 0


def test_a_tag_in_a_value_is_read_or_makes_the_row_unreadable():
    readable = []
    for tag in ("</think>", "<think>", "</tool_call>", "<|im_end|>"):
        row = row_of("THINK [ SHORT ]")
        row["output"] = row["output"].replace("Paris", tag)
        if ev.is_readable(row):
            readable.append(tag)

    assert readable == ["</think>", "<think>"]


def test_wilson_and_the_paired_bootstrap_are_the_textbooks():
    assert list(ev.wilson(8, 10).values()) == approx([80, 49.02, 94.33], abs=.01)
    assert list(ev.wilson(0, 10).values()) == approx([0, 0, 27.75], abs=.01)

    after, before = np.random.default_rng(1).integers(0, 2, (2, 400))
    mean = 100 * (after - before).mean()
    half = 1.96 * 100 * (after - before).std() / 400 ** .5
    change = ev.paired(after, before)
    assert list(change.values()) == approx([mean, mean - half, mean + half], abs=.5)


def test_chance_never_reads_the_question_and_needs_rows_that_list_their_tools():
    empty = row_of("THINK [ EMPTY ]")
    rows = [empty, ONE, NONE]

    first, drawn, response = (
        ev.totals(answers, rows)["all"] for answers in ev.chance_answers(rows).values())

    assert first["paper_tool"]["pct"] == drawn["paper_tool"]["pct"] == 100
    assert first["exact"]["pct"] == approx(100 / 3)
    assert response["exact"]["pct"] == approx(100 / 3)
    many = ev.chance_answers([ONE] * 30)["random tool with {}"]
    assert len(set(many)) == 3
    assert ev.chance_answers([ONE, {**NONE, "instruction": "no tools"}]) == {}


def test_the_table_shows_each_score_in_its_column_and_the_change_from_clean():
    wrong = spell("THINK [ FIVE ]")
    rows = [ONE, ONE, NONE, NONE]
    right = [row["output"] for row in rows]

    table, found = ev.tabulate({"clean": right, "patched": [wrong, "", wrong, right[3]]}, rows)

    head, _, clean, patched = table.splitlines()
    assert "2 need a tool" in head
    assert "2 need none" in head
    assert clean.split() == "clean 100.0 100.0 100.0 100.0 0.0".split()
    cells = patched.split()  # exact, change [95 %], called, paper_tool; exact, false calls
    assert cells[:3] == ["patched", "0.0", "-100.0"]
    assert cells[-4:] == ["50.0", "50.0", "50.0", "50.0"]
    assert found["patched"]["change"] == {"pp": -100, "lo": -100, "hi": -100}
    assert "change" not in found["clean"]

    cut, _ = ev.tabulate({"clean": [*right[:3], "No [cut]"]}, rows)
    assert "1 of 4 answers were cut" in cut


def test_score_reads_a_file_of_your_own_answers(tmp_path, capsys):
    right = {**ONE, "prediction": ONE["output"]}
    wrong = {**ONE, "prediction": "\u2028 no"}
    bare = {"output": "Hi.", "prediction": "Hello."}  # lists no tools: not in the chance lines
    (tmp_path / "a.jsonl").write_text(as_lines(right, wrong, bare) + "\r\n")

    assert call(ev, "--score", tmp_path / "a.jsonl") == 0

    out = capsys.readouterr().out  # exact, called, paper_tool; exact, false calls
    assert re.search(r"a.jsonl +50.0 +50.0 +50.0 +100.0 +0.0\n", out)
    assert "no chance lines" in out


# ---- 8. Generate, reconstruct --------------------------------------------------------------------
def slowly(model, tokenizer, prompt, max_new, keep, v_D, everywhere=False):
    """A greedy answer, one token at a time, nothing kept from one pass to the next. Block 1's
    output h becomes keep h + v at the prompt's last token, or everywhere."""
    ids = tokenizer(prompt)["input_ids"]
    ends = ev.end_tokens(model, tokenizer).tolist()
    places = slice(None) if everywhere else len(ids) - 1

    def edit(h_1TD):
        h_1TD = h_1TD.clone()
        h_1TD[:, places] = keep * h_1TD[:, places] + v_D
        return h_1TD

    said = []
    with dfc.hooked(model, 1, edit):
        while len(said) < max_new:
            logits_1TC = model(torch.tensor([ids + said])).logits
            token = logits_1TC[0, -1].argmax().item()
            if token in ends:
                break
            said.append(token)
    end = " [cut]" if len(said) == max_new else ""
    return dfc.answer_prefix(prompt) + tokenizer.decode(said) + end


@each("family", ["the pair", "Llama", "Qwen3Next", "Mistral", "Gemma2", "GPT2"])
def test_batched_answers_patched_once_or_at_every_token_equal_one_prompt_one_token_at_a_time(
        family, models, tokenizer):
    model = models["toolrl"]
    if family != "the pair":  # one token in eight ends an answer
        model = random_model(family, eos_token_id=list(range(0, 1024, 8)))
    prompts = [dfc.prompt_of(row, tokenizer) for row in rows_in(TINY / "tools.jsonl", "test")[:5]]
    prompts.sort(key=len, reverse=True)

    # nothing or a random vector added, or random vectors put in its place
    own_ND = dfc.collect([model], tokenizer, prompts, 1)[:, 0].float()
    random_2ND = 2 * own_ND.std() * torch.randn(2, *own_ND.shape)
    clean, = ev.generate(model, tokenizer, prompts, 16)
    added, = ev.generate(model, tokenizer, prompts, 16, 1, random_2ND[:1], most_tokens=400)
    placed = ev.generate(model, tokenizer, prompts, 16, 1, random_2ND, True)

    assert added != clean
    for keep, v_ND, texts in ((1, 0 * own_ND, clean), (1, random_2ND[0], added),
                              (0, random_2ND[0], placed[0]), (0, random_2ND[1], placed[1])):
        for v_D, prompt, text in zip(v_ND, prompts, texts):
            assert text == slowly(model, tokenizer, prompt, 16, keep, v_D)

    # at every token: in a hook around it
    v_D = random_2ND[0, 0]
    with dfc.hooked(model, 1, lambda h_RTD: h_RTD + v_D):
        everywhere, = ev.generate(model, tokenizer, prompts, 16)
    for prompt, text in zip(prompts, everywhere):
        assert text == slowly(model, tokenizer, prompt, 16, 1, v_D, everywhere=True)


def test_an_answer_ends_where_the_tokenizer_the_model_its_generation_or_the_chat_say(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "</think>"
    model = random_model("Llama", eos_token_id=5)
    model.generation_config.eos_token_id = [7, 9]

    ends = ev.end_tokens(model, tokenizer)

    usual = tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>", "<|endoftext|>"])
    assert ends.tolist() == sorted({5, 7, 9, *usual})


def test_reconstructions_are_what_the_decoder_says():
    cc = scaled(5, 4, 3)
    x_NMD = torch.randn(6, 2, 16) * 3 + 2
    xhat_NMD, f_NL = cc(x_NMD)

    into_a, into_b = (ev.reconstructions(cc, x_NMD, m) for m in (0, 1))

    # slowly
    nothing_MD = cc.b_dec * cc.scale + cc.mean
    slow = {
        "own vector": x_NMD,
        "reconstruction": xhat_NMD,
        "no latent": nothing_MD.expand(6, 2, 16),
    }
    for part in cc.partitions():
        wrote_NMD = torch.einsum("nl,lmd->nmd", f_NL[:, part.latents], cc.W_dec[part.latents])
        slow[f"{part.name} alone"] = nothing_MD + wrote_NMD * cc.scale
    other_NMD = x_NMD.clone()
    other_NMD[:, 0] = x_NMD[:, 0].mean(0)
    slow["reconstruction, mean A"], _ = cc(other_NMD)

    # a partition is left out where it writes nothing; A's vector is exchanged for B alone
    both = {"own vector", "reconstruction", "shared alone", "no latent", "noise"}
    only_b = {"B-exclusive alone", "reconstruction, mean A", "reconstruction, another A"}
    assert into_a.keys() == both | {"A-exclusive alone"}
    assert into_b.keys() == both | only_b
    for m, found in enumerate((into_a, into_b)):
        for name in found.keys() & slow.keys():
            assert close(found[name], slow[name][:, m])

        # noise as long as the error
        noise_ND = found["noise"] - x_NMD[:, m]
        assert close(noise_ND.norm(dim=1), (xhat_NMD - x_NMD)[:, m].norm(dim=1))
        assert F.cosine_similarity(noise_ND[0], noise_ND[1], dim=0).abs() < .9


@once
def run(world):
    """The world's run, opened; its answers are short."""
    run = ev.open_run(str(world.run))
    run.settings.max_new = 12
    return run


def test_prompts_that_do_not_fit_are_left_out_and_counted(world, run, tokenizer, capsys):
    rows = rows_in(world.rows, "test")
    prompts = [dfc.prompt_of(row, tokenizer) for row in rows]
    lengths = list(map(len, dfc.token_ids(tokenizer, prompts)))
    where = str(world.rows), tokenizer, "test"

    assert run.longest_prompt == 512 - 12
    assert ev.load_prompts(*where, max(lengths)) == (rows, prompts)
    fit, _ = ev.load_prompts(*where, max(lengths) - 1)
    assert fit == [row for row, length in zip(rows, lengths) if length < max(lengths)]
    assert capsys.readouterr().out.startswith(f"{len(rows) - len(fit)} test rows left out")

    # one row of a kind, the system text alone
    few, bare = ev.load_prompts(*where, 500, 1, "paper")
    assert len({row["kind"] for row in few}) == len(few)
    assert bare[0] == few[0]["instruction"]


# ---- 9. Steering ---------------------------------------------------------------------------------
@once
def dev(run):
    """All dev prompts."""
    return steer.read_prompts(run, "dev")


@once
def ranking(run, dev):
    return steer.rank(run, dev, "prompts")


@once
def latents(run, ranking):
    """The best A-exclusive one."""
    return steer.choose_latents(run.cc, ranking)


def prompts_of_kind(run, split, needs):
    """The prompts of a split that need a tool, or need none."""
    rows = [row for row in rows_in(run.settings.tool_texts, split) if ev.needs_tool(row) is needs]
    return [dfc.prompt_of(row, run.tokenizer) for row in rows]


def test_cohens_d_is_the_textbook_value():
    p_PL = torch.tensor([[2.], [4.], [6.]])
    q_QL = torch.tensor([[1.], [2.], [3.]])

    d_L = steer.cohens_d(p_PL, q_QL)

    assert d_L.item() == approx(2 / ((4 + 1) / 2) ** .5)


def test_auroc_counts_pairs_ties_half():
    p_PL = torch.randint(0, 4, (30, 3)).float()
    q_QL = torch.randint(0, 3, (20, 3)).float()

    auroc_L = steer.auroc(p_PL, q_QL)

    larger_PQL = (p_PL[:, None] > q_QL) + .5 * (p_PL[:, None] == q_QL)
    assert close(auroc_L, larger_PQL.mean((0, 1)))


def test_latent_scaling_tells_a_feature_of_a_alone_from_one_b_has_too_in_any_units():
    cc = dfc.Crosscoder(8, 5, 5, 2).requires_grad_(False)
    f_NL = torch.rand(500, 5)
    cc.W_dec.zero_()
    cc.b_dec.fill_(5)
    cc.W_dec[[0, 1, 3], 0, [0, 1, 4]] = 1
    cc.W_dec[[2, 2, 4], [0, 1, 1], [3, 3, 5]] = 1
    cc.scale.copy_(torch.tensor([[10.], [.1]]))
    x_NMD = cc.decode(f_NL)
    x_NMD[:, 1, 1] += f_NL[:, 1] * .1  # B has 1 as well: the mask alone hides it

    nu_error_L, nu_recon_L = latent_scaling.exclusivity(cc, x_NMD, f_NL)

    assert nu_error_L[:4].tolist() == approx([0, 1, 1, 0], abs=1e-4)
    assert nu_recon_L[:4].tolist() == approx([0, 0, 1, 0], abs=1e-4)


@each("contrast", ["prompts", "texts"])
def test_latents_are_ranked_by_dev_prompts_or_dev_texts_in_the_authors_columns(
        contrast, run, dev):
    s = run.settings
    groups = prompts_of_kind(run, "dev", True), prompts_of_kind(run, "dev", False)
    if contrast == "texts":
        groups = (dfc.tool_texts(s.tool_texts, run.tokenizer, "dev", 300, 0, False),
                  dfc.plain_texts(s.plain_texts, run.tokenizer, "dev", 300))
    p_PL, q_QL = (run.cc.encode(run.vectors(texts)) for texts in groups)
    slow = {
        "cohens_d": steer.cohens_d(p_PL, q_QL),
        "auroc": steer.auroc(p_PL, q_QL),
        "fire_rate_nontool": (q_QL > 0).float().mean(0),
        "mean_tool": p_PL.mean(0),
    }

    rows = steer.rank(run, dev, contrast)

    assert [row["cohens_d"] for row in rows] == sorted(slow["cohens_d"].tolist(), reverse=True)
    for row in rows:
        for name, slow_L in slow.items():
            assert row[name] == approx(slow_L[row["feature_idx"]].item(), abs=1e-3)
        assert (row["partition"] == "A-exclusive") is (row["feature_idx"] < run.cc.n_a)

    # by default the best A-exclusive one is steered
    best = [row["feature_idx"] for row in rows if row["feature_idx"] < run.cc.n_a]
    assert steer.choose_latents(run.cc, rows) == best[:1]


def test_what_latents_write_is_the_formula():
    cc = scaled(32, 4, 3)  # k = L: all survive
    f_NL = cc.encode(torch.randn(6, 2, 16) * 3)

    slow_ND = torch.zeros(6, 16)
    for latent in (3, 6, 20):  # 6 is B-exclusive and writes nothing
        slow_ND += f_NL[:, [latent]] * cc.W_dec[latent, 0] * cc.scale[0]

    written_ND = steer.written(cc, f_NL, [3, 6, 20])
    assert written_ND.any()
    assert close(written_ND, slow_ND)
    assert not steer.written(cc, f_NL, [6]).any()


def test_control_directions_are_random_other_latents_and_both_differences_of_means(run, dev):
    cc = copy.deepcopy(run.cc)
    cc.scale.uniform_(1, 2)  # directions are those of raw units
    x = {needs: run.vectors(prompts_of_kind(run, "dev", needs)) for needs in (True, False)}
    a_D, b_D = x[True].mean(0)
    none_D = x[False][:, 0].mean(0)

    directions = steer.control_directions(cc, dev, [3, 1])

    assert close(directions["A - B"], F.normalize(a_D - b_D, dim=0), 1e-3)
    assert close(directions["needs - none"], F.normalize(a_D - none_D, dim=0), 1e-3)
    assert close(directions["latents"], F.normalize(cc.W_dec[[3, 1], 0] * cc.scale[0]))
    random_UD = directions["random"]
    assert close(random_UD.norm(dim=1), torch.ones(10))
    assert (random_UD @ random_UD.T - torch.eye(10)).abs().max() < .5
    assert -.1 < random_UD.mean() < .1  # of all orthants


def of_hits(hits, n=20, false_calls=0.):
    """An Outcome with some exact calls of n."""
    return steer.Outcome([1] * hits + [0] * (n - hits), false_calls, [])


def test_a_change_stands_beside_controls_of_its_length_and_its_margin_is_over_the_strongest(
        monkeypatch):
    asked = []
    v_ND = torch.randn(5, 4)
    directions = {"random": F.normalize(torch.randn(2, 4)), "A - B": F.normalize(torch.randn(1, 4))}
    clean = of_hits(15, false_calls=7.)
    hits = {  # sign: of the change, two random controls, A - B; margin
        1: ([18, 16, 17, 2], 5.),
        -1: ([3, 14, 13, 19], 50.),
    }

    def look_up(run, m, prompts, v_VND):
        asked.append((m, v_VND))
        return [of_hits(n, false_calls=float(n)) for n in hits[sign][0]]

    monkeypatch.setattr(steer, "outcomes", look_up)
    for sign, (counts, margin) in hits.items():
        result, _ = steer.measure_change(None, "B", None, v_ND, directions, clean, sign)

        # added: the change itself, then controls as long on each prompt, with its sign
        m, v_VND = asked.pop()
        assert m == "B"
        assert torch.equal(v_VND[0], v_ND)
        for control_ND, u_D in zip(v_VND[1:], torch.cat([*directions.values()]), strict=True):
            assert close(control_ND, sign * v_ND.norm(dim=1, keepdim=True) * u_D)

        # percentage points of 20 prompts
        own, *random, a_minus_b = [5 * (n - 15) for n in counts]
        shown = [c["pp"] for found in result["controls"].values() for c in found]
        assert result["effect"]["pp"] == approx(own)
        assert shown == approx([*random, a_minus_b])
        assert result["margin"]["pp"] == approx(margin)
        assert result["clean"] == {"exact": 75, "false_calls": 7}
        assert result["false_calls"] == counts[0]


def test_strengths_come_from_dev_prompts_and_the_table_from_test_prompts(
        run, dev, ranking, monkeypatch):
    tried = []
    changes = []
    latents = [2, 5]
    written_ND = functools.partial(steer.written, run.cc, latents=latents)

    def best_strength(run, m, prompts, v_ND, strengths):
        assert close(v_ND, written_ND(prompts.f_NL))
        tried.append((m, prompts.rows[0]["split"], strengths))
        return {"A": 3., "B": 2.}[m]

    def outcomes(run, m, prompts, v_VND):
        assert prompts.rows[0]["split"] == "test"
        return [of_hits({"A": 9, "B": 1}[m])._replace(answers=[m] * len(prompts.texts))]

    def measure_change(run, m, prompts, v_ND, directions, clean, sign):
        changes.append((m, sign, sum(clean.exact), v_ND, directions))
        return {}, [m] * len(prompts.texts)

    for stub in (best_strength, outcomes, measure_change):
        monkeypatch.setattr(steer, stub.__name__, stub)
    steering, answers, test = steer.steer(run, latents, ranking, dev, 1)

    # strengths: alpha is 1 + the chosen factor
    assert [split for _, split, _ in tried] == ["dev", "dev"]
    assert [1 + c for c in tried[0][2]] == list(steer.ALPHAS)

    # what is added, to which model, beside which clean answers
    assert {row["split"] for row in test.rows} == {"test"}
    test_ND = written_ND(test.f_NL)
    most_1L = dev.f_NL[dev.needs_N].max(0, keepdim=True).values
    expected = {
        "ablated in A": ("A", -1, 9, -test_ND),
        "scaled by 4 in A": ("A", 1, 9, 3 * test_ND),
        "its maximum added to B": ("B", 1, 1, written_ND(most_1L).expand_as(test_ND)),
        "copied from A into B, x 2": ("B", 1, 1, 2 * test_ND),
    }
    assert list(steering["changes"]) == list(expected)
    for found, wanted in zip(changes, expected.values(), strict=True):
        assert found[:3] == wanted[:3]
        assert close(found[3], wanted[3])
    assert answers["clean A"][0] + answers["clean B"][0] == "AB"

    # control latents: the others of the partition, best separated first
    own = [row["feature_idx"] for row in ranking if row["feature_idx"] < run.cc.n_a]
    others = [latent for latent in own if latent not in latents]
    rows_UD = F.normalize(run.cc.W_dec[others[:20], 0] * run.cc.scale[0])
    assert close(changes[0][4]["latents"], rows_UD)


def test_outcomes_are_of_the_model_asked_for_and_keep_both_kinds_of_prompts_apart(
        run, dev, monkeypatch):
    def answers(model, tokenizer, texts, max_new, layer, v_VND):
        right = [row["output"] for row in dev.rows]
        call = spell("THINK [ SHORT ]")
        return [right, [call] * len(texts)] if model is run.models["B"] else [[""] * len(texts)]

    monkeypatch.setattr(steer, "generate", answers)
    n_needs = int(dev.needs_N.sum())

    right, always = steer.outcomes(run, "B", dev, None)
    silent, = steer.outcomes(run, "A", dev, None)

    assert right.exact == [1] * n_needs
    assert right.false_calls == silent.false_calls == 0
    assert silent.exact == always.exact == [0] * n_needs
    assert always.false_calls == 100


def test_the_strength_is_the_smallest_as_good_as_the_best_by_exact_minus_false_calls(
        monkeypatch):
    found = {  # strength: exact calls of 9, false calls in percent
        .5: (0, 0.),
        1: (8, 5.),
        2: (8, 0.),
        4: (9, 90.),
    }

    def look_up(run, m, prompts, v_VND):
        counts = [found[v.item()] for v in v_VND]
        return [of_hits(hits, 9, false) for hits, false in counts]

    monkeypatch.setattr(steer, "outcomes", look_up)
    for strengths, best in (([.5, 1, 2, 4], 1), ([.5, 4], 4), ([.5, 2, 4], 2)):
        assert steer.best_strength(None, "A", None, torch.ones(1), strengths) == best


# ---- 10. The whole method ------------------------------------------------------------------------
@once
def metrics(world):
    """Of the world's run, evaluated and steered."""
    assert call(ev, world.run) == 0
    assert call(steer, world.run, "--rows=1") == 0
    return dfc.read_metrics(world.run)


def test_a_run_is_evaluated_and_keeps_every_answer_and_total(world, metrics):
    rows = rows_in(world.rows, "test")
    answers = [line["answers"] for line in rows_in(world.run / "eval.jsonl")]

    for m, versions in metrics["evaluation"]["models"].items():
        for name, total in versions.items():
            said = [answer[m][name] for answer in answers]
            assert total.items() >= ev.totals(said, rows).items()

            if name != "clean":
                before = versions["clean"]["needs"]["exact"]["pct"]
                change = total["needs"]["exact"]["pct"] - before
                assert total["change"]["pp"] == approx(change)
        for answer in answers:
            assert answer[m]["own vector"] == answer[m]["clean"]


def test_a_run_is_steered_and_keeps_every_answer_and_change(world, metrics):
    lines = rows_in(world.run / "steer.jsonl")
    rows = [{"output": line["gold"]} for line in lines]

    for name, result in metrics["steering"]["changes"].items():
        clean = [line[f"clean {result['model']}"] for line in lines]
        changed = [line[name] for line in lines]
        _, found = ev.tabulate({"clean": clean, "changed": changed}, rows)
        assert result["effect"] == found["changed"]["change"]
        assert result["clean"]["exact"] == found["clean"]["needs"]["exact"]["pct"]
        assert result["false_calls"] == found["changed"]["none"]["false_call"]["pct"]

    assert metrics["steering"]["rows"] == {"needs": 2, "none": 3}
    assert 0 < sum(metrics["l0"].values()) < 8.01
    assert "cohens_d,auroc,fire_rate_tool" in (world.run / "ranking.csv").read_text()


def test_the_table_of_a_sweep_has_the_published_figures_beside_ours(world, metrics, capsys):
    assert call(table, world.run) == 0
    assert "+31.2 ± 9.7, +6.7 ± 4.9" in capsys.readouterr().out


def test_a_prompt_of_your_own_is_answered_clean_and_steered_and_shows_where_the_latent_fires(
        run, latents, capsys):
    text = rows_in(run.settings.tool_texts, "test")[2]["instruction"]
    layer = run.settings.layer

    steer.steer_own_words(run, latents, text, [4.])

    out = capsys.readouterr().out
    prompt = steer.own_prompt(run, text)
    assert prompt.count(text) == 2  # said to the row whose tools have most words in common with it

    # the answers
    written_ND = steer.written(run.cc, run.cc.encode(run.vectors([prompt])), latents)
    (clean,), (steered,) = ev.generate(run.models["A"], run.tokenizer, [prompt], 12, layer,
                                       torch.stack([0 * written_ND, 3 * written_ND]))
    assert f"alpha = 1\n{clean}" in out
    assert f"alpha = 4\n{steered}" in out

    # where the latent is active in the clean one
    read = prompt.removesuffix("<think>") + clean.removesuffix(" [cut]")
    ids_1T = torch.tensor(dfc.token_ids(run.tokenizer, [read]))
    x = [dfc.residual_stream(model, ids_1T, layer)[0] for model in run.models.values()]
    f_T = run.cc.encode(torch.stack(x, 1))[:, latents[0]]
    shown = re.findall(r"^ *(\d+) +['\"]", out, re.MULTILINE)
    assert f_T.any()
    assert [int(i) - 1 for i in shown] == f_T.nonzero()[:, 0].tolist()


@each("n", [20, 0])
def test_a_published_crosscoder_becomes_a_run_with_its_own_settings(
        n, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dfc.PRESETS, "tiny", f"--tool-texts {world.rows}")
    theirs = publish("theirs/dfc-D8k", D=128, n=n, k=16)

    assert call(published, "theirs/dfc-D8k", "--preset=tiny") == 0

    folder = Path("runs/theirs--dfc-D8k")
    ours = dfc.load(folder)
    s = ev.open_run(folder).settings
    assert (s.dict, s.k, ours.n_a, ours.n_b, ours.tied) == (64, 16, n, n, False)
    assert (s.layer, s.steps, s.l1_excl) == (1, 9, 0)
    assert torch.equal(ours.W_enc, theirs.W_enc)
    assert ours.scale.std(1).all()  # fitted again, for each coordinate
    if n > 0:
        assert call(ev, folder, "--rows=1") == 0
        assert "reconstruction, raw" in (folder / "metrics.json").read_text()


# ---- 11. The toy pair, the README, the pieces ----------------------------------------------------
README = (ROOT / "README.md").read_text()


def test_no_question_is_asked_twice_and_every_gold_answer_is_exact():
    rows = rows_in(TINY / "tools.jsonl")
    questions = {row["input"].lower() for row in rows}

    assert len(questions) == len(rows)
    for row in rows:
        assert ev.score(row["output"], row)["exact"] == 1
        assert ev.needs_tool(row) is (row["kind"] in ("ask", "hint"))


def test_the_pair_behaves_as_its_readme_says(models, tokenizer):
    lines = re.findall(r"^\| (base|toolrl) \| (\w+) \| \d+ \| \d+ \((\d+)-(\d+)\)",
                       (TINY / "README.md").read_text(), re.MULTILINE)
    test = rows_in(TINY / "tools.jsonl", "test")
    assert len(lines) == 10

    for name, kind, low, high in lines:
        rows = [row for row in test if row["kind"] == kind][:20]
        prompts = [dfc.prompt_of(row, tokenizer) for row in rows]
        said, = ev.generate(models[name], tokenizer, prompts, 64)

        # the intervals overlap
        exact = ev.totals(said, rows)["all"]["exact"]
        assert exact["lo"] <= int(high)
        assert int(low) <= exact["hi"]


def test_every_command_of_the_readme_is_understood(monkeypatch):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    commands = re.findall(r"^python ([\w/]+\.py)([^#\n]*)", blocks, re.MULTILINE)
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args):
        parse(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    assert commands
    for program, argv in commands:
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(argv)])
        with raises(KeyboardInterrupt):
            runpy.run_path(str(ROOT / program), run_name="__main__")


def test_the_piece_in_the_readme_prints_its_figures(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code[1], {})

    shares = list(map(float, re.findall(r"tensor\((.*?)\)", capsys.readouterr().out)))
    assert shares[:2] == [0, 0]
    assert shares[2:] == approx([.68, 0], abs=.25)


def test_each_exercise_fails_as_it_stands_and_passes_with_its_solution():
    exercises = re.findall(3 * r"(?s:```python\n(.*?)```.*?)",
                           (ROOT / "extras/EXERCISES.md").read_text())

    assert exercises
    for skeleton, test, solution in exercises:
        test += re.search(r"test_\w+\(\)", test)[0]
        exec(skeleton + solution + test, {})
        with raises((AssertionError, NotImplementedError)):
            exec(skeleton + test, {})


GENERATE = """generate batches_by_length token_ids answer_prefix hooked end_tokens decode_greedily
    cache_argument"""
SCORE = """score first_turn parse_calls parse_block parameters_of as_number after_thought Parsed
    responds tool_names"""
PIECES = {  # a piece and what to copy with it: an example
    "Crosscoder Partition keep_largest":
        "Crosscoder(16, 32, 5, 4, 3, True)(x)",
    "train batches has_bf16 keep_largest decode_active l1_penalty aux_loss":
        "train(cc.requires_grad_(), x, 9, 16, 1e-2, dead_after=2), cc.W_enc",
    "fve":
        "fve(x, cc(x)[0])",
    "collect batches_by_length token_ids residual_stream hooked LayerReached":
        "collect([model, model], tokenizer, ['abc', 'de'], 1)",
    "chunks token_ids":
        "chunks(['One two. Three four! Five.'], tokenizer, 9, 4)",
    SCORE:
        "score(row['output'], row)",
    GENERATE:
        "generate(model, tokenizer, ['An alarm', 'Hi'], 3, 1, x[None, :2, 0], True)",
    "reconstructions":
        "reconstructions(cc, x, 1)",
    "cohens_d":
        "cohens_d(x[:9, 0], x[9:, 0])",
    "auroc":
        "auroc(x[:9, 0], x[9:, 0])",
    "written":
        "written(cc, cc.encode(x), [0, 20])",
    "control_directions":
        "control_directions(cc, prompts, [0, 20])",
}


def copy_piece(names):
    """A namespace that holds the libraries and these definitions of the three files alone."""
    copied = {}
    for module in (dfc, ev, steer):
        for node in ast.parse(Path(module.__file__).read_text()).body:
            library = isinstance(node, ast.Import) or (
                isinstance(node, ast.ImportFrom) and node.module not in ("dfc", "eval_toolcall"))
            if library or getattr(node, "name", None) in names:
                exec(ast.unparse(node), copied)
    return copied


@each("names", PIECES, ids=lambda names: names.split()[0])
def test_each_piece_can_be_copied_alone(names, tokenizer):
    here = {**vars(dfc), **vars(ev), **vars(steer)}
    copied = copy_piece(names.split())
    for name in names.split():
        assert name in copied

    results = []
    for there in (here, copied):
        torch.manual_seed(0)
        around = {
            "cc": scaled(5, 4, 3),
            "x": torch.randn(80, 2, 16),
            "model": random_model("Qwen2"),
            "tokenizer": tokenizer,
            "row": ONE,
            "prompts": steer.Prompts(None, None, torch.randn(9, 2, 16), None, torch.arange(9) < 4),
        }
        results.append(str(eval(PIECES[names], {**there, **around})))
    assert results[0] == results[1]


# ---- 12. Extras ----------------------------------------------------------------------------------
def test_grid_cells_equal_steering_one_cell_at_a_time_and_are_not_done_again(
        run, latents, tmp_path, monkeypatch):
    settings = dataclasses.replace(run.settings, max_new=40)
    run = dataclasses.replace(run, folder=tmp_path, settings=settings)
    prompts = steer.read_prompts(run, "test", 1)
    some = tuple(latents)
    scalings = [grid.CLEAN, grid.Scaling(0., some), grid.Scaling(4., some)]

    counts = grid.answer(run, prompts, scalings)

    for scaling in scalings:
        written_ND = steer.written(run.cc, prompts.f_NL, list(scaling.latents))
        outcome, = steer.outcomes(run, "A", prompts, (scaling.alpha - 1) * written_ND[None])
        assert counts[scaling].exact == outcome.exact

    # again, without answering
    monkeypatch.setattr(grid, "outcomes", None)
    assert grid.answer(run, prompts, scalings) == counts


def test_saturation_takes_the_first_n_latents_away_and_copies_them(run, ranking):
    test = steer.read_prompts(run, "test", 1)
    scene = saturation.make_scene(run, "test", 1)

    sizes = saturation.saturate(run, scene)["sizes"]

    best = steer.best_latents(ranking, "A-exclusive")
    for size in sizes:
        assert size["latents"] == best[:size["n"]]
    two = sizes[1]
    written_ND = steer.written(run.cc, test.f_NL, best[:2])
    for m, sign, done in (("A", -1, "ablated"), ("B", two["c"], "copied into B")):
        outcome = steer.outcomes(run, m, test, sign * written_ND[None])[0]
        assert two[done]["latents"]["exact"] == 100 * np.mean(outcome.exact)


def test_the_best_cell_is_chosen_on_dev_and_reported_on_test():
    cells = [grid.Cell("A", grid.Scaling(alpha, (5,))) for alpha in (2., 4.)]
    scalings = [grid.CLEAN, *(cell.scaling for cell in cells)]
    on_dev = of_hits(0, 2), of_hits(1, 2, 3), of_hits(2, 2, 90)
    on_test = of_hits(0, 2), of_hits(2, 2, 3), of_hits(1, 2, 90)
    dev, test = (dict(zip(scalings, found)) for found in (on_dev, on_test))

    best = grid.best_of(dev, test, cells)
    less_false = grid.best_of(dev, test, cells, less_false=True)

    found = [(cell["alpha"], cell["test"]["pp"], cell["false_calls"])
             for cell in (best, less_false)]
    assert found == [(4, 50, 90), (2, 100, 3)]


def test_the_lesson_runs_from_the_first_cell_to_the_last_also_without_pictures(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = (ROOT / "extras/lesson.ipynb").read_text().replace("runs/lesson", f"{world.run}")
    here = {}

    for cell in json.loads(text)["cells"]:
        if "outputs" in cell:  # it holds code
            exec("".join(cell["source"]), here)

    assert here["changes_seen"]
