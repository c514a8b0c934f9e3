"""Rows in, packed batches out, in an order that is a pure function of seed and step."""
