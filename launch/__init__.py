"""Floor 5: what people start. Thin files; no logic."""
