"""Speculative decoding with the model's own MTP heads: drafter, verification, and how much of a draft is accepted."""
