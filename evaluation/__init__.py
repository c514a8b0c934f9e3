"""Floor 4: tasks, likelihood ranking, exact match, intervals, tables, the report."""
