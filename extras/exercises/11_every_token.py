"""Exercise 11 of ../EXERCISES.md: ablate at every token.

    pytest extras/exercises/11_every_token.py              # fails until the function is right
    python extras/exercises/11_every_token.py runs/tiny    # beside the last token and controls
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # dfc.py lies two folders up
from dfc import Crosscoder, hooked
from eval_toolcall import open_run
from steer import best_latents, control_directions, outcomes, rank_latents, read_prompts, written


def ablate_everywhere(cc, latents, along_D=None):
    """An edit for dfc.hooked(): A's h_BTD -> h_BTD minus what A-exclusive latents write, at every
    token, in raw units. They act as if all survived the top k: f is the pre-activation (2),
    negative ones set to zero.

    along_D: if given, subtract a vector of the same length along this direction (of length 1)
    instead. The result has the precision of h."""
    def edit(h_BTD):
        raise NotImplementedError
    return edit


def test_it_subtracts_what_they_write_if_nothing_competes_at_any_k():
    torch.manual_seed(0)
    latents = [1, 4, 5]
    cc = Crosscoder(6, 20, k=20, n_a=8).requires_grad_(False)  # k = L: nothing competes
    cc.b_enc += torch.randn(20)
    cc.mean += torch.randn(2, 6)
    cc.scale += torch.rand(2, 6)
    h_BTD = torch.randn(2, 5, 6)
    edited_BTD = ablate_everywhere(cc, latents)(h_BTD)

    # slowly: decode every token with and without the latents; B's vector does not matter
    for h_D, edited_D in zip(h_BTD.flatten(0, 1), edited_BTD.flatten(0, 1)):
        f_1L = cc.encode(torch.stack([h_D, torch.randn(6)])[None])
        with_D = cc.decode(f_1L)[0, 0]
        f_1L[:, latents] = 0
        without_D = cc.decode(f_1L)[0, 0]
        assert torch.allclose(h_D - edited_D, with_D - without_D, atol=1e-5)

    # the top k does not matter; a control is as long, in the precision of h
    cc.k = 1
    assert torch.equal(ablate_everywhere(cc, latents)(h_BTD), edited_BTD)
    along_D = torch.eye(6)[2]
    control_BTD = h_BTD - ablate_everywhere(cc, latents, along_D)(h_BTD)
    assert torch.allclose(control_BTD[..., 2], (h_BTD - edited_BTD).norm(dim=-1), atol=1e-5)
    assert torch.allclose(control_BTD.norm(dim=-1), control_BTD[..., 2], atol=1e-5)
    assert ablate_everywhere(cc, latents)(h_BTD.bfloat16()).dtype == torch.bfloat16


def main(folder, rows=20):
    run = open_run(folder)
    dev = read_prompts(run, "dev")
    test = read_prompts(run, "test", rows)
    ranking = rank_latents(run.cc, dev.f_NL, dev.needs_N)
    latents = best_latents(ranking, "A-exclusive")[:1]
    everywhere = ablate_everywhere(run.cc, latents)

    def show(name, run, prompts, v_VND=None, edit=lambda h_BTD: h_BTD):
        with hooked(run.models["A"], run.settings.layer, edit):
            outcome, = outcomes(run, "A", prompts, v_VND)
        exact = 100 * np.mean(outcome.exact)
        print(f"{name:32s}exact {exact:3.0f} %, false calls {outcome.false_calls:3.0f} %")

    for name, samples in (("greedy", 0), ("five sampled answers", 5)):
        print(name)
        sampled = replace(run, samples=samples)
        show("clean", sampled, test)
        last_ND = written(run.cc, test.f_NL, latents)
        show("ablated at the last token", sampled, test, -last_ND[None])
        show("ablated at every token", sampled, test, edit=everywhere)

    print("greedy, every token")
    for u, along_D in enumerate(control_directions(run.cc, dev, latents)["random"]):
        show(f"random direction {u}", run, test, edit=ablate_everywhere(run.cc, latents, along_D))
    begun = replace(test, texts=[text + " A" for text in test.texts])
    show("ablated, answer begun", run, begun, edit=everywhere)


if __name__ == "__main__":
    main(sys.argv[1])
