import torch.nn.functional as F


def vector_by_labels(x_NMD, needs_N, written_PD):
    a_ND = x_NMD[:, 0]
    difference_D = a_ND[needs_N].mean(0) - a_ND[~needs_N].mean(0)
    length_P1 = written_PD.norm(dim=1, keepdim=True)
    return length_P1 * F.normalize(difference_D, dim=0)
