"""The command line and its doctor."""
