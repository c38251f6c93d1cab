"""Kernels in C++: source in this package, built on first use, kept in the user's cache; nothing depends on them."""
