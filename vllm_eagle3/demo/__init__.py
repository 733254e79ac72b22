"""The demonstration pair: a small target and its trained head."""
