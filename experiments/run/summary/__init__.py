"""The machine-readable answer of a run: summary.json, its records and schema, and tokens.parquet."""
