# Weight decay, apart from the gradient (Loshchilov and Hutter 2017, arXiv:1711.05101).
s/^OPTIMIZER = .*/OPTIMIZER = functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=True)/
