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
from dfc import Crosscoder, hooked, residual_stream, token_ids
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
    cc.b_enc += torch.rand(20)
    cc.mean += torch.randn(2, 6)
    cc.b_dec += 1
    cc.scale += torch.rand(2, 6)
    h_BTD = 3 * torch.randn(2, 5, 6)
    edited_BTD = ablate_everywhere(cc, latents)(h_BTD.clone())

    # what they write: decode with and without them; B's vector does not matter
    f_NL = cc.encode(torch.stack([h_BTD, torch.randn(2, 5, 6)], 2).flatten(0, 1))
    without_NL = f_NL.clone()
    without_NL[:, latents] = 0
    written_BTD = (cc.decode(f_NL) - cc.decode(without_NL))[:, 0].view_as(h_BTD)

    removed_BTD = h_BTD - edited_BTD
    assert removed_BTD.abs().sum(-1).all(), "at some token nothing changes"
    assert not torch.allclose(-removed_BTD, written_BTD, atol=1e-5), "the sign is wrong: subtract"
    assert torch.allclose(removed_BTD, written_BTD, atol=1e-5), "this is not what they write"

    cc.k = 1
    same = torch.equal(ablate_everywhere(cc, latents)(h_BTD.clone()), edited_BTD)
    assert same, "the result should not depend on k"

    along_D = torch.eye(6)[2]
    control_BTD = h_BTD - ablate_everywhere(cc, latents, along_D)(h_BTD.clone())
    length_BT = written_BTD.norm(dim=-1)
    same = torch.allclose(control_BTD.norm(dim=-1), length_BT, atol=1e-5)
    assert same, "the length of the control is not that of what they write together"
    same = torch.allclose(control_BTD[..., 2], length_BT, atol=1e-5)
    assert same, "the control is not subtracted along along_D"
    dtype = ablate_everywhere(cc, latents)(h_BTD.bfloat16()).dtype
    assert dtype == torch.bfloat16, "the result has not the precision of h"


@torch.no_grad()
def lengths(run, prompts, edit):
    """What an edit subtracts in A at prompts that need a tool: its mean length at the last token,
    and at all others, and the share of these others at which it is not zero."""
    last = []
    others = []
    for text, needs in zip(prompts.texts, prompts.needs_N):
        if needs:
            ids_1T = torch.tensor(token_ids(run.tokenizer, [text]), device=run.cc.mean.device)
            h_1TD = residual_stream(run.models["A"], ids_1T, run.settings.layer)
            *before, at_last = (h_1TD - edit(h_1TD)).norm(dim=-1)[0].tolist()
            last.append(at_last)
            others.extend(before)
    return np.mean(last), np.mean(others), np.mean(np.array(others) > 0)


def main(folder, rows=20):
    run = open_run(folder)
    dev = read_prompts(run, "dev")
    test = read_prompts(run, "test", rows)
    ranking = rank_latents(run.cc, dev.f_NL, dev.needs_N)
    latents = best_latents(ranking, "A-exclusive")[:1]
    everywhere = ablate_everywhere(run.cc, latents)

    last, others, active = lengths(run, test, everywhere)
    print(f"mean length subtracted: {last:.2f} at the last token of a prompt, {others:.2f} at the "
          f"others (not zero at {active:.0%})")

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
    show("clean, answer begun", run, begun)
    show("ablated, answer begun", run, begun, edit=everywhere)


if __name__ == "__main__":
    main(sys.argv[1])
