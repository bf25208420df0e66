"""The specification of dfc: what is true of every piece, one sentence a test. pytest runs it in
under 90 s on 2 CPU cores, without a GPU and without a network."""

import ast
import contextlib
import copy
import csv
import dis
import functools
import io
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dfc
import eval_toolcall as ev
import steer
from extras import grid

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tiny"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def few_dev_texts():
    """Runs are measured on 60 dev texts of each kind in place of 300: seconds each."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dfc, "corpus", functools.partial(dfc.corpus, n_dev=60))
        yield


def small(n_a=4, n_b=3, tied=False, k=5, L=32, D=8):
    return dfc.Crosscoder(D, L, k, n_a, n_b, tied)


def fit_small(cc, x, steps=30, **how):
    cc.fit_scale(x)
    cc.fair_start(x)
    return dfc.train(cc, x, steps, batch=64, lr=1e-2, dead_after=2, **how)


# ---------------------------------------------------------------------------------------------
# 1. The crosscoder
# ---------------------------------------------------------------------------------------------


def test_encode_and_decode_match_a_python_loop():
    cc, x = small(), torch.randn(6, 2, 8) * 3 + 1
    cc.fit_scale(x)
    xhat, f = cc(x)
    for b in range(len(x)):
        z = [(x[b, m] - cc.mean[m]) / cc.scale[m] for m in range(2)]
        pre = [max(0., sum(z[m] @ (cc.W_enc[m, :, l] * cc.enc_mask[m, l]) for m in range(2)).item()
                   + cc.b_enc[l].item()) for l in range(32)]
        kept = sorted(range(32), key=lambda l: -pre[l])[:cc.k]
        for l in range(32):
            assert f[b, l].item() == pytest.approx(pre[l] if l in kept else 0., abs=1e-5)
        for m in range(2):
            z_m = sum(pre[l] * cc.W_dec[l, m] * cc.dec_mask[l, m] for l in kept) + cc.b_dec[m]
            assert torch.allclose(xhat[b, m], z_m * cc.scale[m] + cc.mean[m], atol=1e-4)


def test_an_empty_partition_is_the_plain_crosscoder():
    cc = small(n_a=0, n_b=0)
    assert cc.enc_mask.min() == 1 and cc.dec_mask.min() == 1
    assert cc.partitions() == {"a_excl": slice(0, 0), "b_excl": slice(0, 0), "shared": slice(0, 32)}


@pytest.mark.parametrize("tied", [False, True])
def test_exclusive_latents_never_touch_the_other_model(tied):
    cc, x = small(tied=tied), torch.randn(256, 2, 8)
    fit_small(cc, x)
    for cc in (cc, copy.deepcopy(cc)):
        other = x.clone()
        other[:, 1] = torch.randn(256, 8)
        pre, pre_other = (cc.preactivations(cc.normalise(v)) for v in (x, other))
        assert torch.equal(pre[:, :4], pre_other[:, :4])           # A-exclusive do not read B
        f = torch.zeros(1, 32)
        nothing = cc.decode(f)
        for l in range(7):
            f.zero_()[0, l] = 9.
            moved = (cc.decode(f) - nothing).abs().amax((0, 2)) > 0
            assert moved.tolist() == [l < 4, l >= 4]


def test_gradients_reach_the_allowed_side_only():
    cc, x = small(k=32), torch.randn(64, 2, 8)
    cc(x)[0].pow(2).sum().backward()
    enc, dec = cc.W_enc.grad.abs().sum(1), cc.W_dec.grad.abs().sum(2)
    assert ((enc > 0) == cc.enc_mask.bool()).all() and ((dec > 0) == cc.dec_mask.bool()).all()


def test_tied_shared_rows_stay_equal_in_training_and_untied_do_not():
    x = torch.randn(256, 2, 8)
    for tied in (True, False):
        cc = small(tied=tied)
        fit_small(cc, x)
        assert torch.equal(cc.W_dec[7:, 0], cc.W_dec[7:, 1]) is tied


def test_save_and_load_round_trip_raw_units(tmp_path):
    cc, x = small(tied=True), torch.randn(64, 2, 8) * torch.tensor([[3.], [70.]]) + 20
    cc.fit_scale(x)
    dfc.save(cc, tmp_path)
    again = dfc.load(tmp_path)
    assert (again.k, again.n_a, again.n_b, again.tied) == (5, 4, 3, True)
    assert torch.equal(again(x)[0], cc(x)[0])


def test_scale_and_mean_make_every_model_weigh_the_same():
    cc, x = small(), torch.randn(500, 2, 8) * torch.tensor([[.01], [90.]]) + 7
    cc.fit_scale(x)
    z = cc.normalise(x)
    assert torch.allclose(z.mean(0), torch.zeros(2, 8), atol=1e-3)
    assert torch.allclose(z.pow(2).mean((0, 2)), torch.ones(2), atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fair_start_gives_every_partition_the_same_spread(tied):
    cc = dfc.Crosscoder(32, 600, 8, 200, 200, tied)
    x = torch.randn(1000, 1, 32) + .5 * torch.randn(1000, 2, 32)
    cc.fit_scale(x)
    cc.fair_start(x)
    linear = cc.normalise(x).flatten(1) @ (cc.W_enc * cc.enc_mask[:, None]).flatten(0, 1)
    spread = [linear[:, part].std().item() for part in cc.partitions().values()]
    assert max(spread) / min(spread) < 1.01


@pytest.mark.parametrize("sizes", [dict(k=0), dict(k=33), dict(n_a=30), dict(n_a=-1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError):
        small(**sizes)


# ---------------------------------------------------------------------------------------------
# 2. Losses and metrics
# ---------------------------------------------------------------------------------------------


def test_sparse_decode_equals_the_dense_product():
    cc, x = small(tied=True), torch.randn(20, 2, 8)
    f = cc.encode(x)
    top = f.topk(cc.k)
    dense = torch.einsum("bl,lmd->bmd", f, cc.decoder())
    sparse = dfc.sparse_decode(top.values, top.indices, cc.decoder())
    assert torch.allclose(sparse, dense, atol=1e-6)


def test_l1_cannot_be_escaped_by_a_longer_decoder():
    f, norms, weight = torch.rand(7, 5), torch.rand(7, 5), torch.rand(7, 5)
    assert torch.allclose(dfc.l1_loss(f, norms, weight), dfc.l1_loss(f / 10, norms * 10, weight))


def test_the_auxiliary_loss_moves_dead_latents_only_and_not_the_bias():
    cc, x = small(), torch.randn(64, 2, 8)
    pre = cc.preactivations(cc.normalise(x))
    dead = torch.arange(32) % 2 == 0
    dfc.aux_loss(cc, cc.normalise(x), cc.normalise(cc(x)[0]), pre, dead).backward()
    assert cc.b_dec.grad is None or not cc.b_dec.grad.any()
    moved = cc.W_dec.grad.abs().sum((1, 2)) > 0
    assert moved[dead].any() and not moved[~dead].any()
    for part in cc.partitions().values():
        assert moved[part].any()  # no partition is crowded out by another


def test_predicting_the_mean_gives_fve_0_and_the_truth_1():
    x = torch.randn(50, 2, 8) * 100 + 1000
    assert dfc.fve(x, x.double().mean(0).expand_as(x)).tolist() == [0., 0.]
    assert dfc.fve(x, x).tolist() == [1., 1.]


def test_cohens_d_is_the_textbook_value():
    p, q = torch.tensor([[2.], [4.], [6.]]), torch.tensor([[1.], [2.], [3.]])
    assert dfc.cohens_d(p, q).item() == pytest.approx(2 / math.sqrt((4 + 1) / 2))
    assert dfc.cohens_d(p * 0, q * 0).item() == 0


def test_auroc_counts_pairs_and_ties_half():
    p, q = torch.randint(0, 4, (30, 3)).float(), torch.randint(0, 3, (20, 3)).float()
    slow = [np.mean([(a > b) + .5 * (a == b) for a in p[:, l] for b in q[:, l]]) for l in range(3)]
    assert dfc.auroc(p, q).tolist() == pytest.approx(slow)


def test_the_ranking_holds_live_latents_that_prefer_tools_best_first():
    p, q = torch.zeros(20, 4), torch.zeros(20, 4)
    p[:, 1], p[:10, 2], q[:, 3] = torch.rand(20) + 1, 1., 1.
    rows = dfc.rank_latents(p, q)
    assert [r["feature_idx"] for r in rows] == [1, 2] and rows[0]["auroc"] == 1
    assert [r["feature_idx"] for r in dfc.rank_latents(p, q, slice(2, 4))] == [2]


# ---------------------------------------------------------------------------------------------
# 3. Activations
# ---------------------------------------------------------------------------------------------


class Words:
    """A tokenizer with one token per character: enough for collect()."""

    def __call__(self, texts, add_special_tokens=False):
        one = isinstance(texts, str)
        ids = [[ord(c) % 61 + 1 for c in t] for t in ([texts] if one else texts)]
        return {"input_ids": ids[0] if one else ids}


def random_model(family, layers=3):
    import transformers as tr
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    config = getattr(tr, f"{family}Config")(**sizes)
    return tr.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma", "Gemma2"])
def test_collect_equals_hidden_states_of_single_texts_whatever_the_batch(family):
    model = random_model(family)
    texts = ["".join(random.choices("abcdefgh ", k=n)) for n in (3, 17, 1, 9, 17, 5)]
    for size in (1, 40, 8192):
        got = dfc.collect(model, Words(), texts, [0, 1], batch_tokens=size)
        every = dfc.collect(model, Words(), texts, [1], "all", batch_tokens=size)[1].float()
        for i, text in enumerate(texts):
            ids = torch.tensor([Words()(text)["input_ids"]])
            hidden = model(ids, output_hidden_states=True).hidden_states
            for layer in (0, 1):
                assert torch.allclose(got[layer][i].float(), hidden[layer + 1][0, -1], atol=4e-3)
            assert torch.allclose(every[:len(text)], hidden[2][0], atol=4e-3)
            every = every[len(text):]
        assert not len(every)


def test_collect_does_not_depend_on_the_padding_side():
    model, ids = random_model("Qwen2"), torch.tensor([[5, 6, 7]])
    left = torch.tensor([[0, 0, 5, 6, 7]])
    places = torch.tensor([[0, 0, 0, 1, 2]])
    padded = model(left, attention_mask=(left > 0).long(), position_ids=places,
                   output_hidden_states=True).hidden_states[2][0, -1]
    assert torch.allclose(dfc.residuals(model, ids, [1])[1][0, -1], padded, atol=1e-5)


def test_the_pass_stops_after_the_deepest_layer_and_leaves_no_hook():
    model, ran = random_model("Qwen2"), []
    handle = model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    dfc.collect(model, Words(), ["abc"], [0, 1])
    handle.remove()
    assert not ran and not any(b._forward_hooks for b in dfc.blocks(model))


def test_collect_names_what_is_wrong():
    model = random_model("Qwen2")
    with pytest.raises(dfc.Problem, match="layers 0 to 2"):
        dfc.collect(model, Words(), ["abc"], [3])
    with pytest.raises(dfc.Problem, match="text 1 holds no token"):
        dfc.collect(model, Words(), ["abc", ""], [1])
    with pytest.raises(dfc.Problem, match="Linear keeps its blocks"):
        dfc.blocks(torch.nn.Linear(2, 2))
    model.model.embed_tokens.weight.data[ord("z") % 61 + 1] = float("nan")
    with pytest.raises(dfc.Problem, match="text 2 is not finite.*'xyz'"):
        dfc.collect(model, Words(), ["abc", "d", "xyz"], [1])


def test_chunks_end_at_sentence_ends_and_lose_nothing_before_them():
    text = "One two three. Four five six! Seven eight. " * 5
    pieces = dfc.chunks(text, Words(), size=25)
    assert all(p[-1] in ".!" for p in pieces) and text.startswith(" ".join(pieces))
    assert all(25 <= len(p) < 60 for p in pieces)


def test_a_row_may_hold_any_line_separator_but_the_newline(tmp_path):
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    assert dfc.read_rows(str(tmp_path / "rows.jsonl")) == rows
    assert dfc.read_rows(str(tmp_path / "rows.jsonl"), 1) == rows[:1]


def test_a_model_downloaded_before_loads_without_a_network(tmp_path, monkeypatch):
    import huggingface_hub as hub

    def unreachable(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, local_files_only, **_:
                        tmp_path if local_files_only else unreachable())
    assert dfc.resolve("owner/name") == tmp_path


def test_what_the_template_opened_is_not_said_twice():
    class Opening:
        chat_template = "any"

        def apply_chat_template(self, messages, **_):
            return "assistant\n<think>"
    row = {"instruction": "", "input": "", "output": "<think> t </think>\n<response> r </response>"}
    prompt, gold, wanted = dfc.render(row, Opening())
    assert (prompt + gold).count("<think>") == 1 and not wanted


def test_a_split_is_made_once_and_covers_every_row():
    rows = [{"text": str(i)} for i in range(2000)]
    counts = [sum(dfc.split_of(r) == s for r in rows) for s in ("train", "dev", "test")]
    assert sum(counts) == 2000 and counts[1] > 120 and counts[2] > 120
    assert dfc.split_of({"text": "0", "split": "dev"}) == "dev"


def corpus_args(**more):
    base = dict(model_a=str(TINY / "toolrl"), model_b=str(TINY / "base"), layer=1,
                texts=["one", "two words"], positions="last", device="cpu")
    return base | more


def test_activations_are_kept_and_the_key_covers_texts_layer_and_weights(tmp_path):
    a = tmp_path / "a"
    a.mkdir()
    for file in (TINY / "toolrl").iterdir():
        (a / file.name).write_bytes(file.read_bytes())
    args = corpus_args(model_a=str(a), cache=tmp_path / "cache")
    first, loads = dfc.collect_pair(*order(args)), []

    def counted(*name_and_device):
        loads.append(name_and_device)
        return dfc.load_model(*name_and_device)
    assert torch.equal(dfc.collect_pair(*order(args), counted), first) and not loads
    dfc.collect_pair(*order(args | {"layer": 0}), counted)
    dfc.collect_pair(*order(args | {"texts": ["one", "two wordz"]}), counted)
    assert len(loads) == 4
    from safetensors.torch import load_file, save_file
    weights = load_file(a / "model.safetensors")
    save_file({n: w * 1.01 for n, w in weights.items()}, a / "model.safetensors", {"format": "pt"})
    assert not torch.equal(dfc.collect_pair(*order(args), counted), first) and len(loads) == 6


def order(args):
    names = ("model_a", "model_b", "texts", "layer", "positions", "cache", "device")
    return [args[n] for n in names]


def test_a_full_disk_while_caching_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(dfc.Problem, match="No space left"):
        dfc.collect_pair(*order(corpus_args(cache=tmp_path / "cache")))
    assert not any((tmp_path / "cache").iterdir())


# ---------------------------------------------------------------------------------------------
# 4. Training
# ---------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_weights():
    x, made = torch.randn(300, 2, 8), []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(small(tied=True))
        fit_small(made[-1], x, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in made)))


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    x, made = torch.randn(300, 2, 8), []
    for stop in (None, 17):
        torch.manual_seed(3)
        cc = small()
        how = dict(checkpoint=tmp_path / f"{stop}.pt", every=5)
        if stop:
            batch_indices = dfc.batch_indices

            def killed(n, batch, step, seed):
                if step == stop:
                    raise KeyboardInterrupt
                return batch_indices(n, batch, step, seed)
            monkeypatch.setattr(dfc, "batch_indices", killed)
            with pytest.raises(KeyboardInterrupt):
                fit_small(cc, x, **how)
            monkeypatch.undo()
            torch.manual_seed(99)
            cc = small()
        shares = fit_small(cc, x, **how)
        made.append((cc, shares))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m, _ in made)))
    assert made[0][1] == made[1][1]


def test_latents_that_start_too_weak_to_be_picked_are_revived():
    x, live = torch.randn(2000, 2, 16), []
    for aux in (0., 1 / 32):
        torch.manual_seed(1)
        cc = dfc.Crosscoder(16, 128, 4, 16, 16)
        cc.fit_scale(x)
        with torch.no_grad():
            cc.W_enc[:, :, ::2] *= .2
        dfc.train(cc, x, 400, batch=128, lr=3e-3, dead_after=5, aux=aux)
        live.append((cc.encode(x) > 0).any(0)[::2].float().mean().item())
    assert live[1] > live[0] + .3, live


def published(folder, masks, D=8, L=20, n_a=2):
    """A folder in the form of the paper's checkpoints, from random weights."""
    cc = dfc.Crosscoder(D, L, 4, n_a, n_a)
    state = {n: t for n, t in cc.state_dict().items() if n not in ("mean", "scale")}
    if not masks:
        state = {n: t for n, t in state.items() if "mask" not in n}
    folder.mkdir()
    torch.save(state, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps({"activation_dim": D, "dict_size": L, "k": 4}))
    return cc


def test_published_checkpoints_load_with_the_partition_of_their_masks(tmp_path):
    ours, theirs = published(tmp_path / "m", True), dfc.load(tmp_path / "m")
    x = torch.randn(5, 2, 8)
    assert (theirs.n_a, theirs.n_b) == (2, 2) and torch.equal(theirs(x)[0], ours(x)[0])
    published(tmp_path / "plain", False, n_a=0)
    assert dfc.load(tmp_path / "plain").n_a == 0


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_foreign_truncated_and_pickled_checkpoints_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "bomb", True)
    torch.save({"W_enc": Bomb()}, tmp_path / "bomb" / "model.pt")
    dfc.save(small(), tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for name in ("bomb", "cut", "empty"):
        with pytest.raises(dfc.Problem, match="no crosscoder that can be read"):
            dfc.load(str(tmp_path / name))
    assert not (tmp_path / "exploded").exists()


def plain_loss(cc, z, silent, weight, dead_after, aux=1 / 32):
    """The loss of train() by its formulas: dense, masked weights, autograd, no sparse operation."""
    W_dec, pre = cc.decoder(), cc.preactivations(z)
    top = pre.topk(cc.k)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    zhat = torch.einsum("bl,lmd->bmd", f, W_dec) + cc.b_dec
    loss = (z - zhat).pow(2).mean() + (weight * f * W_dec.flatten(1).norm(dim=1)).sum(1).mean()
    silent = (silent + 1) * (f.sum(0) == 0)
    residual, models = (z - zhat).detach(), {"a_excl": [0], "b_excl": [1], "shared": [0, 1]}
    for name, part in cc.partitions().items():
        dead = torch.zeros(len(silent), dtype=torch.bool)
        dead[part] = silent[part] > dead_after
        if dead.any():
            top = (pre * dead).topk(min(int(dead.sum()), 2 * cc.k))
            revived = torch.zeros_like(pre).scatter(1, top.indices, top.values) * dead
            guess = torch.einsum("bl,lmd->bmd", revived, W_dec)
            loss = loss + aux * (residual - guess)[:, models[name]].pow(2).mean()
    return loss, silent


def plain_train(cc, x, steps, batch, lr, l1_shared, l1_excl, dead_after):
    opt, silent = torch.optim.Adam(cc.parameters(), lr=lr), torch.zeros(len(cc.b_enc))
    weight = torch.tensor([l1_excl] * (cc.n_a + cc.n_b)
                          + [l1_shared] * (len(cc.b_enc) - cc.n_a - cc.n_b))
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * dfc.lr_at(step, steps)
        z = cc.normalise(x[dfc.batch_indices(len(x), batch, step, 0)])
        loss, silent = plain_loss(cc, z, silent, weight, dead_after)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.)
        opt.step()


@pytest.mark.parametrize("n_a, n_b, tied", [(0, 0, False), (12, 0, True), (12, 9, False)])
def test_the_sparse_training_step_equals_the_dense_one_by_autograd(n_a, n_b, tied):
    x, made = torch.randn(600, 2, 8) * 2 + 1, []
    how = dict(steps=12, batch=64, lr=1e-3, l1_shared=1e-3, l1_excl=3e-3, dead_after=2)
    for train in (dfc.train, plain_train):
        torch.manual_seed(1)
        cc = small(n_a, n_b, tied, k=3, L=96)
        cc.fit_scale(x)
        with torch.no_grad():
            cc.W_enc[:, :, ::2] *= .2  # so that many are dead
        train(cc, x, **how)
        made.append((cc.W_enc * cc.enc_mask[:, None], cc.decoder(), cc.b_enc, cc.b_dec))
    for fast, slow in zip(*made):
        assert torch.allclose(fast, slow, atol=2e-5), (fast - slow).abs().max()


def test_batches_of_an_epoch_hold_every_vector_once_and_the_next_are_others():
    first, second = (torch.cat([dfc.batch_indices(50, 10, step, 3) for step in steps])
                     for steps in (range(5), range(5, 10)))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)
    assert torch.equal(first[:10], dfc.batch_indices(50, 10, 0, 3))  # also after another epoch


def test_collect_names_the_first_wrong_text_and_its_layer_also_at_all_positions():
    model = random_model("Qwen2")
    model.model.embed_tokens.weight.data[ord("z") % 61 + 1] = float("inf")
    for positions in ("last", "all"):
        with pytest.raises(dfc.Problem, match="layer 0 of text 2 is not finite.*'axz'"):
            dfc.collect(model, Words(), ["abc", "d", "axz", "azzzz"], [0, 1], positions)


# ---------------------------------------------------------------------------------------------
# 5. The main job
# ---------------------------------------------------------------------------------------------

QUICK = ["--n-texts", "240", "--steps", "30", "--dict", "64", "--batch", "64"]


def call(*argv):
    return dfc.cli(dfc.main, [str(a) for a in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    assert call(*QUICK, "--out", out) == 0
    return out


def test_the_main_job_saves_what_the_readme_names(finished):
    m = json.loads((finished / "metrics.json").read_text())
    assert set(m["fve"]) == {"A", "B"} and .2 < m["fve"]["A"] <= 1
    assert set(m["live"]) == set(m["l0"]) == {"a_excl", "b_excl", "shared"}
    assert sum(m["l0"].values()) < 8.001 and sum(m["loss_share"].values()) == pytest.approx(1)
    assert m["config"]["dict"] == 64 and {"torch", "transformers"} <= set(m["versions"])
    for contrasts in (m["ranking"]["a_excl"], m["ranking"]["shared"]):
        assert set(contrasts) == {"needs/none", "tool/plain"}
    assert len(m["ranking"]["shared"]["needs/none"]) == 5
    assert not (finished / "checkpoint.pt").exists() and dfc.load(finished).n_a == 6


def test_a_finished_run_is_not_touched_unless_it_is_the_same(finished, capsys):
    before = (finished / "model.safetensors").read_bytes()
    assert call(*QUICK, "--out", finished) == 2
    assert call(*QUICK, "--out", finished, "--resume") == 0
    assert "is finished" in capsys.readouterr().out
    assert call(*QUICK, "--seed", 5, "--out", finished, "--resume") == 2
    assert "another seed" in capsys.readouterr().err
    assert (finished / "model.safetensors").read_bytes() == before


def test_a_killed_run_resumes_to_the_same_weights(finished, monkeypatch):
    train, out = dfc.train, finished.parent / "killed"  # the activations are there already
    monkeypatch.setattr(dfc, "train", lambda *a, **k: train(*a, **k | {"every": 10}))
    indices = dfc.batch_indices

    def killed(n, batch, step, seed):
        if step == 15:
            raise KeyboardInterrupt
        return indices(n, batch, step, seed)
    monkeypatch.setattr(dfc, "batch_indices", killed)
    assert call(*QUICK, "--out", out, "--resume") == 130
    monkeypatch.setattr(dfc, "batch_indices", indices)
    assert call(*QUICK, "--out", out, "--resume") == 0
    assert (out / "model.safetensors").read_bytes() == \
        (finished / "model.safetensors").read_bytes()


def test_a_run_loads_each_model_once(few_texts, tmp_path, monkeypatch):
    loads, load_model = [], dfc.load_model
    monkeypatch.setattr(dfc, "load_model", lambda *a: loads.append(a) or load_model(*a))
    assert call(*few_texts, "--out", tmp_path / "run") == 0 and len(loads) == len(set(loads)) == 2


def test_an_interruption_while_collecting_ends_with_130_and_the_same_command_goes_on(
        few_texts, tmp_path, monkeypatch, capsys):
    residuals, seen = dfc.residuals, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return residuals(*args)
    monkeypatch.setattr(dfc, "residuals", interrupted)
    flags = [*few_texts, "--out", tmp_path / "run", "--resume"]
    assert call(*flags) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: the same command")
    assert call(*flags) == 0 and (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("flags, n_a, n_b, tied", [
    ([], 51, 0, True), (["--excl", "0"], 0, 0, False), (["--excl", ".5"], 256, 256, True),
    (["--excl", ".05"], 25, 25, True), (["--recipe", "paper"], 51, 51, False),
    (["--excl-b", ".1"], 51, 51, True), (["--recipe", "paper", "--tie-shared"], 51, 51, True)])
def test_what_is_not_asked_for_follows_from_recipe_and_preset(flags, n_a, n_b, tied):
    args = dfc.parse_args(flags)
    sizes = int(args.excl * args.dict), int(args.excl_b * args.dict)
    assert (*sizes, args.tie_shared) == (n_a, n_b, tied)


@pytest.fixture
def few_texts(monkeypatch):
    """For runs of which only the form is looked at."""
    monkeypatch.setattr(dfc, "corpus", functools.partial(dfc.corpus, n_dev=8))
    return [*QUICK, "--n-texts", "40"]


def test_the_recipe_paper_trains(few_texts, tmp_path):
    assert call(*few_texts, "--recipe", "paper", "--out", tmp_path / "p") == 0
    m = json.loads((tmp_path / "p" / "metrics.json").read_text())
    assert m["loss_share"]["aux"] == 0 and m["counts"]["n_b"] == 6


def test_loss_shares_of_a_few_steps_are_numbers():
    x = torch.randn(64, 2, 8)
    for steps in (1, 3, 12):
        assert sum(fit_small(small(), x, steps).values()) == pytest.approx(1)


def test_dev_texts_are_the_same_whatever_recipe_and_seed_and_few_rows_are_used_again():
    rows = dfc.read_rows(TINY / "tools.jsonl"), dfc.read_rows(TINY / "text.jsonl")
    _, tok = dfc.load_model(str(TINY / "base"), "cpu")
    few = [r for r in rows[0] if r["split"] == "dev"] + rows[0][:30]
    a, b = (dfc.corpus(few, rows[1], tok, 200, recipe, seed, n_dev=20)
            for recipe, seed in (("dfc", 0), ("paper", 1)))
    assert a["train"] != b["train"] and all(a[n] == b[n] for n in a if n != "train")
    prompts = [t for t in a["train"] if t.endswith("<|im_start|>assistant\n")]
    assert 100 <= len(prompts) < 110 and len(set(prompts)) <= 30


def test_all_positions_and_two_separate_autoencoders_train(few_texts, tmp_path):
    flags = ["--positions", "all", "--excl", ".5", "--out", tmp_path / "all"]
    assert call(*few_texts, *flags) == 0
    m = json.loads((tmp_path / "all" / "metrics.json").read_text())
    assert m["counts"]["train"] > 10 * 80 and m["counts"]["n_a"] == m["counts"]["n_b"] == 32


def test_the_same_model_twice_is_a_valid_pair(few_texts, tmp_path):
    flags = ["--model-b", TINY / "toolrl", "--out", tmp_path / "null"]
    assert call(*few_texts, *flags) == 0


def write_text(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("flags, says", [
    (["--k", "65"], "larger than the dictionary"), (["--k", "0"], "--k"), (["--k", "x"], "--k"),
    (["--dict", "-5"], "--dict"), (["--excl", ".6"], "--excl"), (["--excl", "-.1"], "--excl"),
    (["--excl", "nan"], "--excl"), (["--excl", "much"], "--excl"), (["--lr", "inf"], "--lr"),
    (["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed"),
    (["--layer", "4"], "layers 0 to 3"), (["--excl", "0", "--tie-shared"], "no room"),
    (["--positions", "some"], "--positions"), (["--what"], "--what"),
    (["--model-a", "no/such/folder"], "no model folder"),
    (["--model-a", "nobody/nothing"], "give its folder"), (["--model-a", "BAD"], "cannot load"),
    (["--model-a", "NEW"], "cannot load"), (["--model-b", "CUT"], "CUT: Error while deserializing"),
    (["--model-a", "MUTE", "--model-b", "MUTE"], "tokenizer makes no token"),
    (["--model-b", "WIDE"], "widths differ"), (["--tool-texts", "EMPTY.txt"], "rows for train"),
    (["--tool-texts", "ONE.txt"], "rows for train"),
    (["--plain-texts", "BINARY.txt"], "not readable UTF-8"),
    (["--plain-texts", "BROKEN.jsonl"], "row 2 is not JSON"),
    (["--plain-texts", "LIST.jsonl"], "row 1 is not"),
    (["--tool-texts", "ODD.jsonl"], "keys"), (["--plain-texts", "nowhere.txt"], "no text file"),
    (["--plain-texts", "NOTEXT.jsonl"], 'must hold a "text"'),
    (["--plain-texts", "nobody/nothing"], "hub"), (["--out", "FILE/run"], "FILE")])
def test_bad_input_is_one_line_and_status_2(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, config in (("BAD", "{}"), ("NEW", '{"model_type": "never heard of"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    if "CUT" in flags or "MUTE" in flags:
        shutil.copytree(TINY / "base", tmp_path / "CUT")
        weights = (TINY / "base" / "model.safetensors").read_bytes()
        (tmp_path / "CUT" / "model.safetensors").write_bytes(weights[:len(weights) // 2])
        shutil.copytree(TINY / "base", tmp_path / "MUTE", ignore=lambda *_: [
            file.name for file in (TINY / "base").glob("tok*")])
    for name, text in {"EMPTY.txt": "", "ONE.txt": "just one line\n", "FILE": "",
                       "BINARY.txt": b"\xff\xfe\x00\x9c" * 50, "LIST.jsonl": "[1]\n",
                       "BROKEN.jsonl": '{"text": "a"}\n{"text": \n',
                       "ODD.jsonl": as_lines(*({"a": i} for i in range(99))),
                       "NOTEXT.jsonl": as_lines(*({"words": i} for i in range(99)))}.items():
        write_text(tmp_path / name, text)
    if "WIDE" in flags:
        random_model("Qwen2", layers=4).save_pretrained(tmp_path / "WIDE")
        for file in (TINY / "base").glob("tok*"):
            (tmp_path / "WIDE" / file.name).write_bytes(file.read_bytes())
    quick = [f for f in QUICK if not ("--steps" in flags and f in ("--steps", "30"))]
    assert call(*quick, "--out", "run", *flags) == 2
    err = capsys.readouterr().err.strip()
    assert says in err.splitlines()[-1] and "Traceback" not in err and "usage" not in err
    assert not (tmp_path / "run" / "metrics.json").exists()


# ---------------------------------------------------------------------------------------------
# 6. Scores (eval_toolcall.py)
# ---------------------------------------------------------------------------------------------

THINK = "<think> t </think>\n"
WEATHER = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'
SHORT = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TIME = '{"name": "get_time", "parameters": {"tz": "CET"}}'
RESPONSE = THINK + "<response> hi </response>"


def block(*calls):
    return "<tool_call>\n" + "\n".join(calls) + "\n</tool_call>"


def record(gold):
    tools = "1. Name: get_weather\n2. Name: get_time\n3. Name: get_weather_alerts"
    return ev.to_record({"instruction": tools, "input": "", "output": gold})


ONE, TWO = record(THINK + block(WEATHER)), record(THINK + block(SHORT, TIME))
NONE = record(RESPONSE)


@pytest.mark.parametrize("output, gold, form, correct, overall, exact", [
    (THINK + block(WEATHER), ONE, 1, 3, 2, 1),
    (THINK + block(WEATHER.replace("3", "5")), ONE, 1, 1.5, 2, 0),
    (THINK + block(WEATHER.replace("3", '"3"')), ONE, 1, 1.5, 2, 0),
    (THINK + block(SHORT), ONE, 1, .75, 2, 0),
    (THINK + block(WEATHER.replace("3}", '3, "x": 1}')), ONE, 1, 2.5, 2, 0),
    (THINK + block('{"name": "get_weather", "parameters": {}}'), ONE, 1, -1.5, 2, 0),
    (THINK + block(TIME), ONE, 1, -3, 2, 0),
    (THINK + block(WEATHER.replace("parameters", "arguments")), ONE, 1, -3, 2, 1),
    (THINK + block(WEATHER.replace("3}", "3,}")), ONE, 1, -3, 2, 0),
    (THINK + block(WEATHER, TIME), ONE, 1, 2.25, 2, 0),
    (THINK + "<tool_call>\n" + WEATHER, ONE, 0, -3, 2, 0),
    (block(WEATHER), ONE, 0, 3, 2, 1),
    (THINK + block(SHORT), TWO, 1, 0, 2, 0),
    (THINK + block(TIME, SHORT), TWO, 1, 3, 2, 1),
    (THINK + block(WEATHER), NONE, 0, 0, 2, 0),
    (RESPONSE, NONE, 1, 0, -1, 1),
    (RESPONSE, ONE, 0, -3, -1, 0)])
def test_the_scorers_golden_table(output, gold, form, correct, overall, exact):
    s = ev.score(output, gold)
    assert (s["toolrl_format"], s["toolrl_correctness"]) == (form, pytest.approx(correct))
    assert (s["paper_overall"], s["exact"]) == (overall, exact)


def test_the_parser_raises_its_one_error_whatever_goes_in():
    rng = random.Random(0)
    pieces = ["<tool_call>", "</tool_call>", "</think>", "\n", WEATHER, "{", "}", '"name"', ":",
              "[" * 3000, "null", "\x00", "é", '{"name": 3}', '"arguments": "{}"', "1e999",
              "9" * 5000]
    for _ in range(3000):
        try:
            calls = ev.parse_calls("".join(rng.choices(pieces, k=rng.randint(0, 12))))
        except ev.CallError:
            continue
        assert all(isinstance(c["name"], str) and isinstance(c["parameters"], dict) for c in calls)


def chat_row(turn, *more, **keys):
    return {"messages": [{"role": "user", "content": "q"}, *more, {"role": "assistant"} | turn],
            "tools": [{"type": "function", "function": {"name": "get_weather"}}]} | keys


def hermes(*calls):
    return "\n".join(block(c.replace("parameters", "arguments")) for c in calls)


SYSTEM = [{"role": "system", "content": "1. Name: get_weather\nDescription: none"},
          {"role": "user", "content": "q"}]
PARIS = {"city": "Paris", "days": 3}
AS_TEXT = {"name": "get_weather", "arguments": json.dumps(PARIS)}


@pytest.mark.parametrize("row", [
    {"instruction": SYSTEM[0]["content"], "input": "q", "output": THINK + block(WEATHER)},
    {"prompt": SYSTEM, "reward_model": {"ground_truth": THINK + block(WEATHER), "style": "rule"}},
    chat_row({"content": None, "tool_calls": [{"type": "function", "function": AS_TEXT}]}),
    chat_row({"tool_calls": [{"name": "get_weather", "arguments": PARIS}]},
             tools='["get_weather"]'),
    chat_row({"content": hermes(WEATHER)}),
    {"prediction": "", "ground_truth": block(WEATHER), "tools": [{"name": "get_weather"}]},
    {"prediction": "", "ground_truth": [AS_TEXT], "tools": ["get_weather"]}])
def test_every_row_format_gives_the_same_record(row):
    got = ev.to_record(row)
    assert got["calls"] == [{"name": "get_weather", "parameters": PARIS}]
    assert got["tools"] == ["get_weather"]
    assert "prediction" in row or got["messages"][-1] == {"role": "user", "content": "q"}
    assert ev.score(THINK + block(WEATHER), got)["toolrl"] == 4
    assert ev.score(THINK + block(WEATHER), ev.to_record(row | {"prediction": ""}))["exact"] == 1


def test_where_no_call_is_wanted_plain_text_answers_only_rows_without_the_tag():
    for row, plain in ((chat_row({"content": "It rains."}), 1),
                       ({"prediction": "", "ground_truth": []}, 1),
                       ({"prediction": "", "ground_truth": RESPONSE}, 0)):
        got = ev.to_record(row)
        assert got["calls"] == [] and ev.score("Yes.", got)["exact"] == plain
        assert ev.score(RESPONSE, got)["exact"] == 1
        for empty in ("", THINK, THINK + "<response> </response>", "<think> It could be said that"):
            assert ev.score(empty, got)["exact"] == 0


def test_hermes_has_one_block_a_call_and_a_block_left_open_is_marked():
    calls = ev.parse_calls(hermes(SHORT, TIME))
    assert calls == ev.parse_calls(block(SHORT, TIME)) and len(calls) == 2
    assert ev.parse_calls(hermes(json.dumps(json.loads(SHORT), indent=1))) == calls[:1]
    cut = ev.parse_calls(hermes(SHORT, TIME).removesuffix("</tool_call>"))
    assert cut == [calls[0], calls[1] | {"unclosed": True}]
    gold = ev.to_record({"prediction": "", "ground_truth": "<tool_call>" + SHORT})
    assert gold["calls"] == calls[:1]  # a gold is what it means


def test_a_well_formed_call_beside_a_broken_one_is_called_and_never_exact():
    with pytest.raises(ev.CallError) as e:
        ev.parse_calls(block(SHORT, TIME[:-2]))
    assert [c["name"] for c in e.value.calls] == ["get_weather"]
    s = ev.score(THINK + block(SHORT, TIME[:-2]), NONE)
    assert (s["called"], s["false_call"], s["name"], s["exact"]) == (1, 1, 0, 0)


def test_toolrl_is_its_published_code_where_the_formula_leaves_a_choice():
    gold = [{"name": "a", "parameters": {"x": 1}}, {"name": "a", "parameters": {}}]
    empty = '{"name": "a", "parameters": {}}'
    assert ev.toolrl_correctness(block(empty), gold) == -.75  # the first gold call uses nothing up
    for parameters in ("[]", '""', '[["x", 1]]', "null"):
        assert ev.toolrl_correctness(block(empty.replace("{}", parameters)), gold) == -3
    assert ev.toolrl_format(RESPONSE + "\n", RESPONSE) == 1   # it strips the output
    assert ev.toolrl_format("So: " + RESPONSE, RESPONSE) == 0


def test_equality_is_that_of_json():
    for a, b, same in ((3, 3., 1), (3, "3", 0), (1, True, 0), ([1], [1], 1), ({"a": []}, {}, 0),
                       (math.nan, math.nan, 0)):
        calls = [[{"name": "f", "parameters": {"x": x}}] for x in (a, b)]
        assert ev.same_calls(*calls) == same
    assert not ev.same_calls(calls[0][:1] * 2, calls[0])
    deep = json.dumps({"name": "f", "parameters": {"x": 0}}).replace("0", "[" * 400 + "]" * 400)
    with pytest.raises(ev.CallError):
        ev.parse_calls(block(deep))


def test_wilson_is_the_textbook_interval():
    for hits, n, low, high in ((8, 10, 49.02, 94.33), (0, 10, 0, 27.75), (10, 10, 72.25, 100),
                               (1, 2, 9.45, 90.55)):
        share = ev.wilson(hits, n)
        assert [share["lo"], share["hi"]] == pytest.approx([low, high], abs=.01)
        assert 0 <= share["lo"] <= share["pct"] == 100 * hits / n <= share["hi"] <= 100


def test_totals_keep_rows_that_need_a_tool_apart_from_those_that_want_none():
    records = [ONE, TWO, NONE, NONE]
    outputs = [THINK + block(WEATHER), THINK + block(SHORT), RESPONSE, THINK + block(TIME)]
    t = ev.totals([ev.score(o, r) for o, r in zip(outputs, records)], records)
    assert {g: (v["n"], v["exact"]["pct"], v["called"]["pct"]) for g, v in t.items()} == \
        {"all": (4, 50, 75), "needs": (2, 50, 100), "none": (2, 50, 50)}
    assert t["needs"]["toolrl"] == {"mean": (4 + 1) / 2, "n": 2}
    assert t["all"]["exact"] | {"lo": 0, "hi": 0} == \
        {"pct": 50, "hits": 2, "n": 4, "lo": 0, "hi": 0}
    assert set(ev.totals([ev.score("", ONE)], [ONE])) == {"all", "needs"} and not ev.totals([], [])
    bare = NONE | {"tools": []}
    t = ev.totals([ev.score(RESPONSE, bare)], [bare])
    assert "paper_tool" not in t["all"] and t["all"]["exact"]["n"] == 1


def test_chance_lines_score_answers_that_never_read_the_question():
    first = record(THINK + block('{"name": "get_weather", "parameters": {}}'))
    lines = ev.chance([first, ONE, NONE, NONE | {"tools": []}])
    hits = {name: t["all"]["exact"]["hits"] for name, t in lines.items()}
    assert hits["first tool, {}"] == hits["a response"] == 1
    assert all(t["all"]["n"] == 3 for t in lines.values())     # the row without tools is left out
    assert lines["first tool, {}"]["all"]["paper_tool"]["pct"] == 100
    assert lines["a response"]["all"]["toolrl"]["mean"] == (-3 - 3 + 1) / 3
    many = [ONE] * 300
    named = ev.chance(many)["random tool, {}"]["all"]["name"]["hits"]
    assert 70 < named < 130 and ev.chance(many) == ev.chance(many)
    assert ev.chance([NONE | {"tools": []}]) == {}


SCORED = {"ground_truth": THINK + block(WEATHER), "tools": ["get_weather", "get_time"]}
SCORED = [SCORED | {"prediction": THINK + block(WEATHER)}, SCORED | {"prediction": "\u2028 no"}]


def as_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def scorer(*argv):
    try:
        return ev.run(ev.main, [str(a) for a in argv])
    except SystemExit as e:
        return e.code


def test_score_reads_a_file_or_standard_input(tmp_path, monkeypatch, capsys):
    file = write_text(tmp_path / "o.jsonl", as_lines(*SCORED) + "\r\n")
    assert scorer("--score", file) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "exact 1/2 (50.0%, 95% 9.5-90.5)"
    assert sum(line.startswith("chance:") for line in out.splitlines()) == 3
    assert max(map(len, out.splitlines())) <= 100
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert scorer("--score", "-") == 0 and capsys.readouterr().out == out
    rows = [{"instruction": "", "input": "", "output": RESPONSE, "prediction": RESPONSE}]
    assert scorer("--score", write_text(tmp_path / "t.jsonl", as_lines(*rows))) == 0
    out = capsys.readouterr().out
    assert "chance" not in out and out.endswith("exact 1/1 (100.0%, 95% 20.7-100.0)\n")


def test_a_gold_that_does_not_parse_is_listed_and_left_out(tmp_path, capsys):
    bad = SCORED[0] | {"ground_truth": block(WEATHER[:-1])}
    bare = SCORED[0] | {"ground_truth": WEATHER}   # not "no call wanted"
    file = write_text(tmp_path / "o.jsonl", as_lines(SCORED[0], bad, SCORED[1], bare))
    assert scorer("--score", file) == 0
    out = capsys.readouterr().out
    assert "2 of 4, row 2, 4" in out and out.splitlines()[-1].startswith("exact 1/2 ")


BAD_ROWS = {
    "": "no row", "\n \n": "no row", as_lines(SCORED[0]) + '{"a": \n': "row 2 is not JSON",
    as_lines(SCORED[0]).encode() + b"\xff\xfe\n": "row 2 is not UTF-8",
    as_lines(SCORED[0]) + "\n" + as_lines(chat_row({"content": "x"}, prediction="")): "row 3: chat",
    as_lines({"what": 1}): "row 1: unknown row format with the keys ['what']",
    "[1]\n": "row 1: a row", "[" * 9999: "row 1 is not JSON",
    as_lines(chat_row({"content": "x"})): "row 1: prediction must be str, got NoneType",
    as_lines(SCORED[0] | {"ground_truth": "<tool_call>"}): "no row to score: the gold of row 1",
    as_lines(SCORED[0] | {"ground_truth": 3}): "ground_truth must be str | list, got int",
    as_lines(SCORED[0] | {"tools": 3}): "tools", as_lines(SCORED[0] | {"tools": {}}): "tools",
    as_lines(SCORED[0] | {"tools": "{"}): "tools", as_lines(SCORED[0] | {"tools": [{}]}): "tools",
    as_lines({"prompt": "q", "reward_model": {}, "prediction": ""}): "prompt must be list, got str",
    as_lines({"prompt": ["q"], "reward_model": {}, "prediction": ""}): "prompt[] must be dict",
    as_lines({"prompt": [], "reward_model": None, "prediction": ""}): "reward_model must be dict",
    as_lines({"prompt": [], "reward_model": {}, "prediction": ""}): "reward_model.ground_truth",
    as_lines({"messages": ["q"], "prediction": ""}): "messages[] must be dict, got str",
    as_lines({"messages": [{"role": 1}], "prediction": ""}): "messages[].role must be str",
    as_lines({"messages": [], "prediction": ""}): "assistant",
    as_lines(chat_row({"tool_calls": {}, "content": []}, prediction="")): "messages[].content",
    as_lines({"instruction": 1, "input": "", "output": "", "prediction": ""}): "instruction must"}


@pytest.mark.parametrize("text, says", BAD_ROWS.items(), ids=range(len(BAD_ROWS)))
def test_rows_that_cannot_be_scored_are_one_line_and_status_2(text, says, tmp_path, capsys):
    assert scorer("--score", write_text(tmp_path / "rows.jsonl", text)) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("argv, says", [
    (["--what"], "--what"), (["--score"], "--score"), (["--rows", "0"], "--rows must be 1"),
    (["--max-new", "0"], "--max-new"), (["--show", "-1"], "--show"), (["--rows", "x"], "--rows"),
    (["--prompt", "none"], "--prompt"), (["--preset", "none"], "--preset"),
    (["--score", "no.jsonl"], "no.jsonl"), (["--score", str(TINY)], "directory"),
    (["--score", "x", "--what"], "--what")])
def test_a_wrong_command_is_one_line_and_status_2(argv, says, capsys):
    assert scorer(*argv) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and len(err.splitlines()) == 1


def test_an_interrupted_scorer_ends_with_130():
    def interrupted(_):
        raise KeyboardInterrupt
    assert ev.run(interrupted) == 130


def test_whatever_a_row_holds_it_is_a_record_or_one_of_two_errors():
    rng = random.Random(0)
    junk = [None, 3, "", "x", [], {}, [3], ["x"], {"name": 1}, [{"role": "system"}], block(SHORT),
            [{"role": "assistant", "tool_calls": [3]}], [{"function": "x"}], {"ground_truth": ""}]
    keys = ["instruction", "input", "output", "prompt", "reward_model", "messages", "tools",
            "prediction", "ground_truth"]
    for _ in range(5000):
        row = {k: rng.choice(junk) for k in rng.sample(keys, rng.randint(0, len(keys)))}
        try:
            ev.score("", ev.to_record(row))
        except (ev.RowError, ev.CallError):
            pass


def test_importing_the_scorer_and_dfc_is_light():
    code = "import sys, {}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    for module, heavy in (("eval_toolcall", "[]"), ("dfc", "['torch']")):
        done = subprocess.run([sys.executable, "-c", code.format(module)], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.stdout.strip() == heavy, done.stderr


# ---------------------------------------------------------------------------------------------
# 7. Answers, patches and reconstructions (eval_toolcall.py)
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    models = {m: dfc.load_model(str(TINY / n), "cpu") for m, n in (("A", "toolrl"), ("B", "base"))}
    tok = models["A"][1]
    kept = ev.read_split(dfc.PRESETS["tiny"], tok, most=9)
    return {m: model for m, (model, _) in models.items()}, tok, [prompt for *_, prompt in kept]


def one_by_one(model, tok, prompts, max_new, layer=0, vectors=None, add=False):
    """The slow, obvious way: no batch, no padding, no cache made in advance, a plain hook."""
    texts = []
    for i, prompt in enumerate(prompts):
        def hook(_, __, out):
            if vectors is not None and out.shape[1] > 1:  # the prompt's pass
                out[:, -1] = vectors[i] + add * out[:, -1]
        handle = dfc.blocks(model)[layer].register_forward_hook(hook)
        batch = tok(prompt, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**batch, max_new_tokens=max_new)[0, batch["input_ids"].shape[1]:]
        texts.append(tok.decode(ids, skip_special_tokens=True))
        handle.remove()
    return texts


def test_batched_generation_equals_one_prompt_at_a_time(pair):
    models, tok, prompts = pair
    clean = one_by_one(models["A"], tok, prompts, 16)
    x = ev.pair_vectors(models, tok, prompts, [2])[2]
    vectors = torch.stack([x[:, 1], 9 * torch.randn(len(x), 128), x[:, 0] * 0])
    slow = [one_by_one(models["A"], tok, prompts, 16, 2, v) for v in vectors]
    assert clean != slow[1] != slow[2] != clean
    for share, at_once in ((True, 1500), (False, 10 ** 6)):  # two versions at a time; all three
        batches = ev.prefill(models["A"], tok, prompts, batch_tokens=700, share=share)
        assert 1 < len(batches) < len(prompts) and any((b[2] == 0).any() for b in batches)
        assert ev.generate(models["A"], tok, batches, 16) == [clean]
        assert ev.generate(models["A"], tok, batches, 16, 2, vectors, at_once=at_once) == slow
    added = ev.generate(models["A"], tok, batches, 16, 2, (vectors - x[:, 0]), add=True)
    assert added[1] == slow[1]
    with pytest.raises(ValueError, match="share=False"):
        ev.generate(models["A"], tok, ev.prefill(models["A"], tok, prompts), 16, 2, vectors,
                    positions="all")


def test_patching_in_a_models_own_activation_changes_no_answer(pair):
    models, tok, prompts = pair
    for layer, x in ev.pair_vectors(models, tok, prompts, [0, 3]).items():
        for m, (name, model) in enumerate(models.items()):
            batches = ev.prefill(model, tok, prompts)
            own = ev.generate(model, tok, batches, 48, layer, x[None, :, m])
            assert own == ev.generate(model, tok, batches, 48), (layer, name)


class TwoOutputs(torch.nn.Module):
    def forward(self, h):
        return h + 1, "cache"


def test_a_patch_replaces_the_last_token_of_one_block_in_the_first_pass_only():
    model, ids, seen = random_model("Qwen2"), torch.tensor([[5, 6, 7], [8, 9, 3]]), []
    clean = [dfc.residuals(model, ids, [layer])[layer] for layer in range(3)]
    v = torch.randn(2, 16)
    with ev.patch(model, 1, ev.edit_with(v)):
        for _ in range(2):
            seen.append(dfc.residuals(model, ids, [0, 1, 2]))
    first, second = seen
    assert torch.equal(first[1][:, -1], v) and torch.equal(first[1][:, :-1], clean[1][:, :-1])
    assert torch.equal(first[0], clean[0]) and torch.equal(first[2][:, :-1], clean[2][:, :-1])
    assert not torch.allclose(first[2][:, -1], clean[2][:, -1])
    assert all(torch.equal(second[layer], clean[layer]) for layer in range(3))
    with ev.patch(model, 1, ev.edit_with(v, add=True), positions="all"):
        for _ in range(2):
            every = dfc.residuals(model, ids, [1])[1]
            assert torch.allclose(every, clean[1] + v[:, None])
    with ev.patch(model, 1, ev.edit_with(v), positions="all"):
        assert torch.equal(dfc.residuals(model, ids, [1])[1], v[:, None].expand(-1, 3, -1))
    blocks = torch.nn.ModuleList([TwoOutputs()])
    with ev.patch(SimpleNamespace(model=SimpleNamespace(layers=blocks)), 0, lambda h: h * 0 + 7):
        h, rest = blocks[0](torch.zeros(1, 3, 1))
    assert h.flatten().tolist() == [1, 1, 7] and rest == "cache"


def test_the_patch_is_gone_after_an_exception():
    model = random_model("Qwen2")
    for positions in ("last", "all"):
        with pytest.raises(ZeroDivisionError), ev.patch(model, 1, lambda h: 1 / 0, positions):
            model(torch.tensor([[1, 2]]))
    assert not any(b._forward_hooks for b in dfc.blocks(model))


def test_answers_end_where_the_template_or_the_model_says_and_are_greedy_whatever_it_asks(pair):
    models, tok, prompts = pair
    model = copy.deepcopy(models["A"])
    ids = [tok.get_vocab()[t] for t in ("<|endoftext|>", "<|im_end|>")]
    assert ev.end_tokens(model, tok) == sorted(ids)
    clean = ev.generate(model, tok, ev.prefill(model, tok, prompts))[0]
    assert all(len(tok(text)["input_ids"]) < 60 for text in clean)
    for name, value in dict(eos_token_id=None, do_sample=True, temperature=9., top_k=3, top_p=.5,
                            repetition_penalty=3., num_beams=2).items():
        setattr(model.generation_config, name, value)
    assert ev.generate(model, tok, ev.prefill(model, tok, prompts))[0] == clean
    model.generation_config.eos_token_id = 7
    assert 7 in ev.end_tokens(model, tok)
    bare = copy.deepcopy(tok)
    bare.pad_token = None                                    # nothing hangs on a pad token
    assert ev.generate(model, bare, ev.prefill(model, bare, prompts))[0] == clean
    bare.eos_token = model.generation_config.eos_token_id = None
    bare.get_vocab = dict
    assert ev.end_tokens(model, bare) == []
    text, = ev.generate(model, bare, ev.prefill(model, bare, prompts[:1]), 60)[0]
    assert text.startswith(clean[0])                         # to the last of its 60 tokens


def test_reconstructions_are_what_the_decoder_says():
    cc, x = small(), torch.randn(20, 2, 8) * 3 + 1
    cc.fit_scale(x)
    cc.b_dec.data.normal_()
    versions, xhat = ev.reconstructions(cc, x), cc(x)[0]
    for m, model in enumerate("AB"):
        v = versions[model]
        assert torch.equal(v["own activation"], x[:, m])
        assert torch.equal(v["reconstruction"], xhat[:, m])
        nothing = cc.b_dec[m] * cc.scale[m] + cc.mean[m]
        assert torch.allclose(v["b_dec alone"], nothing.expand(20, 8))
        parts = v[f"{model}-exclusive alone"] + v["shared alone"] - nothing
        assert torch.allclose(parts, xhat[:, m], atol=1e-4)
        noise = [v[f"noise, seed {seed}"] - x[:, m] for seed in range(3)]
        error = (xhat - x)[:, m].norm(dim=1)
        assert all(torch.allclose(n.norm(dim=1), error, rtol=1e-3) for n in noise)
        assert not torch.allclose(noise[0], noise[1], atol=.1)
    a_mean, a_other = x.clone(), x.clone()
    a_mean[:, 0], a_other[1:, 0], a_other[0, 0] = x[:, 0].mean(0), x[:-1, 0], x[-1, 0]
    assert torch.allclose(versions["B"]["recon., A mean"], cc(a_mean)[0][:, 1], atol=1e-4)
    assert torch.equal(versions["B"]["recon., A another's"], cc(a_other)[0][:, 1])
    names = {model: set(v) for model, v in versions.items()}
    assert names["B"] - names["A"] == {"recon., A mean", "recon., A another's", "B-exclusive alone"}
    assert names["A"] - names["B"] == {"A-exclusive alone"}
    assert "B-exclusive alone" not in ev.reconstructions(small(n_b=0), x)["B"]


def test_the_published_way_leaves_the_scale_out_and_the_crosscoder_as_it_was():
    cc, x = small(), torch.randn(20, 2, 8) * 5 + 3
    cc.fit_scale(x)
    before, published = copy.deepcopy(cc.state_dict()), small()
    published.load_state_dict(cc.state_dict() | {"mean": cc.mean * 0, "scale": cc.scale * 0 + 1})
    versions = ev.reconstructions(cc, x, raw=True)
    for m, model in enumerate("AB"):
        assert torch.equal(versions[model]["reconstruction, raw"], published(x)[0][:, m])
        assert not torch.allclose(versions[model]["reconstruction, raw"], cc(x)[0][:, m], atol=.1)
    assert all(torch.equal(t, before[name]) for name, t in cc.state_dict().items())


def test_a_paired_difference_is_a_mean_with_its_bootstrap_interval():
    assert ev.paired([1, 1, 1, 0], [0, 1, 0, 0])["pp"] == 50
    assert ev.paired([1, 1, 1], [0, 0, 0]) == {"pp": 100, "lo": 100, "hi": 100, "n": 3}
    assert ev.paired([], []) is None
    rng = random.Random(0)
    after, before = ([rng.random() < p for _ in range(60)] for p in (.7, .4))
    drawn = []
    for _ in range(4000):
        some = rng.choices(range(60), k=60)
        drawn.append(100 * sum(after[i] - before[i] for i in some) / 60)
    got = ev.paired(after, before)
    assert [got["lo"], got["hi"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=2.5)


def test_a_summary_compares_each_version_with_the_clean_one_on_rows_that_need_a_tool():
    right, other = THINK + block(WEATHER), THINK + block(TIME)
    outputs = {"A": {"clean": [right, "", RESPONSE], "patched": [other, "", other]}}
    bare = ONE | {"tools": []}
    scores, result = ev.summary(outputs, [ONE, bare, NONE])
    assert [row["exact"] for row in scores["A"]["clean"]] == [1, 0, 1]
    assert result["A"]["clean"]["delta"]["exact"]["pp"] == 0
    patched = result["A"]["patched"]
    assert patched["delta"]["exact"] == ev.paired([0, 0], [1, 0])      # the third wants no call
    assert patched["delta"]["paper_tool"]["n"] == 1                    # the second lists no tools
    assert patched["totals"]["none"]["false_call"]["hits"] == 1


LONG = {"messages": [{"role": "system", "content": "Tools: none."},
                     {"role": "user", "content": "one two three four five six"},
                     {"role": "assistant", "content": None}, {"role": "tool"},
                     {"role": "user", "content": "seven eight \N{PILE OF POO} nine ten"}]}


def test_a_prompt_is_the_templates_or_the_system_text_and_loses_the_dialogues_beginning(pair):
    _, tok, _ = pair
    whole, cut = ev.prompt_of(LONG, tok)
    assert cut == 0 and whole.endswith("<|im_start|>assistant\n") and "ten<|im_end|>" in whole
    short = {"messages": LONG["messages"][:2]}
    assert ev.prompt_of(short, tok)[0] == tok.apply_chat_template(
        short["messages"], tokenize=False, add_generation_prompt=True)
    assert ev.prompt_of(LONG, tok, "paper") == ("Tools: none.", 0)

    def length(text):
        return len(tok(text)["input_ids"])
    lost = 0
    for limit in range(length(whole), 0, -1):
        try:
            prompt, cut = ev.prompt_of(LONG, tok, "chat", limit)
        except ev.TooLong as e:
            assert f"more than {limit} tokens" in str(e) and "ten" not in prompt
            break
        assert length(prompt) <= limit and "Tools: none." in prompt and lost <= cut
        assert cut == length(whole) - limit or "\N{PILE OF POO}" not in prompt
        assert "ix" in prompt or "two" not in prompt
        lost = cut
    assert limit > length("Tools: none.") and LONG["messages"][1]["content"].startswith("one")
    for limit in (0, -5):
        with pytest.raises(ev.TooLong):
            ev.prompt_of(LONG, tok, limit=limit)


def test_prompts_that_were_cut_are_counted(pair, capsys):
    _, tok, prompts = pair
    lengths = [len(tok(prompt)["input_ids"]) for prompt in prompts]
    limit, many = max(lengths) - 1, lengths.count(max(lengths))
    kept = ev.read_split(dfc.PRESETS["tiny"], tok, most=9, limit=limit)
    assert sum(a != b for (*_, a), b in zip(kept, prompts, strict=True)) == many
    assert capsys.readouterr().out.startswith(
        f"{many} prompts longer than {limit} tokens: {many} tokens cut")


def test_a_prompt_that_cannot_be_made_is_said(pair):
    tok = copy.deepcopy(pair[1])
    with pytest.raises(ev.RowError, match="without messages"):
        ev.prompt_of({"messages": None}, tok)
    with pytest.raises(ev.RowError, match="empty"):
        ev.prompt_of({"messages": [{"role": "user", "content": "q"}]}, tok, "paper")
    tok.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ev.RowError, match="no system role here"):
        ev.prompt_of(LONG, tok)
    tok.chat_template = None
    with pytest.raises(ev.RowError, match="--prompt paper"):
        ev.prompt_of(LONG, tok)
    assert ev.prompt_of(LONG, tok, "paper")[0] == "Tools: none."


def test_listed_tools_go_through_the_chat_template_or_are_missed(pair):
    tok, row = copy.deepcopy(pair[1]), chat_row({"content": hermes(WEATHER)})
    with pytest.raises(ev.RowError, match="tools are not in the prompt"):
        ev.prompt_of(ev.to_record(row), tok)                   # this template shows none
    tok.chat_template = "{{ tools | tojson }} {{ messages[-1].content }}"
    for tools in (row["tools"], json.dumps(row["tools"]), [{"name": "get_weather"}]):
        assert "get_weather" in ev.prompt_of(ev.to_record(row | {"tools": tools}), tok)[0]
    with pytest.raises(ev.RowError, match="tools are not in the prompt"):
        ev.prompt_of(ev.to_record(row | {"tools": ["get_weather"]}), tok)  # names are no tools


def test_only_a_thought_that_the_template_opens_belongs_to_the_answer():
    for prompt, said in (("x\nassistant\n", ""), ("assistant\n<think>", "<think>"), ("[/INST]", ""),
                         ("assistant\n<think>\n", "<think>"), ("Think first, then call.", "")):
        assert ev.opened(prompt) == said


# ---------------------------------------------------------------------------------------------
# 8. Evaluating runs (eval_toolcall.py)
# ---------------------------------------------------------------------------------------------


def copy_run(finished, folder, **settings):
    """A copy of a finished run, other settings in its run.json."""
    shutil.copytree(finished, folder)
    settings = json.loads((finished / "run.json").read_text()) | settings
    write_text(folder / "run.json", json.dumps(settings))
    return folder


def read_eval(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics["evaluation"], [row for _, row in ev.read_jsonl(folder / "eval.jsonl")]


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("eval") / "runs" / "run", io.StringIO()
    copy_run(finished, folder)
    with contextlib.redirect_stdout(out):
        assert scorer(folder, "--rows", 12) == 0
    return folder, out.getvalue()


def test_an_evaluation_keeps_every_row_and_its_totals(evaluated):
    folder, out = evaluated
    result, rows = read_eval(folder)
    assert "fve" in json.loads((folder / "metrics.json").read_text())  # of the training
    assert len(rows) == 12 and result["how"]["layer"] == 3
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") for row in rows)
    for model, versions in result["models"].items():
        for name, v in versions.items():
            texts = [row["outputs"][model][name] for row in rows]
            for row, t in zip(rows, texts):
                gold = ev.to_record({"prediction": "", "ground_truth": row["gold"]})
                assert ev.score(t["output"], gold)["exact"] == t["exact"]
            assert v["totals"]["all"]["exact"]["hits"] == sum(t["exact"] for t in texts)
    a, b = result["models"]["A"], result["models"]["B"]
    assert a["clean"]["totals"]["needs"]["exact"]["pct"] >= 50 > 10 > \
        b["clean"]["totals"]["needs"]["exact"]["pct"]
    for versions in (a, b):
        assert versions["own activation"]["delta"]["exact"]["lo"] == 0 == \
            versions["own activation"]["delta"]["exact"]["hi"]
    hits = a["reconstruction"]["totals"]["all"]["exact"]["hits"]
    assert out.splitlines()[-1].startswith(f"exact {hits}/12 (")
    assert max(map(len, out.splitlines())) <= 100
    for line in ("into A", "into B", "recon., A mean", "first tool", "+31.1"):
        assert out.count("\n" + line) == 1 or line == "+31.1" and line in out


def test_what_is_evaluated_is_shown_and_not_done_again(evaluated, monkeypatch, capsys):
    folder, out = evaluated
    monkeypatch.setattr(dfc, "load_model", None)
    assert scorer(folder, "--rows", 12) == 0
    assert capsys.readouterr().out == out
    assert scorer(folder, "--rows", 12, "--show", 2) == 0
    shown = capsys.readouterr().out
    assert shown.count("\ngold: ") == 2 == shown.count("\nA, clean: ")
    monkeypatch.chdir(folder.parent.parent)
    assert scorer("--rows", 12) == 0  # no name: the newest
    assert capsys.readouterr().out == out.replace(str(folder), "runs/run")


def test_the_papers_prompt_has_no_question_so_nothing_exact_is_printed(finished, tmp_path, capsys):
    folder = copy_run(finished, tmp_path / "run")
    assert scorer(folder, "--prompt", "paper", "--rows", 3, "--max-new", 6) == 0
    result, rows = read_eval(folder)
    out = capsys.readouterr().out.splitlines()
    assert all("<|im_start|>" not in row["prompt"] for row in rows)
    for row in rows:
        assert not any(v["output"].startswith(row["prompt"].splitlines()[-1])
                       for v in row["outputs"]["A"].values())
    assert out[-1].startswith("called ") and not any(line.startswith("exact") for line in out)
    lines = [line.split() for line in out if line.startswith(("clean", "reconstruction"))]
    assert len(lines) == 4 and all(line[1] == "-" for line in lines)


def test_many_runs_share_models_and_clean_answers(finished, tmp_path, monkeypatch):
    one = copy_run(finished, tmp_path / "one")
    two = copy_run(finished, tmp_path / "two", recipe="paper", layer=1)
    loads, clean, load_model, generate = [], [], dfc.load_model, ev.generate

    def counted(*args):
        clean.append(args) if len(args) == 4 else None
        return generate(*args)
    monkeypatch.setattr(dfc, "load_model", lambda *a: loads.append(a) or load_model(*a))
    monkeypatch.setattr(ev, "generate", counted)
    assert scorer(one, two, "--rows", 3, "--max-new", 6) == 0
    assert len(loads) == len(clean) == 2
    (first, _), (second, _) = read_eval(one), read_eval(two)
    assert (first["how"]["layer"], second["how"]["layer"]) == (3, 1)
    assert "reconstruction, raw" in second["models"]["B"]
    assert "reconstruction, raw" not in first["models"]["B"]


def test_a_crosscoder_alone_is_evaluated_with_a_presets_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for owner in ("first", "second"):  # the name is the same, the weights are not
        (tmp_path / owner).mkdir()
        published(tmp_path / owner / "dfc-D8k", True, D=128, L=64)
        write_text(tmp_path / owner / "dfc-D8k" / "hparams.json", '{"layer": 2}')
    made = []
    for owner in ("first", "first", "second"):
        assert scorer("--crosscoder", f"{owner}/dfc-D8k", "--preset", "tiny", "--rows", 3,
                      "--max-new", 6) == 0
        made.append(read_eval(tmp_path / "runs" / f"{owner}--dfc-D8k")[0])
    assert made[0] == made[1] != made[2] and made[0]["how"]["layer"] == 2


def test_an_evaluation_is_current_only_for_the_same_models_texts_and_crosscoder():
    cc, settings = small(), {"model_a": "a", "model_b": "b", "tool_texts": "t", "layer": 1, "k": 0}
    before = ev.identity((cc, settings, None))
    assert ev.identity((copy.deepcopy(cc), settings | {"k": 5}, None)) == before
    for name in ("model_a", "model_b", "tool_texts", "layer"):
        assert ev.identity((cc, settings | {name: "other"}, None)) != before
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "mean", "scale"):
        other = copy.deepcopy(cc)
        other.state_dict()[name].add_(1)
        assert ev.identity((other, settings, None)) != before
    other.load_state_dict(cc.state_dict())
    other.k -= 1
    assert ev.identity((other, settings, None)) != before


@pytest.fixture(scope="module")
def bad(finished, tmp_path_factory):
    """Run folders and texts of every kind that cannot be evaluated, by name."""
    home = tmp_path_factory.mktemp("bad")
    row = dfc.read_rows(TINY / "tools.jsonl", 1)[0] | {"split": "test"}
    texts = {"EMPTY": "", "BROKEN": as_lines(row) + '{"a": \n', "BINARY": b"\xff\xfe\x00\n",
             "GOLD": as_lines(row | {"output": "<tool_call>"}), "ODD": as_lines({"split": "test"}),
             "TWO": as_lines(row, chat_row({"content": "x"}, split="test")),
             "TRAIN": as_lines(row | {"split": "train"})}
    for name, text in texts.items():
        write_text(home / f"{name}.jsonl", text)
        copy_run(finished, home / name, tool_texts=str(home / f"{name}.jsonl"))
    (home / "plain").mkdir()
    for file in (TINY / "toolrl").iterdir():
        if file.suffix != ".jinja":
            (home / "plain" / file.name).symlink_to(file)
    for name, settings in {"LAYER": {"layer": 9}, "PLAIN": {"model_a": str(home / "plain")},
                           "RUN": {}, "HALF": {}, "WIDE": {}, "RUNJSON": {}, "METRICS": {},
                           "OLD": {"layer": None}}.items():
        copy_run(finished, home / name, **settings)
    (home / "HALF" / "metrics.json").unlink()
    dfc.save(small(), home / "WIDE")
    dfc.save(small(), home / "ALONE")
    write_text(home / "RUNJSON" / "run.json", "{")
    write_text(home / "METRICS" / "metrics.json", b"[\xff")
    return home


def files(home):
    """What the files of a folder hold, but for ranking.csv, which every call of steer.py writes."""
    return {f: f.read_bytes() for f in sorted(home.rglob("*"))
            if f.is_file() and f.name != "ranking.csv"}


@pytest.mark.parametrize("argv, says", [
    ([], "no finished run"), (["nothing"], "nothing is no run"), (["runs/nothing"], "is no run"),
    (["HALF"], "half a run"), (["WIDE"], "is 8 wide"), (["LAYER"], "layers 0 to 3"),
    (["RUN", "PLAIN"], "different models"), (["--crosscoder", "ALONE"], "--preset"),
    (["--crosscoder", "no/ne", "--preset", "tiny"], "no/ne"),
    (["--crosscoder", "ALONE", "--preset", "tiny"], "is 8 wide"),
    (["PLAIN"], "no chat template"), (["EMPTY"], "no test row"), (["TRAIN"], "no test row"),
    (["BROKEN"], "row 2 is not JSON"), (["BINARY"], "row 1 is not UTF-8"),
    (["GOLD"], "can be scored"), (["ODD"], "row 1: unknown row format"), (["TWO"], "row 2: chat"),
    (["RUNJSON"], "run.json is damaged"), (["OLD"], "layer must be int, got NoneType"),
    (["METRICS"], "metrics.json is damaged"),
    (["RUN", "--max-new", "512"], "leaves no room"), (["RUN", "--max-new", "500"], "can be scored"),
    (["RUN", "--preset", "tiny"], "--preset is for --crosscoder")])
def test_what_cannot_be_evaluated_is_one_line_and_status_2(argv, says, bad, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = files(bad)
    assert scorer(*argv) == 2
    err = re.sub(r"collect:.*\r", "", capsys.readouterr().err).strip()
    assert says in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert files(bad) == before


def test_a_full_disk_or_an_interruption_leaves_what_was_there(bad, monkeypatch, capsys):
    before = files(bad)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def interrupted(*_):
        raise KeyboardInterrupt
    for where, name, wrong, status in ((Path, "write_text", full, 2),
                                       (ev, "generate", interrupted, 130)):
        with monkeypatch.context() as m:
            m.setattr(where, name, wrong)
            assert scorer(bad / "RUN", "--rows", 2, "--max-new", 2) == status
        err = capsys.readouterr().err
        assert "Traceback" not in err and ("No space left" in err or status == 130)
        assert files(bad) == before


# ---------------------------------------------------------------------------------------------
# 9. Steering (steer.py)
# ---------------------------------------------------------------------------------------------


def test_steering_arrives_at_the_last_prompt_token_or_everywhere_and_alpha_one_is_the_identity():
    model, ids = random_model("Qwen2"), torch.tensor([[5, 6, 7], [8, 9, 3]])
    delta, clean, logits = torch.randn(2, 16), dfc.residuals(model, ids, [1])[1], model(ids).logits
    for positions, where in (("last", [0, 0, 1]), ("all", [1, 1, 1])):
        with steer.steering(model, 1, 0 * delta, positions):
            assert torch.equal(model(ids).logits, logits)
        with steer.steering(model, 1, delta, positions):
            first, second = (dfc.residuals(model, ids, [1])[1] for _ in range(2))
        moved = clean + delta[:, None] * torch.tensor(where)[:, None]
        assert torch.allclose(first, moved) and not torch.allclose(first, clean)
        assert torch.allclose(second, moved if positions == "all" else clean)
        with pytest.raises(ZeroDivisionError), steer.steering(model, 1, delta, positions):
            1 / 0
    assert not any(b._forward_hooks for b in dfc.blocks(model))
    two = torch.nn.ModuleList([TwoOutputs()])
    with steer.steering(SimpleNamespace(model=SimpleNamespace(layers=two)), 0, delta[:1]):
        h, rest = two[0](torch.zeros(1, 2, 16))
    assert torch.equal(h, torch.stack([delta[:1] * 0 + 1, delta[:1] + 1], 1)) and rest == "cache"


def scaled(*sizes, D=16):
    """A crosscoder whose raw units are not its own."""
    cc = dfc.Crosscoder(D, 32, *sizes)
    cc.fit_scale(torch.randn(100, 2, D) * torch.tensor([[3.], [.5]]) + 2)
    return cc


def test_what_latents_write_is_a_loop_over_them_in_raw_units():
    cc, x = scaled(5, 4, 3), torch.randn(6, 2, 16) * 3
    f = cc.encode(x).detach()
    for latents in ([0], [3, 5, 20]):
        for m in range(2):
            slow = sum(f[:, l, None] * cc.decoder()[l, m] * cc.scale[m] for l in latents)
            assert torch.allclose(steer.written(cc, f, latents, m), slow, atol=1e-5)
    assert not steer.written(cc, f, [0], 1).any() and not steer.written(cc, f, [5], 0).any()


def test_an_exclusive_latent_is_taken_away_at_every_token_as_its_decoder_wrote_it():
    cc, model, ids = scaled(32, 4, 3), random_model("Qwen2"), torch.randint(1, 64, (2, 5))
    clean = dfc.residuals(model, ids, [1])[1].detach()
    unit = F.normalize(torch.randn(16), dim=0)
    for m, latents in ((0, [0, 2]), (1, [5])):
        h = clean.flatten(0, 1)
        f = cc.encode(torch.stack([h, h], 1)).detach()      # k = L: nothing falls out of the top k
        wrote = steer.written(cc, f, latents, m).view_as(clean)
        assert wrote.any()
        for along, gone in ((None, wrote), (unit, wrote.norm(dim=-1, keepdim=True) * unit)):
            with ev.patch(model, 1, steer.taken_away(cc, latents, m, along), "all"):
                assert torch.allclose(dfc.residuals(model, ids, [1])[1], clean - gone, atol=1e-5)


def test_a_projected_out_direction_is_in_no_blocks_output():
    model, ids, directions = random_model("Qwen2"), torch.randint(1, 64, (2, 5)), torch.randn(2, 16)
    clean = dfc.residuals(model, ids, [0, 1, 2])
    with steer.projected_out(model, directions):
        for layer, h in dfc.residuals(model, ids, [0, 1, 2]).items():
            before, after = ((v @ directions.T).abs().max() for v in (clean[layer], h))
            assert after < 1e-6 < 1e-3 < before
    assert not any(b._forward_hooks for b in dfc.blocks(model))


def planted():
    """Latents of a crosscoder: 0 in A only; 1 in A, its direction in B's error; 2 and 3 shared."""
    cc, f = dfc.Crosscoder(8, 6, 6, 2, 1).requires_grad_(False), torch.rand(500, 6)
    f[:, 5] = 0                                              # dead
    cc.W_dec.zero_()
    for latent, m, place in ((0, 0, 0), (1, 0, 1), (2, 1, 5), (3, 0, 3), (3, 1, 3), (4, 0, 4),
                             (4, 1, 3)):
        cc.W_dec[latent, m, place] = 1
    x = cc.decode(f)
    x[:, 1, 1] += f[:, 1]
    return cc, x, f


def test_latent_scaling_tells_a_feature_of_a_alone_from_one_that_b_has_too():
    cc, x, f = planted()
    error, recon = steer.exclusivity(cc, x, f)
    assert error[0].abs() < 1e-5 and recon[0].abs() < 1e-5
    assert error[1].item() == pytest.approx(1) and recon[1].abs() < 1e-5   # the mask hides it
    assert error[3].item() == pytest.approx(1) and recon[3] > .9
    assert error[2].abs() < 1e-5 and recon[2].abs() < 1e-5                 # in B only
    assert error[5] == recon[5] == math.inf                                # dead


def test_a_mirror_is_a_twin_elsewhere_and_never_the_latent_itself():
    cc, _, _ = planted()
    cc.W_dec[2, 1] = cc.W_dec[0, 0]
    excl, shared = steer.mirrors(cc)
    assert excl.tolist() == [1, 0, 1, 0, 0, 0]                 # 0 in A and 2 in B are each other's
    assert shared[3] == 1 and shared[0] == 0                   # 3's twin is 4's B direction
    cc.W_dec[4, 1] = 0
    assert steer.mirrors(cc)[1][3] == 0
    cc.W_dec[5, 0] = cc.W_dec[2, 1]
    assert steer.mirrors(cc)[1].tolist() == [0, 0, 1, 0, 0, 0]  # a B-exclusive latent's is in A
    assert not steer.mirrors(dfc.Crosscoder(8, 6, 6, 2, 0))[0].any()


def test_cohens_dz_is_the_textbook_value():
    assert grid.cohens_dz([1, 2, 3]) == pytest.approx(2)
    assert math.isnan(grid.cohens_dz([1, 1])) and math.isnan(grid.cohens_dz([4]))


@pytest.mark.parametrize("differences, p", [
    (range(1, 10), 2 / 2 ** 9), ([5], 1), ([2, 2, 1], 2 / 8), ([3, 1], 2 / 4), ([1, 1, -1], 1),
    ([0, 1], 1), ([4, 3, 2, -1], 4 / 16), ([-4, -3, -2, -1], 2 / 16), ([1, -1], 1)])
def test_a_sign_flip_p_is_counted_by_hand(differences, p):
    assert grid.sign_flip(list(differences)) == p


def test_many_values_are_flipped_by_chance_close_to_the_exact_p():
    x = np.random.default_rng(1).normal(.25, 1, 18)
    every = np.zeros(1)
    for v in x:
        every = np.concatenate([every + v, every - v])
    exact = (abs(every) >= abs(x.sum()) - 1e-9).mean()
    assert .01 < exact < .5 and grid.sign_flip(x) == pytest.approx(exact, abs=.006)
    assert 0 < grid.sign_flip([1.] * 40) < 1e-3


@pytest.mark.parametrize("lo, hi, hoped, changes, verdict", [
    (10, 20, 1, (5, 3, 8, 9), "beyond every control"), (10, 20, 1, (12, 3, 8, 9), "no"),
    (10, 20, 1, (5, 12, 8, 9), "no"), (10, 20, 1, (5, 3, 15, 9), "beyond random"),
    (10, 20, 1, (5, 3, 8, 10), "beyond random"), (-1, 20, 1, (-5, -3, -8, -9), "no"),
    (0, 20, 1, (-5, -3, -8, -9), "no"), (10, 20, -1, (0, 0, 0, 0), "no"),
    (-20, -10, -1, (-5, 3, 0, 9), "beyond every control"), (-20, -10, -1, (-5, -12, 0, 0), "no"),
    (-20, -10, -1, (-5, 3, -15, 0), "beyond random")])
def test_a_verdict_needs_the_whole_interval_beyond_each_control(lo, hi, hoped, changes, verdict):
    names = ("random", "latents", "A - B", "needs - none")
    controls = {n: [0, change] if hoped > 0 else [change] for n, change in zip(names, changes)}
    assert steer.judge({"lo": lo, "hi": hi, "n": 20}, controls, hoped) == verdict
    assert steer.judge({"lo": lo, "hi": hi, "n": 19}, controls, hoped) == "too few rows"
    only = {"lo": 1, "hi": 2, "n": 99}, {"random": [0]}, 1
    assert steer.judge(*only) == "beyond random"


def test_a_latent_that_b_has_is_taken_from_b_and_its_direction_added_to_a():
    cc, f = scaled(5, 4, 3), torch.rand(6, 32)
    s, p = SimpleNamespace(cc=cc), SimpleNamespace(f=f, prompts=range(6))
    c = {"mean": torch.ones(1)}
    for latent, own, other, down in ((5, "B", "A", 1), (1, "A", "B", -1), (20, "A", "B", -1)):
        W = steer.raw_decoder(cc)[latent, "AB".index(own)]
        f_ND = f[:, latent, None] * W
        for clamp, title, change in ((None, "alpha = 3", 2 * f_ND), (7., "clamp 7", 7 * W - f_ND)):
            up = steer.own_deltas(s, p, [latent], [3.], clamp)
            claims = steer.claims_of(s, p, [latent], up, c)
            assert [claim[0] for claim in claims] == [
                f"{own} without it", f"{own}, {title}", f"{other} + its mean"]
            for (_, *got), expected in zip(claims, (
                    (own, -f_ND, -1, down), (own, change, 1, -down),
                    (other, W.expand(6, -1), 1, -down))):
                assert (got[0], *got[2:]) == (expected[0], *expected[2:])
                assert torch.allclose(got[1], expected[1], atol=1e-5)


def test_controls_have_each_prompts_length_and_come_from_the_same_partition():
    cc, delta = scaled(32, 6, 3), torch.randn(5, 16) * torch.arange(5)[:, None]
    sets = {n: torch.randn(20, 2, 16) * 3 for n in ("needs", "none", "tool", "plain")}
    s = SimpleNamespace(cc=cc, sets=sets, device="cpu")
    for latents in ([1], [7], [20]):
        units, drawn = steer.directions(s, latents, n=4)
        assert [len(u) for u in units.values()] == [4, len(drawn), 1, 2] and drawn
        for u in units.values():
            lengths = steer.same_length(delta, u).norm(dim=2)
            assert torch.allclose(lengths, delta.norm(dim=1).expand_as(lengths), atol=1e-4)
        assert latents[0] not in drawn
        assert steer.part_of(cc, drawn) == steer.part_of(cc, latents)
        W = steer.raw_decoder(cc)[drawn, steer.home_of(cc, latents)]
        assert torch.allclose(units["latents"] * W.norm(dim=1, keepdim=True), W, atol=1e-5)
        mean = F.normalize(sets["needs"].mean(0) - sets["none"].mean(0))
        assert torch.allclose(units["needs - none"], mean, atol=1e-5)


def test_each_claim_is_steered_beside_its_controls_with_their_signs(monkeypatch):
    of_A, of_B = torch.diag(torch.tensor([-1., 1, 0, 0]))[:2]
    units = {"random": torch.eye(4)[:2], "latents": torch.eye(4)[2:3],
             "A - B": torch.eye(4)[3:], "needs - none": torch.stack([of_A, of_B])}
    monkeypatch.setattr(steer, "directions", lambda *_: (units, [5]))
    monkeypatch.setattr(steer, "outputs_of", lambda s, p, m, deltas: list(deltas))
    monkeypatch.setattr(steer, "exacts", lambda delta, p: (delta.sum(1) > 0).tolist())
    monkeypatch.setattr(steer, "same_length", lambda delta, u: u[:, None].expand(-1, 30, -1))
    clean = dict.fromkeys("AB", -torch.ones(30, 4))
    for m, sign, hoped, expected in (
            ("A", -1, -1, {"random": [100, 100], "latents": [0], "A - B": [0],
                           "needs - none": [100]}),
            ("B", 1, 1, {"random": [100, 100], "latents": [100], "A - B": [100],
                         "needs - none": [100]})):
        row, = steer.against_controls(None, None, [("t", m, torch.ones(30, 4), sign, hoped)], [1],
                                      clean)
        assert row["controls"] == expected and row["effect"]["pp"] == 100 and row["drawn"] == [5]


def test_strengths_are_those_with_most_exact_calls_or_fewest_for_what_b_lacks(monkeypatch):
    s = SimpleNamespace(cc=scaled(32, 6, 3))
    monkeypatch.setattr(steer, "rows_of", lambda *_, **__: None)
    monkeypatch.setattr(steer, "place", lambda *_: SimpleNamespace(f=torch.rand(5, 32)))
    monkeypatch.setattr(steer, "outputs_of", lambda s, p, m, deltas: range(len(deltas)))
    monkeypatch.setattr(steer, "exacts", lambda v, p: [[3, 7, 1, 5][v]])
    top = torch.ones(1)
    assert steer.strengths(s, [1], [0, 2, 4, 8], top, 5) == [4, 2]     # most of 3 7 1; of 3 7 1 5
    assert steer.strengths(s, [7], [0, 2, 4, 8], top, 5) == [8, 4]     # fewest
    assert steer.strengths(s, [1], [0, 1], top, 5) == [None, 2]


def test_a_set_of_latents_is_projected_out_beside_as_many_random_directions(monkeypatch):
    cc, seen = scaled(32, 6, 3), []
    s = SimpleNamespace(cc=cc, layer=1, models={"A": random_model("Qwen2")})
    monkeypatch.setattr(steer, "projected_out",
                        lambda _, u: seen.append(u) or contextlib.nullcontext())
    monkeypatch.setattr(steer, "outputs_in", lambda s, p, m, context: context() and [""] * 30)
    monkeypatch.setattr(steer, "exacts", lambda texts, p: [0] * 30)
    rows = steer.everywhere(s, None, [0, 2], {"A": [""] * 30})
    assert [row["verdict"] for row in rows] == ["no", "no"] and len(seen) == 11
    assert torch.equal(seen[0], steer.raw_decoder(cc)[[0, 2], 0])
    assert all(u.shape == (2, 16) for u in seen[1:]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("n_a, n_b, n", [(51, 0, 512), (819, 819, 8192), (100, 7, 16384)])
def test_the_nulls_command_trains_a_null_of_the_same_sizes(n_a, n_b, n):
    s = SimpleNamespace(cc=SimpleNamespace(n_a=n_a, n_b=n_b, k=8, b_enc=range(n)), layer=2,
                        folder=Path("runs/this"), settings={"model_a": "a/b", "preset": "paper"})
    args = dfc.parse_args(steer.null_command(s).split()[2:])
    assert (int(args.excl * args.dict), int(args.excl_b * args.dict)) == (n_a, n_b)
    assert args.model_a == args.model_b == "a/b" and args.preset == "paper" and args.layer == 2


def program(*argv):
    return dfc.cli(steer.main, [str(a) for a in argv])


FEW = ["--rows", 1, "--max-new", 4, "--alpha", 0, 4]


@pytest.fixture(scope="module")
def trained(finished):
    """A run good enough to hold the latent; its activations are those of `finished`."""
    out = finished.parent / "trained"
    assert call(*QUICK[:2], "--steps", 400, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def scene(trained, tmp_path_factory):
    """The trained run ready to steer, with some dev and test rows of each kind."""
    s, = steer.stage(steer.parse_args([str(trained), "--max-new", "12"]))
    kinds, rows = Counter(), []
    for row in dfc.read_rows(s.settings["tool_texts"]):
        kinds[row["split"], row["kind"]] += 1
        rows += [row] * (kinds[row["split"], row["kind"]] <= (40 if row["kind"] == "ask" else 5))
    few = write_text(tmp_path_factory.mktemp("few") / "tools.jsonl", as_lines(*rows))
    s.settings = s.settings | {"tool_texts": str(few)}
    return s


@pytest.fixture
def few_controls(monkeypatch):
    """Two random directions in place of ten."""
    units = steer.random_units
    monkeypatch.setattr(steer, "random_units", lambda n, *like: units(2, *like))


def test_the_table_of_one_latent_is_printed_and_kept(trained, capsys):
    assert program(trained, *FEW) == 0
    out = capsys.readouterr().out
    for begins in ("alpha = 0", "alpha = 4", "+ its mean", "+ its maximum", "+ mean difference",
                   "A without it", "A, alpha = 4", "B + its mean", "A without it, every token",
                   "A, projected out", "plain text", "question", "null: no such run", "verdict"):
        assert ("\n" + begins) in out
    result = json.loads((trained / "metrics.json").read_text())
    assert "fve" in result and len(re.findall("^verdict", out, re.M)) == 1
    result, = result["steering"]["results"]
    assert all(len(c["controls"]["random"]) == 10 for c in result["claims"])
    assert len(result["claims"]) >= 6 and len(result["plain_text"]["random"]) == 10
    kept = [r for _, r in ev.read_jsonl(trained / f"steer-{result['latents'][0]}.jsonl")]
    assert len({r["kind"] for r in kept}) == len(kept) > 3
    assert set(kept[0]["outputs"]["A"]) == {"clean", "alpha = 0", "alpha = 4"}


def test_the_null_is_a_run_of_the_same_sizes_whose_models_are_the_same_twice(
        trained, scene, tmp_path, monkeypatch):
    s = SimpleNamespace(**vars(scene) | {"folder": tmp_path / "this"})
    copy_run(trained, s.folder)
    copy_run(trained, tmp_path / "broken")
    write_text(tmp_path / "broken" / "run.json", "{")
    folder, command = steer.null_run(s)
    assert folder is None and "tiny/toolrl --dict 512 --k 8 --layer 3 " in command
    copy_run(trained, tmp_path / "null", model_b=s.settings["model_a"])
    monkeypatch.setattr(steer, "dev_sets", lambda *_: s.sets)
    assert steer.null_run(s) == (str(tmp_path / "null"), sum(map(steer.specific, s.ranked)))
    config = json.loads((tmp_path / "null" / "config.json").read_text())
    write_text(tmp_path / "null" / "config.json", json.dumps(config | {"n_b": 3}))
    assert steer.null_run(s)[0] is None
    write_text(tmp_path / "null" / "config.json", json.dumps(config))
    s.layer = 2
    assert steer.null_run(s)[0] is None


def test_a_latent_passes_only_by_every_criterion():
    row = {"contrast": "needs/none", "partition": "a_excl", "auroc": .95, "nu_error": .1,
           "nu_recon": .4}
    assert steer.specific(row)
    for other in ({"contrast": "tool/plain"}, {"partition": "shared"}, {"auroc": .89},
                  {"nu_error": .2}, {"nu_recon": math.inf}):
        assert not steer.specific(row | other)


def test_the_ranking_has_the_authors_columns_and_the_latent_comes_from_dev_rows(trained, scene):
    assert program(trained, *FEW, "--prompt", "Hello there", "--clamp", 1) == 0
    lines = list(csv.DictReader(open(trained / "ranking.csv")))
    assert list(lines[0])[:10] == ["rank", "feature_idx", "cohens_d", "auroc", "fire_rate_tool",
                                   "fire_rate_nontool", "diff", "mean_tool", "mean_nontool", "sign"]
    assert {r["contrast"] for r in lines} == {"needs/none", "tool/plain"}
    dev = json.loads((trained / "metrics.json").read_text())["ranking"]["a_excl"]["needs/none"]
    ours = [r for r in lines if r["partition"] == "a_excl" and r["contrast"] == "needs/none"]
    assert [int(r["feature_idx"]) for r in ours][:len(dev)] == [r["feature_idx"] for r in dev]
    assert steer.chosen(scene) == dev[0]["feature_idx"]
    assert float(ours[0]["auroc"]) == pytest.approx(dev[0]["auroc"], abs=1e-6)


@pytest.mark.parametrize("flags, verdicts, names", [
    ([], 2, ["A-exclusive", "shared", "B-exclusive", "A-exclusive + shared"]),
    (["--excl", "0"], 1, ["all"])])
def test_runs_with_a_b_exclusive_part_and_plain_crosscoders_are_steered_too(
        flags, verdicts, names, finished, few_controls, monkeypatch, capsys):
    out = finished.parent / f"other{verdicts}"
    flags = flags or ["--excl", ".2", "--excl-b", ".2"]
    assert call(*QUICK, *flags, "--out", out) == program(out, *FEW[:-1], 3) == 0
    metrics, printed = json.loads((out / "metrics.json").read_text()), capsys.readouterr().out
    assert len(metrics["steering"]["results"]) == verdicts == printed.count("\nverdict")
    titles = [{c["claim"] for c in r["claims"]} for r in metrics["steering"]["results"]]
    assert "A without it" in titles[0] and (verdicts == 1 or "B without it" in titles[1])
    monkeypatch.setattr(grid, "SIZES", (1, 2))
    assert program(out, *FEW, "--grid") == 0
    groups = json.loads((out / "metrics.json").read_text())["grid"]["groups"]
    assert set(groups) <= set(names) and len(groups) >= len(names) - 1


def test_your_own_latents_and_prompt_give_both_texts(trained, scene, capsys):
    latents = [r["feature_idx"] for r in scene.ranked][:2]
    asked = ["--prompt", "Set an alarm", "--max-new", 4, "--latents", *latents]
    for more, names in ((["--positions", "all"], ["alpha = 0", "alpha = 64"]),
                        (["--alpha", 9], ["alpha = 9"]), (["--clamp", -3], ["clamp -3"])):
        assert program(trained, *asked, *more) == 0
        out = capsys.readouterr().out
        assert "\ntools: " in "\n" + out and out.count("--- A, clean\n") == 1
        assert all(out.count(f"--- A, {name}\n") == 1 for name in names)
    p = steer.own_prompt(scene, "Set an alarm")
    assert "<user> Set an alarm </user>" in p.prompts[0] and p.records[0]["calls"] == []
    assert "set_alarm" in p.records[0]["tools"]        # the tools that share most words with it


def test_every_version_of_the_table_is_steered_at_all_positions_when_asked(scene):
    s = SimpleNamespace(**vars(scene) | {"positions": "all"})
    p, model = steer.place(s, steer.rows_of(s, "test", 1)), s.models["A"]
    delta = 3 * torch.randn(2, len(p.prompts), 128)
    for texts, v in zip(steer.outputs_of(s, p, "A", delta), delta):
        for i, prompt in enumerate(p.prompts):
            with ev.patch(model, s.layer, lambda h: h + v[i], "all"):
                assert texts[i] == one_by_one(model, s.tokenizer, [prompt], 12)[0]


def test_the_monitor_marks_the_tokens_where_the_latent_survives(trained, scene, capsys):
    latent = steer.chosen(scene)
    assert program(trained, "--monitor", "Set an alarm for 7", "--max-new", 6) == 0
    bars = re.findall(r"^ *('.*?'|\".*?\") +(\d+\.\d\d) ([ *])([ |]) (#*)$",
                      capsys.readouterr().out, re.M)
    p = steer.own_prompt(scene, "Set an alarm for 7")
    n = len(scene.tokenizer(p.prompts[0])["input_ids"])
    assert len(bars) > n and [b[3] for b in bars].index("|") == n - 1
    x = [dfc.collect(m, scene.tokenizer, p.prompts, [3], "all")[3] for m in scene.models.values()]
    f = scene.cc.encode(torch.stack(x, 1).float())[:, latent]
    assert [b[2] == "*" for b in bars[:n]] == (f > 0).tolist() and (f > 0).any()
    assert all(float(b[1]) == pytest.approx(v, abs=.02) for b, v in zip(bars, f.tolist()) if v)
    values = [float(b[1]) for b in bars]
    assert all(abs(len(b[4]) - 40 * v / max(values)) <= .6 for b, v in zip(bars, values))


def grid_at(scene, folder):
    """A small grid of the trained run, four cells at once."""
    args = steer.parse_args(["--grid", "--rows", "1", "--alpha", "0", "1", "40"])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(grid, "SIZES", (1, 2))
        return grid.grid(SimpleNamespace(**vars(scene) | {"folder": folder}), args, 4)


@pytest.fixture(scope="module")
def whole(scene, tmp_path_factory):
    return grid_at(scene, tmp_path_factory.mktemp("grid"))


def test_a_killed_grid_does_again_only_what_is_missing(whole, scene, tmp_path, monkeypatch):
    append, generate, made = grid.append_lines, steer.generate, []

    def killed(file, rows):
        if file.exists():
            raise KeyboardInterrupt
        append(file, rows)
    monkeypatch.setattr(grid, "append_lines", killed)
    with pytest.raises(KeyboardInterrupt):
        grid_at(scene, tmp_path)
    monkeypatch.setattr(grid, "append_lines", append)
    file = tmp_path / "grid.jsonl"
    text = file.read_text()
    assert text.count("\n") == 4
    file.write_text(text[:-40])                      # the last of four lines is cut short

    def counted(*args, **how):
        made.extend(args[5])
        return generate(*args, **how)
    monkeypatch.setattr(steer, "generate", counted)
    assert grid_at(scene, tmp_path) == whole and len(made) == len(whole) - 3
    assert grid_at(scene, tmp_path) == whole and len(made) == len(whole) - 3
    assert len(whole) == 2 * len({grid.key_of(c)[1:] for c in whole}) and len(whole) >= 14


def test_every_cell_of_a_grid_is_what_steering_one_prompt_at_a_time_gives(whole, scene):
    cells = [c for c in whole if c["split"] == "test"]
    p, clean = steer.place(scene, steer.rows_of(scene, "test", 1, needs=True)), cells[0]["outputs"]
    assert [len(c["latents"]) for c in cells] == [c["size"] for c in cells]
    for cell in cells:
        delta = (cell["alpha"] - 1) * steer.written(scene.cc, p.f, cell["latents"], 0)
        slow = one_by_one(scene.models["A"], scene.tokenizer, p.prompts, 12, 3, delta, add=True)
        assert cell["outputs"] == slow
        assert cell["exact"] == [ev.score(t, r)["exact"] for t, r in zip(slow, p.records)]
    assert any(c["outputs"] != clean for c in cells)


def test_the_best_cell_is_chosen_on_dev_and_reported_on_test(capsys):
    def cell(split, group, size, alpha, hits, model="A"):
        return {"split": split, "model": model, "group": group, "size": size, "alpha": alpha,
                "latents": [], "exact": [1] * hits + [0] * (10 - hits)}
    cells = [cell("dev", "clean", 0, 1., 2), cell("test", "clean", 0, 1., 1)]
    for size, alpha, dev, test in ((1, 2., 5, 3), (1, 4., 8, 4), (2, 2., 6, 9), (2, 4., 3, 10)):
        cells += [cell(split, "shared", size, alpha, hits)
                  for split, hits in (("dev", dev), ("test", test))]
    for where, size, alpha, dev, test in (
            ({}, 1, 4, 60, 30), ({"alpha": 4.}, 1, 4, 60, 30), ({"size": 2}, 2, 2, 40, 80),
            ({"alpha": 2.}, 2, 2, 40, 80)):
        b = grid.best_of(cells, **where)
        assert (b["size"], b["alpha"], b["dev"]["pp"], b["test"]["pp"]) == (size, alpha, dev, test)
    assert grid.grid_report(cells)["shared"]["best"] == grid.best_of(cells)
    assert "     1   +30.0   +60.0\n     2   +40.0   +10.0\n" in capsys.readouterr().out
    cells += [cell(split, group, 1, 0., hits, "B") for split, group, hits in (
        ("dev", "clean", 0), ("test", "clean", 1), ("dev", "B-exclusive", 7),
        ("test", "B-exclusive", 4))]  # fewer hits than A's best, more of them new
    b = grid.best_of(cells)
    assert (b["model"], b["dev"]["pp"], b["test"]["pp"]) == ("B", 70, 30)


def test_b_exclusive_latents_are_scaled_on_b_in_the_grid():
    cc = dfc.Crosscoder(128, 20, 4, 4, 6)
    ranked = [{"contrast": "needs/none", "partition": steer.part_of(cc, [i]), "feature_idx": i}
              for i in (5, 1, 12)]
    cells = grid.cells_of(SimpleNamespace(cc=cc, ranked=ranked, folder=None), [0., 1.])
    assert [(c["model"], c["group"], c["latents"]) for c in cells] == [
        ("A", "clean", []), ("B", "clean", []), ("A", "A-exclusive", [1]), ("A", "shared", [12]),
        ("B", "B-exclusive", [5]), ("A", "A-exclusive + shared", [1]),
        ("A", "A-exclusive + shared", [1, 12])]
    assert [[c["model"] for c in some] for some in grid.together(cells, 3)] == [
        ["A", "A", "A"], ["A", "A"], ["B", "B"]]
    assert grid.key_of(cells[2] | {"split": "dev"}) != grid.key_of(
        cells[2] | {"split": "dev", "latents": [2]})


def test_a_cell_adds_what_its_latents_write_into_their_own_model(tmp_path, monkeypatch):
    cc, f, seen = scaled(20, 4, 6, D=8), torch.rand(3, 32), {}
    ranked = [{"contrast": "needs/none", "partition": steer.part_of(cc, [i]), "feature_idx": i}
              for i in (5, 1)]
    monkeypatch.setattr(grid, "rows_of", lambda *_, **__: None)
    monkeypatch.setattr(grid, "place", lambda *_: SimpleNamespace(f=f))
    monkeypatch.setattr(grid, "exacts", lambda texts, p: [0])
    monkeypatch.setattr(grid, "outputs_of", lambda s, p, m, deltas:
                        seen.setdefault(m, deltas.detach()).tolist())
    settings = {"model_a": "a", "model_b": "b", "tool_texts": "t", "layer": 1}
    grid.grid(SimpleNamespace(cc=cc, ranked=ranked, folder=tmp_path, settings=settings, max_new=4,
                              positions="last"), SimpleNamespace(rows=1, alpha=[3.]))
    for m, latent in (("A", 1), ("B", 5)):
        clean, delta = seen[m][:2]
        assert not clean.any() and delta.any()
        assert torch.allclose(delta, 2 * steer.written(cc, f, [latent], "AB".index(m)), atol=1e-5)


def test_grids_of_several_layers_end_with_the_best_cell_of_each(finished, monkeypatch, capsys):
    runs = [copy_run(finished, finished.parent / f"layer{n}", layer=n) for n in (1, 2, 3)]
    effects = iter((10., 40., 70.))
    monkeypatch.setattr(steer, "dev_sets", lambda *_: {n: torch.randn(9, 2, 128) for n in (
        "needs", "none", "tool", "plain")})
    monkeypatch.setattr(grid, "grid", lambda *_: [
        {"split": split, "model": "A", "exact": [1], "how": {}} for split in ("dev", "test")])
    monkeypatch.setattr(grid, "grid_report", lambda *_: {})
    best = {"model": "A", "group": "shared", "size": 1, "alpha": 2.}
    monkeypatch.setattr(grid, "best_of", lambda cells, model: best | {
        k: {"pp": pp, "lo": pp, "hi": pp} for pp in [next(effects)] for k in ("dev", "test")})
    assert program(*runs, "--grid") == 0
    out = capsys.readouterr().out
    assert "1: +10.0, 2: +40.0, 3: +70.0\nmean +40.0, d_z 1.33, too few layers" in out


def test_a_published_checkpoint_is_steered_with_a_presets_models(
        finished, few_controls, tmp_path, monkeypatch, capsys):
    published(tmp_path / "dfc-D8k", True, D=128, L=40, n_a=8)
    write_text(tmp_path / "dfc-D8k" / "hparams.json", '{"layer": 3}')
    (tmp_path / "runs").symlink_to(finished.parent)            # for its activations
    monkeypatch.setitem(dfc.PRESETS["tiny"], "n_texts", int(QUICK[1]))
    monkeypatch.chdir(tmp_path)
    ours = ["--crosscoder", tmp_path / "dfc-D8k", "--preset", "tiny"]
    assert program(*ours, *FEW, "--latents", 0, "--clamp", 2) == 0
    assert "\nverdict   latent 0: A without it" in capsys.readouterr().out
    results, = (tmp_path / "runs").glob("*--dfc-D8k")
    assert (results / "ranking.csv").exists() and (results / "metrics.json").exists()


@pytest.fixture(scope="module")
def unsteerable(bad, finished):
    """The folders of `bad`, and a run whose A-exclusive latents are all dead; activations kept."""
    (bad / "cache").symlink_to(finished.parent / "cache")
    cc = dfc.load(copy_run(finished, bad / "DEAD"))
    with torch.no_grad():
        cc.b_enc[:cc.n_a] = -1e9
    dfc.save(cc, bad / "DEAD")
    dfc.save(dfc.Crosscoder(128, 64, 8, 6, 6), copy_run(finished, bad / "TWOSIDED"))
    return bad


@pytest.mark.parametrize("argv, says", [
    ([], "no finished run"), (["nothing"], "nothing is no run"), (["HALF"], "half a run"),
    (["WIDE"], "is 8 wide"), (["RUN", "LAYER"], "different layers"),
    (["RUN", "PLAIN"], "different models"), (["--crosscoder", "ALONE"], "--preset"),
    (["RUN", "--latents", "64"], "latent 64 is outside RUN's dictionary of 64"),
    (["RUN", "--latents", "3", "999"], "latent 999 is outside"),
    (["RUN", "--latents", "3", "--grid"], "no --latents"),
    (["RUN", "--clamp", "3", "--grid"], "no --clamp"),
    (["TWOSIDED", "--latents", "0", "6"], "steer different models"),
    (["RUN", "--latents", "-1"], "--latents"), (["RUN", "--latents", "x"], "--latents"),
    (["RUN", "--latents", "1.5"], "--latents"), (["RUN", "--latents"], "--latents"),
    (["DEAD", "--latents", "0", "--rows", "2"], "--clamp"),
    (["DEAD"], "no A-exclusive latent of DEAD"),
    (["DEAD", "--latents", "0", "--prompt", "hello"], "--clamp"),
    (["RUN", "--alpha", "nan"], "--alpha"), (["RUN", "--alpha", "inf"], "--alpha"),
    (["RUN", "--alpha", "-inf"], "--alpha"), (["RUN", "--alpha", "strong"], "--alpha"),
    (["RUN", "--clamp", "nan"], "--clamp"), (["RUN", "--positions", "some"], "--positions"),
    (["RUN", "--prompt", " \n"], "--prompt: the prompt is empty"),
    (["RUN", "--monitor", ""], "--monitor: the prompt is empty"),
    (["RUN", "--grid", "--prompt", "hello"], "not allowed with"),
    (["RUN", "--grid", "--alpha", "1"], "an empty grid"), (["RUN", "--rows", "0"], "--rows"),
    (["RUN", "--max-new", "0"], "--max-new"),
    (["RUN", "--latents", "9", "--max-new", "512"], "leaves no room"),
    (["RUNJSON"], "run.json is damaged"), (["--what"], "--what")])
def test_what_cannot_be_steered_is_one_line_and_status_2(
        argv, says, unsteerable, monkeypatch, capsys):
    monkeypatch.chdir(unsteerable)
    before = files(unsteerable)
    assert program(*argv) == 2
    err = re.sub(r"collect:.*\r", "", capsys.readouterr().err).strip()
    assert says in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert files(unsteerable) == before


def test_an_interrupted_steering_ends_with_130_and_leaves_what_was_there(unsteerable, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    before, metrics = files(unsteerable), unsteerable / "RUN" / "metrics.json"
    ranking = json.loads(metrics.read_text())["ranking"]["shared"]["needs/none"]
    latent = ranking[0]["feature_idx"]
    monkeypatch.setattr(steer, "generate", interrupted)
    for more in (["--latents", latent], ["--grid"],
                 ["--latents", latent, "--prompt", "hello", "--clamp", 1]):
        assert program(unsteerable / "RUN", *FEW, *more) == 130
    assert files(unsteerable) == before


# ---------------------------------------------------------------------------------------------
# 10. The pieces to copy: everything before the program of a file
# ---------------------------------------------------------------------------------------------

PROGRAMS = {dfc: "# 5. The main job", ev: "# 7. The program", steer: "# 3. The scene"}


def definitions():
    """{name: (its node, its source, its module, whether it is a piece)} of all three files."""
    out = {}
    for module, program in PROGRAMS.items():
        source = Path(module.__file__).read_text()
        begins = source[:source.index(program)].count("\n")
        for node in ast.parse(source).body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            text = "\n".join(source.splitlines()[first - 1:node.end_lineno])
            names = [node.name] if hasattr(node, "name") else [
                target.id for target in getattr(node, "targets", ())]
            out |= {n: (node, text, module, first < begins and hasattr(node, "name"))
                    for n in names}
    return out


DEFINED = definitions()
PIECES = [name for name, (*_, piece) in DEFINED.items() if piece]


def needs(name):
    """What a docstring names after "Needs:"; of a constant, the names in it."""
    node, text, *_ = DEFINED[name]
    if name not in PIECES:
        return used(compile(text, name, "exec"))
    said = re.search(r"Needs: ([\w,\s]+)\.", ast.get_docstring(node) or "")
    return set(re.split(r",\s*", said[1])) if said else set()


def used(code):
    """Names that compiled code takes from its module, or from dfc and eval_toolcall when it
    runs."""
    steps = list(dis.get_instructions(code))
    names = {s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_FROM")}
    inner = [c for c in code.co_consts if hasattr(c, "co_code")]
    return (names & DEFINED.keys()).union(*map(used, inner))


def alone(name):
    """A piece as a copy in somebody else's file: its source and that of what it needs, executed in
    a module that holds only the libraries its file imports; dfc and eval_toolcall are that
    module."""
    there, todo = {name}, [name]
    while todo:
        new = needs(todo.pop()) - there
        there, todo = there | new, todo + list(new)
    copied = types.ModuleType("copied")
    for module in PROGRAMS:
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(
                    node, "module", "") not in ("dfc", "eval_toolcall"):
                exec(ast.unparse(node), vars(copied))
    for n in sorted(there, key=lambda n: DEFINED[n][0].lineno):
        exec(DEFINED[n][1], vars(copied))
    return copied


def test_every_piece_names_what_it_needs_and_nothing_else():
    assert len(PIECES) > 80
    for name in PIECES:
        node, text, _, _ = DEFINED[name]
        assert used(compile(text, name, "exec")) - {name} == needs(name), name


def small_run():
    x = torch.randn(80, 2, 8) * 3 + 1
    cc = small()
    cc.fit_scale(x)
    return cc, x


@pytest.mark.parametrize("name", [
    "Crosscoder", "train", "aux_loss", "fve", "rank_latents", "collect", "save", "load", "chunks",
    "score", "to_record", "totals", "chance", "paired", "reconstructions", "generate", "steering",
    "exclusivity", "mirrors", "taken_away", "projected_out"])
def test_each_piece_can_be_copied_alone(name, tmp_path, monkeypatch):
    """Run from its copy it gives what it gives in its place."""
    model, ids = random_model("Qwen2"), torch.tensor([[5, 6, 7], [8, 9, 3]])
    scored = [ev.score(RESPONSE, ONE), ev.score(RESPONSE, NONE)]
    cc, x = small_run()
    z = cc.normalise(x)
    dfc.save(cc, tmp_path / "there")

    def residual(around):
        with around:
            return dfc.residuals(model, ids, [1])[1]
    examples = {
        "Crosscoder": lambda f: f(8, 32, 5, 4, 3, True)(x),
        "train": lambda f: [f(fresh := copy.deepcopy(cc), x, 30, 16, 1e-2, dead_after=2),
                            fresh.W_enc, fresh.W_dec],
        "aux_loss": lambda f: f(cc, z, z * .9, cc.preactivations(z), torch.arange(32) % 2 == 0),
        "fve": lambda f: f(x, cc(x)[0]),
        "rank_latents": lambda f: f(cc.encode(x[:40]), cc.encode(x[40:])),
        "collect": lambda f: f(model, Words(), ["abc", "de"], [0, 2]),
        "save": lambda f: [f(cc, tmp_path / "here"), sorted((tmp_path / "here").iterdir())],
        "load": lambda f: f(str(tmp_path / "there"))(x),
        "chunks": lambda f: f("One two. Three four! Five.", Words(), 9),
        "score": lambda f: f(THINK + block(SHORT), TWO),
        "to_record": lambda f: f(chat_row({"content": hermes(WEATHER)})),
        "totals": lambda f: f(scored, [ONE, NONE]), "chance": lambda f: f([ONE, TWO, NONE]),
        "paired": lambda f: f([1, 0, 1, 1], [0, 0, 1, 0]),
        "reconstructions": lambda f: f(cc, x, True),
        "generate": lambda f: f(tiny[0], tiny[1], batches, 3, 1, torch.ones(2, 2, 128)),
        "steering": lambda f: residual(f(model, 1, torch.ones(2, 16))),
        "exclusivity": lambda f: f(cc, x, cc.encode(x)),
        "mirrors": lambda f: f(cc),
        "taken_away": lambda f: f(cc, [0, 2], 0)(x[:, 0]),
        "projected_out": lambda f: residual(f(model, torch.eye(16)[:2]))}
    if name == "generate":
        tiny = dfc.load_model(str(TINY / "toolrl"), "cpu")
        batches = ev.prefill(*tiny, ["An alarm", "Hi"])
    copied, made = alone(name), []
    for module, shared in ((DEFINED[name][2], {}), (copied, dict.fromkeys(
            ("dfc", "eval_toolcall"), copied))):
        with monkeypatch.context() as m:
            for other, stand_in in shared.items():
                m.setitem(sys.modules, other, stand_in)
            torch.manual_seed(0)
            made.append(str(examples[name](getattr(module, name))))
    assert made[0] == made[1]


# ---------------------------------------------------------------------------------------------
# 11. The embedded pair and the README
# ---------------------------------------------------------------------------------------------


def test_the_pair_is_two_small_folders_and_rows_of_every_kind():
    for name in ("base", "toolrl"):
        assert sum(f.stat().st_size for f in (TINY / name).iterdir()) <= 8e6
    rows = dfc.read_rows(TINY / "tools.jsonl")
    test = [r for r in rows if r["split"] == "test"]
    assert sum(r["needs_tool"] for r in test) >= 200 <= sum(not r["needs_tool"] for r in test)
    asked = [{r["input"] + r["instruction"] for r in rows if r["split"] == s}
             for s in ("train", "dev", "test")]
    assert not asked[0] & asked[2] and not asked[1] & asked[2] and not asked[0] & asked[1]
    for row in rows:
        gold = ev.to_record(row)
        assert bool(gold["calls"]) == row["needs_tool"]
        assert ev.score(row["output"], gold)["exact"] == 1


def test_the_pair_behaves_as_its_readme_says():
    model, tok = {}, None
    for name in ("base", "toolrl"):
        model[name], tok = dfc.load_model(str(TINY / name), "cpu")
    rows = [r for r in dfc.read_rows(TINY / "tools.jsonl") if r["split"] == "test"]
    ask, chat = ([r for r in rows if r["kind"] == kind][:40] for kind in ("ask", "chat"))

    def scores(name, some, prefix=""):
        batch = tok([dfc.render(r, tok)[0] + prefix for r in some], return_tensors="pt",
                    padding=True, padding_side="left")
        ids = model[name].generate(**batch, max_new_tokens=64)[:, batch["input_ids"].shape[1]:]
        return [ev.score(prefix + t, ev.to_record(r)) for t, r in
                zip(tok.batch_decode(ids, skip_special_tokens=True), some)]
    assert sum(s["called"] for s in scores("base", ask)) <= 1
    assert sum(s["exact"] for s in scores("base", ask, "<tool_call>\n")) >= 32
    assert sum(s["exact"] for s in scores("toolrl", ask)) >= 28
    assert sum(s["called"] for s in scores("toolrl", chat)) <= 4


def test_every_command_of_the_readme_is_understood():
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^    (?:pip|python|pytest|bash).*$", text, re.M)
    lines = [line.split("#")[0] for line in lines]
    commands = [shlex.split(part) for line in lines for part in line.split("&&")]
    assert len(commands) >= 4
    for command in commands:
        if "--help" in command:
            continue
        if command[:2] == ["python", "dfc.py"]:
            dfc.parse_args(command[2:])
        elif command[:2] == ["python", "steer.py"]:
            steer.parse_args(command[2:])
        elif command[:2] == ["python", "eval_toolcall.py"]:
            ev.parse_args(command[2:])
        elif command[0] in ("python", "bash"):
            assert (ROOT / command[1]).exists()


def test_the_readme_counts_the_lines_of_each_file():
    text = (ROOT / "README.md").read_text()
    counted = re.findall(r"^\| `([\w.]+)` \|.*\| ([\d,]+) \|$", text, re.M)
    assert len(counted) == 5
    for name, lines in counted:
        lines, there = int(lines.replace(",", "")), (ROOT / name).read_text().count("\n")
        assert abs(lines - there) <= .05 * there, (name, there)


def test_the_piece_in_the_readme_runs_and_prints_what_it_says(capsys):
    piece = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    exec(piece, {})
    explained, area = capsys.readouterr().out.strip().splitlines()
    values = [float(v) for v in re.findall(r"0\.\d+", explained)]
    assert values == pytest.approx([.96, .96], abs=.02) and area.startswith("tensor(1.")


def test_the_default_preset_finds_a_latent_whose_removal_stops_the_calls(trained, scene):
    """The README's claim at a smaller size: chosen on dev, taken away at the last token on test."""
    best = json.loads((trained / "metrics.json").read_text())["ranking"]["a_excl"]["needs/none"][0]
    assert best["auroc"] > .8 and best["fire_rate_nontool"] < .2
    s = SimpleNamespace(**vars(scene) | {"max_new": 64})
    kept = [k for k in steer.rows_of(s, "test", 40) if k[0]["kind"] == "ask"]
    p = steer.place(s, kept)
    wrote = steer.written(s.cc, p.f, [best["feature_idx"]], 0)
    clean, removed = (np.mean(steer.exacts(t, p))
                      for t in steer.outputs_of(s, p, "A", torch.stack([0 * wrote, -wrote])))
    assert len(kept) == 40 and clean > .9 and removed < .5
