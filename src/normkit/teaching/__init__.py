"""The teaching view: one small batch through a normalizer, step by step, and a page for each of them."""
