"""Prompts in, packed and balanced training batches out."""
