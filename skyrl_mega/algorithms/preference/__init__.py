"""Losses on preferences, and what of a micro-batch they look at."""
