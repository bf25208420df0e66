"""Exercise 10 of ../EXERCISES.md: reviving dead latents.

    pytest extras/exercises/10_revive.py    # fails until the function is right
    python extras/exercises/10_revive.py    # a crosscoder without the loss, and one with it
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # dfc.py lies two folders up
from dfc import Crosscoder, aux_loss, fve, train


def revive(z_BMD, zhat_BMD, pre_BL, dead_L, W_dec, k):
    """The mean of (e - g)^2 over the first 1 + B // 4 pairs of the batch. This is faster than over
    the whole batch, and on the toy pair it revives as many latents.

    e: the error z - zhat. It is a target and gets no gradient.
    g: sum_l f_l W_dec[l], without b_dec, over the 2 k largest of the dead latents' pre-activations
       pre_BL, negative ones set to zero; all dead latents, if there are fewer than 2 k.
    dead_L: is a latent dead (bool)? If none is, the loss is 0."""
    raise NotImplementedError


def test_value_and_gradients_are_those_of_aux_loss():
    torch.manual_seed(0)
    for n_dead in (0, 3, 20):
        cc = Crosscoder(8, 24, 3)
        z_BMD = torch.randn(21, 2, 8)
        pre_BL = cc.preactivate(z_BMD)
        zhat_BMD = cc.decode(pre_BL.relu())
        dead_L = torch.randperm(24) < n_dead
        weights = [cc.b_dec, cc.b_enc, cc.W_enc, cc.W_dec]

        found = []
        for loss in (revive(z_BMD, zhat_BMD, pre_BL, dead_L, cc.W_dec, cc.k),
                     aux_loss(cc, z_BMD, zhat_BMD, pre_BL, dead_L)):
            loss = loss + 0 * sum(w.sum() for w in weights)  # so that each has a gradient
            found.append([loss, *torch.autograd.grad(loss, weights, retain_graph=True)])
        assert not found[0][1].any(), "b_dec gets a gradient: the error is not detached"
        names = ["loss"] + [f"gradient of {w}" for w in ("b_dec", "b_enc", "W_enc", "W_dec")]
        for name, mine, wanted in zip(names, *found):
            right = torch.allclose(mine, wanted, atol=1e-6)
            assert right, f"{n_dead} dead latents of 24: wrong {name}"


def main(steps=400):
    """Vectors of noise; every second latent starts with a weak encoder. Your loss is used."""
    def loss(cc, z_BMD, zhat_BMD, pre_BL, dead_L):
        return revive(z_BMD, zhat_BMD, pre_BL, dead_L, cc.W_dec, cc.k)

    for weight in (0, 1 / 32):
        torch.manual_seed(0)
        x_NMD = torch.randn(2000, 2, 16)
        cc = Crosscoder(16, 128, 4)
        cc.fit_scale(x_NMD)
        cc.W_enc.data[..., ::2] *= .2
        with patch("dfc.aux_loss", loss):
            train(cc, x_NMD, steps, batch=128, lr=3e-3, dead_after=5, revive=weight)

        live_L = cc.encode(x_NMD).any(0)
        weak = live_L[::2].float().mean()
        others = live_L[1::2].float().mean()
        a, b = fve(x_NMD, cc(x_NMD)[0]).tolist()
        print(f"weight {weight:.3f}: ever active are {weak:.0%} of the weak latents, "
              f"{others:.0%} of the others; variance explained: A {a:.2f}, B {b:.2f}")


if __name__ == "__main__":
    main()
