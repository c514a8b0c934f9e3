"""Floor 3: LoRA experts, gates, routers, the routed linear, merges, routing statistics."""
