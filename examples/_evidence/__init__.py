"""Claims about clipping, a file for each theme: see `examples.evidence`."""
