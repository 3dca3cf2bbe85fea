# A rate that falls to nothing along half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983).
s/^SCHEDULE = None$/SCHEDULE = lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)/
