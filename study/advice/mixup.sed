# Each training example is mixed with another one (Zhang et al. 2017, arXiv:1710.09412); here what
# the frozen part makes of it, which is kept (Verma et al. 2018, arXiv:1806.05236).
s/^        logits = tail(x)$/        share = torch.rand((), device=x.device)\
        logits = tail(share * x + (1 - share) * x.flip(0))/
s/^    loss = LOSS(logits.float(), y)$/    loss = share * LOSS(logits.float(), y)\
    loss = loss + (1 - share) * LOSS(logits.float(), y.flip(0))/
