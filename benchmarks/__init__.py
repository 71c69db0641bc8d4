"""Every claim about speed, as a script that prints ratios."""
