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
import functools
import inspect
import json
import random
import re
import runpy
import shlex
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import constants
from pytest import approx, raises
from safetensors.torch import load_file

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
    Path(file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(file)


def replace_in(module, monkeypatch, *stubs):
    """The functions of these names by these functions."""
    for stub in stubs:
        monkeypatch.setattr(module, stub.__name__, stub)


def cells_of(table):
    """The cells of each line of a table; two blanks or more part them."""
    return [re.split(" {2,}", line) for line in re.findall(r"\S.*", table)]


def rows_in(file, split=None):
    return [*dfc.read_rows(str(file), (), split)]


# ---- 1. The crosscoder ---------------------------------------------------------------------------
def scaled(k=5, n_a=4, n_b=3):
    """A crosscoder of vectors of width 16, whose raw units are not its own."""
    cc = dfc.Crosscoder(16, 32, k, n_a, n_b).requires_grad_(False)
    cc.mean.normal_(2)
    cc.scale.uniform_(.5, 3)
    cc.b_enc.normal_(std=.1)
    cc.b_dec.normal_(std=.1)
    return cc


def started(*sizes):
    """A crosscoder that could be trained, and its vectors: those of A and B are alike."""
    x_NMD = torch.randn(600, 2, 8) * 2 + 1
    x_NMD[:, 1] += 2 * x_NMD[:, 0]
    cc = dfc.Crosscoder(8, 96, 3, *sizes)
    cc.fit_scale(x_NMD)
    cc.fair_start(x_NMD)
    return cc, x_NMD


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
    cc = scaled()
    x_BMD = torch.randn(6, 2, 16) * 3 + 1

    xhat_BMD, f_BL = cc(x_BMD)

    _, slow_f_BL, slow_zhat_BMD = slow_forward(cc, (x_BMD - cc.mean) / cc.scale)
    assert close(f_BL, slow_f_BL)
    assert close(xhat_BMD, slow_zhat_BMD * cc.scale + cc.mean)


def test_a_fair_start_gives_every_partition_the_same_spread():
    cc, x_NMD = started(12, 9)

    # that of shared latents, which read the mean of what they write
    assert torch.equal(cc.W_enc[..., 21:], cc.W_dec[21:].permute(1, 2, 0) / 2)
    pre_NL = cc.preactivate(cc.normalise(x_NMD))
    spread = [pre_NL[:, part.latents].std().item() for part in cc.partitions()]
    assert spread == approx([spread[-1]] * 3, rel=.01)


# ---- 2. Losses -----------------------------------------------------------------------------------
def slow_revival(cc, error_BMD, pre_BL, dead_L):
    """(7), before its weight: the dead latents of one partition after another, on a quarter of the
    batch."""
    total = 0
    for part in cc.partitions():
        own = part.latents
        f_BL = kept(pre_BL[:, own] * dead_L[own], 2 * cc.k)  # of living ones 0
        guess_BMD = torch.einsum("bl,lmd->bmd", f_BL, cc.W_dec[own])
        writes_M = cc.W_dec[own].any(0).any(1)
        total += (error_BMD - guess_BMD)[:17, writes_M].pow(2).mean()
    return total


def slow_train(cc, x_NMD, l1_mean=False, schedule=True):
    """train() by its formulas, with dense products, and SGD."""
    lambda_L = torch.where(torch.arange(96) < cc.n_a + cc.n_b, 3e-2, 1e-2)
    silent_L = 0 * lambda_L

    for step, batch in zip(range(40), dfc.batches(600, 64, 0)):
        # forward
        z_BMD = cc.normalise(x_NMD[batch])
        pre_BL, f_BL, zhat_BMD = slow_forward(cc, z_BMD)
        error_BMD = z_BMD - zhat_BMD
        silent_L = torch.where(f_BL.any(0), 0, silent_L + 1)

        # loss
        cost_BL = lambda_L * f_BL
        if not l1_mean:
            cost_BL = 96 * cost_BL * cc.W_dec.flatten(1).norm(dim=1)
        loss = error_BMD.pow(2).mean() + cost_BL.mean()
        loss += slow_revival(cc, error_BMD.detach(), pre_BL, silent_L > 2) / 32

        # step
        rate = .9
        if schedule:
            rate *= min(1, (step + 1) / 2, (40 - step) / 8)
        cc.zero_grad()
        loss.backward()
        cc.confine(cc.W_enc.grad, cc.W_dec.grad)
        torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        for p in cc.parameters():
            p.data -= rate * p.grad


@each("n_a, n_b, tied, how", [
    (0, 0, False, {}),
    (12, 0, True, {}),
    (48, 48, True, {}),
    (12, 9, False, {"schedule": False, "l1_mean": True}),
])
def test_training_equals_dense_products_and_exclusive_latents_never_touch_the_other_model(
        n_a, n_b, tied, how, monkeypatch):
    cc, x_NMD = started(n_a, n_b, tied)
    cc.W_enc.data[..., ::2] *= .2  # so that many are dead
    cc.W_dec.data *= 3             # and gradients are clipped
    slow = copy.deepcopy(cc)

    # Adam does not see a gradient's length
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, lr))
    dfc.train(cc, x_NMD, 40, 64, .9, l1_shared=1e-2, l1_excl=3e-2, dead_after=2, **how)
    slow_train(slow, x_NMD, **how)

    for fast_p, slow_p in zip(cc.parameters(), slow.parameters()):
        assert close(fast_p, slow_p, 1e-5)

    # exclusive latents never read or write the other model, shared ones both
    n = n_a + n_b
    own = [[True, False]] * n_a + [[False, True]] * n_b + [[True, True]] * (96 - n)
    assert cc.W_enc.any(1).T.tolist() == own
    assert cc.W_dec.any(2).tolist() == own

    # tied shared latents write one row into both
    rows_a, rows_b = cc.W_dec[n:].unbind(1)
    assert torch.equal(rows_a, rows_b) is tied


def test_predicting_the_mean_gives_fve_0_and_the_truth_1():
    x_NMD = torch.randn(50, 2, 8) * 100 + 1000
    xhat_NMD = x_NMD.clone()
    xhat_NMD[:, 1] = x_NMD[:, 1].mean(0)

    assert dfc.fve(x_NMD, xhat_NMD).tolist() == approx([1, 0], abs=1e-9)


# ---- 3. Activations ------------------------------------------------------------------------------
SIZES = json.loads("""{
    "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "full_attention_interval": 3,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8
}""")  # each family takes what it knows of these, and what is its own
# Two blocks of three of Qwen3Next have no attention. Bloom's blocks put out tuples, and it has no
# greatest position
FAMILIES = json.loads("""{
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8},
    "Qwen3Next": {"head_dim": 8},
    "Mistral": {"head_dim": 8, "sliding_window": 16},
    "Mixtral": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 16},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 16},
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "GPT2": {},
    "Falcon": {},
    "Bloom": {}
}""")


def random_model(family, **more):
    """A small model of one of the library's families."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@each("family", FAMILIES)
def test_collect_equals_hidden_states_of_single_texts_whatever_the_batch(family, tokenizer):
    model = random_model(family)
    texts = [README[i:i + n] for i, n in enumerate((3, 300, 1, 17))]

    for layer, longest in ((0, 4096), (1, 50)):
        x_NMD = dfc.collect([model, model], tokenizer, texts, layer, longest).float()  # by fp16

        for text, x_MD in zip(texts, x_NMD):
            ids_1T = torch.tensor([tokenizer(text)["input_ids"][-longest:]])
            states = model(ids_1T, output_hidden_states=True).hidden_states
            assert close(x_MD, states[layer + 1][0, -1], 1e-2)


def test_activations_are_kept_under_all_that_changes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY / "toolrl", "a")
    shutil.copytree("a", "b")
    shutil.copy(TINY / "tools.jsonl", ".")
    weights = Path("b/model.safetensors").rename("weights").resolve()
    Path("b/model.safetensors").symlink_to(weights)
    where = "--model-a=a --model-b=b --tool-texts=tools.jsonl --out=runs/run"
    collected = []

    def collect(*asked):
        collected.append(asked)
        return torch.zeros(1)

    def is_new(flags="", split="dev", n=2):
        collected.clear()
        s = dfc.parse_args(f"{where} {flags}".split())
        dfc.activations(s, split, n, s.seed, s.whole_prompts)
        return collected != []

    replace_in(dfc, monkeypatch, collect)

    # the same again, and something else
    assert is_new()
    assert not is_new()
    assert is_new(split="train")
    assert is_new(n=3)
    for flags in ("--layer=0", "--seed=1", "--longest=100", "--no-whole-prompts"):
        assert is_new(flags)

    # files, and what a link points to
    for touched in ("a/model.safetensors", weights, "tools.jsonl"):
        os.utime(touched)
        assert is_new()

    # a damaged file
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
    splits = [dfc.split_of({"text": str(i)}) for i in range(2000)]

    for split in ("dev", "test"):
        assert 150 < splits.count(split) < 250
    assert dfc.split_of({"text": "0", "split": "dev"}) == "dev"


def test_half_of_the_tool_texts_are_whole_prompts_and_half_go_on_into_the_answer(
        tokenizer, tmp_path):
    row = rows_in(TINY / "tools.jsonl", "train")[0]
    there = write_rows(tmp_path / "one.jsonl", row), tokenizer, "train", 200
    prompt = dfc.prompt_of(row, tokenizer)
    whole = prompt + row["output"].removeprefix("<think>")

    texts = dfc.tool_texts(*there)

    assert texts[:100] == [prompt] * 100
    assert len(texts) == 200
    assert len(set(texts[100:])) > 25
    for text in texts[100:]:
        assert whole.startswith(text)
        assert whole[len(text)].isspace()
    assert max(map(len, texts)) > len(prompt)

    # as published: chunks that end with a sentence, none a whole prompt
    pieces = dfc.tool_texts(*there, whole_prompts=False)
    assert prompt not in pieces
    assert min(map(len, dfc.token_ids(tokenizer, pieces))) >= 30


def test_plain_text_begins_as_the_tokenizer_begins_it_and_prompts_as_the_template_does(
        tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_bos_token = True

    prompt, _ = dfc.tool_texts(str(TINY / "tools.jsonl"), tokenizer, "dev", 2)
    plain, = dfc.plain_texts(str(TINY / "text.jsonl"), tokenizer, "dev", 1)

    assert plain.startswith("<|endoftext|>")
    assert not prompt.startswith("<|endoftext|>")


def test_rows_of_a_data_set_are_those_of_its_file(tmp_path):
    pytest.importorskip("datasets")
    write_rows(tmp_path / "train.jsonl", ONE, TWO)

    assert list(dfc.read_rows(str(tmp_path), dfc.TOOL_ROW)) == [ONE, TWO]


def test_a_model_may_be_a_name_of_the_hub(tmp_path, monkeypatch):
    """Here as the hub's client keeps it, out of the hub's reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--toolrl"
    shutil.copytree(TINY / "toolrl", repo / "snapshots/1", copy_function=os.symlink)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("1")

    local, hub = (dfc.Settings(model_a=f"{owner}/toolrl", out=f"{tmp_path}/run")
                  for owner in ("tiny", "owner"))
    x_NMD = dfc.activations(hub, "dev", 2)

    assert torch.equal(x_NMD, dfc.activations(local, "dev", 2))
    assert not torch.equal(x_NMD[:, 0], x_NMD[:, 1])


# ---- 5. Train, save, load ------------------------------------------------------------------------
def publish(folder, n=2, **more):
    """A folder in the form of the paper's checkpoints, from random weights -> its crosscoder."""
    config = {"activation_dim": 128, "dict_size": 64, "k": 16, "n_a": n, "n_b": n}
    cc = dfc.Crosscoder(**config)
    state = {**dict(cc.named_parameters()), "enc_mask": torch.ones(2, 64)}

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
    cc = scaled()
    x_NMD = torch.randn(9, 2, 16)
    cc.save_pretrained(tmp_path)

    again = dfc.load(str(tmp_path))

    assert torch.equal(again(x_NMD)[0], cc(x_NMD)[0])
    assert again.partitions() == cc.partitions()
    state = load_file(tmp_path / "model.safetensors")
    assert {name: list(weights.shape) for name, weights in state.items()} == json.loads("""{
        "W_enc": [2, 16, 32], "b_enc": [32], "W_dec": [32, 2, 16], "b_dec": [2, 16],
        "mean": [2, 16], "scale": [2, 16]
    }""")


@each("same", [False, True])
def test_planted_exclusive_features_are_recovered_and_two_equal_models_yield_none(same):
    x_NMD, d_CMD = toy.plant(C=40, D=32, N=4000, active=3)  # concepts 0 to 7 are A's alone
    if same:
        x_NMD[:, 1] = x_NMD[:, 0]

    cc = toy.fit(x_NMD, .125, tied=True, k=3, steps=500).requires_grad_(False)

    if same:  # does A alone have what its latents stand for?
        nu_error_L, nu_recon_L = latent_scaling.exclusivity(cc, x_NMD, cc.encode(x_NMD))
        passes_L = (nu_error_L.abs() < .2) & (nu_recon_L.abs() < .5)
        assert not passes_L[:cc.n_a].any()
    else:
        for m in (0, 1):
            assert toy.grade(cc, x_NMD, d_CMD, m).recall >= .75


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


@once
def world(tokenizer, tmp_path_factory):
    """A trained run; in its folder `home` two short tool rows of every kind and split."""
    home = tmp_path_factory.mktemp("world")
    few = []
    for split in ("train", "dev", "test"):
        few += ev.load_prompts(str(TINY / "tools.jsonl"), tokenizer, split, 250, 2)[0]
    file = write_rows(home / "few.jsonl", *few)

    flags = f"--tool-texts {file} --n-texts 60 --steps 200 --dict 96 --excl .12".split()
    assert call(dfc, *flags, "--out", home / "run") == 0
    return argparse.Namespace(home=home, rows=file, run=home / "run", flags=flags)


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

    departures = "excl_b tie_shared fair_start by_coordinate l1_mean revive schedule whole_prompts"
    for name in departures.split():
        assert getattr(paper, name) != getattr(dfc.Settings, name)

    # an encoder of its own, where ours reads what it writes
    cc = dfc.new_crosscoder(paper, 8)
    assert not torch.equal(cc.W_enc[0, :, 0], cc.W_dec[0, 0])


def test_a_killed_run_leaves_nothing_a_finished_one_stays_and_equal_seeds_give_equal_weights(
        world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = [*world.flags, "--out", run]
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

    # begun again, then asked for once more
    assert call(dfc, *flags) == 0
    done = files(tmp_path)
    assert call(dfc, *flags) == 0
    assert files(tmp_path) == done

    assert done[run / "model.safetensors"] == (world.run / "model.safetensors").read_bytes()


def test_the_seed_sets_texts_weights_and_batches_and_a_text_seed_the_texts_alone(
        tmp_path, monkeypatch):
    x = {split: torch.randn(10, 2, 8) for split in ("train", "dev")}
    seeds = {}
    weights = []

    def activations(s, split, n, seed=0, *how):
        seeds[split] = seed
        return x[split]

    def train(cc, x_NMD, *how, seed):
        assert x_NMD is x["train"]
        seeds["batches"] = seed
        weights.append(cc.W_dec.sum())
        return {}

    def measure(cc, *vectors):
        assert vectors == (*x.values(),)
        return {}

    replace_in(dfc, monkeypatch, activations, train, measure)
    for flags, texts in (("--seed=3", 3), ("--seed=4", 4), ("--seed=4 --text-seed=3", 3)):
        s = dfc.parse_args([*flags.split(), f"--out={tmp_path}/{flags}"])
        dfc.train_run(s)
        assert seeds == {"train": texts, "dev": 0, "batches": s.seed}

    assert weights[0] != weights[1] == weights[2]


def test_an_epochs_order_depends_on_the_seed_and_the_epoch():
    epochs = set()
    for seed in (0, 1):
        rows = torch.cat([*islice(dfc.batches(50, 10, seed), 10)]).tolist()
        epochs |= {tuple(rows[:50]), tuple(rows[50:])}

    assert len(epochs) == 4
    for epoch in epochs:
        assert sorted(epoch) == [*range(50)]


def test_trained_as_published_each_coordinate_has_a_scale(world):
    folder = world.home / "paper"

    assert call(dfc, *world.flags, "--recipe=paper", "--steps=1", "--out", folder) == 0

    run = ev.open_run(folder)
    x_NMD = dfc.activations(run.settings, "train", 60, whole_prompts=False)
    assert close(run.cc.normalise(x_NMD).std(0), torch.ones(2, 128), .01)


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
--- PARTLY/config.json
{"model_type": "qwen2", "num_hidden_layers": 5, "hidden_size": 128, "intermediate_size": 384,
 "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
 "tie_word_embeddings": true}
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

    for file in FILES.split("--- ")[1:]:
        name, _, text = file.partition("\n")
        (home / name).write_text(text)
    return home


BAD = """
do not fit       dfc --k 9999
do not fit       dfc --excl .6 --excl-b .6
1 or more        dfc --steps 0
--max-new        dfc --max-new 0
--longest        dfc --longest 9999
diverged         dfc --lr 1e9
layer 9          dfc --layer 9
MISSING          dfc --model-a MISSING
MISSING          dfc --model-b MISSING
no system role   dfc --model-a MODEL
leaves out       dfc --model-a DROPS
an adapter       dfc --model-a ADAPTER
12 weights       dfc --model-a PARTLY
--excl 0.001     dfc --excl .001
--excl inf       dfc --excl inf
cannot use       dfc --model-b .
cannot use       dfc --model-b tiny
no train row     dfc --tool-texts ONE.jsonl
row 2            dfc --tool-texts LONE.jsonl
row 2            dfc --plain-texts BROKEN.jsonl
row 2            dfc --plain-texts NULL.jsonl
jsonl            dfc --plain-texts nowhere.jsonl
FILE             dfc --out FILE/run
another seed     dfc --out RUN --seed 5
no finished run  dfc --out MODEL
no finished run  dfc --out FILE
no finished run  dfc --out DAMAGED
no finished run  dfc --out FOREIGN
no finished run  ev
no finished run  ev DAMAGED
no finished run  steer nothing
cannot use CUT   steer CUT
cannot use STR   ev STRANGE
cannot use       published PICKLE --preset tiny
row 2            ev --score LONE.jsonl
no row           ev --score EMPTY.jsonl
<tool_call>      ev --score OTHER.jsonl
less than 1      ev RUN --rows 0
jsonl            ev --score ""
--alpha          steer RUN --alpha strong
--prompt         steer RUN --alpha 2
not finite       steer RUN --prompt Hi --alpha nan
name some        steer RUN --latents 1 50
name some        steer RUN --latents 999
"""


@each("said, command", cells_of(BAD))
def test_bad_input_is_one_line_and_status_2_and_nothing_is_lost(
        said, command, bad, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(bad)
    program, *argv = shlex.split(command)
    if program == "dfc":
        argv = [*world.flags, "--out", tmp_path / "run", *argv]
    before = files(bad)

    status = call(globals()[program], *argv)

    # one line, after the look at models and rows
    *look, error = capfd.readouterr().err.splitlines()
    assert status == 2
    assert said in error
    for line in look:
        assert re.match("models|train|dev|test|collected", line)
    assert files(bad) == before
    assert not files(tmp_path)
    assert not Path("exploded").exists()


def test_an_error_line_ends_with_what_the_hub_answered(capsys):
    def main(argv):
        with dfc.errors_about("owner/name"):
            raise OSError("check your connection") from OSError("429 for https://hub/file")

    assert dfc.cli(main) == 2

    said = "owner/name: check your connection (429 for https://hub/file)"
    assert said in capsys.readouterr().err


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

    # 25 +- 1.96 sqrt(25 (100 - 25) / 400)
    assert list(ev.paired([1, 1, 0, 1] * 100, [1, 0, 0, 1] * 100).values()) == approx(
        [25, 20.76, 29.24], abs=.5)


def test_chance_never_reads_the_question_and_needs_rows_that_list_their_tools():
    first, drawn, response = ev.chance_answers([ONE] * 30).values()

    assert ev.score(first[0], row_of("THINK [ EMPTY ]"))["exact"] == 1
    assert ev.score(response[0], NONE)["exact"] == 1
    assert len({*drawn}) == 3
    for text in first + drawn:
        assert ev.score(text, ONE)["paper_tool"] == 1
    assert ev.chance_answers([ONE, {**NONE, "instruction": "no tools"}]) == {}


def test_the_table_shows_each_score_in_its_column_and_the_change_from_clean():
    wrong, thought = map(spell, ("THINK [ FIVE ]", "OPEN [ WEATHER ]"))
    rows = [ONE, ONE, NONE, NONE, NONE]
    right = [row["output"] for row in rows]

    table, _ = ev.tabulate({"clean": right, "patched": [wrong, thought, wrong, *right[3:]]}, rows)

    # exact, change [95 %], called, paper_tool; exact, false calls
    head, _, clean, patched = cells_of(table)
    assert head == ["2 need a tool:", "3 need none:"]
    assert clean == "clean 100.0 100.0 100.0 100.0 0.0".split()
    assert " ".join(patched) == "patched 0.0 -100.0 [-100, -100] 50.0 100.0 66.7 33.3"

    cut, _ = ev.tabulate({"clean": ["No [cut]", "Yes"]}, [NONE, NONE])
    assert "1 of 2 answers were cut" in cut


def test_score_reads_a_file_of_your_own_answers(tmp_path, capsys):
    right = {**ONE, "prediction": ONE["output"]}
    wrong = {**ONE, "prediction": "\u2028 no"}
    unreadable = {**row_of("THINK [ CLOSES ]"), "prediction": "no"}
    bare = {"output": "Hi.", "prediction": "Hello."}  # lists no tools: not in the chance lines
    write_rows(tmp_path / "a.jsonl", right, wrong, unreadable, bare)

    assert call(ev, "--score", tmp_path / "a.jsonl") == 0

    out = capsys.readouterr().out  # exact, called, paper_tool; exact, false calls
    assert re.search(r"your answers +50.0 +50.0 +50.0 +100.0 +0.0\n", out)
    assert "1 of 4 rows left out" in out
    assert "no chance lines" in out


# ---- 8. Generate, reconstruct --------------------------------------------------------------------
def slowly(model, tokenizer, prompt, keep, v_D):
    """A greedy answer, one token at a time, nothing kept from one pass to the next. Block 1's
    output h becomes keep h + v at the prompt's last token."""
    ids = tokenizer(prompt)["input_ids"]
    n = len(ids)

    def edit(h_1TD):
        h_1TD[:, n - 1] = keep * h_1TD[:, n - 1] + v_D
        return h_1TD

    end = ""
    with dfc.hooked(model, 1, edit):
        while not end:
            logits_1TC = model(torch.tensor([ids])).logits
            token = logits_1TC[0, -1].argmax()
            if token in ev.end_tokens(model, tokenizer):
                break
            ids.append(token.item())
            end = " [cut]" if len(ids) == n + 16 else ""
    return dfc.answer_prefix(prompt) + tokenizer.decode(ids[n:]) + end


@each("family", ["the pair", "Llama", "Qwen3Next", "Mistral", "Gemma2", "GPT2"])
def test_batched_patched_answers_equal_one_prompt_one_token_at_a_time(family, run, tokenizer):
    model = run.models["A"]
    if family != "the pair":  # one token in eight ends an answer
        model = random_model(family, eos_token_id=list(range(0, 1024, 8)))
    prompts = [dfc.prompt_of(row, tokenizer) for row in rows_in(TINY / "tools.jsonl", "test")[:5]]
    prompts.sort(key=len, reverse=True)
    answers = functools.partial(ev.generate, model, tokenizer, prompts, 16)

    # nothing and random vectors are added, or put in its place
    x_NMD = dfc.collect([model], tokenizer, prompts, 1).float()
    v_VND = torch.randn(3, *x_NMD[:, 0].shape) * 2 * x_NMD.std()
    v_VND[0] = 0
    added = answers(1, v_VND, most_tokens=400)
    placed = answers(1, v_VND, replace=True)

    assert answers() == added[:1]
    assert added[0] != added[1]
    for keep, versions in ((1, added), (0, placed)):
        for v_ND, texts in zip(v_VND, versions, strict=True):
            for v_D, prompt, text in zip(v_ND, prompts, texts):
                assert text == slowly(model, tokenizer, prompt, keep, v_D)


def test_sampled_answers_are_drawn_from_the_softmax_and_versions_share_their_noise(
        tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", str)
    model = random_model("Llama")
    model.lm_head.weight *= 50  # some tokens are likely
    ids_1T = torch.tensor(dfc.token_ids(tokenizer, ["Hi"]))
    answers = functools.partial(ev.generate, model, tokenizer, ["Hi"] * 2000, 4,
                                most_tokens=1000 * ids_1T.numel())

    clean, = answers(seed=0)

    p_C = model(ids_1T).logits[0, -1].softmax(0)
    for token in p_C.topk(5).indices.tolist():
        drawn = [text.startswith(f"[{token},") for text in clean]
        assert np.mean(drawn) == approx(p_C[token].item(), abs=.03)

    # each batch and seed has its noise; in all versions it is the same; greedy has none
    assert clean[:1000] != clean[1000:]
    assert answers(seed=1) != [clean]
    assert answers(1, torch.zeros(2, 2000, 16), seed=0) == [clean, clean]
    assert len({*answers()[0]}) == 1


def test_an_answer_ends_where_the_tokenizer_the_model_its_generation_or_the_chat_say(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "</think>"
    model = random_model("Llama", eos_token_id=5)
    model.generation_config.eos_token_id = [7, 9]

    usual = tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>", "<|endoftext|>"])
    assert ev.end_tokens(model, tokenizer).tolist() == sorted({5, 7, 9, *usual})


def test_reconstructions_are_what_the_decoder_says():
    cc = scaled()
    x_NMD = torch.randn(6, 2, 16) * 3 + 2
    xhat_NMD, f_NL = cc(x_NMD)

    # slowly; the last only for B, whose reconstruction may hold what only A's vector says
    other_NMD = x_NMD.clone()
    other_NMD[:, 0] = x_NMD[:, 0].mean(0)
    slow = {"own vector": x_NMD, "reconstruction": xhat_NMD, "no latent": cc.decode(0 * f_NL),
            "reconstruction, mean A": cc(other_NMD)[0]}
    for part in cc.partitions():
        others_NL = f_NL.clone()
        others_NL[:, part.latents] = 0
        slow[f"{part.name} alone"] = cc.decode(f_NL - others_NL)

    names = "own vector|reconstruction|{}-exclusive alone|shared alone|no latent|noise"
    for m, more in enumerate(("", "|reconstruction, mean A|reconstruction, another A")):
        found = ev.reconstructions(cc, x_NMD, m)
        assert "|".join(found) == names.format("AB"[m]) + more
        for name in found.keys() & slow.keys():
            assert close(found[name], slow[name][:, m])

        # noise as long as the error
        noise_ND = found["noise"] - x_NMD[:, m]
        assert close(noise_ND.norm(dim=1), (xhat_NMD - x_NMD)[:, m].norm(dim=1))
        assert F.cosine_similarity(noise_ND[0], noise_ND[1], dim=0).abs() < .9

    # "another A" is never the prompt's own
    assert (found["reconstruction, another A"] - xhat_NMD[:, 1]).norm(dim=1).min() > .1


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
    where = world.rows, tokenizer, "dev"

    assert (dev.rows, dev.texts) == (rows, prompts)
    assert close(dev.f_NL, run.cc.encode(run.vectors(prompts)))

    # as long as fits
    assert run.longest_prompt == 512 - 12
    assert ev.load_prompts(*where, longest) == (rows, prompts)
    fit, _ = ev.load_prompts(*where, longest - 1)
    assert 0 < len(fit) < len(rows)
    assert capsys.readouterr().out.startswith(f"{len(rows) - len(fit)} dev rows left out")

    # the system text alone
    _, bare = ev.load_prompts(*where, 500, template="paper")
    assert bare == [row["instruction"] for row in rows]


def test_the_newest_finished_run_is_the_default(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/unfinished").mkdir(parents=True)
    Path("runs/old").symlink_to(world.run)
    shutil.copytree(world.run, "runs/new")

    assert ev.open_run(get=lambda *model: model).folder == Path("runs/new")


# ---- 9. Steering ---------------------------------------------------------------------------------
@once
def dev(run):
    """All dev prompts."""
    return steer.read_prompts(run, "dev")


@once
def ranking(run, dev):
    return steer.rank_latents(run.cc, dev.f_NL, dev.needs_N)


def random_run():
    """A run without models, with ten A-exclusive latents."""
    return ev.Run(dfc.Settings(seed=7), scaled(32, 10, 0), {}, None, None, samples=2)


def random_prompts():
    """For two splits 9 prompts that are vectors alone; the first 4 need a tool."""
    needs_N = torch.arange(9) < 4
    return {
        split: steer.Prompts([None] * 9, [], torch.randn(9, 2, 16), torch.rand(9, 32), needs_N)
        for split in ("dev", "test")}


HITS = [15, 16, 2, 20] + 17 * [15]  # exact calls of 20, in the order of what is asked


@pytest.fixture
def stage(monkeypatch):
    """Prompts of two splits, and a list of what a random run is asked for: samples, model, prompts
    and vectors."""
    prompts = random_prompts()
    asked = []

    def read_prompts(run, split, most=None):
        run.read = split
        return prompts[split]

    def outcomes(run, m, there, v_VND):
        asked.append((run.samples, m, there, v_VND))
        if v_VND is None:
            return [of_hits({"A": 9, "B": 1}[m])]
        return [of_hits(n) for n, _ in zip(HITS, v_VND)]

    for module in (steer, grid, saturation):
        replace_in(module, monkeypatch, outcomes, read_prompts)
    return *prompts.values(), asked


def of_hits(hits, n=20, false_calls=0.):
    """An Outcome with some exact calls of n."""
    return steer.Outcome([1] * hits + [0] * (n - hits), false_calls, [])


def test_latent_scaling_compares_what_both_models_hold_of_what_a_latent_writes_into_a():
    cc = scaled(n_b=0)
    x_NMD = torch.randn(50, 2, 16) * 3
    f_NL = torch.rand(50, 32)

    found = latent_scaling.exclusivity(cc, x_NMD, f_NL)

    # slowly: what each latent writes, and how much of what it writes into A each model holds
    z_NMD, zhat_NMD = map(cc.normalise, (x_NMD, cc.decode(f_NL)))
    wrote_NLMD = f_NL[:, :, None, None] * cc.W_dec
    error_NLMD = (z_NMD - zhat_NMD)[:, None] + wrote_NLMD
    recon_N1MD = (zhat_NMD - zhat_NMD.mean(0))[:, None]
    for nu_L, y_NLMD in zip(found, (error_NLMD, recon_N1MD)):
        a_L, b_L = torch.einsum("nld,nlmd->ml", wrote_NLMD[:, :, 0], y_NLMD)
        assert nu_L.tolist() == approx((b_L / a_L).tolist(), rel=1e-2)


def test_latents_are_ranked_by_the_textbooks_formulas_in_the_authors_columns():
    cc = scaled()
    f_NL = torch.randint(0, 4, (50, 32)).float()
    needs_N = torch.rand(50) < .6

    ranking = steer.rank_latents(cc, f_NL, needs_N)

    p_PL, q_QL = f_NL[needs_N], f_NL[~needs_N]
    larger_PQL = torch.heaviside(p_PL[:, None] - q_QL, torch.tensor(.5))  # ties count half
    d_L = (p_PL.mean(0) - q_QL.mean(0)) / ((p_PL.var(0) + q_QL.var(0)) / 2).sqrt()
    order_L = d_L.argsort(descending=True)
    for name, slow_L in {
            "feature_idx": torch.arange(32),
            "cohens_d": d_L,
            "auroc": larger_PQL.mean((0, 1)),
            "fire_rate_nontool": (q_QL > 0).float().mean(0),
            "mean_tool": p_PL.mean(0)}.items():
        assert [row[name] for row in ranking] == approx(slow_L[order_L].tolist(), abs=1e-5)

    # by default the best A-exclusive one is steered
    exclusive = [row["feature_idx"] for row in ranking if row["partition"] == "A-exclusive"]
    assert exclusive == order_L[order_L < 4].tolist()
    assert steer.choose_latents(cc, ranking) == exclusive[:1]
    assert steer.choose_latents(cc, ranking, [3, 0, 3]) == [0, 3]


def test_control_directions_are_random_other_latents_and_both_differences_of_means():
    cc = scaled()
    dev = random_prompts()["dev"]

    directions = steer.control_directions(cc, dev, [3, 1])

    a_D, b_D = dev.x_NMD[:4].mean(0)
    none_D = dev.x_NMD[4:, 0].mean(0)
    assert close(directions["A - B"], F.normalize(a_D - b_D, dim=0))
    assert close(directions["diff of means"], F.normalize(a_D - none_D, dim=0))
    assert close(directions["latents"], F.normalize(cc.W_dec[[3, 1], 0] * cc.scale[0]))
    random_UD = directions["random"]
    assert torch.linalg.matrix_rank(random_UD) == 10
    assert -.1 < random_UD.mean() < .1  # of all orthants
    assert not close(random_UD, steer.control_directions(cc, dev, [], seed=7)["random"])


def test_strengths_come_from_dev_prompts_and_test_prompts_show_a_change_beside_its_controls(stage):
    run = random_run()
    dev, test, asked = stage
    ranking = steer.rank_latents(run.cc, dev.f_NL, dev.needs_N)

    steering, *_ = steer.steer(run, [2, 5], ranking, dev, 9)

    # of the strengths the fourth is best
    written_LD = run.cc.W_dec[:, 0] * run.cc.scale[0]
    dev_ND, test_ND = (there.f_NL[:, [2, 5]] @ written_LD[[2, 5]] for there in (dev, test))
    for (_, _, there, v_VND), factor in zip(asked, (1.5, 2)):
        assert there is dev
        assert close(v_VND[3], factor * dev_ND)

    # what is added, to which model; controls: latents of the partition, best separated first
    maximum_D = dev.f_NL[:4, [2, 5]].max(0).values @ written_LD[[2, 5]]
    expected = {
        "ablated in A": ("A", -1, -test_ND),
        "scaled by 2.5 in A": ("A", 1, 1.5 * test_ND),
        "its maximum added to B": ("B", 1, maximum_D.expand(9, 16)),
        "copied from A into B, x 2": ("B", 1, 2 * test_ND)}
    others = [row["feature_idx"] for row in ranking
              if row["feature_idx"] in {*range(10)} - {2, 5}]
    directions = steer.control_directions(run.cc, dev, others, seed=7)
    u_UD = torch.cat([*directions.values()])

    for (_, m, there, v_VND), (name, result) in zip(
            asked[4:], steering["changes"].items(), strict=True):
        model, sign, v_ND = expected[name]
        assert m == model
        assert there is test
        assert close(v_VND[0], v_ND)
        assert close(v_VND[1:], sign * v_ND.norm(dim=1, keepdim=True) * u_UD[:, None])

        # in points of 20 prompts; the margin is over the strongest control
        controls = sum(result["controls"].values(), [])
        clean = {"A": 9, "B": 1}[m]
        changes = [change["pp"] / 5 + clean for change in controls]
        assert changes == approx(HITS[1:])
        assert result["margin"]["pp"] == approx({1: 5 * (15 - 20), -1: 5 * (2 - 15)}[sign])


def test_outcomes_are_means_over_the_answers_to_each_prompt_of_the_model_asked_for(monkeypatch):
    run = ev.Run(dfc.Settings(), None, {"B": "its base"}, None, None, samples=2)
    rows = [ONE, NONE, TWO]
    texts = [row["output"] for row in rows]
    prompts = steer.Prompts(rows, texts, None, None, torch.tensor([True, False, True]))
    v_1ND = torch.randn(1, 3, 4)
    seeds = []

    def generate(model, tokenizer, texts, max_new, layer, v_VND, seed):
        assert model == "its base"
        assert torch.equal(v_VND, v_1ND.repeat(1, len(texts) // 3, 1))
        seeds.append(seed)
        wrong = spell("THINK [ FIVE ]")
        return [[text if hit else wrong for text, hit in zip(texts, [1, 0, 0, 1, 1, 1])]]

    replace_in(steer, monkeypatch, generate)
    for samples, exact, false_calls in ((2, [1, .5], 50), (0, [1, 0], 100)):
        run.samples = samples
        outcome, = steer.outcomes(run, "B", prompts, v_1ND)
        assert outcome[:2] == (exact, false_calls)

    assert seeds == [0, None]  # sampled, greedy


def test_the_strength_is_the_smallest_as_good_as_the_best_by_exact_minus_false_calls(
        monkeypatch):
    found = {  # strength: exact calls of 9, false calls in percent
        .5: (0, 9, 0.),
        1: (8, 9, 5.),
        2: (8, 9, 0.),
        4: (9, 9, 90.),
    }

    def outcomes(run, m, prompts, v_VND):
        return [of_hits(*found[v.item()]) for v in v_VND]

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
    assert run["raw A"] == approx(into_a["no latent"]["change"]["pp"])


def test_a_prompt_of_your_own_is_answered_clean_and_steered_and_shows_where_the_latent_fires(
        run, ranking, monkeypatch, capsys):
    row = {**ONE, "input": "Dialogue: <user> weather? </user>"}
    said = {**ONE, "input": "Dialogue: <user> Weather? Wake me. </user>"}
    prompt = dfc.prompt_of(said, run.tokenizer)

    # the best latent, and one that is active where the clean answer ends
    ids_1T = torch.tensor(dfc.token_ids(run.tokenizer, [prompt + " A"]))
    x = [dfc.residual_stream(model, ids_1T, 2)[0] for model in run.models.values()]
    f_TL = run.cc.encode(torch.stack(x, 1))
    latents = [*steer.choose_latents(run.cc, ranking), f_TL[-1].argmax().item()]
    written_1D = steer.written(run.cc, run.cc.encode(run.vectors([prompt])), latents)

    def load_prompts(*where):
        return [NONE, row, TWO], []  # the second has most words in common

    def generate(model, tokenizer, prompts, max_new, layer, v_VND):
        assert prompts == [prompt]
        m = "AB"[model is run.models["B"]]
        factor = next(i for i in range(9) if close(v_VND[0], i * written_1D))
        return [[f"<think> {m}{factor * ' more'} [cut]"]]

    replace_in(steer, monkeypatch, load_prompts, generate)
    steer.steer_own_words(run, latents, "Weather? Wake me.", [4.])

    out = capsys.readouterr().out
    assert re.findall(r"--- (.*)\n<think> (.*) \[cut\]", out) == [
        ("A, alpha = 1", "A"),
        ("A, alpha = 4", "A more more more"),
        ("B", "B"),
        ("B, twice what the latents write into A added", "B more more")]
    shown = re.findall(r"^ *(\d+) +['\"]", out, re.MULTILINE)
    assert [int(i) - 1 for i in shown] == f_TL[:, latents].T.nonzero()[:, 1].tolist()


@each("n", [20, 0])
def test_a_published_crosscoder_becomes_a_run_with_its_own_settings(
        n, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dfc.PRESETS, "tiny", f"--tool-texts {world.rows} --n-texts 60")
    theirs = publish("theirs/dfc-D8k", n)

    assert call(published, "theirs/dfc-D8k", "--preset=tiny") == 0

    folder = Path("runs/theirs--dfc-D8k")
    run = ev.open_run(folder)
    s, ours = run.settings, run.cc
    assert (s.dict, s.k, s.layer, s.steps, s.l1_excl) == (64, 16, 1, 9, 0)
    assert (ours.n_a, ours.n_b, ours.tied) == (n, n, False)
    assert torch.equal(ours.W_enc, theirs.W_enc)
    assert ours.scale.std(1).all()  # fitted again, for each coordinate
    if n > 0:
        assert call(ev, folder, "--rows=1") == 0
        assert "reconstruction, raw" in (folder / "metrics.json").read_text()


# ---- 11. The toy pair, the README, the pieces ----------------------------------------------------
README = (ROOT / "README.md").read_text()


def test_no_question_is_asked_twice_and_every_gold_answer_is_exact():
    rows = rows_in(TINY / "tools.jsonl")

    assert len({row["input"].lower() for row in rows}) == len(rows)
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
        model = run.models["AB"[name == "base"]]
        said, = ev.generate(model, tokenizer, prompts, 64)

        # the intervals overlap
        exact = ev.tabulate({name: said}, rows)[1][name]["all"]["exact"]
        assert exact["lo"] <= int(high)
        assert int(low) <= exact["hi"]


def test_every_command_of_the_readme_is_understood(monkeypatch, capsys):
    commands = re.findall(r"^python ([\w/]+\.py)([^#\n]*)", README, re.MULTILINE)
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args):
        parse(*args)
        raise ValueError("understood")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    assert commands
    for program, argv in commands:
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(argv)])
        with raises(SystemExit, match="2"):  # of an error, here ours
            runpy.run_path(str(ROOT / program), run_name="__main__")
        assert "understood" in capsys.readouterr().err


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
    call = spell("[ EMPTY ]")
    said = {"prompt": f"{TOOLS} <user> Hi </user>", "ablated in A": "",
            "its maximum added to B": call, "answers": {"B": {"no latent": "what B said"}}}
    lines = [{**said, "gold": gold, "clean A": gold} for gold in (call, spell("RESPONSE"))]
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

    assert 11 == len(re.findall(
        r"(?s)\n## \d+\. .*?Afterwards\s+you\s+can.*?\n(?:python|pytest) .*?<summary>Hint"
        r".*?<summary>Solution", page))
    for program, argv in re.findall(r"(?m)^(?:python|pytest) (\S+)(.*)", page):
        assert (ROOT / program).exists()
        assert "runs/" in argv or "exercises/" in program


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
    """score first_turn parse_calls parse_block parameters_of as_number after_thought Parsed
    responds tool_names""":
        "score(row['output'], row)",
    """generate batches_by_length token_ids answer_prefix hooked end_tokens decode
    cache_argument""":
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


@each("names", PIECES, ids=lambda names: names.split()[0])
def test_each_piece_can_be_copied_alone(names, tokenizer):
    ours = {**vars(dfc), **vars(ev), **vars(steer)}
    copied = {}
    for name, value in ours.items():  # what is of no module is a constant, so ours
        home = getattr(value, "__module__", "dfc")
        if inspect.ismodule(value) or home not in ("dfc", "eval_toolcall", "steer"):
            copied[name] = value
    for name in names.split():
        exec(inspect.getsource(ours[name]), copied)

    copied |= {
        "cc": scaled(),
        "x": torch.randn(80, 2, 16),
        "model": random_model("Qwen2"),
        "tokenizer": tokenizer,
        "row": ONE,
        "prompts": random_prompts()["dev"],
    }
    assert eval(PIECES[names], copied) is not None


# ---- 12. Extras ----------------------------------------------------------------------------------
def test_grid_cells_add_what_they_say_and_are_not_answered_again(stage, tmp_path, monkeypatch):
    run = random_run()
    run.folder = tmp_path
    dev, _, asked = stage
    a_D, b_D = dev.x_NMD[:4].mean(0)
    expected = {
        grid.CLEAN: torch.zeros(9, 16),
        grid.Scaling(4., (3, 1)): 3 * steer.written(run.cc, dev.f_NL, [3, 1]),
        grid.Scaling(.5, ("A - B",)): .5 * (a_D - b_D),
        grid.Scaling(.2, ("diff of means",)): .2 * (a_D - dev.x_NMD[4:, 0].mean(0)),
    }

    there = run, dev, grid.differences_of_means(dev), list(expected)
    counts = grid.answer(*there, at_once=3)

    found_VND = torch.cat([v_VND for *_, v_VND in asked])
    for found_ND, expected_ND in zip(found_VND, expected.values(), strict=True):
        assert close(found_ND, expected_ND)
    assert [sum(counts[scaling].exact) for scaling in expected] == [15, 16, 2, 15]

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
            hits = hits if split == "dev" else 4 - hits
            found[scaling] = of_hits(hits, 4, false_calls)
        return found

    replace_in(grid, monkeypatch, read_prompts, answer)
    run = random_run()
    ranking = steer.rank_latents(run.cc, torch.rand(9, 32), torch.arange(9) < 4)
    lines = grid.list_cells(run.cc, ranking, [1], [4, 8])
    result = grid.measure_grid(run, lines, ["A - B", "diff of means"], 9)

    means = result["groups"]["A - B"][0]
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
    none_D = dev.x_NMD[4:, 0].mean(0)
    needs_ND = dev.x_NMD[:4, 0]
    gap_ND = needs_ND - dev.x_NMD[:4, 1]
    for name, directions_KD, target_ND in (
            ("A - B", gap_ND.mean(0)[None], b_ND),
            ("2 components", torch.linalg.eigh(gap_ND.T @ gap_ND).eigenvectors.T[-2:], b_ND),
            ("diff of means", (needs_ND.mean(0) - none_D)[None], none_D),
            ("u", u_D[None], b_ND),
            ("B's vector", torch.eye(16), b_ND)):
        P_DD = torch.linalg.pinv(directions_KD) @ directions_KD
        assert close(removed[name], (a_ND - target_ND) @ P_DD)
    assert close(removed["u x 0.5"], .5 * (gap_ND @ u_D).mean() * u_D)
    assert not removed["clean"].any()
    assert len(removed) == saturation.N_BASELINES


def test_saturation_removes_what_latents_write_its_part_along_u_and_controls(stage):
    run, reference = random_run(), random_run()
    run.cc.b_enc[:4] = -99  # these latents are silent
    run.cc.b_enc[4:] = 9
    run.cc.W_dec[:10, 0] = torch.eye(16)[:10]  # each writes a coordinate of its own
    dev, test, asked = stage

    scene = saturation.make_scene(run, reference, "test", 9)
    lines = saturation.saturate(run, scene, [3])

    # u: what latents of the reference write on dev prompts that are larger where a tool is needed
    assert (reference.read, run.read) == ("dev", "test")
    more_L = (dev.f_NL[:4].mean(0) - dev.f_NL[4:].mean(0)).relu()[:10]
    u_D = F.normalize(more_L @ reference.cc.W_dec[:10, 0] * reference.cc.scale[0], dim=0)
    assert close(scene.u_D, u_D)

    # all is answered greedily, all but the controls also sampled
    assert [samples for samples, *_ in asked] == [0, 2, 0, 2]
    sampled = {line["name"] for line in lines if "sampled" in line}
    assert sampled == {"latents", "all", "d < 0"}

    # what is removed
    f_NL = run.cc.encode(dev.x_NMD)
    d_L = steer.cohens_d(f_NL[:4], f_NL[4:])[:10]
    best = d_L.argsort(descending=True).tolist()
    written = functools.partial(steer.written, run.cc, run.cc.encode(test.x_NMD))
    every_ND, less_ND, own_ND, along_ND, rest_ND, *controls = -asked[2][3]
    assert close(every_ND, written(best))
    assert close(less_ND, written(d_L.lt(0).nonzero()[:, 0]))
    assert close(own_ND, written(best[:3]))
    assert close(along_ND, (own_ND @ u_D)[:, None] * u_D)
    assert close(rest_ND, own_ND - along_ND)

    # as long, in other directions; the first is random, the last that of live latents
    for control_ND in controls:
        assert close(control_ND.norm(dim=1), own_ND.norm(dim=1))
    directions = steer.control_directions(run.cc, dev, [], seed=7)
    assert close(F.normalize(controls[0]), directions["random"][0])
    drawn = controls[-1].any(0).nonzero()[:, 0].tolist()
    assert len(drawn) == 3
    assert not {*best[:3]} & {*drawn}


def test_the_table_of_saturation_has_controls_beside_latents_and_not_beside_baselines(capsys):
    def line(n, name, hit):
        return {"n": n, "name": name, "greedy": {"exact": [hit, hit], "false_calls": 7}}

    saturation.print_table("", [[line(0, "A - B", 1), line(1, "latents", 0), line(1, "A - B", hit)]
                                for hit in (1, 0)])

    baseline, latents = capsys.readouterr().out.splitlines()[-2:]
    assert baseline.split()[-3:] == ["[100,", "100]", "7"]
    assert latents.split()[-4:] == ["[0,", "0]", "7", "50"]


def test_an_interval_over_dictionaries_and_prompts_is_as_wide_as_either_makes_it():
    for axis, half in ((0, 31), (1, 15)):
        exact_SN = np.indices((10, 40))[axis] % 2
        found = re.findall(r"\d+", saturation.two_way(exact_SN))
        assert list(map(int, found)) == approx([50, 50 - half, 50 + half], abs=4)


def test_the_lesson_runs_from_the_first_cell_to_the_last_also_without_pictures(
        world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(toy, "fit", functools.partial(toy.fit, steps=100))  # speed, as are samples
    cells = json.loads((ROOT / "extras/lesson.ipynb").read_text().replace(
        "runs/lesson-seed{seed}", f"{world.run}"))["cells"]
    here = {}
    blanks = 0

    for cell, below in zip(cells, cells[1:]):  # the last holds no code
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            exec(source.replace("samples=5", "samples=1"), here)
        if source.startswith("# predict"):  # the reader guesses first
            assert cell["outputs"] == []

        # a blank is checked, and its solution passes
        out = capsys.readouterr().out
        if "blank" in cell["metadata"].get("tags", ""):
            assert "it is still empty" in out
            _, check = source.rsplit("\n\n\n", 1)
            solution = re.search(r"```python\n(.*?)```", "".join(below["source"]), re.DOTALL)[1]
            exec(solution + check, {**here})
            assert "is right" in capsys.readouterr().out
            blanks += 1

    assert blanks == 6
    assert here["changes_seen"]


def test_a_check_of_the_lesson_says_what_is_wrong_and_goes_on_without(capsys):
    c = lesson_checks
    wrong = {
        "it changes x_BMD": (c.encode, lambda cc, x: x.zero_()),
        "it divides by 0": (c.cohens_d, lambda p, q: p.mean(0) / p.std(0)),
        "scale_A is missing": (c.written, lambda cc, f, s: f[:, s] @ cc.W_dec[s, 0]),
        "its sign is wrong": (c.as_long, lambda v, d: c.stretch(v, -d)),
        "the two are swapped": (c.split_along, lambda v, u: c.split(v, u)[::-1]),
        "target (6,)": (c.set_to, lambda a, b, d: c.step_to(a, b[:, :], d))}

    for problem, (check, mine) in wrong.items():
        assert check(mine) is not mine
        assert problem in capsys.readouterr().out
