"""LoRA pairs and a head on a frozen encoder: which layers get them, how they compute, how they are saved.

The only package that imports peft.
"""
