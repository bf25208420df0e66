def ablate_everywhere(cc, latents, along_D=None):
    def edit(h_BTD):
        z_BTD = (h_BTD.float() - cc.mean[0]) / cc.scale[0]
        pre_BTS = z_BTD @ cc.W_enc[0][:, latents] + cc.b_enc[latents]
        written_BTD = pre_BTS.relu() @ (cc.W_dec[latents, 0] * cc.scale[0])
        if along_D is not None:
            written_BTD = written_BTD.norm(dim=-1, keepdim=True) * along_D
        return h_BTD - written_BTD.to(h_BTD)
    return edit
