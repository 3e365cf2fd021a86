"""One file per algorithm or close family."""
