"""Training of EAGLE-3 heads, in pure PyTorch."""
