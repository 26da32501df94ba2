"""The checkpoint format: schema, reader, writer, low-rank matrices, latency table."""
