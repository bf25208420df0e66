"""Checks of the three blanks in extras/lesson.ipynb.

A check calls your function and the library's with the same random numbers. If the results agree,
the lesson goes on with yours. Otherwise the check says what is wrong, and the lesson goes on with
the library's. Do not read on before you have filled in the blanks.
"""

import copy
import inspect

import torch

import steer
from dfc import Crosscoder


def compare(mine, right, arguments, mistakes):
    """mine if it returns what `right` does, otherwise right. mistakes: {what is wrong: what a
    function with this mistake returns}."""
    name = mine.__name__
    wanted = right(*arguments)
    given = copy.deepcopy(arguments)
    try:
        found = mine(*given)
    except Exception as e:  # whatever a student's code raises
        return fall_back(name, right, f"it raises {type(e).__name__}: {e}")

    for argument, before, after in zip(inspect.signature(right).parameters, arguments, given):
        if isinstance(before, torch.Tensor) and not before.equal(after):
            return fall_back(name, right, f"it changes {argument}, which later cells need")
    if found is None or found is ...:
        return fall_back(name, right, "it is still empty")
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        shape = tuple(getattr(found, "shape", ()))
        return fall_back(name, right, f"its shape is {shape} and should be {tuple(wanted.shape)}")
    if torch.allclose(found, wanted, atol=1e-4):
        print(f"{name} is right: the lesson goes on with yours")
        return mine
    for what, wrong in mistakes.items():
        if wrong.shape == found.shape and torch.allclose(found, wrong, atol=1e-4):
            return fall_back(name, right, what)
    return fall_back(name, right, "its shape is right, its numbers are not")


def fall_back(name, right, problem):
    print(f"*** NOT YET. {name}: {problem}. Until it is right, the library's function is used. ***")
    return right


def crosscoder():
    """A random one, whose raw units are not its own, and vectors to encode."""
    rng = torch.Generator().manual_seed(0)
    cc = Crosscoder(6, 20, k=5, n_a=4).requires_grad_(False)
    for tensor in (cc.W_enc, cc.W_dec, cc.b_dec, cc.mean):
        tensor.copy_(torch.randn(tensor.shape, generator=rng))
    cc.confine(cc.W_enc, cc.W_dec)
    cc.scale.copy_(torch.rand(cc.scale.shape, generator=rng) + .5)
    cc.b_enc.copy_(torch.randn(cc.b_enc.shape, generator=rng) - 2)  # so few are positive in some
    return cc, torch.randn(9, 2, 6, generator=rng)


def altered(cc, **values):
    """A copy with other numbers."""
    other = copy.deepcopy(cc)
    for name, value in values.items():
        getattr(other, name).copy_(value)
    return other


def encode(mine):
    cc, x_BMD = crosscoder()
    every = copy.deepcopy(cc)
    every.k = len(cc.b_enc)
    pre_BL = cc.preactivate(cc.normalise(x_BMD))
    largest = pre_BL.topk(cc.k)
    by_size_BL = torch.zeros_like(pre_BL).scatter(1, pre_BL.abs().topk(cc.k).indices, 1.) * pre_BL
    smallest = pre_BL.flatten().topk(len(x_BMD) * cc.k).values[-1]
    only_a = torch.tensor([1., 0.])[:, None, None]
    mistakes = {
        "(1) is missing: mean and scale": altered(cc, mean=0 * cc.mean, scale=1.).encode(x_BMD),
        "(1) does not subtract the mean": altered(cc, mean=0 * cc.mean).encode(x_BMD),
        "(1) does not divide by the scale": altered(cc, scale=1.).encode(x_BMD),
        "(2) reads model A only": altered(cc, W_enc=cc.W_enc * only_a).encode(x_BMD),
        "(2) lacks b_enc": altered(cc, b_enc=0 * cc.b_enc).encode(x_BMD),
        "(2) adds b_enc once for each model": altered(cc, b_enc=2 * cc.b_enc).encode(x_BMD),
        "(3) is missing: it returns pre": pre_BL,
        "(3) keeps all latents that are positive, not the k largest": every.encode(x_BMD),
        "(3) keeps negative values": torch.zeros_like(pre_BL).scatter(
            1, largest.indices, largest.values),
        "(3) takes the k largest of |pre|, not of pre": by_size_BL.relu(),
        "(3) takes the k largest of |pre| and keeps negative values": by_size_BL,
        "(3) is BatchTopK: k latents a pair on average. Here each pair has at most k":
            pre_BL.where(pre_BL >= smallest, 0.).relu(),
    }
    return compare(mine, Crosscoder.encode, (cc, x_BMD), mistakes)


def written(mine):
    cc, x_BMD = crosscoder()
    f_NL = altered(cc, b_enc=cc.b_enc + 2).encode(x_BMD)
    latents = [0, 2, 3, 11]
    right_ND = steer.written(cc, f_NL, latents)
    unscaled = altered(cc, scale=1.)
    mistakes = {
        "scale_A is missing": steer.written(unscaled, f_NL, latents),
        "its sign is wrong: cells that ablate subtract it themselves": -right_ND,
        "it adds A's mean, which no latent writes": right_ND + cc.mean[0],
        "it adds b_dec, which no latent writes": right_ND + cc.b_dec[0] * cc.scale[0],
        "it is written into B": f_NL[:, latents] @ (cc.W_dec[latents, 1] * cc.scale[1]),
        "it is scaled as B's vectors are": f_NL[:, latents] @ cc.W_dec[latents, 0] * cc.scale[1],
        "it sums over all latents": f_NL @ (cc.W_dec[:, 0] * cc.scale[0]),
        "f is missing": (cc.W_dec[latents, 0] * cc.scale[0]).sum(0).expand_as(right_ND),
    }
    return compare(mine, steer.written, (cc, f_NL, latents), mistakes)


def difference_of_means(mine):
    right = steer.difference_of_means
    rng = torch.Generator().manual_seed(0)
    v_ND = torch.randn(9, 6, generator=rng)
    needs_N = torch.arange(9) % 3 == 0
    mistakes = {
        "its sign is wrong: tool needed minus not needed": -right(v_ND, needs_N),
        "these are sums, not means": v_ND[needs_N].sum(0) - v_ND[~needs_N].sum(0),
        "it divides both sums by N, not each by the size of its group":
            (v_ND[needs_N].sum(0) - v_ND[~needs_N].sum(0)) / len(v_ND),
        "it subtracts the mean over all prompts": v_ND[needs_N].mean(0) - v_ND.mean(0),
        "it lacks the mean where no tool is needed": v_ND[needs_N].mean(0),
        "its length should not be 1": torch.nn.functional.normalize(right(v_ND, needs_N), dim=0),
    }
    return compare(mine, right, (v_ND, needs_N), mistakes)
