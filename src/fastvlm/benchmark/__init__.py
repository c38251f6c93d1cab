"""How fast it is, beside others: each benchmark measures, compares, and writes a file that says how to repeat it."""
