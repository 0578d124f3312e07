"""Gymnasium-style text environments and their registry."""
