"""The only package that imports vLLM: draft trees on Model Runner V2."""
