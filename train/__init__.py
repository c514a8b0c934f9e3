"""Floor 4: recipe, data, jobs, the DeepSpeed engine, checkpoints, tracking, export."""
