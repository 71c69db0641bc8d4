"""Examples that train something small and show what clipping does to it."""
