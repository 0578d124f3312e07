"""The turn loop between an environment and an engine."""
