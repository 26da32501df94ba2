"""A checkpoint or a set of sizes as one HTML page that needs no network."""
