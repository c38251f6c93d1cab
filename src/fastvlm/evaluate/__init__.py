"""How well a model answers: `run.run` measures, `report.render` makes a table of it."""
