"""Save, load, resume, export."""
