"""Learning: data, the step and the loop, recipes, state."""
