"""What no student needs to read; README.md beside this file says what is where.

Every command imports this before torch, because libgomp reads its settings when it is loaded. Its
threads spin while they wait for work, and take the cores from other programs: two runs side by side
on two cores are up to ten times as slow as alone. With fewer spins they are 2.2 times as slow, and
one alone is as fast. Other OpenMP libraries, on macOS and Windows, do not read this.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # the user's own wish
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
