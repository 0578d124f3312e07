"""The loop, and the composition root that assembles it."""
