"""Process groups and devices."""
