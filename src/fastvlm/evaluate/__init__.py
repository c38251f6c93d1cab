"""Measuring what a model can do: tasks, runs, reports."""
