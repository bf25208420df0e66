"""What is true of the sweep, its tables and figures, and of the planted toy. pytest runs it too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
import dfc  # noqa: E402
import eval_toolcall as ev  # noqa: E402
import plot  # noqa: E402
import table as tables  # noqa: E402
import toy  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------
# 1. Planted ground truth
# ---------------------------------------------------------------------------------------------


def test_planted_exclusive_features_are_recovered():
    x, d = toy.plant(n_concepts=48, n_only=4, n_vectors=6000, d_model=48)
    cc = toy.fit(x, n_latents=64, tied=True, steps=800)
    recall, _ = toy.grade(cc, x, d, 4, 0)
    assert recall >= .75


def test_a_pair_of_identical_models_yields_no_exclusive_feature():
    """With A-exclusive latents only. With B-exclusive ones besides, a shared concept can be written
    by one latent of each, and some are: mirror pairs, hence n_b = 0 in the default preset."""
    x, d = toy.plant(n_concepts=48, n_only=0, turn=0., n_vectors=6000, noise=0.)
    x[:, 1] = x[:, 0]
    cc = toy.fit(x, share_b=0., tied=True, steps=800)
    mass = torch.cat([cc.encode(v) for v in x.split(1000)]).sum(0)
    assert mass[:cc.n_a].sum() < .01 * mass.sum()


# ---------------------------------------------------------------------------------------------
# 2. The sweep and its tables
# ---------------------------------------------------------------------------------------------

# The published sweep: name, tool correctness of A and of B with the reconstruction patched in, in
# percent; clean 19 and 0 (arXiv 2606.26474, its repository's results; one setting is missing).
SWEEP = """
cc-D16k-k160:67:4 cc-D16k-k45:52:12 cc-D16k-k90:46:3 cc-D16k-nol1-k160:42:15
cc-D16k-nol1-k45:53:14 cc-D16k-nol1-k90:35:15 cc-D8k-k160:49:4 cc-D8k-k45:59:12 cc-D8k-k90:50:3
cc-D8k-nol1-k160:40:8 cc-D8k-nol1-k45:70:17 cc-D8k-nol1-k90:60:0
dfc-D16k-excl10-freeexcl-k160:58:4 dfc-D16k-excl10-freeexcl-k45:33:1
dfc-D16k-excl10-freeexcl-k90:56:19 dfc-D16k-excl10-k160:54:5 dfc-D16k-excl10-k45:52:7
dfc-D16k-excl3-freeexcl-k160:50:3 dfc-D16k-excl3-freeexcl-k45:50:6
dfc-D16k-excl3-freeexcl-k90:41:9 dfc-D16k-excl3-k160:52:8 dfc-D16k-excl3-k45:43:6
dfc-D16k-excl3-k90:42:7 dfc-D16k-excl5-freeexcl-k160:58:3 dfc-D16k-excl5-freeexcl-k45:48:6
dfc-D16k-excl5-freeexcl-k90:45:7 dfc-D16k-excl5-k160:50:4 dfc-D16k-excl5-k45:46:3
dfc-D16k-excl5-k90:50:3 dfc-D8k-excl10-freeexcl-k160:83:0 dfc-D8k-excl10-freeexcl-k45:43:6
dfc-D8k-excl10-freeexcl-k90:52:9 dfc-D8k-excl10-k160:44:8 dfc-D8k-excl10-k45:57:20
dfc-D8k-excl10-k90:53:2 dfc-D8k-excl3-freeexcl-k160:56:6 dfc-D8k-excl3-freeexcl-k45:49:6
dfc-D8k-excl3-freeexcl-k90:37:9 dfc-D8k-excl3-k160:50:5 dfc-D8k-excl3-k45:44:1
dfc-D8k-excl3-k90:44:6 dfc-D8k-excl5-freeexcl-k160:51:4 dfc-D8k-excl5-freeexcl-k45:57:2
dfc-D8k-excl5-freeexcl-k90:64:3 dfc-D8k-excl5-k160:26:2 dfc-D8k-excl5-k45:45:3
dfc-D8k-excl5-k90:52:13
"""


def published_rows():
    for line in SWEEP.split():
        name, a, b = line.split(":")
        words = dict(re.findall(r"(excl|D|k)(\d+)", name))
        yield {"name": name, "hyperparameters": {
                   "dict": 1024 * int(words["D"]), "k": int(words["k"]),
                   "excl": int(words.get("excl", 0)) / 100, "l1_shared": 0. if "nol1" in name else
                   1e-3, "l1_excl": 0. if "freeexcl" in name else 1e-3},
               "tool_correctness_A_delta": float(a) - 19, "tool_correctness_B_delta": float(b)}


def table(*argv):
    return dfc.cli(tables.main, [str(a) for a in argv])


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table_of_the_published_figures_is_the_published_table(tmp_path, capsys):
    rows = rows_file(tmp_path / "rows.jsonl", published_rows())
    assert table(rows, "--rows", tmp_path / "again.jsonl") == 0
    out = capsys.readouterr().out
    lines = {line[:18].strip(): line.split() for line in out.splitlines()}
    assert "47 runs" in out and lines["all"][-12:-6] == "+31.2 ± 9.7 +6.7 ± 4.9".split()
    for name, line in lines.items():  # our mean and sd beside the published columns, every line
        if line[-6:-5] and "±" in line and name != "change, pp":
            assert " ".join(line[-12:-6]) == " ".join(line[-6:]).replace(",", ""), name
    assert (tmp_path / "again.jsonl").read_text() == rows.read_text()


def test_the_table_shows_seed_noise_beside_each_effect(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [r | {"seed": seed, "tool_correctness_A_delta": (
                 10. if r["hyperparameters"]["excl"] else 0.) + rng.normal()}
            for r in published_rows() for seed in range(3)]
    assert table(rows_file(tmp_path / "rows.jsonl", rows)) == 0
    lines = capsys.readouterr().out.splitlines()
    noise = next(line for line in lines if line.startswith("seed noise"))
    assert .7 < float(noise.split()[5]) < 1.3        # the third column: tool A
    gap = next(line for line in lines if line.startswith("DFC - crosscoder"))
    assert 9 < float(gap.split()[5]) < 11 and float(gap.split()[6][1:-1]) > 20


def test_seed_noise_gives_a_mean_of_settings_the_error_of_its_own_runs():
    assert tables.error([[1., 2., 3.], [4.]], noise=2.) == pytest.approx((1 / 3 + 1) ** .5)
    rng, noise = np.random.default_rng(0), 3.
    means = [np.mean([rng.normal(0, noise, n).mean() for n in (1, 3, 5)]) for _ in range(20_000)]
    assert np.std(means) == pytest.approx(tables.error([[0] * n for n in (1, 3, 5)], noise), .02)


def test_published_figures_stand_beside_a_whole_sweep_only(tmp_path, capsys):
    rows = [r for r in published_rows() if r["hyperparameters"]["k"] == 90]
    assert table(rows_file(tmp_path / "rows.jsonl", rows)) == 0
    out = capsys.readouterr().out
    assert re.search(r"^k \(90\) +\d+ [^,]*$", out, re.M)        # without published columns
    assert re.search(r"^dict 1 \(8192\).*,", out, re.M)


def test_a_table_mixes_no_pairs_and_counts_what_is_not_finished(tmp_path, capsys):
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "metrics.json").write_text("{}")
    assert table(tmp_path / "trained", tmp_path) == 2
    assert "no finished run" in capsys.readouterr().err
    rows = [r | {"pair": [pair]} for r, pair in zip(published_rows(), "ab")]
    assert table(rows_file(tmp_path / "rows.jsonl", rows)) == 2
    err = capsys.readouterr().err
    assert "different models" in err and len(err.splitlines()) == 1
    assert table(tmp_path / "no") == 2


def sweep(*flags, **env):
    return subprocess.run(["bash", str(ROOT / "run_sweep.sh"), *flags], capture_output=True,
                          text=True, env=os.environ | env)


def test_the_sweep_lists_the_papers_48_settings_under_their_names():
    lines = sweep("--list", PRESET="paper").stdout.splitlines()
    names = {line.split("--out ")[1].split()[0].rsplit("/", 1)[1] for line in lines}
    published = {r["name"] for r in published_rows()}
    assert len(lines) == len(names) == 48 and len(names - published) == 1 and published < names
    for line in lines + sweep("--list", SEEDS="0 1 2").stdout.splitlines():
        words = line.split()
        first, second = words.index("dfc.py"), words.index("&&")
        args = dfc.parse_args(words[first + 1:second])
        assert ev.parse_args(words[second + 3:]).runs == [args.out]
        name = args.out.name
        h = dict(re.findall(r"(excl|k)(\d+)", name))
        assert args.k == int(h["k"]) and args.excl == int(h.get("excl", 0)) / 100
        assert (args.l1_excl == 0) == ("freeexcl" in name) and args.resume
        assert (args.l1_shared == 0) == ("nol1" in name) and args.excl_b == args.excl
    assert len(sweep("--list", SEEDS="0 1 2").stdout.splitlines()) == 144


def test_a_sweep_of_an_unknown_preset_is_one_line_and_status_2():
    done = sweep(PRESET="no")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# 3. Figures
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib")
    yield plot.pyplot()
    plot.pyplot().close("all")


def drawn_from(folder, **metrics):
    """The arguments of a figure of one run that holds these results."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return SimpleNamespace(runs=[folder], layers=[], sweep=None, opened=[(None, {}, folder)])


def in_pp(pp):
    return {"pp": pp, "lo": pp - 5, "hi": pp + 5, "n": 40}


def test_the_main_figure_shows_every_claim_and_every_control(plt, tmp_path):
    claims = [{"claim": "A without it", "effect": in_pp(-60), "verdict": "beyond random",
               "controls": {"random": [1, 2, 3], "latents": [], "A - B": [-50]}},
              {"claim": "B + its mean", "effect": in_pp(20), "verdict": "no",
               "controls": {"random": [0, 0, 4]}}]
    args = drawn_from(tmp_path, steering={"results": [
        {"latents": [7], "claims": claims, "ranking": [{"partition": "a_excl"}]}]})
    ax, = plot.effect(plt, args).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["A without it", "B + its mean"]
    assert ax.get_title(loc="left").startswith("A-exclusive latent 7, n = 40 ")
    xs = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert xs["random directions"] == [1, 2, 3, 0, 0, 4]
    assert xs["difference of means, A - B"] == [-50]
    bars, = ax.containers
    assert list(bars.lines[0].get_xdata()) == [-60, 20]
    assert bars.lines[2][0].get_segments()[0][:, 0].tolist() == [-65, -55]
    assert {"verdict", "beyond random", "no"} <= {t.get_text() for t in ax.texts}


def test_a_heat_map_is_the_change_on_dev_of_whole_cells_of_this_crosscoder(
        plt, tmp_path):
    def cell(group, exact, split="dev", weights=1, size=1, alpha=2.):
        alpha = 1. if group == "clean" else alpha
        return json.dumps({"model": "A", "group": group, "size": size, "alpha": alpha,
                           "split": split, "exact": exact, "how": {"weights": weights}}) + "\n"
    args = drawn_from(tmp_path, grid={"how": {"weights": 1}, "alphas": [0, 2], "groups": {}})
    (tmp_path / "grid.jsonl").write_text(
        cell("clean", [0, 0, 0, 1], weights=2) + cell("all", [1, 1, 1, 1], weights=2)
        + cell("clean", [1, 0, 0, 1], size=0) + cell("all", [1, 1, 0, 1])
        + cell("all", [0, 0, 0, 1], alpha=0.) + cell("all", [0, 0, 0, 0], alpha=9.)
        + cell("all", [1, 1, 1, 1])[:-20] + "\n"
        + cell("all", [1, 1, 1, 1], split="test"))
    ax, _ = plot.heat(plt, args).axes
    assert ax.get_title(loc="left") == "plain crosscoder, n = 4"
    assert [t.get_text() for t in ax.texts] == ["-25", "+25"]       # alpha 0, alpha 2


def test_a_figure_that_cannot_be_drawn_yet_names_its_command(tmp_path):
    args = drawn_from(tmp_path / "run")
    args.opened = []
    for draw, says in ((plot.effect, f"python steer.py {args.runs[0]}"),
                       (plot.grid, f"python steer.py {args.runs[0]} --grid"),
                       (plot.heat, f"python steer.py {args.runs[0]} --grid"),
                       (plot.layers, f"python steer.py {args.runs[0]} --grid"),
                       (plot.sweep, "bash run_sweep.sh")):
        assert says in draw(None, args) and "\n" not in draw(None, args)
    args.sweep = tmp_path / "nowhere"
    assert "bash run_sweep.sh" in plot.sweep(None, args)


def test_figures_without_matplotlib_are_one_line_and_status_2(monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert dfc.cli(plot.main, ["runs/any"]) == 2
    out, err = capsys.readouterr()
    assert "pip install matplotlib" in err and err.count("\n") == 1 and not out
