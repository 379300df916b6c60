"""The command line of the science; `tasks.cli` adds the service.

May import every package.
"""

import os

# Before torch and scikit-learn are loaded: their threads wait for each other asleep instead of spinning. k-means of 60,000
# frames on two cores that others use took 1 s with it, and did not end in 100 s without it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
