"""Comparison of ways to use an encoder on one data set: frozen, fully fine-tuned, with LoRA, with a linear map."""
