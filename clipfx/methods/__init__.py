"""One file a method, by its name."""
