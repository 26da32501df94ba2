"""From error profiles or predicted losses to a rank for every projection."""
