"""Rows in, packed batches out, in an order that is a pure function of seed and step.

rows.py reads and checks, tokens.py tokenises and caches, packing.py packs, loader.py orders and shards,
attention.py gives a Hugging Face model what keeps packed documents apart, build.py puts it together.
"""
