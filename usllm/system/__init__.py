"""What the rest stands on and what knows nothing of it: errors, files, the cache, locks, ranks, the machine."""
