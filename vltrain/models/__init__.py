"""Networks and what belongs to them: loading, adapters, the hub. Knows no data."""
