"""Strategy files: ZeRO stage, offload, communication. Nothing else is allowed in them."""
