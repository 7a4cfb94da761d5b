"""Online experiments (paper 4.3): which bucket a user is in, and what the buckets' logs say (Table 4)."""
