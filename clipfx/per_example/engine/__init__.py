"""From a loss of one example to norms and weighted sums of its gradients."""
