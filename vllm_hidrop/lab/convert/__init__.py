"""Original-format LLaVA-1.5 and HiDrop checkpoints as Hugging Face LLaVA directories.

Knows no vLLM and prints nothing. Order of work: `prepare` reads configurations and weight headers and refuses what
cannot be converted; `Conversion.run` reads and writes weights.
"""

from vllm_hidrop.lab.convert.conversion import Conversion, Summary, prepare

__all__ = ["Conversion", "Summary", "prepare"]
