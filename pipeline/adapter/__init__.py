"""LoRA pairs and a head on a frozen encoder: where they attach, what they compute, how they are saved. The door to peft."""
