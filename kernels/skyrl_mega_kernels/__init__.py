"""Operators with one contract and several backends."""
