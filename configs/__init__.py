"""Hydra configuration files, installed as the package skyrl_mega_configs."""
