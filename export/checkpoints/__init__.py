"""Reading checkpoints: where they come from, their configs, tensors and tokenizers."""
