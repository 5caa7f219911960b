"""Environment defaults that vLLM reads once, set before it is imported; what the user set stays.

Knows names and values only.
"""

import os

MEDIA_CONNECTOR = "hidrop"
"""Name of `hidrop_server.media.connector`'s connector."""
SAFE_DEFAULTS = {
    # A small PNG can unpack to gigabytes. 50 megapixels is the largest phone camera; vLLM's default is 179.
    "VLLM_MAX_IMAGE_PIXELS": "50000000",
    # Of one file, sent or fetched; vLLM's default is 256.
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "20",
    "VLLM_MEDIA_CONNECTOR": MEDIA_CONNECTOR,
    "HIDROP_END_WITH_PARENT": "1",
}
EMBEDDED_DEFAULTS = {
    # The embedded model is on this disk: no look at the network, and a pool a laptop can spare (GiB).
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def set_defaults(embedded: bool) -> None:
    """Set what the user has not set."""
    defaults = SAFE_DEFAULTS | (EMBEDDED_DEFAULTS if embedded else {})
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
