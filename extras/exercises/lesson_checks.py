"""Checks of the six blanks in extras/lesson.ipynb.

A check calls your function and a correct one with the same random numbers. If the results agree,
the lesson goes on with yours. Otherwise the check says what is wrong, and the lesson goes on with
the correct one. Do not read on before you have filled in the blanks.
"""

import copy
import inspect

import torch
import torch.nn.functional as F

import steer
from dfc import Crosscoder


def compare(mine, right, *cases):
    """mine if it returns what `right` does in each case, otherwise right. A case: (arguments, {what
    is wrong: what a function with this mistake returns})."""
    for arguments, mistakes in cases:
        problem = problem_of(mine, right, arguments, mistakes)
        if problem:
            print(f"*** NOT YET. {mine.__name__}: {problem}. Until it is right, a correct one is "
                  "used. ***")
            return right
    print(f"{mine.__name__} is right: the lesson goes on with yours")
    return mine


def problem_of(mine, right, arguments, mistakes):
    """What is wrong with mine, in words; None if nothing is."""
    given = copy.deepcopy(arguments)
    names = [name.replace("self", "cc") for name in inspect.signature(right).parameters]
    shapes = [f"{name} {tuple(argument.shape)}" for name, argument in zip(names, arguments)
              if isinstance(argument, torch.Tensor)]
    try:
        found = parts(mine(*given))
    except Exception as e:  # whatever a student's code raises
        return f"it raises {type(e).__name__}: {e} (called with {', '.join(shapes)})"

    for name, before, after in zip(names, arguments, given):
        if not all(map(torch.equal, tensors(before), tensors(after))):
            return f"it changes {name}, which later cells need"
    if any(part is None or part is ... for part in found):
        return "it is still empty"
    wanted = parts(right(*arguments))
    if kinds(found) != kinds(wanted):
        return (f"it returns {kinds(found)} and should return {kinds(wanted)} "
                f"(called with {', '.join(shapes)})")
    if not all(part.isfinite().all() for part in found):
        return "some of its numbers are nan or infinite: it divides by 0"
    if agree(found, wanted):
        return None
    for what, wrong in mistakes.items():
        if agree(found, parts(wrong)):
            return what
    return "its shape is right, its numbers are not"


def parts(result):
    """A result as a list: one function returns a pair."""
    pair = isinstance(result, (tuple, list)) and len(result) == 2
    return [*result] if pair else [result]


def tensors(argument):
    """Those of an argument."""
    if isinstance(argument, torch.nn.Module):
        return argument.state_dict().values()
    return [argument] if isinstance(argument, torch.Tensor) else []


def kinds(found):
    """The types and shapes of results, in words."""
    return " and ".join(f"a tensor {tuple(part.shape)}" if isinstance(part, torch.Tensor)
                        else f"a {type(part).__name__}" for part in found)


def agree(found, wanted):
    """Are all numbers the same? A float may stand for a double."""
    return kinds(found) == kinds(wanted) and all(
        torch.allclose(mine.to(right), right, atol=1e-4) for mine, right in zip(found, wanted))


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
    return compare(mine, Crosscoder.encode, ((cc, x_BMD), mistakes))


def cohens_d(mine):
    rng = torch.Generator().manual_seed(0)
    f_PL = torch.randn(5, 8, generator=rng).relu()
    f_QL = torch.randn(7, 8, generator=rng).relu()
    f_PL[:, 3] = f_QL[:, 3] = 0  # never active

    right = steer.cohens_d
    gap_L = f_PL.mean(0) - f_QL.mean(0)
    var_P, var_Q = f_PL.var(0), f_QL.var(0)
    by_size_L = (4 * var_P + 6 * var_Q) / 10

    def over(spread_L):
        return gap_L / spread_L.clamp(min=1e-12)

    def d(var_P, var_Q):
        return over(((var_P + var_Q) / 2).sqrt())

    mistakes = {
        "its sign is wrong: mean of P minus mean of Q": right(f_QL, f_PL),
        "its sign is lost: d is negative where Q is larger": d(var_P, var_Q).abs(),
        "it does not divide by the spread": gap_L,
        "brackets are missing: it divides only the mean of Q":
            f_PL.mean(0) - f_QL.mean(0) / ((var_P + var_Q) / 2).sqrt().clamp(min=1e-12),
        "the root is missing: it divides by a variance": over((var_P + var_Q) / 2),
        "the / 2 is missing": over((var_P + var_Q).sqrt()),
        "the / 2 belongs under the root": over((var_P + var_Q).sqrt() / 2),
        "brackets are missing: it halves only the variance of Q": over((var_P + var_Q / 2).sqrt()),
        "it averages standard deviations: average the variances, then take the root":
            over((var_P.sqrt() + var_Q.sqrt()) / 2),
        "it takes the spread of P only": d(var_P, var_P),
        "it takes the spread of Q only": d(var_Q, var_Q),
        "it takes the spread of P and Q together, which holds their difference, too":
            over(torch.cat([f_PL, f_QL]).std(0)),
        "it weights the variances by the sizes of P and Q": d(by_size_L, by_size_L),
        "its variances divide by N, not by N - 1":
            d(f_PL.var(0, correction=0), f_QL.var(0, correction=0)),
        "it takes one variance for all latents: each has its own": d(f_PL.var(), f_QL.var()),
    }
    return compare(mine, right, ((f_PL, f_QL), mistakes))


def written(mine):
    cc, x_BMD = crosscoder()
    f_NL = altered(cc, b_enc=cc.b_enc + 2).encode(x_BMD)
    latents = [0, 2, 3, 11]
    right_ND = steer.written(cc, f_NL, latents)
    unscaled = altered(cc, scale=1.)
    mistakes = {
        "scale_A is missing": steer.written(unscaled, f_NL, latents),
        "it divides by scale_A: multiply": f_NL[:, latents] @ (cc.W_dec[latents, 0] / cc.scale[0]),
        "its sign is wrong: cells that ablate subtract it themselves": -right_ND,
        "it adds A's mean, which no latent writes": right_ND + cc.mean[0],
        "it adds b_dec, which no latent writes": right_ND + cc.b_dec[0] * cc.scale[0],
        "it is written into B": f_NL[:, latents] @ (cc.W_dec[latents, 1] * cc.scale[1]),
        "it is scaled as B's vectors are": f_NL[:, latents] @ cc.W_dec[latents, 0] * cc.scale[1],
        "it sums over all latents": f_NL @ (cc.W_dec[:, 0] * cc.scale[0]),
        "f is missing": (cc.W_dec[latents, 0] * cc.scale[0]).sum(0).expand_as(right_ND),
    }
    return compare(mine, steer.written, ((cc, f_NL, latents), mistakes))


def stretch(v_ND, direction):
    """What as_long has to return."""
    return v_ND.norm(dim=1, keepdim=True) * F.normalize(direction, dim=-1)


def as_long(mine):
    rng = torch.Generator().manual_seed(0)
    v_ND = torch.randn(9, 6, generator=rng)
    length_N1 = v_ND.norm(dim=1, keepdim=True)
    cases = []
    for direction in (3 * torch.randn(6, generator=rng), torch.randn(9, 6, generator=rng)):
        right_ND = stretch(v_ND, direction)
        unit = F.normalize(direction, dim=-1)
        mistakes = {
            "direction has not the length 1: divide by its length": length_N1 * direction,
            "its length should be that of v on each prompt, not 1": unit.expand_as(v_ND),
            "all prompts get the same length": length_N1.mean() * unit.expand_as(v_ND),
            "its sign is wrong": -right_ND,
            "it is the part of v along the direction, not a vector as long as v":
                (v_ND * unit).sum(1, keepdim=True) * unit,
        }
        cases.append(((v_ND, direction), mistakes))
    return compare(mine, stretch, *cases)


def split(v_ND, u_D):
    """What split_along has to return."""
    along_ND = (v_ND @ u_D)[:, None] * u_D
    return along_ND, v_ND - along_ND


def split_along(mine):
    rng = torch.Generator().manual_seed(0)
    v_ND = torch.randn(9, 6, generator=rng)
    u_D = F.normalize(torch.randn(6, generator=rng), dim=0)

    def with_coordinate(c_N):
        along_ND = c_N[:, None] * u_D
        return along_ND, v_ND - along_ND

    along_ND, rest_ND = split(v_ND, u_D)
    dot_N = v_ND @ u_D
    mistakes = {
        "the two are swapped: first the part along u, then the rest": (rest_ND, along_ND),
        "the second is v itself: subtract the part along u": (along_ND, v_ND),
        "the second is along u, too": (along_ND, along_ND),
        "the sign of the rest is wrong: v minus the part along u": (along_ND, -rest_ND),
        "the part along u is added to v, not subtracted": (along_ND, v_ND + along_ND),
        "the sign of the part along u is wrong": with_coordinate(-dot_N),
        "it multiplies v and u number by number: sum to a dot product, then multiply by u":
            (v_ND * u_D, v_ND - v_ND * u_D),
        "it uses the length of v: the dot product of v with u is needed":
            with_coordinate(v_ND.norm(dim=1)),
        "it uses the cosine: do not divide by the length of v":
            with_coordinate(dot_N / v_ND.norm(dim=1)),
        "its dot products have lost their sign": with_coordinate(dot_N.abs()),
        "all prompts get the same part along u: each has its own dot product":
            with_coordinate(dot_N.mean().expand(9)),
        "the rest should not have length 1": (along_ND, F.normalize(rest_ND)),
    }
    return compare(mine, split, ((v_ND, u_D), mistakes))


def step_to(a_ND, target, direction_D):
    """What set_to has to return."""
    return ((target - a_ND) @ direction_D)[:, None] * direction_D


def set_to(mine):
    rng = torch.Generator().manual_seed(0)
    a_ND, target_ND = torch.randn(2, 9, 6, generator=rng)
    direction_D = F.normalize(torch.randn(6, generator=rng), dim=0)
    cases = []
    for target in (target_ND, target_ND[0]):
        right_ND = step_to(a_ND, target, direction_D)
        gap_ND = target - a_ND
        mistakes = {
            "it returns A's new vector: return what has to be added to the old one":
                a_ND + right_ND,
            "its sign is wrong: it goes away from the target": -right_ND,
            "it adds the target's coordinate to A's own: subtract A's first":
                step_to(0 * a_ND, target, direction_D),
            "it sets the coordinate to 0: the target's is missing":
                step_to(a_ND, 0 * target, direction_D),
            "it replaces all of A's vector: only the coordinate along the direction may change":
                gap_ND,
            "it returns A's new vector, all of it replaced": target.expand(9, 6),
            "it changes all but the coordinate along the direction": gap_ND - right_ND,
            "it multiplies number by number: sum to a dot product, then multiply by the direction":
                gap_ND * direction_D,
            "it goes the whole distance to the target: only the part along the direction is needed":
                gap_ND.norm(dim=1, keepdim=True) * direction_D,
            "its steps have lost their sign":
                (gap_ND @ direction_D).abs()[:, None] * direction_D,
            "all prompts get the same step: each has its own coordinate":
                right_ND.mean(0).expand(9, 6),
        }
        cases.append(((a_ND, target, direction_D), mistakes))
    return compare(mine, step_to, *cases)
