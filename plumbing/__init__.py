"""What no student needs to read; README.md beside this file says what is where.

Every command imports this before torch, because libgomp reads its settings when it is loaded. Its
threads spin while they wait for work, and take the cores from other programs. With fewer spins two
runs at once on two cores take 2.9 s an epoch each in place of 5.9, and one alone 1.1 s as before
(EPYC, fc+layer4, 400 pictures of 64x64). Only libgomp, on Linux, reads this.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # the user's own wish
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
