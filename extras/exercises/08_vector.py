"""Exercise 8 of ../EXERCISES.md: the vector that needs no dictionary.

    pytest extras/exercises/08_vector.py              # fails until the function is right
    python extras/exercises/08_vector.py runs/tiny    # what it does, beside a dictionary's latents
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # dfc.py lies two folders up
from eval_toolcall import open_run
from steer import best_latents, best_strength, outcomes, rank_latents, read_prompts, written


def vector_by_labels(x_NMD, needs_N, written_PD):
    """(P, D): along the difference of means of A (tool needed - not needed), at each of P prompts
    as long as what a latent writes there. x_NMD: both models' vectors at N dev prompts, A first;
    needs_N: does the prompt need a tool (bool)?; written_PD: what the latent writes into A at P
    other prompts."""
    raise NotImplementedError


def test_the_numbers_are_right():
    a_ND = torch.tensor([[1., 0], [0, 4], [3, 0], [0, 8]])
    b_ND = torch.tensor([[9., 9], [7, 7], [1, 5], [2, 2]])
    needs_N = torch.tensor([True, False, True, False])
    written_PD = torch.tensor([[3., 4], [0, 0], [-2, 0]])  # silent at the second prompt

    found_PD = vector_by_labels(torch.stack([a_ND, b_ND], 1), needs_N, written_PD)

    wanted_PD = torch.tensor([[1.5811, -4.7434], [0, 0], [.6325, -1.8974]])
    same_length = torch.allclose(found_PD.norm(dim=1), written_PD.norm(dim=1), atol=1e-3)
    assert same_length, "at some prompt the length is not that of what the latent writes"
    reversed_sign = torch.allclose(found_PD, -wanted_PD, atol=1e-3)
    assert not reversed_sign, "the sign is wrong: tool needed minus not needed"
    right = torch.allclose(found_PD, wanted_PD, atol=1e-3)
    assert right, "the direction is wrong: it is the difference of two means of A's vectors"


def main(folder, rows=20):
    run = open_run(folder)
    dev = read_prompts(run, "dev")
    few_dev = read_prompts(run, "dev", rows)
    test = read_prompts(run, "test", rows)
    ranking = rank_latents(run.cc, dev.f_NL, dev.needs_N)

    # 1. in A: as long as what the latents write
    for n in (1, 3):
        first = best_latents(ranking, "A-exclusive")[:n]
        written_ND = written(run.cc, test.f_NL, first)
        vector_ND = vector_by_labels(dev.x_NMD, dev.needs_N, written_ND)
        cosine = F.cosine_similarity(written_ND, vector_ND)[test.needs_N].mean()
        print(f"\nlatents {first}, cosine with the difference of means {cosine:.2f}; exact calls")
        v_VND = torch.stack([0 * vector_ND, -written_ND, -vector_ND])
        for samples in (0, 5):
            found = outcomes(replace(run, samples=samples), "A", test, v_VND)
            clean, ablated, by_labels = [100 * np.mean(outcome.exact) for outcome in found]
            print(f"{'sampled' if samples else 'greedy'}: clean {clean:.0f} %, ablated "
                  f"{ablated:.0f} %, along the difference of means {by_labels:.0f} %")

    # 2. into B: at a strength of its own, chosen on dev prompts
    needs_D = dev.x_NMD[dev.needs_N, 0].mean(0)
    none_D = dev.x_NMD[~dev.needs_N, 0].mean(0)
    unit_D = F.normalize(needs_D - none_D, dim=0)

    def constant(x_NMD):
        return (needs_D - none_D).expand(len(x_NMD), -1)

    def probe(x_NMD):
        beyond_N = ((x_NMD[:, 0] - (needs_D + none_D) / 2) @ unit_D).relu()
        return beyond_N[:, None] * unit_D

    print()
    for vectors in (constant, probe):
        best = best_strength(run, "B", few_dev, vectors(few_dev.x_NMD), (.25, .5, 1, 2, 4, 8))
        for c in (best, 1):
            outcome, = outcomes(run, "B", test, c * vectors(test.x_NMD)[None])
            exact = 100 * np.mean(outcome.exact)
            print(f"{vectors.__name__:8s} x {c:<4g} into B: exact {exact:3.0f} %, "
                  f"false calls {outcome.false_calls:3.0f} %")


if __name__ == "__main__":
    main(sys.argv[1])
