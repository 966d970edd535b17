"""Episode stores: schema (the one place that names arrays), writer (streams), reader (lazy)."""
