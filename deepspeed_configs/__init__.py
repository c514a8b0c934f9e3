"""Strategy files: ZeRO stage, precision, offload, communication. Nothing else is allowed in them."""
