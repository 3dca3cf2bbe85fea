# A tenth of the label is spread over all classes (Szegedy et al. 2015, arXiv:1512.00567).
s/^LOSS = F.cross_entropy/LOSS = functools.partial(F.cross_entropy, label_smoothing=0.1)/
