"""Other libraries' linear operators."""
