import torch


def revive(z_BMD, zhat_BMD, pre_BL, dead_L, W_dec, k):
    if not dead_L.any():
        return z_BMD.new_zeros(())

    n_pairs = 1 + len(z_BMD) // 4
    error_BMD = (z_BMD - zhat_BMD)[:n_pairs].detach()

    # the largest of the dead; all others are zero
    pre_BK = pre_BL[:n_pairs, dead_L]
    largest = pre_BK.topk(min(2 * k, pre_BK.shape[1]))
    f_BK = torch.zeros_like(pre_BK).scatter(1, largest.indices, largest.values.relu())

    guess_BMD = torch.einsum("bk,kmd->bmd", f_BK, W_dec[dead_L])
    return (error_BMD - guess_BMD).pow(2).mean()
