"""How weight buckets travel inside one machine: checksums and the shared-memory format both ends speak."""
