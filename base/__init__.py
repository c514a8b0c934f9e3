"""Floor 0: errors, the shape legend, files, seeds, process-group helpers. Imports no other room."""
