"""Programs that are measured beside ours: each runs in an interpreter of its own and knows nothing of this package."""
