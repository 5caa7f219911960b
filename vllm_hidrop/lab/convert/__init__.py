"""Original-format LLaVA-1.5 and HiDrop checkpoints as Hugging Face LLaVA directories."""
