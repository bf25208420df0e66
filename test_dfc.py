"""The specification of dfc: what is true of every piece, one sentence a test, in the order of the
three files. Where there is one, a piece is compared with a slow, obvious version of it.

    pytest        # a minute and a half on 2 CPU cores, without a GPU and without a network
"""
# ruff: noqa: S102 - what is executed are this project's own examples

import os

# before the libraries look at it
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import copy
import dataclasses
import functools
import inspect
import json
import random
import re
import runpy
import shlex
import shutil
import subprocess
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
from extras.exercises import lesson_checks
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
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY / "toolrl")


def close(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol)


def write_rows(file, *rows):
    """A .jsonl file -> its name."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    Path(file).write_text("\n".join(lines) + "\n")
    return str(file)


def replace_in(module, monkeypatch, *stubs):
    """The functions of these names by these functions."""
    for stub in stubs:
        monkeypatch.setattr(module, stub.__name__, stub)


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


def fit(cc, x_NMD, steps):
    cc.fit_scale(x_NMD)
    cc.fair_start(x_NMD)
    return dfc.train(cc, x_NMD, steps, batch=64, lr=1e-2, dead_after=2)


def kept(pre_BL, k):
    """pre_BL with all but the k largest of each row set to zero, and none below zero."""
    least_B1 = pre_BL.sort().values[:, [-k]]
    return pre_BL.relu() * (pre_BL >= least_B1)


def slow_forward(cc, z_BMD):
    """(2) to (4), densely -> pre_BL, f_BL, zhat_BMD."""
    pre_BL = torch.einsum("bmd,mdl->bl", z_BMD, cc.W_enc) + cc.b_enc
    f_BL = kept(pre_BL, cc.k)
    return pre_BL, f_BL, torch.einsum("bl,lmd->bmd", f_BL, cc.W_dec) + cc.b_dec


def test_encoder_and_decoder_are_the_formulas_in_raw_units():
    cc = scaled(5, 4, 3)
    x_BMD = torch.randn(6, 2, 16) * 3 + 1

    xhat_BMD, f_BL = cc(x_BMD)

    _, slow_f_BL, slow_zhat_BMD = slow_forward(cc, (x_BMD - cc.mean) / cc.scale)
    assert f_BL.gt(0).sum(1).tolist() == [5] * 6
    assert close(f_BL, slow_f_BL)
    assert close(xhat_BMD, slow_zhat_BMD * cc.scale + cc.mean)


@each("n_a, n_b, tied", [(0, 0, False), (4, 3, False), (4, 0, True), (16, 16, True)])
def test_exclusive_latents_never_touch_the_other_model_and_shared_ones_touch_both(n_a, n_b, tied):
    n = n_a + n_b
    cc = small(n_a, n_b, tied, k=2)
    cc.W_enc.data[..., ::2] *= .1  # too weak to be picked
    x_NMD = torch.randn(256, 2, 8)

    loss = fit(cc, x_NMD, 9)

    assert loss["aux"] > 0  # trained, also by the auxiliary loss

    # the models that a latent reads, and those that it writes
    own = [[True, False]] * n_a + [[False, True]] * n_b + [[True, True]] * (32 - n)
    assert cc.W_enc.any(1).T.tolist() == own
    assert cc.W_dec.any(2).tolist() == own

    # one decoder row for both models, where shared latents are tied
    rows_a, rows_b = cc.W_dec[n:].unbind(1)
    assert torch.equal(rows_a, rows_b) is tied


def test_a_fair_start_gives_every_partition_the_same_spread():
    cc = dfc.Crosscoder(32, 600, 8, 200, 200, True)
    x_NMD = torch.randn(1000, 2, 32)
    x_NMD[:, 1] += 2 * x_NMD[:, 0]  # they are alike

    cc.fit_scale(x_NMD)
    cc.fair_start(x_NMD)

    # that of shared latents, which read the mean of what they write
    assert torch.equal(cc.W_enc[..., 400:], cc.W_dec[400:].permute(1, 2, 0) / 2)
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
            f_BL = kept(pre_BL * eager_L, 2 * cc.k)  # others are 0
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
        pre_BL, f_BL, zhat_BMD = slow_forward(cc, z_BMD)
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


@each("family", re.findall(r"^\w+", FAMILIES, re.MULTILINE))
def test_collect_equals_hidden_states_of_single_texts_whatever_the_batch(family, tokenizer):
    model = random_model(family)
    texts = [README[i:i + n] for i, n in enumerate((3, 300, 1, 17))]

    for layer, longest in ((0, 4096), (1, 4096), (1, 50)):
        x_NMD = dfc.collect([model, model], tokenizer, texts, layer, longest).float()  # by fp16

        for text, x_MD in zip(texts, x_NMD):
            ids_1T = torch.tensor([tokenizer(text)["input_ids"][-longest:]])
            states = model(ids_1T, output_hidden_states=True).hidden_states
            assert close(x_MD, states[layer + 1][0, -1], 1e-2)


def test_a_hook_edits_one_blocks_output_and_is_gone_after_an_exception():
    model = random_model("Llama")
    read = functools.partial(dfc.residual_stream, model, torch.tensor([[5, 6, 7]]), 1)
    h_1TD = read()

    with raises(ZeroDivisionError), dfc.hooked(model, 1, lambda h_1TD: h_1TD + 1):
        edited_1TD = read()
        raise ZeroDivisionError

    assert close(edited_1TD, h_1TD + 1)
    assert torch.equal(read(), h_1TD)


def test_activations_are_kept_under_all_that_changes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY / "toolrl", "a")
    shutil.copytree(TINY / "toolrl", "b")
    shutil.copy(TINY / "tools.jsonl", ".")
    s = dfc.Settings(model_a="a", model_b="b", tool_texts="tools.jsonl", out="runs/run")
    collected = []

    def collect(models, tokenizer, texts, layer, longest):
        collected.append(texts)
        return torch.zeros(len(texts))

    def is_new(n=2, split="dev", **changed):
        collected.clear()
        there = dataclasses.replace(s, **changed)
        dfc.activations(there, split, n, there.seed, there.whole_prompts)
        return collected != []

    replace_in(dfc, monkeypatch, collect)

    # the same again, and something else
    assert is_new()
    assert not is_new()
    for changed in ({"layer": 0}, {"n": 3}, {"split": "train"}, {"seed": 1}, {"longest": 100},
                    {"whole_prompts": False}):
        assert is_new(**changed)
    for touched in ("a/model.safetensors", "b/model.safetensors", "tools.jsonl"):
        os.utime(touched)
        assert is_new()

    # what a link points to, and not the time of its folder; a damaged file
    weights = Path("b/model.safetensors").rename("weights")
    Path("b/model.safetensors").symlink_to(weights.resolve())
    assert not is_new()
    os.utime(weights)
    assert is_new()
    os.utime("a")
    assert not is_new()
    for file in Path("runs/cache").glob("*.pt"):
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
STRING    {"name": "get_time", "arguments": "{\\"tz\\": \\"CET\\"}"}
INT       {"name": "f", "parameters": {"x": 1}}
TRUE      {"name": "f", "parameters": {"x": true}}
AB        {"name": "f", "parameters": {"x": {"a": 1, "b": 2}}}
BA        {"name": "f", "parameters": {"x": {"b": 2, "a": 1}}}
NOTHING   {"name": "f", "parameters": {}}
TAG       {"name": "f", "parameters": {"x": "</think><think>"}}
CLOSES    {"name": "f", "parameters": {"x": "</tool_call>"}}
ENDS      {"name": "f", "parameters": {"x": "<|im_end|>"}}
"""))  # OPEN is a thought that does not end


def spell(words):
    """A text of these words, a line each; those that are not in WORDS stand for themselves."""
    return "\n".join(WORDS.get(word, word) for word in words.split())


def row_of(words):
    return {"instruction": TOOLS, "input": "q", "output": spell(words)}


ONE = row_of("THINK [ WEATHER ]")
TWO = row_of("THINK [ SHORT TIME ]")
NONE = row_of("THINK RESPONSE")


def test_a_row_belongs_to_its_own_split_or_to_one_drawn_80_10_10():
    counts = Counter(dfc.split_of({"text": str(i)}) for i in range(2000))

    assert 150 < min(counts["dev"], counts["test"]) < 250
    assert dfc.split_of({"text": "0", "split": "dev"}) == "dev"


def test_half_of_the_tool_texts_are_whole_prompts_and_half_go_on_into_the_answer(
        tokenizer, tmp_path):
    row = rows_in(TINY / "tools.jsonl", "train")[0]
    there = write_rows(tmp_path / "one.jsonl", row), tokenizer, "train", 40
    prompt = dfc.prompt_of(row, tokenizer)
    whole = prompt + row["output"].removeprefix(dfc.answer_prefix(prompt))

    texts = dfc.tool_texts(*there)

    assert whole.count("<think>") == 1
    assert texts[:20] == [prompt] * 20
    assert len(texts) == 40
    assert len(set(texts[20:])) > 5
    for text in texts[20:]:
        assert whole.startswith(text)
        assert whole[len(text)].isspace()

    # as published: chunks that end with a sentence, none a whole prompt
    pieces = dfc.tool_texts(*there, whole_prompts=False)
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
    write_rows(tmp_path / "train.jsonl", ONE, TWO)

    assert list(dfc.read_rows(str(tmp_path), dfc.TOOL_ROW)) == [ONE, TWO]


def test_a_model_may_be_a_name_of_the_hub(tmp_path, monkeypatch):
    """Here as the hub's client keeps it, out of the hub's reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("toolrl", "base"):
        repo = tmp_path / f"models--owner--{name}"
        shutil.copytree(TINY / name, repo / "snapshots/1", copy_function=os.symlink)
        (repo / "refs").mkdir()
        (repo / "refs/main").write_text("1")

    local, hub = (
        dfc.Settings(model_a=f"{home}toolrl", model_b=f"{home}base", out=f"{tmp_path}/run")
        for home in ("tiny/", "owner/"))
    x_NMD = dfc.activations(hub, "dev", 2)

    assert torch.equal(x_NMD, dfc.activations(local, "dev", 2))
    assert not torch.equal(x_NMD[:, 0], x_NMD[:, 1])


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


@each("same", [False, True])
def test_planted_exclusive_features_are_recovered_and_two_equal_models_yield_none(same):
    x_NMD, d_CMD = toy.plant(C=40, D=32, N=4000, active=3)  # concepts 0 to 7 are A's alone
    if same:
        x_NMD[:, 1] = x_NMD[:, 0]

    cc = toy.fit(x_NMD, .125, tied=True, k=3, steps=500).requires_grad_(False)

    # does A alone have what its latents stand for?
    nu_error_L, nu_recon_L = latent_scaling.exclusivity(cc, x_NMD, cc.encode(x_NMD))
    passes_L = (nu_error_L.abs() < .2) & (nu_recon_L.abs() < .5)
    specific = passes_L[:cc.n_a].sum()
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
    rows: Path    # two short tool rows of every kind and split
    run: Path
    flags: list   # how it was trained


@once
def world(tokenizer, tmp_path_factory):
    """A trained run."""
    home = tmp_path_factory.mktemp("world")
    few = []
    for split in ("train", "dev", "test"):
        rows, _ = ev.load_prompts(str(TINY / "tools.jsonl"), tokenizer, split, 250, 2)
        few += rows
    file = write_rows(home / "few.jsonl", *few)

    flags = f"--tool-texts {file} --n-texts 60 --steps 200 --dict 96 --excl .12"
    world = World(home, home / "few.jsonl", home / "run", flags.split())
    assert call(dfc, *world.flags, "--out", world.run) == 0
    return world


ASKED = """
--excl 0                                      0 0 False 2e-05 -1
--excl .05                                    25 0 True 2e-05 -1
--excl-b .05                                  51 25 True 2e-05 -1
--recipe paper                                51 51 False 0.001 -1
--recipe paper --excl 0                       0 0 False 0.001 -1
--recipe paper --tie-shared --l1-shared 0     51 51 True 0.0 -1
--recipe paper --preset qwen                  819 819 False 0.001 -1
--preset smol                                 102 0 True 2e-05 0
"""  # n_a, n_b, tied, l1_shared, text_seed


def test_recipe_and_preset_fill_in_what_is_not_asked_for_and_each_run_has_a_folder_of_its_own():
    folders = set()
    for flags, expected in cells_of(ASKED):
        s = dfc.parse_args(flags.split())
        cc = dfc.new_crosscoder(s, 1)
        assert f"{cc.n_a} {cc.n_b} {cc.tied} {s.l1_shared} {s.text_seed}" == expected
        folders.add(s.out)

    assert len(folders) == 8


def test_the_published_recipe_switches_every_departure_off():
    paper = dfc.parse_args(["--recipe=paper"])
    ours = dfc.Settings()

    departures = "excl_b tie_shared fair_start by_coordinate l1_mean revive schedule whole_prompts"
    for name in departures.split():
        assert getattr(paper, name) != getattr(ours, name)

    # an encoder of its own, where ours reads what it writes
    for settings in (paper, ours):
        cc = dfc.new_crosscoder(settings, 8)
        assert torch.equal(cc.W_enc[0, :, 0], cc.W_dec[0, 0]) is settings.fair_start


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


def test_the_seed_sets_texts_weights_and_batches_and_a_text_seed_the_texts_alone(
        tmp_path, monkeypatch):
    seeds = {}
    weights = []

    def activations(s, split, n, seed=0, whole_prompts=True):
        seeds[split] = seed
        return torch.randn(10, 2, 8) + 9 * (split == "dev")

    def train(cc, x_NMD, *how, seed):
        assert x_NMD.mean() < 5
        seeds["batches"] = seed
        weights.append(cc.W_dec.sum())
        return {}

    def measure(cc, x_NMD, dev_NMD):
        assert dev_NMD.mean() > 5 > x_NMD.mean()
        return {}

    replace_in(dfc, monkeypatch, activations, train, measure)
    for flags, texts in (("--seed=3", 3), ("--seed=4", 4), ("--seed=4 --text-seed=3", 3)):
        s = dfc.parse_args([*flags.split(), f"--out={tmp_path}/{flags}"])
        dfc.train_run(s)
        assert seeds == {"train": texts, "dev": 0, "batches": s.seed}

    assert weights[0] != weights[1] == weights[2]


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
--- STRANGE/config.json
{}
--- ADAPTER/adapter_config.json
{}
"""


@once
def bad(world, tmp_path_factory):
    """A folder with rows, models and runs of every kind that cannot be used, by name."""
    home = tmp_path_factory.mktemp("bad")
    for name in ("RUN", "DAMAGED", "FOREIGN", "STRANGE", "CUT"):
        shutil.copytree(world.run, home / name)
    for name in ("MODEL", "DROPS", "ADAPTER", "PARTLY"):
        shutil.copytree(TINY / "base", home / name)
    os.truncate(home / "CUT/model.safetensors", 900)
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
an adapter       dfc.py --model-a ADAPTER
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
cannot use CUT   steer.py CUT
cannot use STR   eval_toolcall.py STRANGE
cannot use       published.py PICKLE --preset tiny
row 2            eval_toolcall.py --score LONE.jsonl
no row           eval_toolcall.py --score EMPTY.jsonl
<tool_call>      eval_toolcall.py --score OTHER.jsonl
less than 1      eval_toolcall.py RUN --rows 0
jsonl            eval_toolcall.py --score ""
--alpha          steer.py RUN --alpha strong
--prompt         steer.py RUN --alpha 2
not finite       steer.py RUN --prompt Hi --alpha nan
name some        steer.py RUN --latents 1 50
name some        steer.py RUN --latents 999
"""


def is_one_line(stderr, said):
    """Is what a program said, after its look at models and rows, one line that says so?"""
    *look, error = stderr.splitlines()
    more = [line for line in look if not re.match("models|train|dev|test|collected", line)]
    return said in error and not more


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

    assert status == 2
    assert is_one_line(capfd.readouterr().err, said)
    assert files(bad) == before
    assert not files(tmp_path)
    assert not Path("exploded").exists()


def test_a_model_that_lacks_weights_is_one_line_and_status_2_of_a_process_too(
        bad, world, tmp_path):
    argv = ["--model-a", bad / "PARTLY", "--out", tmp_path / "run"]

    done = subprocess.run([sys.executable, ROOT / "dfc.py", *world.flags, *argv],
                          capture_output=True, text=True)

    assert done.returncode == 2
    assert is_one_line(done.stderr, "12 weights are not in its file")


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
1   3     2  1  1   THINK [ WEATHER ]         THINK [ WEATHER ]
1   0.75  2  0  1   THINK [ WEATHER ]         THINK [ SHORT ]
1   1.5   2  0  1   THINK [ WEATHER ]         THINK [ FIVE ]
1   1.5   2  0  1   THINK [ WEATHER ]         THINK [ TEXT ]
1   2.5   2  0  1   THINK [ WEATHER ]         THINK [ MORE ]
1  -1.5   2  0  1   THINK [ WEATHER ]         THINK [ EMPTY ]
1  -3     2  0  1   THINK [ WEATHER ]         THINK [ RENAMED ]
1  -3     2  1  1   THINK [ WEATHER ]         THINK [ HERMES ]
1  -3     2  0  0   THINK [ WEATHER ]         THINK [ COMMA ]
1   2.25  2  0  1   THINK [ WEATHER ]         THINK [ WEATHER TIME ]
0   3     2  1  1   THINK [ WEATHER ]         [ WEATHER ]
0   3     2  0  0   THINK [ WEATHER ]         OPEN [ WEATHER ]
0  -3     2  0  1   THINK [ WEATHER ]         THINK [ WEATHER
0  -3    -1  0  0   THINK [ WEATHER ]         THINK RESPONSE
1   0     2  0  1   THINK [ SHORT TIME ]      THINK [ SHORT ]
1   3     2  1  1   THINK [ SHORT TIME ]      THINK [ TIME SHORT ]
1  -0.5   2  0  1   THINK [ SHORT WEATHER ]   THINK [ SHORT ]
0   0     2  0  1   THINK RESPONSE            THINK [ WEATHER ]
1   0    -1  1  0   THINK RESPONSE            THINK RESPONSE
"""  # ToolRL's format and correctness; paper_overall; exact; called; the gold answer; what is said
CHOICES = """
1   2.25  2  0  1   THINK [ WEATHER ]         THINK [ WEATHER {"name":"x"} ]
1   2.25  2  0  1   THINK [ WEATHER ]         THINK [ WEATHER WEATHER ]
1  -3     2  0  1   THINK [ WEATHER ]         THINK [ WEATHER BARE ]
1  -3     2  0  1   THINK [ WEATHER ]         THINK [ LIST ]
0   3     2  0  1   THINK [ WEATHER ]         THINK [ WEATHER [ ]
0   3     2  0  1   THINK [ WEATHER ]         OPEN ] </think> [ WEATHER
1   3     2  1  1   THINK [ WEATHER ]         THINK [ WEATHER ] <|im_end|> more
0   0    -1  1  0   THINK RESPONSE            THINK RESPONSE So.
"""  # what ToolRL's code decides where its formula leaves a choice
EXACT = """
1   1.5   2  0  1   THINK [ TEXT ]            THINK [ WEATHER ]
1   3     2  1  1   THINK [ WEATHER ]         THINK [ DECIMAL ]
1  -3     2  0  1   THINK [ WEATHER ]         THINK [ PART ]
1  -3     2  0  1   THINK [ WEATHER ]         THINK [ LONGER ]
1   3     0  0  1   THINK [ TRUE ]            THINK [ INT ]
1   3     0  1  1   THINK [ BA ]              THINK [ AB ]
0   0    -1  0  0   THINK RESPONSE            Yes.
0   0    -1  1  0   Sunny.                    Yes.
0   0    -1  1  0   Sunny.                    THINK RESPONSE
0   0    -1  0  0   THINK RESPONSE            THINK
1   0    -1  0  0   Sunny.                    THINK
0   0    -1  0  0   THINK RESPONSE            OPEN
0   0    -1  0  0   Sunny.                    OPEN
1   0    -1  0  0   THINK RESPONSE            THINK <response> </response>
0   0    -1  0  0   Sunny.                    THINK <response> </response>
0   0     2  1  1   THINK [ SHORT TIME ]      THINK [ SHORT ] [ TIME ]
0  -3     2  1  1   THINK [ WEATHER TIME ]    THINK [ HERMES ] [ TIME ]
1  -3     2  1  1   THINK [ TIME ]            THINK [ STRING ]
1  -3     2  1  1   THINK [ EMPTY ]           THINK [ BARE ]
1  -3     0  1  1   THINK [ NOTHING ]         THINK [ {"name":"f","arguments":""} ]
1  -3     0  1  1   THINK [ NOTHING ]         THINK [ {"name":"f","arguments":null} ]
1  -3     0  1  1   THINK [ NOTHING ]         THINK [ {"name":"f","arguments":"{}"} ]
0   0     2  1  0   Sunny.                    <think> [ WEATHER ] </think> no
0   0     2  0  1   THINK [ SHORT TIME ]      THINK [ SHORT ] [ TIME
1  -3     2  0  1   THINK [ SHORT TIME ]      THINK [ SHORT TIME { ]
0  -3     2  0  1   THINK [ SHORT TIME ]      THINK [ ] [ SHORT TIME ]
1   3     0  1  1   THINK [ TAG ]             THINK [ TAG ]
0  -3     0  0  0   THINK [ CLOSES ]          THINK [ CLOSES ]
0  -3     0  0  0   THINK [ ENDS ]            THINK [ ENDS ]
"""  # exact: equal as JSON, in one block or many, all that is in them; or a response and no call


@each("line", cells_of(GOLDEN + CHOICES + EXACT), ids=" ".join)
def test_the_scorers_golden_table(line):
    form, correctness, paper, exact, called, *words = line
    gold, said = map(spell, words)

    s = ev.score(said, row_of(words[0]))

    assert s["exact"] == int(exact)
    assert s["called"] == int(called)
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


def test_wilson_and_the_paired_bootstrap_are_the_textbooks():
    assert list(ev.wilson(8, 10).values()) == approx([80, 49.02, 94.33], abs=.01)
    assert list(ev.wilson(0, 10).values()) == approx([0, 0, 27.75], abs=.01)

    # 25 +- 1.96 sqrt(25 (100 - 25) / 400)
    change = ev.paired([1, 1, 0, 1] * 100, [1, 0, 0, 1] * 100)
    assert list(change.values()) == approx([25, 20.76, 29.24], abs=.5)


def test_chance_never_reads_the_question_and_needs_rows_that_list_their_tools():
    empty = row_of("THINK [ EMPTY ]")
    rows = [empty, ONE, NONE]

    _, found = ev.tabulate(ev.chance_answers(rows), rows)

    first, drawn, response = (totals["all"] for totals in found.values())
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
    unreadable = {**row_of("THINK [ CLOSES ]"), "prediction": "no"}
    bare = {"output": "Hi.", "prediction": "Hello."}  # lists no tools: not in the chance lines
    file = write_rows(tmp_path / "a.jsonl", right, wrong, unreadable, bare)

    assert call(ev, "--score", file) == 0

    out = capsys.readouterr().out  # exact, called, paper_tool; exact, false calls
    assert re.search(r"your answers +50.0 +50.0 +50.0 +100.0 +0.0\n", out)
    assert "1 of 4 rows left out" in out
    assert "no chance lines" in out


# ---- 8. Generate, reconstruct --------------------------------------------------------------------
def slowly(model, tokenizer, prompt, max_new, keep, v_D):
    """A greedy answer, one token at a time, nothing kept from one pass to the next. Block 1's
    output h becomes keep h + v at the prompt's last token."""
    ids = tokenizer(prompt)["input_ids"]
    ends = ev.end_tokens(model, tokenizer).tolist()
    last = len(ids) - 1

    def edit(h_1TD):
        h_1TD[:, last] = keep * h_1TD[:, last] + v_D
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
def test_batched_patched_answers_equal_one_prompt_one_token_at_a_time(family, run, tokenizer):
    model = run.models["A"]
    if family != "the pair":  # one token in eight ends an answer
        model = random_model(family, eos_token_id=list(range(0, 1024, 8)))
    prompts = [dfc.prompt_of(row, tokenizer) for row in rows_in(TINY / "tools.jsonl", "test")[:5]]
    prompts.sort(key=len, reverse=True)

    # nothing or random vectors added, or put in its place
    x_NMD = dfc.collect([model], tokenizer, prompts, 1).float()
    random_ND, other_ND = 2 * x_NMD.std() * torch.randn(2, *x_NMD[:, 0].shape)
    v_2ND = torch.stack([random_ND, other_ND])
    clean, = ev.generate(model, tokenizer, prompts, 16)
    added, _ = ev.generate(model, tokenizer, prompts, 16, 1, v_2ND, most_tokens=400)
    placed, other = ev.generate(model, tokenizer, prompts, 16, 1, v_2ND, replace=True)

    assert added != clean
    for keep, v_ND, texts in ((1, 0 * random_ND, clean), (1, random_ND, added),
                              (0, random_ND, placed), (0, other_ND, other)):
        for v_D, prompt, text in zip(v_ND, prompts, texts):
            assert text == slowly(model, tokenizer, prompt, 16, keep, v_D)


def test_sampled_answers_are_drawn_from_the_softmax_and_versions_share_their_noise(
        tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", str)
    model = random_model("Llama")
    model.lm_head.weight *= 50  # some tokens are likely
    prompts = ["Hi"] * 2000
    ids_1T = torch.tensor(dfc.token_ids(tokenizer, prompts[:1]))
    answers = functools.partial(ev.generate, model, tokenizer, prompts, 4,
                                most_tokens=1000 * ids_1T.numel())

    clean, = answers(seed=0)

    p_C = model(ids_1T).logits[0, -1].softmax(0)
    for token in p_C.topk(5).indices.tolist():
        share = sum(text.startswith(f"[{token},") for text in clean) / 2000
        assert share == approx(p_C[token].item(), abs=.03)

    # each batch and seed has its noise; in all versions it is the same; greedy has none
    assert clean[:1000] != clean[1000:]
    assert answers(seed=1) != [clean]
    assert answers(1, torch.zeros(2, 2000, 16), seed=0) == [clean, clean]
    assert len(set(answers()[0])) == 1


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
    other_NMD = x_NMD.clone()
    other_NMD[:, 0] = x_NMD[:, 0].mean(0)
    slow = {"own vector": x_NMD, "reconstruction": xhat_NMD, "no latent": nothing_MD[None],
            "reconstruction, mean A": cc(other_NMD)[0]}
    for part in cc.partitions():
        wrote_NMD = torch.einsum("nl,lmd->nmd", f_NL[:, part.latents], cc.W_dec[part.latents])
        slow[f"{part.name} alone"] = nothing_MD + wrote_NMD * cc.scale

    # a partition is left out where it writes nothing; A's vector is exchanged for B alone
    only_b = {"B-exclusive alone", "reconstruction, mean A", "reconstruction, another A"}
    assert into_a.keys() - into_b.keys() == {"A-exclusive alone"}
    assert into_b.keys() - into_a.keys() == only_b
    assert len(into_a) == 6

    # "another A" is never the prompt's own
    with_a_NND = torch.stack([
        cc(torch.stack([a_D.expand(6, -1), x_NMD[:, 1]], 1))[0][:, 1] for a_D in x_NMD[:, 0]])
    error_NN = (with_a_NND - into_b["reconstruction, another A"]).norm(dim=2)
    assert sorted(error_NN.argmin(0).tolist()) == list(range(6))
    assert error_NN.min(0).values.max() < 1e-4 < error_NN.diagonal().min()
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


def test_prompts_are_encoded_whole_and_those_that_do_not_fit_are_left_out_and_counted(
        world, run, dev, tokenizer, capsys):
    rows = rows_in(world.rows, "dev")
    prompts = [dfc.prompt_of(row, tokenizer) for row in rows]
    longest = max(map(len, dfc.token_ids(tokenizer, prompts)))
    where = str(world.rows), tokenizer, "dev"

    assert (dev.rows, dev.texts) == (rows, prompts)
    assert dev.needs_N.tolist() == [row["kind"] in ("ask", "hint") for row in rows]
    assert close(dev.f_NL, run.cc.encode(run.vectors(prompts)))

    # as long as fits
    assert run.longest_prompt == 512 - 12
    assert ev.load_prompts(*where, longest) == (rows, prompts)
    fit, _ = ev.load_prompts(*where, longest - 1)
    assert 0 < len(fit) < len(rows)
    assert capsys.readouterr().out.startswith(f"{len(rows) - len(fit)} dev rows left out")

    # one row of a kind, the system text alone
    few, bare = ev.load_prompts(*where, 500, 1, "paper")
    assert len({row["kind"] for row in few}) == len(few)
    assert bare[0] == few[0]["instruction"]


def test_the_newest_finished_run_is_the_default(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/unfinished").mkdir(parents=True)
    Path("runs/old").symlink_to(world.run)
    shutil.copytree(world.run, "runs/new")

    opened = ev.open_run(get=lambda *model: model)

    assert opened.folder == Path("runs/new")


# ---- 9. Steering ---------------------------------------------------------------------------------
@once
def dev(run):
    """All dev prompts."""
    return steer.read_prompts(run, "dev")


@once
def ranking(run, dev):
    return steer.rank_latents(run.cc, dev.f_NL, dev.needs_N)


@once
def latents(run, ranking):
    """The best A-exclusive one."""
    return steer.choose_latents(run.cc, ranking)


def random_run():
    """A run without models. Each of its ten A-exclusive latents writes a coordinate of its own."""
    cc = scaled(32, 10, 0)
    cc.W_dec[:10, 0] = torch.eye(16)[:10]
    return ev.Run(dfc.Settings(seed=7), cc, {}, None, None, samples=2)


def random_prompts():
    """For two splits 9 prompts that are vectors alone; the first 4 need a tool."""
    needs_N = torch.arange(9) < 4
    return {
        split: steer.Prompts([None] * 9, [], torch.randn(9, 2, 16), torch.rand(9, 32), needs_N)
        for split in ("dev", "test")}


def of_hits(hits, n=20, false_calls=0.):
    """An Outcome with some exact calls of n."""
    return steer.Outcome([1] * hits + [0] * (n - hits), false_calls, [])


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


def test_latents_are_ranked_by_the_textbooks_formulas_in_the_authors_columns():
    cc = small()
    f_NL = torch.randint(0, 4, (50, 32)).float()
    needs_N = torch.rand(50) < .6

    ranking = steer.rank_latents(cc, f_NL, needs_N)

    p_PL, q_QL = f_NL[needs_N], f_NL[~needs_N]
    larger_PQL = (p_PL[:, None] > q_QL) + .5 * (p_PL[:, None] == q_QL)  # ties count half
    spread_L = ((p_PL.var(0) + q_QL.var(0)) / 2).sqrt()
    slow = {
        "cohens_d": (p_PL.mean(0) - q_QL.mean(0)) / spread_L,
        "auroc": larger_PQL.mean((0, 1)),
        "fire_rate_nontool": (q_QL > 0).float().mean(0),
        "mean_tool": p_PL.mean(0),
    }
    order = slow["cohens_d"].argsort(descending=True).tolist()
    for l, row in zip(order, ranking, strict=True):
        assert row["feature_idx"] == l
        assert (row["partition"] == "A-exclusive") is (l < 4)
    for name, slow_L in slow.items():
        assert [row[name] for row in ranking] == approx(slow_L[order].tolist(), abs=1e-5)

    # by default the best A-exclusive one is steered
    best = next(l for l in order if l < 4)
    assert steer.choose_latents(cc, ranking) == [best]
    assert steer.choose_latents(cc, ranking, [3, 0, 3]) == [0, 3]


def test_control_directions_are_random_other_latents_and_both_differences_of_means():
    cc = scaled(5, 4, 3)
    dev = random_prompts()["dev"]

    directions = steer.control_directions(cc, dev, [3, 1])

    a_D, b_D = dev.x_NMD[:4].mean(0)
    none_D = dev.x_NMD[4:, 0].mean(0)
    assert close(directions["A - B"], F.normalize(a_D - b_D, dim=0))
    assert close(directions["diff of means"], F.normalize(a_D - none_D, dim=0))
    assert close(directions["latents"], F.normalize(cc.W_dec[[3, 1], 0] * cc.scale[0]))
    random_UD = directions["random"]
    assert random_UD.norm(dim=1).tolist() == approx([1] * 10)
    assert torch.linalg.matrix_rank(random_UD) == 10
    assert -.1 < random_UD.mean() < .1  # of all orthants
    assert not close(random_UD, steer.control_directions(cc, dev, [], seed=7)["random"])


@each("sign, hits, margin", [(1, [18, 16, 17, 2], 5), (-1, [3, 14, 13, 19], 50)])
def test_a_change_stands_beside_controls_of_its_length_and_its_margin_is_over_the_strongest(
        sign, hits, margin, monkeypatch):
    """hits: of the change, two random directions and A - B; without a change there are 15."""
    v_ND = torch.randn(5, 4)
    u_UD = F.normalize(torch.randn(3, 4))

    def outcomes(run, m, prompts, v_VND):
        # the change itself, then controls as long on each prompt, with its sign
        assert m == "B"
        assert torch.equal(v_VND[0], v_ND)
        assert close(v_VND[1:], sign * v_ND.norm(dim=1, keepdim=True) * u_UD[:, None])
        return [of_hits(n, false_calls=n) for n in hits]

    replace_in(steer, monkeypatch, outcomes)
    directions = {"random": u_UD[:2], "A - B": u_UD[2:]}
    clean = of_hits(15, false_calls=7)
    result, _ = steer.measure_change(None, "B", None, v_ND, directions, clean, sign)

    # percentage points of 20 prompts
    own, *controls = [5 * (n - 15) for n in hits]
    found = sum(result["controls"].values(), [])
    assert result["effect"]["pp"] == approx(own)
    assert [change["pp"] for change in found] == approx(controls)
    assert result["margin"]["pp"] == approx(margin)
    assert result["clean"] == {"exact": 75, "false_calls": 7}
    assert result["false_calls"] == hits[0]


def test_strengths_come_from_dev_prompts_and_the_table_from_test_prompts(monkeypatch):
    run = random_run()
    prompts = random_prompts()
    dev_NL, test_NL = (there.f_NL for there in prompts.values())
    ranking = steer.rank_latents(run.cc, dev_NL, torch.arange(9) < 4)
    written_LD = run.cc.W_dec[:, 0] * run.cc.scale[0]
    added = []

    def read_prompts(run, split, most):
        return prompts[split]

    def best_strength(run, m, prompts, v_ND, strengths):
        assert close(v_ND, dev_NL[:, [2, 5]] @ written_LD[[2, 5]])
        assert m == "B" or [1 + c for c in strengths] == list(steer.ALPHAS)
        return {"A": 3., "B": 2.}[m]

    def outcomes(run, m, prompts, v_VND):
        return [of_hits({"A": 9, "B": 1}[m])]

    def measure_change(run, m, there, v_ND, directions, clean, sign):
        assert there is prompts["test"]
        added.append((f"{m} {sign} {sum(clean.exact)}", v_ND))
        return directions, []

    replace_in(steer, monkeypatch, read_prompts, best_strength, outcomes, measure_change)
    steering, *_ = steer.steer(run, [2, 5], ranking, prompts["dev"], 9)

    # what is added, to which model, beside which clean answers
    test_ND = test_NL[:, [2, 5]] @ written_LD[[2, 5]]
    maximum_D = dev_NL[:4, [2, 5]].max(0).values @ written_LD[[2, 5]]
    expected = [("A -1 9", -test_ND), ("A 1 9", 3 * test_ND),
                ("B 1 1", maximum_D), ("B 1 1", 2 * test_ND)]
    assert list(steering["changes"]) == [
        "ablated in A", "scaled by 4 in A", "its maximum added to B", "copied from A into B, x 2"]
    for (found, v_ND), (wanted, wanted_ND) in zip(added, expected, strict=True):
        assert found == wanted
        assert close(v_ND, wanted_ND)

    # control latents: the others of the partition, best separated first
    order = [row["feature_idx"] for row in ranking]
    others = [l for l in order if l < 10 and l not in (2, 5)]
    directions = steering["changes"]["ablated in A"]
    assert close(directions["latents"], F.normalize(written_LD[others]))
    of_seed = steer.control_directions(run.cc, prompts["dev"], [], seed=7)
    assert close(directions["random"], of_seed["random"])


@each("samples, right, exact, false_calls", [
    (0, [1, 0, 0], [1, 0], 100),
    (2, [1, 0, 0, 1, 1, 1], [1, .5], 50),
])
def test_outcomes_are_means_over_the_answers_to_each_prompt_of_the_model_asked_for(
        samples, right, exact, false_calls, monkeypatch):
    run = ev.Run(dfc.Settings(), None, {"A": "A", "B": "its base"}, None, None, samples)
    rows = [ONE, NONE, TWO]
    needs_N = torch.tensor([True, False, True])
    wrong = spell("THINK [ FIVE ]")
    v_1ND = torch.randn(1, 3, 4)

    def generate(model, tokenizer, texts, max_new, layer, v_VND, seed):
        times = len(right) // 3
        assert model == "its base"
        assert texts == ["1", "2", "3"] * times
        assert torch.equal(v_VND, v_1ND.repeat(1, times, 1))
        assert (seed is None) is (samples == 0)
        hits = zip(rows * times, right)
        return [[row["output"] if hit else wrong for row, hit in hits]]

    replace_in(steer, monkeypatch, generate)
    prompts = steer.Prompts(rows, ["1", "2", "3"], None, None, needs_N)
    outcome, = steer.outcomes(run, "B", prompts, v_1ND)

    assert outcome.exact == exact
    assert outcome.false_calls == false_calls


def test_the_strength_is_the_smallest_as_good_as_the_best_by_exact_minus_false_calls(
        monkeypatch):
    found = {  # strength: exact calls of 9, false calls in percent
        .5: (0, 0.),
        1: (8, 5.),
        2: (8, 0.),
        4: (9, 90.),
    }

    def outcomes(run, m, prompts, v_VND):
        counts = [found[v.item()] for v in v_VND]
        return [of_hits(hits, 9, false) for hits, false in counts]

    replace_in(steer, monkeypatch, outcomes)
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

    for m, totals in metrics["evaluation"]["models"].items():
        said = {}
        for name in totals:
            said[name] = [answer[m][name] for answer in answers]

        assert ev.tabulate(said, rows)[1] == totals
        assert said["own vector"] == said["clean"]


def test_a_run_is_steered_and_keeps_every_answer_and_change(world, metrics, ranking):
    lines = rows_in(world.run / "steer.jsonl")
    rows = [{"output": line["gold"]} for line in lines]
    assert rows_in(world.run / "ranking.jsonl") == ranking

    for name, result in metrics["steering"]["changes"].items():
        clean = [line[f"clean {result['model']}"] for line in lines]
        changed = [line[name] for line in lines]
        _, found = ev.tabulate({"clean": clean, "changed": changed}, rows)
        assert result["effect"] == found["changed"]["change"]
        assert result["clean"]["exact"] == found["clean"]["needs"]["exact"]["pct"]
        assert result["false_calls"] == found["changed"]["none"]["false_call"]["pct"]

    assert metrics["steering"]["rows"] == {"needs": 2, "none": 3}
    assert 0 < sum(metrics["l0"].values()) < 8.01


def test_sampled_results_stand_beside_the_greedy_ones(world, dev, metrics, monkeypatch):
    def sampled(run, latents, ranking, dev, most_rows):
        return {**metrics["steering"], "samples": run.samples}, {"clean A": dev.texts * 3}, dev

    monkeypatch.setattr(steer, "steer", sampled)
    assert call(steer, world.run, "--samples=3") == 0

    after = dfc.read_metrics(world.run)
    lines = rows_in(world.run / "steer_sampled.jsonl")
    assert after.pop("steering_sampled")["samples"] == 3
    assert after == metrics
    assert [line["clean A"] for line in lines] == dev.texts


def test_the_table_of_a_sweep_has_the_published_figures_beside_ours_and_raw_ones_if_there_are(
        world, metrics, capsys):
    assert call(table, world.run) == 0
    out = capsys.readouterr().out
    assert "+31.2 ± 9.7, +6.7 ± 4.9" in out
    assert "raw A" not in out

    # as of a run trained as published
    metrics = copy.deepcopy(metrics)
    into_a = metrics["evaluation"]["models"]["A"]
    into_a["reconstruction, raw"] = into_a["no latent"]
    run = table.run_of(world.run, metrics)
    assert "raw A" in table.columns_of([run])
    assert run["raw A"] == approx(into_a["no latent"]["change"]["pp"])


def test_a_prompt_of_your_own_is_answered_clean_and_steered_and_shows_where_the_latent_fires(
        run, latents, monkeypatch, capsys):
    text = rows_in(run.settings.tool_texts, "test")[2]["instruction"]
    prompt = steer.own_prompt(run, text)
    clean = spell("THINK [ WEATHER ]")
    x_1MD = run.vectors([prompt])

    def generate(model, tokenizer, prompts, max_new, layer, v_VND):
        assert prompts == [prompt]
        written_1D = steer.written(run.cc, run.cc.encode(x_1MD), latents)
        for name, factor, answer in (("A", 0, clean), ("A", 3, "steered"), ("B", 0, "base"),
                                     ("B", 2, "copied")):
            if model is run.models[name] and close(v_VND, factor * written_1D[None]):
                return [[answer]]

    replace_in(steer, monkeypatch, generate)
    steer.steer_own_words(run, latents, text, [4.])

    assert prompt.count(text) == 2  # said to the row whose tools have most words in common with it
    out = capsys.readouterr().out
    for answer in (f"A, alpha = 1\n{clean}", "alpha = 4\nsteered", "B\nbase", "added\ncopied"):
        assert answer in out

    # where the latent is active in the clean one
    read = prompt.removesuffix("<think>") + clean
    ids_1T = torch.tensor(dfc.token_ids(run.tokenizer, [read]))
    x = [dfc.residual_stream(model, ids_1T, 2)[0] for model in run.models.values()]
    f_T = run.cc.encode(torch.stack(x, 1))[:, latents[0]]
    shown = re.findall(r"^ *(\d+) +['\"]", out, re.MULTILINE)
    assert f_T.any()
    assert [int(i) - 1 for i in shown] == f_T.nonzero()[:, 0].tolist()


def test_words_of_your_own_take_the_place_of_the_users_in_toolrls_frame(run, monkeypatch):
    row = {**ONE, "input": "Dialogue: <user> weather? </user>"}
    monkeypatch.setattr(steer, "load_prompts", lambda *where: ([row], []))

    prompt = steer.own_prompt(run, "Wake me.")

    said = {**ONE, "input": "Dialogue: <user> Wake me. </user>"}
    assert prompt == dfc.prompt_of(said, run.tokenizer)


@each("n", [20, 0])
def test_a_published_crosscoder_becomes_a_run_with_its_own_settings(
        n, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dfc.PRESETS, "tiny", f"--tool-texts {world.rows} --n-texts 60")
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


def test_the_pair_behaves_as_its_tables_say(run, tokenizer):
    lines = re.findall(r"^\| (base|toolrl) \| (\w+) \| \d+ \| \d+ \((\d+)-(\d+)\)",
                       (TINY / "MAKING.md").read_text(), re.MULTILINE)
    test = rows_in(TINY / "tools.jsonl", "test")
    assert len(lines) == 10

    for name, kind, low, high in lines:
        rows = [row for row in test if row["kind"] == kind][:20]
        prompts = [dfc.prompt_of(row, tokenizer) for row in rows]
        model = run.models[{"toolrl": "A", "base": "B"}[name]]
        said, = ev.generate(model, tokenizer, prompts, 64)

        # the intervals overlap
        exact = ev.tabulate({name: said}, rows)[1][name]["all"]["exact"]
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


def test_the_piece_in_the_readme_prints_its_figures(tmp_path, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code[1].replace("my_crosscoder", str(tmp_path)), {})

    printed = re.findall(r"0\.\d+", capsys.readouterr().out)
    assert list(map(float, printed)) == approx([.92, .95], abs=.03)


EXERCISES = ROOT / "extras/exercises"
SOLUTIONS = sorted(EXERCISES.glob("solutions/*.py"))


def exercise(name, solution=""):
    """What the file of an exercise defines, as it stands or with a solution."""
    here = {"__name__": name, "__file__": str(EXERCISES / name)}
    exec((EXERCISES / name).read_text() + solution, here)
    return here


@each("solution", SOLUTIONS, ids=lambda file: file.stem)
def test_each_exercise_fails_as_it_stands_and_passes_with_its_solution(solution):
    stands = exercise(solution.name)
    solved = exercise(solution.name, solution.read_text())
    test = next(name for name in stands if name.startswith("test_"))

    solved[test]()
    with raises((AssertionError, NotImplementedError)):
        stands[test]()


def test_the_programs_of_the_exercises_run(world, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ev, "open_run", lambda folder: run)  # its answers are short
    call = '<tool_call>{"name": "get_weather", "parameters": {}}</tool_call>'
    said = {"ablated in A": "", "its maximum added to B": call,
            "answers": {"B": {"no latent": "what B said"}}}
    lines = [{"prompt": "1. Name: get_weather\n<user> Hi </user>", "gold": gold, "clean A": gold,
              **said} for gold in (call, "<response> No. </response>")]
    for name in ("steer.jsonl", "eval.jsonl"):
        write_rows(tmp_path / name, *lines)

    exercise("06_read_answers.py")["main"](tmp_path)
    wanted = [(world.run, 1), (tmp_path,), (5,), (world.run, 1)]
    for file, arguments in zip(SOLUTIONS, wanted):
        exercise(file.name, file.read_text())["main"](*arguments)

    printed = capsys.readouterr().out
    assert "1 - of the first tool in the list\n   1 - without any value" in printed
    assert "ablated in A minus clean A: -100.0 to -100.0" in printed


def test_every_exercise_names_its_run_and_gives_a_hint_before_its_solution():
    page = (ROOT / "extras/EXERCISES.md").read_text()
    exercises = re.split(r"\n## \d+\. ", page)[1:]

    assert len(exercises) == 11
    for text in exercises:
        order = ["Afterwards you can", "<summary>Hint", "<summary>Solution"]
        assert sorted(order, key=" ".join(text.split()).index) == order
        commands = re.findall(r"(?m)^(?:python|pytest) (\S+)(.*)", text)
        assert commands
        for program, argv in commands:
            assert (ROOT / program).exists()
            assert "runs/" in argv or "exercises/" in program


GENERATE = """generate batches_by_length token_ids answer_prefix hooked end_tokens decode
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
    "control_directions difference_of_means":
        "control_directions(cc, prompts, [0, 20])",
}


def is_library(value):
    """Is it not one of ours? What is of no module is a constant, so ours."""
    ours = ("dfc", "eval_toolcall", "steer")
    return inspect.ismodule(value) or getattr(value, "__module__", "dfc") not in ours


@each("names", PIECES, ids=lambda names: names.split()[0])
def test_each_piece_can_be_copied_alone(names, tokenizer):
    here = {**vars(dfc), **vars(ev), **vars(steer)}
    copied = {name: value for name, value in here.items() if is_library(value)}
    for name in names.split():
        exec(inspect.getsource(here[name]), copied)

    results = []
    for there in (here, copied):
        torch.manual_seed(0)
        around = {
            "cc": scaled(5, 4, 3),
            "x": torch.randn(80, 2, 16),
            "model": random_model("Qwen2"),
            "tokenizer": tokenizer,
            "row": ONE,
            "prompts": random_prompts()["dev"],
        }
        results.append(str(eval(PIECES[names], {**there, **around})))
    assert results[0] == results[1]


# ---- 12. Extras ----------------------------------------------------------------------------------
def test_grid_cells_add_what_they_say_and_are_not_answered_again(tmp_path, monkeypatch):
    run = dataclasses.replace(random_run(), folder=tmp_path)
    dev = random_prompts()["dev"]
    a_D, b_D = dev.x_NMD[:4].mean(0)
    written_ND = steer.written(run.cc, dev.f_NL, [3, 1])
    expected = {
        grid.CLEAN: 0 * written_ND,
        grid.Scaling(0., (3, 1)): -written_ND,
        grid.Scaling(4., (3, 1)): 3 * written_ND,
        grid.Scaling(.5, ("A - B",)): .5 * (a_D - b_D),
        grid.Scaling(.2, ("diff of means",)): .2 * (a_D - dev.x_NMD[4:, 0].mean(0)),
    }
    asked = []

    def outcomes(run, m, prompts, v_VND):
        asked.extend(v_VND)
        return [of_hits(len(asked)) for _ in v_VND]

    replace_in(grid, monkeypatch, outcomes)
    there = run, dev, grid.differences_of_means(dev), list(expected)
    counts = grid.answer(*there, at_once=2)

    for found_ND, expected_ND in zip(asked, expected.values(), strict=True):
        assert close(found_ND, expected_ND)
    assert [sum(counts[scaling].exact) for scaling in expected] == [2, 2, 4, 4, 5]

    # again, without answering
    monkeypatch.setattr(grid, "outcomes", None)
    assert grid.answer(*there) == counts


def test_the_best_cells_and_factors_are_chosen_on_dev_and_reported_on_test(monkeypatch):
    counts = {4: (1, 3), 8: (2, 90), .3: (3, 0), .5: (4, 99)}  # alpha: exact calls, false calls

    def read_prompts(run, split, most):
        return split

    def answer(run, split, means, scalings):
        found = {}
        for scaling in scalings:
            hits, false_calls = counts.get(scaling.alpha, (0, 0))
            if split == "test":
                hits = 4 - hits
            found[scaling] = of_hits(hits, 4, false_calls)
        return found

    replace_in(grid, monkeypatch, read_prompts, answer)
    run = random_run()
    ranking = steer.rank_latents(run.cc, torch.rand(9, 32), torch.arange(9) < 4)
    lines = grid.list_cells(run.cc, ranking, [1], [4, 8])
    result = grid.measure_grid(run, lines, ["A - B", "diff of means"], 9)

    means = result["groups"]["A - B"][0]
    assert list(means["on_dev"]) == sorted(grid.FACTORS)
    for best, alpha, pp in ((result["best"], 8, -50), (result["best_less_false"], 4, -25),
                            (means["best"], .3, -75)):
        assert best["alpha"] == alpha
        assert best["test"]["pp"] == pp


def test_a_baseline_sets_the_coordinates_that_it_names_and_no_others():
    dev, report = random_prompts().values()
    u_D = F.normalize(torch.randn(16), dim=0)

    removed = {name: v_ND for _, name, v_ND in saturation.baselines(dev, report, u_D)}

    # slowly: P projects onto the directions; the largest principal components are the last
    a_ND, b_ND = report.x_NMD.unbind(1)
    needs_D = dev.x_NMD[:4, 0].mean(0)
    none_D = dev.x_NMD[4:, 0].mean(0)
    gap_ND = dev.x_NMD[:4, 0] - dev.x_NMD[:4, 1]
    for name, directions_DK, target_ND in (
            ("A - B", gap_ND.mean(0)[:, None], b_ND),
            ("2 components", torch.linalg.eigh(gap_ND.T @ gap_ND).eigenvectors[:, -2:], b_ND),
            ("diff of means", (needs_D - none_D)[:, None], none_D),
            ("u", u_D[:, None], b_ND),
            ("B's vector", torch.eye(16), b_ND)):
        P_DD = directions_DK @ torch.linalg.pinv(directions_DK)
        assert close(removed[name], (a_ND - target_ND) @ P_DD)
    assert close(removed["u x 0.5"], .5 * (gap_ND @ u_D).mean() * u_D)
    assert not removed["clean"].any()
    assert len(removed) == saturation.N_BASELINES


def test_saturation_removes_what_latents_write_its_part_along_u_and_controls(monkeypatch):
    run, reference = random_run(), random_run()
    run.cc.b_enc[0] = -99  # one latent is silent
    prompts = random_prompts()
    asked = []

    def read_prompts(run, split, most=None):
        there = prompts[split]
        return dataclasses.replace(there, f_NL=run.cc.encode(there.x_NMD))

    def outcomes(run, m, prompts, v_VND):
        asked.append((run.samples, -v_VND))
        return [of_hits(1)] * len(v_VND)

    replace_in(saturation, monkeypatch, read_prompts, outcomes)
    scene = saturation.make_scene(run, reference, "test", 9)
    lines = saturation.saturate(run, scene, [1, 3])

    # u: what the reference's latents write that are larger where a tool is needed
    f_NL = read_prompts(reference, "dev").f_NL
    more_L = (f_NL[:4].mean(0) - f_NL[4:].mean(0)).relu()[:10]
    u_D = F.normalize(more_L @ reference.cc.W_dec[:10, 0] * reference.cc.scale[0], dim=0)
    assert close(scene.u_D, u_D)

    # all is answered greedily, all but the controls also sampled
    assert [samples for samples, _ in asked] == [0, 2, 0, 2]
    sampled = {line["name"] for line in lines if "sampled" in line}
    assert sampled == {"latents", "all", "d < 0"}

    # what is removed
    f_NL = read_prompts(run, "dev").f_NL
    d_L = steer.cohens_d(f_NL[:4], f_NL[4:])[:10]
    best = d_L.argsort(descending=True).tolist()
    written = functools.partial(steer.written, run.cc, read_prompts(run, "test").f_NL)
    random_UD = steer.control_directions(run.cc, prompts["dev"], [], seed=7)["random"]
    every_ND, less_ND, *of_sizes = asked[2][1]
    assert close(every_ND, written(best))
    assert close(less_ND, written(d_L.lt(0).nonzero()[:, 0]))
    for n, (own_ND, along_ND, rest_ND, *controls) in ((1, of_sizes[:7]), (3, of_sizes[7:])):
        assert close(own_ND, written(best[:n]))
        assert close(along_ND, (own_ND @ u_D)[:, None] * u_D)
        assert close(rest_ND, own_ND - along_ND)

        # as long, in other directions; the first is random, the last that of n live latents
        for control_ND in controls:
            assert close(control_ND.norm(dim=1), own_ND.norm(dim=1))
        assert close(F.normalize(controls[0]), random_UD[0])
        drawn = controls[-1].any(0).nonzero()[:, 0].tolist()
        assert len(drawn) == n
        assert not {0, *best[:n]} & {*drawn}


def test_the_table_of_saturation_has_controls_beside_latents_and_not_beside_baselines(capsys):
    def line(n, name, exact):
        greedy = {"exact": exact, "false_calls": 7}
        return {"n": n, "name": name, "length": 1, "along u": 1, "greedy": greedy}

    saturation.print_table("", [[line(0, "A - B", [1, 1]), line(1, "latents", [0, 0]),
                                 line(1, "A - B", hits)] for hits in ([1, 1], [0, 0])])

    baseline, latents = capsys.readouterr().out.splitlines()[-2:]
    assert baseline.split()[-3:] == ["[100,", "100]", "7"]
    assert latents.split()[-4:] == ["[0,", "0]", "7", "50"]


def test_an_interval_over_dictionaries_and_prompts_is_as_wide_as_either_makes_it():
    by_dictionary, by_prompt = np.zeros((2, 10, 40))
    by_dictionary[::2] = 1
    by_prompt[:, ::2] = 1

    for exact_SN, half in ((by_dictionary, 31), (by_prompt, 15)):
        found = re.findall(r"\d+", saturation.two_way(exact_SN))
        assert list(map(int, found)) == approx([50, 50 - half, 50 + half], abs=4)


def cells_of_the_lesson(world):
    """[(source, tags, outputs)]; text has no outputs (None). Its runs are the world's."""
    text = (ROOT / "extras/lesson.ipynb").read_text()
    cells = json.loads(text.replace("runs/lesson-seed{seed}", f"{world.run}"))["cells"]
    return [("".join(cell["source"]), cell["metadata"].get("tags"), cell.get("outputs"))
            for cell in cells]


def test_the_lesson_runs_from_the_first_cell_to_the_last_also_without_pictures(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(toy, "fit", functools.partial(toy.fit, steps=100))  # speed, as are samples
    here = {}

    for source, _, outputs in cells_of_the_lesson(world):
        if outputs is not None:  # it holds code
            exec(source.replace("samples=5", "samples=1"), here)

    assert here["changes_seen"]


def test_the_lesson_shows_no_result_before_its_question(world):
    guesses = [outputs for source, _, outputs in cells_of_the_lesson(world)
               if source.startswith("# predict")]
    assert guesses == 9 * [[]]


def test_blanks_of_the_lesson_are_checked_and_their_solutions_pass(world, capsys):
    cells = cells_of_the_lesson(world)
    blanks = [i for i, (_, tags, _) in enumerate(cells) if tags == ["blank"]]
    assert len(blanks) == 6

    for i in blanks:
        here = {"lesson_checks": lesson_checks, "torch": torch, "F": F}
        exec(cells[i][0], here)
        assert "it is still empty" in capsys.readouterr().out
        _, check = cells[i][0].rsplit("\n\n\n", 1)
        solution = re.search(r"```python\n(.*?)```", cells[i + 1][0], re.DOTALL)[1]
        exec(solution + check, here)
        assert "is right" in capsys.readouterr().out


def test_a_check_of_the_lesson_says_what_is_wrong_and_goes_on_without(capsys):
    c = lesson_checks
    wrong = {
        "it changes x_BMD": (c.encode, dfc.Crosscoder.encode, lambda cc, x: x.zero_()),
        "it divides by 0": (c.cohens_d, steer.cohens_d, lambda p, q: p.mean(0) / p.std(0)),
        "it changes cc": (c.written, steer.written, lambda cc, f, latents: cc.W_dec.zero_()),
        "scale_A is missing": (c.written, steer.written, lambda cc, f, s: f[:, s] @ cc.W_dec[s, 0]),
        "its sign is wrong": (c.as_long, c.stretch, lambda v, d: c.stretch(v, -d)),
        "the two are swapped": (c.split_along, c.split, lambda v, u: c.split(v, u)[::-1]),
        "target (6,)": (c.set_to, c.step_to, lambda a, b, d: c.step_to(a, b[:, :], d))}

    for problem, (check, right, mine) in wrong.items():
        assert check(mine) is right
        assert problem in capsys.readouterr().out


def test_the_lesson_fetches_the_code_if_it_is_not_there(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("subprocess.run", lambda command, check: asked.append(command[:2]))
    (tmp_path / "dfc").mkdir()
    (tmp_path / "dfc/dfc.py").touch()
    first = cells_of_the_lesson(world)[1][0]

    exec(first, {})
    exec(first, {})  # once more does nothing

    assert asked == [["git", "clone"], [sys.executable, "-m"]]
    assert Path.cwd() == tmp_path / "dfc"
