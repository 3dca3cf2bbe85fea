# In the first of ten epochs the rates grow to what they are (Goyal et al. 2017, arXiv:1706.02677).
s/^SCHEDULE = None$/SCHEDULE = lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1, steps \/\/ 10)/
