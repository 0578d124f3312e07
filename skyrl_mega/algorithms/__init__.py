"""Advantages, losses, KL estimators and reductions: pure tensor maths, no I/O."""
