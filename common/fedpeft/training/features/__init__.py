"""Features of a run's examples that training does not change: where they end in a model, and those that are kept."""
