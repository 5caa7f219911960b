"""Settings every test process needs before vLLM, transformers or OpenMP are first imported.

Property tests draw the same examples every time, so that a failure is the change's; ``--hypothesis-profile=explore``
draws new ones. None has a deadline: machines stall.
"""

import os

from hypothesis import settings

ENVIRONMENT = {
    # The engine core runs in the test's own process: its scheduler and runner are at hand.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "2",
    # Loopback only: nothing is downloaded, nothing is reported.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")
