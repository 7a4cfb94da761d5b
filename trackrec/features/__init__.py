"""The batch feature job: active users' histories to RecCoTs and their vectors, as a partitioned table.

OUT/dt=2026-11-28/shard=00000/part.parquet     rows of `table.schema`, ordered by user_id
OUT/dt=2026-11-28/_manifest.json               `table.Manifest`
OUT/dt=2026-11-28/_SUCCESS                     last: the SHA-256 of _manifest.json
"""
