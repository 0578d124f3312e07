"""Settings: typed schema, loading through Hydra, and the rules that are checked before any heavy import."""
