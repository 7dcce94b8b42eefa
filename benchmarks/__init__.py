"""Measurements; every figure in the README and the docs comes from a JSON file in results/."""
