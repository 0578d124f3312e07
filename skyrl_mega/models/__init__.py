"""Megatron-Core models built from Hugging Face configs, and the way of weights between the two."""
